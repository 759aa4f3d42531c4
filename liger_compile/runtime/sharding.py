"""Preserves weights that FSDP2 gathers for a forward or a backward, and frees afterwards.

When a promise is evaluated, the memory of such a weight may be empty, or contain the weights of the next step.
Gathering them again is not possible: a collective that only some ranks call never returns.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from liger_compile.runtime.promise import Promise
from liger_compile.torch_internals.fsdp import gathered_weights
from liger_compile.torch_internals.tensors import storage_of


def keep_before_sharding(promise: Promise, inputs: Sequence[Tensor]) -> None:
    """Keep those inputs of a promise that FSDP2 has gathered.

    Inputs that FSDP2 frees at the end of this forward are kept now. The others are kept when backward begins, if the
    promise has not been computed by then and is still alive.
    """
    soon_freed = {storage_of(weight): is_freed for weight, is_freed in gathered_weights()}
    gathered = {storage for tensor in inputs if (storage := storage_of(tensor)) in soon_freed}
    backwards = [tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None]
    if later := {storage for storage in gathered if backwards and not soon_freed[storage]}:
        reference = weakref.ref(promise)

        def before_backward(_: Any) -> None:
            if waiting := reference():
                waiting.keep(later, {})

        for node in backwards:
            node.register_prehook(before_backward)
    promise.keep(gathered - later, {})
