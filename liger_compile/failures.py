"""The one policy for failures of ours: the user's program runs as it came, and the user hears of it once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def or_as_it_came(rewritten: Callable[[], T], untouched: Callable[[str], T], *, what: str, strict: bool) -> T:
    """What `rewritten` gives; where that raises, a warning and what `untouched` gives for the sentence that says why.

    Args:
        what: the subject of that sentence, "the graph".
        strict: raise instead.
    """
    try:
        return rewritten()
    except Exception as error:
        if strict:
            raise
        why = f"{what} is compiled as it came, because rewriting it failed: {type(error).__name__}: {error}"
        warnings.warn(f"liger_compile: {why}; liger.strict=True raises instead", stacklevel=3)
        return untouched(why)
