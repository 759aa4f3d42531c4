"""The gradient of an embedding, added to a table: the kernels of ops/embedding.py.

    table[i] += sum of dy over the tokens whose index is i        summed in float32, rounded once

The kernels read and write only rows that tokens refer to: in addition to dy, at most 8 bytes per element of dy in half
precision. Sorting makes the tokens of a row contiguous, a *run*, in the order of the batch. The program of the first
token of a run sums the run up to the next multiple of CHUNK, so that a run as long as the batch is not left to one
program. Where a run continues beyond that, each of its chunks stores a partial sum in a buffer, and a second kernel
adds the partial sums.

    at       0   1   2   3 | 4   5   6   7 | 8         CHUNK = 4
    row      7   7   9   9   9   9   9   9   9
    kernel 1 sums 0-1 into the table; 2-3, 4-7 and 8 as parts.     kernel 2 sums the parts into the table.
"""

# A type checker does not see the type that Triton's decorator gives a kernel.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

CHUNK = 16
MOST_COLUMNS = 1024  # per program
PARTS_AT_ONCE = 8


def add_rows(table: Tensor, dy: Tensor, indices: Tensor, padding_idx: int) -> None:
    """Add to table (rows, D) the rows dy (N, D) of indices (N), except padding_idx.

    table and dy are contiguous, and each has any floating dtype.
    """
    num_tokens, width = dy.shape
    if not dy.numel():
        return
    rows, order = torch.sort(indices.to(torch.int32), stable=True)  # half as many passes as for 64 bits
    num_chunks = triton.cdiv(num_tokens, CHUNK)
    parts = dy.new_empty((2, num_chunks, width), dtype=torch.float32)
    columns = min(triton.next_power_of_2(width), MOST_COLUMNS)
    num_blocks = triton.cdiv(width, columns)
    of_both = table, rows, parts, num_tokens, num_chunks, width, table.shape[0], padding_idx
    tile = {"CHUNK": CHUNK, "COLUMNS": columns, "num_warps": max(1, columns // 256)}
    launch(_add_runs_kernel)[(num_tokens, num_blocks)](dy, order, *of_both, **tile)
    launch(_add_parts_kernel)[(num_chunks, num_blocks)](*of_both, PARTS=PARTS_AT_ONCE, **tile)


@triton.jit
def _add_runs_kernel(
    dy_ptr,
    order_ptr,  # the token of each sorted row
    table_ptr,
    rows_ptr,  # sorted
    parts_ptr,  # (2, chunks, width): parts of a run that began before the chunk, and of a run that continues after it
    num_tokens,
    num_chunks,
    width,
    num_rows,
    padding_idx,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0)
    row = tl.load(rows_ptr + first)
    begins = row != tl.load(rows_ptr + first - 1, first > 0, other=-1)
    if (begins | (first % CHUNK == 0)) & _has_gradient(row, num_rows, padding_idx):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = column < width
        end = tl.minimum((first // CHUNK + 1) * CHUNK, num_tokens)
        total = tl.zeros([COLUMNS], tl.float32)
        at = first
        same = row
        while same == row:
            token = tl.load(order_ptr + at)
            total += tl.load(dy_ptr + token * width + column, is_column, other=0.0).to(tl.float32)
            at += 1
            same = tl.load(rows_ptr + at, at < end, other=-1)
        goes_on = (at == end) & (tl.load(rows_ptr + end, end < num_tokens, other=-1) == row)
        if begins & (goes_on == 0):
            _add(table_ptr + row.to(tl.int64) * width + column, total, is_column)
        else:
            part = (begins.to(tl.int64) * num_chunks + first // CHUNK) * width
            tl.store(parts_ptr + part + column, total, is_column)


@triton.jit
def _add_parts_kernel(
    table_ptr,
    rows_ptr,
    parts_ptr,
    num_tokens,
    num_chunks,
    width,
    num_rows,
    padding_idx,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    chunk = tl.program_id(0)
    end = (chunk + 1) * CHUNK
    if end < num_tokens:
        row = tl.load(rows_ptr + end - 1)
        goes_on = tl.load(rows_ptr + end) == row
        began_before = tl.load(rows_ptr + end - CHUNK - 1, chunk > 0, other=-1) == row
        if goes_on & (began_before == 0) & _has_gradient(row, num_rows, padding_idx):
            column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            is_column = column < width
            begun = (num_chunks + chunk).to(tl.int64) * width
            total = tl.load(parts_ptr + begun + column, is_column, other=0.0)
            next_chunk = chunk + 1
            same = row
            while same == row:
                chunks = next_chunk + tl.arange(0, PARTS)
                starts = chunks.to(tl.int64) * CHUNK
                is_part = tl.load(rows_ptr + starts, starts < num_tokens, other=-1) == row
                mask = is_part[:, None] & is_column[None, :]
                parts = tl.load(
                    parts_ptr + chunks.to(tl.int64)[:, None] * width + column[None, :], mask, other=0.0
                )
                total += tl.sum(parts, 0)
                next_chunk += PARTS
                start = next_chunk.to(tl.int64) * CHUNK
                same = tl.load(rows_ptr + start, start < num_tokens, other=-1)
            _add(table_ptr + row.to(tl.int64) * width + column, total, is_column)


@triton.jit
def _has_gradient(row, num_rows, padding_idx):
    return (row != padding_idx) & (row >= 0) & (row < num_rows)


@triton.jit
def _add(at, total, mask):
    """Add total in float32 and store it in the table's dtype, rounded once."""
    tl.store(at, (tl.load(at, mask).to(tl.float32) + total).to(at.dtype.element_ty), mask)
