"""linear_cross_entropy for a weight whose rows, the classes, are divided over the ranks of a process group.

    x (N, H), target (N) and class_weight (V) or None, the same on all ranks; weight (V_r, H) and bias (V_r) or None,
    the rows of this rank
    -> loss (), the same on all ranks; dx (N, H), whose sum over the ranks is the gradient of x; dweight (V_r, H) and
       dbias (V_r) of this rank; token_scales (N) and class_scales (V_r), as in linear_cross_entropy

V_r are the classes of rank r, see vocabulary_shard.py. A rank never has more than a chunk of its own columns of the
logits. Three matmuls for a chunk, as without shards, and one all_gather of three numbers for each row and rank:

    logits      -> row_max, log_sum of the columns of this rank, and the logit of the label, if it is among them
    all_gather  -> row_max, log_sum and the logit of the label, of all classes
    gradient of the logits in place of the logits, and its two matmuls

The gradients need the statistics of all classes before the logits of a chunk can be freed. So the exchange is once a
chunk: once a batch would need the logits of all chunks again, which is a fourth matmul. It takes 12 bytes for each row
and rank, and the latency of one collective. The number of chunks follows from the largest shard, ceil(V / R) classes,
and from what is equal on all ranks. Every rank therefore runs the same collectives, also a rank without classes.

The caller adds dx over the ranks, once, in the dtype of x. That is the reduction of the replaced code: the gradient of
a column-parallel linear layer's input.

Supported: the reductions "mean" and "sum", ignored targets, bias, class weights, logit_scale, softcap. A class weight
multiplies the loss of a token and its gradient, on every rank alike. Not supported: label smoothing, z-loss.

Rows, x, target, class weights, dtypes and options must be equal on all ranks: a rank with another number of rows would
wait for a collective that the others do not run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import row_blocks
from .linear_cross_entropy import (
    Head,
    device_logits,
    empty_gradients,
    reduced_and_gradients,
    scaled_backward,
)
from .precision import accumulation_dtype
from .registration import opaque_op, padded
from .softmax_loss import SoftmaxLoss
from .vocabulary_shard import IGNORED, VocabularyShard


@opaque_op
def sharded_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    logit_scale: float,
    softcap: float | None,
    group_name: str,
    classes: int,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, dx, dweight, dbias, token_scales, class_scales)."""
    shard = VocabularyShard.of(group_name, classes)
    shard.check(weight)
    loss = SoftmaxLoss(class_weight, ignore_index, 0.0, logit_scale, softcap, 0.0)
    needs = needs_dx, needs_dweight, needs_dbias
    return reduced_and_gradients(
        Head(weight, bias, loss, shard), x, target, reduction, needs, memory, _on_rows
    )


def _on_rows(
    head: Head,
    x: Tensor,
    target: Tensor,
    upstream: Tensor,
    scale: float,
    needs_gradient: bool,
    dbias_sum: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the logits of this rank, overwritten by their gradient if needed, and the losses. Add to dbias_sum."""
    weight, bias, loss, shard = head
    assert shard is not None
    has_kernel = head.has_kernel(x)
    labels = shard.labels(target, loss.ignore_index)
    of_token = None if loss.class_weight is None else loss.token_weight(target, upstream.dtype)
    loss = replace(loss, class_weight=None, ignore_index=IGNORED, is_shard=True)
    logits = device_logits(x, weight, bias) if has_kernel else F.linear(x, weight, bias)
    statistics = statistics_by_kernel if has_kernel and shard.own else statistics_of
    row_max, log_sum, z_label = shard.combined(*statistics(loss, logits, labels))
    losses = (log_sum - (z_label - row_max)).masked_fill(labels == IGNORED, 0)
    if of_token is not None:
        losses, upstream = losses * of_token, upstream * of_token
    if needs_gradient and shard.own:
        gradient_ = _kernel_gradient_ if has_kernel else _gradient_
        dbias = gradient_(loss, logits, labels, upstream, (row_max, log_sum), dbias_sum)
        dbias_sum.add_(dbias, alpha=scale)
    return logits, losses


def statistics_of(loss: SoftmaxLoss, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row_max, log_sum and z of the label (C).

    row_max and log_sum are -inf in a row without a finite logit, which then has no part in a sum. z is 0 for a label
    that is no column.
    """
    row_max, log_sum, z_label = (
        logits.new_full(labels.shape, value, dtype=accumulation_dtype(logits.dtype))
        for value in (-torch.inf, -torch.inf, 0.0)
    )
    for rows in row_blocks(*logits.shape) if logits.shape[1] else ():
        z = loss.scores(logits[rows])
        z_label[rows] = z.gather(-1, loss.index(labels[rows])).squeeze(-1).masked_fill(labels[rows] < 0, 0)
        row_max[rows] = high = z.amax(-1)
        origin = high.masked_fill(high == -torch.inf, 0).unsqueeze(-1)
        log_sum[rows] = (z - origin).exp_().sum(-1).log_()
    return row_max, log_sum, z_label


def statistics_by_kernel(loss: SoftmaxLoss, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same as the reference, except for ignored rows, whose statistics are 0."""
    from ..kernels import softmax_loss as kernels

    return kernels.statistics_of_shard(logits, labels, loss.terms)


def _gradient_(
    loss: SoftmaxLoss,
    logits: Tensor,
    labels: Tensor,
    upstream: Tensor,
    statistics: tuple[Tensor, Tensor],
    dbias_sum: Tensor,
) -> Tensor:
    """Write the gradient over the logits, from row_max and log_sum (C) of all classes; return its sum over the rows.

    The sum is like dbias_sum, which is empty if it is not needed.
    """
    row_max, log_sum = statistics
    dbias = torch.zeros_like(dbias_sum)
    for rows in row_blocks(*logits.shape):
        z = loss.scores(logits[rows])
        logp = (z - row_max[rows].unsqueeze(-1)).sub_(log_sum[rows].unsqueeze(-1))
        logits[rows] = dlogits = loss.gradient_(logp, logits[rows], None, labels[rows], upstream[rows])
        if dbias.numel():
            dbias += dlogits.sum(0)
    return dbias


def _kernel_gradient_(
    loss: SoftmaxLoss,
    logits: Tensor,
    labels: Tensor,
    upstream: Tensor,
    statistics: tuple[Tensor, Tensor],
    dbias_sum: Tensor,
) -> Tensor:
    """Do the same as the reference."""
    from ..kernels import softmax_loss as kernels

    kernels.gradient_of_shard_(logits, labels, loss.terms, upstream, *statistics)
    return logits.sum(0, dtype=dbias_sum.dtype) if dbias_sum.numel() else dbias_sum


@sharded_linear_cross_entropy.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Any,
    class_weight: Any,
    ignore_index: int,
    reduction: str,
    logit_scale: float,
    softcap: Any,
    group_name: str,
    classes: int,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=accumulation_dtype(x.dtype))
    dx, dweight, dbias, *scales = empty_gradients(x, weight, (needs_dx, needs_dweight, needs_dbias))
    return loss, dx, dweight, dbias, scales[0], scales[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *_, dx, dweight, dbias, _memory = inputs
    _, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients)
    ctx.made, ctx.dtype = (dx, dweight, dbias), x.dtype
    ctx.save_for_backward(*gradients)


def _backward(ctx: Any, dloss: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    return padded(ctx) if dloss is None else scaled_backward("linear_cross_entropy", ctx, dloss)


sharded_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
