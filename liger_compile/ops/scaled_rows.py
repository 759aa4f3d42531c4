"""float16 rows with a power of two for each: numbers of any size, kept to the 11 bits that float16 has.

    values (R, C) in float32  ~  rows (R, C) in float16 * scales (R, 1) in float32

The largest number of a row is stored between 2^14 and 2^15, whatever it is: nothing becomes infinite, and nothing is
lost that float16 would hold under any other factor. So a gradient that is made before its factor is known is as exact,
when it is multiplied, as one that was made with it. A row with infinite numbers has the scale 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import row_blocks
from .dispatch import has_kernel

TOP = 2.0**14  # where the largest number of a row begins; twice that is still finite
LEAST = 2.0**-60  # a row that has nothing larger is scaled as if it had this
_EXPONENT = 0x7F800000  # the bits of a float32


def power_of_two(positive: Tensor) -> Tensor:
    """The largest power of two up to `positive`, which is float32, or up to the nearest of LEAST and 1 / LEAST."""
    bounded = positive.clamp(LEAST, 1 / LEAST)
    return (bounded.view(torch.int32) & _EXPONENT).view(torch.float32)


def store(values: Tensor, rows: Tensor, scales: Tensor, adds: bool = False) -> None:
    """Writes values, or what is in rows and values together, into rows and scales."""
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
    # Without an upper bound: float32 sums of float16 products may be larger than 1 / LEAST.
    bits = largest.clamp(min=LEAST).view(torch.int32) & _EXPONENT
    return torch.where(largest.isfinite(), bits.view(torch.float32) / TOP, 1.0)
