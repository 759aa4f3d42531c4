"""Rows of a padded batch, gathered and put back.

    x (*rows, ...) -> pack_rows -> (R, ...) -> unpack_rows -> (*rows, ...)

The rows are of one dimension, (N,), or of two, (B, T). `index` (R,) has the number of the row of x in each slot, and
`slots` (*rows) the slot of each row, or -1 for a row that is left out. The slots behind the live rows repeat a live
row. The gradient of each of the two ops is a gather too: no row is added to another. The left-out rows of an unpacked
tensor repeat a live row, so that they are as finite as live rows are; nothing may read them, and no gradient comes from
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registration import backward_op, padded, traceable_op


@traceable_op
def pack_rows(x: Tensor, index: Tensor, slots: Tensor) -> Tensor:
    """Return the rows `index` of x."""
    return _flat(x, slots)[index]


@backward_op
def pack_rows_backward(grad: Tensor, index: Tensor, slots: Tensor) -> Tensor:
    return _where(slots >= 0, grad[slots.clamp(min=0)])


@traceable_op
def unpack_rows(packed: Tensor, index: Tensor, slots: Tensor) -> Tensor:
    """Return each row from its slot."""
    return packed[slots.clamp(min=0)]


@backward_op
def unpack_rows_backward(grad: Tensor, index: Tensor, slots: Tensor) -> Tensor:
    return _where(_holds_row(index, slots), _flat(grad, slots)[index])


@traceable_op
def pack_labels(labels: Tensor, index: Tensor, slots: Tensor, ignore_index: int) -> Tensor:
    """Return the rows `index` of labels (*rows); the slots that repeat a row are ignored."""
    return _flat(labels, slots)[index].masked_fill(~_holds_row(index, slots), ignore_index)


def _flat(x: Tensor, slots: Tensor) -> Tensor:
    """Return x (*rows, ...) with one dimension of rows."""
    return x if slots.dim() == 1 else x.flatten(0, slots.dim() - 1)


def _holds_row(index: Tensor, slots: Tensor) -> Tensor:
    """Return which slots hold a row of their own."""
    return _flat(slots, slots)[index] == torch.arange(index.shape[0], device=index.device)


def _where(condition: Tensor, rows: Tensor) -> Tensor:
    return torch.where(condition[(..., *(None for _ in rows.shape[condition.dim() :]))], rows, 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, slots = inputs
    ctx.save_for_backward(index, slots)


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return padded(ctx, pack_rows_backward(grad, *ctx.saved_tensors))


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return padded(ctx, unpack_rows_backward(grad, *ctx.saved_tensors))


pack_rows.register_autograd(_pack_backward, setup_context=_setup_context)
unpack_rows.register_autograd(_unpack_backward, setup_context=_setup_context)
