"""RMSNorm of every head of q and of k, then rotary position embedding: the kernels of ops/norm_rotary.py.

The channels of a head stay in registers, with its two halves as separate tiles: both channels of a pair are then in the
same thread. In half precision, forward moves 4 bytes per element and backward 6. Programs, tiles and inputs are as in
rotary.py: a program processes the heads of some tokens in sequence, and keeps tables and weights in registers.

Backward computes the gradients of q, k and both weights in one pass. Each program writes the contribution of its heads
to the gradient of their weight, in float32. A second kernel adds the contributions in a fixed order, so that the result
is deterministic.
"""

# A type checker does not see the type that Triton's decorator gives a kernel.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import begin, launch
from .rotary import by_axis, empty_like, row_mask, side_by_side, strides_of


class Config(NamedTuple):
    tokens: int  # per program
    heads: int
    ahead: int  # heads that are read before the first is written
    pairs: int  # half of a head's channels, rounded up to a power of two
    num_warps: int


# For (forward, backward). Backward needs twice the registers, and has a row of sums for each program.
VECTOR_BYTES = (16, 8)  # per read of a thread
HEADS, AHEAD = (4, 8), (4, 4)
# The tile of the kernel that sums the gradients of the weights: few programs, which wait for memory.
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 2048, 4, 16


