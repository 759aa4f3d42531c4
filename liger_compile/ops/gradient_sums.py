"""Gradients that are sums of matmuls, accumulated chunk by chunk: the accumulation format and the final format.

    sum.add(rows, a, b, is_first)     sets these rows to a @ b, or adds a @ b to them; times a scale
    sum.finish()                      afterwards `matrix` contains the sum

    Plain        in the dtype of the operands
    ScaledRows   float16 with a power of two for each row (scaled_rows.py), so that no matmul result is too large
    Wide         accumulated in float32, then stored as one of the other two

ScaledRows computes its matmuls in float32, in blocks of as many rows as fit in `memory` bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import scaled_rows
from .blocks import split_rows

# Blocks begin at multiples of this on a GPU: a row of the block is a column of the logits, and unaligned ones are slow.
ALIGNED_ROWS = 64
BLOCK_BYTES = 8 * 2**20  # of a matmul result, and of an operand in float32, on a CPU


class Plain:
    def __init__(self, matrix: Tensor, scale: float = 1.0) -> None:
        self.matrix, self.scale = matrix, scale

    def add(self, rows: slice, a: Tensor, b: Tensor, is_first: bool) -> None:
        matrix, beta = self.matrix[rows], 0 if is_first else 1
        torch.addmm(matrix, a, b, beta=beta, alpha=self.scale, out=matrix)

    def set(self, total: Tensor) -> None:
        self.matrix.copy_(total)

    def finish(self) -> None:
        """Do nothing: the sum is complete."""


class ScaledRows:
    def __init__(self, matrix: Tensor, scales: Tensor, memory: int) -> None:
        self.matrix, self.scales, self.memory = matrix, scales, memory

    def add(self, rows: slice, a: Tensor, b: Tensor, is_first: bool) -> None:
        matrix, scales = self.matrix[rows], self.scales[rows]
        tile = ALIGNED_ROWS if matrix.is_cuda else 1
        for block in split_rows(matrix.shape[0], max(self.memory // (4 * matrix.shape[1]), 1), tile):
            scaled_rows.store(wide_product(a[block], b), matrix[block], scales[block], adds=not is_first)

    def set(self, total: Tensor) -> None:
        scaled_rows.store(total, self.matrix, self.scales)

    def finish(self) -> None:
        """Do nothing: the sum is complete."""


class Wide:
    def __init__(self, result: Plain | ScaledRows, scale: float = 1.0) -> None:
        self.result, self.scale = result, scale
        self.total = torch.empty_like(result.matrix, dtype=torch.float32)

    def add(self, rows: slice, a: Tensor, b: Tensor, is_first: bool) -> None:
        total, beta = self.total[rows], 0 if is_first else 1
        if total.is_cuda:
            torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=self.scale, out=total)
            return
        # In blocks of rows, because the matmul result in the dtype of a is large.
        for block in split_rows(total.shape[0], max(BLOCK_BYTES // (a.element_size() * total.shape[1]), 1)):
            product = self._product(a[block], b)
            total[block] = product.to(total.dtype) if is_first else total[block] + product

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype == torch.float16:  # whose range may be too small for the result
            return wide_product(a, b) * self.scale
        return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=self.scale)

    def finish(self) -> None:
        self.result.set(self.total)


GradientSum = Plain | ScaledRows | Wide


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32, for operands in half precision."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # PyTorch has out_dtype for CUDA only. Blocks of b, because b may be the weight of the head.
    total = torch.zeros(a.shape[0], b.shape[1])
    for block in split_rows(b.shape[0], max(BLOCK_BYTES // (4 * b.shape[1]), 1)):
        total.addmm_(a[:, block].float(), b[block].float())
    return total
