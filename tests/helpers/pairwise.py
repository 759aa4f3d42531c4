"""Few combinations of many settings, in which every two values of any two settings meet."""

from __future__ import annotations

import itertools
import random
from typing import Any


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


def _pairs(combination: list[int]) -> set[tuple[int, int, int, int]]:
    return {(a, i, b, j) for (a, i), (b, j) in itertools.combinations(enumerate(combination), 2)}
