"""Triton kernels, one op a file: forward, backward, and the launchers that the ops call.

Only Triton is written here, and only here. Tensors come in as the ops' bodies have them, every check is behind them.
Kernels accumulate in float32, reach rows by 64-bit offsets, and need no size to be a power of two. Launchers choose
block sizes by a function of dtype and shape alone, wait for nothing, and use no atomic operation: the same numbers come
out every time, and a CUDA graph may capture them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch._library.triton import is_wrap_triton_enabled
from torch.library import wrap_triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import JITFunction

INTERPRETED_MULTIPROCESSORS = 2  # so that a program has several rows to go through


class launch:
    """A kernel of a traceable op, to be launched as `launch(kernel)[grid](...)`. It begins with `begin`.

    Traced, it is wrapped, so that AOTAutograd sees it. Run right away, by Hopper or a later GPU, its programs may start
    while the kernel before it ends, and wait there for its results (programmatic dependent launch): what the launch
    costs is hidden behind that kernel. Compilers make ordinary launches of what they trace.

    Opaque ops launch theirs as they are.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        # Interpreted, there is nothing to wrap, and torch 2.11 refuses to.
        if not isinstance(self.kernel, JITFunction):
            return functools.partial(self.kernel[grid], OVERLAPS=False)
        if is_wrap_triton_enabled() or not _launches_early(torch.cuda.current_device()):
            return functools.partial(wrap_triton(self.kernel)[grid], OVERLAPS=False)
        return functools.partial(self.kernel[grid], OVERLAPS=True, launch_pdl=True)


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
