"""The gradient of an embedding: as a new tensor, or added to an existing gradient of the table.

    dtable[i] = sum of dy over the tokens whose index is i

    dy (..., D), indices (...), any integers -> dtable (rows, D), in the dtype of dy

Row padding_idx has no gradient. The sum is in float32 and is rounded once. Inductor by default adds into a float32
table with atomic operations and rounds that table. For 128256 x 4096 in bfloat16 this takes 2 GiB beside a gradient of
1 GiB, at the point of peak memory in a step of Llama-3-8B cut to 6 layers. PyTorch's kernel sorts the tokens, as ours
does. Where the head shares the table, PyTorch's kernel first zero-fills a table, and then adds the whole table to the
gradient of the head.
Rows x width, 8192 tokens, one eighth of them the same, one H100, torch 2.11.0, bfloat16, 2026-11-26, in ms:

                 128256 x 4096   151936 x 1024   32000 x 1024   50257 x 256   1024 x 768
    Inductor             1.803           0.539          0.147         0.061        0.024
    PyTorch              0.855           0.318          0.234         0.138        0.126
    ours                 0.478           0.190          0.114         0.083        0.084

The op is therefore for tables of at least PAYS_FROM elements. In a small table, sorting the tokens takes most of our
time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import has_kernel
from .registration import mutating_op, opaque_op

PAYS_FROM = 2**24


@opaque_op
def embedding_backward(
    dy: Tensor, indices: Tensor, num_rows: int, padding_idx: int, scales_by_frequency: bool
) -> Tensor:
    if scales_by_frequency or not has_kernel(dy):
        return torch.ops.aten.embedding_dense_backward.default(
            dy, indices, num_rows, padding_idx, scales_by_frequency
        )
    table = dy.new_zeros((num_rows, *dy.shape[indices.dim() :]))
    _add_rows(table, dy, indices, padding_idx)
    return table


@embedding_backward.register_fake
def _(dy: Tensor, indices: Tensor, num_rows: int, padding_idx: int, scales_by_frequency: bool) -> Tensor:
    return dy.new_empty((num_rows, *dy.shape[indices.dim() :]))


@mutating_op("table")
def add_embedding_backward(table: Tensor, dy: Tensor, indices: Tensor, padding_idx: int) -> None:
    """table += embedding_backward(dy, indices, rows of table, padding_idx, False), rounded once."""
    if has_kernel(table, dy) and table.is_contiguous():
        _add_rows(table, dy, indices, padding_idx)
        return
    wide = torch.promote_types(dy.dtype, torch.float32)
    table.add_(
        torch.ops.aten.embedding_dense_backward.default(
            dy.to(wide), indices, table.shape[0], padding_idx, False
        )
    )


def _add_rows(table: Tensor, dy: Tensor, indices: Tensor, padding_idx: int) -> None:
    from ..kernels import embedding as kernels

    width = table.shape[1:].numel()
    kernels.add_rows(table, dy.reshape(-1, width).contiguous(), indices.reshape(-1), padding_idx)
