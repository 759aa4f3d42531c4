"""Copies rows into the packed matrix of ops/packed.py, beside the gradients of q and k."""

# A type checker does not see the type that Triton's decorator gives a kernel.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import begin, launch

# 8192 x 512 and 8192 x 1024 in bfloat16 take 5.5 and 11.7 us, 3.0 and 2.9 TB/s (H100, torch 2.11.0, triton 3.6.0,
# 2026-11-26: "copy of v" in bench/results/step_kernels_nvidia_h100_80gb_hbm3.csv).
ROWS, COLUMNS = 4, 512


def copy(x: Tensor, out: Tensor) -> None:
    """Copy x (N, K) into out (N, K). Columns are contiguous in both; rows may have any stride."""
    num_rows, width = x.shape
    launch(_copy_kernel)[(triton.cdiv(num_rows, ROWS), triton.cdiv(width, COLUMNS))](
        x, out, num_rows, width, x.stride(0), out.stride(0), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )


@triton.jit
def _copy_kernel(
    x_ptr,  # (N, K), as is out
    out_ptr,
    num_rows,
    width,
    x_stride,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < num_rows) & (columns < width)
    tl.store(out_ptr + rows * out_stride + columns, tl.load(x_ptr + rows * x_stride + columns, mask), mask)
