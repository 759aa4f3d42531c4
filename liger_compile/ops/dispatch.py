"""Decides whether an op runs its Triton kernel or its reference.

The kernels support NVIDIA GPUs of compute capability 8.0 and later, and half and single precision. All other inputs,
and all machines without Triton, use the reference.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn import Parameter

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

INTERPRET = False  # tests set it under TRITON_INTERPRET=1: kernels then accept CPU tensors


def has_kernel(*tensors: Tensor | None) -> bool:
    """Return whether a kernel accepts all of these tensors, which are on one device. None values are ignored."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.dtype in DTYPES and _runs_on(tensor) for tensor in given)


def _runs_on(tensor: Tensor) -> bool:
    if tensor.device.type == "cuda":
        return _has_triton() and _is_supported(tensor.device)
    # The interpreter reads memory. The tensors that a tracer creates have no memory.
    return INTERPRET and type(tensor) in (Tensor, Parameter)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_supported(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
