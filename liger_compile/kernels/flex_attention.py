"""Tile sizes for Inductor's flex_attention kernels, which are not ours.

Inductor chooses tiles by head size and device. TILES lists tiles that were measured to be faster, for half precision,
by compute capability and by head size. The head size is padded to a power of two, as in the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping

TILES: Mapping[tuple[tuple[int, int], int], Mapping[str, int]] = {
    # Forward and backward, 2 x 4096 tokens, 8 heads of 4 groups: capped 3.22 instead of 4.20 ms, within 1024 tokens
    # 1.29 instead of 1.83 ms. At 64 and 128, none of the tested tiles is faster than Inductor's (one H100, torch
    # 2.11.0, triton 3.6.0, bfloat16, 2026-11-26: bench/results/flex_tiles_nvidia_h100_80gb_hbm3.csv).
    ((9, 0), 256): {
        "fwd_BLOCK_M": 128,
        "fwd_BLOCK_N": 64,
        "fwd_num_stages": 2,
        "fwd_num_warps": 8,
        "bwd_BLOCK_M1": 64,
        "bwd_BLOCK_N1": 64,
        "bwd_BLOCK_M2": 64,
        "bwd_BLOCK_N2": 64,
        "bwd_num_stages": 2,
        "bwd_num_warps": 8,
    },
}


def tiles(capability: tuple[int, int], head_size: int) -> Mapping[str, int]:
    """Return tiles that replace Inductor's, as kernel options of flex_attention; empty to keep Inductor's."""
    return TILES.get((capability, 1 << (head_size - 1).bit_length()), {})
