"""A vocabulary of any size in parts that matrix products are fast for.

On a GPU a product of which an extent is no multiple of a few elements may run several times slower, also where all
rows are aligned. In parts, the largest multiple of ALIGNED classes and the rest, which is thin, are products of their
own: views of logits, weight and dweight, whose rows stay where they are, so nothing is copied and nothing is padded.
Of dx, the second is added to the first as it was rounded.

bench/vocabulary.py measures both. Until there are figures of it, ALIGNED is None: in one.
"""

from __future__ import annotations

import torch

ALIGNED: int | None = None


def class_parts(classes: int, device: torch.device) -> list[slice]:
    """Slices of the classes, none of them empty."""
    if ALIGNED is None or device.type == "cpu" or not classes % ALIGNED or classes < ALIGNED:
        return [slice(0, classes)]
    aligned = classes - classes % ALIGNED
    return [slice(0, aligned), slice(aligned, classes)]
