"""Fake tensors: shapes, dtypes and devices without values.

part                                            torch           can go
torch._subclasses                               2.11 to 2.13    no public name for FakeTensor, its mode and its errors
torch._guards.detect_fake_mode                  2.11 to 2.13    no public name
Tensor._is_view, Tensor._base                   2.11 to 2.13    no public name
torch._C._autograd._unsafe_set_version_counter  2.11 to 2.13    no public name
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from liger_compile.torch_internals.dispatch import with_inner_tensors
from liger_compile.torch_internals.tensors import storage_of, version_of

__all__ = [
    "NEEDS_VALUES",
    "FakeTensor",
    "FakeTensorMode",
    "detect_fake_mode",
    "errors_not_logged",
    "forget_placement",
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


def forget_placement(inputs: Iterable[torch.Tensor]) -> None:
    """Sets the version of fake inputs to 0 where it counts only that torch has placed them in memory, and no write.

    The fake tensor of an input begins in memory of its own. Torch moves it by `set_`, which increments its version, if
    the input has a storage offset, or another input in the same storage came first: pieces of one buffer. Which input
    came first is not recorded. It is known for a version of 0, because only the first one is not moved.
    """
    wholes = {id(whole): whole for whole in map(_whole, inputs) if type(whole) is FakeTensor}.values()
    firsts = {storage_of(whole) for whole in wholes if version_of(whole) == 0}
    for whole in wholes:
        storage = storage_of(whole)
        is_placed = storage is not None and (storage in firsts or _has_offset(whole))
        if is_placed and version_of(whole) == 1:
            torch._C._autograd._unsafe_set_version_counter((whole,), (0,))  # pyright: ignore[reportAttributeAccessIssue]


def _whole(tensor: torch.Tensor) -> Any:
    """Returns the tensor of which a tensor is a view, with which it shares its version; itself if it is no view."""
    return tensor._base if tensor._is_view() else tensor


def _has_offset(tensor: torch.Tensor) -> bool:
    offset = tensor.storage_offset()
    return not isinstance(offset, int) or offset != 0
