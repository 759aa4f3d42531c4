"""Tiles of Inductor's kernels; what is computed with them, tests/test_flex.py asks."""

from liger_compile.kernels.flex_attention import TILES, tiles
from liger_compile.ops.flex import BLOCK_SIZE


def test_tiles_divide_the_blocks():
    """What Inductor asks of them."""
    for options in TILES.values():
        assert all(BLOCK_SIZE % size == 0 for name, size in options.items() if "BLOCK" in name)
        assert options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"] == 0
        assert options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"] == 0


def test_tiles_are_those_of_the_padded_head():
    assert tiles((9, 0), 256) == tiles((9, 0), 192) == TILES[(9, 0), 256]
    assert not tiles((9, 0), 128) and not tiles((8, 0), 256)
