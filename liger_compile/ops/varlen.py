"""Attention within documents by the kernels for sequences of different lengths.

    q (B, H, T, D), k and v (B, G, T, D), documents (B, T) or (1, T) -> (B, H, T, D)

    starts, facts = document_starts(documents, B)
    out, logsumexp = varlen_attention(q, k, v, documents, starts, facts, scale, is_causal, window)

The kernels need to know where documents begin, and how many there are. `document_starts` reads the ids once in a call,
on the host: layers that share the ids share its results. Its tensors have the size of the most documents that there may
be, so that the number of documents changes no shape. The kernels know ranges of tokens only: if the tokens of a
document are not adjacent, and where there is no kernel, the reference runs, which is also the definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registration import opaque_op, padded

NO_WINDOW = 0
_COUNT, _LONGEST, _IS_ADJACENT = range(3)


@opaque_op
def document_starts(documents: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the starts of documents among all tokens, (B * T + 1), int32; and facts (3,), int64, on the host.

    The facts are the number of documents, the tokens of the longest one, and whether each one is a range of tokens.
    """
    length = documents.shape[-1]
    ids = documents.cpu()
    begins = torch.ones(ids.shape, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    row, _ = begins.nonzero(as_tuple=True)
    distinct = torch.unique(torch.stack((row, ids[begins].long())), dim=1).shape[1]
    is_adjacent = distinct == row.numel()
    first = begins.expand(rows, -1).flatten().nonzero().flatten()
    starts = torch.full((rows * length + 1,), rows * length, dtype=torch.int32)
    starts[: first.numel()] = first
    longest = int(starts.diff().max())
    return starts.to(documents.device), torch.tensor([first.numel(), longest, int(is_adjacent)])


@document_starts.register_fake
def _(documents: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    starts = documents.new_empty(rows * documents.shape[-1] + 1, dtype=torch.int32)
    return starts, torch.empty(3, dtype=torch.int64, device="cpu")


@opaque_op
# Many parameters because they are those of a kernel.
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    starts: Tensor,
    facts: Tensor,
    scale: float,
    is_causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Return the result (B, H, T, D), laid out as (B, T, H, D), and the logsumexp (H, B * T), float32."""
    count, longest, is_adjacent = facts.tolist()
    if not (is_adjacent and has_varlen_kernel(q, v)):
        return _reference(q, k, v, documents, scale, is_causal, window)
    from liger_compile.torch_internals import flash_attention

    starts = starts[: count + 1]
    out, logsumexp = flash_attention.forward(
        _tokens(q), _tokens(k), _tokens(v), starts, longest, scale, is_causal, window or None
    )
    return _heads(out, q), logsumexp


@varlen_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    return _like_tokens(q), q.new_empty(heads, batch * length, dtype=torch.float32)


@opaque_op
# Many parameters because they are those of a kernel.
def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    documents: Tensor,
    starts: Tensor,
    facts: Tensor,
    scale: float,
    is_causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, laid out as (B, T, heads, D)."""
    count, longest, is_adjacent = facts.tolist()
    if not (is_adjacent and has_varlen_kernel(q, v)):
        return _reference_backward(grad, q, k, v, out, logsumexp, documents, scale, is_causal, window)
    from liger_compile.torch_internals import flash_attention

    grad, query, key, value, result = (_tokens(x) for x in (grad, q, k, v, out))
    of_documents = (starts[: count + 1], longest)
    dq, dk, dv = flash_attention.backward(
        grad, query, key, value, result, logsumexp, *of_documents, scale, is_causal, window or None
    )
    return _heads(dq, q), _heads(dk, k), _heads(dv, v)


@varlen_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like_tokens(q), _like_tokens(k), _like_tokens(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents, starts, facts, *ctx.numbers = inputs
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(q, k, v, out, logsumexp, documents, starts, facts)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return padded(ctx, *varlen_attention_backward(grad, *ctx.saved_tensors, *ctx.numbers))


varlen_attention.register_autograd(_backward, setup_context=_setup_context)


def has_varlen_kernel(q: Tensor, v: Tensor) -> bool:
    """Return whether torch has a kernel for q (B, H, T, D) and v (B, G, T, E) in half precision."""
    size = q.shape[-1]
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or torch.version.hip:
        return False
    is_new = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return is_new and size == v.shape[-1] and size % 8 == 0 and size <= 256


def _tokens(x: Tensor) -> Tensor:
    """Return (B, H, T, D) as (B * T, H, D); a view if x is laid out so."""
    tokens = x.transpose(1, 2).flatten(0, 1)
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def _heads(tokens: Tensor, like: Tensor) -> Tensor:
    """Return (B * T, H, D) as (B, H, T, D), a view, with the sizes of `like` except D."""
    batch, _, length, _ = like.shape
    return tokens.unflatten(0, (batch, length)).transpose(1, 2)


def _like_tokens(x: Tensor) -> Tensor:
    batch, heads, length, size = x.shape
    return x.new_empty(batch, length, heads, size).transpose(1, 2)


# The reference


def _scores(
    q: Tensor, k: Tensor, documents: Tensor, scale: float, is_causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """Return the masked scores (B, H, T, T) in float32 or float64, and the repeated keys in the same dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    seen = (documents[:, :, None] == documents[:, None, :])[:, None]
    if is_causal:
        at = torch.arange(q.shape[-2], device=q.device)
        back = at[:, None] - at
        seen = seen & (back >= 0) & (back < window if window else True)
    return (q.to(wide) @ keys.mT * scale).masked_fill(~seen, -torch.inf), keys


def _reference(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, scale: float, is_causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(q, k, documents, scale, is_causal, window)
    logsumexp = scores.logsumexp(-1)  # (B, H, T)
    values = v.to(scores.dtype).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    result = _like_tokens(q).copy_((scores - logsumexp[..., None]).exp() @ values)
    return result, logsumexp.transpose(0, 1).flatten(1).float().contiguous()


# Many parameters because they are those of the op.
def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    documents: Tensor,
    scale: float,
    is_causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    scores, keys = _scores(q, k, documents, scale, is_causal, window)
    wide, groups, repeats = scores.dtype, k.shape[1], q.shape[1] // k.shape[1]
    batch, _, length, _ = q.shape
    sums = logsumexp.to(wide).unflatten(1, (batch, length)).transpose(0, 1)
    weights, grad = (scores - sums[..., None]).exp(), grad.to(wide)
    values = v.to(wide).repeat_interleave(repeats, dim=1)
    of_weights = grad @ values.mT - (grad * out.to(wide)).sum(-1, keepdim=True)
    of_scores = weights * of_weights * scale
    dk, dv = (
        x.unflatten(1, (groups, repeats)).sum(2) for x in (of_scores.mT @ q.to(wide), weights.mT @ grad)
    )
    pairs = ((q, of_scores @ keys), (k, dk), (v, dv))
    dq, dk, dv = (_like_tokens(x).copy_(gradient) for x, gradient in pairs)
    return dq, dk, dv
