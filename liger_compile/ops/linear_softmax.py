"""A linear layer to logits, and the answers to questions about their softmax, without the logits of the whole batch.

    logits = x @ weight^T + bias            rounded to the dtype of x, as F.linear rounds them
    answers of softmax_questions.py: log-probabilities of tokens, entropy, logsumexp, ...
    a divergence of divergence.py from the softmax of a second linear layer, the teacher

    x (N, H), weight (V, H), bias (V) or None, index (N, K) or None;
    teacher_x (N, I), teacher_weight (V, I), teacher_bias (V), or None
    -> the answers, each empty if it was not asked; columns (N, K + k) of `top`; and statistics (9, N) for backward

Forward computes the logits of one chunk of rows after the other. Each answer of each row has its own incoming gradient,
so backward computes the logits of a chunk again, replaces them by their gradient, and multiplies that with weight and
x: four matmuls in all, two if weight needs no gradient and one in forward without gradients; a teacher adds two. The
teacher's inputs get no gradients. linear_cross_entropy.py has the chunks, their memory, and the sums of the gradients.
The logits of student and teacher share the memory of a chunk.

Dtypes: x, weight and bias have one dtype, and so have those of the teacher. The answers, their gradients, and all
values in between are in float32 (float64 for float64), except that the gradient of the logits is rounded to the dtype
of x for its matmuls, as in eager code. With both questions and a divergence, the gradients of both are rounded before
they are added, as eager code adds the gradients of two readers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import divergence
from .alignment import missing_columns, with_columns
from .blocks import split_rows
from .dispatch import has_kernel
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
from .softmax_loss import SoftmaxLoss
from .softmax_questions import (
    OF_COLUMNS,
    QUESTIONS,
    STATISTICS,
    Coefficients,
    coefficients,
    gradient_at_columns,
    reference_answers,
    reference_gradient_,
    scores_of,
)

CAPPED_ROWS = 128  # of which a float32 copy is made at a time for an argmax of capped scores


class Answers(NamedTuple):
    """The answers by question, those of `top`, and the divergence; each is empty if it was not asked."""

    log_probabilities: Tensor
    scores: Tensor
    logsumexp: Tensor
    entropy: Tensor
    mean_score: Tensor
    score_sum: Tensor
    log_probability_sum: Tensor
    collision: Tensor
    argmax: Tensor
    top: Tensor
    top_columns: Tensor
    divergence: Tensor


class Head(NamedTuple):
    """The input of a linear layer (N, H), its weight (V, H) and bias (V), and the function from logits to scores."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    form: SoftmaxLoss
    is_kernel: bool

    def aligned(self) -> Head:
        missing = missing_columns(self.x)
        if not missing:
            return self
        return self._replace(x=with_columns(self.x, missing), weight=with_columns(self.weight, missing))

    def logits(self, rows: slice) -> Tensor:
        if self.is_kernel:
            return device_logits(self.x[rows], self.weight, self.bias)
        return F.linear(self.x[rows], self.weight, self.bias)

    @property
    def numbers(self) -> tuple[float, float | None]:
        return self.form.logit_scale, self.form.softcap


class Teacher(NamedTuple):
    head: Head
    kind: str
    beta: float


Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _heads(
    tensors: Tensors,
    kind: str,
    beta: float,
    scales: tuple[float, float],
    caps: tuple[float | None, float | None],
) -> tuple[Head, Teacher | None]:
    """Return student and teacher: `tensors` are x, weight and bias of each."""
    x, weight, bias, teacher_x, teacher_weight, teacher_bias = tensors
    is_kernel = has_kernel(*tensors)
    student = Head(x, weight, bias, scores_of(scales[0], caps[0]), is_kernel)
    if teacher_x is None or teacher_weight is None:
        return student, None
    head = Head(teacher_x, teacher_weight, teacher_bias, scores_of(scales[1], caps[1]), is_kernel)
    return student, Teacher(head.aligned(), kind, beta)


