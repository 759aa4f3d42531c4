"""The loss of rows of logits and its gradient: the kernel of both cross-entropy ops.

ops/softmax_loss.py has the formulas; this file has the algorithm. A program processes a row. It reads the row once for
the maximum and the sum of exponentials, and again to write the gradient, which may overwrite the logits:

    row_max = max(z)    sum = sum(exp(z - row_max))    log_sum = log(sum)    d = softcap's derivative, or 1
    dlogits = (exp(z - row_max) * through_p - share * w - [column == target] * onehot) * d

    logits (N, V), target (N), class_weight (V) or None, upstream (N) -> losses (N), dlogits (N, V)

Dtypes: logits bfloat16, float16 or float32; all values between the logits and the rounded gradient are in float32.

Bytes: so few programs run concurrently that their rows stay in the L2 cache from the first pass to the second
(ROWS_IN_L2 per multiprocessor; longer rows are read twice). The device's memory is then read and written once: 4 bytes
per logit in half precision with the gradient, 2 without. Within a pass no thread waits for another: each thread has its
own maximum and sum, which are combined at the end of the row.

A row whose target is ignored is not read. A row whose target is no class gets NaN, and the target is not used as an
index. `assert_classes` is for callers that want such a target to stop the program, as eager code's kernel does.
"""

# A type checker does not see which kernel arguments are None at compile time, nor the launch argument num_warps.
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, num_multiprocessors

# The fastest or nearly fastest tested values, in place, at 32000, 128256 and 151936 classes (one H100, torch 2.11.0,
# triton 3.6.0, bfloat16, 2026-11-25): 1.10, 1.20 and 1.30 times a copy, against 1.27, 1.31 and 1.43 with 256 KiB, 32
# and 2.
ROWS_IN_L2 = 200 * 2**10  # of rows per multiprocessor: 27 MB on an H100, whose L2 has two halves of 25
WARPS_PER_MULTIPROCESSOR = 48
MOST_PROGRAMS, MOST_WARPS = 32, 32
VECTOR_BYTES = 16  # that a thread reads at a time
VECTORS_PER_THREAD, VECTORS_OF_LONG_ROWS = 2, 4
TARGETS = 1024  # that a program checks

# class_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss: the fields of ops.softmax_loss.SoftmaxLoss
Terms = tuple[Tensor | None, int, float, float, float | None, float]


class Config(NamedTuple):
    programs: int  # per multiprocessor
    num_warps: int
    lanes: int  # vectors that a program reads at a time: a power of two
    vector: int  # elements


