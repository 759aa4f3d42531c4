"""The value of a node, as mathematics: hash-consed terms, so that equal mathematics is one object.

A Term says what is computed (`op`), of what (`args`), with which constants (`consts`), and in which dtype;
never how the code spelled it. Casts are terms of their own, because rounding is meaning. `bare` is the same
mathematics with every cast taken out and normalised again: two terms with one bare differ in rounding only.

This file knows how terms are stored. Which operator makes which term is build.py's business, and which terms
are equal is normalize.py's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

MADE_HERE = (
    "made in the graph"  # among the constants of a leaf that no input is: nothing is known of how it is made
)
Size = int | sympy.Expr  # a dimension: static, or symbolic as in SymInt.node.expr


def size_of(value: Any) -> Size:
    """The size that an int or SymInt stands for, without adding a guard."""
    expr = value.node.expr if isinstance(value, torch.SymInt) else value
    return int(expr) if isinstance(expr, (int, sympy.Integer)) else expr


def sizes_of(shape: Iterable[Any]) -> tuple[Size, ...]:
    """The sizes of a shape, hashable and free of guards."""
    return tuple(size_of(size) for size in shape)


def broadcast(shapes: Iterable[tuple[Size, ...]]) -> tuple[Size, ...] | None:
    """The common shape of operands, None where sizes are not known to agree."""
    shapes = list(shapes)
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Size] = []
    for dim in range(-rank, 0):
        sizes = {shape[dim] for shape in shapes if len(shape) >= -dim} - {1}
        if len(sizes) > 1:
            return None
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)


@dataclass(frozen=True, eq=False)
class Scalar:
    """A number times powers of number captures: `value * prod(name ** power)`; a model's has no powers.

    0.0 and -0.0 are two scalars, and so are two NaNs.
    """

    value: float
    powers: tuple[tuple[str, float], ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scalar) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[float, float, Any]:
        return self.value, math.copysign(1.0, self.value), self.powers

    def __mul__(self, other: Scalar) -> Scalar:
        powers = dict(self.powers)
        for name, power in other.powers:
            powers[name] = powers.get(name, 0) + power
        return Scalar(self.value * other.value, tuple(sorted((n, p) for n, p in powers.items() if p)))

    def __pow__(self, power: float) -> Scalar:
        try:
            value = float(self.value) ** power
        except (ZeroDivisionError, OverflowError):
            value = float("nan")
        if isinstance(value, complex):
            value = float("nan")
        return Scalar(value, tuple((name, p * power) for name, p in self.powers))

    def is_number(self, value: float, dtype: torch.dtype | None = None) -> bool:
        """True if this is the plain number `value`, as exactly as constants are written in code for `dtype`."""
        return not self.powers and close(self.value, value, dtype)


def close(a: float, b: float, dtype: torch.dtype | None = None) -> bool:
    """Equal constants, as far as `dtype` tells: 0.7978845608 is sqrt(2 / pi), 1 / 30 * 30 is 1.

    An infinity is close to itself alone, a zero to a zero of its sign alone, NaN to nothing.
    """
    if a == b:
        return a != 0 or math.copysign(1.0, a) == math.copysign(1.0, b)
    return math.isclose(a, b, rel_tol=_tolerance(dtype))


@functools.cache
def _tolerance(dtype: torch.dtype | None) -> float:
    """How far apart equal constants may be: what rounds to neighbors in `dtype`, and not more than code is sloppy."""
    if dtype is None:
        return 1e-6
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    return min(1e-6, max(torch.finfo(dtype).eps, 1e-15))


@dataclass(frozen=True)
class ConstVar:
    """Stands in `consts` of a pattern's term for a constant that the match binds: ignore_index, reduction."""

    name: str


# Operations that views, casts and signs move past, inward, in normalize.py and identities.py. How many of them in a row
# is bounded: each move costs as many steps, and as many calls inside of one another. Of a longer row, every so many-th
# operation stays where it is, and what would move past it too.
PASSED = frozenset(
    (
        "cast",
        "view",
        "expand",
        "permute",
        "slice",
        "cat",
        "rotate_half",
        "rotate_pairs",
        "linear",
        "matmul",
        "softmax",
        "mul",
        "add",
        "exp",
        "log",
        "erf",
        "cos",
        "sin",
        "tanh",
        "relu",
        "sigmoid",
        "silu",
        "gelu",
    )
)
LONGEST = 40  # in attention that is written out, the longest row that models have, there are about 20
SHOWN = 6  # in a term's text: operations one in the other, and arguments of each


