"""RMSNorm: the kernels of ops/rms_norm.py and ops/pre_norm.py.

A row stays in registers between its two passes. In half precision, forward therefore moves 4 bytes per element, and
backward 6, or 8 with the gradient that bypasses the norm. A wide row has its own program. For narrow rows, such as the
heads of a query norm, a program processes several rows. A width that is not a power of two is covered by a power of two
and a smaller one.

Backward computes both gradients in one pass. A fixed number of programs loops over the rows, and each program keeps a
sum of dweight in float32. A second kernel adds the sums in a fixed order, so that the result is deterministic.
"""

# A type checker does not see the type that Triton's decorator gives a kernel.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import begin, begin_alone, launch, num_multiprocessors

SUM_PROGRAMS, SUM_COLUMNS = 256, 16  # the tile of the kernel that sums dweight


class Config(NamedTuple):
    rows: int  # of a tile
    main: int  # columns of the main part, a power of two
    tail: int  # columns of the second part, a power of two or 0
    num_warps: int
    programs: int  # of backward, per multiprocessor
    num_stages: int  # of backward's loop: tiles in flight, including the one in use


def config(width: int, itemsize: int) -> Config:
    """Return the launch for rows of `width` elements; the widest element type has `itemsize` bytes."""
    whole = triton.next_power_of_2(width)
    main, tail = whole // 2, triton.next_power_of_2(width - whole // 2)
    # A tail pays off if it is smaller than its saving, and so wide that every thread can read it 16 bytes at a time, as
    # it reads main. With two layouts, one would have to be converted.
    if main + tail < whole and tail >= max(512, main // 4):
        num_warps = tail // 256
    else:
        main, tail, num_warps = whole, 0, min(16, max(4, whole // 512))
    rows = max(1, 2048 // whole)
    tile = rows * (main + tail)
    return Config(
        rows,
        main,
        tail,
        num_warps,
        programs=max(1, min(4, 12288 // tile)),  # backward takes about 6 registers per element, of 65536
        num_stages=min(3, 1 + 2**15 // (tile * itemsize)),  # at most 96 KiB of dy, x and ds in shared memory
    )


def rows_of(x: Tensor) -> Tensor:
    """Return x as (N, D) with contiguous row elements: a view if the rows are evenly spaced, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def forward(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """Return (y, rstd)."""
    y_dtype = x.dtype if weight is None or casting != "llama" else torch.promote_types(x.dtype, weight.dtype)
    y = x.new_empty(x.shape, dtype=y_dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    x = rows_of(x)
    num_rows, width = x.shape
    launched = config(width, x.itemsize)
    launch(_forward_kernel)[(triton.cdiv(num_rows, launched.rows),)](
        x,
        None if weight is None else weight.contiguous(),
        y,
        rstd,
        num_rows,
        x.stride(0),
        WIDTH=width,
        EPS=eps,
        OFFSET=offset,
        ROUNDS_FIRST=casting == "llama",
        ROWS=launched.rows,
        MAIN=launched.main,
        TAIL=launched.tail,
        num_warps=launched.num_warps,
    )
    return y, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight), each empty where not needed."""
    dx = x.new_empty(x.shape if needs_dx else 0)
    dweight = _launch_backward(
        [dy], None, x, weight, rstd, offset, dx if needs_dx else None, None, False, needs_dweight
    )
    return dx, dweight


def backward_fused(
    dys: Sequence[Tensor],
    ds: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    offset: float,
    casting: str,
    needs_dweight: bool,
    y_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, y), the last two empty where not needed.

    The gradients are for the sum of one to three dys. ds is added to dx. y is recomputed.
    """
    dx = x.new_empty(x.shape)
    y = x.new_empty(0) if y_dtype is None else x.new_empty(x.shape, dtype=y_dtype)
    rounds_first = casting == "llama"
    dweight = _launch_backward(
        dys, ds, x, weight, rstd, offset, dx, None if y_dtype is None else y, rounds_first, needs_dweight
    )
    return dx, dweight, y


def _launch_backward(
    dys: Sequence[Tensor],
    ds: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    dx: Tensor | None,
    y: Tensor | None,
    rounds_first: bool,
    needs_dweight: bool,
) -> Tensor:
    """Write dx and y, and return dweight or an empty tensor."""
    x, dys = rows_of(x), [rows_of(dy) for dy in dys]
    ds = None if ds is None else rows_of(ds)
    num_rows, width = x.shape
    launched = config(width, max(tensor.itemsize for tensor in (x, *dys)))
    num_programs: Any = torch.sym_min(
        num_multiprocessors(x.device) * launched.programs, triton.cdiv(num_rows, launched.rows)
    )
    needs_dweight = needs_dweight and weight is not None
    sums = x.new_empty((num_programs, width), dtype=torch.float32) if needs_dweight else None
    dy, *others = dys
    second, third = (*others, *(None,) * (2 - len(others)))
    strides = (0 if tensor is None else tensor.stride(0) for tensor in (dy, second, third, ds, x))
    launch(_backward_kernel)[(num_programs,)](
        dy,
        second,
        third,
        ds,
        x,
        None if weight is None else weight.contiguous(),
        rstd.contiguous(),
        dx,
        y,
        sums,
        num_rows,
        *strides,
        WIDTH=width,
        OFFSET=offset,
        ROUNDS_FIRST=rounds_first,
        ROWS=launched.rows,
        MAIN=launched.main,
        TAIL=launched.tail,
        STAGES=launched.num_stages if len(dys) == 1 else min(2, launched.num_stages),
        num_warps=launched.num_warps,
    )
    if sums is None or weight is None:
        return x.new_empty(0)
    return sum_of_programs(sums, weight.dtype)


def sum_of_programs(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of (P, D) over P, in a fixed order."""
    num_programs, width = sums.shape
    total = sums.new_empty(width, dtype=dtype)
    launch(_sum_kernel)[(triton.cdiv(width, SUM_COLUMNS),)](
        sums,
        total,
        num_programs,
        WIDTH=width,
        PROGRAMS=SUM_PROGRAMS,
        COLUMNS=SUM_COLUMNS,
        num_warps=8,
    )
    return total


@triton.jit
def _forward_kernel(
    x_ptr,  # (N, D), as is y
    weight_ptr,  # (D) or None
    y_ptr,
    rstd_ptr,  # (N)
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,  # before the weight, to the dtype of x
    ROWS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    is_row = rows < num_rows
    x_at = x_ptr + rows * x_stride
    main = tl.arange(0, MAIN)[None, :]
    main_mask = is_row & (main < WIDTH)
    x_main = tl.load(x_at + main, main_mask, other=0.0).to(tl.float32)
    squares = tl.sum(x_main * x_main, 1, keep_dims=True)
    if TAIL:
        tail = MAIN + tl.arange(0, TAIL)[None, :]
        tail_mask = is_row & (tail < WIDTH)
        x_tail = tl.load(x_at + tail, tail_mask, other=0.0).to(tl.float32)
        squares += tl.sum(x_tail * x_tail, 1, keep_dims=True)
    rstd = tl.rsqrt(squares / WIDTH + EPS)
    tl.store(rstd_ptr + rows, rstd, is_row)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    y_main = _weighted(x_main * rstd, weight_ptr, main, dtype, WIDTH, OFFSET, ROUNDS_FIRST)
    tl.store(y_ptr + rows * WIDTH + main, y_main, main_mask)
    if TAIL:
        y_tail = _weighted(x_tail * rstd, weight_ptr, tail, dtype, WIDTH, OFFSET, ROUNDS_FIRST)
        tl.store(y_ptr + rows * WIDTH + tail, y_tail, tail_mask)


@triton.jit
def _weighted(
    normed,
    weight_ptr,
    columns,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    if ROUNDS_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    if weight_ptr is not None:
        normed *= _gain(weight_ptr, tl.broadcast_to(columns, normed.shape), WIDTH, OFFSET)
    return normed


# Long because a kernel is one program: its parameters, one on each line, are half of it.
@triton.jit
def _backward_kernel(
    dy_ptr,  # (N, D), as are ds, x, dx and y; ds, dx and y may be None
    second_ptr,  # added to dy, as is third; or None
    third_ptr,
    ds_ptr,
    x_ptr,
    weight_ptr,  # (D) or None
    rstd_ptr,  # (N)
    dx_ptr,
    y_ptr,
    sums_ptr,  # (P, D) in float32, for P programs: the contribution of each to dweight; or None
    num_rows,
    dy_stride,
    second_stride,
    third_stride,
    ds_stride,
    x_stride,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    program = tl.program_id(0)
    main = tl.arange(0, MAIN)[None, :]
    is_main = main < WIDTH
    main_gain = _gain(weight_ptr, tl.broadcast_to(main, [ROWS, MAIN]), WIDTH, OFFSET)
    main_sum = tl.zeros([ROWS, MAIN], tl.float32)
    if TAIL:
        tail = MAIN + tl.arange(0, TAIL)[None, :]
        is_tail = tail < WIDTH
        tail_gain = _gain(weight_ptr, tl.broadcast_to(tail, [ROWS, TAIL]), WIDTH, OFFSET)
        tail_sum = tl.zeros([ROWS, TAIL], tl.float32)

    for block in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        is_row = rows < num_rows
        x_at, dy_at = x_ptr + rows * x_stride, dy_ptr + rows * dy_stride
        main_normed = tl.load(x_at + main, is_row & is_main, other=0.0).to(tl.float32)
        main_g = tl.load(dy_at + main, is_row & is_main, other=0.0).to(tl.float32)
        main_g += _read_or_zero(second_ptr, rows, main, is_row & is_main, second_stride)
        main_g += _read_or_zero(third_ptr, rows, main, is_row & is_main, third_stride)
        if TAIL:
            tail_normed = tl.load(x_at + tail, is_row & is_tail, other=0.0).to(tl.float32)
            tail_g = tl.load(dy_at + tail, is_row & is_tail, other=0.0).to(tl.float32)
            tail_g += _read_or_zero(second_ptr, rows, tail, is_row & is_tail, second_stride)
            tail_g += _read_or_zero(third_ptr, rows, tail, is_row & is_tail, third_stride)
        rstd = tl.load(rstd_ptr + rows, is_row, other=0.0)
        main_normed *= rstd
        _write_y(y_ptr, x_ptr, main_normed, main_gain, rows, main, is_row & is_main, WIDTH, ROUNDS_FIRST)
        if TAIL:
            tail_normed *= rstd
            _write_y(y_ptr, x_ptr, tail_normed, tail_gain, rows, tail, is_row & is_tail, WIDTH, ROUNDS_FIRST)
        if sums_ptr is not None:
            main_sum += main_g * main_normed
            if TAIL:
                tail_sum += tail_g * tail_normed
        if dx_ptr is not None:
            main_g *= main_gain
            product = tl.sum(main_g * main_normed, 1, keep_dims=True)
            if TAIL:
                tail_g *= tail_gain
                product += tl.sum(tail_g * tail_normed, 1, keep_dims=True)
            mean = product / WIDTH
            main_dx = rstd * (main_g - main_normed * mean)
            _write_dx(dx_ptr, ds_ptr, main_dx, rows, main, is_row & is_main, ds_stride, WIDTH)
            if TAIL:
                tail_dx = rstd * (tail_g - tail_normed * mean)
                _write_dx(dx_ptr, ds_ptr, tail_dx, rows, tail, is_row & is_tail, ds_stride, WIDTH)

    if sums_ptr is not None:
        sums_at = sums_ptr + program.to(tl.int64) * WIDTH
        tl.store(sums_at + main, tl.sum(main_sum, 0, keep_dims=True), is_main)
        if TAIL:
            tl.store(sums_at + tail, tl.sum(tail_sum, 0, keep_dims=True), is_tail)


@triton.jit
def _read_or_zero(x_ptr, rows, columns, mask, stride):
    if x_ptr is None:
        x = 0.0
    else:
        x = tl.load(x_ptr + rows * stride + columns, mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _write_y(
    y_ptr, x_ptr, normed, gain, rows, columns, mask, WIDTH: tl.constexpr, ROUNDS_FIRST: tl.constexpr
):
    if y_ptr is not None:
        if ROUNDS_FIRST:
            normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
        tl.store(y_ptr + rows * WIDTH + columns, normed * gain, mask)


@triton.jit
def _gain(weight_ptr, columns, WIDTH: tl.constexpr, OFFSET: tl.constexpr):
    """Return the factors of the elements of a tile.

    They are loaded for the whole tile: a single row of factors would have to be moved between threads.
    """
    if weight_ptr is None:
        gain = tl.full(columns.shape, 1.0, tl.float32)
    else:
        gain = tl.load(weight_ptr + columns, columns < WIDTH, other=0.0).to(tl.float32) + OFFSET
    return gain


@triton.jit
def _write_dx(dx_ptr, ds_ptr, dx, rows, columns, mask, ds_stride, WIDTH: tl.constexpr):
    if ds_ptr is not None:
        dx += tl.load(ds_ptr + rows * ds_stride + columns, mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + rows * WIDTH + columns, dx, mask)


@triton.jit
def _sum_kernel(
    sums_ptr,  # (P, D) in float32
    total_ptr,  # (D)
    num_programs,
    WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin_alone(OVERLAPS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([PROGRAMS, COLUMNS], tl.float32)
    for first in tl.range(0, num_programs, PROGRAMS):
        programs = (first + tl.arange(0, PROGRAMS)).to(tl.int64)[:, None]
        mask = (programs < num_programs) & (columns < WIDTH)
        total += tl.load(sums_ptr + programs * WIDTH + columns, mask, other=0.0)
    tl.store(total_ptr + columns, tl.sum(total, 0, keep_dims=True), columns < WIDTH)
