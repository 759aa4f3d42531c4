"""The gradient of an embedding, as one op.

    dtable[i] = sum of dy over the tokens whose index is i

    dy (..., D), indices (...) -> dtable (rows, D), in the dtype of dy

PyTorch's own kernel, which sorts the tokens, adds up in float32 what belongs to one row, and rounds once. Inductor,
left to itself, adds into a float32 table with atomic operations and rounds that: of 128256 x 4096 in bfloat16, 2 GiB
beside a gradient of 1 GiB, which is where a step of Llama-3-8B cut to 6 layers needed the most memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registration import opaque_op


@opaque_op
def embedding_backward(
    dy: Tensor, indices: Tensor, num_rows: int, padding_idx: int, scales_by_frequency: bool
) -> Tensor:
    return torch.ops.aten.embedding_dense_backward.default(
        dy, indices, num_rows, padding_idx, scales_by_frequency
    )


@embedding_backward.register_fake
def _(dy: Tensor, indices: Tensor, num_rows: int, padding_idx: int, scales_by_frequency: bool) -> Tensor:
    return dy.new_empty((num_rows, *dy.shape[indices.dim() :]))
