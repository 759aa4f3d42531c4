"""The divergence of the softmax of two heads, student and teacher, without the logits of the whole batch.

    logits = x @ weight^T + bias            of each, rounded to the dtype of its x
    divergence.py has the divergences and their gradients

    x (N, H), weight (V, H), bias (V) or None; teacher_x (N, I), teacher_weight (V, I), teacher_bias (V) or None
    -> the divergence (N), and statistics (5, N) for backward

The student's inputs get gradients, the teacher's do not. Forward computes two matmuls for each chunk of rows. Each row
has its own incoming gradient, so backward computes them again, replaces the student's logits by their gradient, and
multiplies that with weight and x: six matmuls in all. A chunk of both logits takes the memory of one chunk of
linear_cross_entropy.py. Dtypes: as in linear_softmax.py; student and teacher may have different ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .alignment import missing_columns, with_columns
from .dispatch import has_kernel
from .divergence import STATISTICS, reference_divergence, reference_gradient_
from .linear_cross_entropy import (
    CHUNK_BYTES,
    DEVICE_CHUNK_BYTES,
    chunks_of,
    device_logits,
    gradients_by_chunk,
    unscaled,
)
from .precision import accumulation_dtype
from .registration import opaque_op, padded
from .softmax_questions import scores_of


def _share(x: Tensor, memory: int) -> int:
    """Return the memory of the student's chunk of logits."""
    return (memory or (CHUNK_BYTES if x.device.type == "cpu" else DEVICE_CHUNK_BYTES)) // 2


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, is_kernel: bool) -> Tensor:
    return device_logits(x, weight, bias) if is_kernel else F.linear(x, weight, bias)


def _aligned(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    missing = missing_columns(x)
    return (with_columns(x, missing), with_columns(weight, missing)) if missing else (x, weight)


@opaque_op
def linear_divergence(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    kind: str,
    beta: float,
    logit_scale: float,
    softcap: float | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    memory: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return (divergence, statistics)."""
    wide = torch.promote_types(accumulation_dtype(x.dtype), accumulation_dtype(teacher_x.dtype))
    out = x.new_empty(x.shape[:1], dtype=wide)
    statistics = x.new_empty((STATISTICS, x.shape[0]), dtype=wide)
    forms = scores_of(logit_scale, softcap), scores_of(teacher_scale, teacher_softcap)
    is_kernel = has_kernel(x, weight, bias, teacher_x, teacher_weight, teacher_bias)
    (x, weight), (teacher_x, teacher_weight) = _aligned(x, weight), _aligned(teacher_x, teacher_weight)
    on_chunk = _kernel_divergence if is_kernel else reference_divergence
    for chunk in chunks_of(x, weight, False, _share(x, memory)):
        student = _logits(x[chunk], weight, bias, is_kernel)
        teacher = _logits(teacher_x[chunk], teacher_weight, teacher_bias, is_kernel)
        on_chunk(kind, beta, forms, (student, teacher), out[chunk], statistics[:, chunk])
        del student, teacher
    return out, statistics


def _kernel_divergence(
    kind: str, beta: float, forms: Any, logits: tuple[Tensor, Tensor], out: Tensor, statistics: Tensor
) -> None:
    """Do the same as the reference."""
    from ..kernels import divergence as kernels
    from ..kernels import softmax_questions

    for at, (form, part) in enumerate(zip(forms, logits, strict=True)):
        found = softmax_questions.statistics(part, form.logit_scale, form.softcap, frozenset())
        statistics[2 * at : 2 * at + 2].copy_(found[:2])
    made, rest = kernels.divergence(kind, beta, _numbers(forms), logits, statistics)
    out.copy_(made)
    statistics[4].copy_(rest)


def _numbers(forms: Any) -> tuple[tuple[float, float | None], ...]:
    return tuple((form.logit_scale, form.softcap) for form in forms)


@linear_divergence.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Any,
    kind: str,
    beta: float,
    logit_scale: float,
    softcap: Any,
    teacher_scale: float,
    teacher_softcap: Any,
    memory: int = 0,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(accumulation_dtype(x.dtype), accumulation_dtype(teacher_x.dtype))
    return x.new_empty(x.shape[:1], dtype=wide), x.new_empty((STATISTICS, x.shape[0]), dtype=wide)


@opaque_op
def linear_divergence_backward(
    upstream: Tensor,
    statistics: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    kind: str,
    beta: float,
    logit_scale: float,
    softcap: float | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias) of the student, each empty where not needed."""
    forms = scores_of(logit_scale, softcap), scores_of(teacher_scale, teacher_softcap)
    is_kernel = has_kernel(x, weight, bias, teacher_x, teacher_weight, teacher_bias)
    teacher_x, teacher_weight = _aligned(teacher_x, teacher_weight)
    gradient_ = _kernel_gradient_ if is_kernel else reference_gradient_

    def on_chunk(chunk: slice, rows: Tensor, weight: Tensor, dbias_sum: Tensor) -> Tensor:
        student = _logits(rows, weight, bias, is_kernel)
        teacher = _logits(teacher_x[chunk], teacher_weight, teacher_bias, is_kernel)
        gradient_(kind, beta, forms, (student, teacher), upstream[chunk], statistics[:, chunk])
        if dbias_sum.numel():
            dbias_sum.add_(student.sum(0, dtype=dbias_sum.dtype))
        return student

    needs = needs_dx, needs_dweight, needs_dbias
    return unscaled(gradients_by_chunk(x, weight, 1.0, needs, _share(x, memory), on_chunk), x.dtype)


def _kernel_gradient_(
    kind: str, beta: float, forms: Any, logits: tuple[Tensor, Tensor], upstream: Tensor, statistics: Tensor
) -> None:
    """Do the same as the reference."""
    from ..kernels import divergence as kernels

    kernels.gradient_(kind, beta, _numbers(forms), logits, upstream, statistics)


@linear_divergence_backward.register_fake
def _(
    upstream: Tensor,
    statistics: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Any,
    kind: str,
    beta: float,
    logit_scale: float,
    softcap: Any,
    teacher_scale: float,
    teacher_softcap: Any,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
        weight.new_empty(weight.shape[:1] if needs_dbias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, kind, beta, scale, cap, teacher_scale, teacher_cap, ctx.memory = inputs
    ctx.terms = kind, beta, scale, cap, teacher_scale, teacher_cap
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return padded(ctx)
    needs_dx, needs_dweight, needs_dbias, *of_teacher = ctx.needs_input_grad
    if any(of_teacher):
        raise RuntimeError(
            "linear_divergence: expected a teacher that needs no gradient, got one that requires it; detach its "
            "inputs and weight"
        )
    *tensors, statistics = ctx.saved_tensors
    needs = needs_dx, needs_dweight, needs_dbias
    found = torch.ops.liger_compile.linear_divergence_backward.default(
        gradient, statistics, *tensors, *ctx.terms, *needs, ctx.memory
    )
    return padded(ctx, *(grad if needed else None for grad, needed in zip(found, needs, strict=True)))


linear_divergence.register_autograd(_backward, setup_context=_setup_context)
