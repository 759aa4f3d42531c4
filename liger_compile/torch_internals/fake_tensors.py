"""Fake tensors: shapes, dtypes and devices without values.

part                                torch           can go
torch._subclasses                   2.11 to 2.13    no public name for FakeTensor, its mode and its errors
torch._guards.detect_fake_mode      2.11 to 2.13    no public name
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from liger_compile.torch_internals.dispatch import with_inner_tensors

__all__ = [
    "NEEDS_VALUES",
    "FakeTensor",
    "FakeTensorMode",
    "detect_fake_mode",
    "errors_not_logged",
    "like",
    "mode_of",
]

# Raised where a function reads a value, or makes a shape that depends on one.
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)

_log = logging.getLogger("torch._subclasses.fake_tensor")


@contextlib.contextmanager
def errors_not_logged() -> Iterator[None]:
    """Silences the log of fake tensors, which has each error with its traceback: the caller reports the errors."""
    disabled, _log.disabled = _log.disabled, True
    try:
        yield
    finally:
        _log.disabled = disabled


def mode_of(value: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns the mode of a fake tensor, or of a tensor that wraps fake tensors; otherwise a context without effect."""
    parts = with_inner_tensors(value) if isinstance(value, torch.Tensor) else ()
    modes = (part.fake_mode for part in parts if isinstance(part, FakeTensor))
    return next(modes, contextlib.nullcontext())


def like(value: Any) -> Any:
    """Returns a new fake tensor with the properties of a tensor, in the mode of the current trace; other values as is.

    It shares memory with no other tensor, nobody has written into it, and no storage offset precedes it.
    """
    if not isinstance(value, torch.Tensor):
        return value
    mode = detect_fake_mode() or getattr(value, "fake_mode", None) or FakeTensorMode()
    with mode, torch.inference_mode(value.is_inference()), torch.set_grad_enabled(not value.is_inference()):
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.requires_grad_(value.requires_grad)
