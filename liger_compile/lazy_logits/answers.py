"""Raw answers to questions about rows of logits, from the hidden state and the head, with one backward for all.

    Head      the operands of the linear layer, and the promise that they are unchanged
    Form      the scores of which the softmax is taken: a scale and a cap of the logits, and a range of classes
    ask()     answers for some rows

Each call of ask() computes the logits of its rows once, by the op `linear_softmax`. In backward, the incoming gradients
of all answers of one form are added by row, and one call of `linear_softmax_backward` gives the gradients of the hidden
state and the head: so a loop over rows takes the matmuls, and the rounding, of one question about all rows.

    hidden state, weight, bias -> _Gather -> token -> _Ask -> answers
    lazy tensor                -----------------------^

The edge to the lazy tensor carries no gradient, unless somebody asks for the gradient of the logits themselves
(`Gradient.is_read`), or for a gradient of the gradient. Then the question is answered again from the values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_compile.ops.linear_softmax import Answers, TeacherOf, answers
from liger_compile.ops.softmax_questions import QUESTIONS, Coefficients, coefficients
from liger_compile.runtime.fingerprint import fingerprint
from liger_compile.runtime.lazy import Gradient
from liger_compile.runtime.promise import CHANGED_IN_PLACE, Promise, Recipe, changed
from liger_compile.torch_internals.autograd import current_backward, graph_is_retained
from liger_compile.torch_internals.tensors import version_of, without_torch_functions

# Questions that each pass over the logits answers, because later ones about the same rows may need them.
_ALWAYS = frozenset(("logsumexp", "entropy", "log_probability_sum"))
# Rows of the statistics that the gradient of scores needs: the maximum, and log(sum(exp(z - maximum))).
_SHIFT = 2
_NONE_KEPT = (None, None, None)  # no divergence, and no logits of forward
_NO_TEACHER = None, None, None
_NO_DIVERGENCE = "", 0.5, 1.0, None  # kind, beta, scale and cap of the teacher


@dataclass(frozen=True)
class Form:
    """Scores: softcap * tanh(scale * logits / softcap), or scale * logits; and their classes, start to stop."""

    scale: float
    softcap: float | None
    start: int
    stop: int

    @property
    def classes(self) -> int:
        return self.stop - self.start


class Head:
    """The operands of a linear layer whose result is lazy.

    Args:
        x: (..., H).
        weight: (V, H).
        bias: (V) or None.
        dtype: of the matmul, that of autocast or that of x.
        memory: bytes for a chunk of logits; 0 for the default.
    """

    def __init__(
        self,
        promise: Promise,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        memory: int = 0,
    ) -> None:
        self.promise, self.memory, self.dtype = promise, memory, dtype
        self.x, self.weight, self.bias = x, weight, bias
        self.lead, self.classes = x.shape[:-1], weight.shape[0]
        self.gradient = Gradient()
        self._groups: dict[Form, tuple[_Group, Tensor]] = {}
        self._known: dict[Form, _Known] = {}
        self._plain: dict[Form, tuple[Tensor, Tensor, Tensor | None]] = {}  # operands without gradients
        self._lock = threading.RLock()

    def detached(self) -> Head:
        """Return the same head without the graph of autograd; it shares the answers so far."""
        bias = None if self.bias is None else self.bias.detach()
        head = Head(
            self.promise, self.x.detach(), self.weight.detach(), bias, dtype=self.dtype, memory=self.memory
        )
        head.gradient, head._known, head._plain, head._lock = (
            self.gradient,
            self._known,
            self._plain,
            self._lock,
        )
        return head

    @property
    def requires_grad(self) -> bool:
        return any(each is not None and each.requires_grad for each in (self.x, self.weight, self.bias))

    def is_unchanged(self) -> bool:
        """Return whether the operands are those of forward. The host waits for the device."""
        return self.promise.is_as_promised()

    def operands(self, form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x (N, H), and weight and bias of the classes, in the dtype of the matmul."""
        with torch.autocast(self.x.device.type, enabled=False):
            x = self.x.reshape(-1, self.x.shape[-1]).to(self.dtype)
            weight = self.weight[form.start : form.stop].to(self.dtype)
            bias = None if self.bias is None else self.bias[form.start : form.stop].to(self.dtype)
        return x, weight, bias

    def plain_operands(self, form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the operands without gradients, cast only once."""
        with self._lock, torch.no_grad():
            if form not in self._plain:
                x, weight, bias = self.operands(form)
                self._plain[form] = x.detach(), weight.detach(), None if bias is None else bias.detach()
            return self._plain[form]

    def token(self, form: Form) -> tuple[_Group, Tensor]:
        """Return the questions of a form that backward answers together, and what connects them to the operands."""
        with self._lock:
            if form not in self._groups:
                group = _Group(form, self)
                with torch.enable_grad():
                    self._groups[form] = group, _Gather.apply(group, *self.operands(form))  # pyright: ignore[reportArgumentType]
            return self._groups[form]

    def known(self, form: Form) -> _Known:
        with self._lock:
            return self._known.setdefault(form, _Known())


class _Known:
    """Answers by row that a pass over the logits of a form has given."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def add(self, rows: Tensor, count: int, found: dict[str, Tensor]) -> None:
        with self._lock:
            for question, values in found.items():
                if question not in self._values:
                    self._values[question] = values.new_zeros((*values.shape[:-1], count))
                    self._rows[question] = torch.zeros(count, dtype=torch.bool)
                self._values[question][..., on(rows, values)] = values
                self._rows[question][rows] = True

    def get(self, rows: Tensor, questions: Sequence[str]) -> dict[str, Tensor] | None:
        with self._lock:
            if any(name not in self._rows or not bool(self._rows[name][rows].all()) for name in questions):
                return None
            return {name: self._values[name][..., on(rows, self._values[name])].clone() for name in questions}


@dataclass
class Asked:
    """Questions about rows, what backward needs for their gradients, and the raw answers.

    Args:
        rows: (n) int64 on the CPU: of the flattened hidden state; rows may repeat.
        index: (n, K), for questions about columns.
        top: the number of largest scores, for the question "top", which comes last.
        replay: the raw answers, by question, from the values of the lazy tensor.
    """

    rows: Tensor
    questions: tuple[str, ...]
    index: Tensor | None
    top: int
    replay: Callable[[Tensor], tuple[Tensor, ...]]
    statistics: Tensor | None = None
    top_columns: Tensor | None = None


def on(rows: Tensor, like: Tensor) -> Tensor | slice:
    """Return rows for an index of a tensor on another device: a slice if they follow one another."""
    first, count = (int(rows[0]), len(rows)) if len(rows) else (0, 0)
    if count == 0 or bool((rows == torch.arange(first, first + count)).all()):
        return slice(first, first + count)
    return rows.to(like.device)


def ask(head: Head, form: Form, lazy: Tensor, asked: Asked) -> tuple[Tensor, ...]:
    """Return the raw answers: (n), (n, K) or (n, top) in float32 (float64), in the order of the questions.

    "top" has two answers, values and columns. Gradients flow to the operands of the head if `lazy` has them.
    """
    with head.promise.on_its_stream():
        if not (torch.is_grad_enabled() and lazy.requires_grad):
            return _answered(head, form, asked)
        group, token = head.token(form)
        return _Ask.apply(group, head, asked, lazy, token)  # pyright: ignore[reportReturnType]


def _answered(head: Head, form: Form, asked: Asked) -> tuple[Tensor, ...]:
    """Compute the raw answers, the statistics and the columns of the largest scores."""
    with torch.inference_mode(False), torch.no_grad():
        return _computed(head, form, asked)


def _computed(head: Head, form: Form, asked: Asked) -> tuple[Tensor, ...]:
    known = head.known(form)
    of_rows = (
        known.get(asked.rows, [*asked.questions, "statistics"])
        if asked.index is None and not asked.top
        else None
    )
    if of_rows is not None:
        asked.statistics = of_rows.pop("statistics")
        return tuple(of_rows[question] for question in asked.questions)
    x, weight, bias = head.plain_operands(form)
    every = len(asked.rows) == len(x) and on(asked.rows, x) == slice(0, len(x))
    questions = _ALWAYS | set(asked.questions)
    *found, _, statistics, _, _ = torch.ops.liger_compile.linear_softmax.default(
        x if every else x[on(asked.rows, x)],
        weight,
        bias,
        *_NO_TEACHER,
        asked.index,
        ",".join(question for question in QUESTIONS if question in questions),
        asked.top,
        form.scale,
        form.softcap,
        *_NO_DIVERGENCE,
        head.memory,
    )
    made = Answers(*found)
    kept: dict[str, Tensor] = {question: getattr(made, question) for question in _ALWAYS}
    kept["mean_score"], kept["statistics"] = made.logsumexp - made.entropy, statistics
    known.add(asked.rows, len(x), kept)
    asked.statistics = statistics
    asked.top_columns = made.top_columns if asked.top else None
    values = [getattr(made, question) for question in asked.questions if question != "top"]
    return (*values, made.top, made.top_columns) if asked.top else tuple(values)


class _Ask(torch.autograd.Function):
    """Connects answers to the token of their group, and to the lazy tensor."""

    @staticmethod
    def forward(ctx: Any, group: _Group, head: Head, asked: Asked, lazy: Tensor, token: Tensor) -> Any:
        found = _answered(head, group.form, asked)
        ctx.group, ctx.asked, ctx.lazy = group, asked, Kept(lazy)
        ctx.save_for_backward(token)  # for torch's error in a second backward
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(answer for answer in found if not answer.is_floating_point()))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (token,) = ctx.saved_tensors
        of_lazy = of_token = None
        if any(gradient is not None for gradient in gradients):
            if torch.is_grad_enabled() or ctx.group.gradient.is_read:
                of_lazy = replayed(ctx.lazy.get(), ctx.asked.replay, gradients)
            else:
                ctx.group.add(ctx.asked, gradients)
                of_token = token.detach()
        ctx.lazy.release()
        return None, None, None, of_lazy, of_token


