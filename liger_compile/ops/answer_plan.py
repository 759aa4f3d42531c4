"""A plan: which questions about the softmax of a head a graph asks, and how it derives values from the answers.

The rows of x that the questions concern are `box.of(x)`, flattened: N rows. A question may concern a range of them, as
where a loop takes one sequence after the other. `run` answers all questions by one op, and computes every value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear_softmax, linear_softmax_loss
from .softmax_questions import QUESTIONS


@dataclass(frozen=True)
class Box:
    """Slices of the leading dimensions of a tensor: (start, stop), where a stop counts from the end, or is None."""

    bounds: tuple[tuple[int, int | None], ...]

    @property
    def is_whole(self) -> bool:
        return all(bound == (0, None) for bound in self.bounds)

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the part of the tensor in the box; the dimensions beyond the bounds are whole."""
        if self.is_whole:
            return tensor
        return tensor[tuple(slice(*bound) for bound in self.bounds)]


WHOLE = Box(())


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
        box: of the rows; its only part has the entries of the box.
    """

    width: int
    parts: tuple[Part, ...]
    ignore_index: int | None = None
    box: Box = WHOLE

    def of(self, inputs: Sequence[Tensor], lead: Sequence[Any]) -> Tensor:
        """Returns the entries (rows, width), for rows with these leading dimensions."""
        if not self.box.is_whole:
            entries = self.parts[0].of(inputs, self.width)
            sizes = _sizes(lead, self.box)
            margins = [
                margin for start, stop in reversed(self.box.bounds) for margin in (start, -(stop or 0))
            ]
            return F.pad(entries.reshape(*sizes, self.width), (0, 0, *margins)).reshape(-1, self.width)
        if len(self.parts) == 1 and self.parts[0].last is None:
            return self.parts[0].of(inputs, self.width)
        found: list[Tensor] = []
        at, rows = 0, math.prod(lead)
        for part in self.parts:
            entries = part.of(inputs, self.width)
            if part.first > at:
                found.append(entries.new_zeros(part.first - at, self.width))
            found.append(entries)
            at = rows if part.last is None else part.last
        if at < rows:
            found.append(found[-1].new_zeros(rows - at, self.width))
        return torch.cat(found) if len(found) > 1 else found[0]


@dataclass(frozen=True)
class Addend:
    """A multiple of an answer.

    Args:
        question: one of QUESTIONS, "top", "top_columns", "double_logsumexp", "cross_entropy" or "divergence".
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
    """A value of the graph: the sum of its addends at the rows `first` to `last` of a box, and steps that follow.

    Args:
        box: of the rows in their leading dimensions; it is flattened.
        steps: (name, argument): "view" and a shape, "sum" or "mean" and dimensions, "mul" and a number, "to" and a
            dtype. A symbolic size of a shape is -1, or has the position `at` of that size among the leading sizes of
            the rows.
        is_detached: the graph computes it without gradients.
    """

    addends: tuple[Addend, ...]
    first: int
    last: int | None
    steps: tuple[tuple[str, Any], ...]
    is_detached: bool
    box: Box = WHOLE


@dataclass(frozen=True)
class Form:
    """Rows, classes and scores of a head.

    Args:
        box: the rows of its input.
        classes: the rows of its weight: (start, stop), where a stop counts from the end, or is None.
    """

    box: Box = WHOLE
    classes: tuple[int, int | None] = (0, None)
    logit_scale: float = 1.0
    softcap: float | None = None

    def of(self, head: Head) -> Head:
        """Returns the part of a head that the questions concern; its input keeps its leading dimensions."""
        x, weight, bias = head
        if self.classes != (0, None):
            weight = weight[slice(*self.classes)]
            bias = None if bias is None else bias[slice(*self.classes)]
        return self.box.of(x), weight, bias


Head = tuple[Tensor, Tensor, Tensor | None]  # x (..., H), weight (V, H), bias (V)


