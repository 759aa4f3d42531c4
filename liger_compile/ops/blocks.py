"""Blocks of rows: the float32 intermediates of one block fit in the cache and stay small."""

from __future__ import annotations

BLOCK_BYTES = 2 * 2**20  # of float32; read on every call


def split_rows(rows: int, most: int) -> list[slice]:
    """Split `rows` rows evenly into slices of at most `most` rows."""
    count = -(-rows // most)
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def row_blocks(rows: int, width: int) -> list[slice]:
    """Return slices of one row, or of as many rows as take at most BLOCK_BYTES as float32 of `width` columns."""
    return split_rows(rows, max(BLOCK_BYTES // (4 * max(width, 1)), 1))