class Kept:
    """A tensor for backward, out of the reach of hooks for saved tensors: these would read its values."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor
        self._version = version_of(tensor)

    def get(self) -> Tensor:
        assert self._tensor is not None, "torch raises an error in a second backward"
        if version_of(self._tensor) != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: lazy "
                f"logits of shape {tuple(self._tensor.shape)}; write into a copy"
            )
        return self._tensor

    def release(self) -> None:
        """Free the tensor, unless backward may run again."""
        if not graph_is_retained():
            self._tensor = None


def replayed(
    lazy: Tensor, replay: Callable[[Tensor], Sequence[Tensor]], gradients: Sequence[Tensor | None]
) -> Tensor:
    """Return the gradient of the lazy tensor, from its values; with create_graph=True, it is differentiable."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_torch_functions():
        values = lazy if again else lazy.detach().requires_grad_()
        pairs = [pair for pair in zip(replay(values), gradients, strict=True) if pair[1] is not None]
        found, incoming = zip(*pairs, strict=True)
        return torch.autograd.grad(found, values, incoming, create_graph=again)[0]


class _Gather(torch.autograd.Function):
    """Computes the gradients of the operands from those of all answers of a group."""

    @staticmethod
    def forward(ctx: Any, group: _Group, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Not by save_for_backward: a checkpoint counts saved tensors, and has no token to make when it runs again.
        ctx.group = group
        group.keep(x, weight, bias)
        ctx.set_materialize_grads(False)
        return x.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs = ctx.needs_input_grad[1:]
        waiting = ctx.group.take()
        found = ctx.group.gradients(waiting, needs) if waiting else (None, None, None)
        ctx.group.release()
        return None, *(gradient if needed else None for gradient, needed in zip(found, needs, strict=True))


Waiting = list[tuple[Asked, Sequence[Tensor | None]]]
_MOST_FAILED = 8  # backwards that have ended before their gradients were computed


class _Group:
    """Answers of one form, whose gradients one call computes.

    It lives as long as a loss, so it has no promise: that would keep the weights of before an optimizer's step.
    """

    def __init__(self, form: Form, head: Head) -> None:
        self.form, self.gradient = form, head.gradient
        self._memory, self._recipe = head.memory, head.promise.recipe
        self._operands: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._marks: _Marks | None = None
        self._waiting: dict[int, Waiting] = {}  # by backward
        self._lock = threading.Lock()

    def keep(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._operands = x, weight, bias
        self._marks = _Marks((x, weight, bias), self._recipe)

    def release(self) -> None:
        """Free the operands, unless backward may run again."""
        if not graph_is_retained():
            self._operands = None

    def add(self, asked: Asked, gradients: Sequence[Tensor | None]) -> None:
        with self._lock:
            self._waiting.setdefault(current_backward(), []).append((asked, gradients))
            if len(self._waiting) > _MOST_FAILED:
                self._waiting.pop(next(iter(self._waiting)))

    def take(self) -> Waiting:
        """Return the incoming gradients of this backward."""
        with self._lock:
            return self._waiting.pop(current_backward(), [])

    def gradients(self, waiting: Waiting, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x, weight and bias, each empty where not needed.

        Raises:
            RuntimeError: an operand has changed since forward.
        """
        assert self._operands and self._marks, "torch raises an error in a second backward"
        self._marks.check(self._operands)
        x, weight, bias = self._operands
        rows, statistics, made, columns = _merged(waiting, len(x), weight.shape[0])
        dx, *others = torch.ops.liger_compile.linear_softmax_backward.default(
            x[on(rows, x)],
            weight,
            bias,
            *_NO_TEACHER,
            columns,
            statistics,
            *made,
            *_NONE_KEPT,
            self.form.scale,
            self.form.softcap,
            *_NO_DIVERGENCE,
            *needs,
            self._memory,
        )
        if needs[0] and len(rows) < len(x):
            dx = torch.zeros_like(x).index_copy(0, rows.to(x.device), dx)
        return dx, *others


class _Marks:
    """The state of operands at a question, for the check in backward."""

    def __init__(self, operands: Sequence[Tensor | None], recipe: Recipe) -> None:
        self._recipe = recipe
        self._marks = [None if t is None else (version_of(t), fingerprint(t)) for t in operands]

    def check(self, operands: Sequence[Tensor | None]) -> None:
        """Raise an error if an operand has changed."""
        for tensor, state in zip(operands, self._marks, strict=True):
            if tensor is None or state is None:
                continue
            version, mark = state
            happened = CHANGED_IN_PLACE if version_of(tensor) != version else changed(tensor, mark)
            if happened:
                raise self._recipe.refusal("gradients", tensor.shape, happened)


# Divergences.


@dataclass(frozen=True)
class Side:
    """Rows of a form of a head, as one of the two distributions of a divergence."""

    head: Head
    form: Form
    rows: Tensor

    def operands(self, has_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the rows of x, weight and bias."""
        x, weight, bias = (self.head.operands if has_gradient else self.head.plain_operands)(self.form)
        return x[on(self.rows, x)], weight, bias


def divergence(
    student: Side, teacher: Side, kind: str, lazy: Tensor, replay: Callable[[Tensor], Sequence[Tensor]]
) -> Tensor:
    """Return the divergence of each row (n), a kind of ops/divergence.py, with gradients for the student.

    Args:
        lazy: the tensor that the divergence is the sum of.
        replay: the divergence, from the values of `lazy`.
    """
    has_gradient = torch.is_grad_enabled() and lazy.requires_grad
    head, form, other = student.head, student.form, teacher.form
    with head.promise.on_its_stream(), torch.inference_mode(False), torch.set_grad_enabled(has_gradient):
        second = TeacherOf(*teacher.operands(False), kind, 0.5, other.scale, other.softcap)
        value = answers(
            *student.operands(has_gradient),
            set(),
            logit_scale=form.scale,
            softcap=form.softcap,
            teacher=second,
            memory=head.memory,
        ).divergence
        return _Through.apply(value, lazy, replay, head) if has_gradient else value  # pyright: ignore[reportReturnType]


class _Through(torch.autograd.Function):
    """Connects a value also to the lazy tensor that it is derived from."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, lazy: Tensor, replay: Any, head: Head) -> Tensor:
        ctx.lazy, ctx.replay, ctx.gradient = Kept(lazy), replay, head.gradient
        ctx.operands = head.x, head.weight, head.bias
        ctx.marks = _Marks(ctx.operands, head.promise.recipe)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled() or ctx.gradient.is_read:
            result = None, replayed(ctx.lazy.get(), ctx.replay, (gradient,)), None, None
        else:
            ctx.marks.check(ctx.operands)
            result = gradient, None, None, None
        ctx.lazy.release()
        if not graph_is_retained():
            ctx.operands = (None, None, None)
        return result


def _merged(waiting: Waiting, count: int, classes: int) -> tuple[Tensor, Tensor, Coefficients, Tensor | None]:
    """Return the rows (M) that have gradients, their statistics, coefficients, and columns (M, K).

    No operation writes gradients in place, because vmap may batch some of them.
    """
    used = torch.zeros(count, dtype=torch.bool)
    for asked, _ in waiting:
        used[asked.rows] = True
    rows = used.nonzero().flatten()
    positions = torch.zeros(count, dtype=torch.int64)
    positions[rows] = torch.arange(len(rows))
    first = waiting[0][0].statistics
    assert first is not None, "an answered question has statistics"
    statistics = first.new_zeros(len(first), len(rows))
    totals: dict[str, Tensor] = {}
    slots = _Slots(len(rows))
    for asked, gradients in waiting:
        assert asked.statistics is not None, "an answered question has statistics"
        at = positions[asked.rows]
        there = at.to(first.device)
        statistics[:_SHIFT, there] = asked.statistics[:_SHIFT]
        upstream = {name: g for name, g in zip(asked.questions, gradients, strict=False) if g is not None}
        of_top = upstream.pop("top", None)
        made = coefficients(upstream, asked.statistics, classes)
        for name, value in zip(made._fields, made, strict=True):
            if value is not None and name != "columns":
                total = totals.get(name, first.new_zeros(len(rows)))
                totals[name] = total.index_add(0, there, value)
        for index, gradient in ((asked.index, made.columns), (asked.top_columns, of_top)):
            if index is not None and gradient is not None:
                slots.add(at, index, gradient)
    columns, at_columns = slots.joined()
    of_rows = (totals.get(name) for name in Coefficients._fields if name != "columns")
    return rows, statistics, Coefficients(*of_rows, columns=at_columns), columns  # pyright: ignore[reportCallIssue]


class _Slots:
    """Columns of the index of all rows, with the incoming gradients there. Questions about other rows share a slot."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._slots: list[list[Tensor]] = []  # taken rows, index, gradient

    def add(self, rows: Tensor, index: Tensor, gradient: Tensor) -> None:
        """Add columns (n, K) of rows (n), which may repeat."""
        while len(rows):
            is_first = _first_of_each(rows)
            whole = bool(is_first.all())
            here = slice(None) if whole else is_first.to(index.device)
            self._add_once(rows[is_first], index[here], gradient[here])
            if whole:
                return
            later = (~is_first).to(index.device)
            rows, index, gradient = rows[~is_first], index[later], gradient[later]

    def _add_once(self, rows: Tensor, index: Tensor, gradient: Tensor) -> None:
        width = index.shape[-1]
        slot = next(
            (each for each in self._slots if each[1].shape[-1] == width and not each[0][rows].any()), None
        )
        if slot is None:
            taken = torch.zeros(self._count, dtype=torch.bool)
            indices, gradients = index.new_zeros(self._count, width), gradient.new_zeros(self._count, width)
            self._slots.append(slot := [taken, indices, gradients])
        taken, indices, gradients = slot
        there = rows.to(index.device)
        taken[rows], indices[there] = True, index
        slot[2] = gradients.index_copy(0, there, gradient)

    def joined(self) -> tuple[Tensor | None, Tensor | None]:
        if not self._slots:
            return None, None
        return torch.cat([slot[1] for slot in self._slots], -1), torch.cat(
            [slot[2] for slot in self._slots], -1
        )


def _first_of_each(rows: Tensor) -> Tensor:
    """Return whether each row occurs for the first time."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    is_first = torch.ones(len(rows), dtype=torch.bool)
    is_first[order[1:]] = ordered[1:] != ordered[:-1]
    return is_first
