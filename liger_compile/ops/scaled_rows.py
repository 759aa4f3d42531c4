"""float16 rows with one power of two per row: numbers of any size, with the 11 bits of precision of float16.

    values (R, C) in float32  ~  rows (R, C) in float16 * scales (R, 1) in float32

The largest number of a row is stored between 2^14 and 2^15, whatever its size. Nothing becomes infinite, and nothing is
lost that float16 would keep under any other factor. A gradient that is computed before its factor is known is
therefore, after the multiplication, as exact as a gradient that was computed with the factor. A row with infinite
numbers has the scale 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import row_blocks
from .dispatch import has_kernel

TOP = 2.0**14  # lower end of the range of a row's largest number; twice this value is still finite
LEAST = 2.0**-60  # a row without larger numbers is scaled as if this were its largest number
_EXPONENT = 0x7F800000  # exponent bits of a float32


def power_of_two(positive: Tensor) -> Tensor:
    """Return the largest power of two up to `positive` (float32), which is clamped to [LEAST, 1 / LEAST]."""
    bounded = positive.clamp(LEAST, 1 / LEAST)
    return (bounded.view(torch.int32) & _EXPONENT).view(torch.float32)


def store(values: Tensor, rows: Tensor, scales: Tensor, adds: bool = False) -> None:
    """Write `values` into rows and scales; with `adds`, write the sum of their current content and `values`."""
    if has_kernel(values, rows):
        from ..kernels import scaled_rows as kernels

        kernels.store(values, rows, scales, adds, LEAST, TOP)
        return
    for block in row_blocks(*values.shape):
        total = values[block]
        if adds:
            total = total + rows[block].float() * scales[block].unsqueeze(-1)
        scales[block] = _scale(total.abs().amax(-1))
        rows[block] = total / scales[block].unsqueeze(-1)


def _scale(largest: Tensor) -> Tensor:
    # Without an upper bound: float32 sums of float16 matmuls may be larger than 1 / LEAST.
    bits = largest.clamp(min=LEAST).view(torch.int32) & _EXPONENT
    return torch.where(largest.isfinite(), bits.view(torch.float32) / TOP, 1.0)
