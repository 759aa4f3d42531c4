"""A program in a string: what follows answers about rows up to a loss, with the gradient of the loss at each answer.

An op receives such a program as an argument, so that fake tensors, compilers and caches see nothing but a string. The
string is JSON:

    {"answers": [name, ...], "others": count, "steps": [[operator, args, kwargs], ...], "dtype": that of the loss,
     "loss": value, "seed": value, "gradients": {name: value, ...}, "of_others": {position: value, ...}}

The seed is the incoming gradient of the loss, ones: `Run.reached` states which gradients depend on it.

The values of a program are numbered: the answers, then the other operands, then the results of the steps. A step calls
an operator of ATen by its name, "aten.mul.Tensor". In args and kwargs, {"value": [i]} is value i, and [i, j] is part j
of a step that returns several tensors; {"dtype": "float32"} is a dtype; {"device": 0} is the device of the answers;
{"size": [[n, [k, c, power], ...], ...]} is a polynomial of sizes: the sum of n * (dims[k] - c) ** power * ..., where
`dims` are the sizes that the op knows. Numbers, strings, flags and lists stand for themselves.

`why_not_by_rows` decides whether the gradient at a row depends on the answers of this row alone. If it does, a chunk of
rows can be finished before the next one is begun. It runs the steps on the numbers of the rows that each element
depends on, for sizes that are known: an operator that moves elements moves these numbers, and an elementwise operator
joins them.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_compile.torch_internals.operators import schema_of

NONE, SEVERAL = (
    0,
    -1,
)  # of which row an element depends on: no answer, or answers of several rows; else the row plus 1

# Operators of ATen that move elements, and those that keep each in its place.
MOVES = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose", "t"),
        *("slice", "select", "split", "split_with_sizes", "unbind", "cat", "stack", "flip", "roll", "repeat"),
        *(
            "slice_backward",
            "select_backward",
            "constant_pad_nd",
            "narrow",
            "slice_scatter",
            "select_scatter",
        ),
    )
)
STAYS = frozenset(("clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh"))
MADE = frozenset(
    (
        *(
            "zeros_like",
            "ones_like",
            "full_like",
            "empty_like",
            "new_zeros",
            "new_ones",
            "new_full",
            "new_empty",
        ),
        *("zeros", "ones", "full", "scalar_tensor", "arange", "empty"),
    )
)
# Elementwise, if the result has the broadcast shape of the operands; torch does not tag these.
UNTAGGED = frozenset(
    (
        *("log_sigmoid_forward", "log_sigmoid_backward", "softplus_backward", "elu_backward"),
        *("mse_loss", "mse_loss_backward", "huber_loss", "huber_loss_backward"),
        *("smooth_l1_loss", "smooth_l1_loss_backward"),
    )
)
REDUCED = frozenset(("sum", "mean", "amax", "amin", "any", "all", "prod", "logsumexp"))
# An element depends on the elements in one dimension of each operand.
ALONG = frozenset(
    (
        "_softmax",
        "_log_softmax",
        "_softmax_backward_data",
        "_log_softmax_backward_data",
        "cumsum",
        "cumprod",
        "logcumsumexp",
    )
)


@dataclass(frozen=True)
class Step:
    operator: Any
    args: list[Any]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.operator.overloadpacket.__name__

    @property
    def places(self) -> list[list[int]]:
        """The values that the step reads, in order."""
        return [*_places([*self.args, *self.kwargs.values()])]

    @functools.cached_property
    def operands(self) -> frozenset[int]:
        return frozenset(place[0] for place in self.places)

    @property
    def is_elementwise(self) -> bool:
        """Whether an element of the result depends on one element of each operand, unless shapes contradict it."""
        packet = self.operator.overloadpacket
        overloads = (getattr(packet, name) for name in packet.overloads())
        return self.name in UNTAGGED or any(torch.Tag.pointwise in each.tags for each in overloads)


@dataclass(frozen=True)
class Program:
    """A program that is read; `positions` of values are as in the module's docstring."""

    answers: tuple[str, ...]
    others: int
    steps: tuple[Step, ...]
    dtype: str
    loss: list[int]
    seed: list[int]
    gradients: Mapping[str, list[int]]
    of_others: Mapping[int, list[int]]

    @property
    def first(self) -> int:
        """The position of the first step's result."""
        return len(self.answers) + self.others

    @functools.cached_property
    def dependent(self) -> frozenset[int]:
        """The positions of the values that depend on answers."""
        return self._dependent_on(range(len(self.answers)))

    @functools.cached_property
    def scaled(self) -> frozenset[int]:
        """The positions of the values that depend on the seed."""
        return self._dependent_on(self.seed[:1])

    def _dependent_on(self, positions: Iterable[int]) -> frozenset[int]:
        found = set(positions)
        for at, step in enumerate(self.steps, self.first):
            if not step.operands.isdisjoint(found):
                found.add(at)
        return frozenset(found)

    def needed(self, *results: list[int]) -> tuple[int, ...]:
        """Return the positions of the steps that results need, in order."""
        wanted = {result[0] for result in results}
        for at in range(self.first + len(self.steps) - 1, self.first - 1, -1):
            if at in wanted:
                wanted |= self.steps[at - self.first].operands
        return tuple(sorted(at for at in wanted if at >= self.first))


