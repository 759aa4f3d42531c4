"""The single policy for internal failures: the user's program runs unchanged, and the user gets one warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def or_unchanged(
    rewritten: Callable[[], T], untouched: Callable[[str], T], *, subject: str, strict: bool
) -> T:
    """Returns the result of `rewritten`; if it raises, warns and returns `untouched` of a sentence with the reason.

    Args:
        subject: the subject of that sentence, for example "the graph".
        strict: raise instead.
    """
    try:
        return rewritten()
    except Exception as error:
        if strict:
            raise
        why = f"{subject} is compiled unchanged, because the rewriter failed: {type(error).__name__}: {error}"
        warnings.warn(f"liger_compile: {why}; liger.strict=True raises instead", stacklevel=3)
        return untouched(why)
