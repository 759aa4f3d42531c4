"""Compares a graph's term with a pattern's term that does not unify with it: the agreement, and every difference.

unify.py decides whether some bindings make two terms equal; this file finds the reasons why none do. The comparison
never backtracks. It pairs each operand with the most similar one, records a disagreement as a Difference, and continues
behind it. All terms are uncast; roundings.py compares the rounding.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from liger_compile.terms import normalize
from liger_compile.terms.scalars import is_bindable
from liger_compile.terms.term import ConstVar, Scalar, Term, close
from liger_compile.terms.unify import Operand, operands_of, without

# The score of an op that is found where it is expected. These ops are common in any graph; all others are rare.
WEIGHTS = {**dict.fromkeys(("mul", "add", "view", "slice", "cat", "permute", "expand"), 0.25), "linear": 0.5}
POWER = 0.5  # the score of a power other than 1: a root
STEP = 0.25  # the penalty for an operation in between
DEEP = 3  # most operations between two that belong together
WIDE = 8  # most values compared at each of these depths
NEAR = 64  # number of values whose ops bound a score

# An op that is found where another op of its row is expected scores half.
_ROTATIONS = frozenset(("rotate_half", "rotate_pairs", "cat", "roll"))
ALIKE = (
    frozenset(("silu", "gelu", "relu", "sigmoid", "tanh", "softplus", "mish", "elu", "leaky_relu", "hardswish",
               "hardsigmoid", "relu6", "selu", "celu")),
    frozenset(("mean", "sum", "amax", "amin", "max", "median", "var", "std", "norm", "logsumexp")),
    _ROTATIONS,
    frozenset(("softmax", "log_softmax")),
)  # fmt: skip

# The names of a term's constants; all constants of a reduction are dims.
CONSTANTS: Mapping[str, tuple[str, ...]] = {
    "gelu": ("approximate",),
    "softmax": ("dim",),
    "log_softmax": ("dim",),
    "slice": ("dim", "start", "stop", "step"),
    "cat": ("dim",),
    "attention": ("is_causal", "dropout_p", "scale"),
    "cross_entropy": ("ignore_index", "reduction", "label_smoothing"),
    "repeat_interleave": ("repeats", "dim"),
}
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Difference:
    """One difference between a graph's term and a pattern's.

    Args:
        kind: "op" another operation, "between" an additional operation around the expected one, "constant" another
            constant of an operation, "number" another number, "power" another power of a factor, "missing" an absent
            operand, "extra" an additional operand, "capture" another value than the capture has elsewhere, "rest"
            several factors where one capture is expected.
        want, have: the pattern's term and the graph's. If an operand is missing, `have` is the whole sum or product.
        around: the graph's term around `have`.
        expected, found: the constants, powers, numbers, factors, or values of a capture.
        name: the name of the constant.
    """

    kind: str
    want: Term
    have: Term
    around: Term
    expected: Any = None
    found: Any = None
    name: str = ""


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison, or the partial result while it runs.

    Args:
        score: the sum of the weights of the parts that agree.
        bindings: capture -> the term bound to it.
        differences: in the order of the comparison, from the outside in.
        anchors: the distinctive terms that agree.
        scales: capture -> the number of a product that is part of its value.
    """

    score: float
    bindings: Mapping[str, Term]
    differences: tuple[Difference, ...] = ()
    anchors: tuple[Term, ...] = ()
    scales: Mapping[str, Scalar] = field(default_factory=dict)

    # These methods avoid dataclasses.replace, which takes most of the time of a comparison.

    def plus(self, score: float, *anchors: Term) -> Comparison:
        if not score and not anchors:
            return self
        there = (*self.anchors, *anchors) if anchors else self.anchors
        return Comparison(self.score + score, self.bindings, self.differences, there, self.scales)

    def but(self, *differences: Difference) -> Comparison:
        return self.differing((*self.differences, *differences)) if differences else self

    def differing(self, differences: tuple[Difference, ...]) -> Comparison:
        return Comparison(self.score, self.bindings, differences, self.anchors, self.scales)

    def bound(self, var: Term, have: Term) -> Comparison:
        bindings = {**self.bindings, var.consts[0]: have}
        return Comparison(self.score, bindings, self.differences, self.anchors, self.scales)

    def scaled(self, var: Term, by: Scalar) -> Comparison:
        scales = {**self.scales, var.consts[0]: by}
        return Comparison(self.score, self.bindings, self.differences, self.anchors, scales)


