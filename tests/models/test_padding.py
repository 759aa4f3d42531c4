"""Whole models with a padding mask, as trainers hand it to every call: two graphs, and the numbers of eager in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import liger_compile
from liger_compile.forward_passes.specialize import GENERIC, WITHOUT
from liger_compile.testing import precision
from tests.models.families import BY_NAME, HEADS, INNER, LAYERS, VOCAB, WIDTH, of_one_layer
from tests.models.harness import Step, assert_within, batch, by_default, compiled, gradients, replaced, step

EXACT = 1e-5
LENGTHS = (24, 40, 17)
LLAMA = of_one_layer(BY_NAME["llama"])  # test_decoders: more layers read one mask
REPLACED = by_default(LLAMA.counts)
GRAPH = "eager"  # the graph alone: test_decoders and what is about backward have AOTAutograd too


def masks(ids: Tensor) -> dict[str, Tensor]:
    """One row has padding: at its end, as while training; in front, as while generating; or it is padding alone."""
    found = {name: torch.ones_like(ids) for name in ("none", "right", "left", "whole row")}
    found["right"][1, -5:] = found["left"][0, :7] = found["whole row"][1] = 0
    return found


def loss(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    labels = labels.masked_fill(mask == 0, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss


def encoder_loss(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, labels=labels.masked_fill(mask == 0, -100)).loss


def counts(variant: str, keys: Mapping[str, int]) -> dict[str, int]:
    """What was replaced in the graph of this name; it was compiled once."""
    (report,) = (report for report in liger_compile.reports() if report.variant == variant)
    return replaced(keys, [report])


def check(
    model: nn.Module,
    inputs: tuple[Tensor, Tensor],
    expected: Mapping[str, int],
    function: Callable[..., Tensor] = loss,
    order: tuple[str, ...] = ("none", "right", "left", "whole row", "none"),
    fast: Callable[..., Tensor] | None = None,
    inner: str = "aot_eager",
) -> None:
    """Loss and gradients are those of eager with every mask; all sites in the one graph, in the other no attention."""
    fast = fast or compiled(function, inner)
    ids, labels = inputs
    for name in order:
        args = (ids, labels, masks(ids)[name])
        assert_within(step(fast, model, *args), step(function, model, *args), EXACT)
    assert counts(WITHOUT, expected) == dict(expected)
    assert counts(GENERIC, expected) == {
        op: n for op, n in expected.items() if not op.startswith("attention")
    }
    assert len(liger_compile.reports()) == 2


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma"))]
)
def test_decoders(name: str) -> None:
    family = BY_NAME[name]
    check(family.build(), batch(family), by_default(family.counts))


@pytest.mark.slow
def test_inductor_with_padding_first() -> None:
    fast = compiled(loss, "inductor", fullgraph=True)
    check(LLAMA.build(), batch(LLAMA), REPLACED, order=("left", "none", "right", "none"), fast=fast)


# test_autocast has the other order.
@pytest.mark.parametrize(
    "order", [pytest.param(("none", "right"), marks=pytest.mark.slow), ("right", "none")]
)
def test_gradient_checkpointing(order: tuple[str, ...]) -> None:
    model = LLAMA.build()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check(model, batch(LLAMA), REPLACED, order=(*order, *order))


@pytest.mark.slow
def test_dynamic() -> None:
    model, fast = LLAMA.build(), compiled(loss, dynamic=True)
    for length in LENGTHS[:2]:
        check(model, batch(LLAMA, length), REPLACED, fast=fast)


def test_automatic_dynamic() -> None:
    model, fast = LLAMA.build(), compiled(loss, GRAPH)  # test_dynamic has AOTAutograd
    for length, compiles in zip(LENGTHS, (1, 2, 0), strict=True):
        liger_compile.clear_reports()
        ids, labels = batch(LLAMA, length)
        assert_within(
            step(fast, model, ids, labels, torch.ones_like(ids)),
            step(loss, model, ids, labels, torch.ones_like(ids)),
            EXACT,
        )
        assert len(liger_compile.reports()) == compiles


def test_retain_graph() -> None:
    model, (ids, labels) = LLAMA.build(), batch(LLAMA)
    fast = compiled(loss)

    def run(function: Callable[..., Tensor], mask: Tensor) -> Step:
        model.zero_grad()
        result = function(model, ids, labels, mask)
        result.backward(retain_graph=True)
        result.backward(torch.tensor(0.5))
        return Step(result.detach(), gradients(model))

    for name in ("none", "left", "none"):
        assert_within(run(fast, masks(ids)[name]), run(loss, masks(ids)[name]), EXACT)


def test_backward_of_one_graph_after_forward_of_the_other() -> None:
    model, (ids, labels) = LLAMA.build(), batch(LLAMA)

    def run(function: Callable[..., Tensor]) -> Step:
        model.zero_grad()
        losses = [function(model, ids, labels, masks(ids)[name]) for name in ("none", "right", "left")]
        for one in losses:
            one.backward()
        return Step(torch.stack(losses).detach(), gradients(model))

    assert_within(run(compiled(loss)), run(loss), EXACT)
    assert len(liger_compile.reports()) == 2


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_evaluation(no_gradients: Any) -> None:
    model, (ids, labels) = LLAMA.build().eval(), batch(LLAMA)
    fast = compiled(loss, GRAPH)
    with no_gradients():
        for name in ("right", "none", "left"):
            args = (ids, labels, masks(ids)[name])
            torch.testing.assert_close(fast(model, *args), loss(model, *args), rtol=EXACT, atol=0)
    assert counts(WITHOUT, REPLACED) == REPLACED


@pytest.mark.parametrize(
    "order", [("none", "right"), pytest.param(("right", "none"), marks=pytest.mark.slow)]
)
def test_autocast(order: tuple[str, ...]) -> None:
    model, (ids, labels) = LLAMA.build(), batch(LLAMA)
    fast = compiled(loss, GRAPH)
    for name in order:
        mask = masks(ids)[name]
        truth = step(loss, model, ids, labels, mask)
        with torch.autocast("cpu", torch.bfloat16):
            eager = step(loss, model, ids, labels, mask)
            ours = step(fast, model, ids, labels, mask)
        precision.assert_no_worse(ours.gradients, eager.gradients, truth.gradients)
    assert counts(WITHOUT, REPLACED) == REPLACED


_BERT = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize("kind", ["Bert", pytest.param("Roberta", marks=pytest.mark.slow)])
def test_encoders(kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, **_BERT, **_NO_DROPOUT)
    model = getattr(transformers, f"{kind}ForMaskedLM")(config).train()
    counts = {"attention.unmasked": LAYERS, "linear_cross_entropy": 1}
    check(model, batch(LLAMA), counts, encoder_loss, inner=GRAPH)


def test_encoder_and_decoder() -> None:
    """T5's own attention has a learned bias; the decoder's attention to the encoder has nothing but its padding."""
    family = BY_NAME["t5"]
    check(family.build(), batch(family), by_default(family.counts), inner=GRAPH)
