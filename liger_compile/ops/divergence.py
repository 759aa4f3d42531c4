"""Divergences of the softmax of two blocks of logits, and their gradient with respect to the first: plain PyTorch.

    s = log_softmax(z of the student), t = log_softmax(z of the teacher)        (C, V), z as in softmax_questions.py

    cross           sum(exp(t) * s)
    finite_cross    the same, without the classes whose student's logit is infinite
    forward         sum(exp(t) * (t - s))                    KL of the teacher's from the student's
    plain_forward   the same, with 0 for a class whose exp(t) is 0, as F.kl_div has it without log_target
    reverse         sum(exp(s) * (s - t))
    jensen_shannon  beta * sum(exp(t) * (t - m)) + (1 - beta) * sum(exp(s) * (s - m)),
                    m = log(beta * exp(t) + (1 - beta) * exp(s))

A gradient needs one more number of each row besides the statistics of both: `rest`.

    cross           exp(t) - exp(s) * rest                   rest = sum(exp(t)), of the classes that count
    forward         exp(s) - exp(t)
    reverse         exp(s) * (s - t - rest)                  rest = the divergence
    jensen_shannon  (1 - beta) * exp(s) * (s - m - rest)     rest = sum(exp(s) * (s - m))

All computation is in float32 (float64 for float64 logits).

Sources: Hinton et al. 2015 (arXiv 1503.02531); Agarwal et al. 2023 (generalized knowledge distillation, arXiv
2306.13649).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import row_blocks
from .softmax_loss import SoftmaxLoss

KINDS = ("cross", "finite_cross", "forward", "plain_forward", "reverse", "jensen_shannon")
STATISTICS = 5  # maximum and log_sum of the student's scores, the same of the teacher's, rest


def mixture(s: Tensor, t: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))


def terms(kind: str, s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the divergence (C) and rest (C)."""
    if kind in ("cross", "finite_cross"):
        p = t.exp()
        if kind == "finite_cross":
            p, s = (value.masked_fill(s.isinf(), 0) for value in (p, s))
        return (p * s).sum(-1), p.sum(-1)
    if kind == "forward":
        made = (t.exp() * (t - s)).sum(-1)
        return made, made
    if kind == "plain_forward":
        p = t.exp()
        made = (torch.where(p == 0, 0, p * t) - p * s).sum(-1)
        return made, made
    if kind == "reverse":
        made = (s.exp() * (s - t)).sum(-1)
        return made, made
    m = mixture(s, t, beta)
    rest = (s.exp() * (s - m)).sum(-1)
    return beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * rest, rest


def gradient(kind: str, s: Tensor, t: Tensor, beta: float, rest: Tensor) -> Tensor:
    """Return the gradient of the divergence with respect to the student's scores (C, V)."""
    rest = rest.unsqueeze(-1)
    if kind in ("cross", "finite_cross"):
        p = t.exp() if kind == "cross" else t.exp().masked_fill(s.isinf(), 0)
        return p - s.exp() * rest
    if kind in ("forward", "plain_forward"):
        return s.exp() - t.exp()
    if kind == "reverse":
        return s.exp() * (s - t - rest)
    return s.exp() * (s - mixture(s, t, beta) - rest) * (1 - beta)


def reference_divergence(
    kind: str,
    beta: float,
    forms: tuple[SoftmaxLoss, SoftmaxLoss],
    logits: tuple[Tensor, Tensor],
    out: Tensor,
    statistics: Tensor,
) -> None:
    """Write the divergence (C) of logits (C, V) of student and teacher, and statistics (STATISTICS, C)."""
    for rows in row_blocks(*logits[0].shape):
        logp = []
        for at, (form, part) in enumerate(zip(forms, logits, strict=True)):
            z = form.scores(part[rows])
            logp.append(torch.log_softmax(z, -1))
            statistics[2 * at, rows], statistics[2 * at + 1, rows] = form.statistics(z, logp[-1])
        out[rows], statistics[4, rows] = terms(kind, logp[0], logp[1], beta)


def reference_gradient_(
    kind: str,
    beta: float,
    forms: tuple[SoftmaxLoss, SoftmaxLoss],
    logits: tuple[Tensor, Tensor],
    upstream: Tensor,
    statistics: Tensor,
) -> None:
    """Overwrite the student's logits (C, V) by their gradient, for incoming gradients (C)."""
    student = logits[0]
    for rows in row_blocks(*student.shape):
        s, t = (
            form.scores(part[rows]) - statistics[2 * at, rows, None] - statistics[2 * at + 1, rows, None]
            for at, (form, part) in enumerate(zip(forms, logits, strict=True))
        )
        slope = forms[0].slope(student[rows])
        made = gradient(kind, s, t, beta, statistics[4, rows]) * upstream[rows, None]
        student[rows] = made * slope
