"""Blocks of rows: the float32 intermediates of one block fit in the cache and stay small."""

from __future__ import annotations

import itertools

BLOCK_BYTES = 2 * 2**20  # of float32; read on every call


def split_rows(rows: int, most: int, tile: int = 1) -> list[slice]:
    """Split rows evenly into slices of at most `most` rows. Each slice begins at a multiple of `tile`."""
    tiles = -(-rows // tile)
    count = -(-tiles // max(most // tile, 1))
    edges = [min(tiles * i // count * tile, rows) for i in range(count + 1)] if count else []
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def row_blocks(rows: int, width: int) -> list[slice]:
    """Return slices of one row, or of as many rows as take at most BLOCK_BYTES as float32 of `width` columns."""
    return split_rows(rows, max(BLOCK_BYTES // (4 * max(width, 1)), 1))
