"""Whether the values of a tensor have changed, whoever wrote them: the version that autograd counts does not move for
optimizers with fused=True, for `.data`, NumPy or a raw pointer.

The fingerprint of a tensor holds, for each row, the sum of its bits, and one element in a column that moves from row to
row. Computing it reads the tensor once; nothing waits for a GPU until two fingerprints are compared on the host.

It sees every write that changes one element, some rows, or all. It does not see a write that leaves the sum of each
row's bits as it was, and the elements that it holds: two elements of one row exchanged, say. Tensors of at most one
dimension are held whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDE = 8  # bytes of an int64: the fewer words, the faster their sum


class Fingerprint(NamedTuple):
    """Of a tensor of shape [..., rows, columns]; one of at most one dimension is a single column."""

    sums: Tensor  # int64 [..., rows]
    sample: Tensor  # integers of the width of the elements, about one for each row

    def is_same(self, other: Fingerprint) -> Tensor:
        """bool [], on the device of the tensors."""
        return (self.sums == other.sums).all() & (self.sample == other.sample).all()


def has_fingerprint(tensor: Tensor) -> bool:
    """Whether the elements of a tensor are bits in plain memory that can be read."""
    plain: Any = Tensor
    is_plain = type(tensor).__torch_dispatch__ is plain.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
    return is_plain and tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Fingerprint:
    """The fingerprint of a tensor for which has_fingerprint() holds."""
    bits = _bits(tensor.detach())
    return Fingerprint(_widened(bits).sum(-1, dtype=torch.int64), _sample(bits))


def _bits(tensor: Tensor) -> Tensor:
    """The elements as integers: a view, with at least two dimensions."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    bits = tensor.resolve_neg().view(_INTEGERS[tensor.element_size()])
    return bits if bits.dim() > 1 else bits.reshape(-1, 1)


def _widened(bits: Tensor) -> Tensor:
    """The same memory as int64, where rows consist of whole words."""
    words = _WIDE // bits.element_size()
    starts = (bits.storage_offset(), bits.size(-1), *bits.stride()[:-1])
    fits = bits.stride(-1) == 1 and all(each % words == 0 for each in starts)
    return bits.view(torch.int64) if fits else bits


def _sample(bits: Tensor) -> Tensor:
    """A copy of elements whose column moves by one from row to row."""
    if bits.is_contiguous():
        return bits.view(-1)[:: bits.size(-1) + 1].clone()
    return bits.diagonal(dim1=-2, dim2=-1).clone()