class Comparer:
    """Compares terms of patterns with a graph's terms.

    Args:
        name: returns the name of a term; for an opaque term, the operator that computes it.
        inside: returns the terms that a term is computed from, also for an opaque term.
        has_sizes: False for a pattern that was traced with other sizes, which are then not compared.
        takes_rest: whether a capture in a product takes all remaining factors; otherwise these are a difference.
    """

    def __init__(
        self,
        name: Callable[[Term], str],
        inside: Callable[[Term], Sequence[Term]],
        has_sizes: bool = False,
        takes_rest: bool = True,
    ) -> None:
        self.name, self.inside, self.has_sizes, self.takes_rest = name, inside, has_sizes, takes_rest
        self._weights: dict[Term, float] = {}
        self._by_op: dict[Term, Counter[str]] = {}
        self._near: dict[Term, frozenset[str]] = {}

    def compare(self, want: Term, have: Term) -> Comparison | None:
        """Returns the comparison, or None if `have` lacks a tensor of `want`: then it is no near miss."""
        found = self._compare(want, have, Comparison(0.0, {}), have)
        if any(
            difference.kind == "missing" and self._is_given(difference.want)
            for difference in found.differences
        ):
            return None
        return found.differing(tuple(dict.fromkeys(found.differences)))

    @staticmethod
    def _is_given(want: Term) -> bool:
        """Returns whether a term is a capture, or a slice or view of one."""
        return want.op == "var" or (want.op in ("slice", "view") and want.args[0].op == "var")

    def may_score(self, want: Term, have: Term, spoken_for: Container[Term]) -> float:
        """Returns an upper bound for the score of a comparison, from the ops near `have`.

        The bound is cheap and rules out most comparisons. Terms in `spoken_for` do not count, unless `have` is one of
        them.
        """
        near = self._ops_near(have, () if have in spoken_for else spoken_for)
        missing = 0.0
        for op, weight in self._weights_by_op(want).items():
            if op not in near:
                missing += weight / (2 if any(op in row and row & near for row in ALIKE) else 1)
        return self.weight(want) - missing

    def _weights_by_op(self, want: Term) -> Mapping[str, float]:
        """Returns the weight that each op adds to a pattern's term, over all its occurrences."""
        if want not in self._by_op:
            total = Counter({want.op: _own_weight(want.op)})
            for arg in want.args:
                total.update(self._weights_by_op(arg))
            self._by_op[want] = total
        return self._by_op[want]

    def _ops_near(self, have: Term, spoken_for: Container[Term]) -> frozenset[str]:
        if have not in self._near:
            seen, waiting = {have}, deque([have])
            while waiting and len(seen) < NEAR:
                inside = itertools.islice(self.inside(waiting.popleft()), NEAR)
                new = [term for term in dict.fromkeys(inside) if term not in seen and term not in spoken_for]
                seen.update(new)
                waiting.extend(new)
            self._near[have] = frozenset(map(self.name, seen))
        return self._near[have]

    def weight(self, want: Term) -> float:
        """Returns the score of full agreement with a pattern's term."""
        if want not in self._weights:
            inner = [operand for operand in operands_of(want, "mul")[1] if operand[0].op != "var"]
            powers = POWER * sum(power != 1 for _, power in inner) if want.op == "mul" else 0.0
            args = sum(self.weight(arg) for arg in want.args if arg.op != "var")
            self._weights[want] = _own_weight(want.op) + powers + args
        return self._weights[want]

    def _compare(self, want: Term, have: Term, so_far: Comparison, around: Term) -> Comparison:
        if want.op == "var":
            return self._capture(want, have, so_far, around)
        if want.op == "number":
            is_same = have.op == "number" and close(want.consts[0].value, have.consts[0].value)
            is_same = is_same or (have.op == "number" and bool(want.consts[0].powers))
            return so_far if is_same else so_far.but(Difference("op", want, have, around))
        ways = [self._direct(want, have, so_far, around)]
        ways += self._crossed(want, have, so_far, around)
        if ways[0].score - so_far.score < self.weight(want) / 2:
            ways += self._behind(want, have, so_far, around)
        return max(ways, key=lambda way: (way.score, -len(way.differences)))

    def _direct(self, want: Term, have: Term, so_far: Comparison, around: Term) -> Comparison:
        if want.op in ("mul", "add"):
            return self._operands(want, have, so_far, around)
        if want.op != have.op:
            return self._alike(want, have, so_far, around)
        anchors = (have,) if _own_weight(want.op) >= 1 else ()
        found = so_far.plus(_own_weight(want.op), *anchors).but(*self._constants(want, have, around))
        for inner, other in zip(want.args, have.args, strict=False):
            found = self._compare(inner, other, found, have)
        return found

    def _behind(self, want: Term, have: Term, so_far: Comparison, around: Term) -> Iterator[Comparison]:
        """Yields a comparison of `want` with a term below `have`, with the operations in between as a difference."""
        level = [have] if self.weight(want) > WEIGHTS["add"] else []
        for _ in range(DEEP):
            level = list(itertools.islice((inner for term in level for inner in self.inside(term)), WIDE))
            for inner in level:
                if inner.op == want.op:
                    between = so_far.plus(-STEP).but(Difference("between", want, have, around, found=inner))
                    found = self._direct(want, inner, between, have)
                    if found.score - so_far.score >= self.weight(want) / 2:
                        yield found
                        return

    def _crossed(self, want: Term, have: Term, so_far: Comparison, around: Term) -> Iterator[Comparison]:
        """Yields the comparison of a product with a sum, or of a sum with a product, operand by operand."""
        if {want.op, have.op} == {"mul", "add"} and len(want.args) == len(have.args):
            difference = Difference("op", want, have, around)
            yield self._given(want, have, operands_of(have, have.op)[1], so_far.but(difference), around)

    def _capture(self, want: Term, have: Term, so_far: Comparison, around: Term) -> Comparison:
        bound = so_far.bindings.get(want.consts[0])
        if bound is None:
            return so_far.bound(want, have)
        is_part = bound.op in ("view", "slice") and _source(bound) is _source(
            have
        )  # another view of the same tensor
        return (
            so_far
            if bound is have or is_part
            else so_far.but(Difference("capture", want, have, around, bound, have))
        )

    def _constants(self, want: Term, have: Term, around: Term) -> Iterator[Difference]:
        if want.op in (*REDUCTIONS, "view", "expand"):
            is_dims = want.op in REDUCTIONS
            if want.consts != have.consts and (is_dims or self.has_sizes):
                yield Difference(
                    "constant", want, have, around, want.consts, have.consts, "dims" if is_dims else "shape"
                )
            return
        names = CONSTANTS.get(want.op, ())
        for at, (expected, found) in enumerate(zip(want.consts, have.consts, strict=False)):
            is_size = want.op == "slice" and not self.has_sizes and at in (1, 2)
            if not isinstance(expected, ConstVar) and expected != found and not is_size:
                yield Difference(
                    "constant", want, have, around, expected, found, names[at] if at < len(names) else ""
                )

    def _alike(self, want: Term, have: Term, so_far: Comparison, around: Term) -> Comparison:
        different = so_far.but(Difference("op", want, have, around))
        joined = have.args[0] if have.op == "view" and want.op in _ROTATIONS else have
        if not any(want.op in row and self.name(joined) in row for row in ALIKE):
            return different
        found = different.plus(_own_weight(want.op) / 2, have)
        inner = self.inside(have)
        if joined.op == "cat":
            sources = {_source(part) for part in joined.args}
            if len(sources) > 1:
                return different
            inner = [*sources]
        for expected, other in zip(want.args, inner, strict=False):
            found = self._compare(expected, other, found, have)
        return found.differing(different.differences)  # ignores the arguments of the other op

    # Products and sums

    def _operands(self, want: Term, have: Term, so_far: Comparison, around: Term) -> Comparison:
        is_same = want.op == have.op
        wanted = operands_of(want, want.op)[1]
        if (
            not is_same
            and want.op == "mul"
            and all(term.op == "var" and power != 1 for term, power in wanted)
        ):
            return so_far.but(Difference("op", want, have, around))  # expected a square or a root
        return self._given(
            want, have, operands_of(have, want.op)[1], so_far.plus(_own_weight(want.op) * is_same), around
        )

    def _given(
        self, want: Term, have: Term, operands: Sequence[Operand], so_far: Comparison, around: Term
    ) -> Comparison:
        """Pairs each operand of the pattern with the most similar one: inner terms first, then captures."""
        wanted, left, found = operands_of(want, want.op)[1], [*operands], so_far
        outside = have if len(operands) > 1 or want.op == have.op else around
        inner = sorted((item for item in wanted if item[0].op != "var"), key=self._worth)
        captures = [item for item in wanted if item[0].op == "var"]
        for position, (term, power) in enumerate(inner):
            ways = [(operand, self._compare(term, operand[0], found, outside)) for operand in left]
            ways = [way for way in ways if way[1].score > found.score or not self.weight(term)] or [
                # No operand is similar. If exactly one is left for each that is wanted, take the first.
                way for way in ways if len(left) == len(inner) - position + len(captures)
            ][:1]  # fmt: skip
            if not ways:
                found = found.but(Difference("missing", term, have, around, power))
                continue
            operand, way = max(ways, key=lambda way: self._rank(way, power))
            left.remove(operand)
            if operand[1] != power:
                different = Difference("power", term, operand[0], outside, power, operand[1])
                before = len(found.differences)
                way = way.differing((*found.differences, different, *way.differences[before:]))
            found = way.plus(POWER if operand[1] == power != 1 else 0.0)
        return self._captured(want, have, captures, left, found, around)

    @staticmethod
    def _rank(way: tuple[Operand, Comparison], power: float) -> tuple[float, int]:
        operand, found = way
        return found.score + POWER * (operand[1] == power), -len(found.differences)

    def _worth(self, operand: Operand) -> float:
        return -(self.weight(operand[0]) + POWER * (operand[1] != 1))

    @staticmethod
    def _bound(
        var: Term, power: float, want: Term, have: Term, left: list[Operand], found: Comparison, around: Term
    ) -> Comparison:
        """Binds an unbound capture to one of the operands in `left`, and removes that operand."""
        if not left:
            return found.but(Difference("missing", var, have, around, power))
        other = next((operand for operand in left if operand[1] == power), left[0])
        left.remove(other)
        found = found.bound(var, other[0])
        if other[1] != power and (want.op == "add" or not left):
            found = found.but(Difference("power", var, other[0], have, power, other[1]))
        return found

    def _captured(
        self,
        want: Term,
        have: Term,
        captures: Sequence[Operand],
        left: list[Operand],
        so_far: Comparison,
        around: Term,
    ) -> Comparison:
        """Assigns the operands in `left` to the captures, and compares the numbers."""
        expected = operands_of(want, want.op)[0]
        constant, found, unbound = operands_of(have, want.op)[0], so_far, []
        for var, power in captures:
            bound = so_far.bindings.get(var.consts[0])
            if bound is None:
                unbound.append((var, power))
                continue
            expected = expected * so_far.scales.get(var.consts[0], normalize.ONE) ** power
            remaining = without(left, bound, power, want.op)
            if remaining is not None:
                left, scalar = remaining
                constant = constant * scalar**-1
            elif (other := next((o for o in left if o[0] is bound), None)) is not None:
                left.remove(other)
                found = found.but(Difference("power", var, bound, have, power, other[1]))
            elif others := sorted((o for o in left if o[1] == power), key=lambda o: bound not in o[0].args):
                other = others[0]
                left.remove(other)
                found = found.but(Difference("capture", var, other[0], have, bound, other[0]))
            else:
                found = found.but(Difference("missing", var, have, around, power))
        for var, power in unbound:
            found = self._bound(var, power, want, have, left, found, around)
        if unbound and want.op == "mul":  # the last capture takes the remaining factors
            last, power = unbound[-1]
            if left and not self.takes_rest and last.consts[0] in found.bindings:
                factors = ((found.bindings[last.consts[0]], power), *left)
                found = found.but(Difference("rest", last, have, around, found=factors))
            left = []
            if constant.value and expected.value and not expected.powers:
                found = found.scaled(unbound[-1][0], constant * expected**-1)
                constant = expected
        found = found.but(
            *(Difference("extra", want, operand, have, expected, power) for operand, power in left)
        )
        if expected.powers:
            is_absent = want.op == "add" and not constant.value and not left
            if is_absent:
                return found.but(Difference("missing", want, have, around, expected))
            if not constant.value or is_bindable(constant, None):
                return found
            return found.but(Difference("number", want, have, around, expected, constant.value))
        if close(expected.value, constant.value):
            return found
        return found.but(Difference("number", want, have, around, expected.value, constant.value))


def _own_weight(op: str) -> float:
    return 0.0 if op in ("var", "number", "none") else WEIGHTS.get(op, 1.0)


def _source(term: Term) -> Term:
    """Returns the term below slices, views and products with a number."""
    while term.may_be_passed and (
        term.op in ("slice", "view") or (term.consts[1:] == (1,) and term.op == "mul")
    ):
        term = term.args[0]
    return term