def _share(x: Tensor, memory: int, chunks: int) -> int:
    """Return the memory of one of so many chunks; 0 stands for the default memory of a single chunk."""
    if chunks == 1:
        return memory
    return max((memory or (CHUNK_BYTES if x.device.type == "cpu" else DEVICE_CHUNK_BYTES)) // chunks, 1)


def _names(questions: str) -> set[str]:
    return set(filter(None, questions.split(",")))


def _empty(
    x: Tensor, index: Tensor | None, teacher_x: Tensor | None, asked: set[str], top: int
) -> list[Tensor]:
    """Return new tensors for Answers, columns and statistics."""
    rows, wide = x.shape[0], accumulation_dtype(x.dtype)
    if teacher_x is not None:
        wide = torch.promote_types(wide, accumulation_dtype(teacher_x.dtype))

    def shape(question: str) -> tuple[Any, ...]:
        if question not in asked:
            return (0,)
        return (rows, index.shape[1]) if question in OF_COLUMNS and index is not None else (rows,)

    made = [
        x.new_empty(shape(question), dtype=torch.int64 if question == "argmax" else wide)
        for question in QUESTIONS
    ]
    of_top, columns = (rows, top) if top else (0,), (0,)
    if top:
        columns = (rows, top + (0 if index is None else index.shape[1]))
    made += [x.new_empty(of_top, dtype=wide), x.new_empty(of_top, dtype=torch.int64)]
    made.append(x.new_empty((0,) if teacher_x is None else (rows,), dtype=wide))
    statistics = x.new_empty((STATISTICS + divergence.STATISTICS, rows), dtype=wide)
    return [*made, x.new_empty(columns, dtype=torch.int64), statistics]


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
]:
    """Return Answers to the questions, whose names are separated by commas; then columns and statistics."""
    asked = _names(questions)
    made = _empty(x, index, teacher_x, asked, top)
    *answers, of_top, top_columns, of_teacher, columns, statistics = made
    statistics.zero_()
    tensors = x, weight, bias, teacher_x, teacher_weight, teacher_bias
    student, teacher = _heads(tensors, kind, beta, (logit_scale, teacher_scale), (softcap, teacher_softcap))
    student = student.aligned()
    for chunk in chunks_of(student.x, weight, False, _share(x, memory, 1 if teacher is None else 2)):
        logits = student.logits(chunk)
        of_chunk = {
            question: answer[chunk]
            for question, answer in zip(QUESTIONS, answers, strict=True)
            if question in asked
        }
        answer = _kernel_answers if student.is_kernel else reference_answers
        picked = None if index is None else index[chunk]
        answer(student.form, logits, picked, of_chunk, statistics[:STATISTICS, chunk])
        if top:
            values, top_columns[chunk] = logits.topk(top)
            of_top[chunk] = student.form.scores(values)
        if teacher is not None:
            _answer_divergence(student, teacher, logits, chunk, of_teacher, statistics)
        del logits  # before the logits of the next chunk are allocated
    if top:
        columns.copy_(top_columns if index is None else torch.cat((index, top_columns), -1))
    return tuple(made)  # pyright: ignore[reportReturnType]


def _kernel_answers(
    form: SoftmaxLoss, logits: Tensor, index: Tensor | None, answers: dict[str, Tensor], statistics: Tensor
) -> None:
    """Do the same as the reference."""
    from ..kernels import softmax_questions as kernels

    found = kernels.statistics(logits, form.logit_scale, form.softcap, set(answers))
    statistics.copy_(found[:STATISTICS])
    row_max, log_sum, entropy, collision, score_sum, log_probability_sum = found
    if index is not None and not answers.keys().isdisjoint(OF_COLUMNS):
        scores = form.scores(logits.gather(-1, index))
        if "scores" in answers:
            answers["scores"].copy_(scores)
        if "log_probabilities" in answers:
            answers["log_probabilities"].copy_(scores.sub(row_max[:, None]).sub_(log_sum[:, None]))
    of_rows = {
        "logsumexp": lambda: row_max + log_sum,
        "entropy": lambda: entropy,
        "mean_score": lambda: row_max + (log_sum - entropy),
        "collision": lambda: collision,
        "score_sum": lambda: score_sum,
        "log_probability_sum": lambda: log_probability_sum,
        "argmax": lambda: _first_argmax(form, logits),
    }
    for question in answers.keys() - set(OF_COLUMNS):
        answers[question].copy_(of_rows[question]())


def _first_argmax(form: SoftmaxLoss, logits: Tensor) -> Tensor:
    """Return the first column of the largest score of each row (C), with the ties that the cap makes."""
    from ..kernels import softmax_questions as kernels

    if form.softcap is None:
        return kernels.argmax(logits, form.logit_scale)
    blocks = split_rows(len(logits), CAPPED_ROWS)
    return torch.cat([form.scores(logits[rows]).argmax(-1) for rows in blocks])


