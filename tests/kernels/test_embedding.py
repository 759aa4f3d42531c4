"""The gradient of an embedding against float64: runs of tokens of all lengths, in both orders of memory."""

from __future__ import annotations

import pytest
import torch

from liger_compile.testing import precision
from tests.helpers.pairwise import parametrize

pytest.importorskip("triton")
from liger_compile.kernels import embedding as kernels

CHUNK, LONG = kernels.CHUNK, kernels.CHUNK * kernels.PARTS_AT_ONCE
ROWS = 37
INDICES = {
    "one": [5],
    "apart": list(range(ROWS)),
    "some_together": [3, 7, 3, 3, 0, 36, 7, 3],
    "a_chunk": [4] * CHUNK + [9],
    "one_more_than_a_chunk": [4] * (CHUNK + 1),
    "begins_inside_a_chunk": [1] * (CHUNK - 1) + [2] * (2 * CHUNK) + [3],
    "ends_where_a_chunk_ends": [1] * 3 + [2] * (2 * CHUNK - 3) + [5] * 2,
    "one_chunk_at_the_end_of_another": [6] * CHUNK + [8] * CHUNK,
    "more_parts_than_at_once": [11] * (2 * LONG + 5) + [12] * LONG,
    "all_one_row": [20] * (3 * LONG),
}


def case(name, width, dtype, device):
    torch.manual_seed(0)
    indices = torch.tensor(INDICES[name])
    indices = indices[torch.randperm(len(indices))].to(device)
    return torch.randn(len(indices), width, device=device).to(dtype), indices


def added(table, dy, indices, padding_idx=-1):
    """In float64."""
    kept = indices != padding_idx
    return table.double().index_add(0, indices[kept], dy[kept].double())


WAYS = {"few": kernels.add_few_rows, "sorted": kernels.add_sorted_rows}


@parametrize(
    way=[*WAYS], name=[*INDICES], width=[1, 40, 1030], dtype=[torch.float32, torch.bfloat16, torch.float16]
)
def test_rows_are_added_and_rounded_once(way, name, width, dtype, device):
    dy, indices = case(name, width, dtype, device)
    before = torch.randn(ROWS, width, device=device).to(dtype)
    table, exact = before.clone(), added(before, dy, indices)
    WAYS[way](table, dy, indices, -1)
    # Half a unit for the one rounding, and what float32 loses of the terms' sizes, where sums cancel.
    sizes = added(before.abs(), dy.abs(), indices)
    wide = torch.finfo(torch.float32).eps * len(indices) ** 0.5
    assert (
        (table.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + wide * sizes
    ).all()
    untouched = torch.ones(ROWS, dtype=torch.bool, device=device)
    untouched[indices] = False
    assert torch.equal(table[untouched], before[untouched])


@parametrize(way=[*WAYS], name=["some_together", "all_one_row", "begins_inside_a_chunk"])
def test_the_padding_row_has_no_gradient(way, name, device):
    dy, indices = case(name, 8, torch.bfloat16, device)
    padding_idx = int(indices.mode().values)
    table = torch.zeros(ROWS, 8, dtype=dy.dtype, device=device)
    WAYS[way](table, dy, indices, padding_idx)
    torch.testing.assert_close(table, added(torch.zeros_like(table), dy, indices, padding_idx).to(dy.dtype))
    assert not table[padding_idx].any()


def test_no_tokens_and_indices_outside_the_table_write_nothing(device):
    table = torch.ones(4, 8, device=device)
    kernels.add_rows(table, table.new_empty(0, 8), torch.empty(0, dtype=torch.long, device=device), -1)
    for add in WAYS.values():
        add(table, table.new_ones(40, 8), torch.tensor([4, -3] * 20, device=device), -1)
    assert torch.equal(table, torch.ones_like(table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_op_is_no_worse_than_pytorchs(dtype, device):
    dy, indices = case("begins_inside_a_chunk", 40, dtype, device)
    arguments = indices, ROWS, 3, False
    pytorchs = torch.ops.aten.embedding_dense_backward.default
    ours = torch.ops.liger_compile.embedding_backward.default(dy, *arguments)
    precision.assert_no_worse([ours], [pytorchs(dy, *arguments)], [pytorchs(dy.double(), *arguments)])


@pytest.mark.parametrize("way", WAYS)
def test_the_numbers_are_the_same_every_time(way, device):
    dy, indices = case("all_one_row", 40, torch.float32, device)
    first, second = (torch.zeros(ROWS, 40, device=device) for _ in range(2))
    for table in (first, second):
        WAYS[way](table, dy, indices, -1)
    assert torch.equal(first, second)
