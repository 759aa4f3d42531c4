"""Hash-consed terms for the mathematical values of nodes, so that equal mathematics is one object.

A Term records the operation (`op`), its operands (`args`), its constants (`consts`) and its dtype, but never how the
code spelled it. A cast is a term of its own, because rounding is part of the meaning. `uncast` is the uncast term: the
same mathematics, normalized again without any cast. Two terms with one `uncast` differ in rounding only.

This file stores terms. build.py decides which term an operator makes; normalize.py decides which terms are equal.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from liger_compile.graphs.guards import GuardError

if TYPE_CHECKING:
    from liger_compile.terms.attention import Note
    from liger_compile.terms.indices import Meaning

MADE_HERE = "made in the graph"  # marks a leaf that is no input, and whose computation is unknown
Size = int | sympy.Expr  # a dimension: static, or symbolic as in SymInt.node.expr


def size_of(value: Any) -> Size:
    """Returns the size of an int or SymInt, without adding a guard."""
    expr = value.node.expr if isinstance(value, torch.SymInt) else value
    return int(expr) if isinstance(expr, (int, sympy.Integer)) else expr


def sizes_of(shape: Iterable[Any]) -> tuple[Size, ...]:
    """Returns the sizes of a shape, hashable and without guards."""
    return tuple(size_of(size) for size in shape)


def broadcast(shapes: Iterable[tuple[Size, ...]]) -> tuple[Size, ...] | None:
    """Returns the common shape of operands; None if their sizes are not known to agree."""
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
    """A number times powers of number captures: `value * prod(name ** power)`; a model's number has no powers.

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
        """Returns whether this is the plain number `value`, as exactly as code for `dtype` writes constants."""
        return not self.powers and close(self.value, value, dtype)


def close(a: float, b: float, dtype: torch.dtype | None = None) -> bool:
    """Returns whether constants are equal to within `dtype`: 0.7978845608 is sqrt(2 / pi), 1 / 30 * 30 is 1.

    An infinity is close only to itself, a zero only to a zero of the same sign, NaN to nothing.
    """
    if a == b:
        return a != 0 or math.copysign(1.0, a) == math.copysign(1.0, b)
    return math.isclose(a, b, rel_tol=_tolerance(dtype))


@functools.cache
def _tolerance(dtype: torch.dtype | None) -> float:
    """Returns the relative tolerance of equal constants: the eps of `dtype`, but no more than imprecise code needs."""
    if dtype is None:
        return 1e-6
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    return min(1e-6, max(torch.finfo(dtype).eps, 1e-15))


@dataclass(frozen=True)
class ConstVar:
    """A variable in the `consts` of a pattern's term; the match binds a constant, such as ignore_index or reduction."""

    name: str


# Operations that views, casts and signs move past, inward, in normalize.py and identities.py. LONGEST bounds the length
# of a chain of them, because each move takes as many steps and as many nested calls. In a longer chain, one operation
# in every LONGEST stays in place, and nothing moves past it.
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
LONGEST = 40  # the longest chain in models is about 20, in attention that is written out
SHOWN = 6  # in a term's text: most nested operations, and most arguments of each


class Term:
    """One value. Only `Space.intern` creates terms, so that identity is equality."""

    __slots__ = ("args", "consts", "dtype", "op", "run", "serial", "shape", "uncast")

    op: str
    args: tuple[Term, ...]
    consts: tuple[Any, ...]
    dtype: torch.dtype | None  # None in an uncast term and in a number
    shape: tuple[Size, ...]
    uncast: Term
    serial: int  # order of creation, which sorts operands of sums and products; arguments precede users
    run: int  # length of the chain, from this term down, that a view or a cast may move past: see PASSED

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
        """Returns the term and all terms that it is computed from, each once, arguments first."""
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
        """Returns the op of every distinct operation in the term."""
        return [term.op for term in self.parts() if term.op not in ("leaf", "var", "number", "none")]

    def written(self) -> str:
        """Returns the whole term as text, one line for each part; a part with several users has one line."""
        parts = self.parts()
        names = {part: f"%{at}" for at, part in enumerate(parts)}
        lines = (f"{part.op}({', '.join(names[arg] for arg in part.args)}) {part.consts}" for part in parts)
        return "\n".join(lines)

    @property
    def may_be_passed(self) -> bool:
        """Whether a view, a cast or a sign that moves inward may move past this term."""
        return self.run < LONGEST


def _run(op: str, args: tuple[Term, ...]) -> int:
    if op not in PASSED or (op in ("mul", "add") and len(args) > 1):
        return 0
    return 1 + max((arg.run for arg in args if arg.may_be_passed), default=0)


