"""A linear layer to logits, and the answers to questions about their softmax, without the logits of the whole batch.

    logits = x @ weight^T + bias            rounded to the dtype of x, as F.linear rounds them
    answers of softmax_questions.py: log-probabilities of tokens, entropy, logsumexp, ...

    x (N, H), weight (V, H), bias (V) or None, index (N, K) or None
    -> the answers, each empty if it was not asked; columns (N, K + k) of `top`; and statistics (4, N) for backward

Forward computes the logits of one chunk of rows after the other, and reads them once. Each answer of each row has its
own incoming gradient, so backward computes the logits of a chunk again, replaces them by their gradient, and multiplies
that with weight and x: four matmuls in all, two if weight needs no gradient and one in forward without gradients.
linear_cross_entropy.py has the chunks, their memory, and the sums of the gradients.

Dtypes: x, weight and bias have one dtype. The answers, their gradients, and all values in between are in float32
(float64 for float64), except that the gradient of the logits is rounded to the dtype of x for its matmuls, as in eager
code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .alignment import missing_columns, with_columns
from .blocks import split_rows
from .dispatch import has_kernel
from .linear_cross_entropy import chunks_of, device_logits, gradients_by_chunk, unscaled
from .precision import accumulation_dtype
from .registration import opaque_op, padded
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
    """The answers by question, and those of `top`; each is empty if it was not asked."""

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


def _empty(x: Tensor, index: Tensor | None, asked: set[str], top: int) -> list[Tensor]:
    """Return new tensors for Answers, columns and statistics."""
    rows, wide = x.shape[0], accumulation_dtype(x.dtype)

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
    return [*made, x.new_empty(columns, dtype=torch.int64), x.new_empty((STATISTICS, rows), dtype=wide)]


@opaque_op
def linear_softmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    questions: str,
    top: int,
    logit_scale: float,
    softcap: float | None,
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
]:
    """Return Answers to the questions, whose names are separated by commas; then columns and statistics."""
    asked = set(filter(None, questions.split(",")))
    made = _empty(x, index, asked, top)
    *answers, of_top, top_columns, columns, statistics = made
    statistics.zero_()
    form, is_kernel = scores_of(logit_scale, softcap), has_kernel(x, weight, bias)
    if missing := missing_columns(x):
        x, weight = with_columns(x, missing), with_columns(weight, missing)
    for chunk in chunks_of(x, weight, False, memory):
        logits = _logits(x[chunk], weight, bias, is_kernel)
        picked = None if index is None else index[chunk]
        of_chunk = {
            question: answer[chunk]
            for question, answer in zip(QUESTIONS, answers, strict=True)
            if question in asked
        }
        if is_kernel:
            _kernel_answers(form, logits, picked, of_chunk, statistics[:, chunk])
        else:
            reference_answers(form, logits, picked, of_chunk, statistics[:, chunk])
        if top:
            values, top_columns[chunk] = logits.topk(top)
            of_top[chunk] = form.scores(values)
        del logits
    if top:
        columns.copy_(top_columns if index is None else torch.cat((index, top_columns), -1))
    return tuple(made)  # pyright: ignore[reportReturnType]


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, is_kernel: bool) -> Tensor:
    return device_logits(x, weight, bias) if is_kernel else F.linear(x, weight, bias)


def _kernel_answers(
    form: Any, logits: Tensor, index: Tensor | None, answers: dict[str, Tensor], statistics: Tensor
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


def _first_argmax(form: Any, logits: Tensor) -> Tensor:
    """Return the first column of the largest score of each row (C), with the ties that the cap makes."""
    from ..kernels import softmax_questions as kernels

    if form.softcap is None:
        return kernels.argmax(logits, form.logit_scale)
    blocks = split_rows(len(logits), CAPPED_ROWS)
    return torch.cat([form.scores(logits[rows]).argmax(-1) for rows in blocks])


@linear_softmax.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    index: Any,
    questions: str,
    top: int,
    logit_scale: float,
    softcap: Any,
    memory: int = 0,
) -> tuple[Tensor, ...]:
    return tuple(_empty(x, index, set(filter(None, questions.split(","))), top))


@opaque_op
def linear_softmax_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor | None,
    statistics: Tensor,
    through: Tensor | None,
    tilt: Tensor | None,
    twice: Tensor | None,
    level: Tensor | None,
    at_columns: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    memory: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias), each empty where not needed."""
    form, is_kernel = scores_of(logit_scale, softcap), has_kernel(x, weight, bias)
    made = Coefficients(through, tilt, twice, level, at_columns)
    needs = needs_dx, needs_dweight, needs_dbias

    def on_chunk(chunk: slice, rows: Tensor, weight: Tensor, dbias_sum: Tensor) -> Tensor:
        logits = _logits(rows, weight, bias, is_kernel)
        picked = None if columns is None or at_columns is None else columns[chunk]
        gradient_ = _kernel_gradient_ if is_kernel else reference_gradient_
        gradient_(form, logits, picked, statistics[:, chunk], made.at(chunk))
        if dbias_sum.numel():
            dbias_sum.add_(logits.sum(0, dtype=dbias_sum.dtype))
        return logits

    return unscaled(gradients_by_chunk(x, weight, 1.0, needs, memory, on_chunk), x.dtype)


