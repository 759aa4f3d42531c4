"""The dtype that the ops compute in, and its protection from autocast.

Every op takes the given dtypes, computes in their `accumulation_dtype`, and rounds where its docstring specifies. An
ambient autocast must not change this: the rewriter has already read the casts of autocast from the graph and inserted
them before the op.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, so that double precision stays double, and float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outside_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `fn` to run with autocast disabled on the device of its first tensor argument."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)).device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return fn(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    # torch.library reads the schema from the signature, and would resolve the names in it in this module.
    wrapper.__signature__ = inspect.signature(fn, eval_str=True)  # type: ignore[attr-defined]
    return wrapper
