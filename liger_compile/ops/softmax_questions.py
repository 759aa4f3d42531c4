"""Questions about the softmax of rows of logits, and the gradient of any set of answers: plain PyTorch.

    z    = softcap * tanh(logit_scale * logits / softcap)         without softcap: logit_scale * logits
    logp = log_softmax(z), p = exp(logp)

    log_probabilities  logp at the given columns (C, K)       scores     z at the given columns (C, K)
    logsumexp          of z (C)                               entropy    -sum(p * logp) (C)
    mean_score         sum(p * z) (C)                         collision  sum(p^2) (C)
    score_sum          sum(z) (C)                             log_probability_sum   sum(logp) (C)
    argmax             the first column of the largest z (C)  top        the k largest z and their columns (C, k)

For logits (C, V). All computation is in float32 (float64 for float64 logits), from the rounded logits. A logit of -inf
makes entropy and mean_score NaN, as 0 * inf does in eager code.

Whatever the set of questions and their incoming gradients, the gradient of the scores of a row has one form, in which
each question adds to the coefficients of the row (`coefficients`):

    dz = p * (through + tilt * logp + twice * p) + level, plus the incoming gradients at the given columns
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import row_blocks
from .softmax_loss import SoftmaxLoss

QUESTIONS = (
    "log_probabilities",
    "scores",
    "logsumexp",
    "entropy",
    "mean_score",
    "score_sum",
    "log_probability_sum",
    "collision",
    "argmax",
)
OF_COLUMNS = ("log_probabilities", "scores")
NEEDS_P = ("entropy", "mean_score", "collision")
# Rows of the saved statistics (STATISTICS, N): z's maximum, log(sum(exp(z - maximum))), entropy, collision.
STATISTICS = 4


class Coefficients(NamedTuple):
    """The gradient of the scores of rows: see above. Each is (C), or None for 0; `columns` is (C, K)."""

    through: Tensor | None
    tilt: Tensor | None
    twice: Tensor | None
    level: Tensor | None
    columns: Tensor | None

    def at(self, rows: slice) -> Coefficients:
        return Coefficients(*(None if value is None else value[rows] for value in self))


def scores_of(logit_scale: float, softcap: float | None) -> SoftmaxLoss:
    """Return the function from logits to scores, in the form that the losses share."""
    return SoftmaxLoss(None, -100, 0.0, logit_scale, softcap, 0.0)


def reference_answers(
    form: SoftmaxLoss, logits: Tensor, index: Tensor | None, answers: dict[str, Tensor], statistics: Tensor
) -> None:
    """Write the answers for logits (C, V) into `answers`, by question, and statistics (STATISTICS, C)."""
    for rows in row_blocks(*logits.shape):
        z = form.scores(logits[rows])
        logp = torch.log_softmax(z, -1)
        row_max, log_sum = form.statistics(z, logp)
        found = {"logsumexp": row_max + log_sum}
        if any(question in answers for question in NEEDS_P):
            p = logp.exp()
            found["entropy"] = -(p * logp).sum(-1)
            found["mean_score"] = (p * z).sum(-1) if "mean_score" in answers else row_max
            found["collision"] = p.square_().sum(-1)
        for question, values in (("score_sum", z), ("log_probability_sum", logp)):
            if question in answers:
                found[question] = values.sum(-1)
        if "argmax" in answers:
            found["argmax"] = z.argmax(-1)
        if index is not None:
            for question, values in (("scores", z), ("log_probabilities", logp)):
                if question in answers:
                    found[question] = values.gather(-1, index[rows])
        statistics[0, rows], statistics[1, rows] = row_max, log_sum
        for at, question in enumerate(("entropy", "collision"), 2):
            if question in found:
                statistics[at, rows] = found[question]
        for question, answer in answers.items():
            answer[rows] = found[question]


def coefficients(upstream: dict[str, Tensor], statistics: Tensor, classes: int) -> Coefficients:
    """Return the coefficients for incoming gradients, by question."""
    entropy, collision = statistics[2], statistics[3]
    through: list[Tensor] = []
    tilt: list[Tensor] = []
    twice: list[Tensor] = []
    level: list[Tensor] = []
    columns: list[Tensor] = []
    for question, gradient in upstream.items():
        if question == "log_probabilities":
            through.append(-gradient.sum(-1))
            columns.append(gradient)
        elif question == "scores":
            columns.append(gradient)
        elif question == "logsumexp":
            through.append(gradient)
        elif question == "entropy":
            through.append(-gradient * entropy)
            tilt.append(-gradient)
        elif question == "mean_score":  # z - sum(p * z) is logp + entropy
            through.append(gradient * (1 + entropy))
            tilt.append(gradient)
        elif question == "score_sum":
            level.append(gradient)
        elif question == "log_probability_sum":
            level.append(gradient)
            through.append(-gradient * classes)
        elif question == "collision":
            through.append(-2 * gradient * collision)
            twice.append(2 * gradient)
    return Coefficients(*map(_sum, (through, tilt, twice, level, columns)))


def _sum(addends: list[Tensor]) -> Tensor | None:
    total = None
    for addend in addends:
        total = addend if total is None else total + addend
    return total


def dscores(logp: Tensor, made: Coefficients) -> Tensor:
    """Return the gradient of scores with these logp (C, ...), without the incoming gradients at columns.

    Where p is 0, only questions that multiply logp by p themselves give NaN.
    """
    p = logp.exp()
    total = p.new_zeros(p.shape[:1])
    total = _wide(total if made.through is None else made.through)
    if made.tilt is not None:
        total = total + _wide(made.tilt) * logp
    if made.twice is not None:
        total = total + _wide(made.twice) * p
    total = total * p
    return total if made.level is None else total + _wide(made.level)


def _wide(of_rows: Tensor) -> Tensor:
    return of_rows.unsqueeze(-1)


def reference_gradient_(
    form: SoftmaxLoss, logits: Tensor, index: Tensor | None, statistics: Tensor, made: Coefficients
) -> None:
    """Overwrite logits (C, V) by the gradient of the logits."""
    for rows in row_blocks(*logits.shape):
        block, part = logits[rows], made.at(rows)
        logp = form.scores(block).sub_(statistics[0, rows, None]).sub_(statistics[1, rows, None])
        gradient = dscores(logp, part)
        if index is not None and part.columns is not None:
            gradient.scatter_add_(-1, index[rows], part.columns)
        slope = form.slope(block)
        logits[rows] = gradient if isinstance(slope, float) and slope == 1.0 else gradient * slope


def gradient_at_columns(
    form: SoftmaxLoss, logits: Tensor, index: Tensor, statistics: Tensor, made: Coefficients
) -> Tensor:
    """Return the gradient of the logits at columns (C, K), with the incoming gradients of equal columns summed.

    A kernel rounds the other elements. These are computed before, in full precision: where p is almost 1, the sum of
    two rounded parts would have no correct digits.
    """
    assert made.columns is not None
    picked = logits.gather(-1, index)
    logp = form.scores(picked).sub_(statistics[0, :, None]).sub_(statistics[1, :, None])
    incoming = made.columns
    if index.shape[-1] > 1:
        is_same = index.unsqueeze(-1) == index.unsqueeze(-2)
        incoming = torch.where(is_same, incoming.unsqueeze(-2), 0).sum(-1)
    return (dscores(logp, made) + incoming) * form.slope(picked)
