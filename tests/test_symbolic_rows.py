"""Live rows of batches whose sizes change: one graph serves all lengths and all numbers of live rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liger_compile
from tests.models.families import VOCAB
from tests.models.harness import assert_within, step
from tests.test_live_rows import (
    EXACT,
    ROWS,
    batch,
    compiled,
    loss,
    made,
    masks,
)

Batch = tuple[Tensor, Tensor, Tensor]
WIDTH, HEADS = 32, 2


class Tiny(nn.Module):
    """A model of one layer, which compiles faster than those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.norms = nn.Parameter(torch.ones(3, WIDTH))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def norm(self, at: int, x: Tensor) -> Tensor:
        return F.rms_norm(x, (WIDTH,), self.norms[at])

    def attention(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        seen = (at <= at[:, None]) & mask.bool()[:, None, None, :]
        x = self.embedding(ids)
        x = x + self.attention(self.norm(0, x), seen)
        x = x + self.down(F.gelu(self.up(self.norm(1, x))))
        return self.head(self.norm(2, x))


def tiny_loss(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    labels = F.pad(labels.masked_fill(mask == 0, -100), (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(model(ids, mask).flatten(0, 1), labels.flatten())


def of(name: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    return (Tiny(), tiny_loss) if name == "tiny" else (made(name), loss)


def padded(lengths: Tensor, is_left: bool) -> Batch:
    """A batch as collators make it: padded to its longest row."""
    length = int(lengths.max())
    at = torch.arange(length)
    present = at >= length - lengths[:, None] if is_left else at < lengths[:, None]
    return *batch(length, len(lengths)), present.long()


def epoch(seed: int, num_batches: int) -> Iterator[Batch]:
    """Batches of random lengths; some have no padding, some have a row of one token, and the last one is smaller."""
    random = torch.Generator().manual_seed(seed)
    for at in range(num_batches):
        lengths = torch.randint(4, 41, (3 if at < num_batches - 1 else 2,), generator=random)
        if at % 5 == 3:
            lengths[:] = lengths[0]
        if at % 5 == 4:
            lengths[0] = 1
        yield padded(lengths, is_left=at % 2 == 1)


def names() -> list[tuple[str, str]]:
    return [(report.name, report.variant) for report in liger_compile.reports()]


def assert_as_in_eager(
    fast: Callable[..., Tensor], function: Callable[..., Tensor], model: nn.Module, given: Batch
) -> None:
    assert_within(step(fast, model, *given), step(function, model, *given), EXACT)


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("tiny", "eager"),
        pytest.param("tiny", "inductor", marks=pytest.mark.slow),
        pytest.param("gpt2", "aot_eager", marks=pytest.mark.slow),
        pytest.param("llama", "inductor", marks=pytest.mark.slow),
        pytest.param("gemma2", "inductor", marks=pytest.mark.slow),
        pytest.param("bert", "inductor", marks=pytest.mark.slow),
    ],
)
def test_an_epoch_of_random_lengths_compiles_few_graphs(name: str, inner: str) -> None:
    model, function = of(name)
    fast = compiled(function, inner, options=ROWS)
    for given in epoch(0, 11):
        assert_as_in_eager(fast, function, model, given)
    found = names()
    # Dynamo traces one length, then any length, then any batch. Each trace has at most three graphs.
    assert len(found) == len(set(found)) <= 7
    assert {graph for graph, _ in found} == {"0/0", "0/1", "0/2"}
    assert ("0/1", "live rows") in found
    for given in epoch(1, 11):  # the batch is symbolic too
        assert_as_in_eager(fast, function, model, given)
    later = names()[len(found) :]
    assert set(later) <= {("0/2", "live rows"), ("0/2", "generic"), ("0/2", "without padding")}
    assert ("0/2", "live rows") in names()
    for given in epoch(2, 11):
        assert_as_in_eager(fast, function, model, given)
    assert names() == [*found, *later]


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("tiny", "eager"),
        pytest.param("tiny", "aot_eager", marks=pytest.mark.slow),
        pytest.param("llama", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_dynamic_from_the_first_call(name: str, inner: str) -> None:
    model, function = of(name)
    fast = compiled(function, inner, options=ROWS, dynamic=True)
    for given in epoch(3, 8):
        assert_as_in_eager(fast, function, model, given)
    assert ("0/0", "live rows") in names() and len(names()) == len(set(names())) <= 3


def with_given_labels(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(model(ids, mask).flatten(0, 1), labels.flatten())


def test_inputs_that_nothing_but_the_loss_joins() -> None:
    """Dynamo knows no more than that there are as many labels as tokens."""
    model, fast = Tiny(), compiled(with_given_labels, "eager", options=ROWS)
    for rows, length in ((2, 48), (2, 40), (3, 33), (4, 44)):
        ids, labels = batch(length, rows)
        mask = masks(ids)["left" if length == 33 else "right"]
        mask[-1, : length // 2 - 1] = 0
        labels = labels.masked_fill(mask == 0, -100)
        assert_as_in_eager(fast, with_given_labels, model, (ids, labels, mask))
    assert names()[-1] == ("0/2", "live rows")


def test_numbers_of_live_rows_in_batches_of_one_length() -> None:
    model, fast = Tiny(), compiled(tiny_loss, "eager", options=ROWS)
    ids, labels = batch(48, 3)
    for lengths in ((20, 30, 48), (5, 48, 30), (48, 1, 1), (48, 40, 8), (30, 48, 20), (48, 48, 46)):
        mask = (torch.arange(48) < torch.tensor(lengths)[:, None]).long()
        assert_as_in_eager(fast, tiny_loss, model, (ids, labels, mask))
    assert [variant for _, variant in names()] == ["120 of 144 rows", "live rows", "generic"]


def shifted_logits(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    logits = model(ids, mask)[..., :-1, :].contiguous()
    labels = labels.masked_fill(mask == 0, -100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))


def cut_on_both_sides(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    logits, labels = model(ids, mask)[:, 2:-2], labels.masked_fill(mask == 0, -7)[:, 3:-1]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-7)


@pytest.mark.parametrize(
    "function",
    [pytest.param(shifted_logits, marks=pytest.mark.slow), cut_on_both_sides],
    ids=["shifted logits", "cut on both sides"],
)
def test_slices_of_logits(function: Callable[..., Tensor]) -> None:
    model, fast = Tiny(), compiled(function, "eager", options=ROWS)
    for length in (48, 40, 33, 9, 5):  # hardly more tokens than the slice leaves out
        ids, labels = batch(length)
        for kind in ("right", "left", "none"):
            mask = masks(ids)[kind]
            assert_as_in_eager(fast, function, model, (ids, labels.clamp(min=0), mask))
    assert ("0/1", "live rows") in names()


def reshaped(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    logits = model(ids, mask)[:, :-1].reshape(-1, VOCAB)
    return F.cross_entropy(logits, labels[:, 1:].reshape(-1))


def test_slices_of_which_torch_writes_the_number_of_rows_in_two_ways() -> None:
    model, fast = Tiny(), compiled(reshaped, "eager", options=ROWS)
    for length, rows in ((48, 4), (40, 3), (33, 5)):  # B*(T - 1) rows of logits, and B*T - B labels
        ids, labels = batch(length, rows)
        mask = masks(ids)["right"]
        assert_as_in_eager(fast, reshaped, model, (ids, labels.masked_fill(mask == 0, -100), mask))
    assert ("0/1", "live rows") in names()


@pytest.mark.parametrize(
    ("name", "inner"), [("gpt2", "eager"), pytest.param("llama", "inductor", marks=pytest.mark.slow)]
)
def test_checkpointed_layers(name: str, inner: str) -> None:
    model, fast = made(name), compiled(loss, inner, options=ROWS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for length in (48, 40, 33):
        ids, labels = batch(length)
        assert_as_in_eager(fast, loss, model, (ids, labels, masks(ids)["right"]))
    assert ("0/1", "live rows") in names()


def with_hidden(model: Tiny, ids: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = model(ids, mask)
    labels = F.pad(labels.masked_fill(mask == 0, -100), (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits, model.embedding(ids)


def test_outputs_that_have_all_rows() -> None:
    model, fast = Tiny(), compiled(with_hidden, "eager", options=ROWS)
    for length in (48, 40, 44):
        ids, labels = batch(length)
        given = ids, labels, masks(ids)["right"]
        got, expected = fast(model, *given), with_hidden(model, *given)
        assert [x.shape for x in got] == [x.shape for x in expected]
        if length == 44:  # a read in each call would end the omission of rows
            values = [x.detach() + 0 for x in got]
            torch.testing.assert_close(values, [x.detach() for x in expected], rtol=2e-4, atol=2e-5)
    assert names() == [("0/0", "80 of 96 rows"), ("0/1", "live rows")]


def test_a_call_reads_once_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def counting(name: str) -> Callable[..., object]:
        original = getattr(Tensor, name)
        return lambda tensor, *args: (reads.append(name), original(tensor, *args))[1]

    # The fused loss reads on the host too where it runs on a CPU.
    options = {**ROWS, "liger.skip": ("linear_cross_entropy",)}
    model, fast = Tiny(), compiled(tiny_loss, "eager", options=options)
    batches = [padded(torch.tensor(lengths), False) for lengths in ((20, 9, 40), (30, 30, 30), (40, 40, 39))]
    for given in (*batches, *batches):
        step(fast, model, *given)
    for name in ("tolist", "item", "__bool__", "nonzero"):
        monkeypatch.setattr(Tensor, name, counting(name))
    for given in batches:
        fast(model, *given)
        assert reads == ["tolist"]
        reads.clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_call_waits_once_for_the_gpu() -> None:
    model = made("llama").cuda().to(torch.bfloat16)
    fast = compiled(loss, "inductor", options=ROWS)
    batches = [
        tuple(x.cuda() for x in padded(torch.tensor(lengths), False))
        for lengths in ((20, 9, 40), (30, 30, 30), (40, 40, 39), (18, 7, 36))
    ]
    for given in (*batches, *batches):
        step(fast, model, *given)
    for given in batches:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                fast(model, *given).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(warning.message) for warning in found if "synchroniz" in str(warning.message)]
        assert len(waits) == 1, waits
