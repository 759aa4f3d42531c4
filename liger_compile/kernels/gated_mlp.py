"""The gate of a gated MLP and its gradients: the kernels of ops/gated_mlp.py.

The elements are independent, so a program processes a tile of a few rows by at most 1024 columns. In half precision,
forward moves 6 bytes per element and backward 10, or 12 if it also writes h for the gradient of the down projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import begin, launch
from .rms_norm import rows_of


class Config(NamedTuple):
    rows: int
    columns: int
    num_warps: int


def config(width: int) -> Config:
    """Return the tile of a program, for rows of `width` elements."""
    columns = min(1024, triton.next_power_of_2(width))
    return Config(rows=2048 // columns, columns=columns, num_warps=4)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return h, in the dtype that gate and up promote to."""
    h = gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))
    gate, up = rows_of(gate), rows_of(up)
    num_rows, width = gate.shape
    rows, columns, num_warps = config(width)
    launch(_forward_kernel)[(triton.cdiv(num_rows, rows) * triton.cdiv(width, columns),)](
        gate,
        up,
        h,
        num_rows,
        gate.stride(0),
        up.stride(0),
        WIDTH=width,
        ACTIVATION=activation,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=num_warps,
    )
    return h


def backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    dgate: Tensor | None,
    dup: Tensor | None,
    h: Tensor | None,
    activation: str,
) -> None:
    """Write into the given outputs among dgate, dup and h, all contiguous. h may be dh.

    If dgate has twice the width, it is packed, and its second half receives dup.
    """
    dh, gate, up = rows_of(dh), rows_of(gate), rows_of(up)
    num_rows, width = gate.shape
    rows, columns, num_warps = config(width)
    launch(_backward_kernel)[(triton.cdiv(num_rows, rows) * triton.cdiv(width, columns),)](
        dh,
        gate,
        up,
        dgate,
        dup,
        h,
        num_rows,
        dh.stride(0),
        gate.stride(0),
        up.stride(0),
        WIDTH=width,
        PACKED=dgate is not None and dgate.shape[-1] != width,
        ACTIVATION=activation,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=num_warps,
    )


@triton.jit
def _forward_kernel(
    gate_ptr,  # (N, I), as are up and h
    up_ptr,
    h_ptr,
    num_rows,
    gate_stride,
    up_stride,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    rows, columns, mask = _tile(num_rows, WIDTH, ROWS, COLUMNS)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + columns, mask, other=0.0).to(tl.float32)
    act, _ = _activate(gate, ACTIVATION)
    act = act.to(gate_ptr.dtype.element_ty).to(tl.float32)
    tl.store(h_ptr + rows * WIDTH + columns, act * up, mask)


@triton.jit
def _backward_kernel(
    dh_ptr,  # (N, I), as are gate, up, dup and h
    gate_ptr,
    up_ptr,
    dgate_ptr,  # (N, I), or (N, 2I) if packed; dgate, dup and h may be None
    dup_ptr,
    h_ptr,
    num_rows,
    dh_stride,
    gate_stride,
    up_stride,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    rows, columns, mask = _tile(num_rows, WIDTH, ROWS, COLUMNS)
    dh = tl.load(dh_ptr + rows * dh_stride + columns, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + columns, mask, other=0.0).to(tl.float32)
    act, slope = _activate(gate, ACTIVATION)
    act = act.to(gate_ptr.dtype.element_ty).to(tl.float32)
    if dgate_ptr is not None:
        dgate_at = dgate_ptr + rows * (2 * WIDTH if PACKED else WIDTH) + columns
        tl.store(dgate_at, dh * up * slope, mask)
        if PACKED:
            tl.store(dgate_at + WIDTH, dh * act, mask)
    if dup_ptr is not None:
        tl.store(dup_ptr + rows * WIDTH + columns, dh * act, mask)
    if h_ptr is not None:
        tl.debug_barrier()  # h may overwrite dh, so every thread must have read dh before
        tl.store(h_ptr + rows * WIDTH + columns, act * up, mask)


@triton.jit
def _tile(num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles_in_row: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    rows = (program // tiles_in_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (program % tiles_in_row) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return rows, columns, (rows < num_rows) & (columns < WIDTH)


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """Return the activation of gate, which is gate * share, and its derivative."""
    if ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2u), which has no overflow and no cancellation.
        square = gate * gate
        scores = 1.5957691216057308 * gate * (1.0 + 0.044715 * square)
        share = tl.sigmoid(scores)
        # sigmoid(-x) is 1 - sigmoid(x) at full precision.
        slope = share * tl.sigmoid(-scores) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    else:
        tl.static_assert(ACTIVATION == "silu")
        share = tl.sigmoid(gate)
        slope = share * tl.sigmoid(-gate)
    return gate * share, share + gate * slope
