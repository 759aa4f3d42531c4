"""Residual addition and the RMSNorm of the sum.

    s = x + residual        rounded to the dtype that x and residual promote to
    y = rms_norm(s)         of the rounded sum, as in a model that adds and then normalizes; see rms_norm.py

    x, residual (..., D), weight (D) or None -> y (..., D), s (..., D), rstd (...)

Dtypes are those of rms_norm.py, with s in place of x. Saved for backward: s, weight, rstd. Backward adds the gradient
through s to the gradient through y before it rounds, and computes one gradient for both x and residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registration import traceable_op
from .rms_norm import input_gradient, is_normed_by_kernel, normalize, weight_gradient


@traceable_op
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    if is_normed_by_kernel(x, residual, weight, numbers=(eps, offset)):
        from ..kernels import rms_norm as kernels

        return kernels.forward(x, residual, weight, eps, offset, casting)
    s = x + residual
    y, rstd = normalize(s, weight, eps, offset, casting)
    return y, s, rstd


@traceable_op
def add_rms_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    needs_dsum: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (gradient of the sum, dweight), each empty where not needed."""
    if is_normed_by_kernel(s, dy, ds, weight, numbers=(offset,)):
        from ..kernels import rms_norm as kernels

        return kernels.backward(dy, ds, s, weight, rstd, offset, needs_dsum, needs_dweight)
    dsum = s.new_empty(0)
    if needs_dsum:
        dsum = input_gradient(dy, s, weight, rstd, offset)
        dsum = (dsum if ds is None else dsum + ds).to(s.dtype)
    if weight is None or not needs_dweight:
        return dsum, s.new_empty(0)
    return dsum, weight_gradient(dy, s, weight, rstd)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _, offset, _ = inputs
    _, s, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(s, weight, rstd)
    ctx.dtypes = x.dtype, residual.dtype
    ctx.offset = offset


def _backward(ctx: Any, dy: Tensor | None, ds: Tensor | None, drstd: None) -> tuple[Tensor | None, ...]:
    needs_dx, needs_dresidual, needs_dweight, *_ = ctx.needs_input_grad
    dsum, dweight = ds, None
    if dy is not None:
        s, weight, rstd = ctx.saved_tensors
        dsum, dweight = torch.ops.liger_compile.add_rms_norm_backward.default(
            dy, ds, s, weight, rstd, ctx.offset, needs_dx or needs_dresidual, needs_dweight
        )
    x_dtype, residual_dtype = ctx.dtypes
    return (
        dsum.to(x_dtype) if needs_dx and dsum is not None else None,
        dsum.to(residual_dtype) if needs_dresidual and dsum is not None else None,
        dweight if needs_dweight else None,
        None,
        None,
        None,
    )


add_rms_norm.register_autograd(_backward, setup_context=_setup_context)
