"""Preserves weights that FSDP2 gathers for a forward or a backward, and frees afterwards.

When a promise is evaluated, the memory of such a weight may be empty, or contain the weights of the next step.
Gathering them again is not possible: a collective that only some ranks call never returns.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from liger_compile.runtime.promise import Promise, storage_of


def keep_before_sharding(promise: Promise, inputs: Sequence[Tensor]) -> None:
    """Keep those inputs of a promise that FSDP2 has gathered.

    Inputs that FSDP2 frees at the end of this forward are kept now. The others are kept when backward begins, if the
    promise has not been computed by then and is still alive.
    """
    soon_freed = dict(_gathered_weights())
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


def _gathered_weights() -> Iterator[tuple[int | None, bool]]:
    """Yield the storage of each weight that FSDP2 has gathered, and whether forward already frees it."""
    # Private API; the same in torch 2.11 to 2.13, except for the groups.
    composable = sys.modules.get("torch.distributed._composable_state")
    states = list(composable._module_state_mapping.values()) if composable else ()
    groups = (group for reference in states for group in _groups(reference()) if group.is_unsharded)
    for group in groups:
        for parameter in group.fsdp_params:
            yield storage_of(parameter._unsharded_param), group._reshard_after_forward


def _groups(state: Any) -> Sequence[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    group = getattr(state, "_fsdp_param_group", None)  # torch 2.11: at most one
    return [] if group is None else [group]
