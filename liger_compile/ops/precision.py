"""Which dtype the ops compute in, and that nothing around them changes it.

Every op takes the dtypes that it is given, computes in `accumulation_dtype` of them, and rounds where its
docstring says. An ambient autocast must not touch that: the rewriter has already read autocast's casts off
the graph and put them in front of the op.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, so that double precision stays double; float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outside_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `fn` with autocast disabled on the device of its first tensor argument."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)).device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return fn(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    # torch.library reads the schema off the signature, and would look the names in it up in this module.
    wrapper.__signature__ = inspect.signature(fn, eval_str=True)  # type: ignore[attr-defined]
    return wrapper