@dataclass(frozen=True)
class Plan:
    """All questions about one head, and at most one divergence from a second head, its teacher.

    Args:
        kind, beta: of the divergence, as in divergence.py.
        why_no_tail: why no loss follows the answers inside of the op, in a sentence.
    """

    form: Form
    columns: tuple[Columns, ...]
    outputs: tuple[Output, ...]
    teacher: Form | None = None
    kind: str = ""
    beta: float = 0.5
    why_no_tail: str = ""

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
    def answered(self) -> set[str]:
        """The names of the answers that the op computes."""
        of_top = {"top", "top_columns"} if self.top else set[str]()
        return self.questions | of_top | ({"divergence"} if self.teacher is not None else set[str]())

    @property
    def differentiable(self) -> set[str]:
        """The questions whose answers may have gradients."""
        addends = [
            addend
            for output in self.outputs
            for addend in output.addends
            if not (output.is_detached or addend.is_detached)
        ]
        asked = {
            question for addend in addends for question in DERIVED.get(addend.question, (addend.question,))
        }
        if any(addend.loss and addend.loss[2] for addend in addends):
            asked.add("log_probability_sum")
        return asked - {"argmax", "top_columns"}

    @property
    def width(self) -> int:
        """The number of columns of the index."""
        return sum(columns.width for columns in self.columns)

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


@dataclass(frozen=True)
class Tail:
    """What follows the answers up to a loss, as in linear_softmax_loss.py.

    Args:
        program: of the answers, the other operands, and the entries of some columns, which come last.
        entries: the positions of these columns.
        output: the position of the output that is the loss; None if the loss is computed from outputs.
    """

    program: str
    entries: tuple[int, ...] = ()
    output: int | None = None


def run(
    plan: Plan, head: Head, teacher: Head | None, inputs: Sequence[Tensor], memory: int | None
) -> tuple[Tensor, ...]:
    """Returns the values of the outputs, each in memory of its own.

    Args:
        inputs: the inputs that the columns are made of, int64.
    """
    asked = _Asked(plan, head, teacher, inputs, memory)
    found = linear_softmax.answers(
        *asked.head, plan.questions, keeps=kept_for_backward(plan, head, memory), **asked.arguments
    )
    return tuple(map(asked.answering(found).value, plan.outputs))


