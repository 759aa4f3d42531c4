"""Triton kernels, one op per file: forward, backward, and the launchers that the ops call.

All Triton code is in this package, and this package contains only Triton code. Launchers receive the tensors of the op
bodies, after all checks. Kernels accumulate in float32, address rows by 64-bit offsets, and do not require sizes that
are powers of two. Launchers choose block sizes from dtype and shape alone, do not synchronize, and use no atomic
operations. The results are therefore deterministic, and a CUDA graph can capture the kernels.
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
from torch.library import wrap_triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import JITFunction

from liger_compile.torch_internals.operators import is_wrap_triton_enabled

INTERPRETED_MULTIPROCESSORS = 2  # so that a program processes several rows


class launch:
    """A launcher: `launch(kernel)[grid](...)`. All kernels are launched this way.

    During tracing, the kernel is wrapped, so that AOTAutograd records it, and the compiler chooses the device. Outside
    of tracing, it runs on the device of its first tensor; Triton itself would use the current device.

    A kernel with an argument OVERLAPS begins with `begin`. On Hopper and later GPUs, its programs may start while the
    previous kernel ends, and wait there for its results (programmatic dependent launch). The previous kernel then hides
    the launch overhead. Compilers use ordinary launches for traced kernels.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self._run, grid)

    def _run(self, grid: Any, *args: Any, **kwargs: Any) -> None:
        # An interpreted kernel cannot be wrapped: torch 2.11 raises an error.
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
    """Return the index of the GPU of the first tensor in `args`, or None if that tensor is on a CPU."""
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    return tensor.get_device() if tensor.is_cuda else None


def current(device: int | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which `device` is current. If it is already current, this costs less than a microsecond."""
    if device is None or device == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()


@functools.cache
def _launches_early(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Call this before a program reads or writes memory: the previous kernel may still be running."""
    if OVERLAPS:
        gdc_launch_dependents()  # once all programs have started; the next kernel waits in turn
        gdc_wait()


@triton.jit
def begin_alone(OVERLAPS: tl.constexpr):
    """`begin` for short kernels, which do not let the next kernel start early.

    The programs of the next kernel may fill the GPU exactly. If this kernel occupied some of their places, they would
    wait.
    """
    if OVERLAPS:
        gdc_wait()


def num_multiprocessors(device: torch.device) -> int:
    """Return the minimum number of programs of a grid that run concurrently."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
