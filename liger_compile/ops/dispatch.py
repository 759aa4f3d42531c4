"""Whether an op runs its Triton kernel or its reference.

Kernels are for NVIDIA GPUs from compute capability 8.0 on, and for what half and single precision holds. Everything
else, and every machine without Triton, has the reference.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn import Parameter

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

INTERPRET = False  # set by tests, under TRITON_INTERPRET=1: kernels take tensors on a CPU


def has_kernel(*tensors: Tensor | None) -> bool:
    """Whether a kernel takes all of these tensors, which are on one device. None are left out."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.dtype in DTYPES and _runs_on(tensor) for tensor in given)


def _runs_on(tensor: Tensor) -> bool:
    if tensor.device.type == "cuda":
        return _has_triton() and _is_supported(tensor.device)
    # The interpreter reads memory, which the tensors that a tracer makes have none of.
    return INTERPRET and type(tensor) in (Tensor, Parameter)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_supported(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
