"""RMSNorm before a sublayer, as nodes that are inlined late, with a backward that can include the ops around the norm.

    rstd = statistics(x)                     x (..., D) -> rstd (..., 1)
    y = rms_norm(x, weight), given rstd      weight (D) or None -> y (..., D)
    dx, dweight = the backward of rms_norm for dy
    dx, dweight, y = the same for sum(dys), with ds added to dx, and y recomputed

Each op remains one node until the AOTAutograd graphs are complete. The compiler then receives the reference in its
place, and fuses the reference with its neighbors as well as a kernel would. In backward, backward_passes/ first forms
the last of the four where it can. There x is a residual stream, and ds is the gradient that bypasses the norm. dys are
the gradients from the linear layers that read y. y is recomputed for the gradients of their weights.

Dtypes and casting as in rms_norm.py. Saved for backward: x, rstd and weight. dys are summed in float32 without
intermediate rounding. They may be narrower than x, as under autocast, where the linear layers read y in a half
precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .precision import accumulation_dtype
from .registration import late_op
from .rms_norm import input_gradient, inverse_root, is_normed_by_kernel, scaled, weight_gradient

MOST_SUMMED = 3  # gradients that the kernel accepts


@late_op
def pre_norm_statistics(x: Tensor, eps: float) -> Tensor:
    return inverse_root(x, eps)


@late_op
def pre_norm(x: Tensor, rstd: Tensor, weight: Tensor | None, offset: float, casting: str) -> Tensor:
    return scaled(x, rstd, weight, offset, casting)


def _backward_of(
    dy: Tensor,
    ds: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    offset: float,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dx = input_gradient(dy, x, weight, rstd.squeeze(-1), offset)
    dx = (dx if ds is None else dx + ds).to(x.dtype)
    if weight is None or not needs_dweight:
        return dx, x.new_empty(0)
    return dx, weight_gradient(dy, x, weight, rstd.squeeze(-1))


@late_op
def pre_norm_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    offset: float,
    casting: str,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight), dweight empty where not needed. `casting` specifies the corresponding y."""
    return _backward_of(dy, None, x, rstd, weight, offset, needs_dweight)


@late_op
def pre_norm_backward_fused(
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
    """Return (dx, dweight, y), the last two empty where not needed. The formula's y is finally rounded to y_dtype."""
    if len(dys) <= MOST_SUMMED and is_normed_by_kernel(x, weight, ds, *dys, numbers=(offset,)):
        from ..kernels import rms_norm as kernels

        return kernels.backward_fused(dys, ds, x, rstd, weight, offset, casting, needs_dweight, y_dtype)
    wide = accumulation_dtype(x.dtype)
    first, *others = (dy.to(wide) for dy in dys)
    dx, dweight = _backward_of(sum(others, start=first), ds, x, rstd, weight, offset, needs_dweight)
    if y_dtype is None:
        return dx, dweight, x.new_empty(0)
    return dx, dweight, scaled(x, rstd, weight, offset, casting).to(y_dtype)


def _setup_statistics(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)  # pre_norm has the complete backward


def _no_backward(ctx: Any, drstd: Tensor | None) -> tuple[None, None]:
    return None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, rstd, weight, *ctx.mode = inputs
    ctx.save_for_backward(x, rstd, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs_dx, _, needs_dweight, *_ = ctx.needs_input_grad
    dx, dweight = torch.ops.liger_compile.pre_norm_backward.default(
        dy, *ctx.saved_tensors, *ctx.mode, needs_dweight
    )
    return dx if needs_dx else None, None, dweight if needs_dweight else None, None, None


pre_norm_statistics.register_autograd(_no_backward, setup_context=_setup_statistics)
pre_norm.register_autograd(_backward, setup_context=_setup_context)
