"""Splits a vocabulary of any size into parts for which matmuls are fast.

On a GPU, a matmul with an extent that is not a multiple of a few elements may run several times slower, even where all
rows are aligned. The parts are the largest multiple of ALIGNED classes and the thin remainder. Each part has its own
matmul. The operands are views of logits, weight and dweight, so nothing is copied and nothing is padded. The part of dx
from the remainder is added to the rounded part of dx from the aligned classes.

bench/vocabulary.py measures both. Until it has figures, ALIGNED is None: the vocabulary is one part.
"""

from __future__ import annotations

import torch

ALIGNED: int | None = None


def class_parts(classes: int, device: torch.device) -> list[slice]:
    """Return slices of the classes; no slice is empty."""
    if ALIGNED is None or device.type == "cpu" or not classes % ALIGNED or classes < ALIGNED:
        return [slice(0, classes)]
    aligned = classes - classes % ALIGNED
    return [slice(0, aligned), slice(aligned, classes)]
