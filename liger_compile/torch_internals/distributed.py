"""Process groups by name, as compiled graphs refer to them.

part                                                            torch           can go
torch.distributed.distributed_c10d._resolve_process_group       2.11 to 2.13    no public name
"""

from __future__ import annotations

from typing import Any


def process_group(name: str) -> Any:
    """Returns the process group of this name."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # pyright: ignore[reportArgumentType]