def config(classes: int, itemsize: int, is_lean: bool) -> Config:
    """Return the launch configuration.

    `is_lean` means: both passes, and neither smoothing nor tanh in float32, which take registers for each element.
    """
    programs = max(1, min(MOST_PROGRAMS, ROWS_IN_L2 // (classes * itemsize)))
    num_warps = min(MOST_WARPS, 2 ** ((WARPS_PER_MULTIPROCESSOR // programs).bit_length() - 1))
    vector = VECTOR_BYTES // itemsize
    vectors = VECTORS_OF_LONG_ROWS if programs == 1 and is_lean else VECTORS_PER_THREAD
    lanes = min(32 * num_warps * vectors, triton.next_power_of_2(triton.cdiv(classes, vector)))
    return Config(programs, num_warps, lanes, vector)


@triton.jit
def exp(x, IS_HALF: tl.constexpr):
    """Return exp(x); for half precision without results below 2^-126, which would take three more instructions."""
    return tl.exp2(x * 1.4426950408889634) if IS_HALF else tl.exp(x)


@triton.jit
def _tanh(x):
    """Return tanh and its derivative, without cancellation: near the bound, 1 - tanh^2 would have no correct digits."""
    size = tl.abs(x)
    small = tl.exp(-2.0 * size)
    inverse = 1.0 / (1.0 + small)
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - small) * inverse
    u = x * x  # Taylor series up to x^11
    near = -0.05396825396825397 + u * (0.021869488536155203 + u * -0.008863235529902197)
    near = x + x * u * (-0.3333333333333333 + u * (0.13333333333333333 + u * near))
    tanh = tl.where(size < 0.35, near, far)
    return tanh, tl.where(size < 0.6, 1.0 - tanh * tanh, 4.0 * small * inverse * inverse)


@triton.jit
def _tanh_in_half_precision(x):
    """Return tanh and its derivative to about 1e-6 of 1, with few instructions.

    That is more digits than x has. rsqrt(y)^2 computes 1 / y in two instructions.

    Both passes in place over 1024 x 256000 logits with a softcap took 0.53 ms instead of 0.79, and 0.49 without (one
    H100, torch 2.11.0, triton 3.6.0, bfloat16, 2026-11-26).
    """
    root = tl.rsqrt(1.0 + tl.exp2(2.8853900817779268 * x))  # 1 + exp(2 x)
    inverse = root * root
    return 1.0 - 2.0 * inverse, 4.0 * inverse * (1.0 - inverse)


@triton.jit
def scores_of(
    logits, inner_scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_HALF: tl.constexpr
):
    z = logits.to(tl.float32)
    if HAS_SCALE:
        z = z * inner_scale
    slope = 1.0
    if HAS_SOFTCAP:
        if IS_HALF:
            z, slope = _tanh_in_half_precision(z)
        else:
            z, slope = _tanh(z)
        z = z * softcap
    return z, slope


# Long because a kernel is one program, and this one reads the logits as few times as its loss allows.
@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _softmax_loss_kernel(  # noqa: C901 - constexpr branches: a compiled kernel has none of them
    logits_ptr,  # (rows, classes)
    logits_stride,
    dlogits_ptr,  # (rows, classes), may be logits_ptr; None: no gradient
    dlogits_stride,
    target_ptr,  # (rows)
    class_weight_ptr,  # (classes) or None
    mass_ptr,  # (), the sum of class_weight, where it is needed
    upstream_ptr,  # (rows), or () with a stride of 0
    upstream_stride,
    losses_ptr,  # (rows); None: row_max and log_sum are inputs
    row_max_ptr,  # (rows); may be None if losses are written and it is not needed
    log_sum_ptr,
    rows,
    classes,
    readable,  # columns of a row that may be read and written: at least `classes`
    ignore_index,
    label_smoothing,
    share,  # label_smoothing / classes
    inner_scale,  # of the logits: logit_scale, or logit_scale / softcap
    logit_scale,
    softcap,
    z_loss,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_SHARD: tl.constexpr,  # a target that is no column is a class of another shard; z of the label in place of a loss
):
    IS_HALF: tl.constexpr = logits_ptr.dtype.element_ty != tl.float32
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # With a 64-bit start, the row is a 64-bit number.
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        logits_row = logits_ptr + row * logits_stride
        target = tl.load(target_ptr + row)
        if target == ignore_index:
            if losses_ptr is not None:
                tl.store(losses_ptr + row, 0.0)
                if row_max_ptr is not None:
                    tl.store(row_max_ptr + row, 0.0)
                    tl.store(log_sum_ptr + row, 0.0)
            if dlogits_ptr is not None:
                zeros = tl.zeros([LANES, VECTOR], dlogits_ptr.dtype.element_ty)
                for start in range(0, classes, LANES * VECTOR):
                    columns = start + lanes
                    tl.store(dlogits_ptr + row * dlogits_stride + columns, zeros, mask=columns < readable)
        else:
            is_class = (target >= 0) & (target < classes)
            label = tl.where(is_class, target, -1 if IS_SHARD else 0).to(tl.int32)
            weight = tl.where(is_class, 1.0, 1.0 if IS_SHARD else float("nan"))
            if class_weight_ptr is not None:
                weight = weight * tl.load(class_weight_ptr + label).to(tl.float32)

            if losses_ptr is None:
                row_max = tl.load(row_max_ptr + row)
                log_sum = tl.load(log_sum_ptr + row)
                inverse_sum = exp(-log_sum, IS_HALF)
            else:
                z_label = scores_of(
                    tl.load(logits_row + tl.maximum(label, 0)),
                    inner_scale,
                    softcap,
                    HAS_SCALE,
                    HAS_SOFTCAP,
                    IS_HALF,
                )[0]
                # Smoothing sums z relative to a nearby origin, because z may be large compared with its differences.
                origin = tl.where(tl.abs(z_label) < float("inf"), z_label, 0.0)
                highs = tl.full([LANES], float("-inf"), tl.float32)
                sums = tl.zeros([LANES], tl.float32)
                tilts = tl.zeros([LANES, VECTOR], tl.float32)
                for start in range(0, classes, LANES * VECTOR):
                    columns = start + lanes
                    logits = tl.load(
                        logits_row + columns,
                        mask=columns < readable,
                        eviction_policy="evict_first" if dlogits_ptr is None else "evict_last",
                    )
                    z = scores_of(logits, inner_scale, softcap, HAS_SCALE, HAS_SOFTCAP, IS_HALF)[0]
                    z = tl.where(columns < classes, z, float("-inf"))
                    new_highs = tl.maximum(highs, tl.max(z, 1))
                    # A whole vector may be -inf. The reference is then 0, because -inf would give NaN.
                    reference = tl.where(new_highs == float("-inf"), 0.0, new_highs)
                    sums = sums * exp(highs - reference, IS_HALF) + tl.sum(
                        exp(z - reference[:, None], IS_HALF), 1
                    )
                    highs = new_highs
                    if HAS_SMOOTHING:
                        tilt = z - origin
                        if class_weight_ptr is not None:
                            w = tl.load(class_weight_ptr + columns, mask=columns < classes, other=0.0)
                            tilt = tilt * w.to(tl.float32)
                        tilts += tl.where(columns < classes, tilt, 0.0)

                row_max = tl.max(highs, 0)
                reference = tl.where(row_max == float("-inf"), 0.0, row_max)
                total = tl.sum(sums * exp(highs - reference, IS_HALF), 0)
                log_sum = tl.log(total)
                inverse_sum = 1.0 / total
                # Not log_sum + row_max first: for large logits, that would lose the digits of log_sum.
                loss = (1.0 - label_smoothing) * (log_sum - (z_label - row_max))
                if HAS_Z_LOSS:
                    lse = row_max + log_sum
                    loss += z_loss * lse * lse
                loss = loss * weight
                if HAS_SMOOTHING:
                    away = log_sum - (origin - row_max)
                    spread_loss = label_smoothing * away
                    if class_weight_ptr is not None:
                        spread_loss = share * tl.load(mass_ptr) * away
                    loss += spread_loss - share * tl.sum(tl.sum(tilts, 1), 0)
                if IS_SHARD:
                    loss = tl.where(is_class, z_label, 0.0)
                tl.store(losses_ptr + row, loss)
                if row_max_ptr is not None:
                    tl.store(row_max_ptr + row, row_max)
                    tl.store(log_sum_ptr + row, log_sum)

            if dlogits_ptr is not None:
                # The factors of the row include logit_scale, so that no element is multiplied by it.
                upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32) * logit_scale
                onehot = weight * upstream * (1.0 - label_smoothing)
                through_p = onehot
                if HAS_Z_LOSS:
                    through_p += 2.0 * z_loss * (row_max + log_sum) * weight * upstream
                spread = upstream * share
                if HAS_SMOOTHING:
                    if class_weight_ptr is not None:
                        through_p += spread * tl.load(mass_ptr)
                    else:
                        through_p += upstream * label_smoothing
                through_p = through_p * inverse_sum
                for start in range(0, classes, LANES * VECTOR):
                    columns = start + lanes
                    mask = columns < readable
                    logits = tl.load(logits_row + columns, mask=mask, eviction_policy="evict_first")
                    z, slope = scores_of(logits, inner_scale, softcap, HAS_SCALE, HAS_SOFTCAP, IS_HALF)
                    dlogits = exp(z - row_max, IS_HALF) * through_p
                    if HAS_SMOOTHING:
                        if class_weight_ptr is not None:
                            w = tl.load(class_weight_ptr + columns, mask=columns < classes, other=0.0)
                            dlogits -= spread * w.to(tl.float32)
                        else:
                            dlogits -= spread
                    dlogits -= tl.where(columns == label, onehot, 0.0)
                    if HAS_SOFTCAP:
                        dlogits = dlogits * slope
                    tl.store(
                        dlogits_ptr + row * dlogits_stride + columns,
                        dlogits.to(dlogits_ptr.dtype.element_ty),
                        mask=mask,
                        eviction_policy="evict_first",
                    )


# Assertions are compiled in debug mode only. A separate kernel, because that mode also checks all integer sums.
@triton.jit(do_not_specialize=["rows", "classes", "ignore_index"], debug=True)
def _assert_classes_kernel(target_ptr, rows, classes, ignore_index, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row = offsets < rows
    target = tl.load(target_ptr + offsets, mask=is_row, other=0)
    is_right = (target == ignore_index) | ((target >= 0) & (target < classes))
    tl.device_assert(is_right | (is_row == 0), "target >= 0 && target < n_classes")


def assert_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """Stop the device by an assertion if a target (N) is neither a class nor ignored. Does not synchronize."""
    rows = target.numel()
    if rows:
        launch(_assert_classes_kernel)[(triton.cdiv(rows, TARGETS),)](
            target.contiguous(), rows, classes, ignore_index, BLOCK=TARGETS, num_warps=4
        )


def losses(logits: Tensor, target: Tensor, terms: Terms, upstream: Tensor | None) -> Tensor:
    """Return the losses (N) of the rows, and write the gradient over the logits if upstream is given.

    The gradient is that of (losses * upstream).sum() with respect to the logits, for upstream (N).

    The caller provides the logits as a buffer. The space between its rows, up to their stride, is padding.
    """
    losses = logits.new_empty(logits.shape[:1], dtype=torch.float32)
    dlogits = None if upstream is None else logits
    _launch(logits, target, terms, upstream, dlogits, losses, None, None, logits.stride(0))
    return losses


def losses_and_statistics(logits: Tensor, target: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, row_max and log_sum (N) of the rows; the latter two are 0 where the target is ignored."""
    logits = _with_dense_rows(logits)
    losses, row_max, log_sum = (logits.new_empty(logits.shape[:1], dtype=torch.float32) for _ in range(3))
    _launch(logits, target, terms, None, None, losses, row_max, log_sum, logits.shape[1])
    return losses, row_max, log_sum


def statistics_of_shard(logits: Tensor, target: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Return row_max, log_sum and z of the label (N), for logits (N, V) of a part of the classes.

    z is 0 for a target that is no column. All are 0 where the target is ignored.
    """
    z_label, row_max, log_sum = (logits.new_empty(logits.shape[:1], dtype=torch.float32) for _ in range(3))
    readable = logits.stride(0)
    _launch(logits, target, terms, None, None, z_label, row_max, log_sum, readable, is_shard=True)
    return row_max, log_sum, z_label


def gradient(
    logits: Tensor, target: Tensor, terms: Terms, upstream: Tensor, row_max: Tensor, log_sum: Tensor
) -> Tensor:
    """Return the gradient of (losses * upstream).sum() with respect to the logits, (N, V) and contiguous."""
    logits = _with_dense_rows(logits)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _launch(logits, target, terms, upstream, dlogits, None, row_max, log_sum, logits.shape[1])
    return dlogits


def gradient_of_shard_(
    logits: Tensor, target: Tensor, terms: Terms, upstream: Tensor, row_max: Tensor, log_sum: Tensor
) -> None:
    """Write the gradient over the logits (N, V) of a part of the classes, from the statistics of all classes.

    A target that is neither a column nor ignored is a class of another part. The space between rows is padding, here
    and in statistics_of_shard.
    """
    readable = logits.stride(0)
    _launch(logits, target, terms, upstream, logits, None, row_max, log_sum, readable, is_shard=True)


def _with_dense_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _launch(
    logits: Tensor,
    target: Tensor,
    terms: Terms,
    upstream: Tensor | None,
    dlogits: Tensor | None,
    losses: Tensor | None,
    row_max: Tensor | None,
    log_sum: Tensor | None,
    readable: int,
    *,
    is_shard: bool = False,
) -> None:
    class_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss = terms
    rows, classes = logits.shape
    if not rows:
        return
    mass = class_weight.sum(dtype=torch.float32) if class_weight is not None and label_smoothing else None
    inner_scale = logit_scale if softcap is None else logit_scale / softcap
    is_in_one_pass = dlogits is None or losses is None
    is_long_tanh = softcap is not None and logits.dtype == torch.float32
    is_lean = not (is_in_one_pass or label_smoothing or is_long_tanh)
    programs, num_warps, lanes, vector = config(classes, logits.element_size(), is_lean)
    if is_in_one_pass:  # one pass reuses nothing from the cache
        programs *= 2
    grid = (min(rows, programs * num_multiprocessors(logits.device)),)
    launch(_softmax_loss_kernel)[grid](
        logits,
        logits.stride(0),
        dlogits,
        0 if dlogits is None else dlogits.stride(0),
        target.contiguous(),
        None if class_weight is None else class_weight.contiguous(),
        mass,
        upstream,
        0 if upstream is None else upstream.stride(0),
        losses,
        row_max,
        log_sum,
        rows,
        classes,
        readable,
        ignore_index,
        label_smoothing,
        label_smoothing / classes,
        inner_scale,
        logit_scale,
        1.0 if softcap is None else softcap,
        z_loss,
        HAS_SMOOTHING=label_smoothing != 0,
        HAS_SCALE=inner_scale != 1,
        HAS_SOFTCAP=softcap is not None,
        HAS_Z_LOSS=z_loss != 0,
        LANES=lanes,
        VECTOR=vector,
        IS_SHARD=is_shard,
        num_warps=num_warps,
    )
