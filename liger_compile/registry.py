"""The patterns in use: the defaults, the patterns registered here, and those of installed packages.

A third-party package registers patterns by an entry point in the group "liger_compile.patterns" that loads to a
Pattern or a tuple of them. Every pattern that is not a default is validated before its first use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from liger_compile.pattern import Pattern
from liger_compile.steps.callbacks import described
from liger_compile.validation import validate

GROUP = "liger_compile.patterns"

REGISTERED: dict[str, Pattern] = {}


def register_pattern(pattern: Pattern, *, replace_existing: bool = False) -> None:
    """Uses `pattern` in every graph that backend="liger" compiles from now on, in this process.

    Args:
        pattern: the pattern to register.
        replace_existing: replace the registered pattern of the same name, if there is one: for a notebook cell that
            runs twice.

    Raises:
        ValueError: with a sentence that states what to change: the name is taken, search never uses a parameter,
            an example is missing, or the replacement has another shape or dtype or writes into its arguments.
        TypeError: `pattern` is not a Pattern, or one of its fields has the wrong type.
    """
    _refuse_other_types(pattern)
    registered = [
        other for name, other in REGISTERED.items() if not (replace_existing and name == pattern.name)
    ]
    _refuse_taken_name(pattern, (*default_patterns(), *installed_patterns(), *registered))
    validate(pattern)
    REGISTERED[pattern.name] = pattern


def unregister_pattern(name: str) -> None:
    """Removes a registered pattern. Raises KeyError if no registered pattern has this name."""
    if name not in REGISTERED:
        known = ", ".join(REGISTERED) or "none"
        raise KeyError(f"no registered pattern is named {name!r}; registered are: {known}")
    del REGISTERED[name]


def patterns_in_use(extra: Iterable[Pattern] = ()) -> tuple[Pattern, ...]:
    """Returns the patterns of one compilation. Those of the user come first, so that they win at equal size."""
    patterns = [*REGISTERED.values(), *installed_patterns(), *default_patterns()]
    for pattern in extra:
        _refuse_taken_name(pattern, patterns)
        validate(pattern)
        patterns.insert(0, pattern)
    return tuple(patterns)


@functools.cache
def default_patterns() -> tuple[Pattern, ...]:
    """Returns the patterns of this package."""
    # By name, because pyright does not find this package in an editable install.
    return import_module("liger_compile.patterns").DEFAULT_PATTERNS


@functools.cache
def installed_patterns() -> tuple[Pattern, ...]:
    """Returns the patterns from entry points of other packages."""
    found: list[Pattern] = []
    for entry in entry_points(group=GROUP):
        loaded = entry.load()
        for pattern in (loaded,) if isinstance(loaded, Pattern) else tuple(loaded):
            _refuse_taken_name(pattern, (*default_patterns(), *found))
            validate(pattern)
            found.append(pattern)
    return tuple(found)


def _refuse_other_types(given: object) -> None:
    if not isinstance(given, Pattern):
        raise TypeError(
            f"register_pattern: expected a Pattern, got {described(given)}; "
            "write Pattern(name=..., search=..., replace=..., examples=...), and register several one by one"
        )


def _refuse_taken_name(pattern: Pattern, others: Iterable[Pattern]) -> None:
    for other in others:
        if other.name == pattern.name and other is not pattern:
            advice = "choose another name"
            if REGISTERED.get(other.name) is other:
                advice += (
                    ", or replace the other one: register_pattern(..., replace_existing=True), or "
                    f"unregister_pattern({other.name!r}) first"
                )
            raise ValueError(
                f"pattern {pattern.name!r}: the name is taken by the pattern that searches for "
                f"{_called(other.search)}, and this one searches for {_called(pattern.search)}; {advice}"
            )


def _called(function: Callable[..., Any]) -> str:
    """Returns the module and name of a function."""
    name = getattr(function, "__qualname__", None)
    return f"{function.__module__}.{name}" if name else repr(function)
