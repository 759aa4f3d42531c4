"""Finds where a term rounds, and where two terms of the same mathematics round differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from liger_compile.diagnose.formula import Formula
from liger_compile.terms.term import Term

_MOVES = ("view", "expand", "permute", "slice", "cat", "rotate_half", "rotate_pairs")  # ops without rounding
WHOLE = 50  # the depth of a formula that shows everything
MOST = 200  # most values compared; patterns have fewer


@dataclass(frozen=True)
class Rounding:
    """A value of a computation, the dtype that it is computed in, and the dtype that it is rounded to, if any."""

    term: Term
    computed: torch.dtype | None
    rounded: torch.dtype | None


@dataclass(frozen=True)
class Moved:
    """A value with other rounding than expected. None marks a pattern, or a graph, that does not compute it."""

    value: str
    expected: Rounding | None
    found: Rounding | None


def roundings(term: Term, formula: Formula) -> dict[str, Rounding]:
    """Returns formula -> value for the values in a term; the same mathematics has the same formulas."""
    found: dict[str, Rounding] = {}
    stack: list[tuple[Term, torch.dtype | None]] = [(term, None)]
    seen: set[tuple[Term, torch.dtype | None]] = set()
    while stack and len(seen) < MOST:
        term, rounded = stack.pop()
        if (term, rounded) in seen:
            continue
        seen.add((term, rounded))
        if term.op == "cast":
            (inner,) = term.args
            stack.append((inner, term.dtype if narrows(inner.dtype, term.dtype) else rounded))
            continue
        text = formula(term.uncast, depth=WHOLE)
        is_captured = term.op in ("leaf", "var") or term.uncast in formula.captures
        if term.dtype is not None and term.op not in _MOVES and (rounded or not is_captured):
            rounded = rounded or (found[text].rounded if text in found else None)
            found[text] = Rounding(term, None if is_captured else term.dtype, rounded)
        if not is_captured:
            stack.extend((arg, rounded if term.op in _MOVES else None) for arg in term.args)
    return found


def narrows(wide: torch.dtype | None, narrow: torch.dtype | None) -> bool:
    """Returns whether a cast from `wide` to `narrow` rounds."""
    return wide is not None and narrow is not None and narrow.itemsize < wide.itemsize


def moved(want: Mapping[str, Rounding], have: Mapping[str, Rounding]) -> list[Moved]:
    """Returns the values with another dtype or rounding than expected; those that the graph computes come first."""
    different = []
    for text in {**have, **want}:
        expected, found = want.get(text), have.get(text)
        if expected is None or found is None:
            is_other = bool((expected or found).rounded)  # pyright: ignore[reportOptionalMemberAccess]
        else:
            is_other = (expected.computed, expected.rounded) != (found.computed, found.rounded)
        if is_other:
            different.append(Moved(text, expected, found))
    return sorted(different, key=lambda move: (move.found is None, len(move.value)))
