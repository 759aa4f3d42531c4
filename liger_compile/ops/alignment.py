"""Keeps the matmuls of the head fast for a vocabulary or a hidden size of any size.

On a GPU, a matmul in half precision with an extent or an offset that is not a multiple of ALIGNED elements uses kernels
without aligned loads, which take 3 to 8 times as long, even where all rows are aligned.

A vocabulary is split into the largest multiple of ALIGNED classes and the remainder. Each part has its own matmul. The
operands are views of logits, weight and dweight, so nothing is copied. A hidden size is padded: x and weight are copied
once for each call, with columns of zeros, and their gradients lose these columns.

Forward and backward of linear_cross_entropy in milliseconds, at once / in parts of 8 / in parts of 64 / a vocabulary
that is a multiple of 64 / Inductor (H200, torch 2.11.0, bfloat16, 2026-11-30):

    8192 x 1024 x 50257     18.06    3.84    3.87    3.71    4.91
    16384 x 1024 x 30522    11.54    4.85    4.89    4.54    6.13
    8192 x 2048 x 128257    90.13   17.54   17.64   17.54   21.46   (bench/results/vocabulary_nvidia_h200.csv)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 8  # elements: 16 bytes in half precision


def class_parts(classes: int, device: torch.device) -> list[slice]:
    """Return slices of the classes; no slice is empty."""
    aligned = classes - classes % ALIGNED
    if device.type == "cpu" or aligned in (0, classes):
        return [slice(0, classes)]
    return [slice(0, aligned), slice(aligned, classes)]


def missing_columns(x: Tensor) -> int:
    """Return the number of columns to add to x (N, H), so that its matmuls are fast."""
    return 0 if x.device.type == "cpu" else -x.shape[1] % ALIGNED


def with_columns(matrix: Tensor, columns: int) -> Tensor:
    """Return a copy of the matrix with so many columns of zeros at its end."""
    return F.pad(matrix, (0, columns))
