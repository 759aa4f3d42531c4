"""The fingerprint of a tensor differs when its values have changed, whoever wrote them."""

import pytest
import torch

from liger_compile.runtime.fingerprint import fingerprint, has_fingerprint

ROWS, COLUMNS = 6, 8

# How the same numbers lie in memory.
LAYOUTS = {
    "float32": lambda t: t.clone(),
    "bfloat16": lambda t: t.bfloat16(),
    "float16, an odd number of columns": lambda t: t[:, :7].half().contiguous(),
    "float64": lambda t: t.double(),
    "complex": lambda t: torch.complex(t, t),
    "int64": lambda t: (t * 1000).long(),
    "transposed": lambda t: t.t(),
    "every second column": lambda t: t[:, ::2],
    "from an odd offset": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(ROWS, COLUMNS),
    "three dimensions": lambda t: t.view(2, 3, COLUMNS).clone(),
    "a vector": lambda t: t[0].clone(),
    "a number": lambda t: t[0, 0].clone(),
    "expanded": lambda t: t[:1].clone().expand(ROWS, COLUMNS),
}


def values():
    return torch.arange(1.0, 1 + ROWS * COLUMNS).view(ROWS, COLUMNS).sin() + 2


def is_same(before, tensor):
    return bool(before.is_same(fingerprint(tensor)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_element_counts(layout):
    for position in range(LAYOUTS[layout](values()).numel()):
        tensor = LAYOUTS[layout](values())
        before = fingerprint(tensor)
        assert is_same(before, tensor)
        index = torch.unravel_index(torch.tensor(position), tensor.shape) if tensor.dim() else ...
        tensor[index] = -tensor[index]
        assert not is_same(before, tensor), position


WRITES = {
    "negated": lambda t: t.neg_(),
    "zeroed": lambda t: t.zero_(),
    "one bit of one element": lambda t: t.view(torch.int32)[3, 5].bitwise_xor_(1),
    "a row doubled": lambda t: t[4].mul_(2),
    "a column doubled": lambda t: t[:, 2].mul_(2),
    "two rows exchanged": lambda t: t.index_copy_(0, torch.tensor([1, 4]), t[[4, 1]]),
    "two columns exchanged": lambda t: t.index_copy_(1, torch.tensor([1, 4]), t[:, [4, 1]]),
    "rows reversed": lambda t: t.copy_(t.flip(0)),
    "columns reversed": lambda t: t.copy_(t.flip(1)),
    "columns rolled": lambda t: t.copy_(t.roll(2, 1)),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("start", (values, lambda: values().t().contiguous().t()), ids=("rows", "columns"))
def test_what_moves_or_changes_many(name, start):
    tensor = start()
    before = fingerprint(tensor)
    WRITES[name](tensor)
    assert not is_same(before, tensor)


def test_a_write_that_is_taken_back_leaves_it_as_it_was():
    tensor = values()
    before, saved = fingerprint(tensor), tensor.clone()
    tensor.mul_(3)
    tensor.copy_(saved)
    assert is_same(before, tensor)


def test_not_a_number_is_as_good_as_any_other_bits():
    tensor = torch.full((2, 2), float("nan"))
    assert is_same(fingerprint(tensor), tensor)


@pytest.mark.parametrize("shape", ((0, 4), (4, 0), (0,), (1, 1)))
def test_small_and_empty_tensors(shape):
    tensor = torch.ones(shape)
    assert is_same(fingerprint(tensor), tensor)


def test_two_elements_of_one_row_exchanged_are_a_limit():
    tensor = torch.arange(64.0).view(8, 8)
    before = fingerprint(tensor)
    tensor[0, 2], tensor[0, 4] = 4.0, 2.0  # whole words of eight bytes
    tensor[0, 3], tensor[0, 5] = 5.0, 3.0
    assert is_same(before, tensor)


def test_only_plain_memory_has_one():
    assert has_fingerprint(torch.nn.Parameter(torch.ones(2)))
    assert not has_fingerprint(torch.eye(2).to_sparse())
    assert not has_fingerprint(torch.ones(2, device="meta"))
