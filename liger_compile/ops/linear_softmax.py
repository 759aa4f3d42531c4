"""A linear layer to logits, and the answers to questions about their softmax, without the logits of the whole batch.

    logits = x @ weight^T + bias            rounded to the dtype of x, as F.linear rounds them
    answers of softmax_questions.py: log-probabilities of tokens, entropy, logsumexp, ...
    a divergence of divergence.py from the softmax of a second linear layer, the teacher

    x (N, H), weight (V, H), bias (V) or None, index (N, K) or None;
    teacher_x (N, I), teacher_weight (V, I), teacher_bias (V), or None
    -> the answers, each empty if it was not asked; columns (N, K + k) of `top`; and statistics (9, N) for backward

Forward computes the logits of one chunk of rows after the other. Each answer of each row has its own incoming gradient.
Backward replaces the logits of a chunk by their gradient, and multiplies that with weight and x. `keeps` states what
forward keeps for backward:

    ""           nothing: backward computes the logits again, four matmuls in all; a teacher adds two
    "logits"     the logits in the dtype of x, and those of the teacher: three matmuls, and one for a teacher
    a question   this answer has one number a row, no other answer has a gradient, and only x needs one: the gradient
                 (N, H) of this answer, which backward multiplies by the incoming gradient: two matmuls, and one for a
                 teacher. Not in float16, whose range is too small for it

The teacher's inputs get no gradients. linear_cross_entropy.py has the chunks, their memory, and the sums of the
gradients. The logits of student and teacher share the memory of a chunk.

Dtypes: x, weight and bias have one dtype, and so have those of the teacher. The answers, their gradients, and all
values in between are in float32 (float64 for float64), except that the gradient of the logits is rounded to the dtype
of x for its matmuls, as in eager code. With both questions and a divergence, the gradients of both are rounded before
they are added, as eager code adds the gradients of two readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_cross_entropy import PITCH, chunks_of, gradients_by_chunk, times, unscaled
from .registration import opaque_op, padded, second_derivative_error
from .softmax_chunks import (
    Answers,
    Asking,
    Made,
    Teacher,
    empty_made,
    gradient_of_chunk,
    heads_of,
    names_of,
    share_of,
)
from .softmax_questions import QUESTIONS, Coefficients, coefficients


def _empty_kept(x: Tensor, weight: Tensor, teacher_x: Tensor | None, keeps: str) -> tuple[Tensor, Tensor]:
    """Return tensors without values for `kept` and `kept_teacher`. Rows of logits are padded, which aligns them all."""
    pitch = -(-weight.shape[0] // PITCH) * PITCH
    if keeps != "logits":
        return x.new_empty(x.shape if keeps else (0,)), x.new_empty(0)
    kept = x.new_empty(x.shape[0], pitch)
    return kept, x.new_empty(0) if teacher_x is None else teacher_x.new_empty(x.shape[0], pitch)


@opaque_op
def linear_softmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    index: Tensor | None,
    questions: str,
    top: int,
    logit_scale: float,
    softcap: float | None,
    kind: str,
    beta: float,
    teacher_scale: float,
    teacher_softcap: float | None,
    memory: int = 0,
    keeps: str = "",
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]:
    """Return Answers to the questions, whose names are separated by commas; columns, statistics, kept, kept_teacher."""
    asked = names_of(questions)
    made = empty_made(x, index, teacher_x, asked, top)
    kept = _empty_kept(x, weight, teacher_x, keeps)
    made.statistics.zero_()
    tensors = x, weight, bias, teacher_x, teacher_weight, teacher_bias
    student, teacher = heads_of(tensors, kind, beta, (logit_scale, teacher_scale), (softcap, teacher_softcap))
    asking = Asking(student, teacher, index, asked, top)
    if keeps not in ("", "logits"):
        of_rows = _with_gradient_of(keeps, asking, made, memory)
        return *made.tensors, of_rows, kept[1]  # pyright: ignore[reportReturnType]
    student = student.aligned()
    for chunk in chunks_of(student.x, weight, False, share_of(x, memory, 1 if teacher is None else 2)):
        out, out_of_teacher = (buffer[chunk] if keeps else None for buffer in kept)
        logits = student.logits(chunk, out)
        asking.answer(chunk, logits, made, out_of_teacher)
        del logits  # before the logits of the next chunk are allocated
    return *made.tensors, *kept  # pyright: ignore[reportReturnType]


def _with_gradient_of(question: str, asking: Asking, made: Made, memory: int) -> Tensor:
    """Answer all questions, and return the gradient (N, H) of one answer, which has one number a row."""

    def on_chunk(chunk: slice, rows: Tensor, weight: Tensor, _: Tensor) -> Tensor:
        student, statistics = asking.student._replace(x=rows, weight=weight), made.statistics[:, chunk]
        logits = student.logits(slice(None))
        of_teacher = asking.answer(chunk, logits, made)
        ones = torch.ones_like(getattr(made.answers, question)[chunk])
        is_pair = question == "divergence"
        of_questions = coefficients({} if is_pair else {question: ones}, statistics, logits.shape[1])
        picked = None if asking.index is None else asking.index[chunk]
        both, of_pair = (logits, of_teacher), ones if is_pair else None
        return gradient_of_chunk(student, asking.teacher, both, picked, statistics, of_questions, of_pair)

    student = asking.student
    share = share_of(student.x, memory, 1 if asking.teacher is None else 2)
    return gradients_by_chunk(student.x, student.weight, 1.0, (True, False, False), share, on_chunk).dx


@linear_softmax.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    teacher_x: Any,
    teacher_weight: Any,
    teacher_bias: Any,
    index: Any,
    questions: str,
    top: int,
    logit_scale: float,
    softcap: Any,
    kind: str,
    beta: float,
    teacher_scale: float,
    teacher_softcap: Any,
    memory: int = 0,
    keeps: str = "",
) -> tuple[Tensor, ...]:
    made = empty_made(x, index, teacher_x, names_of(questions), top)
    return *made.tensors, *_empty_kept(x, weight, teacher_x, keeps)


@opaque_op
def linear_softmax_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_x: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    columns: Tensor | None,
    statistics: Tensor,
    through: Tensor | None,
    tilt: Tensor | None,
    twice: Tensor | None,
    level: Tensor | None,
    at_columns: Tensor | None,
    of_divergence: Tensor | None,
    kept: Tensor | None,
    kept_teacher: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    kind: str,
    beta: float,
    teacher_scale: float,
    teacher_softcap: float | None,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias), each empty where not needed."""
    made = Coefficients(through, tilt, twice, level, at_columns)
    tensors = x, weight, bias, teacher_x, teacher_weight, teacher_bias
    student, teacher = heads_of(tensors, kind, beta, (logit_scale, teacher_scale), (softcap, teacher_softcap))
    if of_divergence is None:
        teacher = None

    def on_chunk(chunk: slice, rows: Tensor, weight: Tensor, dbias_sum: Tensor) -> Tensor:
        at_chunk = student._replace(x=rows, weight=weight)
        classes = weight.shape[0]
        logits = at_chunk.logits(slice(None)) if kept is None else kept[chunk].clone()[:, :classes]
        logits = gradient_of_chunk(
            at_chunk,
            teacher,
            (logits, _teacher_logits(teacher, chunk, kept_teacher, classes)),
            None if columns is None else columns[chunk],
            statistics[:, chunk],
            made.at(chunk),
            None if of_divergence is None else of_divergence[chunk],
        )
        if dbias_sum.numel():
            dbias_sum.add_(logits.sum(0, dtype=dbias_sum.dtype))
        return logits

    has_questions, needs = any(part is not None for part in made), (needs_dx, needs_dweight, needs_dbias)
    share = share_of(x, memory, 1 if teacher is None else 2 + has_questions)
    return unscaled(gradients_by_chunk(x, weight, 1.0, needs, share, on_chunk), x.dtype)