@functools.lru_cache(maxsize=256)
def read(text: str) -> Program:
    """Return the program of a string."""
    raw = json.loads(text)
    steps = tuple(Step(_operator(name), args, kwargs) for name, args, kwargs in raw["steps"])
    of_others = {int(at): result for at, result in raw["of_others"].items()}
    of_loss = raw["dtype"], raw["loss"], raw["seed"], raw["gradients"]
    return Program(tuple(raw["answers"]), raw["others"], steps, *of_loss, of_others)


def _operator(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    assert namespace == "aten", "a program calls operators of ATen"
    if packet in ("view", "_unsafe_view"):  # strides may differ from those for which the program was written
        return torch.ops.aten.reshape.default
    return getattr(getattr(torch.ops.aten, packet), overload)


def _places(argument: Any) -> Iterator[list[int]]:
    if isinstance(argument, list):
        for part in argument:
            yield from _places(part)
    elif isinstance(argument, dict) and "value" in argument:
        yield argument["value"]


class Run:
    """A run of a program on answers, by name, and other operands. Answers may be written between the calls.

    Args:
        dims: the sizes that polynomials refer to.
    """

    def __init__(
        self, program: Program, answers: Mapping[str, Tensor], others: Sequence[Tensor], dims: Sequence[int]
    ) -> None:
        self.program, self.dims = program, dims
        self.values: list[Any] = [*(answers[name] for name in program.answers), *others]
        self.values += [None] * len(program.steps)
        self.device = self.values[0].device

    def results(self, *results: list[int]) -> list[Tensor]:
        """Return results of the program for the current answers."""
        program = self.program
        for at in program.needed(*results):
            if at in program.dependent or self.values[at] is None:
                self.take(at)
        return [self.value(result) for result in results]

    def reached(self, *gradients: list[int]) -> list[Tensor]:
        """Return which elements of gradients an incoming gradient of the loss reaches, even if it is multiplied by 0.

        An incoming NaN reaches these and no others: `0 * x` passes it on, and `torch.where(False, x, 0)` does not.
        `results` must have returned the gradients before, which computes the other values.
        """
        again, (seed,) = copy.copy(self), self.program.seed
        again.values = [*self.values]
        again.values[seed] = torch.full_like(self.values[seed], float("nan"))
        for at in self.program.needed(*gradients):
            if at in self.program.scaled and at != seed:
                again.take(at)
        return [again.value(gradient) != 0 for gradient in gradients]

    def take(self, at: int) -> None:
        """Run the step whose result is the value `at`."""
        step = self.program.steps[at - self.program.first]
        kwargs = {name: self.argument(value) for name, value in step.kwargs.items()}
        self.values[at] = step.operator(*map(self.argument, step.args), **kwargs)

    def value(self, place: list[int]) -> Any:
        value = self.values[place[0]]
        return value if len(place) == 1 else value[place[1]]

    def argument(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return [self.argument(part) for part in argument]
        if not isinstance(argument, dict):
            return argument
        if "value" in argument:
            return self.value(argument["value"])
        if "size" in argument:
            return size(argument["size"], self.dims)
        return getattr(torch, argument["dtype"]) if "dtype" in argument else self.device


def size(polynomial: Sequence[Any], dims: Sequence[int]) -> int:
    """Return the value of a polynomial of sizes."""
    return sum(n * math.prod((dims[k] - c) ** power for k, c, power in factors) for n, *factors in polynomial)


Forms = tuple[tuple[torch.dtype, tuple[int, ...]], ...]  # dtype and shape of each tensor


def forms_of(tensors: Sequence[Tensor]) -> Forms:
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)


@functools.lru_cache(maxsize=256)
def why_not_by_rows(text: str, answers: Forms, others: Forms, sizes: tuple[int, ...]) -> str | None:
    """Return why the gradient at a row may depend on the answers of other rows, in a sentence; None if it cannot.

    Args:
        answers, others: the forms of the answers, in the order of the program, and of the other operands.
        sizes: the first of the sizes that the program may refer to; those of `others` follow.
    """
    program = read(text)
    dims = (*sizes, *(size for _, shape in others for size in shape))
    made = [torch.zeros(shape, dtype=dtype, device="cpu") for dtype, shape in (*answers, *others)]
    run = _Rows(program, dict(zip(program.answers, made, strict=False)), made[len(answers) :], dims)
    for name, place in program.gradients.items():
        (gradient,) = run.results(place)
        rows, own = run.rows_at(place), _rows_of(gradient)
        if gradient.shape != run.values[program.answers.index(name)].shape:
            return f"the gradient of {name} has another shape than the answers"
        if not ((rows == NONE) | (rows == own)).all():
            return run.culprit(place)
    return None


def _rows_of(answers: Tensor) -> Tensor:
    """Return the number of the row of each element of answers, (N) or (N, K), plus 1."""
    rows = torch.arange(1, answers.shape[0] + 1, device="cpu").reshape(-1, *(1,) * (answers.dim() - 1))
    return rows.expand(answers.shape)


class _Rows(Run):
    """A run that also computes the rows that each element of each value depends on."""

    def __init__(self, program: Program, answers: Mapping[str, Tensor], others: Any, dims: Any) -> None:
        super().__init__(program, answers, others, dims)
        self.rows: list[Any] = [
            _rows_of(value) if at < len(program.answers) else torch.zeros_like(value, dtype=torch.int64)
            for at, value in enumerate(self.values[: program.first])
        ]
        self.rows += [None] * len(program.steps)

    def take(self, at: int) -> None:
        if self.values[at] is None:
            super().take(at)
            self.rows[at] = self._rows(self.program.steps[at - self.program.first], self.values[at])

    def rows_at(self, place: list[int]) -> Tensor:
        rows = self.rows[place[0]]
        return rows if len(place) == 1 else rows[place[1]]

    def culprit(self, place: list[int]) -> str:
        """Return a sentence about the first step that makes a result depend on several rows."""
        found, waiting = self.program.first + len(self.program.steps), {place[0]}
        while waiting:
            at = waiting.pop()
            step = self.program.steps[at - self.program.first] if at >= self.program.first else None
            parts = self.rows[at] if isinstance(self.rows[at], list) else [self.rows[at]]
            if step is not None and any((rows == SEVERAL).any() for rows in parts):
                found = min(found, at)
                waiting |= frozenset() if step.name in MADE else step.operands
        if found == self.program.first + len(self.program.steps):
            return "the gradient of the loss at a row depends on another row"
        name = self.program.steps[found - self.program.first].name
        return f"the gradient of the loss at a row depends on other rows, by {name}"

    def _rows(self, step: Step, out: Any) -> Any:
        """Return the rows of the result of a step."""
        if step.name in MOVES:
            return self._moved(step)
        operands = [self.rows_at(place) for place in step.places]
        if step.name in MADE or all((rows == NONE).all() for rows in operands):
            return _spread(out, NONE)
        if step.name in STAYS:
            return operands[0]
        if step.name in REDUCED:
            return self._reduced(step, operands[0], out)
        if not (step.is_elementwise or step.name in ALONG):
            return _spread(out, SEVERAL)
        joined = functools.reduce(_joined, operands)
        if step.name in ALONG:
            joined = self._reduced(step, joined, out, keeps=True).expand(joined.shape)

        def at_part(part: Tensor) -> Tensor:
            return joined if part.shape == joined.shape else _full(part, SEVERAL)

        return _each(out, at_part)

    def _moved(self, step: Step) -> Any:
        """Run a step on rows, which moves them as it moves elements. Padding depends on no row."""

        def moved(argument: Any) -> Any:
            if isinstance(argument, list):
                return [moved(part) for part in argument]
            is_value = isinstance(argument, dict) and "value" in argument
            return self.rows_at(argument["value"]) if is_value else self.argument(argument)

        args = step.args[:2] if step.name == "constant_pad_nd" else step.args
        found = step.operator(
            *map(moved, args), **{name: moved(value) for name, value in step.kwargs.items()}
        )
        return found if isinstance(found, Tensor) else [*found]

    def _reduced(self, step: Step, rows: Tensor, out: Any, keeps: bool = False) -> Any:
        """Return the rows of a reduction: the only row of the elements that are reduced, if they have one."""
        names = [argument.name for argument in schema_of(step.operator).arguments]
        given = dict(zip(names, map(self.argument, step.args), strict=False))
        given |= {name: self.argument(value) for name, value in step.kwargs.items()}
        dims = given.get("dim")
        dims = [dims] if isinstance(dims, int) else dims or [*range(rows.dim())]
        if not dims or not rows.numel():
            return rows if not dims else _spread(out, NONE)
        dims, keeps = [dim % rows.dim() for dim in dims], keeps or bool(given.get("keepdim"))
        low = torch.where(rows == NONE, torch.iinfo(torch.int64).max, rows).amin(dims, keepdim=keeps)
        high, lowest = rows.amax(dims, keepdim=keeps), rows.amin(dims, keepdim=keeps)
        one = torch.where(low == high, high, SEVERAL)
        return torch.where((high == NONE) & (lowest == NONE), NONE, one)


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """Return the rows of an elementwise result of operands with rows a and b."""
    return torch.where(a == NONE, b, torch.where((b == NONE) | (a == b), a, SEVERAL))


def _full(like: Tensor, row: int) -> Tensor:
    return torch.full(like.shape, row, dtype=torch.int64, device="cpu")


def _spread(out: Any, row: int) -> Any:
    return _each(out, lambda part: _full(part, row))


def _each(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(out) if isinstance(out, Tensor) else [change(part) for part in out]
