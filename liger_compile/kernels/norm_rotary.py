"""RMSNorm of every head of q and of k, then rotary position embedding: the kernels of ops/norm_rotary.py.

A head's channels stay in registers, its two halves as tiles of their own: the channel that a channel is paired with is
at hand in the same thread. Forward moves 4 bytes an element in half precision, backward 6. A tile is some heads of
q or of k, in the order of the tokens and of the heads of a token, whatever the number of heads. Inputs have any
strides, such as those of slices of one projection; results have their order of dimensions, without gaps.

Backward is one pass for the gradients of q, k and both weights. Its programs are a fixed number, walk over the tiles of
q and then of k, and each keep a sum of either weight's gradient in float32; a second kernel adds up the sums in a fixed
order, so that the result is deterministic.
"""

# What Triton's decorator makes of a kernel, a type checker does not see.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, num_multiprocessors
from .rms_norm import sum_of_programs
from .rotary import by_axis, empty_like, side_by_side, strides_of


class Config(NamedTuple):
    rows: int  # heads of a tile
    pairs: int  # half of a head's channels, to the next power of two
    num_warps: int


# Of a tile. Backward holds more in registers: 8 pairs a thread take up to 128, which leaves room for 16 warps.
FORWARD_PAIRS, BACKWARD_PAIRS = 2048, 1024
BACKWARD_WARPS = 16  # on each multiprocessor


