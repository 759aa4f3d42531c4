"""What a chunk of logits of a linear layer has to do: answer questions about its softmax, and become their gradient.

linear_softmax.py has the shapes, the dtypes, and the questions. Its op answers all chunks, and another op computes the
gradients of all chunks, for incoming gradients of any kind. linear_softmax_loss.py does both for one chunk after the
other, because its loss determines the incoming gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import divergence
from .alignment import missing_columns, with_columns
from .blocks import split_rows
from .dispatch import has_kernel
from .linear_cross_entropy import CHUNK_BYTES, DEVICE_CHUNK_BYTES, device_logits
from .precision import accumulation_dtype
from .softmax_loss import SoftmaxLoss
from .softmax_questions import (
    OF_COLUMNS,
    QUESTIONS,
    STATISTICS,
    Coefficients,
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

    def logits(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Return the logits of rows; in the first columns of `out` (C, V or more), if it is given."""
        if self.is_kernel:
            return device_logits(self.x[rows], self.weight, self.bias, out)
        logits = F.linear(self.x[rows], self.weight, self.bias)
        return logits if out is None else out[:, : logits.shape[1]].copy_(logits)

    @property
    def numbers(self) -> tuple[float, float | None]:
        return self.form.logit_scale, self.form.softcap


class Teacher(NamedTuple):
    head: Head
    kind: str
    beta: float


Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def heads_of(
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


def share_of(x: Tensor, memory: int, chunks: int) -> int:
    """Return the memory of one of so many chunks; 0 stands for the default memory of a single chunk."""
    if chunks == 1:
        return memory
    return max((memory or (CHUNK_BYTES if x.device.type == "cpu" else DEVICE_CHUNK_BYTES)) // chunks, 1)


def names_of(questions: str) -> set[str]:
    return set(filter(None, questions.split(",")))


class Made(NamedTuple):
    """The answers, the columns (N, K + k) of `top`, and statistics (9, N) for the gradient."""

    answers: Answers
    columns: Tensor
    statistics: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.answers, self.columns, self.statistics)


def empty_made(x: Tensor, index: Tensor | None, teacher_x: Tensor | None, asked: set[str], top: int) -> Made:
    """Return tensors without values."""
    rows, wide = x.shape[0], accumulation_dtype(x.dtype)
    if teacher_x is not None:
        wide = torch.promote_types(wide, accumulation_dtype(teacher_x.dtype))

    def shape(question: str) -> tuple[Any, ...]:
        if question not in asked:
            return (0,)
        return (rows, index.shape[1]) if question in OF_COLUMNS and index is not None else (rows,)

    answers = [
        x.new_empty(shape(question), dtype=torch.int64 if question == "argmax" else wide)
        for question in QUESTIONS
    ]
    of_top, columns = (rows, top) if top else (0,), (0,)
    if top:
        columns = (rows, top + (0 if index is None else index.shape[1]))
    answers += [x.new_empty(of_top, dtype=wide), x.new_empty(of_top, dtype=torch.int64)]
    answers.append(x.new_empty((0,) if teacher_x is None else (rows,), dtype=wide))
    statistics = x.new_empty((STATISTICS + divergence.STATISTICS, rows), dtype=wide)
    return Made(Answers(*answers), x.new_empty(columns, dtype=torch.int64), statistics)


@dataclass(frozen=True)
class Asking:
    """Questions about a student, and a divergence from a teacher, if any. index is (N, K)."""

    student: Head
    teacher: Teacher | None
    index: Tensor | None
    asked: set[str]
    top: int

    def answer(self, chunk: slice, logits: Tensor, made: Made, out: Tensor | None = None) -> Tensor | None:
        """Write the answers of a chunk, from its logits (C, V). Return the logits of the teacher, if any, in `out`."""
        student, answers = self.student, made.answers
        of_chunk = {
            question: getattr(answers, question)[chunk] for question in QUESTIONS if question in self.asked
        }
        answer = _kernel_answers if student.is_kernel else reference_answers
        picked = None if self.index is None else self.index[chunk]
        answer(student.form, logits, picked, of_chunk, made.statistics[:STATISTICS, chunk])
        if self.top:
            values, columns = logits.topk(self.top)
            answers.top_columns[chunk], answers.top[chunk] = columns, student.form.scores(values)
            made.columns[chunk] = columns if picked is None else torch.cat((picked, columns), -1)
        if self.teacher is None:
            return None
        of_teacher = self.teacher.head.logits(chunk, out)
        both = logits, of_teacher
        _answer_divergence(student, self.teacher, both, chunk, answers.divergence, made.statistics)
        return of_teacher


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
    student: Head,
    teacher: Teacher,
    both: tuple[Tensor, Tensor],
    chunk: slice,
    out: Tensor,
    statistics: Tensor,
) -> None:
    """Write the divergence of a chunk, and its statistics. `both` are the logits of student and teacher."""
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
    student: Head, teacher: Teacher, both: tuple[Tensor, Tensor], upstream: Tensor, statistics: Tensor
) -> None:
    """Overwrite the student's logits of a chunk by the gradient of the divergence."""
    if not student.is_kernel:
        forms = student.form, teacher.head.form
        divergence.reference_gradient_(teacher.kind, teacher.beta, forms, both, upstream, statistics)
        return
    from ..kernels import divergence as kernels

    numbers = student.numbers, teacher.head.numbers
    kernels.gradient_(teacher.kind, teacher.beta, numbers, both, upstream, statistics)


def gradient_of_chunk(
    student: Head,
    teacher: Teacher | None,
    both: tuple[Tensor, Tensor | None],
    columns: Tensor | None,
    statistics: Tensor,
    made: Coefficients,
    of_divergence: Tensor | None,
) -> Tensor:
    """Return the gradient of the student's logits of a chunk, and overwrite them. All arguments are of the chunk.

    `both` are the logits of student and teacher, `columns` those of made.columns. With both questions and a divergence,
    the gradients of both are rounded before they are added.
    """
    logits, of_teacher = both
    has_questions = any(part is not None for part in made)
    of_pair = None
    if teacher is not None and of_teacher is not None and of_divergence is not None:
        of_pair = logits.clone() if has_questions else logits
        of_both = of_pair, of_teacher
        _divergence_gradient_(student, teacher, of_both, of_divergence, statistics[STATISTICS:])
    if has_questions:
        picked = None if made.columns is None else columns
        gradient_ = _kernel_gradient_ if student.is_kernel else reference_gradient_
        gradient_(student.form, logits, picked, statistics[:STATISTICS], made)
        logits = logits if of_pair is None else logits.add_(of_pair)
    elif of_pair is None:
        logits.zero_()
    return logits
