"""flex_attention as a node of a graph: attention within a window or documents, or with capped scores, in blocks.

Dynamo captures torch.nn.attention.flex_attention as one higher-order op. Its scores and mask are functions of
positions, and its block mask is a tuple of integers: for every 128 queries, the blocks of 128 keys of which any key (or
every key) is visible. This file computes that tuple from the window and the documents, without the T x T booleans of
create_block_mask, and calls the op. AOTAutograd differentiates the op, and Inductor has kernels for it on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from liger_compile.graphs.guards import sizes_of_one_may_be_guarded

BLOCK_SIZE = 128  # Inductor's templates are tuned for it
HALF = (torch.float16, torch.bfloat16)
LARGEST_CAP = 1e3  # 1e-7 of a larger cap would be visible in scores of half precision
SMALLEST_HEAD = 16  # the fewest channels of a tile in a matmul; sizes other than powers of two are padded


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Returns causal softmax(s + mask) @ v within a window; s = scale * q @ k^T, or softcap * tanh(s / softcap).

    Args:
        q: (B, H, T, D).
        k: (B, G, T, D), G dividing H.
        v: (B, G, T, E).
        scale: multiplies the scores.
        window: query i sees the keys i - window + 1 to i; None means all keys up to i.
        softcap: the bound of the scores; None means no bound.
    """

    def mask(batch, head, query, key):
        return key <= query if window is None else (key <= query) & (query - key < window)

    with sizes_of_one_may_be_guarded(q):
        blocks = block_mask(q, window, mask)
    return _flex_attention(q, k, v, blocks, (), scale, softcap)


# Many parameters because they are those of a kernel.
def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    *,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Returns attention in which a query sees only keys of its own document.

    Args:
        q: (B, H, T, D).
        k: (B, G, T, D), G dividing H.
        v: (B, G, T, E).
        documents: (B, T) or (1, T) integers; tokens of a row with equal integers are one document, wherever they are.
        scale: multiplies the scores.
        is_causal: whether a query sees no later keys.
        window: query i sees the keys i - window + 1 to i; None means no window. Only with `is_causal`.
        softcap: the bound of the scores; None means no bound.
    """
    if window is not None and not is_causal:
        raise ValueError("expected a window of causal attention, got one of attention to all keys")
    is_shared = documents.shape[0] == 1
    ids = documents[0] if is_shared else documents  # in the kernel, all indices of a tensor must be tensors

    def mask(batch, head, query, key, ids):
        same = ids[query] == ids[key] if is_shared else ids[batch, query] == ids[batch, key]
        if not is_causal:
            return same
        same = same & (key <= query)
        return same if window is None else same & (query - key < window)

    with sizes_of_one_may_be_guarded(q):
        blocks = document_block_mask(documents, is_causal, window, mask)
    return _flex_attention(q, k, v, blocks, (ids,), scale, softcap)


# Many parameters because they are those of a kernel.
def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    *,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    hides_queries: bool = False,
) -> Tensor:
    """Returns attention in which a query sees no padded key; a query that sees no key gives zeros.

    Args:
        q: (B, H, T, D).
        k: (B, G, T, D), G dividing H.
        v: (B, G, T, E).
        keys: (B, T) or (1, T) booleans; which tokens of a row are no padding.
        scale: multiplies the scores.
        is_causal: whether a query sees no later keys.
        window: query i sees the keys i - window + 1 to i; None means no window. Only with `is_causal`.
        softcap: the bound of the scores; None means no bound.
        hides_queries: nothing reads the rows of padded queries; they are zero, and take no time.
    """
    if window is not None and not is_causal:
        raise ValueError("expected a window of causal attention, got one of attention to all keys")
    is_shared = keys.shape[0] == 1
    flags = keys[0] if is_shared else keys  # in the kernel, all indices of a tensor must be tensors

    def mask(batch, head, query, key, flags):
        seen = flags[key] if is_shared else flags[batch, key]
        if hides_queries:
            seen = seen & (flags[query] if is_shared else flags[batch, query])
        if not is_causal:
            return seen
        seen = seen & (key <= query)
        return seen if window is None else seen & (query - key < window)

    with sizes_of_one_may_be_guarded(q):
        blocks = padded_block_mask(keys, is_causal, window, mask, hides_queries)
    return _flex_attention(q, k, v, blocks, (flags,), scale, softcap)


def _flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockMask,
    read_by_mask: tuple[Tensor, ...],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Calls the op as torch.nn.attention.flex_attention.flex_attention does."""
    is_half = q.dtype in HALF

    def score(score, batch, head, query, key):
        if softcap is None:
            return score
        # CUDA's tanh makes forward 1.5 times as slow, and this form is accurate to about 1e-7 of the cap.
        if is_half and softcap <= LARGEST_CAP:
            return softcap * (2 * torch.sigmoid(score * (2 / softcap)) - 1)
        return softcap * torch.tanh(score / softcap)

    # The options that torch.nn.attention.flex_attention.flex_attention sets when compiled.
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
        q, k, v, score, blocks.as_tuple(), scale, options, (), read_by_mask
    )
    return out


