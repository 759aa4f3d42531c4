"""Rotary position embedding of the first R channels of a head; the other channels pass through.

A rotation takes pairs of channels (a, b), and one cosine and one sine for each channel of the pair:

    a' = a * cos_a - b * sin_a
    b' = b * cos_b + a * sin_b

    layout                   a pair is read from            and written to       as in
    "half"                   x[i], x[R/2 + i]               the same places      Llama, GPT-NeoX
    "interleaved"            x[2i], x[2i + 1]               the same places      GPT-J, Cohere
    "interleaved_to_half"    x[2i], x[2i + 1]               y[i], y[R/2 + i]     DeepSeek-V3

    q (..., D), k (..., D) or None, cos and sin (..., R), or (..., R/2) if half_tables -> q', k'

cos and sin broadcast against q and k. Full tables have the layout of the result and may contain any numbers: their two
halves may differ. Half tables contain one cosine and one sine for each pair.

Dtypes: computed in float32 (float64 if any operand is float64) and rounded once, to out_dtype, or by default to the
dtype that x and cos promote to. Saved for backward: cos and sin. Backward is the transpose, which is a rotation by the
opposite angle if the tables describe a rotation. cos and sin get no gradient. On a GPU, results have the same order of
dimensions in memory as x, so that the output of a projection reaches attention without a copy.

Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .dispatch import DTYPES, has_kernel
from .precision import accumulation_dtype
from .registration import backward_op, padded, traceable_op

# Whether pairs are interleaved: (when read, when written).
LAYOUTS = {"half": (False, False), "interleaved": (True, True), "interleaved_to_half": (True, False)}

MAX_CHANNELS = 4096  # of a head for the kernel, which holds them in registers


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
    """Return rotated x, by the reference. `transpose` maps the gradient of the result to the gradient of x."""
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


def heads_axis_of_kernel(
    tensors: tuple[Tensor, ...], cos: Tensor, sin: Tensor, dtypes: tuple[torch.dtype, ...]
) -> int | None:
    """Return the axis of the heads among four axes, or None if the kernel does not accept the inputs.

    The heads come before the tokens (axis 1) or after them (axis 2), and all heads share the tables. Inputs with fewer
    axes are treated as if they had leading axes of size one.
    """
    if not has_kernel(*tensors, cos, sin) or not all(dtype in DTYPES for dtype in dtypes):
        return None
    channels = [x.shape[-1] for x in (*tensors, cos)]
    if not all(isinstance(count, int) and 0 < count <= MAX_CHANNELS for count in channels):
        return None
    if len(set(channels[:-1])) > 1 or any(x.dim() > 4 for x in tensors):
        return None
    sizes = (1,) * (4 - cos.dim()) + tuple(cos.shape)
    return next((axis for axis in (1, 2) if statically_known_true(sizes[axis] == 1)), None)


def rotate_each(
    tensors: tuple[Tensor | None, Tensor | None],
    dtypes: tuple[torch.dtype, torch.dtype],
    cos: Tensor,
    sin: Tensor,
    layout: str,
    half_tables: bool,
    transpose: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate each of two tensors; the result for None is empty."""
    given = tuple(x for x in tensors if x is not None)
    heads_axis = heads_axis_of_kernel(given, cos, sin, dtypes)
    if heads_axis is None:
        results = [
            None if x is None else rotate(x, cos, sin, layout, half_tables, dtype, transpose)
            for x, dtype in zip(tensors, dtypes, strict=True)
        ]
    else:
        from ..kernels import rotary as kernels

        results = kernels.rotate(
            tensors, dtypes, cos, sin, heads_axis, *LAYOUTS[layout], half_tables, transpose
        )
    first, second = (cos.new_empty(0) if result is None else result for result in results)
    return first, second


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
    """Return (q', k'); k' is empty if k is None."""
    q_dtype = out_dtype or torch.promote_types(q.dtype, cos.dtype)
    k_dtype = q_dtype if k is None else out_dtype or torch.promote_types(k.dtype, cos.dtype)
    return rotate_each((q, k), (q_dtype, k_dtype), cos, sin, layout, half_tables, transpose=False)


@backward_op
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
    """Return the gradients of q and k from those of q' and k'; each is empty where the latter is None."""
    return rotate_each((dq, dk), (q_dtype, k_dtype), cos, sin, layout, half_tables, transpose=True)


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
        return padded(ctx)
    grad_q, grad_k = rotary_backward(dq, dk, *ctx.saved_tensors, *ctx.config)
    return padded(ctx, grad_q if dq is not None else None, grad_k if dk is not None else None)


rotary.register_autograd(_backward, setup_context=_setup_context)
