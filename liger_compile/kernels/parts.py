"""float32 matrices as sums of three bfloat16 matrices: the kernels of ops/adapters.py.

    x = first + second + third     first, second: x, and what is left of it, without the last 16 bits

    beside    the parts of x in an order, each beside the one before     4 bytes read, 2 written for each of them
    paired    the same for two matrices, in one launch
    total     scale * (first + second + third)                           12 bytes read, 4 written

The matrices that are split have any strides. The parts of an infinite number or of NaN are not finite either.
"""

# A type checker does not recognize Triton's launches, nor that static_range is iterable.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

BLOCK = 1024


@triton.jit
def _cut_off(x):
    # Of float32: sign, exponent, and the first seven bits of the fraction.
    return (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _store_parts(
    block,
    x_ptr,
    out_ptr,
    numel,
    width,  # the columns of x
    x_row,
    x_column,
    out_row,
    out_part,
    ORDER: tl.constexpr,  # two bits for each part
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    row, column = offsets // width, offsets % width
    x = tl.load(x_ptr + row * x_row + column * x_column, mask=mask, other=0.0)
    first = _cut_off(x)
    second = _cut_off(x - first)
    third = x - first - second
    out_ptr += row * out_row + column
    for position in tl.static_range(COUNT):
        if (ORDER >> 2 * position) & 3 == 0:
            tl.store(out_ptr + position * out_part, first.to(tl.bfloat16), mask=mask)
        elif (ORDER >> 2 * position) & 3 == 1:
            tl.store(out_ptr + position * out_part, second.to(tl.bfloat16), mask=mask)
        else:
            tl.store(out_ptr + position * out_part, third.to(tl.bfloat16), mask=mask)


@triton.jit
def _beside_kernel(
    x_ptr,
    out_ptr,
    numel,
    width,
    x_row,
    x_column,
    out_row,
    out_part,
    ORDER: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    _store_parts(block, x_ptr, out_ptr, numel, width, x_row, x_column, out_row, out_part, ORDER, COUNT, BLOCK)


@triton.jit
def _paired_kernel(
    a_ptr,
    a_out,
    a_numel,
    a_width,
    a_row,
    a_column,
    a_out_row,
    a_out_part,
    b_ptr,
    b_out,
    b_numel,
    b_width,
    b_row,
    b_column,
    b_out_row,
    b_out_part,
    A_ORDER: tl.constexpr,
    B_ORDER: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, of_a = tl.program_id(0), tl.cdiv(a_numel, BLOCK)
    if block < of_a:
        _store_parts(
            block,
            a_ptr,
            a_out,
            a_numel,
            a_width,
            a_row,
            a_column,
            a_out_row,
            a_out_part,
            A_ORDER,
            COUNT,
            BLOCK,
        )
    else:
        block -= of_a
        _store_parts(
            block,
            b_ptr,
            b_out,
            b_numel,
            b_width,
            b_row,
            b_column,
            b_out_row,
            b_out_part,
            B_ORDER,
            COUNT,
            BLOCK,
        )


@triton.jit
def _total_kernel(parts_ptr, out_ptr, numel, width, row_stride, part_stride, scale, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    parts_ptr += offsets // width * row_stride + offsets % width
    total = tl.load(parts_ptr, mask=mask)
    total += tl.load(parts_ptr + part_stride, mask=mask)
    total += tl.load(parts_ptr + 2 * part_stride, mask=mask)
    tl.store(out_ptr + offsets, total * scale, mask=mask)


def _arguments(x: Tensor, out: Tensor, dim: int) -> tuple[Any, ...]:
    """Return the arguments of `_store_parts` for x (M, N) and out: (M, C * N) for dim 1, (C * M, N) for dim 0."""
    rows, columns = x.shape
    return x, out, x.numel(), columns, *x.stride(), out.stride(0), columns if dim else rows * columns


def _empty(x: Tensor, count: int, dim: int) -> Tensor:
    rows, columns = x.shape
    shape = (rows, count * columns) if dim else (count * rows, columns)
    return x.new_empty(shape, dtype=torch.bfloat16)


def _encoded(order: Sequence[int]) -> int:
    return sum(which << 2 * position for position, which in enumerate(order))


def beside(x: Tensor, order: Sequence[int], dim: int) -> Tensor:
    """Return the parts of x (M, N) in this order, one beside the other along a dimension, contiguous."""
    out = _empty(x, len(order), dim)
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        launch(_beside_kernel)[grid](
            *_arguments(x, out, dim), ORDER=_encoded(order), COUNT=len(order), BLOCK=BLOCK
        )
    return out


def paired(a: Tensor, a_order: Sequence[int], b: Tensor, b_order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return `beside` of a along the columns, and of b along the rows, in orders of equal length."""
    a_out, b_out = _empty(a, len(a_order), 1), _empty(b, len(b_order), 0)
    if programs := triton.cdiv(a.numel(), BLOCK) + triton.cdiv(b.numel(), BLOCK):
        launch(_paired_kernel)[(programs,)](
            *_arguments(a, a_out, 1),
            *_arguments(b, b_out, 0),
            A_ORDER=_encoded(a_order),
            B_ORDER=_encoded(b_order),
            COUNT=len(a_order),
            BLOCK=BLOCK,
        )
    return a_out, b_out


def total(parts: Tensor, dim: int, scale: float) -> Tensor:
    """Return scale * parts.sum(dim) for contiguous parts (M, 3, N), dim 1, or (3, M, N), dim 0."""
    rows, columns = parts.shape[1 - dim], parts.shape[2]
    out = parts.new_empty((rows, columns))
    if out.numel():
        grid = (triton.cdiv(out.numel(), BLOCK),)
        launch(_total_kernel)[grid](
            parts, out, out.numel(), columns, parts.stride(1 - dim), parts.stride(dim), scale, BLOCK=BLOCK
        )
    return out