# Many parameters because a loss has all that its answers have.
def run_with_loss(
    plan: Plan,
    head: Head,
    teacher: Head | None,
    inputs: Sequence[Tensor],
    memory: int | None,
    tail: Tail,
    others: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Returns the values of the outputs, and the loss if it is none. `others`: the other operands of the program."""
    asked = _Asked(plan, head, teacher, inputs, memory)
    others = [*others, *(asked.entries[at] for at in tail.entries)]
    found, loss = linear_softmax_loss.loss_of_answers(
        *asked.head, plan.questions, tail.program, others, lead=[*asked.lead], **asked.arguments
    )
    answering = asked.answering(found)
    if tail.output is None:
        return *map(answering.value, plan.outputs), loss
    return tuple(loss if at == tail.output else answering.value(one) for at, one in enumerate(plan.outputs))


class _Asked:
    """The arguments of an op that answers the questions of a plan."""

    def __init__(
        self, plan: Plan, head: Head, teacher: Head | None, inputs: Sequence[Tensor], memory: int | None
    ) -> None:
        x, weight, bias = plan.form.of(head)
        self.plan, self.lead = plan, x.shape[:-1]
        self.head = x.reshape(-1, x.shape[-1]), weight, bias
        self.entries = [columns.of(inputs, self.lead) for columns in plan.columns]
        valid = [
            _valid(values, columns.ignore_index)
            for values, columns in zip(self.entries, plan.columns, strict=True)
        ]
        self.arguments: dict[str, Any] = {
            "index": torch.cat(valid, -1) if len(valid) > 1 else next(iter(valid), None),
            "top": plan.top,
            "logit_scale": plan.form.logit_scale,
            "softcap": plan.form.softcap,
            "teacher": _teacher(plan, teacher),
            "memory": memory or 0,
        }

    def answering(self, found: linear_softmax.Answers) -> Answering:
        return Answering(self.plan, found, self.entries, self.head[1].shape[0], self.lead)


def kept_for_backward(plan: Plan, head: Head, memory: int | None) -> str:
    """Returns what forward keeps, as in linear_softmax.py, for the fewest matmuls.

    Of a divergence, the logits of both heads are kept. A user who limits the memory for logits gets the logits computed
    again instead.
    """
    x, weight, bias = head
    learned = [tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
    if not torch.is_grad_enabled() or not any(learned):
        return ""
    asked = plan.differentiable
    is_single = len(asked) == 1 and plan.width <= 1 and asked.isdisjoint(("top", "top_columns"))
    if is_single and learned == [True, False, False] and x.dtype != torch.float16:
        return next(iter(asked))
    return "" if memory else "logits"


def _teacher(plan: Plan, head: Head | None) -> linear_softmax.TeacherOf | None:
    if head is None or plan.teacher is None:
        return None
    x, weight, bias = plan.teacher.of(head)
    numbers = plan.teacher.logit_scale, plan.teacher.softcap
    return linear_softmax.TeacherOf(x.reshape(-1, x.shape[-1]), weight, bias, plan.kind, plan.beta, *numbers)


def _valid(entries: Tensor, ignore_index: int | None) -> Tensor:
    return entries if ignore_index is None else entries.masked_fill(entries == ignore_index, 0)


class Answering:
    """Derives the values of outputs from answers.

    Args:
        entries: of the columns of the plan, (N, width) each.
        classes: V.
        lead: the leading sizes of the rows.
    """

    def __init__(
        self,
        plan: Plan,
        made: linear_softmax.Answers,
        entries: Sequence[Tensor],
        classes: int,
        lead: Sequence[Any],
    ) -> None:
        self.plan, self.made, self.entries, self.classes, self.lead = plan, made, entries, classes, lead
        starts = [0]
        for columns in plan.columns:
            starts.append(starts[-1] + columns.width)
        self.starts = starts

    def value(self, output: Output) -> Tensor:
        total = None
        for addend in output.addends:
            answer = self.answer(addend, output)
            answer = answer if addend.factor == 1 else answer * addend.factor
            answer = answer.detach() if addend.is_detached and torch.is_grad_enabled() else answer
            total = answer if total is None else total + answer
        assert total is not None, "an output has an addend"
        lead = self.lead if output.box.is_whole else _sizes(self.lead, output.box)
        return _stepped(total, output, lead)

    def at(self, of_rows: Tensor, output: Output) -> Tensor:
        """Returns the rows of an output, of a tensor with all rows in its first dimension."""
        if not output.box.is_whole:
            in_box = output.box.of(of_rows.reshape(*self.lead, *of_rows.shape[1:]))
            of_rows = in_box.flatten(0, len(self.lead) - 1)
        return of_rows[output.first : output.last]

    def answer(self, addend: Addend, output: Output) -> Tensor:
        if addend.question == "cross_entropy":
            return self.cross_entropy(addend, output)
        if addend.question == "double_logsumexp":
            return 2 * self.at(self.made.logsumexp, output) + self.at(self.made.collision, output).log()
        answer = self.at(getattr(self.made, addend.question), output)
        if addend.columns is not None:
            start = self.starts[addend.columns]
            return answer[:, start : start + self.plan.columns[addend.columns].width]
        return answer[:, : addend.width] if addend.question in ("top", "top_columns") else answer

    def cross_entropy(self, addend: Addend, output: Output) -> Tensor:
        """Returns the loss of F.cross_entropy without weights of classes: (N), or () if it is reduced."""
        assert addend.columns is not None and addend.loss is not None
        ignore_index, reduction, smoothing = addend.loss
        loss = -self.at(self.made.log_probabilities, output)[:, self.starts[addend.columns]]
        if smoothing:
            even = -self.at(self.made.log_probability_sum, output) / self.classes
            loss = (1 - smoothing) * loss + smoothing * even
        is_counted = self.at(self.entries[addend.columns], output)[:, 0] != ignore_index
        loss = loss.masked_fill(~is_counted, 0)
        if reduction == "none":
            return loss
        return loss.sum() / is_counted.sum() if reduction == "mean" else loss.sum()


def _sizes(lead: Sequence[Any], box: Box) -> tuple[Any, ...]:
    """Returns the leading sizes of a box of rows with the leading sizes `lead`."""
    return tuple(size - start + (stop or 0) for size, (start, stop) in zip(lead, box.bounds, strict=True))


def _stepped(value: Tensor, output: Output, lead: Sequence[Any]) -> Tensor:
    for step, argument in output.steps:
        if step == "view":
            argument = [size if isinstance(size, int) else lead[size.at] for size in argument]
        value = _STEPS[step](value, argument)
    # AOTAutograd cannot detach in inference mode.
    value = value.detach() if output.is_detached and torch.is_grad_enabled() else value
    return value.clone(memory_format=torch.contiguous_format)


_STEPS: Mapping[str, Any] = {
    "view": lambda value, shape: value.reshape(shape),
    "sum": lambda value, dims: value.sum(dims, keepdim=True),
    "mean": lambda value, dims: value.mean(dims, keepdim=True),
    "mul": lambda value, number: value * number,
    "to": lambda value, dtype: value.to(dtype),
}
