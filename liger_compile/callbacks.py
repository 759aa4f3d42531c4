"""Calls the functions that a pattern brings along, which anybody may have written.

What such a function raises, or answers that is no answer, becomes a PatternError: a sentence that names the pattern,
the function and the fault. The fault costs the pattern the place at hand and nothing else; `liger.strict` raises it.
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

# What a function answers where its answer would be another for other sizes.
_OF_SIZES = {"check": "whether it may be replaced", "profit": "whether it pays", "saves": None}

LONGEST = 300  # characters of what an exception says


class PatternError(Exception):
    """A function of a pattern failed: which function of which pattern, and how, in a sentence."""


def check(match: Match) -> str | None:
    """Why replacing the match would be wrong, or None. Raises PatternError."""
    return _sentence_or_none(match, "check", "None to accept, or a sentence that says why not")


def profit(match: Match) -> str | Annotate | None:
    """Why replacing the match would not pay, or None. Raises PatternError."""
    return _sentence_or_none(
        match, "profit", "None to accept, a sentence that says why not, or an Annotate", Annotate
    )


def saves(match: Match) -> int | None:
    """The bytes that training no longer keeps; None where they are not known. Raises PatternError."""
    answer: Any = _answer(match, "saves")
    if answer is None or isinstance(answer, (torch.SymInt, torch.SymFloat)):
        return None
    is_number = issubclass(type(answer), numbers.Real) and not isinstance(answer, bool)
    if is_number and isfinite(float(answer)) and float(answer) >= 0:
        return int(answer)
    raise PatternError(
        f"saves of pattern {match.pattern.name!r} returned {described(answer)}; expected a number of bytes "
        "from 0 on, or None where it is not known"
    )


def described(value: Any) -> str:
    """A value and its type, in a few words."""
    if value is None:
        return "None"
    text = "" if isinstance(value, (torch.Tensor, list, tuple, dict)) else f"{value!r}, "
    return f"{text if len(text) < LONGEST else ''}a value of type {type(value).__name__}"


def raised(pattern: Pattern, function: str, error: Exception) -> PatternError:
    """The PatternError for what a function of a pattern raised, with `error` as its cause."""
    failure = PatternError(f"{function} of pattern {pattern.name!r} fails here: {told(error)}")
    failure.__cause__ = error
    return failure


def told(error: Exception) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:LONGEST] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def left_for(error: PatternError, match: Match, strict: bool) -> Decision:
    """The decision about a match of which a function failed: the place is left. Raises the error under `strict`."""
    if strict:
        raise error
    return Decision(match, "leave", str(error), failed=True)


def warn_of_failures(decisions: Iterable[Decision]) -> None:
    """One warning for each kind of failure."""
    for reason in dict.fromkeys(decision.reason for decision in decisions if decision.failed):
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