def _key_of_constants(consts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns constants as a key that separates -0.0 from 0.0: copysign(x, -0.0) is not copysign(x, 0.0)."""
    if any(type(const) is float and not const for const in consts):
        return (
            *consts,
            *(math.copysign(1.0, const) for const in consts if type(const) is float and not const),
        )
    return consts


def same_constant(a: Any, b: Any) -> bool:
    """Returns whether two constants of operations are the same."""
    return a == b and (type(a) is not float or type(b) is not float or close(a, b))


@dataclass(frozen=True)
class Findings:
    """Facts about terms of a space that are computed once.

    Args:
        unbroadcast: a term -> the term without the expands that implicit broadcasting supplies (normalize.py).
        parts_of_cats: a cat -> its parts by (start, stop) (normalize.py).
        meanings: a mask and the sizes of queries and keys -> its meaning (indices.py).
        notes: a term of attention -> why it keeps its mask, or stays written out (attention.py).
        failures: a sentence about a rule that failed -> the number of calls that it left opaque (operators.py).
    """

    unbroadcast: dict[Term, Term] = field(default_factory=dict)
    parts_of_cats: dict[Term, Mapping[tuple[Size, Size], Term]] = field(default_factory=dict)
    meanings: dict[tuple[Term, Size, Size], Meaning] = field(default_factory=dict)
    notes: dict[Term, Note] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)


class RuleError(Exception):
    """A rule about terms raised an exception: a fault of this package, not of the program."""


class Space:
    """All terms of one graph, or of one traced pattern.

    Args:
        strict: whether a failure of our own code raises (`fail`).
    """

    def __init__(
        self,
        make_uncast: Callable[[Space, Term], Term],
        rules: Mapping[str, Sequence[Callable[..., Any]]],
        mul_rules: Sequence[Callable[..., Any]],
        strict: bool = True,
    ) -> None:
        self.rules, self.mul_rules, self.strict = rules, mul_rules, strict
        self._table: dict[tuple, Term] = {}
        self._serials = itertools.count()
        self._make_uncast = make_uncast
        self.same_uncast: dict[Term, list[Term]] = {}  # uncast term -> the terms that round it differently
        self.parts: dict[Term, list[Term]] = {}  # term -> its views and slices
        self.better: dict[Term, Term] = {}  # term -> its rewrite by the rules
        self.has_values: dict[
            Term, bool
        ] = {}  # term -> whether positions and sizes alone do not determine it
        self.findings = Findings()
        self.shape_env: ShapeEnv | None = None  # holds the ranges of symbolic sizes
        self.empty_rows_unread = False  # whether nothing reads the rows of attention that see no key
        self.none = self.intern("none", (), (), None, ())

    def intern(
        self,
        op: str,
        args: tuple[Term, ...],
        consts: tuple[Any, ...],
        dtype: torch.dtype | None,
        shape: tuple[Size, ...],
    ) -> Term:
        """Returns the only term with this op, arguments, constants and dtype."""
        key = (op, tuple(arg.serial for arg in args), _key_of_constants(consts), dtype)
        term = self._table.get(key)
        if term is None:
            term = Term.__new__(Term)
            term.op, term.args, term.consts, term.dtype, term.shape = op, args, consts, dtype, shape
            term.serial = next(self._serials)
            term.run = _run(op, args)
            self._table[key] = term
            try:
                term.uncast = term if dtype is None else self._make_uncast(self, term)
            except Exception:
                del self._table[key]  # no one may get a term without `uncast`
                raise
            self.same_uncast.setdefault(term.uncast, []).append(term)
            if op in ("view", "slice"):
                self.parts.setdefault(args[0], []).append(term)
        return term

    def fail(self, subject: str, error: Exception) -> str:
        """Returns a sentence about a failure of our own code, `error`, in its words.

        Raises:
            RuleError: under `strict`, with that sentence, from `error`.
            GuardError: `error` is one: a fact that is not known for all sizes is no fault.
        """
        if isinstance(error, GuardError):
            raise error
        sentence = f"{subject} failed: {type(error).__name__}: {error}"
        if self.strict:
            raise RuleError(sentence) from error
        return sentence

    def in_order(self) -> Iterable[Term]:
        """Returns all terms so far, the arguments of each before it."""
        return tuple(self._table.values())

    def most(self, size: Size) -> int | None:
        """Returns the upper bound of a size by the guards of the graph; None if none is known."""
        if isinstance(size, int) or self.shape_env is None:
            return size if isinstance(size, int) else None
        upper = self.shape_env.bound_sympy(size).upper
        return int(upper) if upper.is_Integer else None

    def number(self, scalar: Scalar) -> Term:
        """Returns the term of a constant."""
        return self.intern("number", (), (scalar,), None, ())
