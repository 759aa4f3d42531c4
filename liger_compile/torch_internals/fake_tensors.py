"""Fake tensors: shapes, dtypes and devices without values.

part                                torch           can go
torch._subclasses                   2.11 to 2.13    no public name for FakeTensor, its mode and its errors
torch._guards.detect_fake_mode      2.11 to 2.13    no public name
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

__all__ = ["NEEDS_VALUES", "FakeTensor", "FakeTensorMode", "detect_fake_mode", "errors_not_logged"]

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
