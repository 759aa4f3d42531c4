"""The last linear layer and its cross-entropy, without materialized logits.

    logits = x @ weight^T + bias            rounded to the dtype of x, as F.linear rounds them
    loss = reduce(losses of softmax_loss.py)       "none": one loss per token; "sum"; "mean": sum(loss) / sum(w[t])

    x (N, H), weight (V, H), target (N), bias (V) or None, class_weight (V) or None
    -> loss () or (N), dx (N, H), dweight (V, H), dbias (V), and the factors that backward applies to rows in addition
       to the incoming gradient: token_scales (N) for dx, class_scales (V) for dweight; unneeded outputs are empty

The op processes the tokens in chunks. For each chunk it computes the logits, their loss, the gradient of the loss in
place of the logits, and two matmuls with that gradient: the rows of dx for the chunk, and the contribution to dweight.
At most one chunk of logits exists at a time. For "mean" and "sum", forward therefore computes the gradients for an
incoming gradient of 1 and saves them; backward only scales them. For "none", every token has its own incoming gradient,
so backward recomputes the logits.

If an incoming gradient is infinite or NaN, the gradients of counted tokens are not finite. The gradients of weight and
bias are not finite either, if any token is counted. The gradients of ignored tokens are 0, as in eager code, which
multiplies earlier. Ignored tokens have token_scales of 0.

A chunk has `memory` bytes of logits. The default is CHUNK_BYTES on a CPU and DEVICE_CHUNK_BYTES elsewhere, where logits
of up to ONE_CHUNK_BYTES are one chunk. A chunk has
at least LEAST_ROWS rows. With the default memory on a CPU, if dweight is needed, a chunk also has at least ROWS_A_BYTE
rows for each byte of an element, and at least half as many rows as x has columns.
dweight is summed over chunks in the dtype of weight. If weight has a half precision and there are more than
ACCUMULATE_WIDE_ABOVE chunks, it is summed in float32. Where longer chunks take less memory than that float32 sum, the
chunks are longer instead.

Dtypes: x, weight and bias have one dtype. The loss and all values between the logits and their gradient are in float32
(float64 for float64). The factor 1 / sum(w[t]) of a "mean" is applied as follows:
- The reference on a CPU passes it as the alpha of the matmuls. The gradient of the logits is then rounded as
  p - onehot, in which the 1 is exact, and the matmul divides before it rounds its result.
- On other devices the gradient of the logits is divided, as in eager code. This avoids a wait for the number and a pass
  over dweight.
- float16 has too small a range. Until the incoming gradient of a GradScaler restores the size, small values would
  be lost and large values would be infinite. The gradient of the logits is rounded as a power of two times p - onehot,
  as large as float16 allows for the given class weights. Its matmul results are computed in float32 and stored as
  scaled rows (scaled_rows.py). token_scales and class_scales undo the scaling. This costs a pass over dweight for each
  chunk.

Source: Hsu et al., Liger Kernel, 2024 (arXiv 2410.10989), for gradients in forward. The algorithm is our own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_compile.torch_internals.autograd import graph_is_retained

from .alignment import class_parts, missing_columns, with_columns
from .blocks import row_blocks, split_rows
from .dispatch import has_kernel
from .gradient_sums import GradientSum, Plain, ScaledRows, Wide
from .precision import accumulation_dtype
from .registration import opaque_op, padded, second_derivative_error
from .scale import by_rows, scale_into
from .scaled_rows import power_of_two
from .softmax_loss import SoftmaxLoss
from .vocabulary_shard import VocabularyShard

# A chunk of logits is small relative to any model, and long enough that its matmuls run at full speed, on a CPU and on
# a GPU. 2048 rows of 128256 or 151936 logits are long enough on a GPU. With 1664 rows, the matmuls took 1.09 times as
# long there (H100, torch 2.11.0, hidden size 1024, bfloat16, 2026-11-25): too few tiles for its multiprocessors.
CHUNK_BYTES = 8 * 2**20
DEVICE_CHUNK_BYTES = 600 * 2**20
# A second chunk would save half of these bytes, and cost the CPU the launches of six matmuls, of 0.06 ms each, beside
# those of kernels (launch_nvidia_h200.csv). The CPU launches the steps of small models, such as GPT-2 with 8192 tokens.
ONE_CHUNK_BYTES = 800 * 2**20
LEAST_ROWS = 128
# dweight is read and written for every chunk, which is slow in a CPU's memory. With 128, 256 and 512 rows of logits in
# float32, a loss with its gradients took 1.24, 1.09, 1.10 of Inductor's time at 2048 x 512 x 32000; 1.23, 1.06, 1.09 at
# 2048 x 256 x 32000; 1.24, 1.10, 1.04 at 2048 x 1024 x 50257; in bfloat16 1.14, 1.10, 1.03 at the first size (two
# cores, torch 2.13.0, 2026-11-26: bench/results/loss_chunks_cpu.csv). Logits of H / 2 rows have half the size of
# dweight.
ROWS_A_BYTE = 64
ROW_TILE = 128  # rows in one tile of a GPU matmul
PITCH = 64  # a row of logits is padded to a multiple of this many elements, so that all rows are aligned
ACCUMULATE_WIDE_ABOVE = 16
LARGEST_HALF = 2.0**15  # to which gradients of logits are scaled in float16: half of its range
PRODUCT_SHARE = 8  # a chunk's memory divided by this is for matmul results in float32, if any


def chunks_of(
    x: Tensor, weight: Tensor, needs_dweight: bool, memory: int, columns: int | None = None
) -> list[slice]:
    rows = chunk_rows(x, weight, needs_dweight, memory, columns)
    tile = 1 if x.device.type == "cpu" else ROW_TILE
    return split_rows(x.shape[0], -(-rows // tile) * tile, tile)


def chunk_rows(
    x: Tensor, weight: Tensor, needs_dweight: bool, memory: int = 0, columns: int | None = None
) -> int:
    """Return the rows of a chunk. `columns`: those of its logits, None for the rows of weight."""
    columns = weight.shape[0] if columns is None else columns
    budget = _budget(x, memory)
    if x.dtype == torch.float16:
        budget -= budget // PRODUCT_SHARE
    elif not memory and x.device.type != "cpu" and len(x) * columns * x.element_size() <= ONE_CHUNK_BYTES:
        return max(len(x), 1)
    rows = max(budget // (x.element_size() * columns), LEAST_ROWS)
    if x.device.type != "cpu":
        rows -= rows % ROW_TILE
    elif needs_dweight and not memory:
        rows = max(rows, ROWS_A_BYTE * x.element_size(), x.shape[1] // 2)
    # Lengthen chunks until dweight needs no float32 sum, if the chunks stay smaller than that sum.
    few = -(-x.shape[0] // ACCUMULATE_WIDE_ABOVE)
    return max(rows, few) if needs_dweight and x.element_size() == 2 and few <= 2 * x.shape[1] else rows


def _budget(x: Tensor, memory: int) -> int:
    return memory or (CHUNK_BYTES if x.device.type == "cpu" else DEVICE_CHUNK_BYTES)


class Gradients(NamedTuple):
    """The gradients that forward computes, and the factors that their rows need. Each is empty where not needed.

    dx (N, H) and dweight (V, H) have the dtype of x, dbias (V) is in float32 or wider. float16 needs token_scales (N)
    and class_scales (V): the rows of dx and dweight are to be multiplied by them.
    """

    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    token_scales: Tensor
    class_scales: Tensor


def empty_gradients(x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> Gradients:
    needs_dx, needs_dweight, needs_dbias = needs
    wide = accumulation_dtype(x.dtype)
    has_class_scales = needs_dweight and x.dtype == torch.float16
    return Gradients(
        x.new_empty(x.shape if needs_dx else (0,)),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
        weight.new_empty(weight.shape[:1] if needs_dbias else (0,), dtype=wide),
        x.new_empty(x.shape[:1] if any(needs) else (0,), dtype=wide),
        x.new_empty(weight.shape[:1] if has_class_scales else (0,), dtype=wide),
    )


def _sums(
    x: Tensor, made: Gradients, chunks: int, scale: float, memory: int
) -> tuple[GradientSum, GradientSum]:
    """Return the accumulators of dx and dweight."""
    dx, dweight, _, token_scales, class_scales = made
    dx_sum, dweight_sum = Plain(dx, scale), Plain(dweight, scale)
    if x.dtype == torch.float16:
        share = _budget(x, memory) // PRODUCT_SHARE
        dx_sum, dweight_sum = (
            ScaledRows(dx, token_scales, share),
            ScaledRows(dweight, class_scales, share),
        )
    is_wide = chunks > ACCUMULATE_WIDE_ABOVE and x.dtype.itemsize == 2
    return dx_sum, Wide(dweight_sum, scale) if is_wide else dweight_sum


class Head(NamedTuple):
    """A linear layer to logits, weight (V, H) and bias (V) or None, and the loss of its logits.

    With a shard, weight and bias are a part of the classes, and the loss is that of all.
    """

    weight: Tensor
    bias: Tensor | None
    loss: SoftmaxLoss
    shard: VocabularyShard | None = None

    @property
    def classes(self) -> int:
        return self.weight.shape[0] if self.shard is None else self.shard.classes

    @property
    def most_columns(self) -> int:
        """The columns of the logits on the rank that has the most."""
        return self.weight.shape[0] if self.shard is None else self.shard.most

    def has_kernel(self, x: Tensor) -> bool:
        return has_kernel(x, self.weight, self.bias, self.loss.class_weight)


def _made_for(head: Head, x: Tensor, divisor: Tensor, counted: Tensor) -> tuple[Tensor, float, Tensor | None]:
    """Return 1 / divisor, split into three factors.

    The first multiplies the gradients of the losses, the second the matmul results. The third is None, or multiplies
    the scales and dbias.

    If the divisor is 0, F.cross_entropy has gradients of NaN, and of 0 for ignored tokens.
    """
    if x.dtype == torch.float16:
        largest_logit = _largest_logit(x, head.weight, head.bias) if head.loss.z_loss else None
        largest = head.loss.largest_gradient(divisor, head.classes, largest_logit)
        upstream = power_of_two(LARGEST_HALF / largest)
        return upstream, 1.0, torch.where(counted.any(), 1 / upstream / divisor, 0.0)
    by_kernel = x.device.type != "cpu" or head.has_kernel(x)
    if by_kernel or not divisor:
        return 1 / divisor, 1.0, None
    return torch.ones_like(divisor), 1 / divisor.item(), None


def _largest_logit(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return an upper bound of |logits| (), from the norms of the rows of x and weight."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    lengths = [torch.linalg.vector_norm(tensor, dim=1, dtype=torch.float32).amax() for tensor in (x, weight)]
    product = lengths[0] * lengths[1]
    return product if bias is None else product + bias.abs().amax()


def _undo(made: Gradients, counted: Tensor, rest: Tensor | None) -> None:
    """Change the scales, and dbias, so that backward computes the gradients by multiplying with the scales."""
    if rest is not None:
        for tensor in (made.dbias, made.token_scales, made.class_scales):
            tensor.mul_(rest)
    if made.token_scales.numel():
        made.token_scales.masked_fill_(~counted, 0)


def losses_and_gradients(
    head: Head,
    x: Tensor,
    target: Tensor,
    upstream: Tensor,
    scale: float,
    needs: tuple[bool, bool, bool],
    memory: int,
    on_rows: OnRows | None = None,
) -> tuple[Tensor, Gradients]:
    """Return the losses of the tokens, and scale times the gradients of (losses * upstream).sum().

    `on_rows` computes a chunk; None for the kernel or the reference of a head without a shard.
    """
    on_rows = on_rows or (_kernel_on_chunk if head.has_kernel(x) else _reference_on_chunk)
    losses = x.new_empty(x.shape[:1], dtype=accumulation_dtype(x.dtype))

    def on_chunk(chunk: slice, rows: Tensor, weight: Tensor, dbias_sum: Tensor) -> Tensor:
        wide = head._replace(weight=weight)
        logits, losses[chunk] = on_rows(
            wide, rows, target[chunk], upstream[chunk], scale, any(needs), dbias_sum
        )
        return logits

    return losses, gradients_by_chunk(x, head.weight, scale, needs, memory, on_chunk, head.most_columns)


# Called with a head, the rows of x of a chunk, their target and upstream, the scale, whether a gradient is needed, and
# the sum of dbias, to which it adds. Returns the gradient of the logits, or anything, and the losses.
OnRows = Callable[[Head, Tensor, Tensor, Tensor, float, bool, Tensor], tuple[Tensor, Tensor]]
# Called with a chunk, its rows of x, weight, and the sum of dbias, to which it adds. Returns the gradient of the logits
# of the chunk, which nothing else reads; anything where no gradient is needed.
OnChunk = Callable[[slice, Tensor, Tensor, Tensor], Tensor]


def gradients_by_chunk(
    x: Tensor,
    weight: Tensor,
    scale: float,
    needs: tuple[bool, bool, bool],
    memory: int,
    on_chunk: OnChunk,
    columns: int | None = None,
) -> Gradients:
    """Call on_chunk for one chunk of rows after the other, and return scale times the sums of their gradients.

    `columns`: those of the logits that determine the length of the chunks, None for the rows of weight.
    """
    if missing := missing_columns(x):
        wide = with_columns(x, missing), with_columns(weight, missing)
        made = gradients_by_chunk(*wide, scale, needs, memory, on_chunk, columns)
        dx, dweight = (gradient[..., : x.shape[1]].contiguous() for gradient in made[:2])
        return made._replace(dx=dx, dweight=dweight)
    needs_dx, needs_dweight, _ = needs
    chunks = chunks_of(x, weight, needs_dweight, memory, columns)
    made = empty_gradients(x, weight, needs)
    made.token_scales.fill_(1)
    dx_sum, dweight_sum = _sums(x, made, len(chunks), scale, memory)
    # On a CPU, dbias_sum adds up many short blocks, which would lose more precision than the single sum of eager code.
    dbias_sum = torch.zeros_like(
        made.dbias, dtype=torch.float64 if x.device.type == "cpu" else made.dbias.dtype
    )
    for i, chunk in enumerate(chunks):
        dlogits = on_chunk(chunk, x[chunk], weight, dbias_sum)
        for part in class_parts(weight.shape[0], x.device):
            if needs_dx:
                dx_sum.add(chunk, dlogits[:, part], weight[part], is_first=not part.start)
            if needs_dweight:
                dweight_sum.add(part, dlogits[:, part].t(), x[chunk], is_first=i == 0)
        del dlogits  # before the logits of the next chunk are allocated
    if chunks and needs_dweight:
        dweight_sum.finish()
    elif not chunks:
        made.dweight.zero_()
        made.class_scales.fill_(1)
    made.dbias.copy_(dbias_sum)
    return made


def unscaled(made: Gradients, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias), multiplied by the scales that float16 needs."""
    if dtype == torch.float16:
        for gradient, scales in ((made.dx, made.token_scales), (made.dweight, made.class_scales)):
            scale_into(gradient, scales, gradient)
    return made.dx, made.dweight, made.dbias.to(dtype)


