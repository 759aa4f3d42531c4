"""Process groups by name, as compiled graphs refer to them, and a collective that torch has renamed.

part                                                            torch           can go
torch.distributed.distributed_c10d._resolve_process_group       2.11 to 2.13    no public name
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def process_group(name: str) -> Any:
    """Returns the process group of this name."""
    return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]


def all_gather_into(gathered: Tensor, values: Tensor, group: Any) -> None:
    """Writes the values (N, ...) of all ranks into `gathered` (R * N, ...), in the order of the ranks."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    gather(gathered, values, group=group)
