"""The last linear layer and its cross-entropy, without the logits.

    logits = x @ weight^T + bias            rounded to the dtype of x, as F.linear rounds them
    loss = reduce(losses of softmax_loss.py)       "none": each token's; "sum"; "mean": sum(loss) / sum(w[t])

    x (N, H), weight (V, H), target (N), bias (V) or None, class_weight (V) or None
    -> loss () or (N), dx (N, H), dweight (V, H), dbias (V); a gradient that is not needed is empty

Tokens go through in chunks: logits of a chunk, their loss, the gradient of that in place, and two products with it,
the chunk's rows of dx and its share of dweight. No more than a chunk of logits ever exists. For "mean" and "sum" the
gradients are therefore made in forward, as for an incoming gradient of 1, and saved; backward only scales them. For
"none" every token has an incoming gradient of its own, so backward computes the logits again.

Dtypes: x, weight and bias in one dtype; the loss and everything between logits and their gradient in float32 (float64
for float64). dweight is summed over chunks in the dtype of weight; in float32 if that is a half precision and there
are more than ACCUMULATE_WIDE_ABOVE chunks. On a CPU 1 / sum(w[t]) of a "mean" goes into the products as their alpha:
the gradient of the logits is rounded as p - onehot, in which the 1 is exact, and divided before the result is
rounded. Other devices divide it before, as eager code does, rather than wait for the number.

Source: Hsu et al., Liger Kernel, 2024 (arXiv 2410.10989), for gradients in forward. The algorithm is our own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import row_blocks, split_rows
from .precision import accumulation_dtype
from .registration import graph_is_retained, opaque_op, second_derivative_error
from .softmax_loss import SoftmaxLoss, reduce

# A chunk of logits is small beside any model, and long enough for its products to run at full speed.
CHUNK_BYTES = 8 * 2**20
LEAST_ROWS = 128
ACCUMULATE_WIDE_ABOVE = 16


def _chunk_rows(x: Tensor, weight: Tensor, needs_dweight: bool) -> int:
    rows = max(CHUNK_BYTES // (x.element_size() * weight.shape[0]), LEAST_ROWS)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference: the tokens' losses, and scale times the gradients of (losses * upstream).sum()."""
    needs_dx, needs_dweight, needs_dbias = needs
    wide = accumulation_dtype(x.dtype)
    chunks = split_rows(x.shape[0], _chunk_rows(x, weight, needs_dweight))
    losses = x.new_empty(x.shape[:1], dtype=wide)
    dx, dweight, dbias = _empty_gradients(x, weight, needs)
    sum_dtype = wide if len(chunks) > ACCUMULATE_WIDE_ABOVE else weight.dtype
    dweight_sum = torch.zeros_like(dweight, dtype=sum_dtype)
    dbias_sum = torch.zeros_like(dbias, dtype=wide)
    for chunk in chunks:
        logits = F.linear(x[chunk], weight, bias)
        for block in row_blocks(*logits.shape):
            rows = slice(chunk.start + block.start, chunk.start + block.stop)
            z = head.scores(logits[block])
            logp = torch.log_softmax(z, -1)
            row_max, log_sum = head.statistics(z, logp)
            lse = row_max + log_sum
            losses[rows] = head.losses(logp, lse, target[rows])
            if any(needs):
                dlogits = head.gradient_(logp, logits[block], lse, target[rows], upstream[rows])
                logits[block] = dlogits
                if needs_dbias:
                    dbias_sum.add_(dlogits.sum(0), alpha=scale)
        if needs_dx:  # block by block, logits have become their gradient
            torch.addmm(dx[chunk], logits, weight, beta=0, alpha=scale, out=dx[chunk])
        if needs_dweight:
            _add_product(dweight_sum, logits.t(), x[chunk], scale)
        del logits  # before the next chunk's
    return losses, dx, dweight_sum.to(weight.dtype), dbias_sum.to(weight.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """total += scale * a @ b, some rows at a time where total is wider than the product."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=scale)
        return
    for rows in split_rows(total.shape[0], max(CHUNK_BYTES // (a.element_size() * total.shape[1]), 1)):
        total[rows] += torch.addmm(a.new_zeros(()), a[rows], b, beta=0, alpha=scale)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = SoftmaxLoss(class_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss)
    head.check(target, weight.shape[0])
    token_weight = head.token_weight(target, accumulation_dtype(x.dtype))
    upstream, scale = torch.ones_like(token_weight), _made_for(x.dtype, reduction)
    if reduction == "mean" and x.device.type == "cpu":
        total = token_weight.sum().item()
        # Nothing to divide by: F.cross_entropy has gradients of 0 if all tokens are ignored, else NaN.
        scale *= 1 / total if total else float("nan") if head.counted(target).any() else 0.0
    elif reduction == "mean":
        upstream = upstream / token_weight.sum()
    losses, dx, dweight, dbias = losses_and_gradients(
        head, x, weight, bias, target, upstream, scale, (needs_dx, needs_dweight, needs_dbias)
    )
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
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = rest[-3:]
    loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=accumulation_dtype(x.dtype))
    return loss, *_empty_gradients(x, weight, needs)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) for reduction "none", empty where not needed."""
    head = SoftmaxLoss(class_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss)
    needs = needs_dx, needs_dweight, needs_dbias
    return losses_and_gradients(head, x, weight, bias, target, dlosses, 1.0, needs)[1:]


@linear_cross_entropy_backward.register_fake
def _(dlosses: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, weight, rest[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight, target, bias, class_weight, ignore_index, reduction, *terms = inputs
    _, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients)
    ctx.reduction = reduction
    ctx.terms, ctx.made = (ignore_index, *terms[:-3]), terms[-3:]
    ctx.made_for = _made_for(x.dtype, reduction)
    if reduction == "none":
        ctx.save_for_backward(x, weight, target, bias, class_weight)
    else:
        ctx.save_for_backward(*gradients)


def _backward(ctx: Any, dloss: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 14
    needs_dx, needs_dweight, _, needs_dbias, *_ = ctx.needs_input_grad
    needs = needs_dx, needs_dweight, needs_dbias
    if ctx.reduction == "none":
        gradients = torch.ops.liger_compile.linear_cross_entropy_backward.default(
            dloss, *ctx.saved_tensors, *ctx.terms, *needs
        )
    else:
        gradients = _scaled(dloss / ctx.made_for, ctx.saved_tensors, ctx.made, needs)
    dx, dweight, dbias = (grad if needed else None for grad, needed in zip(gradients, needs, strict=True))
    return dx, dweight, None, dbias, *(None,) * 10


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
    if type(dloss) is not Tensor:  # traced: Inductor makes one kernel of it, in place where it may
        return [(gradient.to(dloss.dtype) * dloss).to(gradient.dtype) for gradient in gradients]
    return [_scaled_in_chunks(gradient, dloss) for gradient in gradients]


def _scaled_in_chunks(gradient: Tensor, dloss: Tensor) -> Tensor:
    """In place if this was the last backward: dweight is too large to have it twice for no reason."""
    out = torch.empty_like(gradient) if graph_is_retained() else gradient
    for rows in row_blocks(gradient.shape[0], gradient[:1].numel()):
        out[rows] = gradient[rows].to(dloss.dtype) * dloss
    return out


linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