def _teacher_logits(
    teacher: Teacher | None, chunk: slice, kept: Tensor | None, classes: int
) -> Tensor | None:
    if teacher is None:
        return None
    return teacher.head.logits(chunk) if kept is None else kept[chunk, :classes]


@linear_softmax_backward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    teacher_x: Any,
    teacher_weight: Any,
    teacher_bias: Any,
    columns: Any,
    statistics: Tensor,
    through: Any,
    tilt: Any,
    twice: Any,
    level: Any,
    at_columns: Any,
    of_divergence: Any,
    kept: Any,
    kept_teacher: Any,
    logit_scale: float,
    softcap: Any,
    kind: str,
    beta: float,
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
    (
        *tensors,
        index,
        questions,
        top,
        scale,
        cap,
        kind,
        beta,
        teacher_scale,
        teacher_cap,
        ctx.memory,
        ctx.keeps,
    ) = inputs
    *answers, columns, statistics, kept, kept_teacher = output
    found = Answers(*answers)
    ctx.terms = scale, cap, kind, beta, teacher_scale, teacher_cap
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(found.argmax, found.top_columns, columns, statistics, kept, kept_teacher)
    ctx.asked = names_of(questions)
    ctx.save_for_backward(*tensors, columns if top else index, statistics, kept, kept_teacher)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, columns, statistics, kept, kept_teacher = ctx.saved_tensors
    of = Answers(*gradients[: len(Answers._fields)])  # pyright: ignore[reportArgumentType]
    if all(gradient is None for gradient in of):
        return padded(ctx)
    *needs, _, _, _ = ctx.needs_input_grad[:6]
    check_teacher("linear_softmax", ctx.needs_input_grad)
    if (scaled := _gradient_of_one(ctx, of, kept)) is not None:
        return padded(ctx, scaled)
    both = (kept, kept_teacher) if ctx.keeps == "logits" else (None, None)
    at = (*tensors, columns, statistics)
    return padded(ctx, *backward_of_answers(at, of, both, ctx.asked, ctx.terms, needs, ctx.memory))


