"""Few combinations of many settings, in which every two values of any two settings meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest


def pairwise(**settings: list[Any]) -> list[dict[str, Any]]:
    """Dictionaries of one value for each setting. The same for the same settings."""
    rng = random.Random(0)
    names = list(settings)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(settings[names[a]]))
        for j in range(len(settings[names[b]]))
    }
    chosen = []
    while missing:
        candidates = [[rng.randrange(len(settings[name])) for name in names] for _ in range(40)]
        a, i, b, j = min(missing)
        for candidate in candidates:
            candidate[a], candidate[b] = i, j
        best = max(candidates, key=lambda candidate: len(_pairs(candidate) & missing))
        missing -= _pairs(best)
        chosen.append({name: settings[name][at] for name, at in zip(names, best, strict=True)})
    return chosen


def parametrize(indirect: Sequence[str] = (), **settings: list[Any]) -> pytest.MarkDecorator:
    """pytest.mark.parametrize of all of these arguments, with the combinations that `pairwise` chooses.

    `indirect` are the names of fixtures among them.
    """
    named = {name: {_name(value): value for value in values} for name, values in settings.items()}
    chosen = pairwise(**{name: list(values) for name, values in named.items()})
    cases = [
        pytest.param(*(named[name][value] for name, value in case.items()), id="-".join(case.values()))
        for case in chosen
    ]
    return pytest.mark.parametrize(tuple(settings), cases, indirect=list(indirect))


def _name(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value).removeprefix("torch.")


def _pairs(combination: list[int]) -> set[tuple[int, int, int, int]]:
    return {(a, i, b, j) for (a, i), (b, j) in itertools.combinations(enumerate(combination), 2)}
