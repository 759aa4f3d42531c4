"""The last linear layer and its cross-entropy, without the logits.

    logits = x @ weight^T + bias            rounded to the dtype of x, as F.linear rounds them
    loss = reduce(losses of softmax_loss.py)       "none": each token's; "sum"; "mean": sum(loss) / sum(w[t])

    x (N, H), weight (V, H), target (N), bias (V) or None, class_weight (V) or None
    -> loss () or (N), dx (N, H), dweight (V, H), dbias (V); a gradient that is not needed is empty

Tokens go through in chunks: logits of a chunk, their loss, the gradient of that in place, and two products with it,
the chunk's rows of dx and its share of dweight. No more than a chunk of logits ever exists. For "mean" and "sum" the
gradients are therefore made in forward, as for an incoming gradient of 1, and saved; backward only scales them. For
"none" every token has an incoming gradient of its own, so backward computes the logits again.

A chunk has `memory` bytes of logits, by default CHUNK_BYTES on a CPU and DEVICE_CHUNK_BYTES elsewhere, and LEAST_ROWS
at the least; by default on a CPU, where dweight is made, ROWS_A_BYTE for each byte of an element and half as many as x
has columns.
dweight is summed over chunks in the dtype of weight; in float32 if that is a half precision and there are more than
ACCUMULATE_WIDE_ABOVE chunks. Where it takes less memory than that float32 sum would, chunks are longer instead.

Dtypes: x, weight and bias in one dtype; the loss and everything between logits and their gradient in float32 (float64
for float64). 1 / sum(w[t]) of a "mean":
- The reference on a CPU puts it into the products as their alpha: the gradient of the logits is rounded as
  p - onehot, in which the 1 is exact, and divided before the result is rounded.
- On other devices it is divided before, as eager code does, rather than wait for the number or have a pass over
  dweight for it.
- float16 has no numbers for that. Its kernel rounds HALF_SCALE * (p - onehot), the products are divided by a power of
  two that is at least N, and a pass over the results multiplies by what is left.

Source: Hsu et al., Liger Kernel, 2024 (arXiv 2410.10989), for gradients in forward. The algorithm is our own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import row_blocks, split_rows
from .dispatch import has_kernel
from .precision import accumulation_dtype
from .registration import graph_is_retained, opaque_op, second_derivative_error
from .scale import scale_into
from .softmax_loss import SoftmaxLoss, reduce

# A chunk of logits is small beside any model, and long enough for its products to run at full speed: on a CPU, and
# on a GPU, where 2048 rows of 128256 or 151936 logits are. Of 1664 rows, the products took 1.09 times as long there
# (H100, torch 2.11.0, hidden size 1024, bfloat16, 2026-11-25): too few tiles for its multiprocessors.
CHUNK_BYTES = 8 * 2**20
DEVICE_CHUNK_BYTES = 600 * 2**20
LEAST_ROWS = 128
# dweight is read and written for every chunk, which a CPU's memory makes slow. With 128, 256 and 512 rows of logits in
# float32, a loss with its gradients took 1.24, 1.09, 1.10 of Inductor's time at 2048 x 512 x 32000; 1.23, 1.06, 1.09 at
# 2048 x 256 x 32000; 1.24, 1.10, 1.04 at 2048 x 1024 x 50257; in bfloat16 1.14, 1.10, 1.03 at the first (two cores,
# torch 2.13.0, 2026-11-26: bench/results/loss_chunks_cpu.csv). Half of x's columns in rows are half of dweight.
ROWS_A_BYTE = 64
ROW_TILE = 128  # rows that a GPU's matrix product has in one tile
PITCH = 64  # elements that a row of logits is padded to a multiple of, so that all rows are aligned
ACCUMULATE_WIDE_ABOVE = 16
HALF_SCALE = 16.0  # brings p of 1 / 2^18 to the normal numbers of float16, and leaves room for class weights


def _chunks(x: Tensor, weight: Tensor, needs_dweight: bool, memory: int) -> list[slice]:
    rows = _chunk_rows(x, weight, needs_dweight, memory)
    if x.device.type == "cpu":
        return split_rows(x.shape[0], rows)
    tiles = split_rows(-(-x.shape[0] // ROW_TILE), -(-rows // ROW_TILE))
    return [slice(tile.start * ROW_TILE, min(tile.stop * ROW_TILE, x.shape[0])) for tile in tiles]


def _chunk_rows(x: Tensor, weight: Tensor, needs_dweight: bool, memory: int = 0) -> int:
    budget = memory or (CHUNK_BYTES if x.device.type == "cpu" else DEVICE_CHUNK_BYTES)
    rows = max(budget // (x.element_size() * weight.shape[0]), LEAST_ROWS)
    if x.device.type != "cpu":
        rows -= rows % ROW_TILE
    elif needs_dweight and not memory:
        rows = max(rows, ROWS_A_BYTE * x.element_size(), x.shape[1] // 2)
    # Chunks so long that dweight needs no float32 sum, where they are smaller than that sum would be.
    few = -(-x.shape[0] // ACCUMULATE_WIDE_ABOVE)
    return max(rows, few) if needs_dweight and x.element_size() == 2 and few <= 2 * x.shape[1] else rows


def _made_for(dtype: torch.dtype, reduction: str) -> float:
    """The incoming gradient that forward makes gradients for. 1 / count takes them below the normal numbers of
    float16, from where no GradScaler, which multiplies the incoming gradient, would bring them back."""
    return 256.0 if dtype == torch.float16 and reduction == "mean" else 1.0


def _empty_gradients(
    x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    needs_dx, needs_dweight, needs_dbias = needs
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
        weight.new_empty(weight.shape[:1] if needs_dbias else (0,)),
    )


def losses_and_gradients(
    head: SoftmaxLoss,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor,
    scale: float,
    needs: tuple[bool, bool, bool],
    memory: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tokens' losses, and scale times the gradients of (losses * upstream).sum()."""
    needs_dx, needs_dweight, _ = needs
    wide = accumulation_dtype(x.dtype)
    chunks = _chunks(x, weight, needs_dweight, memory)
    on_chunk = _kernel_on_chunk if has_kernel(x, weight, bias, head.class_weight) else _reference_on_chunk
    losses = x.new_empty(x.shape[:1], dtype=wide)
    dx, dweight, dbias = _empty_gradients(x, weight, needs)
    is_wide = len(chunks) > ACCUMULATE_WIDE_ABOVE and weight.dtype != wide
    dweight_sum = torch.empty_like(dweight, dtype=wide) if is_wide else dweight
    # Of many short blocks on a CPU, whose sums would lose more than eager code's one sum does.
    dbias_sum = torch.zeros_like(dbias, dtype=torch.float64 if x.device.type == "cpu" else wide)
    for i, chunk in enumerate(chunks):
        logits, losses[chunk] = on_chunk(
            head, x[chunk], weight, bias, target[chunk], upstream[chunk], scale, any(needs), dbias_sum
        )
        if needs_dx:  # logits have become their gradient
            torch.addmm(dx[chunk], logits, weight, beta=0, alpha=scale, out=dx[chunk])
        if needs_dweight:
            _add_product(dweight_sum, logits.t(), x[chunk], scale, beta=min(i, 1))
        del logits  # before the next chunk's
    if not chunks:
        dweight_sum.zero_()
    return losses, dx, dweight.copy_(dweight_sum) if is_wide else dweight, dbias.copy_(dbias_sum)


