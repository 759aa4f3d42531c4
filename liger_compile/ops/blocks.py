"""Rows a few at a time: what is computed in float32 on the way stays in the cache and is never large."""

from __future__ import annotations

BLOCK_BYTES = 2 * 2**20  # of float32; read at each call


def split_rows(rows: int, most: int) -> list[slice]:
    """Splits `rows` rows evenly into slices of at most `most`."""
    count = -(-rows // most)
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def row_blocks(rows: int, width: int) -> list[slice]:
    """Slices of rows of which a float32 tensor of that width takes no more than BLOCK_BYTES, or of one row."""
    return split_rows(rows, max(BLOCK_BYTES // (4 * max(width, 1)), 1))
