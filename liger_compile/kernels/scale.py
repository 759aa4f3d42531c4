"""A gradient times a number on the device, or one number per row, which in training is nearly always exactly 1.

    out = gradient * factor     in float32, rounded once;  gradient, out of one dtype and shape, factor () or (rows)

The op is in place if out is gradient: where the factor is 1, it then reads nothing else. Otherwise it moves 4 bytes per
element in half precision, 8 in single. See `ops/linear_cross_entropy.py`, which computes gradients in forward.
"""

# A type checker does not recognize Triton's launch argument num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, num_multiprocessors

PROGRAMS_PER_MULTIPROCESSOR = 8
BLOCK = 4096


@triton.jit
def _scale_kernel(gradient_ptr, out_ptr, factor_ptr, numel, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if not IN_PLACE or factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, numel, tl.num_programs(0) * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            mask = offsets < numel
            gradient = tl.load(gradient_ptr + offsets, mask=mask).to(tl.float32)
            tl.store(out_ptr + offsets, (gradient * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_rows_kernel(
    gradient_ptr, out_ptr, factor_ptr, rows, width, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr
):
    # With a 64-bit start, the row is a 64-bit number.
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        factor = tl.load(factor_ptr + row).to(tl.float32)
        if not IN_PLACE or factor != 1.0:
            for start in range(0, width, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                offsets, mask = row * width + columns, columns < width
                gradient = tl.load(gradient_ptr + offsets, mask=mask).to(tl.float32)
                tl.store(out_ptr + offsets, (gradient * factor).to(out_ptr.dtype.element_ty), mask=mask)


def scale(gradient: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Write gradient * factor () into out, which may be gradient, and return out. Both are contiguous."""
    numel = gradient.numel()
    if numel:
        programs = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(gradient.device)
        grid = (min(triton.cdiv(numel, BLOCK), programs),)
        launch(_scale_kernel)[grid](
            gradient, out, factor, numel, IN_PLACE=out is gradient, BLOCK=BLOCK, num_warps=8
        )
    return out


def scale_rows(gradient: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Write gradient * factor (R) into out (R, ...), which may be gradient, and return out. All are contiguous."""
    if gradient.numel():
        rows, width = gradient.shape[0], gradient[0].numel()
        programs = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(gradient.device)
        block = min(triton.next_power_of_2(width), BLOCK)
        launch(_scale_rows_kernel)[(min(rows, programs),)](
            gradient,
            out,
            factor,
            rows,
            width,
            IN_PLACE=out is gradient,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
    return out
