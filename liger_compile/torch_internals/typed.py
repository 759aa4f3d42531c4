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
manual_seed: Callable[[int], object] = torch.manual_seed


def list_backends(exclude_tags: Iterable[str]) -> list[str]:
    """Returns the names of the backends that torch.compile finds, without those of these tags."""
    return torch.compiler.list_backends(tuple(exclude_tags))


def norm(tensor: torch.Tensor) -> float:
    """Returns the L2 norm of all elements."""
    return tensor.norm().item()


def device_properties(device: int) -> DeviceProperties:
    """Returns the properties of a CUDA device."""
    return torch.cuda.get_device_properties(device)
