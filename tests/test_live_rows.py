"""Live rows: padding without a label is not computed, and loss and gradients are those of eager code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liger_compile
from liger_compile.ops import linear_cross_entropy
from tests.models import harness
from tests.models.families import BY_NAME, VOCAB, of_one_layer
from tests.models.harness import ALWAYS, assert_within, errors, step

transformers = pytest.importorskip("transformers")
EXACT = 1e-5
BATCH, LENGTH = 2, 48
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TINY_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
ROWS = {"liger.rows": "auto"}


def bert(p: float = 0.0) -> nn.Module:
    config = transformers.BertConfig(**TINY, hidden_dropout_prob=p, attention_probs_dropout_prob=p)
    return transformers.BertForMaskedLM(config)


def modern_bert() -> nn.Module:
    special = dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1
    )
    return transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**{**TINY, "num_hidden_layers": 2}, local_attention=8, **special)
    )


MODELS = {
    **{name: of_one_layer(BY_NAME[name]).build for name in ("llama", "qwen3", "gemma2")},
    "llama of two layers": BY_NAME["llama"].build,
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY_GPT2, **NO_DROPOUT)),
    "bert": bert,
    "modernbert": modern_bert,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().train()


def batch(length: int = LENGTH, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(length)
    ids, labels = torch.randint(3, VOCAB, (2, rows, length), generator=random)
    labels[0, :3] = -100
    return ids, labels


def masks(ids: Tensor) -> dict[str, Tensor]:
    found = {name: torch.ones_like(ids) for name in ("none", "right", "left", "both", "whole row", "holes")}
    length = ids.shape[1]
    found["right"][1, length // 2 :] = found["left"][0, : length // 2] = found["whole row"][1] = 0
    found["both"][1, length // 3 :] = found["both"][0, : length // 3] = 0
    found["holes"][:, ::2] = 0
    return found


def loss(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    more = {} if "Bert" in type(model).__name__ else {"use_cache": False}
    return model(input_ids=ids, attention_mask=mask, labels=labels.masked_fill(mask == 0, -100), **more).loss


def labeled(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Padding has labels too."""
    return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss


def compiled(function, inner: str = "eager", **kwargs):
    return harness.compiled(function, inner, **kwargs)


def variants() -> list[str]:
    return [report.variant for report in liger_compile.reports()]


def is_of_live_rows(variant: str) -> bool:
    return variant.endswith(" rows")


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("llama of two layers", (48,)),
        ("bert", (48,)),
        *(
            pytest.param(name, lengths, marks=pytest.mark.slow)
            for name, lengths in (
                ("gemma2", (48,)),  # of which all is proven below
                ("llama", (64, 33, 50)),
                ("qwen3", (48,)),
                ("gpt2", (40,)),
                ("modernbert", (48,)),
            )
        ),
    ],
)
def test_loss_and_gradients_are_those_of_eager(name: str, lengths: tuple[int, ...]) -> None:
    for length in lengths:
        torch._dynamo.reset()
        liger_compile.clear_reports()
        model, fast = made(name), compiled(loss, options=ROWS)
        ids, labels = batch(length)
        for mask in masks(ids).values():
            got = step(fast, model, ids, labels, mask)
            assert_within(got, step(loss, model, ids, labels, mask), EXACT)
        assert any(map(is_of_live_rows, variants())), [report.notes for report in liger_compile.reports()]


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("llama", "eager"),
        ("gemma2", "aot_eager"),
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in ("llama", "gemma2")),
    ],
)
def test_all_that_is_proven(name: str, inner: str) -> None:
    model, fast = made(name), compiled(loss, inner, options={**ROWS, **ALWAYS})
    ids, labels = batch()
    for kind in ("right", "both", "none"):
        mask = masks(ids)[kind]
        assert_within(step(fast, model, ids, labels, mask), step(loss, model, ids, labels, mask), EXACT)
    (report, *_) = [report for report in liger_compile.reports() if is_of_live_rows(report.variant)]
    replaced = {site.pattern for site in report.sites if site.kind == "replace"}
    assert inner == "inductor" or {"attention.padded", "attention.capped_padded"} & replaced
    assert any("% of the rows are padding: not computed" in note for note in report.notes)


