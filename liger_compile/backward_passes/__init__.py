"""Passes over the graphs that AOTAutograd makes, before Inductor compiles them.

`DEFAULT_PASSES` are the passes over a graph of backward, in order; `runner.py` runs them. One pass per file. To add a
pass, write a generator in a file of its own and add a line here.
"""

from __future__ import annotations

from collections.abc import Mapping

from liger_compile.backward_passes.in_place import (
    add_embedding_rows_in_place,
    add_products_in_place,
    scale_in_place,
)
from liger_compile.backward_passes.inline_late import inline_late_ops
from liger_compile.backward_passes.qkv_matmul import fuse_qkv_matmuls
from liger_compile.backward_passes.rms_norm import fuse_rms_norms
from liger_compile.backward_passes.runner import Applied, Backward, Pass, is_backward, run_passes

DEFAULT_PASSES: tuple[Pass, ...] = (
    Pass("backward.qkv_matmul", fuse_qkv_matmuls),
    Pass("backward.rms_norm", fuse_rms_norms),
    Pass("backward.scale_in_place", scale_in_place),
    Pass("backward.embedding_in_place", add_embedding_rows_in_place),
    Pass("backward.adapter_in_place", add_products_in_place, in_forward=True),
)

# Choices for backward that need no pass, by name, with the text for reports; {} is the number that `chose` receives.
# `liger.skip` leaves them out too.
CHOICES: Mapping[str, str] = {
    "backward.early_free": "each buffer is freed after its last use (Inductor's allow_buffer_reuse is off)",
    "backward.embedding": "op embedding_backward sums the gradient of a large embedding in half precision",
    "backward.shared_zeros": "of {} outputs with a gradient, the unused ones share a buffer of zeros for each dtype",
}

# All that `liger.skip` may name here.
NAMES = (*(passed.name for passed in DEFAULT_PASSES), *CHOICES)

__all__ = [
    "CHOICES",
    "DEFAULT_PASSES",
    "NAMES",
    "Applied",
    "Backward",
    "Pass",
    "inline_late_ops",
    "is_backward",
    "run_passes",
]
