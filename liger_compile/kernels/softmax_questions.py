"""Statistics of the softmax of rows of logits, and the gradient of any set of them: two kernels.

ops/softmax_questions.py has the formulas. `statistics` reads the logits once. Each lane of a program keeps a maximum
and sums relative to that maximum, which are rescaled when the maximum grows, and combined at the end of the row:

    sum(e), sum(e * (z - maximum)), sum(e^2), sum(z - origin)      e = exp(z - maximum), origin = the first score

`gradient_` reads the logits once, and overwrites them:

    dlogits = (p * (through + tilt * logp + twice * p) + level) * slope,   logp = (z - maximum) - log_sum, p = exp(logp)

    logits (N, V): bfloat16, float16 or float32; all other values are in float32.
"""

# A type checker does not see which kernel arguments are None at compile time, nor the launch argument num_warps.
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, num_multiprocessors
from .softmax_loss import config, exp, scores_of


@triton.jit
def _rescaled(high, reference):
    """Return the shift from a lane's maximum to a new reference; 0 for a lane without finite scores so far."""
    return tl.where(high == float("-inf"), 0.0, high - reference)


# Long because a kernel is one program, and this one reads the logits once for all questions.
@triton.jit(do_not_specialize=["rows"])
def _statistics_kernel(
    logits_ptr,  # (rows, classes)
    logits_stride,
    out_ptr,  # (6, rows): maximum, log_sum, entropy, collision, sum of z, sum of logp
    rows,
    classes,
    inner_scale,  # of the logits: logit_scale, or logit_scale / softcap
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_SUM: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    IS_HALF: tl.constexpr = logits_ptr.dtype.element_ty != tl.float32
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        logits_row = logits_ptr + row * logits_stride
        first = scores_of(tl.load(logits_row), inner_scale, softcap, HAS_SCALE, HAS_SOFTCAP, IS_HALF)[0]
        origin = tl.where(tl.abs(first) < float("inf"), first, 0.0)
        highs = tl.full([LANES], float("-inf"), tl.float32)
        sums = tl.zeros([LANES], tl.float32)
        tilts = tl.zeros([LANES], tl.float32)
        squares = tl.zeros([LANES], tl.float32)
        levels = tl.zeros([LANES, VECTOR], tl.float32)
        for start in range(0, classes, LANES * VECTOR):
            columns = start + lanes
            is_class = columns < classes
            logits = tl.load(logits_row + columns, mask=is_class, eviction_policy="evict_first")
            z = scores_of(logits, inner_scale, softcap, HAS_SCALE, HAS_SOFTCAP, IS_HALF)[0]
            z = tl.where(is_class, z, float("-inf"))
            new_highs = tl.maximum(highs, tl.max(z, 1))
            # A whole vector may be -inf. The reference is then 0, because -inf would give NaN.
            reference = tl.where(new_highs == float("-inf"), 0.0, new_highs)
            shift = _rescaled(highs, reference)
            factor = exp(shift, IS_HALF)
            away = z - reference[:, None]
            e = exp(away, IS_HALF)
            if HAS_MEAN:
                products = tl.where(is_class, e * away, 0.0)
                tilts = (tilts + sums * shift) * factor + tl.sum(products, 1)
            if HAS_SQUARES:
                squares = squares * factor * factor + tl.sum(e * e, 1)
            sums = sums * factor + tl.sum(e, 1)
            highs = new_highs
            if HAS_SUM:
                levels += tl.where(is_class, z - origin, 0.0)
        row_max = tl.max(highs, 0)
        reference = tl.where(row_max == float("-inf"), 0.0, row_max)
        shift = _rescaled(highs, reference)
        factor = tl.where(highs == float("-inf"), 0.0, exp(shift, IS_HALF))
        total = tl.sum(sums * factor, 0)
        log_sum = tl.log(total)
        tl.store(out_ptr + row, row_max)
        tl.store(out_ptr + rows.to(tl.int64) + row, log_sum)
        if HAS_MEAN:
            mean = tl.sum((tilts + sums * shift) * factor, 0) / total
            tl.store(out_ptr + 2 * rows.to(tl.int64) + row, log_sum - mean)
        if HAS_SQUARES:
            collision = tl.sum(squares * factor * factor, 0) / (total * total)
            tl.store(out_ptr + 3 * rows.to(tl.int64) + row, collision)
        if HAS_SUM:
            level = tl.sum(tl.sum(levels, 1), 0)
            tl.store(out_ptr + 4 * rows.to(tl.int64) + row, level + classes * origin)
            away_from_max = (origin - row_max) - log_sum
            tl.store(out_ptr + 5 * rows.to(tl.int64) + row, level + classes * away_from_max)


@triton.jit(do_not_specialize=["rows"])
def _argmax_kernel(
    logits_ptr, logits_stride, out_ptr, rows, classes, sign, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    lanes = tl.arange(0, LANES * VECTOR)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        best = tl.full([LANES * VECTOR], float("-inf"), tl.float32)
        at = lanes.to(tl.int64)
        for start in range(0, classes, LANES * VECTOR):
            columns = start + lanes
            logits = tl.load(
                logits_ptr + row * logits_stride + columns, mask=columns < classes, other=float("-inf")
            )
            z = tl.where(columns < classes, logits.to(tl.float32) * sign, float("-inf"))
            is_better = (z > best) | ((z != z) & (best == best))  # NaN is larger than any number
            at = tl.where(is_better, columns, at)
            best = tl.where(is_better, z, best)
        is_nan = best != best
        has_nan = tl.max(is_nan.to(tl.int32), 0) > 0
        high = tl.max(tl.where(is_nan, float("-inf"), best), 0)
        is_best = tl.where(has_nan, is_nan, best == high)
        tl.store(out_ptr + row, tl.min(tl.where(is_best & (at < classes), at, classes), 0))


@triton.jit(do_not_specialize=["rows"])
def _gradient_kernel(
    logits_ptr,  # (rows, classes), overwritten
    logits_stride,
    statistics_ptr,  # maximum and log_sum, (2, rows) with the stride of a row below
    statistics_stride,
    through_ptr,  # (rows), or None
    tilt_ptr,
    twice_ptr,
    level_ptr,
    rows,
    classes,
    inner_scale,
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    IS_HALF: tl.constexpr = logits_ptr.dtype.element_ty != tl.float32
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        row_max = tl.load(statistics_ptr + row)
        log_sum = tl.load(statistics_ptr + statistics_stride + row)
        # The factors of the row include logit_scale, so that no element is multiplied by it.
        through, tilt, twice, level = 0.0, 0.0, 0.0, 0.0
        if through_ptr is not None:
            through = tl.load(through_ptr + row) * logit_scale
        if tilt_ptr is not None:
            tilt = tl.load(tilt_ptr + row) * logit_scale
        if twice_ptr is not None:
            twice = tl.load(twice_ptr + row) * logit_scale
        if level_ptr is not None:
            level = tl.load(level_ptr + row) * logit_scale
        for start in range(0, classes, LANES * VECTOR):
            columns = start + lanes
            is_class = columns < classes
            places = logits_ptr + row * logits_stride + columns
            logits = tl.load(places, mask=is_class, eviction_policy="evict_first")
            z, slope = scores_of(logits, inner_scale, softcap, HAS_SCALE, HAS_SOFTCAP, IS_HALF)
            logp = (z - row_max) - log_sum
            p = exp(logp, IS_HALF)
            total = p * 0.0 + through
            if tilt_ptr is not None:
                total += tilt * logp
            if twice_ptr is not None:
                total += twice * p
            gradient = total * p
            if level_ptr is not None:
                gradient += level
            if HAS_SOFTCAP:
                gradient = gradient * slope
            tl.store(
                places,
                gradient.to(logits_ptr.dtype.element_ty),
                mask=is_class,
                eviction_policy="evict_first",
            )


def _grid(logits: Tensor) -> tuple[tuple[int], dict[str, int]]:
    programs, num_warps, lanes, vector = config(logits.shape[1], logits.element_size(), is_lean=False)
    most = 2 * programs * num_multiprocessors(logits.device)  # one pass reuses nothing from the cache
    return (min(logits.shape[0], most),), {"LANES": lanes, "VECTOR": vector, "num_warps": num_warps}


def statistics(logits: Tensor, logit_scale: float, softcap: float | None, asked: Set[str]) -> Tensor:
    """Return (6, N) in float32: maximum, log_sum, entropy, collision, and the sums of z and logp.

    Rows that no question in `asked` needs are 0. The rows of logits (N, V) are dense.
    """
    rows, classes = logits.shape
    out = logits.new_zeros((6, rows), dtype=torch.float32)
    if not rows:
        return out
    grid, options = _grid(logits)
    inner_scale = logit_scale if softcap is None else logit_scale / softcap
    launch(_statistics_kernel)[grid](
        logits,
        logits.stride(0),
        out,
        rows,
        classes,
        inner_scale,
        1.0 if softcap is None else softcap,
        HAS_SCALE=inner_scale != 1,
        HAS_SOFTCAP=softcap is not None,
        HAS_MEAN=not asked.isdisjoint(("entropy", "mean_score")),
        HAS_SQUARES="collision" in asked,
        HAS_SUM=not asked.isdisjoint(("score_sum", "log_probability_sum")),
        **options,
    )
    return out


def argmax(logits: Tensor, logit_scale: float) -> Tensor:
    """Return the first column of the largest logit of each row (N), of the smallest for a negative scale; int64."""
    rows, classes = logits.shape
    out = logits.new_empty((rows,), dtype=torch.int64)
    if rows:
        grid, options = _grid(logits)
        sign = -1.0 if logit_scale < 0 else 1.0
        launch(_argmax_kernel)[grid](logits, logits.stride(0), out, rows, classes, sign, **options)
    return out


def gradient_(
    logits: Tensor,
    statistics: Tensor,
    of_rows: Sequence[Tensor | None],
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Overwrite logits (N, V) by the gradient of the logits.

    Args:
        statistics: maximum and log_sum in its first two rows, (2 or more, N).
        of_rows: through, tilt, twice, level: each (N) in float32, or None.
    """
    rows, classes = logits.shape
    if not rows:
        return
    grid, options = _grid(logits)
    inner_scale = logit_scale if softcap is None else logit_scale / softcap
    launch(_gradient_kernel)[grid](
        logits,
        logits.stride(0),
        statistics,
        statistics.stride(0),
        *(None if value is None else value.contiguous() for value in of_rows),
        rows,
        classes,
        inner_scale,
        logit_scale,
        1.0 if softcap is None else softcap,
        HAS_SCALE=inner_scale != 1,
        HAS_SOFTCAP=softcap is not None,
        **options,
    )
