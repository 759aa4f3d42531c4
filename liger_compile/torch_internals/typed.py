"""Public functions of torch whose own annotations are incomplete, with types: strict modules call them from here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class DeviceProperties(Protocol):
    """The properties of a CUDA device that this package reads."""

    name: str
    major: int
    minor: int
    total_memory: int


compile: Callable[..., Callable[..., Any]] = torch.compile
fork_rng: Callable[..., AbstractContextManager[None]] = torch.random.fork_rng
list_backends: Callable[[Iterable[str]], list[str]] = torch.compiler.list_backends
manual_seed: Callable[[int], object] = torch.manual_seed


def norm(tensor: torch.Tensor) -> float:
    """Returns the L2 norm of all elements."""
    return tensor.norm().item()


def device_properties(device: int) -> DeviceProperties:
    """Returns the properties of a CUDA device."""
    return torch.cuda.get_device_properties(device)
