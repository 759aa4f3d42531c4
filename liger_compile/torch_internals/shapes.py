"""Symbolic sizes.

part                        torch           can go
ShapeEnv._check_frozen      2.11 to 2.13    no public name; ShapeEnv calls it before it adds a guard
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Check = Callable[
    [Any, Any], None
]  # receives the expression and its current value; raises to refuse the guard


def guard_check(shape_env: Any) -> Check | None:
    """Returns the function that `checking_guards` made a shape environment call; None if it calls none."""
    return vars(shape_env).get("_check_frozen")


@contextlib.contextmanager
def checking_guards(shape_env: Any, check: Check) -> Iterator[None]:
    """Makes a shape environment call `check` before it adds a guard, and then restores the outer function."""
    before = guard_check(shape_env)
    shape_env._check_frozen = check
    try:
        yield
    finally:
        del shape_env._check_frozen
        if before is not None:
            shape_env._check_frozen = before
