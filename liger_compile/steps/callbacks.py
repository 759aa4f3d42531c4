"""Calls the functions of a pattern, which any user may have written.

If such a function raises, or returns an invalid answer, the result is a PatternError: a sentence that names the
pattern, the function and the fault. The fault only prevents the pattern at this place; `liger.strict` raises it.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any

import torch

from liger_compile.graphs.guards import GuardError, no_guards
from liger_compile.pattern import Annotate, Decision, Match, Pattern

# The start of a function's answer if the answer would differ for other sizes.
_OF_SIZES = {"check": "whether it may be replaced", "profit": "whether it pays", "saves": None}

LONGEST = 300  # characters of an exception's message


class PatternError(Exception):
    """A function of a pattern failed; the sentence names the pattern, the function and the fault."""


def check(match: Match) -> str | None:
    """Returns why replacing the match would be wrong, or None. Raises PatternError."""
    return _sentence_or_none(match, "check", "None to accept, or a sentence with the reason")


def profit(match: Match) -> str | Annotate | None:
    """Returns why replacing the match would not pay, or None. Raises PatternError."""
    return _sentence_or_none(
        match, "profit", "None to accept, a sentence with the reason, or an Annotate", Annotate
    )


def saves(match: Match) -> int | None:
    """Returns the bytes that training no longer keeps; None if unknown. Raises PatternError."""
    answer: Any = _answer(match, "saves")
    if answer is None or isinstance(answer, (torch.SymInt, torch.SymFloat)):
        return None
    is_number = issubclass(type(answer), numbers.Real) and not isinstance(answer, bool)
    if is_number and isfinite(float(answer)) and float(answer) >= 0:
        return int(answer)
    raise PatternError(
        f"saves of pattern {match.pattern.name!r} returned {described(answer)}; expected a number of bytes, "
        "0 or more, or None if it is not known"
    )


def described(value: Any) -> str:
    """Returns a value and its type, in a few words."""
    if value is None:
        return "None"
    text = "" if isinstance(value, (torch.Tensor, list, tuple, dict)) else f"{value!r}, "
    return f"{text if len(text) < LONGEST else ''}a value of type {type(value).__name__}"


def raised(pattern: Pattern, function: str, error: Exception) -> PatternError:
    """Returns the PatternError for an exception of a pattern's function, with `error` as its cause."""
    failure = PatternError(f"{function} of pattern {pattern.name!r} fails here: {in_one_line(error)}")
    failure.__cause__ = error
    return failure


def in_one_line(error: Exception) -> str:
    """Returns an exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:LONGEST] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def left_for(error: PatternError, match: Match, strict: bool) -> Decision:
    """Returns the decision to leave a match of which a function failed. Raises the error under `strict`."""
    if strict:
        raise error
    return Decision(match, "leave", str(error), failed=True)


def warn_of_failures(decisions: Iterable[Decision], others: Iterable[str] = ()) -> None:
    """Warns once for each kind of failure: of the failed decisions, and of `others`, which are sentences."""
    reasons = (decision.reason for decision in decisions if decision.failed)
    for reason in dict.fromkeys((*reasons, *others)):
        warnings.warn(f"liger_compile: {reason}; liger.strict=True raises instead", stacklevel=2)


def _sentence_or_none(match: Match, function: str, expected: str, *others: type) -> Any:
    answer = _answer(match, function)
    is_sentence = isinstance(answer, str) and bool(answer.strip())
    if answer is None or is_sentence or isinstance(answer, others):
        return answer
    raise PatternError(
        f"{function} of pattern {match.pattern.name!r} returned {described(answer)}; expected {expected}"
    )


def _answer(match: Match, function: str) -> Any:
    asked: Callable[[Match], Any] | None = getattr(match.pattern, function)
    if asked is None:
        return None
    try:
        with no_guards(match.result):
            return asked(match)
    except GuardError as error:
        return _OF_SIZES[function] and f"{_OF_SIZES[function]}: {error}"
    except Exception as error:
        raise raised(match.pattern, function, error) from error
