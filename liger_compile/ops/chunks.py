"""Rows in chunks, so that what is computed in a wide dtype on the way is never larger than a chunk."""

from __future__ import annotations

# The CPU GEMMs of linear_cross_entropy run at full speed from some hundred rows on; a chunk that still
# fits into the last cache level saves time as well as memory. Read at each call: tests make it small.
CHUNK_BYTES = 16 * 2**20
LEAST_ROWS = 64


def row_chunks(rows: int, row_bytes: int) -> list[slice]:
    """Splits `rows` rows evenly into chunks of at most CHUNK_BYTES, but of LEAST_ROWS rows or more."""
    most = max(CHUNK_BYTES // max(row_bytes, 1), LEAST_ROWS)
    count = -(-rows // most)
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