def config(width: int, most_pairs: int) -> Config:
    """The tile for heads of `width` channels."""
    pairs = triton.next_power_of_2(width // 2)
    return Config(max(1, most_pairs // pairs), pairs, num_warps=max(4, pairs // 256))


def num_stages(itemsize: int) -> int:
    """Of backward's loop: the tiles in flight, and the one that is computed. 48 KiB of shared memory a program."""
    return 3 if itemsize < 4 else 2


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
    """(q', k'). heads_axis is that of the heads, 1 or 2, of the four axes that each has or would have in front.

    The tables are the same along it; q and k have as many sequences and tokens. normed_dtypes are those of their norms.
    """
    q, k, cos, sin = (side_by_side(x) for x in (q, k, cos, sin))
    q_out, k_out = (
        empty_like(x, torch.promote_types(dtype, cos.dtype))
        for x, dtype in zip((q, k), normed_dtypes, strict=True)
    )
    batch, num_tokens, num_q_heads = _sizes(q, heads_axis)
    _, _, num_k_heads = _sizes(k, heads_axis)
    width = q.shape[-1]
    launched = config(width, FORWARD_PAIRS)
    num_q_tiles = triton.cdiv(num_tokens * num_q_heads, launched.rows)
    num_k_tiles = triton.cdiv(num_tokens * num_k_heads, launched.rows)
    launch(_forward_kernel)[(batch * (num_q_tiles + num_k_tiles),)](
        q,
        k,
        None if q_weight is None else q_weight.contiguous(),
        None if k_weight is None else k_weight.contiguous(),
        cos,
        sin,
        q_out,
        k_out,
        batch,
        num_tokens,
        num_q_heads,
        num_k_heads,
        num_q_tiles,
        num_k_tiles,
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
        ROWS=launched.rows,
        PAIRS=launched.pairs,
        num_warps=launched.num_warps,
    )
    return q_out, k_out


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, of k, and (2, D), those of the weights, from those of q' and k'.

    Empty where not needed, as is that of a weight where dweight_dtype is None; otherwise zero from an absent gradient.
    """
    q, k, cos, sin = (side_by_side(x) for x in (q, k, cos, sin))
    dq, dk = (None if dy is None else side_by_side(dy) for dy in (dq, dk))
    grad_q = empty_like(q, q.dtype) if needs_dq and dq is not None else None
    grad_k = empty_like(k, k.dtype) if needs_dk and dk is not None else None
    batch, num_tokens, num_q_heads = _sizes(q, heads_axis)
    _, _, num_k_heads = _sizes(k, heads_axis)
    width = q.shape[-1]
    launched = config(width, BACKWARD_PAIRS)
    num_q_tiles = triton.cdiv(num_tokens * num_q_heads, launched.rows)
    num_k_tiles = triton.cdiv(num_tokens * num_k_heads, launched.rows)
    num_programs: Any = torch.sym_min(
        num_multiprocessors(q.device) * (BACKWARD_WARPS // launched.num_warps),
        batch * (num_q_tiles + num_k_tiles),
    )
    sums = None
    if dweight_dtype is not None:
        sums = q.new_empty((num_programs, 2 * width), dtype=torch.float32)
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
        batch,
        num_tokens,
        num_q_heads,
        num_k_heads,
        num_q_tiles,
        num_k_tiles,
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
        ROWS=launched.rows,
        PAIRS=launched.pairs,
        STAGES=num_stages(max(x.itemsize for x in (q, k, dq, dk) if x is not None)),
        num_warps=launched.num_warps,
    )
    return (
        q.new_empty(0) if grad_q is None else grad_q,
        k.new_empty(0) if grad_k is None else grad_k,
        q.new_empty(0) if sums is None else sum_of_programs(sums, dweight_dtype).view(2, width),
    )


def _sizes(x: Tensor, heads_axis: int) -> tuple[int, int, int]:
    """Sequences, tokens and heads."""
    return by_axis((1,) * (4 - x.dim()) + tuple(x.shape), heads_axis)


@triton.jit
def _forward_kernel(
    q_ptr,  # (B, T, heads, D) in any order of memory, channels side by side; as are k, q_out and k_out
    k_ptr,
    q_weight_ptr,  # (D) or None, as is k_weight
    k_weight_ptr,
    cos_ptr,  # (B, T, D), as is sin
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    batch,
    num_tokens,
    num_q_heads,
    num_k_heads,
    num_q_tiles,  # of a sequence
    num_k_tiles,
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
    ROUNDS_Q: tl.constexpr,  # after it, to the dtype of q; another dtype of the norm is float32
    ROUNDS_K: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile < batch * num_q_tiles:
        sequence, token, head = _rows(tile, num_q_tiles, num_q_heads, ROWS)
        _normalize_and_rotate(
            q_ptr + sequence * q_batch_stride + token * q_token_stride + head * q_head_stride,
            q_weight_ptr,
            cos_ptr + sequence * cos_batch_stride + token * cos_token_stride,
            sin_ptr + sequence * sin_batch_stride + token * sin_token_stride,
            q_out_ptr + sequence * q_out_batch_stride + token * q_out_token_stride + head * q_out_head_stride,
            token < num_tokens,
            WIDTH,
            EPS,
            OFFSET,
            ROUNDS_FIRST,
            ROUNDS_Q,
            ROWS,
            PAIRS,
        )
    else:
        sequence, token, head = _rows(tile - batch * num_q_tiles, num_k_tiles, num_k_heads, ROWS)
        _normalize_and_rotate(
            k_ptr + sequence * k_batch_stride + token * k_token_stride + head * k_head_stride,
            k_weight_ptr,
            cos_ptr + sequence * cos_batch_stride + token * cos_token_stride,
            sin_ptr + sequence * sin_batch_stride + token * sin_token_stride,
            k_out_ptr + sequence * k_out_batch_stride + token * k_out_token_stride + head * k_out_head_stride,
            token < num_tokens,
            WIDTH,
            EPS,
            OFFSET,
            ROUNDS_FIRST,
            ROUNDS_K,
            ROWS,
            PAIRS,
        )


@triton.jit
def _rows(tile, num_tiles, num_heads, ROWS: tl.constexpr):
    """The sequence of a tile, and the token and the head of each of its rows, as 64-bit integers."""
    sequence = (tile // num_tiles).to(tl.int64)
    first = (tile % num_tiles).to(tl.int64) * ROWS
    first_token = first // num_heads
    row = (first - first_token * num_heads).to(tl.int32) + tl.arange(0, ROWS)[:, None]
    return sequence, first_token + row // num_heads, (row % num_heads).to(tl.int64)


@triton.jit
def _normalize_and_rotate(
    x_at,  # where the rows begin, as are the next ones
    weight_ptr,
    cos_at,
    sin_at,
    out_at,
    is_row,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    ROUNDS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    half: tl.constexpr = WIDTH // 2
    pair = tl.arange(0, PAIRS)[None, :]
    is_pair = tl.broadcast_to(pair < half, [ROWS, PAIRS])
    mask = is_row & is_pair
    dtype: tl.constexpr = x_at.dtype.element_ty
    a, b = _read(x_at, pair, mask, half)
    cos_a, cos_b = _read(cos_at, pair, mask, half)
    sin_a, sin_b = _read(sin_at, pair, mask, half)
    gain_a, gain_b = _gain(weight_ptr, pair, is_pair, half, OFFSET)
    rstd = tl.rsqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / WIDTH + EPS)
    a, b = a * rstd, b * rstd
    if ROUNDS_FIRST:
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    a, b = a * gain_a, b * gain_b
    if ROUNDS_LAST:
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    tl.store(out_at + pair, a * cos_a - b * sin_a, mask)
    tl.store(out_at + half + pair, b * cos_b + a * sin_b, mask)


@triton.jit
def _read(at, pair, mask, half: tl.constexpr):
    """The two halves of each row. Rows of one token read the same tables, from the cache."""
    a = tl.load(at + pair, mask, other=0.0).to(tl.float32)
    b = tl.load(at + half + pair, mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _gain(weight_ptr, pair, is_pair, half: tl.constexpr, OFFSET: tl.constexpr):
    """What the two halves of each row are multiplied by. Read by the tile: a row of them would have to be moved between
    threads."""
    if weight_ptr is None:
        gain_a = tl.full(is_pair.shape, 1.0, tl.float32)
        gain_b = gain_a
    else:
        at = weight_ptr + tl.broadcast_to(pair, is_pair.shape)
        gain_a = tl.load(at, is_pair, other=0.0).to(tl.float32) + OFFSET
        gain_b = tl.load(at + half, is_pair, other=0.0).to(tl.float32) + OFFSET
    return gain_a, gain_b


@triton.jit
def _backward_kernel(
    dq_ptr,  # (B, T, heads, D) in any order of memory, channels side by side, or None; as are dk, grad_q and grad_k,
    dk_ptr,  # and without None q and k. dq and dk are the gradients of what forward made of q and k
    q_ptr,
    k_ptr,
    q_weight_ptr,  # (D) or None, as is k_weight
    k_weight_ptr,
    cos_ptr,  # (B, T, D), as is sin
    sin_ptr,
    grad_q_ptr,
    grad_k_ptr,
    sums_ptr,  # (P, 2, D) in float32, for P programs: what each adds to the gradients of the weights; or None
    batch,
    num_tokens,
    num_q_heads,
    num_k_heads,
    num_q_tiles,  # of a sequence
    num_k_tiles,
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
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
):
    _backward_of_one(
        dq_ptr,
        q_ptr,
        q_weight_ptr,
        cos_ptr,
        sin_ptr,
        grad_q_ptr,
        sums_ptr,
        0,
        batch,
        num_tokens,
        num_q_heads,
        num_q_tiles,
        dq_batch_stride,
        dq_token_stride,
        dq_head_stride,
        q_batch_stride,
        q_token_stride,
        q_head_stride,
        cos_batch_stride,
        cos_token_stride,
        sin_batch_stride,
        sin_token_stride,
        grad_q_batch_stride,
        grad_q_token_stride,
        grad_q_head_stride,
        WIDTH,
        EPS,
        OFFSET,
        ROWS,
        PAIRS,
        STAGES,
    )
    _backward_of_one(
        dk_ptr,
        k_ptr,
        k_weight_ptr,
        cos_ptr,
        sin_ptr,
        grad_k_ptr,
        sums_ptr,
        1,
        batch,
        num_tokens,
        num_k_heads,
        num_k_tiles,
        dk_batch_stride,
        dk_token_stride,
        dk_head_stride,
        k_batch_stride,
        k_token_stride,
        k_head_stride,
        cos_batch_stride,
        cos_token_stride,
        sin_batch_stride,
        sin_token_stride,
        grad_k_batch_stride,
        grad_k_token_stride,
        grad_k_head_stride,
        WIDTH,
        EPS,
        OFFSET,
        ROWS,
        PAIRS,
        STAGES,
    )


@triton.jit
def _backward_of_one(
    dy_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    sums_ptr,
    WHICH: tl.constexpr,  # of the sums is its: 0 for q, 1 for k
    batch,
    num_tokens,
    num_heads,
    num_tiles,
    dy_batch_stride,
    dy_token_stride,
    dy_head_stride,
    x_batch_stride,
    x_token_stride,
    x_head_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    dx_batch_stride,
    dx_token_stride,
    dx_head_stride,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
):
    half: tl.constexpr = WIDTH // 2
    pair = tl.arange(0, PAIRS)[None, :]
    is_pair = tl.broadcast_to(pair < half, [ROWS, PAIRS])
    sum_a = tl.zeros([ROWS, PAIRS], tl.float32)
    sum_b = tl.zeros([ROWS, PAIRS], tl.float32)
    if dy_ptr is not None:
        gain_a, gain_b = _gain(weight_ptr, pair, is_pair, half, OFFSET)
        for tile in tl.range(tl.program_id(0), batch * num_tiles, tl.num_programs(0), num_stages=STAGES):
            sequence, token, head = _rows(tile, num_tiles, num_heads, ROWS)
            mask = (token < num_tokens) & is_pair
            dy_at = dy_ptr + sequence * dy_batch_stride + token * dy_token_stride + head * dy_head_stride
            x_at = x_ptr + sequence * x_batch_stride + token * x_token_stride + head * x_head_stride
            dy_a, dy_b = _read(dy_at, pair, mask, half)
            a, b = _read(x_at, pair, mask, half)
            cos_at = cos_ptr + sequence * cos_batch_stride + token * cos_token_stride
            sin_at = sin_ptr + sequence * sin_batch_stride + token * sin_token_stride
            cos_a, cos_b = _read(cos_at, pair, mask, half)
            sin_a, sin_b = _read(sin_at, pair, mask, half)
            rstd = tl.rsqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / WIDTH + EPS)
            a, b = a * rstd, b * rstd
            g_a, g_b = dy_a * cos_a + dy_b * sin_b, dy_b * cos_b - dy_a * sin_a
            if sums_ptr is not None:
                sum_a += g_a * a
                sum_b += g_b * b
            if dx_ptr is not None:
                g_a, g_b = g_a * gain_a, g_b * gain_b
                mean = tl.sum(g_a * a + g_b * b, 1, keep_dims=True) / WIDTH
                dx_at = dx_ptr + sequence * dx_batch_stride + token * dx_token_stride + head * dx_head_stride
                tl.store(dx_at + pair, rstd * (g_a - a * mean), mask)
                tl.store(dx_at + half + pair, rstd * (g_b - b * mean), mask)
    if sums_ptr is not None:
        sums_at = sums_ptr + (2 * tl.program_id(0).to(tl.int64) + WHICH) * WIDTH + pair
        tl.store(sums_at, tl.sum(sum_a, 0, keep_dims=True), pair < half)
        tl.store(sums_at + half, tl.sum(sum_b, 0, keep_dims=True), pair < half)
