"""Unification: finds every binding of captures under which a pattern's term is a graph's term.

Products and sums match as multisets. Operands match in any order, a constant matches number captures, and the remaining
factors of a product match a tensor capture, which is then bound to their product.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from liger_compile.terms import normalize
from liger_compile.terms.scalars import is_bindable, is_normal
from liger_compile.terms.term import ConstVar, Scalar, Space, Term, close, same_constant

Bindings = Mapping[str, Any]  # capture -> Term, number or string
Goal = tuple[Term, Term]  # the pattern's term, the graph's term
Operand = tuple[Term, float]  # a factor and its power; an addend and 1
# After the number captures are bound: the number of the pattern's product or sum, the graph's number, and the remaining
# operands; and the bindings.
Constants = tuple[Scalar, Scalar, list[Operand], Bindings]

PARTS = 16  # most views or slices of one tensor that are tried for a capture
STEPS = 4000  # one attempt takes a few dozen; more means too many symmetric operands


@dataclass
class Unifier:
    """Matches terms of a pattern with a graph's terms.

    Args:
        space: the space of the graph's terms.
        can_bind: returns whether a tensor capture (a `var` term) may be bound to a term.
        is_exact: False for uncast terms that were traced with other sizes, which are then not compared.
    """

    space: Space
    can_bind: Callable[[Term, Term], bool]
    is_exact: bool
    _steps: int = field(default=0, repr=False)

    def unify(self, want: Term, have: Term, env: Bindings) -> Iterator[Bindings]:
        """Yields every extension of `env` under which `want` is `have`."""
        self._steps = 0
        return self._solve([(want, have)], env)

    def _solve(self, goals: list[Goal], env: Bindings) -> Iterator[Bindings]:
        if not goals:
            yield env
            return
        self._steps += 1
        if self._steps > STEPS:
            return
        (want, have), rest = goals[0], goals[1:]
        if want.op == "var":
            yield from self._bind(want, have, rest, env)
        elif want.op in ("view", "slice") and want.args[0].op == "var" and _uncast(have).op == want.op:
            yield from self._part(want, have, rest, env)
        elif want.op in ("mul", "add"):
            yield from self._multiset(want, have, rest, env)
        elif want.op == "number":
            scaled = _scale(want.consts[0], have.consts[0], None, env) if have.op == "number" else None
            if scaled is not None and scaled[0] == normalize.ONE:
                yield from self._solve(rest, scaled[1])
        else:
            extended = self._same_head(want, have, env)
            if extended is not None:
                inner = [*zip(want.args, have.args, strict=True), *rest]
                yield from self._solve(inner, extended)

    def _bind(self, want: Term, have: Term, rest: list[Goal], env: Bindings) -> Iterator[Bindings]:
        name = want.consts[0]
        bound = env.get(name)
        if bound is have:
            yield from self._solve(rest, env)
        elif bound is None and self.can_bind(want, have):
            yield from self._solve(rest, {**env, name: have})

    def _part(self, want: Term, have: Term, rest: list[Goal], env: Bindings) -> Iterator[Bindings]:
        """Matches a view or a slice of a capture.

        Nested views, and nested slices, are one term. The capture may therefore be the source of the graph's term, or
        another view or slice of that source.
        """
        (var,), inner = want.args, _uncast(have)  # a cast of a part is a part of the cast
        base = normalize.cast(self.space, inner.args[0], have.dtype)
        bound = env.get(var.consts[0])
        alike = (part for part in self.space.parts.get(inner.args[0], ()) if part.op == want.op)
        parts = [normalize.cast(self.space, part, have.dtype) for part in itertools.islice(alike, PARTS)]
        for whole in (base, *parts) if bound is None else (bound,):
            if bound is None and not self.can_bind(var, whole):
                continue
            if self.is_exact:
                is_part = normalize.LAYOUT[want.op](self.space, whole, *want.consts) is have
            else:  # the exact pass checks bounds and sizes, but not the dimension of a slice
                is_part = want.op == "view" or want.consts[0] == inner.consts[0]
                is_part = is_part and (whole is base or whole in parts)
            if is_part:
                yield from self._solve(rest, {**env, var.consts[0]: whole})

    def _same_head(self, want: Term, have: Term, env: Bindings) -> Bindings | None:
        """Returns the bindings if op, dtype and constants agree; otherwise None."""
        if want.op != have.op or want.dtype != have.dtype or len(want.args) != len(have.args):
            return None
        if not self.is_exact and want.op in ("view", "expand"):
            return env  # the exact pass checks sizes
        sizes = (1, 2) if want.op == "slice" and not self.is_exact else ()
        if len(want.consts) != len(have.consts):
            return None
        for at, (expected, found) in enumerate(zip(want.consts, have.consts, strict=True)):
            if isinstance(expected, ConstVar):
                if expected.name in env and not same_constant(env[expected.name], found):
                    return None
                env = {**env, expected.name: found}
            elif at not in sizes and not same_constant(expected, found):
                return None
        return env

    # Products and sums

    def _multiset(self, want: Term, have: Term, rest: list[Goal], env: Bindings) -> Iterator[Bindings]:
        """Pairs every operand of the pattern with one of the graph: numbers, then inner terms, then captures."""
        is_product = want.op == "mul"
        if have.dtype != want.dtype or not (have.op == want.op or is_product):
            return
        (expected, wanted), (constant, operands) = operands_of(want, want.op), operands_of(have, want.op)
        numbers = self._numbers if is_product else self._offset
        if expected.powers:
            bound = numbers(expected, constant, operands, have.dtype, env)
            if bound is None:
                return
            expected, constant, operands, env = bound
        inner = [operand for operand in wanted if operand[0].op != "var"]
        # A product of captures alone is the least specific: other operands may bind its captures before its turn.
        inner.sort(key=lambda operand: all(arg.op == "var" for arg in operand[0].args))
        captures = [operand for operand in wanted if operand[0].op == "var"]
        for goals, left in self._assigned(inner, operands):
            # The bindings of the inner operands determine which captures are bound by now.
            for extended in self._solve(goals, env):
                for more in self._captured(want, captures, left, (expected, constant), extended):
                    if not is_product or self._remakes(have, left, captures, more, expected, extended):
                        yield from self._solve([*more, *rest], extended)

    def _numbers(
        self,
        want: Scalar,
        have: Scalar,
        operands: list[Operand],
        dtype: torch.dtype | None,
        env: Bindings,
    ) -> Constants | None:
        """Binds the number captures of a product.

        A number capture is bound to a number, or to a factor that is a number at run time (a SymFloat).
        """
        unbound = []
        for name, power in want.powers:
            bound = env.get(name)
            if bound is None:
                unbound.append((name, power))
            elif isinstance(bound, Term):
                if (bound, power) not in operands:
                    return None
                operands = [operand for operand in operands if operand != (bound, power)]
        if len(unbound) == 1 and close(have.value, want.value, dtype):
            name, power = unbound[0]
            symbol = next((o for o in operands if _is_symbol(o[0]) and o[1] == power), None)
            if symbol:
                left = [operand for operand in operands if operand != symbol]
                return have, have, left, {**env, name: symbol[0]}
        scaled = _scale(want, have, dtype, env)
        if scaled is None:
            return None
        left_over, env = scaled
        return Scalar(have.value / left_over.value), have, operands, env

    def _offset(
        self,
        want: Scalar,
        have: Scalar,
        operands: list[Operand],
        dtype: torch.dtype | None,
        env: Bindings,
    ) -> Constants | None:
        """Binds the number capture of a sum to the whole constant."""
        symbol = next((operand for operand in operands if _is_symbol(operand[0])), None)
        name = want.powers[0][0]
        if symbol and len(want.powers) == 1 and want.value == 1 and have.value == 0:
            if env.get(name, symbol[0]) is not symbol[0]:
                return None
            left = [operand for operand in operands if operand != symbol]
            return have, have, left, {**env, name: symbol[0]}
        scaled = _scale(want, have, dtype, env)
        return (have, have, operands, scaled[1]) if scaled and scaled[0] == normalize.ONE else None

    def _remakes(
        self,
        have: Term,
        left: list[Operand],
        captures: list[Operand],
        goals: list[Goal],
        number: Scalar,
        env: Bindings,
    ) -> bool:
        """Returns whether the rules rebuild the graph's product from the values of the pattern's operands."""
        if not self.is_exact:
            return True
        constant, operands = operands_of(have, "mul")
        factors = [
            operand for operand, times in (Counter(operands) - Counter(left)).items() for _ in range(times)
        ]
        bound = {**env, **{var.consts[0]: term for var, term in goals}}
        factors += [(bound[var.consts[0]], power) for var, power in captures]
        again = normalize.mul(self.space, factors, number, have.dtype, have.shape)
        found, others = operands_of(again, "mul")
        return close(found.value, constant.value, have.dtype) and Counter(others) == Counter(operands)

    def _assigned(
        self, inner: list[Operand], operands: list[Operand]
    ) -> Iterator[tuple[list[Goal], list[Operand]]]:
        """Yields every assignment of the graph's operands to the inner operands, and the remaining operands."""
        if not inner:
            yield [], operands
            return
        (term, power), others = inner[0], inner[1:]
        for at, (operand, exponent) in enumerate(operands):
            if exponent == power and term.op in (operand.op, _uncast(operand).op, "mul"):
                left = operands[:at] + operands[at + 1 :]
                for goals, still_left in self._assigned(others, left):
                    yield [(term, operand), *goals], still_left

    def _captured(
        self,
        want: Term,
        captures: list[Operand],
        left: list[Operand],
        constants: tuple[Scalar, Scalar],
        env: Bindings,
    ) -> Iterator[list[Goal]]:
        """Yields goals for the remaining operands: bound captures take their own, each unbound one a share."""
        (expected, constant), unbound = constants, []
        for var, power in captures:
            bound = env.get(var.consts[0])
            if bound is None:
                unbound.append((var, power))
                continue
            remaining = without(left, bound, power, want.op)
            if remaining is None:
                return
            left, scalar = remaining
            constant = constant * scalar**-1
        if want.op == "add":
            if close(expected.value, constant.value, want.dtype) and len(left) == len(unbound):
                for parts in _partitions(left, unbound, may_join=False):
                    yield [(var, operands[0][0]) for var, _, operands in parts]
            return
        scaled = _scale(expected, constant, want.dtype, env)
        if scaled is None:
            return
        for parts in _partitions(left, unbound, may_join=True):
            for taker in range(len(parts) if scaled[0] != normalize.ONE else 1):
                goals = self._products(parts, scaled[0], taker, want.dtype)
                if goals is not None:
                    yield goals

    def _products(
        self, parts: list, ratio: Scalar, taker: int, dtype: torch.dtype | None
    ) -> list[Goal] | None:
        """Returns goals that bind each capture to the product of its share; `taker` takes the remaining number."""
        goals = []
        for at, (var, power, operands) in enumerate(parts):
            takes = at == taker and (power == 1 or ratio.value > 0)
            scale, ratio = (ratio ** (1 / power), normalize.ONE) if takes else (normalize.ONE, ratio)
            shape = normalize.broadcast(operand.shape for operand, _ in operands)
            if shape is None:
                return None
            if len(operands) == 1 and operands[0][1] == power and scale == normalize.ONE:
                goals.append((var, operands[0][0]))
                continue
            factors = [(operand, exponent / power) for operand, exponent in operands]
            goals.append((var, normalize.mul(self.space, factors, scale, dtype, shape)))
        return goals if ratio == normalize.ONE else None


