"""Structured logs, which tlparse reads.

part                                    torch           can go
torch._logging._internal                2.11 to 2.13    no public name
"""

from __future__ import annotations

import json
from typing import Any

from torch._logging._internal import trace_structured


def log_artifact(name: str, content: Any) -> None:
    """Writes an artifact: lists, dictionaries, strings and numbers, as JSON."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=lambda: json.dumps(content, indent=1),
        expect_trace_id=False,
    )
