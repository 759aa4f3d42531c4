"""Divergences of the softmax of two blocks of logits, and their gradient: two kernels that read both once.

ops/divergence.py has the formulas. The statistics of both blocks (maximum and log_sum of each row) are inputs.

    logits (N, V) of student and teacher: bfloat16, float16 or float32; all other values are in float32.
"""

# A type checker does not see the launch argument num_warps, nor that a kernel passes constants on.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, num_multiprocessors
from .softmax_loss import config, exp, scores_of

CROSS, FINITE_CROSS, FORWARD, PLAIN_FORWARD, REVERSE, JENSEN_SHANNON = range(6)
_KIND = {
    "cross": CROSS,
    "finite_cross": FINITE_CROSS,
    "forward": FORWARD,
    "plain_forward": PLAIN_FORWARD,
    "reverse": REVERSE,
    "jensen_shannon": JENSEN_SHANNON,
}

# (logit_scale, softcap) of student and teacher
Forms = tuple[tuple[float, float | None], ...]


@triton.jit
def _mixture(s, t, log_rest, log_beta):
    """Return log(exp(s + log_rest) + exp(t + log_beta))."""
    a, b = s + log_rest, t + log_beta
    high = tl.maximum(a, b)
    shift = tl.where(high == float("-inf"), 0.0, high)
    return shift + tl.log(tl.exp(a - shift) + tl.exp(b - shift))


@triton.jit
def _terms(
    s,
    t,
    beta,
    log_beta,
    log_rest,
    KIND: tl.constexpr,
    IS_HALF: tl.constexpr,
    IS_TEACHER_HALF: tl.constexpr,
):
    """Return the addends of the divergence and of rest, for log-probabilities of student and teacher."""
    if KIND <= 1:  # CROSS and FINITE_CROSS; constants of the module are no constants of a kernel
        p = exp(t, IS_TEACHER_HALF)
        if KIND == 1:
            is_finite = tl.abs(s) < float("inf")
            p = tl.where(is_finite, p, 0.0)
            s = tl.where(is_finite, s, 0.0)
        total, rest = p * s, p
    elif KIND == 2:
        total = exp(t, IS_TEACHER_HALF) * (t - s)
        rest = total
    elif KIND == 3:
        p = exp(t, IS_TEACHER_HALF)
        total = tl.where(p == 0, 0.0, p * t) - p * s
        rest = total
    elif KIND == 4:
        total = exp(s, IS_HALF) * (s - t)
        rest = total
    else:
        m = _mixture(s, t, log_rest, log_beta)
        rest = exp(s, IS_HALF) * (s - m)
        total = beta * (exp(t, IS_TEACHER_HALF) * (t - m)) + (1.0 - beta) * rest
    return total, rest


