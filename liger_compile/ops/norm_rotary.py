"""RMSNorm over each head of q and of k, then rotary position embedding: ops/rms_norm.py and ops/rotary.py in one pass.

    n  = rms_norm(x, weight)       over the channels of a head, rounded as `casting` specifies
    x' = rotary(n, cos, sin)       of all channels, layout "half"

    q (..., D), k (..., D), q_weight and k_weight (D) or None, cos and sin (..., D) -> q', k'

Dtypes: as for the two ops in sequence. n is rounded to x.dtype; under "llama" with a weight, to the dtype that x and
weight promote to. x' is rounded once, to the dtype that n and cos promote to. Saved for backward: q and k, which are
the outputs of the projections, the weights and the tables. Backward recomputes the statistics, because it reads the
whole head anyway.

Backward applies the transposed rotation, as in rotary, and then the gradient of rms_norm, all in float32 (float64). It
rounds once, at the end. cos and sin get no gradient. On a GPU, results have the same order of dimensions in memory as
x.

Sources: Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters, 2023 (arXiv 2302.05442), for the norm of
q and k; the sources of the two ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .dispatch import has_kernel
from .precision import accumulation_dtype
from .registration import backward_op, padded, traceable_op
from .rms_norm import input_gradient, normalize, weight_gradient
from .rotary import heads_axis_of_kernel, rotate


def normed_dtype(x: Tensor, weight: Tensor | None, casting: str) -> torch.dtype:
    return x.dtype if weight is None or casting != "llama" else torch.promote_types(x.dtype, weight.dtype)


def normalize_and_rotate(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, offset: float, casting: str
) -> Tensor:
    """Return the normalized and rotated tensor, by the reference for one tensor."""
    normed, _ = normalize(x, weight, eps, offset, casting)
    dtype = torch.promote_types(normed.dtype, cos.dtype)
    return rotate(normed, cos, sin, "half", half_tables=False, dtype=dtype, transpose=False)


def gradients(
    dy: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    tables: tuple[Tensor, Tensor],
    numbers: tuple[float, float],
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight) for one tensor, by the reference; dx is empty and dweight is zero where not needed.

    Args:
        tables: cos and sin.
        numbers: eps and offset.
        needs: whether dx is needed, and whether dweight is.
    """
    (cos, sin), (eps, offset), (needs_dx, needs_dweight) = tables, numbers, needs
    dx, dweight = x.new_empty(0), x.new_zeros(x.shape[-1])
    if dy is None:
        return dx, dweight
    wide = accumulation_dtype(torch.promote_types(dy.dtype, x.dtype))
    dnormed = rotate(dy, cos, sin, "half", half_tables=False, dtype=wide, transpose=True)
    rstd = torch.rsqrt(x.to(wide).square().mean(-1) + eps)
    if needs_dx:
        dx = input_gradient(dnormed, x, weight, rstd, offset).to(x.dtype)
    if needs_dweight and weight is not None:
        dweight = weight_gradient(dnormed, x, weight, rstd)
    return dx, dweight


def heads_axis_if_by_kernel(
    tensors: tuple[Tensor, ...], weights: tuple[Tensor | None, ...], cos: Tensor, sin: Tensor, numbers: tuple
) -> int | None:
    """Return the axis of the heads among four axes, as in rotary, or None if the kernels do not accept the inputs.

    The kernels use one grid over the tokens of q and of k. They are compiled for the numbers, which may not be
    symbolic.
    """
    heads_axis = heads_axis_of_kernel(tensors, cos, sin, ())
    if heads_axis is None or not has_kernel(*weights):
        return None
    if not all(isinstance(number, float) for number in numbers):
        return None
    first, *others = ((1,) * (4 - x.dim()) + tuple(x.shape) for x in tensors)
    if not all(
        statically_known_true(first[axis] == sizes[axis]) for sizes in others for axis in (0, 3 - heads_axis)
    ):
        return None
    return heads_axis


