"""RMSNorm as a model has it before a sublayer, for a compiler: rms_norm.py, with a backward for what is around it.

    y = rms_norm(x, weight)                           x (..., D), weight (D) or None -> y (..., D)
    dx, dweight = rms_norm's backward of dy
    dx, dweight, y = the same of sum(dys), with ds added to dx, and y again

Forward and backward stay one node each until AOTAutograd's graphs are whole. Then a compiler gets the reference in
their place, which it fuses with what is around it as well as a kernel would be; but of a backward, gradients.py first
makes the third, where it can. x is a residual stream then, whose gradient ds comes past the norm, dys are the gradients
by the linear layers that read y, and y is computed again for the gradients of their weights.

Dtypes and casting as in rms_norm.py. Saved for backward: x and weight; rstd is taken again, since backward reads all of
a row. dys are summed in float32 and not rounded in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .precision import accumulation_dtype
from .registration import whole_op
from .rms_norm import input_gradient, is_normed_by_kernel, normalize, weight_gradient


def _forward(x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str) -> Tensor:
    return normalize(x, weight, eps, offset, casting)[0]


def _backward_of_sum(
    dy: Tensor,
    ds: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    rstd = torch.rsqrt(x.to(wide).square().mean(-1) + eps)
    dx = input_gradient(dy, x, weight, rstd, offset)
    dx = (dx if ds is None else dx + ds).to(x.dtype)
    if weight is None or not needs_dweight:
        return dx, x.new_empty(0)
    return dx, weight_gradient(dy, x, weight, rstd)


@whole_op(traced=_forward)
def pre_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str) -> Tensor:
    if is_normed_by_kernel(x, weight, numbers=(eps, offset)):
        from ..kernels import rms_norm as kernels

        return kernels.forward(x, None, weight, eps, offset, casting)[0]
    return _forward(x, weight, eps, offset, casting)


@whole_op
def pre_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    casting: str,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), the latter empty where not needed. casting says which y is meant."""
    return _backward_of_sum(dy, None, x, weight, eps, offset, needs_dweight)


@whole_op
def pre_norm_backward_joined(
    dys: Sequence[Tensor],
    ds: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    casting: str,
    needs_dweight: bool,
    needs_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, y), the last two empty where not needed."""
    given = () if ds is None else (ds,)
    if is_normed_by_kernel(x, weight, *dys, *given, numbers=(eps, offset)):
        from ..kernels import rms_norm as kernels

        return kernels.backward_joined(dys, ds, x, weight, eps, offset, casting, needs_dweight, needs_y)
    wide = accumulation_dtype(x.dtype)
    first, *others = (dy.to(wide) for dy in dys)
    dy = sum(others, start=first)
    dx, dweight = _backward_of_sum(dy, ds, x, weight, eps, offset, needs_dweight)
    return dx, dweight, _forward(x, weight, eps, offset, casting) if needs_y else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.mode = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs_dx, needs_dweight, *_ = ctx.needs_input_grad
    dx, dweight = torch.ops.liger_compile.pre_norm_backward.default(
        dy, *ctx.saved_tensors, *ctx.mode, needs_dweight
    )
    return dx if needs_dx else None, dweight if needs_dweight else None, None, None, None


pre_norm.register_autograd(_backward, setup_context=_setup_context)
