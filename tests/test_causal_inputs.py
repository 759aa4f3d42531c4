"""Masks from outside the graph that are causal in most calls: in a graph before, in a buffer."""

import ctypes
import gc
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import liger_compile
from liger_compile.forward_passes import specialize
from tests.helpers.attending import BATCH, LENGTH, assert_as_in_eager, attend, compiled, found, inputs, masks

LOWEST = torch.finfo(torch.float32).min
BOTH = [(specialize.CAUSAL, 1), (specialize.GENERIC, 0)]


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


def test_a_buffer_is_looked_at_in_each_call(monkeypatch):
    looks = []
    compared = specialize.Assumption.compared
    monkeypatch.setattr(
        specialize.Assumption, "compared", lambda self, mask: looks.append(self) or compared(self, mask)
    )
    module = Attention()
    fast = compiled(module)
    assert_as_in_eager(fast, module, *inputs())
    first = len(looks)
    for _ in range(3):
        assert_as_in_eager(fast, module, *inputs())
    assert len(looks) == first + 3 and found() == BOTH[:1]
    module.bias[..., 3, 5] = 1
    assert_as_in_eager(fast, module, *inputs())
    assert found() == BOTH
    module.bias.data = changed(torch.ones(1, 1, 2 * LENGTH, 2 * LENGTH).tril())
    assert_as_in_eager(fast, module, *inputs())
    module.bias = torch.ones(1, 1, 2 * LENGTH, 2 * LENGTH).tril()
    assert_as_in_eager(fast, module, *inputs())
    assert len(looks) == first + 6 and found() == BOTH


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@torch.library.custom_op("liger_compile_tests::refill", mutates_args=())
def refill(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Writes into its argument without saying so: autograd counts nothing."""
    mask.data.copy_(values)
    return values.clone()


def _by_an_operator(mask, values):
    refill(mask, values)


def _by_its_storage(mask, values):
    mask.untyped_storage().copy_(values.untyped_storage())


def _by_its_address(mask, values):
    ctypes.memmove(mask.data_ptr(), values.data_ptr(), mask.numel() * mask.element_size())


# How a tensor is refilled; none of these but the last changes its address, and autograd counts few of the writes.
REFILLS = {
    "scatter": lambda mask, values: dist.scatter(mask, [values], src=0),
    "all_gather": lambda mask, values: dist.all_gather([mask], values),
    "an operator": _by_an_operator,
    "its storage": _by_its_storage,
    "its address": _by_its_address,
    "NumPy": lambda mask, values: np.copyto(mask.numpy(), values.numpy()),
    "data": lambda mask, values: mask.data.copy_(values),
    "DLPack": lambda mask, values: torch.from_dlpack(mask.view(torch.uint8)).copy_(values.view(torch.uint8)),
    "set_": lambda mask, values: mask.set_(values.clone()),
}


@pytest.mark.parametrize("how", REFILLS)
def test_a_mask_that_is_refilled(how, one_process):
    """To other values and back: each call sees what the mask is then."""
    mask, fast = ones().tril(), compiled(attend)
    for values in (ones().tril(), changed(ones().tril()), ones(), ones().tril()):
        REFILLS[how](mask, values)
        assert torch.equal(mask, values)
        assert_as_in_eager(fast, attend, *inputs(), mask)
    assert found() == BOTH


def test_a_mask_that_was_looked_at_can_be_swapped():
    """torch.utils.swap_tensors refuses tensors that something refers to weakly."""
    mask, other, fast = ones().tril(), changed(ones().tril()), compiled(attend)
    assert_as_in_eager(fast, attend, *inputs(), mask)
    gc.collect()  # Dynamo collects what it leaves, which refers to inputs weakly; not in these tests (conftest.py)
    torch.utils.swap_tensors(mask, other)
    assert_as_in_eager(fast, attend, *inputs(), mask)
    assert_as_in_eager(fast, attend, *inputs(), other)
    assert found() == BOTH


def test_threads_with_masks_of_their_own():
    fast = compiled(attend)
    every = [ones().tril(), changed(ones().tril())]
    args = inputs(requires_grad=False)
    expected = [attend(*args, mask) for mask in every]
    for mask in every:
        fast(*args, mask)
    wrong = []

    def run(which):
        for _ in range(20):
            if not torch.allclose(fast(*args, every[which]), expected[which], atol=1e-6):
                wrong.append(which)

    threads = [threading.Thread(target=run, args=(which % 2,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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
    assert (specialize.CAUSAL, 1) in found()


def test_with_padding_beside_it():
    def both(q, k, v, mask, padding):
        return attend(q, k, v, mask & padding[:, None, None, :].bool())

    fast, (whole, left, right) = compiled(both), masks()
    for padding in (whole, left, right):
        for mask in (ones().tril(), changed(ones().tril())):
            assert_as_in_eager(fast, both, *inputs(), mask, padding)
    assert found() == BOTH
    note = liger_compile.reports()[0].notes[0]
    assert "l_padding_ of all ones and l_mask_ that is causal" in note and "one device sync" in note


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


def test_the_note_states_the_calls_that_use_the_graph():
    fast = compiled(attend)
    for mask in (ones().tril(), changed(ones().tril())):
        fast(*inputs(), mask)
    special, general = liger_compile.reports()
    assert "specialized for l_mask_ that is causal" in special.notes[0]
    assert "used by calls with other masks" in general.notes[0]
    assert "from outside this graph" in general.notes[1]


def test_options_that_leave_nothing_to_choose():
    fast = compiled(attend, padding="general")
    assert_as_in_eager(fast, attend, *inputs(), ones().tril())
    assert found() == [("", 0)]
