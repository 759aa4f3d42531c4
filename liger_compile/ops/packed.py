"""The backwards of rotary and norm_rotary with a packed output, in which another matrix is placed beside their results.

    packed (N, K) = [grad of q | grad of k | rest],   one row for each of B * T tokens, all its heads side by side

    dq, dk (B, T, heads, D), or (B, heads, T, D) if heads_axis is 1; rest (N, R) or None; the others as in the two ops

One matmul of the packed matrix with the stacked weights of three projections gives the gradient of their shared input.
`backward_passes/` inserts these ops. Dtypes and sources are those of the two ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import has_kernel
from .norm_rotary import dweights_dtype, heads_axis_if_by_kernel, norm_rotary_backward
from .registration import late_op
from .rotary import LAYOUTS, heads_axis_of_kernel, rotate_each


def _tokens_first(x: Tensor, heads_axis: int) -> Tensor:
    return x.transpose(1, 2) if heads_axis == 1 else x


def _join(gradients: Sequence[Tensor], rest: Tensor | None, heads_axis: int) -> Tensor:
    rows = [_tokens_first(x, heads_axis).flatten(2).flatten(0, 1) for x in gradients]
    return torch.cat([*rows, *(() if rest is None else (rest,))], 1)


def _room(
    dq: Tensor, dk: Tensor, rest: Tensor | None, heads_axis: int, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return an empty packed matrix with `rest` copied into it, and its views with the shapes of dq and dk."""
    batch, num_tokens = _tokens_first(dq, heads_axis).shape[:2]
    shapes = [_tokens_first(x, heads_axis).shape[2:] for x in (dq, dk)]
    widths = [shape.numel() for shape in shapes]
    columns = sum(widths) + (0 if rest is None else rest.shape[1])
    packed = dq.new_empty((batch * num_tokens, columns), dtype=dtype)
    if rest is not None:
        from ..kernels import packed as kernels

        kernels.copy(rest, packed[:, sum(widths) :])
    starts = 0, widths[0]
    first, second = (
        _tokens_first(
            packed[:, start : start + width].view(batch, num_tokens, *shape),
            heads_axis,
        )
        for start, width, shape in zip(starts, widths, shapes, strict=True)
    )
    return packed, (first, second)


def _has_kernel(rest: Tensor | None) -> bool:
    return rest is None or (has_kernel(rest) and rest.stride(1) == 1)


@late_op
def rotary_backward_packed(
    dq: Tensor,
    dk: Tensor,
    rest: Tensor | None,
    heads_axis: int,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    half_tables: bool,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> Tensor:
    """Return the packed result of rotary_backward, where q, k and rest have one dtype."""
    dtypes = q_dtype, k_dtype
    if heads_axis_of_kernel((dq, dk), cos, sin, dtypes) != heads_axis or not _has_kernel(rest):
        return _join(rotate_each((dq, dk), dtypes, cos, sin, layout, half_tables, True), rest, heads_axis)
    from ..kernels import rotary as kernels

    packed, parts = _room(dq, dk, rest, heads_axis, q_dtype)
    kernels.rotate((dq, dk), dtypes, cos, sin, heads_axis, *LAYOUTS[layout], half_tables, True, parts)
    return packed


@late_op
def norm_rotary_backward_packed(
    dq: Tensor,
    dk: Tensor,
    rest: Tensor | None,
    heads_axis: int,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    needs_dq: bool,
    needs_dk: bool,
    needs_dweights: bool,
) -> tuple[Tensor, Tensor]:
    """Return (packed, dweights) of norm_rotary_backward, where q and k need gradients and have the dtype of rest."""
    inputs = dq, dk, q, k, q_weight, k_weight, cos, sin, eps, offset, needs_dq, needs_dk
    by_kernel = heads_axis_if_by_kernel((q, k, dq, dk), (q_weight, k_weight), cos, sin, (eps, offset))
    if by_kernel != heads_axis or not _has_kernel(rest):
        *gradients, dweights = norm_rotary_backward.body(*inputs, needs_dweights)
        return _join(gradients, rest, heads_axis), dweights
    from ..kernels import norm_rotary as kernels

    packed, parts = _room(dq, dk, rest, heads_axis, q.dtype)
    dtype = dweights_dtype(q_weight, k_weight, needs_dweights)
    *_, dweights = kernels.backward(*inputs, dtype, heads_axis, parts)
    return packed, dweights