def _scale(
    want: Scalar, have: Scalar, dtype: torch.dtype | None, env: Bindings
) -> tuple[Scalar, Bindings] | None:
    """Returns the rest of have / want after binding number captures; None if they are bound otherwise."""
    value, unbound = want.value, []
    for name, power in want.powers:
        if name not in env:
            unbound.append((name, power))
        elif isinstance(bound := env[name], float):
            value *= (Scalar(bound) ** power).value
    if not unbound and close(have.value, value, dtype):
        return normalize.ONE, env
    if len(unbound) > 1 or not value or not math.isfinite(value) or not math.isfinite(have.value):
        return None
    ratio = Scalar(have.value / value)
    if not unbound:
        return (ratio, env) if is_normal(ratio, dtype) else None
    ((name, power),) = unbound
    number = ratio if power == 1 else ratio ** (1 / power)
    # A replacement would multiply differently by a number that underflows or overflows in the dtype.
    is_usable = is_bindable(number, dtype) or (have.value == 0 and power == 1)
    is_usable = is_usable and (power == 1 or ratio.value > 0)
    return (normalize.ONE, {**env, name: number.value}) if is_usable else None


def operands_of(term: Term, op: str) -> tuple[Scalar, list[Operand]]:
    """Returns the constant and the operands of a product or sum; any other term is the only operand."""
    if term.op != op:
        return (normalize.ONE if op == "mul" else normalize.ZERO), [(term, 1)]
    powers = term.consts[1:] if op == "mul" else (1,) * len(term.args)
    return term.consts[0], list(zip(term.args, powers, strict=True))


