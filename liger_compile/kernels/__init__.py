"""Triton kernels, one op a file: forward, backward, and the launchers that the ops call.

Only Triton is written here, and only here. Tensors come in as the ops' bodies have them, every check is behind them.
Kernels accumulate in float32, reach rows by 64-bit offsets, and need no size to be a power of two. Launchers choose
block sizes by a function of dtype and shape alone, wait for nothing, and use no atomic operation: the same numbers come
out every time, and a CUDA graph may capture them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled
from torch.library import wrap_triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import JITFunction

INTERPRETED_MULTIPROCESSORS = 2  # so that a program has several rows to go through


class launch:
    """A kernel, to be launched as `launch(kernel)[grid](...)`: no kernel is launched in another way.

    Traced, it is wrapped, so that AOTAutograd sees it, and the compiler chooses the device. Run right away, it runs on
    the device of its first tensor, whichever is current: Triton itself would take the current one.

    A kernel with an argument OVERLAPS begins with `begin`. On Hopper and later GPUs its programs may start while the
    kernel before it ends, and wait there for its results (programmatic dependent launch): what the launch costs is
    hidden behind that kernel. Compilers make ordinary launches of what they trace.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self._run, grid)

    def _run(self, grid: Any, *args: Any, **kwargs: Any) -> None:
        # Interpreted, there is nothing to wrap, and torch 2.11 refuses to.
        is_traced = isinstance(self.kernel, JITFunction) and is_wrap_triton_enabled()
        device = None if is_traced else device_of(args)
        if "OVERLAPS" in self.kernel.arg_names:
            early = device is not None and _launches_early(device)
            kwargs.update(OVERLAPS=early, **({"launch_pdl": True} if early else {}))
        if is_traced:
            wrap_triton(self.kernel)[grid](*args, **kwargs)
            return
        with current(device):
            self.kernel[grid](*args, **kwargs)


def device_of(args: Iterable[Any]) -> int | None:
    """The index of the GPU that the first tensor among these is on; None for a tensor on a CPU."""
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    return tensor.get_device() if tensor.is_cuda else None


def current(device: int | None) -> contextlib.AbstractContextManager[Any]:
    """While `device` is the current one. Nothing is done where it is already, which costs less than a microsecond."""
    if device is None or device == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()


@functools.cache
def _launches_early(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Before a program reads or writes anything: the kernel before may still run."""
    if OVERLAPS:
        gdc_launch_dependents()  # as soon as all programs are here, for the next kernel waits in its turn
        gdc_wait()


@triton.jit
def begin_alone(OVERLAPS: tl.constexpr):
    """As `begin`, in short kernels: the next one's programs, which may fill the GPU and are as many as it has places,
    would find some taken by this one, and wait."""
    if OVERLAPS:
        gdc_wait()


def num_multiprocessors(device: torch.device) -> int:
    """How many programs of a grid run side by side, at least."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
