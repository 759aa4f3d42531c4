"""float32 rows, rounded to float16 with one power of two per row: the kernel of ops/scaled_rows.py.

    total = values + rows * scales     or values alone
    scales = 2^floor(log2(max |total|)) / 2^14      rows = total / scales

A program reads a row twice: once for its largest number, and once, from the cache, to write the row. Bytes per element:
6, or 8 with the sum. A row with infinite numbers has the scale 1. NaN does not change a scale.
"""

# A type checker does not recognize Triton's launch argument num_warps.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, num_multiprocessors

PROGRAMS_PER_MULTIPROCESSOR = 8
MOST_COLUMNS = 4096  # that a program reads at a time


@triton.jit
def _total(values_ptr, rows_ptr, offsets, mask, scale, ADDS: tl.constexpr):
    total = tl.load(values_ptr + offsets, mask=mask, other=0.0)
    if ADDS:
        total += tl.load(rows_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale
    return total


@triton.jit
def _store_kernel(
    values_ptr,  # (rows, width), contiguous, as is rows
    rows_ptr,
    scales_ptr,  # (rows)
    num_rows,
    width,
    LEAST: tl.constexpr,
    TOP: tl.constexpr,
    ADDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # With a 64-bit start, the row is a 64-bit number.
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        before = 1.0
        if ADDS:
            before = tl.load(scales_ptr + row)
        highs = tl.full([COLUMNS], LEAST, tl.float32)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            total = _total(values_ptr, rows_ptr, row * width + columns, columns < width, before, ADDS)
            highs = tl.maximum(highs, tl.abs(total))  # the maximum of a number and NaN is the number
        high = tl.max(highs, 0)
        bits = high.to(tl.int32, bitcast=True) & 0x7F800000
        scale = tl.where(high < float("inf"), bits.to(tl.float32, bitcast=True) / TOP, 1.0)
        inverse = 1.0 / scale  # exact, as is a multiplication by it
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            mask = columns < width
            total = _total(values_ptr, rows_ptr, row * width + columns, mask, before, ADDS)
            rounded = (total * inverse).to(rows_ptr.dtype.element_ty)
            tl.store(rows_ptr + row * width + columns, rounded, mask=mask)
        tl.store(scales_ptr + row, scale)


def store(values: Tensor, rows: Tensor, scales: Tensor, adds: bool, least: float, top: float) -> None:
    num_rows, width = values.shape
    if not values.numel():
        return
    columns = min(triton.next_power_of_2(width), MOST_COLUMNS)
    grid = (min(num_rows, PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(values.device)),)
    launch(_store_kernel)[grid](
        values,
        rows,
        scales,
        num_rows,
        width,
        LEAST=least,
        TOP=top,
        ADDS=adds,
        COLUMNS=columns,
        num_warps=max(1, min(8, columns // 256)),
    )
