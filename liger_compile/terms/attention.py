"""The term of scaled_dot_product_attention: attention(mask, q, k, v), whose mask is what the mask means.

a mask that is proven causal, or to hide nothing      -> causal_mask, no_mask: whatever it was made of
keys and values repeated for the heads of a group     -> as they were before; attention knows groups by itself
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from liger_compile.terms import normalize
from liger_compile.terms.call import Call, const_of
from liger_compile.terms.indices import Meaning, mask_meaning
from liger_compile.terms.term import Space, Term

HEADS = -3


def attention(
    call: Call,
    query: Term,
    key: Term,
    value: Term,
    attn_mask: Term | None = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Term | None:
    """The table's function."""
    space = call.space
    if {len(query.shape), len(key.shape), len(value.shape)} != {4} or not isinstance(is_causal, bool):
        return None
    if key.shape[:2] != value.shape[:2] or key.shape[:1] != query.shape[:1]:
        return None
    if not all(isinstance(each.shape[dim], int) for each in (query, key, value) for dim in (1, 3)):
        return None
    if key.shape[1] != query.shape[1] and not enable_gqa:  # keys are broadcast
        return None
    q, k, v = (normalize.cast(space, each, call.dtype) for each in (query, key, value))  # as autocast does
    plain_k, plain_v = _ungrouped(space, k, HEADS), _ungrouped(space, v, HEADS)
    if plain_k is not None and plain_v is not None and plain_k.shape[1] == plain_v.shape[1]:
        k, v = plain_k, plain_v
    mask = space.none if attn_mask is None else _canonical(space, attn_mask, query.shape[2], key.shape[2])
    consts = (is_causal, const_of(dropout_p), const_of(scale))
    return normalize.apply(space, "attention", (mask, q, k, v), consts, call.dtype, call.shape)


def _canonical(space: Space, mask: Term, queries: Any, keys: Any) -> Term:
    """One term for all masks of one meaning; the sizes are those of the queries and keys beside it."""
    kind = mask_meaning(space, mask, queries, keys).kind
    names = {"causal": "causal_mask", "all": "no_mask"}
    return space.intern(names[kind], (), (), torch.bool, ()) if kind in names else mask


def _ungrouped(space: Space, term: Term, dim: int) -> Term | None:
    """x, if term is x with each slice along `dim` repeated, as repeat_interleave does; None if it is not."""
    if term.op == "cast":
        x = _ungrouped(space, term.args[0], dim)
        return None if x is None else normalize.cast(space, x, term.dtype)
    if term.op == "permute":
        x = _ungrouped(space, term.args[0], term.consts[dim] if -dim <= len(term.consts) else dim)
        return None if x is None else normalize.permute(space, x, *term.consts)
    if term.op == "repeat_interleave" and term.consts[1] == dim:
        return term.args[0]
    if term.op != "view" or term.args[0].op != "expand":
        return None
    (grouped,), (source,) = term.args, term.args[0].args
    before, after = term.shape[:dim], term.shape[dim:][1:]
    groups, repeats = (
        grouped.shape[dim - 1 : dim + 1] if len(grouped.shape) == len(term.shape) + 1 else (0, 0)
    )
    if grouped.shape != (*before, groups, repeats, *after) or source.shape != (*before, groups, 1, *after):
        return None
    return normalize.view(space, source, *before, groups, *after)


def kept_masks(space: Space, terms: Iterable[Any]) -> list[Meaning]:
    """The meaning of each mask that attention keeps."""
    calls = dict.fromkeys(term for term in terms if isinstance(term, Term) and term.op == "attention")
    kept = [term.args for term in calls if term.args[0].op not in ("none", "causal_mask", "no_mask")]
    return [mask_meaning(space, mask, q.shape[2], k.shape[2]) for mask, q, k, _ in kept]


def notes_on_masks(kept: Iterable[Meaning]) -> Iterator[str]:
    """A sentence for each reason why attention keeps its mask."""
    for reason, times in Counter(meaning.reason for meaning in kept).items():
        yield f"attention keeps its mask {times}x: {reason}"
