"""No guards of ours on sizes. Dynamo has traced a graph for all sizes that its guards let through; a question that only
one more guard would answer is one that we do not ask, for the graph would be compiled again for the sizes it excludes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import sympy

_log = logging.getLogger("torch.fx.experimental.symbolic_shapes")

# The comparisons that say whether a size is 1, by the number on their right.
_RELATIONS_WITH_ONE: dict[Any, tuple[Any, ...]] = {
    1: (sympy.Eq, sympy.Ne, sympy.Le, sympy.Gt),
    2: (sympy.Lt, sympy.Ge),
}


class GuardError(RuntimeError):
    """What was asked of symbolic sizes is not known of all of them."""


@contextlib.contextmanager
def no_guards(of: Any) -> Iterator[None]:
    """While it lasts, a question about symbolic sizes that is not decided yet raises GuardError. `of`: a fake tensor, a
    fake mode, or anything else, of which no sizes are symbolic.

    A number that is no size, such as an eps, may become a constant: operators of torch take those in no other way.
    """
    shape_env = getattr(getattr(of, "fake_mode", of), "shape_env", None)
    if shape_env is None:
        yield
        return

    def refuse(expr: Any, _: Any) -> None:
        if any(symbol.is_integer for symbol in expr.free_symbols):
            raise GuardError(f"it depends on sizes, by {expr}, that are known at run time only")

    disabled, _log.disabled = _log.disabled, True  # it logs what is raised there
    try:
        with _before_a_guard(shape_env, refuse):
            yield
    finally:
        _log.disabled = disabled


@contextlib.contextmanager
def sizes_of_one_may_be_guarded(of: Any) -> Iterator[None]:
    """Within `no_guards`: torch asks of every size whether it is 1 or less than 2, for broadcasting and for strides.
    Where a replacement makes a tensor that is smaller than its inputs, one guard says whether a size of it is 1.
    """
    shape_env = getattr(getattr(of, "fake_mode", of), "shape_env", None)
    refuse = shape_env and vars(shape_env).get("_check_frozen")
    if refuse is None:
        yield
        return

    def unless_one(expr: Any, value: Any) -> None:
        if expr.func not in _RELATIONS_WITH_ONE.get(getattr(expr, "rhs", None), ()):
            refuse(expr, value)

    with _before_a_guard(shape_env, unless_one):
        yield


@contextlib.contextmanager
def _before_a_guard(shape_env: Any, called: Callable[[Any, Any], None]) -> Iterator[None]:
    """A shape environment calls `called` before it takes a guard; other places set it too, one within another."""
    before = vars(shape_env).get("_check_frozen")
    shape_env._check_frozen = called
    try:
        yield
    finally:
        del shape_env._check_frozen
        if before is not None:
            shape_env._check_frozen = before