class Term:
    """One value. Made by `Space.intern` only, so that identity is equality."""

    __slots__ = ("args", "bare", "consts", "dtype", "op", "run", "serial", "shape")

    op: str
    args: tuple[Term, ...]
    consts: tuple[Any, ...]
    dtype: torch.dtype | None  # None in a bare term and in a number
    shape: tuple[Size, ...]
    bare: Term
    serial: int  # the order of making, which sorts the operands of sums and products; arguments come first
    run: int  # how many operations in a row, down from this one, a view or a cast may move past: see PASSED

    def __repr__(self) -> str:
        return self._text(SHOWN)

    def _text(self, depth: int) -> str:
        if self.op in ("leaf", "var", "number"):
            return f"{self.consts[0]}"
        if not depth:
            return "..."
        shown = [arg._text(depth - 1) for arg in self.args[:SHOWN]]
        more = ["..."] if len(self.args) > SHOWN else []
        return f"{self.op}({', '.join([*shown, *more, *map(repr, self.consts)])})"

    def parts(self) -> list[Term]:
        """The term and all that it is computed from, each once, arguments first."""
        found: dict[Term, None] = {}
        waiting: list[Term] = [self]
        while waiting:
            new = [arg for arg in waiting[-1].args if arg not in found]
            if new:
                waiting.extend(reversed(new))
            else:
                found[waiting.pop()] = None
        return list(found)

    def operations(self) -> list[str]:
        """The op of every different operation that the value takes."""
        return [term.op for term in self.parts() if term.op not in ("leaf", "var", "number", "none")]

    def written(self) -> str:
        """The whole term as text, a line a part; of a term that is read more than once there is one line."""
        parts = self.parts()
        names = {part: f"%{at}" for at, part in enumerate(parts)}
        lines = (f"{part.op}({', '.join(names[arg] for arg in part.args)}) {part.consts}" for part in parts)
        return "\n".join(lines)

    @property
    def may_be_passed(self) -> bool:
        """Whether a view, a cast or a sign that moves inward moves past this one."""
        return self.run < LONGEST


def _run(op: str, args: tuple[Term, ...]) -> int:
    if op not in PASSED or (op in ("mul", "add") and len(args) > 1):
        return 0
    return 1 + max((arg.run for arg in args if arg.may_be_passed), default=0)


def _told_apart(consts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Constants as a key: copysign(x, -0.0) is not copysign(x, 0.0)."""
    if any(type(const) is float and not const for const in consts):
        return (
            *consts,
            *(math.copysign(1.0, const) for const in consts if type(const) is float and not const),
        )
    return consts


def same_constant(a: Any, b: Any) -> bool:
    """Whether two constants of operations are one and the same."""
    return a == b and (type(a) is not float or type(b) is not float or close(a, b))


class Space:
    """All terms of one graph, or of one traced pattern."""

    def __init__(
        self,
        make_bare: Callable[[Space, Term], Term],
        rules: Mapping[str, Sequence[Callable[..., Any]]],
        mul_rules: Sequence[Callable[..., Any]],
    ) -> None:
        self.rules, self.mul_rules = rules, mul_rules
        self._table: dict[tuple, Term] = {}
        self._make_bare = make_bare
        self.same_bare: dict[Term, list[Term]] = {}  # bare -> the terms that round it in different ways
        self.parts: dict[Term, list[Term]] = {}  # term -> its views and slices
        self.better: dict[Term, Term] = {}  # what the rules have made of a term, which is the same each time
        self.found_out: dict[Any, Any] = {}  # by indices.py, of masks, and by attention.py
        self.shape_env: ShapeEnv | None = None  # that knows the ranges of symbolic sizes
        self.none = self.intern("none", (), (), None, ())

    def intern(
        self,
        op: str,
        args: tuple[Term, ...],
        consts: tuple[Any, ...],
        dtype: torch.dtype | None,
        shape: tuple[Size, ...],
    ) -> Term:
        """The one term of this op, arguments, constants and dtype."""
        key = (op, tuple(arg.serial for arg in args), _told_apart(consts), dtype)
        term = self._table.get(key)
        if term is None:
            term = Term.__new__(Term)
            term.op, term.args, term.consts, term.dtype, term.shape = op, args, consts, dtype, shape
            term.serial = len(self._table)
            term.run = _run(op, args)
            self._table[key] = term
            term.bare = term if dtype is None else self._make_bare(self, term)
            self.same_bare.setdefault(term.bare, []).append(term)
            if op in ("view", "slice"):
                self.parts.setdefault(args[0], []).append(term)
        return term

    def in_order(self) -> Iterable[Term]:
        """All terms so far, the arguments of each before it."""
        return tuple(self._table.values())

    def most(self, size: Size) -> int | None:
        """The largest that a size may be, as the guards of the graph have it; None if nothing is known."""
        if isinstance(size, int) or self.shape_env is None:
            return size if isinstance(size, int) else None
        upper = self.shape_env.bound_sympy(size).upper
        return int(upper) if upper.is_Integer else None

    def number(self, scalar: Scalar) -> Term:
        """A constant."""
        return self.intern("number", (), (scalar,), None, ())
