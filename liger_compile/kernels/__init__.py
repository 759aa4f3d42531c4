"""Triton kernels, one op a file: forward, backward, and the launchers that the ops call.

Only Triton is written here, and only here. Tensors come in as the ops' bodies have them, every check is behind them.
Kernels accumulate in float32, reach rows by 64-bit offsets, and need no size to be a power of two. Launchers choose
block sizes by a function of dtype and shape alone, wait for nothing, and use no atomic operation: the same numbers come
out every time, and a CUDA graph may capture them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction

INTERPRETED_MULTIPROCESSORS = 2  # so that a program has several rows to go through


def launch(kernel: Any) -> Any:
    """The kernel, to be launched as `launch(kernel)[grid](...)` in a traceable op, so that AOTAutograd sees it.

    Opaque ops launch theirs as they are. Under TRITON_INTERPRET=1 there is nothing to wrap, and torch 2.11 refuses to.
    """
    return wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def num_multiprocessors(device: torch.device) -> int:
    """How many programs of a grid run side by side, at least."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
