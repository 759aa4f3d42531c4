"""Masks that are made elsewhere, and causal in most calls: in a graph before, in a buffer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liger_compile
from liger_compile import variants

from .attending import BATCH, LENGTH, assert_as_in_eager, attend, compiled, found, inputs, masks

LOWEST = torch.finfo(torch.float32).min
BOTH = [(variants.CAUSAL, 1), (variants.GENERAL, 0)]


def ones(*shape, dtype=torch.bool):
    return torch.ones(*shape, LENGTH, LENGTH, dtype=dtype)


def written_out(q, k, v, mask):
    """As nanoGPT's, with a mask of zeros and ones."""
    q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k, v))
    length = q.shape[2]
    scores = (q @ k.mT * 8**-0.5).masked_fill(mask[..., :length, :length] == 0, float("-inf"))
    return scores.softmax(-1) @ v


def hidden(q, k, v, mask):
    """What the mask says is what is hidden."""
    q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k, v))
    return (q @ k.mT * 8**-0.5).masked_fill(mask, float("-inf")).softmax(-1) @ v


def added(q, k, v, mask):
    """As transformers' eager attention, which takes the part of the mask that has keys."""
    q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT * 8**-0.5) + mask[:, :, :, : k.shape[-2]]
    return F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype) @ v


FORMS = {
    "bool": (attend, ones().tril()),
    "of a batch": (attend, ones(BATCH, 1).tril()),
    "finfo.min": (attend, torch.full((BATCH, 1, LENGTH, LENGTH), LOWEST).triu(1)),
    "-inf": (attend, nn.Transformer.generate_square_subsequent_mask(LENGTH)),
    "zeros and ones": (written_out, ones(1, 1, dtype=torch.float32).tril()),
    "integers": (written_out, ones(dtype=torch.int64).tril()),
    "a longer one": (written_out, torch.ones(1, 1, 2 * LENGTH, 2 * LENGTH).tril()),
    "hidden": (hidden, ones().triu(1)),
    "added": (added, torch.full((BATCH, 1, LENGTH, LENGTH), LOWEST).triu(1)),
}


def changed(mask):
    """Another that lets each query see something, and the first no more than before."""
    other = mask.clone()
    other[..., 5, 2] = mask[..., 2, 5].clone()
    return other


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    function, mask = FORMS[name]
    fast = compiled(function)
    for each in (mask, changed(mask), mask.clone()):
        assert_as_in_eager(fast, function, *inputs(), each)
    assert found() == BOTH


@pytest.mark.parametrize(
    "mask",
    [
        changed(ones().tril()),
        ones(),
        ones().triu(),
        ones().tril(-1) | torch.eye(LENGTH, dtype=torch.bool)[:, [0]],
        torch.stack([ones().tril(), changed(ones().tril())])[:, None],
        torch.full((LENGTH, LENGTH), -1e4).triu(1),
        torch.linspace(-1, 1, LENGTH**2).view(LENGTH, LENGTH),
        torch.full((LENGTH, LENGTH), float("nan")),
        ones()[:1].repeat(LENGTH, 1).tril(1),
    ],
    ids=lambda mask: f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}",
)
def test_what_is_not_causal_in_the_first_call_is_not_looked_at(mask):
    fast = compiled(attend)
    for each in (mask, ones().tril().to(mask.dtype).expand_as(mask).contiguous()):
        assert_as_in_eager(fast, attend, *inputs(), each, equal_nan=True)
    assert found() == [("", 0)]


def test_a_mask_that_is_expanded():
    mask = ones(1, 1).tril().expand(BATCH, 1, LENGTH, LENGTH)
    assert_as_in_eager(compiled(attend), attend, *inputs(), mask)
    assert found() == BOTH[:1]


def test_a_bias_that_is_learned_is_none():
    bias = torch.full((LENGTH, LENGTH), float("-inf")).triu(1).requires_grad_()
    fast = compiled(attend)
    fast(*inputs(), bias).sum().backward()
    assert bias.grad is not None and found() == [("", 0)]


