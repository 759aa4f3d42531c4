"""A plan: which questions about the softmax of a head a graph asks, and how it derives values from the answers.

The rows of x that the questions concern are `box.of(x)`, flattened: N rows. A question may concern a range of them, as
where a loop takes one sequence after the other. `run` answers all questions by one op, and computes every value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import linear_divergence, linear_softmax  # noqa: F401 - registers the op
from .softmax_questions import QUESTIONS


@dataclass(frozen=True)
class Box:
    """Slices of the leading dimensions of a tensor: (start, stop), where a stop counts from the end, or is None."""

    bounds: tuple[tuple[int, int | None], ...]

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the part of the tensor in the box; the dimensions beyond the bounds are whole."""
        if all(bound == (0, None) for bound in self.bounds):
            return tensor
        return tensor[tuple(slice(*bound) for bound in self.bounds)]


@dataclass(frozen=True)
class Part:
    """Rows of the index: the rows `first` to `last` of it are the entries of an input, in a box and a range.

    Args:
        source: the position of the input.
        box: of the input, which is then flattened to rows of entries.
        start, stop: rows of these; a stop of None is the end.
    """

    source: int
    box: Box
    start: int
    stop: int | None
    first: int
    last: int | None

    def of(self, inputs: Sequence[Tensor], columns: int) -> Tensor:
        return self.box.of(inputs[self.source]).reshape(-1, columns)[self.start : self.stop]


@dataclass(frozen=True)
class Columns:
    """Some columns of the index. Rows that no part has are 0.

    Args:
        width: the number of columns.
        ignore_index: an entry that means "none"; None if every entry is a class.
    """

    width: int
    parts: tuple[Part, ...]
    ignore_index: int | None = None

    def of(self, inputs: Sequence[Tensor], rows: Any) -> Tensor:
        """Returns the entries (rows, width)."""
        found: list[Tensor] = []
        at = 0
        for part in self.parts:
            entries = part.of(inputs, self.width)
            if part.first > at:
                found.append(entries.new_zeros(part.first - at, self.width))
            found.append(entries)
            at = part.last
        if at is not None and self.parts[-1].last is not None and at < rows:
            found.append(found[-1].new_zeros(rows - at, self.width))
        return torch.cat(found) if len(found) > 1 else found[0]


@dataclass(frozen=True)
class Addend:
    """A multiple of an answer.

    Args:
        question: one of QUESTIONS, "top", "top_columns", "double_logsumexp" or "cross_entropy".
        columns: the position of the columns of the index, for questions about columns.
        width: the number of largest scores, for the questions about these.
        loss: (ignore_index, reduction, label_smoothing) of a cross_entropy.
        is_detached: gradients end here.
    """

    question: str
    factor: float = 1.0
    columns: int | None = None
    width: int = 1
    loss: tuple[int, str, float] | None = None
    is_detached: bool = False


@dataclass(frozen=True)
class Output:
    """A value of the graph: the sum of its addends at the rows `first` to `last`, and steps that follow.

    Args:
        steps: (name, argument): "view" and a shape, "sum" or "mean" and dimensions, "mul" and a number, "to" and a
            dtype. A symbolic size of a shape is -1.
        is_detached: the graph computes it without gradients.
    """

    addends: tuple[Addend, ...]
    first: int
    last: int | None
    steps: tuple[tuple[str, Any], ...]
    is_detached: bool


@dataclass(frozen=True)
class Plan:
    """All questions about one head.

    Args:
        classes: the rows of the weight: (start, stop), where a stop counts from the end, or is None.
    """

    box: Box
    classes: tuple[int, int | None]
    logit_scale: float
    softcap: float | None
    columns: tuple[Columns, ...]
    outputs: tuple[Output, ...]

    @property
    def questions(self) -> set[str]:
        asked = {addend.question for output in self.outputs for addend in output.addends}
        for question, needed in DERIVED.items():
            if question in asked:
                asked |= set(needed)
        if any(a.loss and a.loss[2] for output in self.outputs for a in output.addends):
            asked.add("log_probability_sum")
        return asked & set(QUESTIONS)

    @property
    def top(self) -> int:
        widths = [
            addend.width
            for output in self.outputs
            for addend in output.addends
            if addend.question in ("top", "top_columns")
        ]
        return max(widths, default=0)


# Questions that follow from others: log(sum(exp(2 z))) is 2 * logsumexp + log(collision).
DERIVED: Mapping[str, tuple[str, ...]] = {
    "double_logsumexp": ("logsumexp", "collision"),
    "cross_entropy": ("log_probabilities",),
}