@traceable_op
def norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    casting: str,
) -> tuple[Tensor, Tensor]:
    """Return (q', k')."""
    heads_axis = heads_axis_if_by_kernel((q, k), (q_weight, k_weight), cos, sin, (eps, offset))
    if heads_axis is None:
        q = normalize_and_rotate(q, q_weight, cos, sin, eps, offset, casting)
        k = normalize_and_rotate(k, k_weight, cos, sin, eps, offset, casting)
        return q, k
    from ..kernels import norm_rotary as kernels

    dtypes = [normed_dtype(x, weight, casting) for x, weight in ((q, q_weight), (k, k_weight))]
    return kernels.forward(q, k, q_weight, k_weight, cos, sin, eps, offset, casting, dtypes, heads_axis)


def dweights_dtype(q_weight: Tensor | None, k_weight: Tensor | None, needed: bool) -> torch.dtype | None:
    """Return the dtype of the gradients of both weights, or None if there are no such gradients."""
    weights = [weight for weight in (q_weight, k_weight) if weight is not None]
    return torch.promote_types(weights[0].dtype, weights[-1].dtype) if needed and weights else None


@backward_op
def norm_rotary_backward(
    dq: Tensor | None,
    dk: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, of k and of the weights, from the gradients of q' and k'.

    The first two are empty where not needed, and where the incoming gradient is None. The third is (2, D), for q_weight
    and k_weight, in the dtype that the two promote to. Its rows are zero where the incoming gradient is None; the whole
    tensor is empty if it is not needed.
    """
    dtype = dweights_dtype(q_weight, k_weight, needs_dweights)
    incoming = tuple(dy for dy in (dq, dk) if dy is not None)
    heads_axis = heads_axis_if_by_kernel((q, k, *incoming), (q_weight, k_weight), cos, sin, (eps, offset))
    if heads_axis is not None:
        from ..kernels import norm_rotary as kernels

        return kernels.backward(
            dq, dk, q, k, q_weight, k_weight, cos, sin, eps, offset, needs_dq, needs_dk, dtype, heads_axis
        )
    tables, numbers, needs_dweight = (cos, sin), (eps, offset), dtype is not None
    grad_q, dq_weight = gradients(dq, q, q_weight, tables, numbers, (needs_dq, needs_dweight))
    grad_k, dk_weight = gradients(dk, k, k_weight, tables, numbers, (needs_dk, needs_dweight))
    if dtype is None:
        return grad_q, grad_k, q.new_empty(0)
    return grad_q, grad_k, torch.stack((dq_weight.to(dtype), dk_weight.to(dtype)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, eps, offset, _ = inputs
    _, _, _, _, needs_dcos, needs_dsin, *_ = ctx.needs_input_grad
    if needs_dcos or needs_dsin:
        raise ValueError(
            "norm_rotary: expected cos and sin that need no gradient, got tables that require one; "
            "detach them, or normalize and rotate in plain PyTorch"
        )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.numbers = eps, offset


def _backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_dq, needs_dk, needs_dq_weight, needs_dk_weight, *_ = ctx.needs_input_grad
    dq = dq if needs_dq or needs_dq_weight else None
    dk = dk if needs_dk or needs_dk_weight else None
    if dq is None and dk is None:
        return padded(ctx)
    needs_dq, needs_dq_weight = needs_dq and dq is not None, needs_dq_weight and dq is not None
    needs_dk, needs_dk_weight = needs_dk and dk is not None, needs_dk_weight and dk is not None
    _, _, q_weight, k_weight, _, _ = ctx.saved_tensors
    grad_q, grad_k, dweights = norm_rotary_backward(
        dq, dk, *ctx.saved_tensors, *ctx.numbers, needs_dq, needs_dk, needs_dq_weight or needs_dk_weight
    )
    return padded(
        ctx,
        grad_q if needs_dq else None,
        grad_k if needs_dk else None,
        dweights[0].to(q_weight.dtype) if needs_dq_weight else None,
        dweights[1].to(k_weight.dtype) if needs_dk_weight else None,
    )


norm_rotary.register_autograd(_backward, setup_context=_setup_context)
