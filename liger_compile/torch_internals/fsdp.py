"""FSDP2: the weights that it has gathered.

part                                                            torch           can go
torch.distributed._composable_state._module_state_mapping       2.11 to 2.13    no public name
FSDPState._fsdp_param_groups                                    2.13            no public name
FSDPState._fsdp_param_group                                     2.11            with torch 2.11: at most one group
FSDPParam._unsharded_param                                      2.11 to 2.13    no public name
FSDPParamGroup._reshard_after_forward                           2.11 to 2.13    no public name
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def gathered_weights() -> Iterator[tuple[Tensor, bool]]:
    """Yields each weight that FSDP2 has gathered, and whether the end of forward already frees it."""
    composable = sys.modules.get("torch.distributed._composable_state")
    states = list(composable._module_state_mapping.values()) if composable else ()
    groups = (group for reference in states for group in _groups(reference()) if group.is_unsharded)
    for group in groups:
        for each in group.fsdp_params:
            yield each._unsharded_param, group._reshard_after_forward


def _groups(state: Any) -> Sequence[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    group = getattr(state, "_fsdp_param_group", None)
    return [] if group is None else [group]
