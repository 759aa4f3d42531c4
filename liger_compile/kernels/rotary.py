"""Rotary position embedding: the kernel of ops/rotary.py, for both directions.

One launch processes q and k. A program processes some heads of q or of k for some tokens, and reads and writes every
channel once: 4 bytes per element in half precision. Inputs may have any strides, such as slices of one projection have.
Results have the order of dimensions of their inputs, without gaps.

A tile is one head of some tokens. The number of tokens gives each thread of the program two reads of 16 bytes from
either half. The same threads process the heads of a program in sequence, and keep the tables of their tokens in
registers. They read `ahead` heads before they write the first, which keeps the memory busy.
"""

# A type checker does not see the type that Triton's decorator gives a kernel.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import begin, launch


class Config(NamedTuple):
    tokens: int  # per program
    heads: int
    ahead: int  # heads, each as large as the tile, that are read before the first is written
    pairs: int  # half of the rotated channels, rounded up to a power of two
    rest: int  # the other channels, rounded up to a power of two; at least 1
    num_warps: int


# This is the best tile, or within 1.5% of the best, at each shape of bench.rotary_tiles (H100, torch 2.11.0,
# triton 3.6.0, bfloat16, 2026-11-25: bench/results/rotary_tiles_nvidia_h100_80gb_hbm3.csv).
VECTOR_BYTES, VECTORS = 16, 2  # bytes of one read of a thread, and the number of such reads at a time
NUM_WARPS, HEADS, MOST_AHEAD = 4, 2, 2
PAIRS_AHEAD, REST_AT_ONCE = 4096, 4096


