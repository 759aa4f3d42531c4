"""Linear forms of positions and sizes, which represent the values of masks, and their arithmetic in dtypes.

A form is exact, in real numbers. An operation returns a form only if torch computes the same value in its dtype:
rounding loses no operand, and values that hide stay out of the range of scores. Whether a dtype represents the result
depends on the ranges of positions; indices.py checks that for each term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from liger_compile.terms.exact import holds, is_whole, stored
from liger_compile.terms.term import Size, Term

# A mask that adds this reveals a key only if the score is as large. finfo.min of float32 and bfloat16 is below it.
HIDES = -1e30

_NAMES = {-1: "key", -2: "query", -3: "head", -4: "batch"}


class UnreadError(Exception):
    """Raised with a sentence that names the part that could not be read."""


@dataclass(frozen=True)
class Element:
    """An integer that only the call knows: the element of a term at these coordinates."""

    term: Term
    at: tuple[Linear, ...]

    def __str__(self) -> str:
        return f"{self.term}[{', '.join(map(str, self.at))}]"


@dataclass(frozen=True)
class Differs:
    """1 if the elements of an integer term at two places differ, and 0 if they are equal."""

    term: Term
    places: frozenset[tuple[Linear, ...]]

    def __str__(self) -> str:
        return f"({' != '.join(sorted(str(Element(self.term, at)) for at in self.places))})"


@dataclass(frozen=True)
class Flag:
    """1 if the element of a boolean term at these coordinates is true, and 0 if it is false."""

    term: Term
    at: tuple[Linear, ...]

    def __str__(self) -> str:
        return f"{self.term}[{', '.join(map(str, self.at))}]"


Part = int | sympy.Expr | Element | Differs | Flag


@dataclass(frozen=True)
class Linear:
    """The form constant + sum(coefficient * part); a part is a coordinate, a symbolic size, or a fact about values.

    A coordinate of the mask is named by its negative dimension, such as -1; a coordinate along a dimension of a part of
    the mask is named 0, 1, ...
    """

    constant: float
    parts: frozenset[tuple[Part, int]] = frozenset()

    @property
    def elements(self) -> list[Element]:
        """The elements of terms among the parts."""
        return [part for part, _ in self.parts if isinstance(part, Element)]

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
    """A number capture of a pattern; positive, since the mask has no meaning otherwise."""


def of_number(scalar: Any) -> Linear:
    if scalar.value == 1 and len(scalar.powers) == 1 and scalar.powers[0][1] == 1:
        return Linear(0, frozenset(((Capture(scalar.powers[0][0], integer=True, positive=True), 1),)))
    return Linear(plain(scalar))


def of_size(size: Size) -> Linear:
    if isinstance(size, int):
        return Linear(size)
    constant, parts = 0, {}
    for part, coefficient in sympy.expand(size).as_coefficients_dict().items():
        if not isinstance(coefficient, (int, sympy.Integer)):
            raise UnreadError(f"it depends on the size {size}, which is no sum of sizes")
        if part == 1:
            constant = int(coefficient)
        else:
            parts[part] = int(coefficient)
    return Linear(constant, frozenset(parts.items()))


def plain(scalar) -> float:
    """Returns a constant of a term as a float; raises UnreadError for a number capture of a pattern."""
    if scalar.powers:
        raise UnreadError(f"it depends on the number {scalar.powers[0][0]}")
    return scalar.value


def scaled(a: Linear, b: Linear) -> Linear:
    """Returns a * b; one of them must be constant."""
    if a.parts and b.parts:
        raise UnreadError("it multiplies positions")
    form, by = (b, a.constant) if b.parts else (a, b.constant)
    if form.parts and not is_whole(by):
        raise UnreadError(f"it multiplies positions by {by:g}")
    return ZERO.plus(form, by)


def coordinate(dim: int) -> Linear:
    return of_part(dim)


def of_part(part: Part) -> Linear:
    return Linear(0, frozenset(((part, 1),)))


# Arithmetic in a dtype


def in_(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"


def hides(number: float) -> bool:
    """Returns whether a number is finite, and lower than any score."""
    return math.isfinite(number) and number <= HIDES


def added(scalar: Any, dtype: torch.dtype | None) -> Linear:
    """Returns a number to be added in `dtype`, if the dtype represents it or rounds it to a number that hides."""
    number = of_number(scalar)
    if number.parts or not is_rounding(dtype) or holds(dtype, number.constant):
        return number
    if hides(stored(dtype, number.constant)):
        return Linear(stored(dtype, number.constant))
    raise UnreadError(f"it adds {number.constant:g}, which is rounded{in_(dtype)}")


def multiplied(scalar: Any, dtype: torch.dtype | None) -> Linear:
    """Returns a factor in `dtype` that rounds to neither 0 nor infinity, so that zeros and hidden values stay so."""
    number = plain(scalar)
    value = stored(dtype, number)
    if number and not (value and math.isfinite(value)):
        raise UnreadError(f"it multiplies by {number:g}, which is {value:g}{in_(dtype)}")
    return Linear(number)


def add(dtype: torch.dtype | None, a: Linear, b: Linear) -> Linear:
    """Returns a + b; if one hides, the sum must hide: any other sum of large numbers is unreliable."""
    result = a.plus(b)
    if is_rounding(dtype):
        if any(hides(number.constant) for number in (a, b)) and not result.constant <= HIDES:
            raise UnreadError(f"it adds {b} to {a}{in_(dtype)}")
        if result.parts and not (is_whole(a.constant) and is_whole(b.constant)):
            raise UnreadError(f"it adds {b} to {a}{in_(dtype)}")
    return result


def multiply(dtype: torch.dtype | None, a: Linear, b: Linear) -> Linear:
    """Returns a * b; if one hides, the product must hide or be 0. A fill scaled back into reach is not read."""
    result = scaled(a, b)
    is_hidden = any(hides(number.constant) for number in (a, b))
    if is_rounding(dtype) and is_hidden and not (result.constant <= HIDES or result == ZERO):
        raise UnreadError(f"it multiplies {a} by {b}{in_(dtype)}")
    return result


def is_rounding(dtype: torch.dtype | None) -> bool:
    return dtype is not None and dtype.is_floating_point


def numbers_compare(op: str, a: float, b: float, dtype: torch.dtype | None) -> bool:
    """Returns whether two numbers compare so, if rounding them to `dtype` does not change the result."""
    if max(a, b) <= HIDES and (a, b) != (-math.inf, -math.inf):
        raise UnreadError(f"it compares {a:g} with {b:g}, which may be rounded")
    exact, inexact = (
        x <= y if op == "le" else x < y if op == "lt" else x == y
        for x, y in ((a, b), (stored(dtype, a), stored(dtype, b)))
    )
    if exact != inexact or not (is_rounding(dtype) or (holds(dtype, a) and holds(dtype, b))):
        raise UnreadError(f"it compares {a:g} with {b:g}{in_(dtype)}, which rounds them")
    return exact
