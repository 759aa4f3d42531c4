"""Values of masks as linear forms of positions and sizes, and arithmetic on them as dtypes have it.

A form is exact, in real numbers. An operation gives one only if torch's gives the same in its dtype: nothing that it
computes with is rounded away, and what hides stays out of reach. Whether a dtype holds the result is another question,
which needs the ranges of positions: indices.py asks it of each term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from liger_compile.terms.exact import holds, is_whole, stored
from liger_compile.terms.term import Size

# Scores would have to be as large for a mask that adds this to let anything through: finfo.min of float32 and bfloat16.
HIDES = -1e30

_NAMES = {-1: "key", -2: "query", -3: "head", -4: "batch"}


class UnreadError(Exception):
    """What could not be read, in a sentence."""


@dataclass(frozen=True)
class Linear:
    """constant + sum(coefficient * part): a part is a coordinate, or a symbolic size.

    Coordinates of the mask go by their dimension (-1); those that run along a dimension of a part of it, by 0, 1, ...
    """

    constant: float
    parts: frozenset[tuple[int | sympy.Expr, int]] = frozenset()

    def plus(self, other: Linear, times: float = 1) -> Linear:
        parts = dict(self.parts)
        for part, coefficient in other.parts:
            parts[part] = parts.get(part, 0) + int(times) * coefficient
        constant = self.constant + times * other.constant
        return Linear(constant, frozenset((part, c) for part, c in parts.items() if c))

    def __str__(self) -> str:
        ordered = sorted(self.parts, key=str)
        text = " ".join(f"{c:+d}*{_NAMES.get(p, p) if isinstance(p, int) else p}" for p, c in ordered)
        return f"{text} {self.constant:+g}".strip()


ZERO = Linear(0)


class Capture(sympy.Symbol):
    """A number that a pattern's search takes: positive, as far as its mask means anything."""


def of_number(scalar: Any) -> Linear:
    if scalar.value == 1 and len(scalar.powers) == 1 and scalar.powers[0][1] == 1:
        return Linear(0, frozenset(((Capture(scalar.powers[0][0], integer=True, positive=True), 1),)))
    return Linear(plain(scalar))


def of_size(size: Size) -> Linear:
    if isinstance(size, int):
        return Linear(size)
    constant, parts = 0, {}
    for part, coefficient in sympy.expand(size).as_coefficients_dict().items():
        if not coefficient.is_Integer:
            raise UnreadError(f"it depends on the size {size}, which is no sum of sizes")
        if part == 1:
            constant = int(coefficient)
        else:
            parts[part] = int(coefficient)
    return Linear(constant, frozenset(parts.items()))


def plain(scalar) -> float:
    """A constant of a term as a number; a pattern's own number captures are none."""
    if scalar.powers:
        raise UnreadError(f"it depends on the number {scalar.powers[0][0]}")
    return scalar.value


def scaled(a: Linear, b: Linear) -> Linear:
    """a * b, one of which is constant."""
    if a.parts and b.parts:
        raise UnreadError("it multiplies positions")
    form, by = (b, a.constant) if b.parts else (a, b.constant)
    if form.parts and not is_whole(by):
        raise UnreadError(f"it multiplies positions by {by:g}")
    return ZERO.plus(form, by)


def coordinate(dim: int) -> Linear:
    return Linear(0, frozenset(((dim, 1),)))


# Arithmetic in a dtype


def in_(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"


def hides(number: float) -> bool:
    """Whether it is finite, and lower than any score."""
    return math.isfinite(number) and number <= HIDES


def added(scalar: Any, dtype: torch.dtype | None) -> Linear:
    """A number that is added in `dtype`, if that holds it, or rounds it to what hides as well."""
    number = of_number(scalar)
    if number.parts or not is_rounding(dtype) or holds(dtype, number.constant):
        return number
    if hides(stored(dtype, number.constant)):
        return Linear(stored(dtype, number.constant))
    raise UnreadError(f"it adds {number.constant:g}, which is rounded{in_(dtype)}")


def multiplied(scalar: Any, dtype: torch.dtype | None) -> Linear:
    """A number that multiplies in `dtype`, if no rounding makes it 0 or infinite: then it keeps 0 and what hides."""
    number = plain(scalar)
    value = stored(dtype, number)
    if number and not (value and math.isfinite(value)):
        raise UnreadError(f"it multiplies by {number:g}, which is {value:g}{in_(dtype)}")
    return Linear(number)


def add(dtype: torch.dtype | None, a: Linear, b: Linear) -> Linear:
    """a + b; with what hides, it is what hides: from the sum of two large numbers nothing else can be told."""
    result = a.plus(b)
    if is_rounding(dtype):
        if any(hides(each.constant) for each in (a, b)) and not result.constant <= HIDES:
            raise UnreadError(f"it adds {b} to {a}{in_(dtype)}")
        if result.parts and not (is_whole(a.constant) and is_whole(b.constant)):
            raise UnreadError(f"it adds {b} to {a}{in_(dtype)}")
    return result


def multiply(dtype: torch.dtype | None, a: Linear, b: Linear) -> Linear:
    """a * b; 0, or what hides, where one of them hides: a fill that is scaled back into reach is not read."""
    result = scaled(a, b)
    is_hidden = any(hides(each.constant) for each in (a, b))
    if is_rounding(dtype) and is_hidden and not (result.constant <= HIDES or result == ZERO):
        raise UnreadError(f"it multiplies {a} by {b}{in_(dtype)}")
    return result


def is_rounding(dtype: torch.dtype | None) -> bool:
    return dtype is not None and dtype.is_floating_point


def numbers_compare(op: str, a: float, b: float, dtype: torch.dtype | None) -> bool:
    """Whether two numbers compare so, however those that are no values of `dtype` are rounded."""
    if max(a, b) <= HIDES and (a, b) != (-math.inf, -math.inf):
        raise UnreadError(f"it compares {a:g} with {b:g}, which may be rounded")
    exact, inexact = (
        x <= y if op == "le" else x < y if op == "lt" else x == y
        for x, y in ((a, b), (stored(dtype, a), stored(dtype, b)))
    )
    if exact != inexact or not (is_rounding(dtype) or (holds(dtype, a) and holds(dtype, b))):
        raise UnreadError(f"it compares {a:g} with {b:g}{in_(dtype)}, which rounds them")
    return exact