def config(channels: int, width: int, itemsize: int) -> Config:
    """Return the tile of a program, for heads of `channels` channels of which `width` are rotated."""
    pairs = triton.next_power_of_2(width // 2)
    rest = triton.next_power_of_2(max(1, channels - width))
    most_pairs = 32 * NUM_WARPS * VECTORS * VECTOR_BYTES // itemsize
    tokens = max(1, min(most_pairs // pairs, REST_AT_ONCE // rest))
    ahead = max(1, min(MOST_AHEAD, PAIRS_AHEAD // (tokens * pairs)))
    return Config(tokens, HEADS, ahead, pairs, rest, NUM_WARPS)


class Heads(NamedTuple):
    """Heads to rotate: a tensor, the result, and the axis of the heads."""

    x: Tensor
    rotated: Tensor
    heads_axis: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, tokens and heads."""
        return by_axis((1,) * (4 - self.x.dim()) + tuple(self.x.shape), self.heads_axis)


def rotate(
    tensors: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    cos: Tensor,
    sin: Tensor,
    heads_axis: int,
    reads_interleaved: bool,
    writes_interleaved: bool,
    half_tables: bool,
    transpose: bool,
    into: Sequence[Tensor | None] = (None, None),
) -> list[Tensor | None]:
    """Return each tensor rotated, in its dtype, and written into the tensor in `into` if there is one; None for None.

    A tensor is treated as having four axes (batch, heads or tokens, tokens or heads, channels), with leading axes added
    where needed. heads_axis is the axis of the heads, 1 or 2. The tables are constant along it.
    """
    given = []
    results: list[Tensor | None] = []
    for x, dtype, result in zip(tensors, dtypes, into, strict=True):
        if x is not None:
            x = side_by_side(x)
            given.append(Heads(x, empty_like(x, dtype) if result is None else result, heads_axis))
        results.append(None if x is None else given[-1].rotated)
    tables = cos, sin, reads_interleaved, writes_interleaved, half_tables, transpose
    if len(given) == 2 and all(
        statically_known_true(a == b) for a, b in zip(given[0].sizes[:2], given[1].sizes[:2], strict=True)
    ):
        _launch(given[0], given[1], *tables)
    else:
        for heads in given:
            _launch(heads, None, *tables)
    return results


def side_by_side(x: Tensor) -> Tensor:
    """Return x with the channels of a head contiguous in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor in x's dimension order, without gaps, channels contiguous even if x overlaps itself."""
    return side_by_side(torch.empty_like(x, dtype=dtype))


def by_axis(values: Sequence[int], heads_axis: int) -> tuple[int, int, int]:
    return values[0], values[3 - heads_axis], values[heads_axis]


def strides_of(x: Tensor, heads_axis: int) -> tuple[int, int, int]:
    """Return the strides of batch, tokens and heads; 0 along axes of size one, along which tables are broadcast."""
    strides = [
        0 if statically_known_true(size == 1) else stride
        for size, stride in zip(x.shape, x.stride(), strict=True)
    ]
    return by_axis([0] * (4 - x.dim()) + strides, heads_axis)


def _launch(
    q: Heads,
    k: Heads | None,
    cos: Tensor,
    sin: Tensor,
    reads_interleaved: bool,
    writes_interleaved: bool,
    half_tables: bool,
    transpose: bool,
) -> None:
    batch, num_tokens, num_q_heads = q.sizes
    num_k_heads = 0 if k is None else k.sizes[2]
    no_strides = 0, 0, 0
    width = 2 * cos.shape[-1] if half_tables else cos.shape[-1]
    channels = q.x.shape[-1]
    tile = config(channels, width, q.x.itemsize)
    num_groups = triton.cdiv(num_q_heads, tile.heads) + triton.cdiv(num_k_heads, tile.heads)
    launch(_rotary_kernel)[(batch * triton.cdiv(num_tokens, tile.tokens) * num_groups,)](
        q.x,
        q.rotated,
        None if k is None else k.x,
        None if k is None else k.rotated,
        cos,
        sin,
        num_tokens,
        num_q_heads,
        num_k_heads,
        *strides_of(q.x, q.heads_axis),
        *strides_of(q.rotated, q.heads_axis),
        *(no_strides if k is None else strides_of(k.x, k.heads_axis)),
        *(no_strides if k is None else strides_of(k.rotated, k.heads_axis)),
        *strides_of(cos, q.heads_axis)[:2],
        cos.stride(-1),
        *strides_of(sin, q.heads_axis)[:2],
        sin.stride(-1),
        WIDTH=width,
        CHANNELS=channels,
        READS_INTERLEAVED=reads_interleaved,
        WRITES_INTERLEAVED=writes_interleaved,
        HALF_TABLES=half_tables,
        TRANSPOSE=transpose,
        TOKENS=tile.tokens,
        HEADS=tile.heads,
        AHEAD=tile.ahead,
        PAIRS=tile.pairs,
        REST=tile.rest,
        num_warps=tile.num_warps,
    )


# Long because a kernel is one program: its parameters, one on each line, are half of it.
@triton.jit
def _rotary_kernel(
    q_ptr,  # (B, T, heads, D) in any order of memory, channels contiguous; as are q_out, k, k_out; k, k_out may be None
    q_out_ptr,
    k_ptr,
    k_out_ptr,
    cos_ptr,  # (B, T, R) or (B, T, R/2)
    sin_ptr,
    num_tokens,
    num_q_heads,
    num_k_heads,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    q_out_batch_stride,
    q_out_token_stride,
    q_out_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    k_out_batch_stride,
    k_out_token_stride,
    k_out_head_stride,
    cos_batch_stride,
    cos_token_stride,
    cos_channel_stride,
    sin_batch_stride,
    sin_token_stride,
    sin_channel_stride,
    WIDTH: tl.constexpr,  # R, out of CHANNELS
    CHANNELS: tl.constexpr,
    READS_INTERLEAVED: tl.constexpr,
    WRITES_INTERLEAVED: tl.constexpr,
    HALF_TABLES: tl.constexpr,
    TRANSPOSE: tl.constexpr,  # maps the written layout back to the read layout
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    num_q_groups = tl.cdiv(num_q_heads, HEADS)
    num_groups = num_q_groups + tl.cdiv(num_k_heads, HEADS)
    num_tiles = tl.cdiv(num_tokens, TOKENS)
    program = tl.program_id(0)
    group = program % num_groups
    tile = program // num_groups
    batch = (tile // num_tiles).to(tl.int64)
    tokens = ((tile % num_tiles) * TOKENS + tl.arange(0, TOKENS)[:, None]).to(tl.int64)
    is_token = tokens < num_tokens

    cos_at = cos_ptr + batch * cos_batch_stride + tokens * cos_token_stride
    sin_at = sin_ptr + batch * sin_batch_stride + tokens * sin_token_stride
    if HALF_TABLES:
        pair = tl.arange(0, PAIRS)[None, :]
        mask = _is_channel(is_token, pair, WIDTH // 2, PAIRS)
        cos_a = tl.load(cos_at + pair * cos_channel_stride, mask)
        sin_a = tl.load(sin_at + pair * sin_channel_stride, mask)
        cos_b = cos_a
        sin_b = sin_a
    else:
        cos_a, cos_b = _read(cos_at, cos_channel_stride, is_token, WIDTH, WRITES_INTERLEAVED, PAIRS)
        sin_a, sin_b = _read(sin_at, sin_channel_stride, is_token, WIDTH, WRITES_INTERLEAVED, PAIRS)
    cos_a, cos_b = cos_a.to(tl.float32), cos_b.to(tl.float32)
    sin_a, sin_b = sin_a.to(tl.float32), sin_b.to(tl.float32)
    if TRANSPOSE:
        # a' cos_a + b' sin_b and b' cos_b - a' sin_a: the same formula, with the sin tables exchanged and negated.
        sin_a, sin_b = -sin_b, -sin_a
        reads: tl.constexpr = WRITES_INTERLEAVED
        writes: tl.constexpr = READS_INTERLEAVED
    else:
        reads: tl.constexpr = READS_INTERLEAVED
        writes: tl.constexpr = WRITES_INTERLEAVED

    if group < num_q_groups:
        _rotate_heads(
            q_ptr + batch * q_batch_stride + tokens * q_token_stride,
            q_out_ptr + batch * q_out_batch_stride + tokens * q_out_token_stride,
            q_head_stride,
            q_out_head_stride,
            group * HEADS,
            num_q_heads,
            cos_a,
            cos_b,
            sin_a,
            sin_b,
            tokens,
            num_tokens,
            WIDTH,
            CHANNELS,
            reads,
            writes,
            HEADS,
            AHEAD,
            PAIRS,
            REST,
        )
    else:
        if k_ptr is not None:
            _rotate_heads(
                k_ptr + batch * k_batch_stride + tokens * k_token_stride,
                k_out_ptr + batch * k_out_batch_stride + tokens * k_out_token_stride,
                k_head_stride,
                k_out_head_stride,
                (group - num_q_groups) * HEADS,
                num_k_heads,
                cos_a,
                cos_b,
                sin_a,
                sin_b,
                tokens,
                num_tokens,
                WIDTH,
                CHANNELS,
                reads,
                writes,
                HEADS,
                AHEAD,
                PAIRS,
                REST,
            )


@triton.jit
def _rotate_heads(
    x_at,  # the addresses of the first head of every token
    y_at,
    x_head_stride,
    y_head_stride,
    first,
    num_heads,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    tokens,
    num_tokens,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    READS_INTERLEAVED: tl.constexpr,
    WRITES_INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    read = ()
    for step in tl.static_range(HEADS + AHEAD - 1):
        if step < HEADS:
            head = (first + step).to(tl.int64)
            is_row = row_mask(tokens, num_tokens, head < num_heads)
            pairs = _read(x_at + head * x_head_stride, 1, is_row, WIDTH, READS_INTERLEAVED, PAIRS)
            read = read + (pairs,)  # noqa: RUF005, which Triton does not know
        if step >= AHEAD - 1:
            head = (first + step - (AHEAD - 1)).to(tl.int64)
            is_row = row_mask(tokens, num_tokens, head < num_heads)
            a, b = read[step - (AHEAD - 1)]
            a, b = a.to(tl.float32), b.to(tl.float32)
            x_rows, y_rows = x_at + head * x_head_stride, y_at + head * y_head_stride
            y_a, y_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
            _write(y_rows, y_a, y_b, is_row, WIDTH, WRITES_INTERLEAVED, PAIRS)
            if CHANNELS > WIDTH:
                channel = WIDTH + tl.arange(0, REST)[None, :]
                mask = _is_channel(is_row, channel, CHANNELS, WIDTH + REST)
                tl.store(y_rows + channel, tl.load(x_rows + channel, mask).to(tl.float32), mask)


@triton.jit
def row_mask(tokens, num_tokens, is_head):
    """Return the mask is_head and tokens < num_tokens, without `&`, which in the interpreter gives integers here."""
    return tokens < tl.where(is_head, num_tokens, 0)


@triton.jit
def _read(
    at,  # (tokens, 1): the addresses of the rows
    channel_stride,
    is_row,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Return (a, b) of every pair; the values of pairs that do not exist are arbitrary."""
    half: tl.constexpr = WIDTH // 2
    if INTERLEAVED:
        channel = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(at + channel * channel_stride, _is_channel(is_row, channel, WIDTH, 2 * PAIRS))
        a, b = tl.split(tl.reshape(x, [at.shape[0], PAIRS, 2]))
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        mask = _is_channel(is_row, pair, half, PAIRS)
        a = tl.load(at + pair * channel_stride, mask)
        b = tl.load(at + (half + pair) * channel_stride, mask)
    return a, b


@triton.jit
def _write(at, a, b, is_row, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr):
    half: tl.constexpr = WIDTH // 2
    if INTERLEAVED:
        channel = tl.arange(0, 2 * PAIRS)[None, :]
        tl.store(at + channel, tl.interleave(a, b), _is_channel(is_row, channel, WIDTH, 2 * PAIRS))
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        mask = _is_channel(is_row, pair, half, PAIRS)
        tl.store(at + pair, a, mask)
        tl.store(at + half + pair, b, mask)


@triton.jit
def _is_channel(is_row, channel, END: tl.constexpr, TILE_END: tl.constexpr):
    """Return a mask of the elements of a tile that exist; channels are not compared if all of them exist."""
    if END == TILE_END:
        mask = is_row
    else:
        mask = is_row & (channel < END)
    return mask
