"""Padded rows: masks that hide padded keys are proven, their false friends are not, and attention reads the padding."""

import pytest
import torch
import torch.nn.functional as F

import liger_compile
from tests.helpers.attending import gradients_of
from tests.test_documents import causal, let_through, same
from tests.test_indices import BATCH, LENGTH, hugging_face, meaning, ones

INF = float("-inf")
PADDING = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])


def keys(flags):
    return flags[:, None, None, :]


def transformers(x, y, p, window=None):
    """As transformers 5.24 with a padding mask."""
    batch, length = x.shape[:2]
    b = torch.arange(batch)[:, None, None, None]
    q, k = (torch.arange(length) + 0)[None, None, :, None], (torch.arange(length) + 0)[None, None, None, :]
    mask = q.new_ones((), dtype=torch.bool)
    if window is not None:
        mask = mask & (k > q - window)
    mask = mask & (k <= q) & p.to(torch.bool)[b, k]
    return mask.expand(batch, -1, length, length)


# Which mask, in which it is without padding, and what it adds to hidden scores.
PROVEN = {
    "transformers": (transformers, "causal", ""),
    "transformers, window": (lambda x, y, p: transformers(x, y, p, 2), "window", ""),
    "bool": (lambda x, y, p: causal(x) & keys(p.bool()), "causal", ""),
    "floats": (lambda x, y, p: causal(x) & keys(p.float().bool()), "causal", ""),
    "ids": (lambda x, y, p: causal(x) & keys(p != 0), "causal", ""),
    "is one": (lambda x, y, p: causal(x) & keys(p == 1), "causal", ""),
    "positive": (lambda x, y, p: causal(x) & (p > 0)[:, None, None], "causal", ""),
    "absent": (lambda x, y, p: causal(x) & ~keys(p == 0), "causal", ""),
    "filled": (lambda x, y, p: causal(x).masked_fill(keys(p == 0), False), "causal", ""),
    "none of them": (lambda x, y, p: ~(ones(x).triu(1) | keys(p.eq(0))), "causal", ""),
    "to all keys": (lambda x, y, p: keys(p.bool()).expand(BATCH, 1, x.shape[1], x.shape[1]), "all", ""),
    "one row": (lambda x, y, p: causal(x) & (p[0] != 0), "causal", ""),
    "sliced": (lambda x, y, p: causal(x) & keys(torch.cat((p, p), -1)[:, 1 : x.shape[1] + 1] > 0), "causal", ""),
    "window": (lambda x, y, p: hugging_face(x, 3) & keys(p > 0), "window", ""),
    "-inf": (lambda x, y, p: torch.where(causal(x) & keys(p > 0), 0.0, INF), "causal", "infinite"),
    "lowest": (lambda x, y, p: torch.where(causal(x) & keys(p > 0), 0.0, -1e38), "causal", "finite"),
    "one minus": (lambda x, y, p: (1.0 - keys(p.bool()).float()) * -1e38, "all", "finite"),
    "both": (
        lambda x, y, p: torch.where(causal(x), 0.0, INF) + torch.where(keys(p > 0), 0.0, -1e38),
        "causal",
        "mixed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PROVEN)
def test_padding_is_proven(name, is_dynamic):
    build, within, fill = PROVEN[name]
    found, mask = meaning(build, is_dynamic=is_dynamic, padding=PADDING)
    assert (found.kind, found.within, found.fill) == ("padded", within, fill), found.reason
    expected = let_through(build(torch.empty(BATCH, LENGTH, 4), None, PADDING))
    assert torch.equal(let_through(mask).expand(BATCH, 1, LENGTH, -1), expected.expand(BATCH, 1, LENGTH, -1))


FALSE_FRIENDS = {
    "of queries": lambda x, y, p: causal(x) & (p > 0)[:, None, :, None],
    "of another row": lambda x, y, p: causal(x) & keys(p.flip(0) > 0) & keys(p > 0),
    "or padded": lambda x, y, p: causal(x) | keys(p > 0),
    "of heads": lambda x, y, p: causal(x) & (p > 0)[None, :, None, :],
    "of the first key": lambda x, y, p: causal(x) & (p[:, :1] > 0)[:, None, None, :],
    "documents too": lambda x, y, p: causal(x) & same(p) & keys(p > 0),
    "an integer times the lowest number": lambda x, y, p: (1.0 - keys(p).float()) * -1e38,
    "random": lambda x, y, p: causal(x) & (torch.rand(x.shape[1]) < 2) & keys(p > 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FALSE_FRIENDS)
def test_false_friends_are_refused(name):
    found, _ = meaning(FALSE_FRIENDS[name], padding=PADDING)
    assert found.kind == "unknown" and found.reason
    assert (found.keys is not None) == (name == "documents too")  # it hides more than padding


def written_out(q, k, v, mask, cap=None, fill=None):
    scores = q @ k.mT * 0.25
    scores = scores if cap is None else torch.tanh(scores / cap) * cap
    return (scores + torch.where(mask, 0.0, fill)).softmax(-1) @ v


def mask_of(q, padding, window=None):
    return transformers(q[:, 0], None, padding, window)


ATTENTION = {
    "padded": lambda q, k, v, p: F.scaled_dot_product_attention(q, k, v, mask_of(q, p)),
    "padded_window": lambda q, k, v, p: F.scaled_dot_product_attention(q, k, v, mask_of(q, p, 3)),
    "padded_bidirectional": lambda q, k, v, p: F.scaled_dot_product_attention(q, k, v, keys(p != 0)),
    "padded ": lambda q, k, v, p: F.scaled_dot_product_attention(
        q, k, v, torch.where(mask_of(q, p), 0.0, INF), scale=0.3
    ),
}
ROWS = {
    "left and right": PADDING,
    "a row of padding": torch.tensor([[0] * 6, [1] * 6]),
    "without padding": torch.ones(2, 6, dtype=torch.int64),
    "in the middle": torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0]]),
}
ALWAYS = {
    "liger.inner": "aot_eager",
    "liger.strict": True,
    "liger.policy": "always",
    "liger.padding": "general",
}


