"""torch's dispatcher: modes, keys, and tensor subclasses that it dispatches.

part                                            torch           can go
torch.utils._python_dispatch                    2.11 to 2.13    no public name
torch._dispatch.python                          2.11 to 2.13    no public name
torch._C._AutoDispatchBelowADInplaceOrView      2.11 to 2.13    no public name
"""

from __future__ import annotations

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._python_dispatch import _disable_current_modes as without_dispatch_modes

__all__ = [
    "TorchDispatchMode",
    "below_autograd",
    "enable_python_dispatcher",
    "is_traceable_wrapper_subclass",
    "without_dispatch_modes",
]

# A context in which operators run below autograd, which then knows their results as no views.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