def _reference_on_chunk(
    head: SoftmaxLoss,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor,
    scale: float,
    needs_gradient: bool,
    dbias_sum: Tensor,
) -> tuple[Tensor, Tensor]:
    """The logits, which have become their gradient where it is needed, and the losses. Adds to dbias_sum, if any."""
    logits = F.linear(x, weight, bias)
    losses = upstream.new_empty(x.shape[:1])
    blocks = row_blocks(*logits.shape)
    # One buffer for all blocks: to get and return as much memory for each takes as long as to compute in it.
    buffer = losses.new_empty((max((len(losses[rows]) for rows in blocks), default=0), weight.shape[0]))
    for rows in blocks:
        z = head.scores(logits[rows])
        logp = torch.log_softmax(z, -1, out=buffer[: len(z)])
        lse = head.lse(z, logp)
        losses[rows] = head.losses(logp, lse, target[rows])
        if needs_gradient:
            dlogits = head.gradient_(logp, logits[rows], lse, target[rows], upstream[rows])
            logits[rows] = dlogits
            if dbias_sum.numel():
                dbias_sum.add_(dlogits.sum(0), alpha=scale)
    return logits, losses


def _kernel_on_chunk(
    head: SoftmaxLoss,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor,
    scale: float,
    needs_gradient: bool,
    dbias_sum: Tensor,
) -> tuple[Tensor, Tensor]:
    """As the reference. All chunks' logits take the same memory: each is freed before the next is made."""
    from ..kernels import softmax_loss as kernels

    classes = weight.shape[0]
    logits = x.new_empty(x.shape[0], -(-classes // PITCH) * PITCH)[:, :classes]
    if bias is None:
        torch.mm(x, weight.t(), out=logits)
    else:
        torch.addmm(bias, x, weight.t(), out=logits)
    losses = kernels.losses(logits, target, head.terms, upstream if needs_gradient else None)
    if dbias_sum.numel():
        dbias_sum.add_(logits.sum(0, dtype=dbias_sum.dtype), alpha=scale)
    return logits, losses


def _add_product(total: Tensor, a: Tensor, b: Tensor, scale: float, beta: int) -> None:
    """total = beta * total + scale * a @ b, where total may be wider than the product."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta, alpha=scale)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=scale, out=total)
    else:  # some rows at a time, for the product in the dtype of a is large
        for rows in split_rows(total.shape[0], max(CHUNK_BYTES // (a.element_size() * total.shape[1]), 1)):
            product = torch.addmm(a.new_zeros(()), a[rows], b, beta=0, alpha=scale)
            total[rows] = total[rows] + product if beta else product.to(total.dtype)


@opaque_op
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    logit_scale: float,
    softcap: float | None,
    z_loss: float,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = SoftmaxLoss(class_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss)
    head.check(target, weight.shape[0])
    token_weight = head.token_weight(target, accumulation_dtype(x.dtype))
    upstream, scale, rest = token_weight.new_ones(()), _made_for(x.dtype, reduction), None
    if reduction == "mean":
        total, counts = token_weight.sum(), head.counted(target).any()
        # Nothing to divide by: F.cross_entropy has gradients of 0 if all tokens are ignored, else NaN.
        if x.device.type == "cpu" and not has_kernel(x, weight, bias, class_weight):
            scale *= 1 / total.item() if total else float("nan") if counts else 0.0
        elif x.dtype == torch.float16:
            power = 2.0 ** x.shape[0].bit_length()
            upstream, scale = upstream * HALF_SCALE, scale / HALF_SCALE / power
            rest = torch.where(counts, power / total, 0.0)
        else:  # ignored tokens have a gradient of 0 whatever this is
            upstream = upstream / total
    losses, *gradients = losses_and_gradients(
        head,
        x,
        weight,
        bias,
        target,
        upstream.expand(x.shape[:1]),
        scale,
        (needs_dx, needs_dweight, needs_dbias),
        memory,
    )
    if rest is not None:
        gradients = [scale_into(gradient, rest, gradient) for gradient in gradients]
    dx, dweight, dbias = gradients
    return reduce(losses, token_weight, reduction), dx, dweight, dbias


@linear_cross_entropy.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Any,
    class_weight: Any,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    logit_scale: float,
    softcap: Any,
    z_loss: float,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=accumulation_dtype(x.dtype))
    return loss, *_empty_gradients(x, weight, (needs_dx, needs_dweight, needs_dbias))


@opaque_op
def linear_cross_entropy_backward(
    dlosses: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float | None,
    z_loss: float,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) for reduction "none", empty where not needed."""
    head = SoftmaxLoss(class_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss)
    needs = needs_dx, needs_dweight, needs_dbias
    return losses_and_gradients(head, x, weight, bias, target, dlosses, 1.0, needs, memory)[1:]


@linear_cross_entropy_backward.register_fake
def _(
    dlosses: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Any,
    class_weight: Any,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: Any,
    z_loss: float,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, weight, (needs_dx, needs_dweight, needs_dbias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight, target, bias, class_weight, ignore_index, reduction, *terms, memory = inputs
    _, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients)
    ctx.reduction = reduction
    ctx.terms, ctx.made = (ignore_index, *terms[:-3]), terms[-3:]
    ctx.memory = memory
    ctx.made_for = _made_for(x.dtype, reduction)
    if reduction == "none":
        ctx.save_for_backward(x, weight, target, bias, class_weight)
    else:
        ctx.save_for_backward(*gradients)


def _backward(ctx: Any, dloss: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 15
    needs_dx, needs_dweight, _, needs_dbias, *_ = ctx.needs_input_grad
    needs = needs_dx, needs_dweight, needs_dbias
    if ctx.reduction == "none":
        gradients = torch.ops.liger_compile.linear_cross_entropy_backward.default(
            dloss, *ctx.saved_tensors, *ctx.terms, *needs, ctx.memory
        )
    else:
        gradients = _scaled(dloss / ctx.made_for, ctx.saved_tensors, ctx.made, needs)
    dx, dweight, dbias = (grad if needed else None for grad, needed in zip(gradients, needs, strict=True))
    return dx, dweight, None, dbias, *(None,) * 11


def _scaled(
    dloss: Tensor, gradients: tuple[Tensor, ...], made: list[bool], needs: tuple[bool, ...]
) -> list[Tensor]:
    """The gradients made in forward, times dloss: in float32, for a half precision would round dloss."""
    if torch.is_grad_enabled():  # create_graph=True: these gradients know nothing of x and weight any more
        raise second_derivative_error("linear_cross_entropy")
    for name, was_made, needed in zip(("dx", "dweight", "dbias"), made, needs, strict=True):
        if needed and not was_made:
            raise RuntimeError(
                f"linear_cross_entropy: expected needs_{name}=True for an input that requires grad, got False; "
                "call liger_compile.functional.linear_cross_entropy, which sets it"
            )
    if type(dloss) is not Tensor:  # traced: Inductor makes one kernel of it and what follows, on a CPU
        if gradients[0].is_cuda:  # gradients.py has it done in place, where nothing is read for a factor of 1
            scale = torch.ops.liger_compile.scale.default
            return [
                scale(each, dloss) if needed else each for each, needed in zip(gradients, needs, strict=True)
            ]
        return [(gradient.to(dloss.dtype) * dloss).to(gradient.dtype) for gradient in gradients]
    # In place if this was the last backward: dweight is too large to have it twice for no reason.
    keeps = graph_is_retained()
    return [scale_into(each, dloss, torch.empty_like(each) if keeps else each) for each in gradients]


linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