def test_fewer_queries_than_keys_have_no_causal_mask():
    def last(q, k, v, mask):
        return attend(q[:, -3:], k, v, mask[-3:])

    assert_as_in_eager(compiled(last), last, *inputs(), ones().tril())
    assert found() == [("", 0)]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.ones(2 * LENGTH, 2 * LENGTH).tril().view(1, 1, 2 * LENGTH, -1))

    def forward(self, q, k, v):
        return written_out(q, k, v, self.bias)


def test_a_buffer_is_looked_at_once(monkeypatch):
    looks = []
    is_it = variants.Expected.is_it
    monkeypatch.setattr(
        variants.Expected, "is_it", lambda self, mask: looks.append(self) or is_it(self, mask)
    )
    module = Attention()
    fast = compiled(module)
    assert_as_in_eager(fast, module, *inputs())
    first = len(looks)
    for _ in range(3):
        assert_as_in_eager(fast, module, *inputs())
    assert len(looks) == first and found() == BOTH[:1]
    module.bias[..., 3, 5] = 1  # and again when it has changed
    for _ in range(2):
        assert_as_in_eager(fast, module, *inputs())
    assert len(looks) == first + 1 and found() == BOTH
    module.bias.data = changed(torch.ones(1, 1, 2 * LENGTH, 2 * LENGTH).tril())
    assert_as_in_eager(fast, module, *inputs())
    assert len(looks) == first + 2
    module.bias = torch.ones(1, 1, 2 * LENGTH, 2 * LENGTH).tril()
    assert_as_in_eager(fast, module, *inputs())
    assert len(looks) == first + 3 and found() == BOTH


def test_masks_of_inference_mode_are_looked_at_each_time():
    with torch.inference_mode():
        mask = ones().tril()
        fast = compiled(attend)
        for _ in range(2):
            assert_as_in_eager(fast, attend, *inputs(requires_grad=False), mask)
            mask[2, 5] = True
        assert_as_in_eager(fast, attend, *inputs(requires_grad=False), mask)
    assert found() == BOTH


def test_a_graph_break_between_mask_and_layers():
    def model(q, k, v):
        i = torch.arange(q.shape[1])
        mask = i[None, :] <= i[:, None]
        torch._dynamo.graph_break()
        return attend(q, k, v, mask)

    assert_as_in_eager(compiled(model), model, *inputs())
    assert (variants.CAUSAL, 1) in found()


def test_with_padding_beside_it():
    def both(q, k, v, mask, padding):
        return attend(q, k, v, mask & padding[:, None, None, :].bool())

    fast, (whole, left, right) = compiled(both), masks()
    for padding in (whole, left, right):
        for mask in (ones().tril(), changed(ones().tril())):
            assert_as_in_eager(fast, both, *inputs(), mask, padding)
    assert found() == BOTH
    note = liger_compile.reports()[0].notes[0]
    assert "l_padding_ is all ones and l_mask_ is causal" in note and "up to 2 scalars" in note


@pytest.mark.parametrize("how", ["dynamic=True", "automatic"])
def test_symbolic_sizes(how):
    def layer(x, mask):
        return attend(x, 2 * x, 3 * x, mask)

    fast = compiled(layer, dynamic=True) if how == "dynamic=True" else compiled(layer)
    for length in (LENGTH, 9, 20):
        whole = torch.ones(length, length, dtype=torch.bool).tril()
        for mask in (whole, changed(whole)):
            assert_as_in_eager(fast, layer, inputs(length)[0], mask)
    assert found() == BOTH * (1 if how == "dynamic=True" else 2)


def test_the_note_says_when_it_runs():
    fast = compiled(attend)
    for mask in (ones().tril(), changed(ones().tril())):
        fast(*inputs(), mask)
    special, general = liger_compile.reports()
    assert "runs in calls where l_mask_ is causal" in special.notes[0]
    assert "runs in calls with other masks" in general.notes[0]
    assert "made elsewhere" in general.notes[1]


def test_options_that_leave_nothing_to_choose():
    fast = compiled(attend, padding="general")
    assert_as_in_eager(fast, attend, *inputs(), ones().tril())
    assert found() == [("", 0)]