def config(width: int, itemsize: int, is_backward: bool) -> Config:
    """Return the tile of a program, for heads of `width` channels."""
    pairs = triton.next_power_of_2(width // 2)
    num_warps = max(4, pairs // 256)
    tokens = max(1, 32 * num_warps * VECTOR_BYTES[is_backward] // itemsize // pairs)
    return Config(tokens, HEADS[is_backward], AHEAD[is_backward], pairs, num_warps)


def forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    casting: str,
    normed_dtypes: Sequence[torch.dtype],
    heads_axis: int,
) -> tuple[Tensor, Tensor]:
    """Return (q', k'). heads_axis is the axis of the heads, 1 or 2, after padding with leading axes to four.

    The tables are constant along that axis. q and k have equally many sequences and tokens. normed_dtypes are the
    dtypes of their norms.
    """
    q, k, cos, sin = (side_by_side(x) for x in (q, k, cos, sin))
    q_out, k_out = (
        empty_like(x, torch.promote_types(dtype, cos.dtype))
        for x, dtype in zip((q, k), normed_dtypes, strict=True)
    )
    batch, num_tokens, num_q_heads = _sizes(q, heads_axis)
    _, _, num_k_heads = _sizes(k, heads_axis)
    width = q.shape[-1]
    tile = config(width, q.itemsize, is_backward=False)
    num_groups = triton.cdiv(num_q_heads, tile.heads) + triton.cdiv(num_k_heads, tile.heads)
    launch(_forward_kernel)[(batch * triton.cdiv(num_tokens, tile.tokens) * num_groups,)](
        q,
        k,
        None if q_weight is None else q_weight.contiguous(),
        None if k_weight is None else k_weight.contiguous(),
        cos,
        sin,
        q_out,
        k_out,
        num_tokens,
        num_q_heads,
        num_k_heads,
        *strides_of(q, heads_axis),
        *strides_of(k, heads_axis),
        *strides_of(cos, heads_axis)[:2],
        *strides_of(sin, heads_axis)[:2],
        *strides_of(q_out, heads_axis),
        *strides_of(k_out, heads_axis),
        WIDTH=width,
        EPS=eps,
        OFFSET=offset,
        ROUNDS_FIRST=casting == "llama",
        ROUNDS_Q=normed_dtypes[0] == q.dtype,
        ROUNDS_K=normed_dtypes[1] == k.dtype,
        TOKENS=tile.tokens,
        HEADS=tile.heads,
        AHEAD=tile.ahead,
        PAIRS=tile.pairs,
        num_warps=tile.num_warps,
    )
    return q_out, k_out


# Long because a launch passes every pointer, stride and size, one on each line.
def backward(
    dq: Tensor | None,
    dk: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    needs_dq: bool,
    needs_dk: bool,
    dweight_dtype: torch.dtype | None,
    heads_axis: int,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, of k, and of the weights (2, D), from the gradients of q' and k'.

    The first two are written into `into` if it is given. They are empty where not needed. The gradients of the weights
    are empty if dweight_dtype is None; otherwise the row for an absent incoming gradient is zero.
    """
    q, k, cos, sin = (side_by_side(x) for x in (q, k, cos, sin))
    dq, dk = (None if dy is None else side_by_side(dy) for dy in (dq, dk))
    if into is None:
        grad_q = empty_like(q, q.dtype) if needs_dq and dq is not None else None
        grad_k = empty_like(k, k.dtype) if needs_dk and dk is not None else None
    else:
        grad_q, grad_k = into
    batch, num_tokens, num_q_heads = _sizes(q, heads_axis)
    _, _, num_k_heads = _sizes(k, heads_axis)
    width = q.shape[-1]
    tile = config(width, q.itemsize, is_backward=True)
    num_tiles = batch * triton.cdiv(num_tokens, tile.tokens)
    num_q_groups, num_k_groups = (
        0 if dy is None else triton.cdiv(count, tile.heads)
        for dy, count in ((dq, num_q_heads), (dk, num_k_heads))
    )
    num_programs = num_tiles * (num_q_groups + num_k_groups)
    sums, dweights = None, q.new_empty(0)
    if dweight_dtype is not None:
        sums = q.new_empty((num_programs, width), dtype=torch.float32)
        dweights = q.new_empty((2, width), dtype=dweight_dtype)
    no_strides = 0, 0, 0
    launch(_backward_kernel)[(num_programs,)](
        dq,
        dk,
        q,
        k,
        None if q_weight is None else q_weight.contiguous(),
        None if k_weight is None else k_weight.contiguous(),
        cos,
        sin,
        grad_q,
        grad_k,
        sums,
        num_tokens,
        num_q_heads,
        num_k_heads,
        num_q_groups,
        num_k_groups,
        *(no_strides if dq is None else strides_of(dq, heads_axis)),
        *(no_strides if dk is None else strides_of(dk, heads_axis)),
        *strides_of(q, heads_axis),
        *strides_of(k, heads_axis),
        *strides_of(cos, heads_axis)[:2],
        *strides_of(sin, heads_axis)[:2],
        *(no_strides if grad_q is None else strides_of(grad_q, heads_axis)),
        *(no_strides if grad_k is None else strides_of(grad_k, heads_axis)),
        WIDTH=width,
        EPS=eps,
        OFFSET=offset,
        TOKENS=tile.tokens,
        HEADS=tile.heads,
        AHEAD=tile.ahead,
        PAIRS=tile.pairs,
        num_warps=tile.num_warps,
    )
    if sums is not None:
        launch(_sum_kernel)[(2, triton.cdiv(width, SUM_COLUMNS))](
            sums,
            dweights,
            num_tiles,
            num_q_groups,
            num_k_groups,
            WIDTH=width,
            ROWS=SUM_ROWS,
            COLUMNS=SUM_COLUMNS,
            num_warps=SUM_WARPS,
        )
    return (
        q.new_empty(0) if grad_q is None else grad_q,
        k.new_empty(0) if grad_k is None else grad_k,
        dweights,
    )


def _sizes(x: Tensor, heads_axis: int) -> tuple[int, int, int]:
    """Return the numbers of sequences, tokens and heads."""
    return by_axis((1,) * (4 - x.dim()) + tuple(x.shape), heads_axis)


# Long because a kernel is one program: its parameters, one on each line, are half of it.
@triton.jit
def _forward_kernel(
    q_ptr,  # (B, T, heads, D) in any order of memory, channels contiguous; as are k, q_out and k_out
    k_ptr,
    q_weight_ptr,  # (D) or None, as is k_weight
    k_weight_ptr,
    cos_ptr,  # (B, T, D), as is sin
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    num_tokens,
    num_q_heads,
    num_k_heads,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    q_out_batch_stride,
    q_out_token_stride,
    q_out_head_stride,
    k_out_batch_stride,
    k_out_token_stride,
    k_out_head_stride,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,  # before the weight, to the dtype of q or k
    ROUNDS_Q: tl.constexpr,  # after the weight, to the dtype of q; if False, the norm is in float32
    ROUNDS_K: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    num_q_groups = tl.cdiv(num_q_heads, HEADS)
    num_groups = num_q_groups + tl.cdiv(num_k_heads, HEADS)
    group = tl.program_id(0) % num_groups
    batch, tokens = _tokens(tl.program_id(0) // num_groups, num_tokens, TOKENS)
    is_token = tokens < num_tokens
    cos_a, cos_b = _read_wide(
        cos_ptr + batch * cos_batch_stride + tokens * cos_token_stride, is_token, WIDTH, PAIRS
    )
    sin_a, sin_b = _read_wide(
        sin_ptr + batch * sin_batch_stride + tokens * sin_token_stride, is_token, WIDTH, PAIRS
    )
    if group < num_q_groups:
        _normalize_and_rotate(
            q_ptr + batch * q_batch_stride + tokens * q_token_stride,
            q_out_ptr + batch * q_out_batch_stride + tokens * q_out_token_stride,
            q_head_stride,
            q_out_head_stride,
            q_weight_ptr,
            group * HEADS,
            num_q_heads,
            tokens,
            num_tokens,
            cos_a,
            cos_b,
            sin_a,
            sin_b,
            WIDTH,
            EPS,
            OFFSET,
            ROUNDS_FIRST,
            ROUNDS_Q,
            HEADS,
            AHEAD,
            PAIRS,
        )
    else:
        _normalize_and_rotate(
            k_ptr + batch * k_batch_stride + tokens * k_token_stride,
            k_out_ptr + batch * k_out_batch_stride + tokens * k_out_token_stride,
            k_head_stride,
            k_out_head_stride,
            k_weight_ptr,
            (group - num_q_groups) * HEADS,
            num_k_heads,
            tokens,
            num_tokens,
            cos_a,
            cos_b,
            sin_a,
            sin_b,
            WIDTH,
            EPS,
            OFFSET,
            ROUNDS_FIRST,
            ROUNDS_K,
            HEADS,
            AHEAD,
            PAIRS,
        )


@triton.jit
def _normalize_and_rotate(
    x_at,  # the addresses of the first head of every token
    out_at,
    x_head_stride,
    out_head_stride,
    weight_ptr,
    first,
    num_heads,
    tokens,
    num_tokens,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    ROUNDS_LAST: tl.constexpr,
    HEADS: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRS: tl.constexpr,
):
    dtype: tl.constexpr = x_at.dtype.element_ty
    gain_a, gain_b = _gain(weight_ptr, tokens, WIDTH, OFFSET, PAIRS)
    read = ()
    for step in tl.static_range(HEADS + AHEAD - 1):
        if step < HEADS:
            head = (first + step).to(tl.int64)
            pairs = _read(
                x_at + head * x_head_stride, row_mask(tokens, num_tokens, head < num_heads), WIDTH, PAIRS
            )
            read = read + (pairs,)  # noqa: RUF005, which Triton does not know
        if step >= AHEAD - 1:
            head = (first + step - (AHEAD - 1)).to(tl.int64)
            a, b = read[step - (AHEAD - 1)]
            a, b = a.to(tl.float32), b.to(tl.float32)
            rstd = tl.rsqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / WIDTH + EPS)
            a, b = a * rstd, b * rstd
            if ROUNDS_FIRST:
                a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
            a, b = a * gain_a, b * gain_b
            if ROUNDS_LAST:
                a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
            _write(
                out_at + head * out_head_stride,
                a * cos_a - b * sin_a,
                b * cos_b + a * sin_b,
                row_mask(tokens, num_tokens, head < num_heads),
                WIDTH,
                PAIRS,
            )


@triton.jit
def _tokens(tile, num_tokens, TOKENS: tl.constexpr):
    """Return the sequence of a tile and its tokens, as 64-bit integers."""
    num_tiles = tl.cdiv(num_tokens, TOKENS)
    tokens = (tile % num_tiles) * TOKENS + tl.arange(0, TOKENS)[:, None]
    return (tile // num_tiles).to(tl.int64), tokens.to(tl.int64)


@triton.jit
def _mask(is_row, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    """Return a mask of the pairs of a tile that exist."""
    mask = is_row
    if 2 * PAIRS != WIDTH:
        mask = is_row & (tl.arange(0, PAIRS)[None, :] < WIDTH // 2)
    return mask


@triton.jit
def _read(at, is_row, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    """Return the two halves of each row at these addresses; 0 outside the row, because the values are summed."""
    pair = tl.arange(0, PAIRS)[None, :]
    mask = _mask(is_row, WIDTH, PAIRS)
    return tl.load(at + pair, mask, other=0.0), tl.load(at + WIDTH // 2 + pair, mask, other=0.0)


@triton.jit
def _read_wide(at, is_row, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    a, b = _read(at, is_row, WIDTH, PAIRS)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _write(at, a, b, is_row, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    pair = tl.arange(0, PAIRS)[None, :]
    mask = _mask(is_row, WIDTH, PAIRS)
    tl.store(at + pair, a, mask)
    tl.store(at + WIDTH // 2 + pair, b, mask)


@triton.jit
def _gain(weight_ptr, tokens, WIDTH: tl.constexpr, OFFSET: tl.constexpr, PAIRS: tl.constexpr):
    """Return the factors of the two halves of each row.

    They are loaded for the whole tile: a single row of factors would have to be moved between threads.
    """
    if weight_ptr is None:
        gain_a = tl.full([1, 1], 1.0, tl.float32)
        gain_b = gain_a
    else:
        gain_a, gain_b = _read_wide(weight_ptr + 0 * tokens, tokens >= 0, WIDTH, PAIRS)
        gain_a, gain_b = gain_a + OFFSET, gain_b + OFFSET
    return gain_a, gain_b


# Long because a kernel is one program: its parameters, one on each line, are half of it.
@triton.jit
def _backward_kernel(
    dq_ptr,  # (B, T, heads, D) in any order of memory, channels contiguous, or None; as are dk, grad_q and grad_k,
    dk_ptr,  # and, but never None, q and k. dq and dk are the gradients of the results of forward
    q_ptr,
    k_ptr,
    q_weight_ptr,  # (D) or None, as is k_weight
    k_weight_ptr,
    cos_ptr,  # (B, T, D), as is sin
    sin_ptr,
    grad_q_ptr,
    grad_k_ptr,
    sums_ptr,  # (P, D) in float32, for P programs: the contribution of each to the gradient of its weight; or None
    num_tokens,
    num_q_heads,
    num_k_heads,
    num_q_groups,  # of heads; 0 without gradients
    num_k_groups,
    dq_batch_stride,
    dq_token_stride,
    dq_head_stride,
    dk_batch_stride,
    dk_token_stride,
    dk_head_stride,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    grad_q_batch_stride,
    grad_q_token_stride,
    grad_q_head_stride,
    grad_k_batch_stride,
    grad_k_token_stride,
    grad_k_head_stride,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    num_groups = num_q_groups + num_k_groups
    group = tl.program_id(0) % num_groups
    batch, tokens = _tokens(tl.program_id(0) // num_groups, num_tokens, TOKENS)
    is_token = tokens < num_tokens
    cos_a, cos_b = _read_wide(
        cos_ptr + batch * cos_batch_stride + tokens * cos_token_stride, is_token, WIDTH, PAIRS
    )
    sin_a, sin_b = _read_wide(
        sin_ptr + batch * sin_batch_stride + tokens * sin_token_stride, is_token, WIDTH, PAIRS
    )
    if group < num_q_groups:
        if dq_ptr is not None:
            _backward_of_heads(
                dq_ptr + batch * dq_batch_stride + tokens * dq_token_stride,
                q_ptr + batch * q_batch_stride + tokens * q_token_stride,
                None
                if grad_q_ptr is None
                else grad_q_ptr + batch * grad_q_batch_stride + tokens * grad_q_token_stride,
                dq_head_stride,
                q_head_stride,
                grad_q_head_stride,
                q_weight_ptr,
                sums_ptr,
                group * HEADS,
                num_q_heads,
                tokens,
                num_tokens,
                cos_a,
                cos_b,
                sin_a,
                sin_b,
                WIDTH,
                EPS,
                OFFSET,
                HEADS,
                AHEAD,
                PAIRS,
            )
    else:
        if dk_ptr is not None:
            _backward_of_heads(
                dk_ptr + batch * dk_batch_stride + tokens * dk_token_stride,
                k_ptr + batch * k_batch_stride + tokens * k_token_stride,
                None
                if grad_k_ptr is None
                else grad_k_ptr + batch * grad_k_batch_stride + tokens * grad_k_token_stride,
                dk_head_stride,
                k_head_stride,
                grad_k_head_stride,
                k_weight_ptr,
                sums_ptr,
                (group - num_q_groups) * HEADS,
                num_k_heads,
                tokens,
                num_tokens,
                cos_a,
                cos_b,
                sin_a,
                sin_b,
                WIDTH,
                EPS,
                OFFSET,
                HEADS,
                AHEAD,
                PAIRS,
            )


# Long because a kernel is one program: its parameters, one on each line, are half of it.
@triton.jit
def _backward_of_heads(
    dy_at,  # the addresses of the first head of every token
    x_at,
    dx_at,  # or None
    dy_head_stride,
    x_head_stride,
    dx_head_stride,
    weight_ptr,
    sums_ptr,
    first,
    num_heads,
    tokens,
    num_tokens,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRS: tl.constexpr,
):
    gain_a, gain_b = _gain(weight_ptr, tokens, WIDTH, OFFSET, PAIRS)
    sum_a, sum_b = 0.0, 0.0
    read = ()
    for step in tl.static_range(HEADS + AHEAD - 1):
        if step < HEADS:
            head = (first + step).to(tl.int64)
            is_row = row_mask(tokens, num_tokens, head < num_heads)
            dy_a, dy_b = _read(dy_at + head * dy_head_stride, is_row, WIDTH, PAIRS)
            a, b = _read(x_at + head * x_head_stride, is_row, WIDTH, PAIRS)
            read = read + ((dy_a, dy_b, a, b),)  # noqa: RUF005, which Triton does not know
        if step >= AHEAD - 1:
            head = (first + step - (AHEAD - 1)).to(tl.int64)
            dy_a, dy_b, a, b = read[step - (AHEAD - 1)]
            dy_a, dy_b, a, b = dy_a.to(tl.float32), dy_b.to(tl.float32), a.to(tl.float32), b.to(tl.float32)
            rstd = tl.rsqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / WIDTH + EPS)
            a, b = a * rstd, b * rstd
            g_a, g_b = dy_a * cos_a + dy_b * sin_b, dy_b * cos_b - dy_a * sin_a
            if sums_ptr is not None:
                sum_a += g_a * a
                sum_b += g_b * b
            if dx_at is not None:
                g_a, g_b = g_a * gain_a, g_b * gain_b
                mean = tl.sum(g_a * a + g_b * b, 1, keep_dims=True) / WIDTH
                _write(
                    dx_at + head * dx_head_stride,
                    rstd * (g_a - a * mean),
                    rstd * (g_b - b * mean),
                    row_mask(tokens, num_tokens, head < num_heads),
                    WIDTH,
                    PAIRS,
                )
    if sums_ptr is not None:
        _write(
            sums_ptr + tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, 1)[:, None],
            tl.sum(sum_a, 0, keep_dims=True),
            tl.sum(sum_b, 0, keep_dims=True),
            tl.full([1, 1], 1, tl.int1),
            WIDTH,
            PAIRS,
        )


@triton.jit
def _sum_kernel(
    sums_ptr,  # (tiles, groups of q and then of k, D)
    out_ptr,  # (2, D)
    num_tiles,
    num_q_groups,
    num_k_groups,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    which = tl.program_id(0)
    count = tl.where(which == 0, num_q_groups, num_k_groups)
    before = tl.where(which == 0, 0, num_q_groups)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_tiles * count, ROWS):
        index = start + tl.arange(0, ROWS)[:, None]
        row = (index // count).to(tl.int64) * (num_q_groups + num_k_groups) + before + index % count
        mask = (index < num_tiles * count) & (column < WIDTH)
        total += tl.load(sums_ptr + row * WIDTH + column, mask, other=0.0)
    tl.store(out_ptr + which * WIDTH + column, tl.sum(total, 0, keep_dims=True), column < WIDTH)
