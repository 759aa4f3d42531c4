"""No guards of ours on sizes. Dynamo has traced a graph for all sizes that its guards let through; a question that only
one more guard would answer is one that we do not ask, for the graph would be compiled again for the sizes it excludes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

_log = logging.getLogger("torch.fx.experimental.symbolic_shapes")


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

    # What a shape environment calls before it takes a guard; other places may ask it to be without guards meanwhile.
    before = vars(shape_env).get("_check_frozen")
    shape_env._check_frozen = refuse
    disabled, _log.disabled = _log.disabled, True  # it logs what is raised there
    try:
        yield
    finally:
        _log.disabled = disabled
        del shape_env._check_frozen
        if before is not None:
            shape_env._check_frozen = before
