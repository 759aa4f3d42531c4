"""Rows in chunks, so that what is computed on the way, in float32, is never larger than a chunk."""

from __future__ import annotations

# Small enough to stay small beside any model and to be reused from the last cache level, large enough for GEMMs.
# Read at each call.
CHUNK_BYTES = 16 * 2**20


def row_chunks(rows: int, row_bytes: int, least: int = 1) -> list[slice]:
    """Splits `rows` rows evenly into chunks of at most CHUNK_BYTES, but of `least` rows if that is more."""
    most = max(CHUNK_BYTES // max(row_bytes, 1), least)
    count = -(-rows // most)
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
