"""Rotary position embedding of the first R channels of a head; the other channels pass through.

A rotation takes pairs of channels (a, b) and a cosine and a sine for each of the two:

    a' = a * cos_a - b * sin_a
    b' = b * cos_b + a * sin_b

    layout                   a pair is read from            and written to       as in
    "half"                   x[i], x[R/2 + i]               the same places      Llama, GPT-NeoX
    "interleaved"            x[2i], x[2i + 1]               the same places      GPT-J, Cohere
    "interleaved_to_half"    x[2i], x[2i + 1]               y[i], y[R/2 + i]     DeepSeek-V3

    q (..., D), k (..., D) or None, cos and sin (..., R), or (..., R/2) if half_tables -> q', k'

cos and sin broadcast against q and k. Full tables are laid out as the result is, and may be any numbers: the two
halves need not be the same. Half tables hold one cosine and one sine for each pair.

Dtypes: computed in float32 (float64 if any operand is), rounded once, to out_dtype, or else to the dtype that x and
cos promote to. Saved for backward: cos and sin. Backward is the transpose, a rotation by the opposite angle if the
tables are those of a rotation. cos and sin get no gradient.

Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .precision import accumulation_dtype
from .registration import traceable_op

# Whether pairs are interleaved: (as they are read, as they are written).
LAYOUTS = {"half": (False, False), "interleaved": (True, True), "interleaved_to_half": (True, False)}


def split_pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def join_pairs(a: Tensor, b: Tensor, interleaved: bool) -> Tensor:
    return torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, layout: str, half_tables: bool, dtype: torch.dtype, transpose: bool
) -> Tensor:
    """The reference, for one tensor. `transpose` takes the gradient of the result to that of x."""
    reads, writes = LAYOUTS[layout]
    width = 2 * cos.shape[-1] if half_tables else cos.shape[-1]
    wide = accumulation_dtype(torch.promote_types(x.dtype, cos.dtype))
    cos_a, cos_b = (cos, cos) if half_tables else split_pairs(cos, writes)
    sin_a, sin_b = (sin, sin) if half_tables else split_pairs(sin, writes)
    cos_a, cos_b, sin_a, sin_b = (table.to(wide) for table in (cos_a, cos_b, sin_a, sin_b))
    a, b = split_pairs(x[..., :width].to(wide), writes if transpose else reads)
    if transpose:
        rotated = join_pairs(a * cos_a + b * sin_b, b * cos_b - a * sin_a, reads)
    else:
        rotated = join_pairs(a * cos_a - b * sin_a, b * cos_b + a * sin_b, writes)
    rotated = rotated.to(dtype)
    if width == x.shape[-1]:
        return rotated
    return torch.cat((rotated, x[..., width:].to(dtype)), -1)


@traceable_op
def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    half_tables: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(q', k'), k' empty if k is None."""

    def rotated(x: Tensor | None) -> Tensor:
        if x is None:
            return cos.new_empty(0)
        dtype = out_dtype or torch.promote_types(x.dtype, cos.dtype)
        return rotate(x, cos, sin, layout, half_tables, dtype, transpose=False)

    return rotated(q), rotated(k)


@traceable_op
def rotary_backward(
    dq: Tensor | None,
    dk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    half_tables: bool,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k from those of q' and k', empty where those are None."""

    def rotated(dy: Tensor | None, dtype: torch.dtype) -> Tensor:
        if dy is None:
            return cos.new_empty(0)
        return rotate(dy, cos, sin, layout, half_tables, dtype, transpose=True)

    return rotated(dq, q_dtype), rotated(dk, k_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, layout, half_tables, _ = inputs
    _, _, needs_dcos, needs_dsin, *_ = ctx.needs_input_grad
    if needs_dcos or needs_dsin:
        raise ValueError(
            "rotary: expected cos and sin that need no gradient, got tables that require one; "
            "detach them, or rotate in plain PyTorch"
        )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)
    ctx.config = layout, half_tables, q.dtype, q.dtype if k is None else k.dtype


def _backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_dq, needs_dk, *_ = ctx.needs_input_grad
    dq, dk = dq if needs_dq else None, dk if needs_dk else None
    if dq is None and dk is None:
        return (None,) * 7
    grad_q, grad_k = torch.ops.liger_compile.rotary_backward.default(dq, dk, *ctx.saved_tensors, *ctx.config)
    return grad_q if dq is not None else None, grad_k if dk is not None else None, *(None,) * 5


rotary.register_autograd(_backward, setup_context=_setup_context)
