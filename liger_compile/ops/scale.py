"""A gradient computed in forward, times the incoming gradient, which in training is nearly always exactly 1.

    gradient (R, ...), factor () or one for each row, (R) -> gradient * factor, in factor's dtype, rounded once

These are separate ops so that a compiler does not read and write gradients of a gigabyte for a factor of 1. On a GPU,
`scale_in_place` with a factor of 1 reads only the factor. `backward_passes/` inserts it where it is allowed.
"""

from __future__ import annotations

from torch import Tensor

from .blocks import row_blocks
from .dispatch import has_kernel
from .registration import mutating_op, opaque_op


def scale_into(gradient: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Compute out = gradient * factor, where out may be gradient."""
    if has_kernel(gradient, factor) and gradient.is_contiguous() and out.is_contiguous():
        from ..kernels import scale as kernels

        return (kernels.scale_rows if factor.dim() else kernels.scale)(gradient, factor, out)
    for rows in row_blocks(gradient.shape[0], gradient[:1].numel()):
        out[rows] = gradient[rows].to(factor.dtype) * by_rows(factor[rows] if factor.dim() else factor)
    return out


def by_rows(factor: Tensor) -> Tensor:
    """Return the factor in a shape that multiplies the rows of a matrix."""
    return factor.unsqueeze(-1) if factor.dim() else factor


@opaque_op
def scale(gradient: Tensor, factor: Tensor) -> Tensor:
    return scale_into(gradient, factor, gradient.new_empty(gradient.shape))


@scale.register_fake
def _(gradient: Tensor, factor: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


@mutating_op("gradient")
def scale_in_place(gradient: Tensor, factor: Tensor) -> None:
    scale_into(gradient, factor, gradient)
