"""A low-rank adapter beside a linear layer, as LoRA defines it: two matmuls and a sum.

    adapter_down   x (..., H), weight (R, H)                        -> x @ weight.T  (..., R), in the dtype of weight
    adapter_up     base (..., O), x (..., R), weight (O, R), scale  -> base + scale * (x @ weight.T), in base's dtype

Dtypes: all alike, or float32 adapters beside bfloat16 or float16 (PEFT's default). The sum is accumulated in float32
(float64 for float64) and rounded once. Saved for backward: x and the weights; no float32 copy of x, and no product.

Products of bfloat16 and float32. A float32 number is the sum of three bfloat16 numbers, so that such a product is a sum
of products of bfloat16 numbers, which GPUs accumulate in float32. The small operand, a weight or a result of
`adapter_down`, is split; the large one is read as it is, and not as a float32 copy of twice its size. The product is as
exact as a float32 matmul. If an element of an operand is infinite, the result may be NaN instead of infinite.

Source: Hu et al., LoRA, 2021 (arXiv 2106.09685). Splitting: Henry, Tang, Heinecke, 2019 (arXiv 1904.06376).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .precision import accumulation_dtype
from .registration import mutating_op, opaque_op, padded, traceable_op

_HALF = (torch.bfloat16, torch.float16)
_BITS_OF_BFLOAT16 = -0x10000  # of float32: sign, exponent, and the first seven bits of the fraction


def parts_of(x: Tensor) -> list[Tensor]:
    """Return three bfloat16 tensors whose sum is the float32 tensor x."""
    found = []
    for _ in range(2):
        # Cut off by bits, and not by a cast: Inductor would remove a cast to bfloat16 and back, and leave no rest.
        part = (x.view(torch.int32) & _BITS_OF_BFLOAT16).view(torch.float32)
        found.append(part.bfloat16())
        x = x - part
    return [*found, x.bfloat16()]


def paired_parts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return (M, 6K) and (6K, N) in bfloat16, whose product is that of float32 matrices a (M, K) and b (K, N).

    The pairs that are left out are smaller than the rounding of a float32 product.
    """
    (a1, a2, a3), (b1, b2, b3) = parts_of(a), parts_of(b)
    return torch.cat((a1, a1, a2, a1, a2, a3), 1), torch.cat((b1, b2, b1, b3, b2, b1), 0)


@opaque_op
def half_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32, for matrices of half precision; other devices than CUDA have no operator for it."""
    return a.float() @ b.float()


@half_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


def _matmul_of_halves(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, accumulated and returned in float32."""
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.ops.liger_compile.half_matmul.default(a, b)


def wide_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in the accumulation dtype, for matrices a (M, K) and b (K, N) of equal or different dtypes."""
    if a.dtype == torch.bfloat16 and b.dtype == torch.float32:
        parts = _matmul_of_halves(a, torch.cat(parts_of(b), 1))
        return parts.view(a.shape[0], 3, b.shape[1]).sum(1)
    if a.dtype == torch.float32 and b.dtype == torch.bfloat16:
        parts = _matmul_of_halves(torch.cat(parts_of(a), 0), b)
        return parts.view(3, a.shape[0], b.shape[1]).sum(0)
    if a.dtype == b.dtype and a.dtype in _HALF:
        return _matmul_of_halves(a, b)
    wide = accumulation_dtype(torch.promote_types(a.dtype, b.dtype))
    return a.to(wide) @ b.to(wide)


def _rounded_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b, rounded once to dtype."""
    if dtype == torch.bfloat16 and a.dtype == b.dtype == torch.float32:
        a, b = paired_parts(a, b)
    return a @ b if a.dtype == b.dtype == dtype else wide_matmul(a, b).to(dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@traceable_op
def adapter_down(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T in the dtype of weight."""
    result = _rounded_matmul(_rows(x), weight.t(), weight.dtype)
    return result.view(*x.shape[:-1], weight.shape[0])


@traceable_op
def adapter_down_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight; each is empty if it is not needed."""
    rows, dx, dweight = _rows(dy), dy.new_empty(0), dy.new_empty(0)
    if needs_dx:
        dx = _rounded_matmul(rows, weight, x.dtype).view(x.shape)
    if needs_dweight:
        dweight = _rounded_matmul(rows.t(), _rows(x), weight.dtype)
    return dx, dweight


@traceable_op
def adapter_up(base: Tensor, x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Return base + scale * (x @ weight.T), rounded once to the dtype of base."""
    a, b = _rows(x), weight.t()
    if base.dtype == torch.bfloat16 and a.dtype == b.dtype == torch.float32:
        a, b = paired_parts(a, b)
    return torch.ops.liger_compile.add_product.default(_rows(base), a, b, scale).view(base.shape)


@traceable_op
def adapter_up_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: float, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight; each is empty if it is not needed. The gradient of base is dy."""
    rows, dx, dweight = _rows(dy), dy.new_empty(0), dy.new_empty(0)
    if needs_dx:
        dx = (scale * wide_matmul(rows, weight)).to(x.dtype).view(x.shape)
    if needs_dweight:
        dweight = (scale * wide_matmul(rows.t(), _rows(x))).to(weight.dtype)
    return dx, dweight


def _added(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return base + scale * (a @ b), in place of a second matrix for the product where all dtypes are alike."""
    if base.is_cuda and base.dtype == a.dtype == b.dtype:
        return torch.addmm(base, a, b, alpha=scale)
    wide = accumulation_dtype(base.dtype)
    return (base + scale * (a.to(wide) @ b.to(wide))).to(base.dtype)


@opaque_op
def add_product(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return base + scale * (a @ b), rounded once to the dtype of base, for matrices (M, N), (M, K) and (K, N)."""
    return _added(base, a, b, scale)


@add_product.register_fake
def _(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return base.new_empty(base.shape)


@mutating_op("base")
def add_product_in_place(base: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Compute base = add_product(base, ...): base is read and written once, and not copied before."""
    if base.is_cuda and base.dtype == a.dtype == b.dtype:
        base.addmm_(a, b, alpha=scale)
    else:
        base.copy_(_added(base, a, b, scale))


def _setup_down(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _down_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return padded(ctx)
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    found = adapter_down_backward(dy, x, weight, *needs)
    return padded(ctx, *(grad if needed else None for grad, needed in zip(found, needs, strict=True)))


def _setup_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, weight, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _up_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return padded(ctx)
    needs_base, *needs, _ = ctx.needs_input_grad
    found = [None, None]
    if any(needs):
        made = adapter_up_backward(dy, *ctx.saved_tensors, ctx.scale, *needs)
        found = [grad if needed else None for grad, needed in zip(made, needs, strict=True)]
    return padded(ctx, dy if needs_base else None, *found)


adapter_down.register_autograd(_down_backward, setup_context=_setup_down)
adapter_up.register_autograd(_up_backward, setup_context=_setup_up)