def _tiles(q: Tensor, v: Tensor) -> dict[str, Any]:
    if q.device.type != "cuda" or q.dtype not in HALF:
        return {}
    from liger_compile.kernels.flex_attention import tiles

    found = tiles(torch.cuda.get_device_capability(q.device), max(q.shape[-1], v.shape[-1]))
    # Inductor's kernel for fewer than 128 queries uses other tiles; these tiles would be forced upon it.
    return {**found, "BACKEND": "TRITON"} if found else {}


def block_mask(q: Tensor, window: int | None, mask: Callable[..., Tensor]) -> BlockMask:
    """Returns the block mask. Partial and whole blocks are both contiguous ranges, so no search finds their indices.

    If the length is symbolic, a graph with more than one block is guarded to have more than one, as with tensors.

    Block r of queries sees keys of the blocks first(r) to r. If r itself is complete, the `whole` blocks before r are
    whole: the last query and the first key of such a pair of blocks are causal and within the window.
    """
    length, device = q.shape[-2], q.device
    at = torch.arange(0, length, BLOCK_SIZE, dtype=torch.int32, device=device)  # the start of each block
    block = at // BLOCK_SIZE
    last = block[-1:]
    reach, whole = _blocks_back(window)

    first = torch.zeros_like(block) if reach is None else (block - reach).clamp(min=0)
    farthest = last.expand_as(block) if reach is None else torch.minimum(block + reach, last)
    before = block if whole is None else block.clamp(max=whole)
    before = torch.where(
        at + BLOCK_SIZE <= length, before, 0
    )  # for each block of queries, the number of whole blocks of keys
    after = ((length - at) // BLOCK_SIZE - 1).clamp(min=0)
    after = (
        after if whole is None else after.clamp(max=whole)
    )  # for each block of keys, the number of whole blocks of queries

    nth = block
    begin = block - before
    # Keys: first to begin - 1 partial, begin to r - 1 whole, r partial.
    seen = first[:, None] + nth
    keys = torch.where(seen < begin[:, None], seen, seen + before[:, None])
    # Queries: r partial, the following blocks whole, the rest partial.
    queries = torch.where(nth == 0, block[:, None], block[:, None] + nth + after[:, None])

    def indices(blocks: Tensor) -> Tensor:
        """Returns indices that are valid everywhere: kernels never use those beyond the number, but may fetch them."""
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


def _blocks_back(window: int | None) -> tuple[int | None, int | None]:
    """Returns how many blocks back some key is visible, and how many blocks back every key is; None means all."""
    if window is None:
        return None, None
    return (window + BLOCK_SIZE - 2) // BLOCK_SIZE, max(0, (window - BLOCK_SIZE) // BLOCK_SIZE)


def document_block_mask(
    documents: Tensor, is_causal: bool, window: int | None, mask: Callable[..., Tensor]
) -> BlockMask:
    """Returns the block mask of documents, from the least and the largest id in every block.

    Two blocks whose ranges of ids overlap may share a document; two blocks of one id are of one document. Ids may come
    in any order: where documents recur, more blocks are visited, and the mask decides for each key.

    Args:
        documents: (B, T) or (1, T) integers.
    """
    ids, start, is_complete = _in_blocks(documents)
    least, largest = ids.amin(-1), ids.amax(-1)
    one_id = (least == largest) & is_complete

    def visible(query: _Axis, key: _Axis) -> tuple[Tensor, Tensor]:
        seen = (query(least) <= key(largest)) & (key(least) <= query(largest))
        return seen, query(one_id) & key(one_id) & (query(least) == key(least))

    return _block_mask_of(visible, start, documents.shape[-1], is_causal, window, mask)


def padded_block_mask(
    keys: Tensor,
    is_causal: bool,
    window: int | None,
    mask: Callable[..., Tensor],
    hides_queries: bool = False,
) -> BlockMask:
    """Returns the block mask of padding: blocks of keys that are all padding are not visited.

    Args:
        keys: (B, T) or (1, T) booleans.
        hides_queries: neither are blocks of queries that are all padding.
    """
    flags, start, is_complete = _in_blocks(keys)
    some, every = flags.any(-1), flags.all(-1) & is_complete
    some_queries, whole_queries = (some, every) if hides_queries else (torch.ones_like(some), is_complete)

    def visible(query: _Axis, key: _Axis) -> tuple[Tensor, Tensor]:
        return query(some_queries) & key(some), query(whole_queries) & key(every)

    return _block_mask_of(visible, start, keys.shape[-1], is_causal, window, mask)


def _in_blocks(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (B, T) values as (B, blocks, BLOCK_SIZE), and (B, blocks): their starts, and whether they are complete.

    The last block repeats the last token.
    """
    length, device = tokens.shape[-1], tokens.device
    at = torch.arange(0, length, BLOCK_SIZE, dtype=torch.int64, device=device)
    token = at[:, None] + torch.arange(BLOCK_SIZE, dtype=torch.int64, device=device)
    values = tokens[:, torch.minimum(token, length - torch.ones_like(token))]
    # Of the same rank as the values: torch compares strides of tensors that are broadcast.
    start = at + torch.zeros_like(values[..., 0], dtype=torch.int64)
    return values, start, start + BLOCK_SIZE <= length


_Axis = Callable[[Tensor], Tensor]


# Many parameters because a block mask consists of them.
def _block_mask_of(
    visible: Callable[[_Axis, _Axis], tuple[Tensor, Tensor]],
    start: Tensor,
    length: int,
    is_causal: bool,
    window: int | None,
    mask: Callable[..., Tensor],
) -> BlockMask:
    """Returns the block mask of pairs of blocks.

    Args:
        visible: returns the pairs of which some keys are visible, and those of which all are, but for causality and the
            window. Its arguments give a value of a block, (B, blocks), the dimension of queries or of keys.
        start: (B, blocks) the first token of each block.
        length: the number of tokens.
    """

    def blocks(query: _Axis, key: _Axis) -> tuple[Tensor, Tensor]:
        """Returns the partial and the whole pairs of blocks; `query` and `key` give the two their dimensions."""
        seen, whole = visible(query, key)
        if is_causal:
            back = query(start) - key(start)
            seen, whole = seen & (back >= 0), whole & (back > 0)
            if reach is not None and complete is not None:
                seen, whole = seen & (back <= reach * BLOCK_SIZE), whole & (back <= complete * BLOCK_SIZE)
        return seen & ~whole, whole

    reach, complete = _blocks_back(window)
    # Transposed tensors would ask whether there is more than one block.
    partial, whole = blocks(_as_row, _as_column)
    partial_queries, whole_queries = blocks(_as_column, _as_row)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Returns for each row the number of blocks, and their indices; the others follow and are valid indices.

        The last operation writes the dimension of the heads, of size 1. Inductor gives such a dimension a stride of 0
        if a view adds it, and its kernels compute the place of a row of the batch from that stride.
        """
        order = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[:, None], order[:, None].to(torch.int32)

    return BlockMask(
        (length, length),
        *listed(partial),
        *listed(whole),
        *listed(partial_queries),
        *listed(whole_queries),
        BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE),
        mask_mod=mask,
    )


def _as_row(values: Tensor) -> Tensor:
    return values[..., :, None]


def _as_column(values: Tensor) -> Tensor:
    return values[..., None, :]
