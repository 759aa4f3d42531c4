"""The gradient of an embedding, added to a table: the kernels of ops/embedding.py.

    table[i] += sum of dy over the tokens whose index is i        summed in float32, rounded once

The kernels read and write only rows that tokens refer to. There are two ways.

*Many tokens*, in addition to dy at most 8 bytes per element of dy in half precision. Sorting makes the tokens of a row
contiguous, a *run*, in the order of the batch. The program of the first token of a run sums the run up to the next
multiple of CHUNK, so that a run as long as the batch is not left to one program. Where a run continues beyond that,
each of its chunks stores a partial sum in a buffer, and a second kernel adds the partial sums.

    at       0   1   2   3 | 4   5   6   7 | 8         CHUNK = 4
    row      7   7   9   9   9   9   9   9   9
    kernel 1 sums 0-1 into the table; 2-3, 4-7 and 8 as parts.     kernel 2 sums the parts into the table.

*Few tokens*, where the CPU needs longer to launch a sort than the GPU to compute everything. The program of a token
reads the indices before it. If it is the first with its index, it sums the rows of all tokens with this index. This is
one launch, quadratic in the number of tokens.
"""

# A type checker does not see the type that Triton's decorator gives a kernel.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

CHUNK = 16
MOST_COLUMNS = 1024  # per program
PARTS_AT_ONCE = 8
FEW_TOKENS = 2048
INDICES_AT_ONCE = 256
ROWS_AT_ONCE = 8  # divides INDICES_AT_ONCE


def add_rows(table: Tensor, dy: Tensor, indices: Tensor, padding_idx: int) -> None:
    """Add to table (rows, D) the rows dy (N, D) of indices (N), except padding_idx.

    table and dy are contiguous, and each has any floating dtype.
    """
    if dy.numel():
        add = add_few_rows if len(dy) <= FEW_TOKENS else add_sorted_rows
        add(table, dy, indices, padding_idx)


def add_few_rows(table: Tensor, dy: Tensor, indices: Tensor, padding_idx: int) -> None:
    """As add_rows, in one launch that compares each token's index with those of all tokens."""
    num_tokens, width = dy.shape
    columns = min(triton.next_power_of_2(width), MOST_COLUMNS)
    launch(_add_first_kernel)[(num_tokens, triton.cdiv(width, columns))](
        dy,
        indices,
        table,
        num_tokens,
        width,
        table.shape[0],
        padding_idx,
        INDICES=INDICES_AT_ONCE,
        ROWS=ROWS_AT_ONCE,
        COLUMNS=columns,
        num_warps=max(1, columns // 256),
    )


def add_sorted_rows(table: Tensor, dy: Tensor, indices: Tensor, padding_idx: int) -> None:
    """As add_rows, with a sort of the indices."""
    num_tokens, width = dy.shape
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
def _add_first_kernel(
    dy_ptr,
    indices_ptr,
    table_ptr,
    num_tokens,
    width,
    num_rows,
    padding_idx,
    INDICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0)
    row = tl.load(indices_ptr + first)
    num_same = 0
    start = 0
    while (start < first) & (num_same == 0):
        tokens = start + tl.arange(0, INDICES)
        earlier = tokens < first
        num_same = tl.sum((earlier & (tl.load(indices_ptr + tokens, earlier, other=-1) == row)).to(tl.int32))
        start += INDICES
    if (num_same == 0) & _has_gradient(row, num_rows, padding_idx):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = column < width
        total = tl.zeros([COLUMNS], tl.float32)
        for start in range(first, num_tokens, INDICES):
            tokens = start + tl.arange(0, INDICES)
            same = tl.load(indices_ptr + tokens, tokens < num_tokens, other=-1) == row
            num_same = tl.sum(same.to(tl.int32))
            if num_same > 0:
                for part in range(start, tl.minimum(start + INDICES, num_tokens), ROWS):
                    of_part = part + tl.arange(0, ROWS)
                    is_row = tl.load(indices_ptr + of_part, of_part < num_tokens, other=-1) == row
                    at = of_part.to(tl.int64)[:, None] * width + column[None, :]
                    mask = is_row[:, None] & is_column[None, :]
                    total += tl.sum(tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32), 0)
        _add(table_ptr + row.to(tl.int64) * width + column, total, is_column)


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
