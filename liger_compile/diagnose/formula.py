"""Formats a term as a formula that the author of a model can read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from liger_compile.terms.normalize import MINUS_ONE
from liger_compile.terms.term import Scalar, Term

DEPTH, WIDTH = 3, 8  # most nested operations in a formula, and most arguments of each
LENGTH = 200  # most operations in a formula
_HIDDEN = ("view", "expand", "permute", "cast")  # ops that compute nothing


class Formula:
    """Formats terms as formulas.

    Args:
        name: returns the name of an operation or of a graph input: "clamp", "x".
        is_call: returns whether an opaque term is an operation, and not an input.
        captures: term -> the name of the capture that is bound to it.
        numbers: number capture -> its value.
    """

    def __init__(
        self,
        name: Callable[[Term], str],
        is_call: Callable[[Term], bool],
        captures: Mapping[Term, str],
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        self.name, self.is_call, self.captures, self.numbers = name, is_call, captures, numbers or {}
        self._left = LENGTH

    def __call__(self, term: Term, depth: int = DEPTH) -> str:
        self._left = LENGTH
        return self._text(term, depth)

    def _text(self, term: Term, depth: int) -> str:
        while term.op in _HIDDEN and term not in self.captures and term.may_be_passed:
            term = term.args[0]
        if term in self.captures:
            return self.captures[term]
        if term.op == "var":
            return term.consts[0]
        if term.op == "number":
            return self.number(term.consts[0])
        if term.op == "leaf":
            return f"{self.name(term)}(...)" if self.is_call(term) else self.name(term)
        self._left -= 1
        if not depth or self._left < 0 or term.op in _HIDDEN:
            return "..."
        if term.op == "mul":
            return self._product(term, depth - 1)
        if term.op == "add":
            return self._sum(term, depth - 1)
        if term.op == "slice":
            return self._slice(term, depth)
        shown = [self._text(arg, depth - 1) for arg in term.args[:WIDTH] if arg.op != "none"]
        return f"{self.name(term)}({', '.join([*shown, *_not_shown(term)])})"

    def power(self, term: Term, power: float, depth: int = DEPTH) -> str:
        """Returns the text of a factor with its power."""
        self._left = LENGTH
        return self._power(term, power, depth)

    def _power(self, term: Term, power: float, depth: int) -> str:
        text = self._text(term, depth)
        if power in (0.5, -0.5):
            return f"{'sqrt' if power > 0 else 'rsqrt'}({text})"
        text = f"({text})" if " + " in text or " - " in text else text
        return text if power == 1 else f"1 / {text}" if power == -1 else f"{text}**{power:g}"

    def number(self, scalar: Scalar) -> str:
        value, names = scalar.value, []
        for name, power in scalar.powers:
            if name in self.numbers:
                value *= self.numbers[name] ** power
            else:
                names.append(name if power == 1 else f"{name}**{power:g}")
        return " * ".join([*([f"{value:g}"] if value != 1 or not names else []), *names])

    def _product(self, term: Term, depth: int) -> str:
        scalar, *powers = term.consts
        factors = [self._power(arg, power, depth) for arg, power in zip(term.args, powers, strict=True)]
        factors.sort(key=lambda factor: (len(factor), factor))
        if scalar == MINUS_ONE:
            return "-" + " * ".join(factors)
        return " * ".join([*([] if scalar.is_number(1) else [self.number(scalar)]), *factors])

    def _sum(self, term: Term, depth: int) -> str:
        parts = sorted(
            (self._text(arg, depth) for arg in term.args[:WIDTH]),
            key=lambda part: (part[0] == "-", len(part), part),
        )
        constant = term.consts[0]
        parts += [] if constant.is_number(0) else [self.number(constant)]
        parts += _not_shown(term)
        return " + ".join(parts).replace("+ -", "- ")

    def _slice(self, term: Term, depth: int) -> str:
        (x,), (dim, start, stop, step) = term.args, term.consts
        start, stop = self._as_in_the_graph(x, dim, start), self._as_in_the_graph(x, dim, stop)
        stop = None if stop == self._size(x, dim) else stop
        bounds = f"{start or ''}:{'' if stop is None else stop}" + (f":{step}" if step != 1 else "")
        return f"{self._text(x, depth)}[..., {', '.join([bounds, *[':'] * (-1 - dim)])}]"

    def _as_in_the_graph(self, x: Term, dim: int, at: Any) -> Any:
        """Scales the bound of a capture's slice from the size in the pattern's examples to that in the graph."""
        example, size = x.shape[dim], self._size(x, dim)
        is_known = isinstance(at, int) and isinstance(example, int) and isinstance(size, int) and example
        return at * size // example if is_known else at

    def _size(self, x: Term, dim: int) -> Any:
        """Returns the size of the term that a capture is bound to, or of a term of the graph."""
        bound = next(
            (term for term, name in self.captures.items() if x.op == "var" and x.consts[0] == name), x
        )
        return bound.shape[dim] if -dim <= len(bound.shape) else x.shape[dim]


def _not_shown(term: Term) -> list[str]:
    """Returns an ellipsis if a term has more arguments than a formula shows."""
    return ["..."] if len(term.args) > WIDTH else []
