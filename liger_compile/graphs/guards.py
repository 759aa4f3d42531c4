"""Prevents new guards on sizes.

Dynamo has traced a graph for all sizes that its guards admit. This project asks no question that needs one more guard,
because the graph would be recompiled for the sizes that the guard excludes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import sympy

from liger_compile.torch_internals.shapes import checking_guards, guard_check

# They log errors that are raised, with the stack, before the caller can answer them.
_LOGS = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")

# The comparisons that decide whether a size is 1, by their right-hand side.
_RELATIONS_WITH_ONE: Mapping[Any, tuple[Any, ...]] = {
    1: (sympy.Eq, sympy.Ne, sympy.Le, sympy.Gt),
    2: (sympy.Lt, sympy.Ge),
}


class GuardError(RuntimeError):
    """Raised if a fact about symbolic sizes is not known for all of them."""


@contextlib.contextmanager
def no_guards(of: Any) -> Iterator[None]:
    """Makes a question about symbolic sizes that is not decided yet raise GuardError.

    A number that is no size, such as an eps, may become a constant: torch's operators accept it in no other way.

    Args:
        of: a fake tensor, a fake mode, or anything else, which has no symbolic sizes.
    """
    shape_env = getattr(getattr(of, "fake_mode", of), "shape_env", None)
    if shape_env is None:
        yield
        return

    def refuse(expr: Any, _: Any) -> None:
        if any(symbol.is_integer for symbol in expr.free_symbols):
            raise GuardError(f"it depends on sizes that are known at run time only: {expr}")

    with _disabled(_LOGS), checking_guards(shape_env, refuse):
        yield


@contextlib.contextmanager
def _disabled(names: tuple[str, ...]) -> Iterator[None]:
    logs = [logging.getLogger(name) for name in names]
    before = [log.disabled for log in logs]
    for log in logs:
        log.disabled = True
    try:
        yield
    finally:
        for log, was_disabled in zip(logs, before, strict=True):
            log.disabled = was_disabled


@contextlib.contextmanager
def sizes_of_one_may_be_guarded(of: Any) -> Iterator[None]:
    """Allows guards that decide whether a size is 1, within `no_guards`.

    For broadcasting and strides, torch checks whether every size is 1, or less than 2, or equal to its square, which is
    a stride. If a replacement makes a tensor that is smaller than its inputs, one guard decides whether a size of it is
    1.
    """
    shape_env = getattr(getattr(of, "fake_mode", of), "shape_env", None)
    refuse = shape_env and guard_check(shape_env)
    if refuse is None:
        yield
        return

    def unless_one(expr: Any, value: Any) -> None:
        if not _is_about_one(expr):
            refuse(expr, value)

    with checking_guards(shape_env, unless_one):
        yield


def _is_about_one(expr: Any) -> bool:
    """Returns whether a relation of sizes decides no more than whether a size is 1."""
    rhs = getattr(expr, "rhs", None)
    is_of_square = rhs is not None and (expr.lhs == rhs**2 or rhs == expr.lhs**2)
    return is_of_square or expr.func in _RELATIONS_WITH_ONE.get(rhs, ())