def _kernel_gradient_(
    form: Any, logits: Tensor, index: Tensor | None, statistics: Tensor, made: Coefficients
) -> None:
    """Do the same as the reference."""
    from ..kernels import softmax_questions as kernels

    exact = None if index is None else gradient_at_columns(form, logits, index, statistics, made)
    kernels.gradient_(logits, statistics, made[:4], form.logit_scale, form.softcap)
    if index is not None and exact is not None:
        logits.scatter_(-1, index, exact.to(logits.dtype))


@linear_softmax_backward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    columns: Any,
    statistics: Tensor,
    through: Any,
    tilt: Any,
    twice: Any,
    level: Any,
    at_columns: Any,
    logit_scale: float,
    softcap: Any,
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
    x, weight, bias, index, questions, top, ctx.logit_scale, ctx.softcap, ctx.memory = inputs
    *answers, columns, statistics = output
    found = Answers(*answers)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(found.argmax, found.top_columns, columns, statistics)
    ctx.asked = set(filter(None, questions.split(",")))
    ctx.save_for_backward(x, weight, bias, columns if top else index, statistics)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, columns, statistics = ctx.saved_tensors
    of = Answers(*gradients[: len(Answers._fields)])  # pyright: ignore[reportArgumentType]
    upstream = {
        question: gradient
        for question in QUESTIONS
        if question in ctx.asked and (gradient := getattr(of, question)) is not None
    }
    if not upstream and of.top is None:
        return padded(ctx)
    at_index = upstream.keys() & set(OF_COLUMNS)
    made = coefficients(upstream, statistics, weight.shape[0], None)
    made = made._replace(columns=_with_top(made.columns if at_index else None, of.top, columns))
    needs_dx, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad
    needs = needs_dx, needs_dweight, needs_dbias
    found = torch.ops.liger_compile.linear_softmax_backward.default(
        x, weight, bias, columns, statistics, *made, ctx.logit_scale, ctx.softcap, *needs, ctx.memory
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
    memory: int = 0,
) -> Answers:
    """Return the answers for x (N, H), weight (V, H), and index (N, K), which questions about columns need.

    `top`: the number of largest scores per row to return, in descending order. Dtypes: as above.
    """
    names = ",".join(question for question in QUESTIONS if question in questions)
    *found, _, _ = torch.ops.liger_compile.linear_softmax.default(
        x, weight, bias, index, names, top, logit_scale, softcap, memory
    )
    return Answers(*found)