@pytest.mark.parametrize("name", ATTENTION)
def test_all_rows_are_those_of_eager(name):
    attend = ATTENTION[name]
    inputs = [torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3)]
    fast = torch.compile(attend, backend="liger", options=ALWAYS)
    for dtype, padding in zip(
        (torch.int64, torch.bool, torch.float32, torch.int32), ROWS.values(), strict=True
    ):
        torch.testing.assert_close(
            gradients_of(fast, *inputs, padding.to(dtype)), gradients_of(attend, *inputs, padding)
        )
    for report in liger_compile.reports():
        assert [site.pattern for site in report.sites if site.kind == "replace"] == [
            f"attention.{name.strip()}"
        ]
        assert any("without the padding in p" in note and "flex_attention" in note for note in report.notes)
        assert not any("keeps its mask" in note for note in report.notes)


def test_rows_without_keys_are_kept_where_their_fill_shows():
    fills = {-1e38: ROWS["a row of padding"], INF: PADDING}
    for fill, padding in fills.items():
        for is_written_out in (False, True):
            liger_compile.clear_reports()

            def attend(q, k, v, p, fill=fill, is_written_out=is_written_out):
                if is_written_out:
                    return written_out(q, k, v, mask_of(q, p), 5.0, fill)
                return F.scaled_dot_product_attention(q, k, v, torch.where(mask_of(q, p), 0.0, fill))

            inputs = [torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3)]
            torch._dynamo.reset()
            fast = torch.compile(attend, backend="liger", options=ALWAYS)
            torch.testing.assert_close(fast(*inputs, padding), attend(*inputs, padding), equal_nan=True)
            (report,) = liger_compile.reports()
            is_replaced = fill == INF and not is_written_out
            assert any(site.kind == "replace" for site in report.sites) == is_replaced
            assert is_replaced or any("rows that see no key" in note for note in report.notes)


def test_by_default_the_mask_stays():
    attend = ATTENTION["padded"]
    inputs = [torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3)]
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.padding": "general"}
    torch.compile(attend, backend="liger", options=options)(*inputs, PADDING)
    (report,) = liger_compile.reports()
    assert not report.count("replace")
    assert "attention keeps its mask 1x: it is causal except for the padding in l_p_" in report.notes


def test_a_sequence_without_tokens_is_left():
    """flex_attention of torch 2.11 raises an error for it."""
    attend = ATTENTION["padded"]
    inputs = [torch.randn(2, 4, 0, 8, requires_grad=True) for _ in range(3)]
    found = torch.compile(attend, backend="liger", options=ALWAYS)(*inputs, PADDING[:, :0])
    torch.testing.assert_close(found, attend(*inputs, PADDING[:, :0]))
    (report,) = liger_compile.reports()
    assert not report.count("replace")