@triton.jit(do_not_specialize=["rows"])
def _divergence_kernel(
    student_ptr,  # (rows, classes)
    student_stride,
    teacher_ptr,
    teacher_stride,
    statistics_ptr,  # (4 or more, rows): maximum and log_sum of the student, and of the teacher
    statistics_stride,
    out_ptr,  # (2, rows): divergence, rest
    rows,
    classes,
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    beta,
    log_beta,
    log_rest,  # log(1 - beta)
    KIND: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    IS_HALF: tl.constexpr = student_ptr.dtype.element_ty != tl.float32
    IS_TEACHER_HALF: tl.constexpr = teacher_ptr.dtype.element_ty != tl.float32
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        row_max = tl.load(statistics_ptr + row)
        log_sum = tl.load(statistics_ptr + statistics_stride + row)
        teacher_max = tl.load(statistics_ptr + 2 * statistics_stride + row)
        teacher_log_sum = tl.load(statistics_ptr + 3 * statistics_stride + row)
        totals = tl.zeros([LANES, VECTOR], tl.float32)
        rests = tl.zeros([LANES, VECTOR], tl.float32)
        for start in range(0, classes, LANES * VECTOR):
            columns = start + lanes
            is_class = columns < classes
            logits = tl.load(student_ptr + row * student_stride + columns, mask=is_class, other=0.0)
            s = scores_of(logits, scale, softcap, True, HAS_SOFTCAP, IS_HALF)[0]
            s = (s - row_max) - log_sum
            logits = tl.load(teacher_ptr + row * teacher_stride + columns, mask=is_class, other=0.0)
            t = scores_of(logits, teacher_scale, teacher_softcap, True, HAS_TEACHER_SOFTCAP, IS_TEACHER_HALF)[
                0
            ]
            t = (t - teacher_max) - teacher_log_sum
            total, rest = _terms(s, t, beta, log_beta, log_rest, KIND, IS_HALF, IS_TEACHER_HALF)
            totals += tl.where(is_class, total, 0.0)
            rests += tl.where(is_class, rest, 0.0)
        tl.store(out_ptr + row, tl.sum(tl.sum(totals, 1), 0))
        tl.store(out_ptr + rows.to(tl.int64) + row, tl.sum(tl.sum(rests, 1), 0))


# Long because a kernel is one program, with a line for each pointer and size.
@triton.jit(do_not_specialize=["rows"])
def _gradient_kernel(
    student_ptr,  # (rows, classes), overwritten
    student_stride,
    teacher_ptr,
    teacher_stride,
    statistics_ptr,  # (5, rows): and rest
    statistics_stride,
    upstream_ptr,  # (rows)
    rows,
    classes,
    scale,
    logit_scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    beta,
    log_beta,
    log_rest,
    KIND: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    IS_HALF: tl.constexpr = student_ptr.dtype.element_ty != tl.float32
    IS_TEACHER_HALF: tl.constexpr = teacher_ptr.dtype.element_ty != tl.float32
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        row_max = tl.load(statistics_ptr + row)
        log_sum = tl.load(statistics_ptr + statistics_stride + row)
        teacher_max = tl.load(statistics_ptr + 2 * statistics_stride + row)
        teacher_log_sum = tl.load(statistics_ptr + 3 * statistics_stride + row)
        rest = tl.load(statistics_ptr + 4 * statistics_stride + row)
        upstream = tl.load(upstream_ptr + row) * logit_scale
        for start in range(0, classes, LANES * VECTOR):
            columns = start + lanes
            is_class = columns < classes
            places = student_ptr + row * student_stride + columns
            s, slope = scores_of(
                tl.load(places, mask=is_class, other=0.0), scale, softcap, True, HAS_SOFTCAP, IS_HALF
            )
            s = (s - row_max) - log_sum
            logits = tl.load(teacher_ptr + row * teacher_stride + columns, mask=is_class, other=0.0)
            t = scores_of(logits, teacher_scale, teacher_softcap, True, HAS_TEACHER_SOFTCAP, IS_TEACHER_HALF)[
                0
            ]
            t = (t - teacher_max) - teacher_log_sum
            p = exp(s, IS_HALF)
            if KIND <= 1:
                q = exp(t, IS_TEACHER_HALF)
                if KIND == 1:
                    q = tl.where(tl.abs(s) < float("inf"), q, 0.0)
                gradient = q - p * rest
            elif KIND <= 3:
                gradient = p - exp(t, IS_TEACHER_HALF)
            elif KIND == 4:
                gradient = p * (s - t - rest)
            else:
                gradient = p * (s - _mixture(s, t, log_rest, log_beta) - rest) * (1.0 - beta)
            gradient = gradient * upstream
            if HAS_SOFTCAP:
                gradient = gradient * slope
            tl.store(places, gradient.to(student_ptr.dtype.element_ty), mask=is_class)


def _inner(form: tuple[float, float | None]) -> tuple[float, float]:
    """Return the scale before the cap, and the cap."""
    scale, softcap = form
    return (scale, 1.0) if softcap is None else (scale / softcap, softcap)


def _arguments(kind: str, beta: float, forms: Forms, logits: tuple[Tensor, Tensor]) -> tuple:
    student = logits[0]
    programs, num_warps, lanes, vector = config(student.shape[1], student.element_size(), is_lean=False)
    most = 2 * programs * num_multiprocessors(student.device)
    is_mixed = kind == "jensen_shannon"
    logs = (math.log(beta), math.log1p(-beta)) if is_mixed else (0.0, 0.0)
    options = {
        "KIND": _KIND[kind],
        "HAS_SOFTCAP": forms[0][1] is not None,
        "HAS_TEACHER_SOFTCAP": forms[1][1] is not None,
        "LANES": lanes,
        "VECTOR": vector,
        "num_warps": num_warps,
    }
    return (min(student.shape[0], most),), (beta, *logs), options


def divergence(
    kind: str, beta: float, forms: Forms, logits: tuple[Tensor, Tensor], statistics: Tensor
) -> Tensor:
    """Return (2, N) in float32: the divergence and rest, for logits (N, V) of student and teacher with dense rows."""
    student, teacher = logits
    rows, classes = student.shape
    out = student.new_zeros((2, rows), dtype=torch.float32)
    if rows:
        grid, numbers, options = _arguments(kind, beta, forms, logits)
        launch(_divergence_kernel)[grid](
            student,
            student.stride(0),
            teacher,
            teacher.stride(0),
            statistics,
            statistics.stride(0),
            out,
            rows,
            classes,
            *_inner(forms[0]),
            *_inner(forms[1]),
            *numbers,
            **options,
        )
    return out


def gradient_(
    kind: str,
    beta: float,
    forms: Forms,
    logits: tuple[Tensor, Tensor],
    upstream: Tensor,
    statistics: Tensor,
) -> None:
    """Overwrite the student's logits by their gradient, for incoming gradients (N) in float32."""
    student, teacher = logits
    rows, classes = student.shape
    if rows:
        grid, numbers, options = _arguments(kind, beta, forms, logits)
        scale, softcap = _inner(forms[0])
        launch(_gradient_kernel)[grid](
            student,
            student.stride(0),
            teacher,
            teacher.stride(0),
            statistics,
            statistics.stride(0),
            upstream.contiguous(),
            rows,
            classes,
            scale,
            forms[0][0],
            softcap,
            *_inner(forms[1]),
            *numbers,
            **options,
        )
