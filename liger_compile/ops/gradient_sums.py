"""Gradients that are sums of products, made chunk by chunk: how they are kept on the way, and what they end as.

    sum.add(rows, a, b, is_first)     these rows are a @ b, or have a @ b added to them; times a scale
    sum.finish()                      what is in `matrix` then is the sum

    Plain        in the dtype of the products
    ScaledRows   float16 with a power of two for each row (scaled_rows.py), so that no product is too large for it
    Wide         in float32, and in the end one of the two

ScaledRows has its products in float32, of as many rows at a time as `memory` bytes hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import scaled_rows
from .blocks import split_rows

BLOCK_BYTES = 8 * 2**20  # of a product, and of an operand in float32, on a CPU


class Plain:
    def __init__(self, matrix: Tensor, scale: float = 1.0) -> None:
        self.matrix, self.scale = matrix, scale

    def add(self, rows: slice, a: Tensor, b: Tensor, is_first: bool) -> None:
        matrix, beta = self.matrix[rows], 0 if is_first else 1
        torch.addmm(matrix, a, b, beta=beta, alpha=self.scale, out=matrix)

    def set(self, total: Tensor) -> None:
        self.matrix.copy_(total)

    def finish(self) -> None:
        """Nothing is left to do."""


class ScaledRows:
    def __init__(self, matrix: Tensor, scales: Tensor, memory: int) -> None:
        self.matrix, self.scales, self.memory = matrix, scales, memory

    def add(self, rows: slice, a: Tensor, b: Tensor, is_first: bool) -> None:
        matrix, scales = self.matrix[rows], self.scales[rows]
        for block in split_rows(matrix.shape[0], max(self.memory // (4 * matrix.shape[1]), 1)):
            scaled_rows.store(wide_product(a[block], b), matrix[block], scales[block], adds=not is_first)

    def set(self, total: Tensor) -> None:
        scaled_rows.store(total, self.matrix, self.scales)

    def finish(self) -> None:
        """Nothing is left to do."""


class Wide:
    def __init__(self, result: Plain | ScaledRows, scale: float = 1.0) -> None:
        self.result, self.scale = result, scale
        self.total = torch.empty_like(result.matrix, dtype=torch.float32)

    def add(self, rows: slice, a: Tensor, b: Tensor, is_first: bool) -> None:
        total, beta = self.total[rows], 0 if is_first else 1
        if total.is_cuda:
            torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=self.scale, out=total)
            return
        # Some rows at a time, for the product in the dtype of a is large.
        for block in split_rows(total.shape[0], max(BLOCK_BYTES // (a.element_size() * total.shape[1]), 1)):
            product = self._product(a[block], b)
            total[block] = product.to(total.dtype) if is_first else total[block] + product

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype == torch.float16:  # which may be too small for it
            return wide_product(a, b) * self.scale
        return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=self.scale)

    def finish(self) -> None:
        self.result.set(self.total)


GradientSum = Plain | ScaledRows | Wide


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of half precision, in float32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # PyTorch has that for CUDA alone. Some of b at a time: it may be the head.
    total = torch.zeros(a.shape[0], b.shape[1])
    for block in split_rows(b.shape[0], max(BLOCK_BYTES // (4 * b.shape[1]), 1)):
        total.addmm_(a[:, block].float(), b[block].float())
    return total