def run(
    plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, inputs: Sequence[Tensor], memory: int | None
) -> tuple[Tensor, ...]:
    """Returns the values of the outputs, each in memory of its own.

    Args:
        x: (..., H).
        weight: (V, H).
        inputs: the inputs that the columns are made of, int64.
    """
    rows = plan.box.of(x)
    rows = rows.reshape(-1, rows.shape[-1])
    if plan.classes != (0, None):
        weight = weight[slice(*plan.classes)]
        bias = None if bias is None else bias[slice(*plan.classes)]
    entries = [columns.of(inputs, rows.shape[0]) for columns in plan.columns]
    valid = [_valid(values, columns.ignore_index) for values, columns in zip(entries, plan.columns, strict=True)]
    index = torch.cat(valid, -1) if len(valid) > 1 else next(iter(valid), None)
    made = linear_softmax.answers(
        rows,
        weight,
        bias,
        plan.questions,
        index=index,
        top=plan.top,
        logit_scale=plan.logit_scale,
        softcap=plan.softcap,
        memory=memory or 0,
    )
    answering = _Answering(plan, made, entries, weight.shape[0])
    return tuple(map(answering.value, plan.outputs))


def _valid(entries: Tensor, ignore_index: int | None) -> Tensor:
    return entries if ignore_index is None else entries.masked_fill(entries == ignore_index, 0)


class _Answering:
    def __init__(
        self, plan: Plan, made: linear_softmax.Answers, entries: Sequence[Tensor], classes: int
    ) -> None:
        self.plan, self.made, self.entries, self.classes = plan, made, entries, classes
        starts = [0]
        for columns in plan.columns:
            starts.append(starts[-1] + columns.width)
        self.starts = starts

    def value(self, output: Output) -> Tensor:
        rows = slice(output.first, output.last)
        total = None
        for addend in output.addends:
            answer = self.answer(addend, rows)
            answer = answer if addend.factor == 1 else answer * addend.factor
            answer = answer.detach() if addend.is_detached and torch.is_grad_enabled() else answer
            total = answer if total is None else total + answer
        assert total is not None, "an output has an addend"
        return _stepped(total, output)

    def answer(self, addend: Addend, rows: slice) -> Tensor:
        if addend.question == "cross_entropy":
            return self.cross_entropy(addend, rows)
        if addend.question == "double_logsumexp":
            return 2 * self.made.logsumexp[rows] + self.made.collision[rows].log()
        answer = getattr(self.made, addend.question)[rows]
        if addend.columns is not None:
            start = self.starts[addend.columns]
            return answer[:, start : start + self.plan.columns[addend.columns].width]
        return answer[:, : addend.width] if addend.question in ("top", "top_columns") else answer

    def cross_entropy(self, addend: Addend, rows: slice) -> Tensor:
        """Returns the loss of F.cross_entropy without weights of classes: (N), or () if it is reduced."""
        assert addend.columns is not None and addend.loss is not None
        ignore_index, reduction, smoothing = addend.loss
        loss = -self.made.log_probabilities[rows, self.starts[addend.columns]]
        if smoothing:
            even = -self.made.log_probability_sum[rows] / self.classes
            loss = (1 - smoothing) * loss + smoothing * even
        is_counted = self.entries[addend.columns][rows, 0] != ignore_index
        loss = loss.masked_fill(~is_counted, 0)
        if reduction == "none":
            return loss
        return loss.sum() / is_counted.sum() if reduction == "mean" else loss.sum()


def _stepped(value: Tensor, output: Output) -> Tensor:
    for step, argument in output.steps:
        value = _STEPS[step](value, argument)
    # AOTAutograd cannot detach in inference mode.
    return value.detach().clone() if output.is_detached and torch.is_grad_enabled() else value.clone()


_STEPS: Mapping[str, Any] = {
    "view": lambda value, shape: value.reshape(shape),
    "sum": lambda value, dims: value.sum(dims, keepdim=True),
    "mean": lambda value, dims: value.mean(dims, keepdim=True),
    "mul": lambda value, number: value * number,
    "to": lambda value, dtype: value.to(dtype),
}


@dataclass(frozen=True)
class PairPlan:
    """One divergence of a student's head from a teacher's, of which the graph derives some values.

    Args:
        kind: of ops/divergence.py.
        student, teacher: the box of rows, the classes, logit_scale and softcap, as in Plan.
    """

    kind: str
    beta: float
    student: tuple[Box, tuple[int, int | None], float, float | None]
    teacher: tuple[Box, tuple[int, int | None], float, float | None]
    outputs: tuple[Output, ...]


def run_pair(
    plan: PairPlan,
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    memory: int | None,
) -> tuple[Tensor, ...]:
    """Returns the values of the outputs, each in memory of its own, for (x, weight, bias) of both heads."""
    tensors = [*_of_box(plan.student, *student), *_of_box(plan.teacher, *teacher)]
    forms = (*plan.student[2:], *plan.teacher[2:])
    made, _ = torch.ops.liger_compile.linear_divergence.default(
        *tensors, plan.kind, plan.beta, *forms, memory or 0
    )
    return tuple(_of_divergence(made, output) for output in plan.outputs)


def _of_box(
    part: tuple[Box, tuple[int, int | None], Any, Any], x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    box, classes, *_ = part
    rows = box.of(x)
    rows = rows.reshape(-1, rows.shape[-1])
    if classes == (0, None):
        return rows, weight, bias
    return rows, weight[slice(*classes)], None if bias is None else bias[slice(*classes)]


def _of_divergence(made: Tensor, output: Output) -> Tensor:
    (addend,) = output.addends
    return _stepped(made if addend.factor == 1 else made * addend.factor, output)