def _reference_on_chunk(
    head: Head,
    x: Tensor,
    target: Tensor,
    upstream: Tensor,
    scale: float,
    needs_gradient: bool,
    dbias_sum: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the logits, overwritten by their gradient if needed, and the losses. Add to dbias_sum, if any."""
    weight, bias, loss, _ = head
    logits = F.linear(x, weight, bias)
    losses = upstream.new_empty(x.shape[:1])
    blocks = row_blocks(*logits.shape)
    # One buffer for all blocks: allocating and freeing memory for each block takes as long as computing in it.
    buffer = losses.new_empty((max((len(losses[rows]) for rows in blocks), default=0), weight.shape[0]))
    for rows in blocks:
        z = loss.scores(logits[rows])
        logp = torch.log_softmax(z, -1, out=buffer[: len(z)])
        lse = loss.lse(z, logp)
        losses[rows] = loss.losses(logp, lse, target[rows])
        if needs_gradient:
            dlogits = loss.gradient_(logp, logits[rows], lse, target[rows], upstream[rows])
            logits[rows] = dlogits
            if dbias_sum.numel():
                dbias_sum.add_(dlogits.sum(0), alpha=scale)
    return logits, losses


def _kernel_on_chunk(
    head: Head,
    x: Tensor,
    target: Tensor,
    upstream: Tensor,
    scale: float,
    needs_gradient: bool,
    dbias_sum: Tensor,
) -> tuple[Tensor, Tensor]:
    """Do the same as the reference.

    The logits of all chunks use the same memory, because each is freed before the next is allocated.
    """
    from ..kernels import softmax_loss as kernels

    weight, bias, loss, _ = head
    logits = device_logits(x, weight, bias)
    losses = kernels.losses(logits, target, loss.terms, upstream if needs_gradient else None)
    if dbias_sum.numel():
        dbias_sum.add_(logits.sum(0, dtype=dbias_sum.dtype), alpha=scale)
    return logits, losses


def device_logits(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return F.linear(x, weight, bias) in a buffer with aligned rows, by matmuls that are fast for any vocabulary.

    `out`: the buffer, with a multiple of PITCH columns; None for a new one.
    """
    classes = weight.shape[0]
    if out is None:
        out = x.new_empty(x.shape[0], -(-classes // PITCH) * PITCH)
    logits = out[:, :classes]
    for part in class_parts(classes, x.device):
        if bias is None:
            torch.mm(x, weight[part].t(), out=logits[:, part])
        else:
            torch.addmm(bias[part], x, weight[part].t(), out=logits[:, part])
    return logits


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
    labeled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, dx, dweight, dbias, token_scales, class_scales).

    Args:
        labeled: int64 () on the CPU: only so many first rows may have a label, so no logits of the others are computed.
    """
    num_rows, first = x.shape[0], slice(None) if labeled is None else slice(int(labeled))
    x, target = x[first], target[first]
    loss = SoftmaxLoss(class_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss)
    needs = needs_dx, needs_dweight, needs_dbias
    made = reduced_and_gradients(Head(weight, bias, loss), x, target, reduction, needs, memory)
    return made if len(x) == num_rows else _of_all_rows(made, num_rows, reduction, needs)


def reduced_and_gradients(
    head: Head,
    x: Tensor,
    target: Tensor,
    reduction: str,
    needs: tuple[bool, bool, bool],
    memory: int,
    on_rows: OnRows | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the results of the op; `on_rows` as in losses_and_gradients."""
    loss = head.loss
    loss.check(target, head.classes, head.has_kernel(x))
    token_weight = loss.token_weight(target, accumulation_dtype(x.dtype))
    counted = loss.counted(target)
    divisor = token_weight.sum() if reduction == "mean" else token_weight.new_ones(())
    upstream, scale, rest = _made_for(head, x, divisor, counted)
    losses, made = losses_and_gradients(
        head, x, target, upstream.expand(x.shape[:1]), scale, needs, memory, on_rows
    )
    _undo(made, counted, rest)
    dx, dweight, dbias, token_scales, class_scales = made
    return loss.reduce(losses, token_weight, reduction), dx, dweight, dbias, token_scales, class_scales


def _of_all_rows(
    made: tuple[Tensor, ...], num_rows: int, reduction: str, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the results of the op for its first rows as those of all rows, the others of which have no label."""
    loss, dx, dweight, dbias, token_scales, class_scales = made
    loss = _lengthened(loss, num_rows) if reduction == "none" else loss
    dx = _lengthened(dx, num_rows) if needs[0] else dx
    token_scales = _lengthened(token_scales, num_rows) if any(needs) else token_scales
    return loss, dx, dweight, dbias, token_scales, class_scales


def _lengthened(of_rows: Tensor, num_rows: int) -> Tensor:
    """Return a tensor with rows of 0 at its end."""
    made = of_rows.new_zeros((num_rows, *of_rows.shape[1:]))
    made[: len(of_rows)] = of_rows
    return made


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
    labeled: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=accumulation_dtype(x.dtype))
    dx, dweight, dbias, *scales = empty_gradients(x, weight, (needs_dx, needs_dweight, needs_dbias))
    return loss, dx, dweight, dbias, scales[0], scales[1]


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
    """Return (dx, dweight, dbias) for reduction "none", each empty where not needed."""
    loss = SoftmaxLoss(class_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss)
    needs = needs_dx, needs_dweight, needs_dbias
    _, made = losses_and_gradients(Head(weight, bias, loss), x, target, dlosses, 1.0, needs, memory)
    return unscaled(made, x.dtype)


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
    dx, dweight, dbias, *_ = empty_gradients(x, weight, (needs_dx, needs_dweight, needs_dbias))
    return dx, dweight, dbias.to(x.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, target, bias, class_weight, ignore_index, reduction, *numbers = inputs[:-5]
    dx, dweight, dbias, memory, _ = inputs[-5:]
    _, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients)
    ctx.reduction = reduction
    ctx.terms, ctx.made = (ignore_index, *numbers), (dx, dweight, dbias)
    ctx.memory = memory
    ctx.dtype = x.dtype
    if reduction == "none":
        ctx.save_for_backward(x, weight, target, bias, class_weight)
    else:
        ctx.save_for_backward(*gradients)


def _backward(ctx: Any, dloss: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return padded(ctx)
    if ctx.reduction != "none":
        return scaled_backward("linear_cross_entropy", ctx, dloss)
    needs_dx, needs_dweight, _, needs_dbias, *_ = ctx.needs_input_grad
    needs = needs_dx, needs_dweight, needs_dbias
    gradients = torch.ops.liger_compile.linear_cross_entropy_backward.default(
        dloss, *ctx.saved_tensors, *ctx.terms, *needs, ctx.memory
    )
    return _of_inputs(ctx, gradients, needs)


def scaled_backward(op: str, ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients from forward, which ctx saves, times dloss; for an op with arguments x, weight, _, bias."""
    needs_dx, needs_dweight, _, needs_dbias, *_ = ctx.needs_input_grad
    needs = needs_dx, needs_dweight, needs_dbias
    check_made(op, ctx.made, needs)
    return _of_inputs(ctx, scaled(dloss, Gradients(*ctx.saved_tensors), ctx.dtype), needs)


def _of_inputs(
    ctx: Any, gradients: tuple[Tensor, Tensor, Tensor], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = (grad if needed else None for grad, needed in zip(gradients, needs, strict=True))
    return padded(ctx, dx, dweight, None, dbias)


def check_made(op: str, made: tuple[bool, ...], needs: tuple[bool, ...]) -> None:
    """Raise if backward needs a gradient that forward did not compute, or a second derivative."""
    if torch.is_grad_enabled():  # create_graph=True: autograd has no path from these to x and weight
        raise second_derivative_error(op)
    for name, was_made, needed in zip(("dx", "dweight", "dbias"), made, needs, strict=True):
        if needed and not was_made:
            raise RuntimeError(
                f"{op}: expected needs_{name}=True for an input that requires grad, got False; "
                f"call liger_compile.functional.{op}, which sets it"
            )


def scaled(dloss: Tensor, made: Gradients, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients from forward times dloss, in float32, because a half precision would round dloss."""
    dx_factor, dweight_factor, dbias_factor = _factors(dloss, made)
    dx, dweight = times(made.dx, dx_factor), times(made.dweight, dweight_factor)
    return dx, dweight, (made.dbias * dbias_factor).to(dtype)


def _factors(dloss: Tensor, made: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of the rows of dx, the rows of dweight, and dbias.

    The incoming gradient does not reach ignored tokens. In eager code an infinite incoming gradient makes the gradients
    of the other tokens NaN: inf - inf, in the gradient of log_softmax.
    """
    counted = made.token_scales != 0
    dloss = torch.where(dloss.isfinite(), dloss, float("nan"))
    of_any = torch.where(counted.any(), dloss, 0.0)
    has_class_scales = made.dweight.dtype == torch.float16
    return (
        torch.where(counted, made.token_scales * dloss, 0.0),
        made.class_scales * of_any if has_class_scales else of_any,
        of_any,
    )


def times(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return a gradient from forward, times a factor () or one for each row. May overwrite the gradient."""
    """Return a gradient from forward, times a factor () or one for each row; the gradient is not read afterwards."""
    if gradient.dim() < 2:  # not needed
        return gradient
    if type(factor) is Tensor:
        # In place if this is the last backward: dweight is too large for an unnecessary second copy.
        return scale_into(gradient, factor, torch.empty_like(gradient) if graph_is_retained() else gradient)
    # Traced. On a GPU, backward_passes/ turns the scaling into an in-place write, which is skipped for a factor of 1.
    # On a CPU, Inductor fuses the scaling with its users into one kernel.
    if gradient.is_cuda:
        return torch.ops.liger_compile.scale.default(gradient, factor)
    return (gradient.to(factor.dtype) * by_rows(factor)).to(gradient.dtype)


linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