def _answer_divergence(
    student: Head, teacher: Teacher, logits: Tensor, chunk: slice, out: Tensor, statistics: Tensor
) -> None:
    """Write the divergence of a chunk, and its statistics."""
    both = logits, teacher.head.logits(chunk)
    of_student, of_pair = statistics[:STATISTICS, chunk], statistics[STATISTICS:, chunk]
    of_pair[:2] = of_student[:2]
    forms = student.form, teacher.head.form
    if not student.is_kernel:
        divergence.reference_divergence(teacher.kind, teacher.beta, forms, both, out[chunk], of_pair)
        return
    from ..kernels import divergence as kernels
    from ..kernels import softmax_questions

    found = softmax_questions.statistics(both[1], *teacher.head.numbers, frozenset())
    of_pair[2:4] = found[:2]
    numbers = student.numbers, teacher.head.numbers
    out[chunk], of_pair[4] = kernels.divergence(teacher.kind, teacher.beta, numbers, both, of_pair)


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
) -> tuple[Tensor, ...]:
    return tuple(_empty(x, index, teacher_x, _names(questions), top))


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
    has_questions, needs = any(part is not None for part in made), (needs_dx, needs_dweight, needs_dbias)
    tensors = x, weight, bias, teacher_x, teacher_weight, teacher_bias
    student, teacher = _heads(tensors, kind, beta, (logit_scale, teacher_scale), (softcap, teacher_softcap))
    if of_divergence is None:
        teacher = None

    def on_chunk(chunk: slice, rows: Tensor, weight: Tensor, dbias_sum: Tensor) -> Tensor:
        logits = student._replace(x=rows, weight=weight).logits(slice(None))
        of_teacher = None
        if teacher is not None and of_divergence is not None:
            of_teacher = logits.clone() if has_questions else logits
            _divergence_gradient_(
                student, teacher, of_teacher, chunk, of_divergence[chunk], statistics[STATISTICS:, chunk]
            )
        if has_questions:
            picked = None if columns is None or at_columns is None else columns[chunk]
            gradient_ = _kernel_gradient_ if student.is_kernel else reference_gradient_
            gradient_(student.form, logits, picked, statistics[:STATISTICS, chunk], made.at(chunk))
            logits = logits if of_teacher is None else logits.add_(of_teacher)
        if dbias_sum.numel():
            dbias_sum.add_(logits.sum(0, dtype=dbias_sum.dtype))
        return logits

    share = _share(x, memory, 1 if teacher is None else 2 + has_questions)
    return unscaled(gradients_by_chunk(x, weight, 1.0, needs, share, on_chunk), x.dtype)


def _kernel_gradient_(
    form: SoftmaxLoss, logits: Tensor, index: Tensor | None, statistics: Tensor, made: Coefficients
) -> None:
    """Do the same as the reference."""
    from ..kernels import softmax_questions as kernels

    exact = None if index is None else gradient_at_columns(form, logits, index, statistics, made)
    kernels.gradient_(logits, statistics, made[:4], form.logit_scale, form.softcap)
    if index is not None and exact is not None:
        logits.scatter_(-1, index, exact.to(logits.dtype))


def _divergence_gradient_(
    student: Head, teacher: Teacher, logits: Tensor, chunk: slice, upstream: Tensor, statistics: Tensor
) -> None:
    """Overwrite the student's logits of a chunk by the gradient of the divergence."""
    both = logits, teacher.head.logits(chunk)
    if not student.is_kernel:
        forms = student.form, teacher.head.form
        divergence.reference_gradient_(teacher.kind, teacher.beta, forms, both, upstream, statistics)
        return
    from ..kernels import divergence as kernels

    numbers = student.numbers, teacher.head.numbers
    kernels.gradient_(teacher.kind, teacher.beta, numbers, both, upstream, statistics)


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
    *tensors, index, questions, top, scale, cap, kind, beta, teacher_scale, teacher_cap, ctx.memory = inputs
    *answers, columns, statistics = output
    found = Answers(*answers)
    ctx.terms = scale, cap, kind, beta, teacher_scale, teacher_cap
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(found.argmax, found.top_columns, columns, statistics)
    ctx.asked = _names(questions)
    ctx.save_for_backward(*tensors, columns if top else index, statistics)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, columns, statistics = ctx.saved_tensors
    of = Answers(*gradients[: len(Answers._fields)])  # pyright: ignore[reportArgumentType]
    upstream = {
        question: gradient
        for question in QUESTIONS
        if question in ctx.asked and (gradient := getattr(of, question)) is not None
    }
    if not upstream and of.top is None and of.divergence is None:
        return padded(ctx)
    needs_dx, needs_dweight, needs_dbias, *of_others = ctx.needs_input_grad
    if any(of_others):
        raise RuntimeError(
            "linear_softmax: expected a teacher that needs no gradient, got one that requires it; detach its inputs "
            "and weight"
        )
    made = coefficients(upstream, statistics, tensors[1].shape[0])
    made = made._replace(columns=_with_top(made.columns, of.top, columns))
    needs = needs_dx, needs_dweight, needs_dbias
    found = torch.ops.liger_compile.linear_softmax_backward.default(
        *tensors, columns, statistics, *made, of.divergence, *ctx.terms, *needs, ctx.memory
    )
    dx, dweight, dbias = (grad if needed else None for grad, needed in zip(found, needs, strict=True))
    return padded(ctx, dx, dweight, dbias)


def _with_top(at_index: Tensor | None, of_top: Tensor | None, columns: Tensor | None) -> Tensor | None:
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
) -> Answers:
    """Return the answers for x (N, H), weight (V, H), and index (N, K), which questions about columns need.

    `top`: the number of largest scores per row to return, in descending order. Dtypes: as above.
    """
    names = ",".join(question for question in QUESTIONS if question in questions)
    second = (None, None, None) if teacher is None else teacher[:3]
    terms = ("", 0.5, 1.0, None) if teacher is None else teacher[3:]
    *found, _, _ = torch.ops.liger_compile.linear_softmax.default(
        x, weight, bias, *second, index, names, top, logit_scale, softcap, *terms, memory
    )
    return Answers(*found)
