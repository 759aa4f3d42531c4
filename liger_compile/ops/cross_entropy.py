"""Cross-entropy of materialized logits that saves only the logits and two numbers per row.

    loss = reduce(losses of softmax_loss.py)       "none": one loss per token; "sum"; "mean": sum(loss) / sum(w[t])

    logits (N, V), target (N), class_weight (V) or None -> loss () or (N), row_max (N), log_sum (N)

Dtypes: logits in any floating dtype, target in int64; the loss and the statistics in float32 (float64 for float64
logits), dlogits in the dtype of the logits. Saved for backward: logits, target, row_max, log_sum. There are two
statistics because exp(z - row_max - log_sum) is exact to the last bits, while exp(z - lse) loses as many bits as |lse|
has.

Neither pass allocates an N x V temporary in float32: the references process the rows in blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .blocks import row_blocks
from .dispatch import has_kernel
from .precision import accumulation_dtype
from .registration import opaque_op, padded
from .softmax_loss import SoftmaxLoss


@opaque_op
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    logit_scale: float,
    softcap: float | None,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    head = SoftmaxLoss(class_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss)
    by_kernel = has_kernel(logits, class_weight)
    head.check(target, logits.shape[1], by_kernel)
    if by_kernel:
        from ..kernels import softmax_loss as kernels

        losses, row_max, log_sum = kernels.losses_and_statistics(logits, target, head.terms)
    else:
        losses, row_max, log_sum = _reference(head, logits, target)
    return head.reduce(losses, head.token_weight(target, losses.dtype), reduction), row_max, log_sum


def _reference(head: SoftmaxLoss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    losses, row_max, log_sum = (_row_statistic(logits) for _ in range(3))
    for rows in row_blocks(*logits.shape):
        z = head.scores(logits[rows])
        logp = torch.log_softmax(z, -1)
        row_max[rows], log_sum[rows] = head.statistics(z, logp)
        losses[rows] = head.losses(logp, head.lse(z, logp), target[rows])
    return losses, row_max, log_sum


def _row_statistic(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=accumulation_dtype(logits.dtype))


@cross_entropy.register_fake
def _(
    logits: Tensor, target: Tensor, class_weight: Any, ignore_index: int, reduction: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    losses, row_max, log_sum = (_row_statistic(logits) for _ in range(3))
    return losses if reduction == "none" else losses.new_empty(()), row_max, log_sum


@opaque_op
def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    logit_scale: float,
    softcap: float | None,
    z_loss: float,
) -> Tensor:
    head = SoftmaxLoss(class_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss)
    if reduction == "mean":
        dloss = dloss / head.token_weight(target, row_max.dtype).sum()
    upstream = dloss.expand(row_max.shape)
    if has_kernel(logits, class_weight):
        from ..kernels import softmax_loss as kernels

        return kernels.gradient(logits, target, head.terms, upstream, row_max, log_sum)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in row_blocks(*logits.shape):
        z = head.scores(logits[rows])
        logp = (z - row_max[rows].unsqueeze(-1)).sub_(log_sum[rows].unsqueeze(-1))
        lse = row_max[rows] + log_sum[rows] if head.z_loss else None
        dlogits[rows] = head.gradient_(logp, logits[rows], lse, target[rows], upstream[rows])
    return dlogits


@cross_entropy_backward.register_fake
def _(dloss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, class_weight, *config = inputs
    _, row_max, log_sum = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_max, log_sum)
    ctx.save_for_backward(logits, target, class_weight, row_max, log_sum)
    ctx.config = config


def _backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None or not ctx.needs_input_grad[0]:
        return padded(ctx)
    dlogits = torch.ops.liger_compile.cross_entropy_backward.default(dloss, *ctx.saved_tensors, *ctx.config)
    return padded(ctx, dlogits)


cross_entropy.register_autograd(_backward, setup_context=_setup_context)
