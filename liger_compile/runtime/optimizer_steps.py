"""Preserves the inputs of promises before an optimizer step changes them.

Before a step, pending promises keep the tensors that the optimizer is about to change. Otherwise their values would
later be computed from different weights.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from liger_compile.runtime.promise import Promise, storage_of

# Not a WeakSet: its callbacks are Python functions, and Dynamo compiles them if a promise ends within a compiled call.
_waiting: list[weakref.ref[Promise]] = []
_lock = threading.Lock()


class _Running(threading.local):
    """The steps of this thread that call a closure, by optimizer: the storages that each changes."""

    def __init__(self) -> None:
        self.steps: dict[int, set[int | None]] = {}


_running = _Running()


def waiting() -> list[Promise]:
    """Return the live promises that preserve their inputs before steps."""
    with _lock:
        return [promise for reference in _waiting if (promise := reference()) is not None]


def keep_before_steps(promise: Promise) -> None:
    """Preserve the promise's inputs before each step, for as long as the promise lives."""
    watch_steps()
    if _running.steps:  # the closure of a step creates the promise; one step may run within another
        promise.keep(set().union(*_running.steps.values()), {})
    with _lock:
        _waiting[:] = [reference for reference in _waiting if reference() is not None]
        _waiting.append(weakref.ref(promise))


@functools.cache
def watch_steps() -> None:
    """Register the optimizer step hooks. Call this before a step whose closure creates promises."""
    # Once, and never removed: Dynamo guards on the hooks when it compiles a step.
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():  # fingerprints detect the change instead
        return
    if any(map(callable, (*args[1:], *kwargs.values()))):
        _running.steps[id(optimizer)] = {storage_of(weight) for weight in _trained(optimizer)} - {None}
    promises = waiting()
    storages = set().union(*(promise.storages() for promise in promises))
    if not storages:
        return
    changing = {storage for weight in _trained(optimizer) if (storage := storage_of(weight)) in storages}
    copies: dict[Any, Tensor] = {}
    for promise in promises if changing else ():
        promise.keep(changing, copies)


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        _running.steps.pop(id(optimizer), None)


def _trained(optimizer: Any) -> Iterator[Tensor]:
    """Yield the tensors that a step changes, without frozen ones."""
    for group in getattr(optimizer, "param_groups", ()):
        for weight in group.get("params", ()):
            if isinstance(weight, Tensor) and (weight.requires_grad or weight.grad is not None):
                yield weight