def _uncast(term: Term) -> Term:
    return term.args[0] if term.op == "cast" else term


def _is_symbol(term: Term) -> bool:
    """Returns whether a term is a number that is known at run time only."""
    return term.op == "leaf" and term.dtype is None and term.shape == ()


def without(
    operands: list[Operand], bound: Term, power: float, op: str
) -> tuple[list[Operand], Scalar] | None:
    """Returns the operands of a product or sum without `bound ** power`, and the removed number; None if it is absent.

    In a product, `bound` may be several operands and a number.
    """
    wanted, scalar = [(bound, power)], normalize.ONE
    if (bound, power) not in operands and bound.op == op == "mul":
        wanted = [
            (term, exponent * power) for term, exponent in zip(bound.args, bound.consts[1:], strict=True)
        ]
        scalar = bound.consts[0] ** power
    left = list(operands)
    for operand in wanted:
        if operand not in left:
            return None
        left.remove(operand)
    return left, scalar


def _partitions(operands: list[Operand], captures: list[Operand], may_join: bool) -> Iterator[list]:
    """Yields every way to give each capture one operand, and the remaining operands to one capture."""
    if not captures and operands:
        return
    for chosen in itertools.permutations(range(len(operands)), len(captures)):
        parts = [(var, power, [operands[at]]) for (var, power), at in zip(captures, chosen, strict=True)]
        over = [operand for at, operand in enumerate(operands) if at not in chosen]
        if not over:
            yield parts
        elif may_join:
            for at, (var, power, part) in enumerate(parts):
                yield [*parts[:at], (var, power, [*part, *over]), *parts[at + 1 :]]
