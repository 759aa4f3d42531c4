"""Outputs that have all rows, beside a graph of live rows: the first read computes the values of eager code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liger_compile
from liger_compile.forward_passes import late_rows
from liger_compile.runtime.lazy import LazyTensor
from tests.test_live_rows import ROWS, batch, compiled, made, masks

pytest.importorskip("transformers")
BOUNDS = {"rtol": 2e-4, "atol": 2e-5}


def default_call(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Any:
    """As users write it: the loss, the logits, and a cache if the config has use_cache."""
    return model(input_ids=ids, attention_mask=mask, labels=labels.masked_fill(mask == 0, -100))


def hidden_states(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Any:
    """The last hidden state beside its logits, the one before, and some rows."""
    embedded = model.model.embed_tokens(ids)
    hidden = model.model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    labels = F.pad(labels.masked_fill(mask == 0, -100), (0, 1), value=-100)[:, 1:].reshape(-1)
    loss = F.cross_entropy(logits.flatten(0, 1), labels)
    return SimpleNamespace(loss=loss, logits=logits, hidden=hidden, embedded=embedded, some=hidden[:, 1:] * 2)


def weight_of(model: nn.Module) -> nn.Parameter:
    """A weight of the first layer."""
    return next(p for name, p in model.named_parameters() if p.dim() == 2 and "layers.0" in name)


Read = Callable[[Any, nn.Module, Tensor, Tensor], Any]
Optimizer = Callable[[Any], torch.optim.Optimizer]


def after(make: Optimizer, chosen: str = "", steps: int = 1, value: str = "logits") -> Read:
    """Reads a value after optimizer steps on the weights whose names contain `chosen`."""

    def read(out: Any, model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
        out.loss.backward()
        optimizer = make([p for name, p in model.named_parameters() if chosen in name])
        for _ in range(steps):
            optimizer.step()
        return getattr(out, value)

    return read


def gradients(loss: Callable[[Any], Tensor]) -> Read:
    def read(out: Any, model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
        model.zero_grad()
        loss(out).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    return read


def overwritten(out: Any, model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
    ids.fill_(5), mask.fill_(1)
    return out.logits


def without_gradients(out: Any, model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
    with torch.no_grad():
        return out.logits.float().softmax(-1)


def plain(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=0.5, foreach=False)


def foreach(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.5, foreach=True)


def fused(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.5, fused=True)


READS: dict[str, Read] = {
    "at once": lambda out, *_: out.logits,
    "after backward": lambda out, *_: (out.loss.backward(), out.logits)[1],
    "under no_grad": without_gradients,
    "after the inputs changed": overwritten,
    "after SGD": after(plain),
    "after foreach": after(foreach),
    "after two fused steps": after(fused, steps=2),
    "after a step of one layer": after(fused, "layers.0"),
    "after a step of the head": after(plain, "lm_head"),
    "gradient": gradients(lambda out: out.loss + 0.1 * out.logits.float().logsumexp(-1).square().mean()),
    "gradient of logits alone": gradients(lambda out: out.logits.square().mean()),
    "copies": lambda out, *_: copy.deepcopy(out.logits.detach()),
    "cache": lambda out, *_: out.past_key_values.layers[0].keys,
    "cache after a step": lambda out, *args: (
        after(fused)(out, *args),
        out.past_key_values.layers[-1].values,
    )[-1],
    "gradient of the cache": gradients(
        lambda out: out.loss + sum(layer.keys.square().mean() for layer in out.past_key_values.layers)
    ),
}
READS_OF_HIDDEN: dict[str, Read] = {
    "hidden state": lambda out, *_: out.hidden,
    "embedding": lambda out, *_: out.embedded,
    "some of the rows": lambda out, *_: out.some,
    "hidden state after a step": after(foreach, value="hidden"),
    "logits after a write into the hidden state": lambda out, *_: (out.hidden.detach().zero_(), out.logits)[
        1
    ],
    "gradient": gradients(
        lambda out: out.loss + out.hidden.square().mean() + out.logits.square().mean() + out.some.mean()
    ),
}


@pytest.fixture
def many_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(late_rows, "CALLS_PER_READ", 0)
    yield


def read_from(function: Callable[..., Any], read: Read, kind: str) -> list[Tensor]:
    model, (ids, labels) = made("llama"), batch()
    mask = masks(ids)[kind].clone()
    found = read(function(model, ids, labels, mask), model, ids, mask)
    return [tensor.detach() + 0 for tensor in (found if isinstance(found, list) else [found])]


@pytest.mark.parametrize(
    ("function", "reads"),
    [(default_call, READS), (hidden_states, READS_OF_HIDDEN)],
    ids=["default call", "hidden states"],
)
def test_reads_give_the_values_of_eager(function, reads, many_reads) -> None:
    fast = compiled(function, "aot_eager", options=ROWS)
    for at, (name, read) in enumerate(reads.items()):
        kind = ("right", "left")[at % 2]
        expected = read_from(function, read, kind)
        torch.testing.assert_close(
            read_from(fast, read, kind), expected, **BOUNDS, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert [report.variant for report in liger_compile.reports()] == ["80 of 96 rows"]


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "all": lambda model: weight_of(model).data.mul_(2),
    "one element": lambda model: weight_of(model).data[1].__setitem__(2, 7.0),
    "a row of the embedding": lambda model: model.model.embed_tokens.weight.data[5].add_(1),
    "NumPy": lambda model: weight_of(model).detach().numpy().__setitem__((0, 0), 9.0),
    "in place": lambda model: weight_of(model).detach().add_(1),
}


def test_a_changed_weight_is_an_error(many_reads) -> None:
    fast = compiled(default_call, options=ROWS)
    for write in WRITES.values():
        model, (ids, labels) = made("llama"), batch()
        out = fast(model, ids, labels, masks(ids)["right"])
        write(model)
        with pytest.raises(RuntimeError, match=r"cannot be computed any more.*liger\.rows"):
            out.logits.tolist()
        with pytest.raises(RuntimeError, match=r"cannot be computed any more.*liger\.rows"):
            out.past_key_values.layers[0].keys.sum()


def test_calls_whose_outputs_are_read_compute_all_rows() -> None:
    model, fast = made("llama"), compiled(default_call, options=ROWS)
    ids, labels = batch()
    mask = masks(ids)["right"]
    for _ in range(3):
        logits = fast(model, ids, labels, mask).logits
        torch.testing.assert_close(
            logits.detach(), default_call(model, ids, labels, mask).logits.detach(), **BOUNDS
        )
    live, *others = liger_compile.reports()
    assert live.variant == "80 of 96 rows" and len(others) == 1
    assert any(note.startswith("all rows are computed from call 3 on") for note in live.late_notes)


def test_a_loop_that_keeps_its_outputs_alive() -> None:
    """Copies of the weights take no more memory than the outputs, so no step computes rows."""
    model, fast = made("llama"), compiled(default_call, options=ROWS)
    optimizer = torch.optim.AdamW(model.model.layers[0].input_layernorm.parameters(), lr=0.1)
    ids, labels = batch()
    mask = masks(ids)["right"]
    for _ in range(4):
        out = fast(model, ids, labels, mask)
        out.loss.backward()
        expected = default_call(model, ids, labels, mask).logits.detach()
        optimizer.step()
    assert isinstance(out.logits, LazyTensor) and out.logits.is_waiting
    (report,) = liger_compile.reports()
    assert not report.late_notes
    torch.testing.assert_close(out.logits.detach(), expected, **BOUNDS)


def test_a_checkpoint_in_eager_code_computes_all_rows() -> None:
    model, fast = made("llama"), compiled(default_call, options=ROWS)
    ids, labels = batch()
    mask = masks(ids)["right"]

    def step(function: Callable[..., Any]) -> list[Tensor]:
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            function(model, ids, labels, mask).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(step(fast), step(default_call), **BOUNDS)
    assert [report.variant for report in liger_compile.reports()] == ["generic"]
