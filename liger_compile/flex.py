"""flex_attention as a node of a graph: causal attention within a window, or with capped scores, block by block.

Dynamo writes torch.nn.attention.flex_attention down as one higher-order op, whose scores and mask are functions of
positions, and whose block mask is a tuple of integers: for every 128 queries, which 128 keys are seen at all (and by
all). This file computes that tuple from the window, without the T x T booleans that create_block_mask makes, and calls
the op. AOTAutograd differentiates it, and Inductor has kernels for it on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from liger_compile.graphs.guards import sizes_of_one_may_be_guarded

BLOCK_SIZE = 128  # what Inductor's templates are tuned for
HALF = (torch.float16, torch.bfloat16)
LARGEST_CAP = 1e3  # 1e-7 of a larger cap would be seen in scores of half precision
SMALLEST_HEAD = 16  # a product of tiles takes no fewer channels; other sizes than powers of two are padded


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """softmax(s + mask) @ v, with s = scale * q @ k^T, or softcap * tanh(s / softcap): causal, within a window.

    Args:
        q: (B, H, T, D).
        k: (B, G, T, D), G dividing H.
        v: (B, G, T, E).
        scale: of the scores.
        window: query i sees the keys i - window + 1 to i; None is all up to i.
        softcap: the bound of the scores; None is no bound.
    """

    is_half = q.dtype in HALF

    def score(score, batch, head, query, key):
        if softcap is None:
            return score
        # With CUDA's tanh forward takes 1.5 times as long, and this is right to about 1e-7 of the cap.
        if is_half and softcap <= LARGEST_CAP:
            return softcap * (2 * torch.sigmoid(score * (2 / softcap)) - 1)
        return softcap * torch.tanh(score / softcap)

    def mask(batch, head, query, key):
        return key <= query if window is None else (key <= query) & (query - key < window)

    with sizes_of_one_may_be_guarded(q):
        blocks = _block_mask(q, window, mask)
    # As torch.nn.attention.flex_attention.flex_attention sets them where it is compiled.
    options = {
        "BACKEND": "AUTO",
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": torch.is_grad_enabled() and q.device.type != "cpu",
        "OUTPUT_MAX": False,
        **_tiles(q, v),
    }
    out, _, _ = torch.ops.higher_order.flex_attention(
        q, k, v, score, blocks.as_tuple(), scale, options, (), ()
    )
    return out


def _tiles(q: Tensor, v: Tensor) -> dict[str, Any]:
    if q.device.type != "cuda" or q.dtype not in HALF:
        return {}
    from liger_compile.kernels.flex_attention import tiles

    found = tiles(torch.cuda.get_device_capability(q.device), max(q.shape[-1], v.shape[-1]))
    # Inductor's kernel for fewer than 128 queries has other tiles, and these would be forced upon it.
    return {**found, "BACKEND": "TRITON"} if found else {}


def _block_mask(q: Tensor, window: int | None, mask: Callable[..., Tensor]) -> BlockMask:
    """Blocks are seen in part, or whole; both lie side by side, so that their numbers need no search.

    Where the length is symbolic, a graph of more than one block is guarded to have more than one, as tensors are.

    Block r of queries sees the keys of the blocks first(r) to r. Whole are those of the `whole` before r, if r
    itself is complete: all that is causal and near enough for the last query and the first key of a pair of blocks.
    """
    length, device = q.shape[-2], q.device
    at = torch.arange(0, length, BLOCK_SIZE, dtype=torch.int32, device=device)  # where each block begins
    block = at // BLOCK_SIZE
    last = block[-1:]
    reach = (
        None if window is None else (window + BLOCK_SIZE - 2) // BLOCK_SIZE
    )  # how far back some key of a block is seen
    whole = (
        None if window is None else max(0, (window - BLOCK_SIZE) // BLOCK_SIZE)
    )  # and how far back all are

    first = torch.zeros_like(block) if reach is None else (block - reach).clamp(min=0)
    farthest = last.expand_as(block) if reach is None else torch.minimum(block + reach, last)
    before = block if whole is None else block.clamp(max=whole)
    before = torch.where(
        at + BLOCK_SIZE <= length, before, 0
    )  # of each block of queries, whole blocks of keys
    after = ((length - at) // BLOCK_SIZE - 1).clamp(min=0)
    after = (
        after if whole is None else after.clamp(max=whole)
    )  # of each block of keys, whole blocks of queries

    nth = block
    begin = block - before
    # Keys: first to begin - 1 in part, begin to r - 1 whole, r in part.
    seen = first[:, None] + nth
    keys = torch.where(seen < begin[:, None], seen, seen + before[:, None])
    # Queries: r in part, the next ones whole, the rest in part.
    queries = torch.where(nth == 0, block[:, None], block[:, None] + nth + after[:, None])

    def indices(blocks: Tensor) -> Tensor:
        """What is beyond their number is never read, but may be fetched."""
        return torch.minimum(blocks, last)[None, None].contiguous()

    def numbers(count: Tensor) -> Tensor:
        return count[None, None].contiguous()

    return BlockMask(
        (length, length),
        numbers(begin - first + 1),
        indices(keys),
        numbers(before),
        indices(begin[:, None] + nth),
        numbers(farthest - block - after + 1),
        indices(queries),
        numbers(after),
        indices(block[:, None] + nth + 1),
        BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE),
        mask_mod=mask,
    )
