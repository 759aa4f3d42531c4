"""Which patterns are in use: the defaults, those registered here, and those of installed packages.

A package of somebody's own registers by an entry point in the group "liger_compile.patterns" that loads to a
Pattern or a tuple of them. Every pattern that is not a default is validated before its first use.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, NoReturn

import torch
from torch._subclasses import FakeTensorMode

from liger_compile.graphs.regions import without_modes
from liger_compile.pattern import Pattern
from liger_compile.terms.build import trace
from liger_compile.terms.term import ConstVar, Scalar, Term, sizes_of

GROUP = "liger_compile.patterns"

_registered: dict[str, Pattern] = {}


def register_pattern(pattern: Pattern) -> None:
    """Uses `pattern` in every graph that backend="liger" compiles from now on, in this process.

    Raises ValueError with a sentence that says what to change: a name that is taken, a parameter that search
    never uses, an example that is missing, a replacement of another shape or dtype.
    """
    _refuse_taken_name(pattern, (*default_patterns(), *_installed(), *_registered.values()))
    validate(pattern)
    _registered[pattern.name] = pattern


def unregister_pattern(name: str) -> None:
    """Takes a registered pattern out of use. Raises KeyError if none has this name."""
    if name not in _registered:
        known = ", ".join(_registered) or "none"
        raise KeyError(f"no registered pattern is named {name!r}; registered are: {known}")
    del _registered[name]


def patterns_in_use(extra: Iterable[Pattern] = ()) -> tuple[Pattern, ...]:
    """The patterns of one compilation. Those of the user come first, so that they win at equal size."""
    patterns = [*_registered.values(), *_installed(), *default_patterns()]
    for pattern in extra:
        _refuse_taken_name(pattern, patterns)
        validate(pattern)
        patterns.insert(0, pattern)
    return tuple(patterns)


@functools.cache
def default_patterns() -> tuple[Pattern, ...]:
    """The patterns of this package."""
    from liger_compile.patterns import DEFAULT_PATTERNS

    return DEFAULT_PATTERNS


@functools.cache
def _installed() -> tuple[Pattern, ...]:
    """The patterns of other packages' entry points."""
    found: list[Pattern] = []
    for entry in entry_points(group=GROUP):
        loaded = entry.load()
        for pattern in (loaded,) if isinstance(loaded, Pattern) else tuple(loaded):
            _refuse_taken_name(pattern, (*default_patterns(), *found))
            validate(pattern)
            found.append(pattern)
    return tuple(found)


def _refuse_taken_name(pattern: Pattern, others: Iterable[Pattern]) -> None:
    for other in others:
        if other.name == pattern.name and other is not pattern:
            where = f"{other.search.__module__}.{other.search.__qualname__}"
            raise ValueError(
                f"pattern {pattern.name!r}: the name is taken by the pattern that searches for {where}; "
                "choose another name"
            )


@functools.lru_cache(maxsize=1024)
def validate(pattern: Pattern) -> None:
    """Raises ValueError, in a sentence that says what to change, for a pattern that cannot be right."""

    def refuse(sentence: str) -> NoReturn:
        raise ValueError(f"pattern {pattern.name!r}: {sentence}")

    try:
        parameters, examples = set(pattern.parameters), set(pattern.examples)
    except (TypeError, ValueError):
        refuse("search has no signature to read the captures from; write it as a Python function")
    if missing := sorted(parameters - examples):
        refuse(f"search has the parameter {missing[0]!r} and examples does not; add an example value for it")
    if surplus := sorted(examples - parameters):
        refuse(f"examples has {surplus[0]!r} and search has no such parameter; rename or remove it")
    for name, example in pattern.examples.items():
        _refuse_annotation(pattern, name, example)
    for dtype in (torch.float32, torch.bfloat16):
        with FakeTensorMode(), without_modes():
            captures = {name: _as(dtype, example) for name, example in pattern.examples.items()}
            try:
                terms = trace(pattern.search, captures)
            except (TypeError, KeyError) as error:
                raise ValueError(
                    f"pattern {pattern.name!r}: search could not be traced ({error}); it must return a "
                    "tensor or a tuple of tensors, computed by torch functions from its parameters"
                ) from error
            if unused := sorted(parameters - set().union(*(_used(term) for term in terms))):
                refuse(
                    f"search never uses its parameter {unused[0]!r}, so nothing would bind it; "
                    "remove it, or pass it to a torch function (an int or str as an option, such as "
                    "ignore_index: sizes and dimensions are read from the tensors)"
                )
            if any(not term.args for term in terms):
                refuse("search returns one of its parameters, which every graph contains; return a result")
            if pattern.replace is not None:
                _refuse_other_result(pattern, captures, dtype)


def _refuse_annotation(pattern: Pattern, name: str, example: Any) -> None:
    annotation = str(pattern.parameters[name].annotation)
    for kind in (float, int, str):
        if isinstance(example, kind) and not isinstance(example, bool) and kind.__name__ not in annotation:
            raise ValueError(
                f"pattern {pattern.name!r}: the example for {name!r} is a {kind.__name__} and the parameter "
                f"is not annotated as one; write {name}: {kind.__name__}"
            )
    if not isinstance(example, (torch.Tensor, float, int, str)) or isinstance(example, bool):
        raise ValueError(
            f"pattern {pattern.name!r}: the example for {name!r} is a {type(example).__name__}; expected a "
            "tensor, a float, an int or a str"
        )


def _as(dtype: torch.dtype, example: Any) -> Any:
    if not isinstance(example, torch.Tensor):
        return example
    return torch.empty(example.shape, dtype=dtype if example.dtype == torch.float32 else example.dtype)


def _refuse_other_result(pattern: Pattern, captures: Mapping[str, Any], dtype: torch.dtype) -> None:
    assert pattern.replace is not None
    expected, got = pattern.search(**captures), pattern.replace(**captures)
    expected = expected if isinstance(expected, tuple) else (expected,)
    got = got if isinstance(got, tuple) else (got,)
    if len(expected) != len(got):
        raise ValueError(
            f"pattern {pattern.name!r}: search returns {len(expected)} tensors and replace {len(got)}; "
            "return as many from both"
        )
    for a, b in zip(expected, got, strict=True):
        if sizes_of(a.shape) != sizes_of(b.shape) or a.dtype != b.dtype:
            raise ValueError(
                f"pattern {pattern.name!r}: for {dtype} examples search returns {tuple(a.shape)} {a.dtype} "
                f"and replace {tuple(b.shape)} {b.dtype}; return the same shape and dtype from both"
            )


def _used(term: Term) -> Iterator[str]:
    """The captures that a term mentions."""
    stack, seen = [term], set()
    while stack:
        term = stack.pop()
        if term in seen:
            continue
        seen.add(term)
        stack.extend(term.args)
        if term.op == "var":
            yield term.consts[0]
        for const in term.consts:
            if isinstance(const, ConstVar):
                yield const.name
            elif isinstance(const, Scalar):
                yield from (name for name, _ in const.powers)
