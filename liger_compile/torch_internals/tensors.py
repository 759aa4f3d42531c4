"""The memory and the version of a tensor, and subclasses of tensors without memory.

part                                        torch           can go
UntypedStorage._cdata                       2.11 to 2.13    no public name; data_ptr() is 0 for all fake tensors
Tensor._version                             2.11 to 2.13    no public name
torch._C.TensorBase                         2.11 to 2.13    no public name for the class below Tensor
torch._C.DisableTorchFunctionSubclass        2.11 to 2.13    no public name
Tensor._make_wrapper_subclass               2.11 to 2.13    no public name
torch._C._set_throw_on_mutable_data_ptr     2.11 to 2.13    no public name
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T", bound=Tensor)

# The attribute `data` of all tensors, for a subclass that overrides it.
DATA: Any = torch._C.TensorBase.data  # pyright: ignore[reportAttributeAccessIssue]

# A context in which calls do not arrive at `__torch_function__` of subclasses, but at `__torch_dispatch__` only.
without_torch_functions: Any = torch._C.DisableTorchFunctionSubclass  # pyright: ignore[reportAttributeAccessIssue]


def storage_of(tensor: Tensor) -> int | None:
    """Returns an identity that live tensors with the same memory share, fake tensors too; None without a storage.

    Sparse tensors, and tensors that torch.func wraps, have no storage.
    """
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def version_of(tensor: Tensor) -> int:
    """Returns autograd's count of writes into a tensor; 0 for inference tensors, which have no counter."""
    return 0 if tensor.is_inference() else tensor._version


def without_memory(cls: type[_T], like: Tensor, device: torch.device) -> _T:
    """Returns a tensor of a subclass that has no memory: shape, strides and dtype are those of `like`.

    C++ code that asks for a pointer to its values gets an error, instead of a null pointer.
    """
    made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
        cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
    )
    torch._C._set_throw_on_mutable_data_ptr(made)
    return made