def check_teacher(op: str, needs: Sequence[bool]) -> None:
    """Raise if the teacher's inputs, which follow the student's, require gradients."""
    if any(needs[3:6]):
        raise RuntimeError(
            f"{op}: expected a teacher that needs no gradient, got one that requires it; detach its inputs and weight"
        )


def backward_of_answers(
    saved: Sequence[Any],
    of: Answers,
    kept: tuple[Tensor | None, Tensor | None],
    asked: set[str],
    terms: Sequence[Any],
    needs: Sequence[bool],
    memory: int,
) -> tuple[Tensor | None, ...]:
    """Return (dx, dweight, dbias), each None where not needed, for incoming gradients `of` the answers.

    Args:
        saved: x, weight, bias, those of the teacher, columns and statistics.
        kept: the logits of student and teacher; None computes them again.
        terms: scale, cap, kind, beta, and the teacher's scale and cap.
    """
    *_, columns, statistics = saved
    upstream = {question: gradient for question, gradient in _incoming(of) if question in asked}
    made = coefficients(upstream, statistics, saved[1].shape[0])
    made = made._replace(columns=with_top(made.columns, of.top, columns))
    kept = (kept[0], None if of.divergence is None else kept[1])
    found = torch.ops.liger_compile.linear_softmax_backward.default(
        *saved, *made, of.divergence, *kept, *terms, *needs, memory
    )
    return tuple(grad if needed else None for grad, needed in zip(found, needs, strict=True))


def _incoming(of: Answers) -> Iterator[tuple[str, Tensor]]:
    """Yield the questions whose answers have an incoming gradient, and the gradient."""
    for question in QUESTIONS:
        if (gradient := getattr(of, question)) is not None:
            yield question, gradient


def _gradient_of_one(ctx: Any, of: Answers, kept: Tensor) -> Tensor | None:
    """Return dx if forward kept the gradient of the only answer that has an incoming gradient; otherwise None."""
    has_gradient = {name for name, gradient in of._asdict().items() if gradient is not None}
    if has_gradient != {ctx.keeps} or any(ctx.needs_input_grad[1:3]):
        return None
    if torch.is_grad_enabled():  # create_graph=True: autograd has no path from what was kept to x
        raise second_derivative_error("linear_softmax")
    upstream = getattr(of, ctx.keeps).reshape(kept.shape[:1])
    return times(kept, torch.where(upstream.isfinite(), upstream, float("nan")))


def with_top(at_index: Tensor | None, of_top: Tensor | None, columns: Tensor | None) -> Tensor | None:
    """Return the incoming gradients at all columns: those of the index, then those of the largest scores."""
    given = [gradient for gradient in (at_index, of_top) if gradient is not None]
    if columns is None or not given or columns.shape[-1] == sum(g.shape[-1] for g in given):
        return torch.cat(given, -1) if len(given) > 1 else next(iter(given), None)
    missing = columns.shape[-1] - given[0].shape[-1]
    return F.pad(given[0], (0, missing) if of_top is None else (missing, 0))


linear_softmax.register_autograd(_backward, setup_context=_setup_context)


class TeacherOf(NamedTuple):
    """The second head of a divergence, and which divergence it is (divergence.py)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    kind: str
    beta: float = 0.5
    logit_scale: float = 1.0
    softcap: float | None = None


# Many parameters because callers pass the few that they need by name.
def answers(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    questions: set[str],
    *,
    index: Tensor | None = None,
    top: int = 0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher: TeacherOf | None = None,
    memory: int = 0,
    keeps: str = "",
) -> Answers:
    """Return the answers for x (N, H), weight (V, H), and index (N, K), which questions about columns need.

    `top`: the number of largest scores per row to return, in descending order. Dtypes, and `keeps`: as above.
    """
    names = ",".join(question for question in QUESTIONS if question in questions)
    second = (None, None, None) if teacher is None else teacher[:3]
    terms = ("", 0.5, 1.0, None) if teacher is None else teacher[3:]
    found = torch.ops.liger_compile.linear_softmax.default(
        x, weight, bias, *second, index, names, top, logit_scale, softcap, *terms, memory, keeps
    )
    return Answers(*found[: len(Answers._fields)])
