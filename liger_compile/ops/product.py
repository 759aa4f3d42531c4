"""A matrix product that is added to what is there.

    total (N, O) += a (N, I) @ b (I, O)      summed in float32 (float64 for float64), rounded once; all of one dtype

PyTorch's addmm does the same. As an op that writes in place, a compiler does not copy `total` first.
"""

from __future__ import annotations

from torch import Tensor

from .registration import mutating_op


@mutating_op("total")
def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.addmm_(a, b)
