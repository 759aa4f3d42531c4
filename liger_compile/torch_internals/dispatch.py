"""torch's dispatcher: modes, keys, and tensor subclasses that it dispatches.

part                                            torch           can go
torch.utils._python_dispatch                    2.11 to 2.13    no public name
torch._dispatch.python                          2.11 to 2.13    no public name
torch._C._AutoDispatchBelowADInplaceOrView      2.11 to 2.13    no public name
torch._C._functorch.peek_interpreter_stack      2.11 to 2.13    no public name
torch._C._len_torch_dispatch_stack              2.11 to 2.13    no public name
torch.autograd.forward_ad._current_level        2.11 to 2.13    no public name
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._python_dispatch import _disable_current_modes as without_dispatch_modes

__all__ = [
    "TorchDispatchMode",
    "below_autograd",
    "enable_python_dispatcher",
    "is_traceable_wrapper_subclass",
    "is_transformed",
    "with_inner_tensors",
    "without_dispatch_modes",
]

# A context in which operators run below autograd, which then knows their results as no views.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView


def with_inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields a tensor and, if it is a wrapper (DTensor), the tensors that it wraps."""
    yield tensor
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        inner = (getattr(tensor, name) for name in names)  # a DTensor has its mesh among them
        for value in inner:
            if isinstance(value, torch.Tensor):
                yield from with_inner_tensors(value)


def is_transformed() -> bool:
    """Returns whether operations do not run as they are called: a transform, a dispatch mode or a trace takes them."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    )
