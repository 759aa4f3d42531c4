"""RMSNorm over the last dimension.

    rstd = 1 / sqrt(mean(x^2) + eps)
    casting "llama":  y = weight * (x * rstd).to(x.dtype)             rounded twice, as in Hugging Face's LlamaRMSNorm
    casting "gemma":  y = (x * rstd * (offset + weight)).to(x.dtype)  rounded once, as in GemmaRMSNorm and F.rms_norm

    x (..., D), weight (D) or None -> y (..., D), rstd (...)

Dtypes: x and weight in any floating dtypes; statistics and multiplications in float32 (float64 for float64 x); y in
x.dtype, under "llama" in the dtype that x and weight promote to. Saved for backward: x, weight, rstd.

With n = x * rstd and g = dy * (offset + weight):  dx = rstd * (g - n * mean(g * n)),  dweight = sum(dy * n).
This is the derivative of the formula without its rounding steps. The result is rounded once, at the end.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv 1910.07467).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import has_kernel
from .precision import accumulation_dtype
from .registration import padded, traceable_op


def inverse_root(x: Tensor, eps: float) -> Tensor:
    """Return rstd (..., 1), by the reference."""
    return torch.rsqrt(x.to(accumulation_dtype(x.dtype)).square().mean(-1, keepdim=True) + eps)


def scaled(x: Tensor, rstd: Tensor, weight: Tensor | None, offset: float, casting: str) -> Tensor:
    """Return y for x and rstd (..., 1), by the reference."""
    wide = accumulation_dtype(x.dtype)
    y = x.to(wide) * rstd
    if weight is not None and casting == "gemma":
        y = y * (weight.to(wide) + offset)
    y = y.to(x.dtype)
    return weight * y if weight is not None and casting == "llama" else y


def normalize(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """Return (y, rstd), by the reference."""
    rstd = inverse_root(x, eps)
    return scaled(x, rstd, weight, offset, casting), rstd.squeeze(-1)


def input_gradient(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float) -> Tensor:
    """Return dx in the accumulation dtype."""
    wide = accumulation_dtype(dy.dtype)
    rstd = rstd.unsqueeze(-1)
    normed = x.to(wide) * rstd
    g = dy.to(wide) if weight is None else dy.to(wide) * (weight.to(wide) + offset)
    return rstd * (g - normed * (g * normed).mean(-1, keepdim=True))


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Return dweight in the dtype of weight."""
    wide = accumulation_dtype(dy.dtype)
    dweight = dy.to(wide) * (x.to(wide) * rstd.unsqueeze(-1))
    if dweight.dim() > 1:
        dweight = dweight.sum(list(range(dweight.dim() - 1)))
    return dweight.to(weight.dtype)


MAX_WIDTH = 16384  # of the kernels, which hold a row in registers


def is_normed_by_kernel(x: Tensor, *others: Tensor | None, numbers: tuple[Any, ...]) -> bool:
    """Return whether the kernels accept the inputs. The width and the numbers are constants: none may be symbolic."""
    width = x.shape[-1]
    return (
        has_kernel(x, *others)
        and isinstance(width, int)
        and 0 < width <= MAX_WIDTH
        and all(isinstance(number, float) for number in numbers)
    )


@traceable_op
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    if is_normed_by_kernel(x, weight, numbers=(eps, offset)):
        from ..kernels import rms_norm as kernels

        return kernels.forward(x, weight, eps, offset, casting)
    return normalize(x, weight, eps, offset, casting)


@traceable_op
def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight), each empty where not needed."""
    if is_normed_by_kernel(x, dy, weight, numbers=(offset,)):
        from ..kernels import rms_norm as kernels

        return kernels.backward(dy, x, weight, rstd, offset, needs_dx, needs_dweight)
    dx = input_gradient(dy, x, weight, rstd, offset).to(x.dtype) if needs_dx else x.new_empty(0)
    if weight is None or not needs_dweight:
        return dx, x.new_empty(0)
    return dx, weight_gradient(dy, x, weight, rstd)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, offset, _ = inputs
    _, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)
    ctx.offset = offset


def _backward(ctx: Any, dy: Tensor | None, drstd: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return padded(ctx)
    x, weight, rstd = ctx.saved_tensors
    needs_dx, needs_dweight, *_ = ctx.needs_input_grad
    dx, dweight = torch.ops.liger_compile.rms_norm_backward.default(
        dy, x, weight, rstd, ctx.offset, needs_dx, needs_dweight
    )
    return padded(ctx, dx if needs_dx else None, dweight if needs_dweight else None)


rms_norm.register_autograd(_backward, setup_context=_setup_context)