def test_the_same_as_each_row_alone_and_as_packed() -> None:
    model, fast = made("llama"), compiled(loss, options=ROWS)
    ids, labels = batch()
    mask = masks(ids)["right"]
    got = step(fast, model, ids, labels, mask)

    def alone(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        total, count = torch.zeros(()), 0
        for row in range(BATCH):
            kept = int(mask[row].sum())
            logits = model(ids[row : row + 1, :kept], use_cache=False).logits[0, :-1]
            targets = labels[row, 1:kept]
            total = total + F.cross_entropy(logits, targets, reduction="sum")
            count += int((targets != -100).sum())
        return total / count

    def packed(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        kept = mask.bool()
        positions = torch.cat([torch.arange(int(row.sum())) for row in mask])[None]
        targets = labels.clone()
        targets[:, 0] = -100
        return model(
            ids[kept][None], position_ids=positions, labels=targets[kept][None], use_cache=False
        ).loss

    assert_within(got, step(alone, model, ids, labels, mask), EXACT)
    assert_within(got, step(packed, model, ids, labels, mask), EXACT)
    assert variants() == ["80 of 96 rows"]


@pytest.mark.parametrize("dtype", [pytest.param(torch.bool, marks=pytest.mark.slow), torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    model, fast = made("llama"), compiled(loss, options=ROWS)
    ids, labels = batch()
    mask = masks(ids)["left"].to(dtype)
    assert_within(step(fast, model, ids, labels, mask), step(loss, model, ids, labels, mask), EXACT)
    assert is_of_live_rows(variants()[0])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "right"),
        ("gemma2", "left"),
        pytest.param("llama", "left", marks=pytest.mark.slow),
        pytest.param("llama", "holes", marks=pytest.mark.slow),
    ],
)
def test_padding_with_labels_is_computed(name: str, kind: str) -> None:
    model, fast = made(name), compiled(labeled, options=ROWS)
    ids, labels = batch()
    mask = masks(ids)[kind]
    labels = labels.clone()
    labels[1, LENGTH // 2 + 4 :] = -100
    assert_within(step(fast, model, ids, labels, mask), step(labeled, model, ids, labels, mask), EXACT)
    assert not any(map(is_of_live_rows, variants()))


def test_one_row() -> None:
    model, fast = made("llama"), compiled(loss, options=ROWS)
    ids, labels = batch(64, rows=1)
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    assert_within(step(fast, model, ids, labels, mask), step(loss, model, ids, labels, mask), EXACT)
    assert variants() == ["32 of 64 rows"]


def test_nothing_but_padding() -> None:
    model, fast = made("llama"), compiled(loss, options=ROWS)
    ids, labels = batch()
    mask = torch.zeros_like(ids)
    got, expected = step(fast, model, ids, labels, mask), step(loss, model, ids, labels, mask)
    assert math.isnan(got.loss) and math.isnan(expected.loss)


def test_an_epoch_compiles_few_graphs() -> None:
    model, fast = made("llama"), compiled(loss, options=ROWS)
    ids, labels = batch()
    random = torch.Generator().manual_seed(0)
    for _ in range(24):
        lengths = torch.randint(8, LENGTH + 1, (BATCH, 1), generator=random)
        mask = (torch.arange(LENGTH) < lengths).long()
        assert_within(step(fast, model, ids, labels, mask), step(loss, model, ids, labels, mask), EXACT)
    found = variants()
    assert len(found) == len(set(found)) <= 2 + 2 and sum(map(is_of_live_rows, found)) == 2


def with_logits(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    out = model(
        input_ids=ids, attention_mask=mask, labels=labels.masked_fill(mask == 0, -100), use_cache=False
    )
    return out.loss, out.logits


def mean_of_all(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    return loss(model, ids, labels, mask) + hidden.mean()


def every_other(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    labels = labels.masked_fill(mask == 0, -100)
    return F.cross_entropy(logits[:, ::2].reshape(-1, VOCAB), labels[:, ::2].reshape(-1))


def shifted_logits(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    labels = labels.masked_fill(mask == 0, -100)
    shifted = logits[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, VOCAB), labels[..., 1:].contiguous().view(-1))


def cut_on_both_sides(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    labels = labels.masked_fill(mask == 0, -7)[:, 3:-1]
    return F.cross_entropy(logits[:, 2:-2].float().flatten(0, 1), labels.flatten(), ignore_index=-7)


@pytest.mark.parametrize(
    "function", [shifted_logits, cut_on_both_sides], ids=lambda function: function.__name__
)
def test_slices_of_logits(function) -> None:
    model, fast = made("llama"), compiled(function, options=ROWS)
    ids, labels = batch()
    labels = labels.clamp(min=0)
    for kind in ("right", "left"):
        mask = masks(ids)[kind]
        assert_within(step(fast, model, ids, labels, mask), step(function, model, ids, labels, mask), EXACT)
    assert variants() == ["80 of 96 rows"]


def without_gradients(model: nn.Module, *args: Tensor) -> Tensor | None:
    with torch.no_grad():
        return with_logits(model, *args)[1]


def views_of_logits(model: nn.Module, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value, logits = with_logits(model, *args)
    assert logits is not None
    return value, logits.transpose(0, 1), logits


REFUSED = {
    without_gradients: "the graph returns every row of logits, and gradients are off",
    views_of_logits: "another output shares its memory",
    mean_of_all: "mean works across rows",
    every_other: "an index chooses some of the rows",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_rows_that_are_read_elsewhere_are_computed(function) -> None:
    model, fast = made("llama"), compiled(function, options=ROWS)
    ids, labels = batch()
    mask = masks(ids)["right"]

    def results(run):
        found = run(model, ids, labels, mask)
        return [torch.as_tensor(x).detach() for x in (found if isinstance(found, tuple) else (found,))]

    torch.testing.assert_close(results(fast), results(function), rtol=1e-4, atol=1e-5)
    notes = [note for report in liger_compile.reports() for note in report.notes]
    refusals = [note for note in notes if note.startswith("padded rows are computed like others: ")]
    assert any(REFUSED[function] in note for note in refusals), notes


def test_logits_that_nobody_gets() -> None:
    def only_loss(model, *args):
        return with_logits(model, *args)[0]

    model, fast = made("llama"), compiled(with_logits, options={**ROWS, "liger.logits": "none"})
    ids, labels = batch()
    mask = masks(ids)["right"]
    assert fast(model, ids, labels, mask)[1] is None
    got = step(lambda *args: fast(*args)[0], model, ids, labels, mask)
    assert_within(got, step(only_loss, model, ids, labels, mask), EXACT)
    (report,) = liger_compile.reports()
    assert report.variant == "80 of 96 rows"
    assert "the logits (graph output 1) are None: liger.logits is 'none'" in report.notes


def test_dropout_computes_all_rows() -> None:
    MODELS["bert with dropout"] = lambda: bert(0.1)
    try:
        model, fast = made("bert with dropout"), compiled(loss, options=ROWS)
    finally:
        del MODELS["bert with dropout"]
    ids, labels = batch()
    fast(model, ids, labels, masks(ids)["right"])
    (report,) = liger_compile.reports()
    assert any("dropout draws numbers for every row" in note for note in report.notes)


@pytest.mark.parametrize("name", ["llama of two layers", pytest.param("bert", marks=pytest.mark.slow)])
def test_checkpointed_layers(name: str) -> None:
    model, fast = made(name), compiled(loss, options=ROWS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, labels = batch()
    for kind in ("right", "left"):
        mask = masks(ids)[kind]
        assert_within(step(fast, model, ids, labels, mask), step(loss, model, ids, labels, mask), EXACT)
    (report,) = liger_compile.reports()
    assert report.variant == "80 of 96 rows"
    assert sum("checkpoint" in site.reason for site in report.sites) >= 2


def test_a_layer_of_a_checkpoint_that_mixes_rows_computes_all_rows() -> None:
    model, fast = made("llama"), compiled(loss, options=ROWS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.model.layers[0].mlp = AcrossRows(model.model.layers[0].mlp)
    ids, labels = batch()
    mask = masks(ids)["right"]
    assert_within(step(fast, model, ids, labels, mask), step(loss, model, ids, labels, mask), EXACT)
    assert any("mean works across rows" in note for note in liger_compile.reports()[0].notes)


class AcrossRows(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x.mean(1, keepdim=True)


def test_logits_of_labels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    with_labels: list[int] = []
    original = linear_cross_entropy.losses_and_gradients

    def counted(head, x, *args):
        computed.append(len(x))
        return original(head, x, *args)

    monkeypatch.setattr(linear_cross_entropy, "losses_and_gradients", counted)
    model, fast = made("llama"), compiled(loss, options=ROWS)
    ids, labels = batch()
    mask = masks(ids)["right"]
    for prompt in (0, 20, LENGTH):
        labels[:, :prompt] = -100
        with_labels.append(int((labels.masked_fill(mask == 0, -100)[:, 1:] != -100).sum()))
        got, expected = step(fast, model, ids, labels, mask), step(loss, model, ids, labels, mask)
        if prompt < LENGTH:
            assert_within(got, expected, EXACT)
        else:
            assert math.isnan(got.loss) and math.isnan(expected.loss)
    assert computed == with_labels
    (report,) = liger_compile.reports()
    assert any("compute the rows with labels only" in note for note in report.notes)


def test_autocast() -> None:
    def under_autocast(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*args)

    model, fast = made("llama"), compiled(under_autocast, options=ROWS)
    ids, labels = batch()
    mask = masks(ids)["both"]
    got, expected = step(fast, model, ids, labels, mask), step(under_autocast, model, ids, labels, mask)
    exact = step(loss, model, ids, labels, mask)
    ours, theirs = errors(got, exact), errors(expected, exact)
    assert all(ours[name] <= 2 * max(theirs[name], 4e-3) for name in ours)
    assert is_of_live_rows(variants()[0])


def test_by_default_all_rows_are_computed() -> None:
    model, fast = made("llama"), compiled(loss)
    ids, labels = batch()
    step(fast, model, ids, labels, masks(ids)["right"])
    assert not any(map(is_of_live_rows, variants()))


class WithoutGradients(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        with torch.no_grad():
            return self.inner(*args)


def test_positions_without_gradients() -> None:
    """As in transformers up to 5.17, whose rotary tables are made under no_grad."""
    model, fast = made("llama"), compiled(loss, options=ROWS)
    model.model.rotary_emb = Positions(model.model.rotary_emb)
    ids, labels = batch()
    mask = masks(ids)["right"]
    assert_within(step(fast, model, ids, labels, mask), step(loss, model, ids, labels, mask), EXACT)
    assert is_of_live_rows(variants()[0])


class Positions(WithoutGradients):
    def forward(self, x, position_ids):
        return super().forward(x.detach(), position_ids)


def test_rows_without_gradients_are_computed() -> None:
    model, fast = made("llama"), compiled(loss, options=ROWS)
    model.model.layers[0].mlp = WithoutGradients(model.model.layers[0].mlp)
    ids, labels = batch()
    mask = masks(ids)["right"]
    assert_within(step(fast, model, ids, labels, mask), step(loss, model, ids, labels, mask), EXACT)
    assert any(
        "some rows are computed without gradients" in note for note in liger_compile.reports()[0].notes
    )
