"""Detects changes of a tensor's values by any writer.

Autograd's version counter does not change for optimizers with fused=True, or for writes through `.data`, NumPy or a raw
pointer.

The fingerprint of a tensor contains, for each row, the sum of its bits and one element, whose column moves from row to
row. Computing a fingerprint reads the tensor once. Nothing waits for a GPU until two fingerprints are compared on the
host.

It detects every write that changes one element, some rows, or all elements. It does not detect a write that preserves
the sums of all rows and the sampled elements, such as an exchange of two elements of one row. For tensors of at most
one dimension it contains all elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDE = 8  # bytes of an int64: fewer words sum faster


class Fingerprint(NamedTuple):
    """Fingerprint of a tensor of shape [..., rows, columns]. A tensor of at most one dimension is a single column."""

    sums: Tensor  # int64 [..., rows]
    sample: Tensor  # integers as wide as the elements, about one for each row

    def is_same(self, other: Fingerprint) -> Tensor:
        """Return whether the fingerprints are equal, as bool [] on the device of the tensors."""
        return (self.sums == other.sums).all() & (self.sample == other.sample).all()


def has_fingerprint(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor are readable bits in plain memory."""
    plain: Any = Tensor
    is_plain = type(tensor).__torch_dispatch__ is plain.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
    return is_plain and tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Fingerprint:
    """Return the fingerprint of a tensor for which has_fingerprint() is true."""
    bits = _bits(tensor.detach())
    return Fingerprint(_widened(bits).sum(-1, dtype=torch.int64), _sample(bits))


def _bits(tensor: Tensor) -> Tensor:
    """Return the elements as integers: a view with at least two dimensions."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    bits = tensor.resolve_neg().view(_INTEGERS[tensor.element_size()])
    return bits if bits.dim() > 1 else bits.reshape(-1, 1)


def _widened(bits: Tensor) -> Tensor:
    """Return the same memory as int64, if rows consist of whole words."""
    words = _WIDE // bits.element_size()
    starts = (bits.storage_offset(), bits.size(-1), *bits.stride()[:-1])
    fits = bits.stride(-1) == 1 and all(stride % words == 0 for stride in starts)
    return bits.view(torch.int64) if fits else bits


def _sample(bits: Tensor) -> Tensor:
    """Return a copy of one element per row; its column moves by one from row to row."""
    if bits.is_contiguous():
        return bits.view(-1)[:: bits.size(-1) + 1].clone()
    return bits.diagonal(dim1=-2, dim2=-1).clone()
