"""Attention with a mask that the kernels can express as a flag: a causal mask, or a mask that hides nothing.

Formula  y = softmax(q k^T * scale + mask) v, dropout on the softmax
Shapes   q (B, H, T, D), k (B, G, S, D), v (B, G, S, E) with G dividing H; y (B, H, T, E). Causal: T is S
Sources  Hugging Face's masking_utils (T x T booleans of positions) and repeat_kv; torch.ones(T, T).tril() in other code

With a mask in memory, scaled_dot_product_attention cannot use its fastest kernels, and reads B x T x T flags. In a
graph edited by hand, before this pattern existed, on one H100 (torch 2.11.0, 2026-11-22, Llama-3.2-1B, 4 x 2048 tokens,
bf16, forward and backward): 33.9 ms of GPU time per step, against 14.5 ms with the flag and without repeated keys and
values. With this code, one H100, torch 2.11.0, 2026-11-25, a step of 4 layers: 4 x 2048 tokens 46.2 ms against 51.7 ms
without the pattern; Gemma-2-2B's capped scores and windows, 8 layers, 2 x 4096 tokens, by flex_attention: 122.0 ms
against 143.6 ms (bench/results/profit_nvidia_h100.csv).

Attention that is written out in full has the same term. On a CPU (one core of two, torch 2.13.0, 2026-11-25, forward
and backward compiled by Inductor, written out and replaced, B x H x G x T x D):

    4 x 4 x 4 x 32 x 16       float32   0.66    0.76 ms      bfloat16      1.8     0.9 ms
    2 x 8 x 2 x 128 x 32                2.67    2.64                      29.9    10.6
    2 x 8 x 8 x 128 x 64                4.50    4.61                      42.5    34.5
    1 x 8 x 8 x 512 x 64               32.3    32.5                        599     266
    1 x 8 x 2 x 1024 x 64               167    92.7                       1787     589

and forward alone takes 0.31 and 0.33 ms, then 0.72 of the time and less. The T x T weights are not saved for backward.

scaled_dot_product_attention does not support windows and capped scores. They become flex_attention: ops/flex.py. Not
measured on a GPU yet: `python -m bench.ops window_attention capped_attention capped_window_attention` measures it.

Padding, "causal and key not padded", becomes flex_attention with a block mask made from the flags of keys. Rows that
see no key are zero, as in scaled_dot_product_attention with a boolean mask; with another fill the mask is kept.

Nor does it support documents: several texts in one row, of which a token sees its own only, as in packed batches. They
become flex_attention or variable-length attention (ops/varlen.py): `takes_varlen`. `python -m bench.packed` measures
both; only flex_attention in whole steps was measured yet: `_packed_rows_pay`.

terms/indices.py decides which masks are causal; terms/attention.py finds repeats and written-out attention.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch.fx import Node

from liger_compile.ops import flex, varlen
from liger_compile.pattern import Match, Pattern

# Numbers of tokens from which flex_attention is at least as fast as the code that Inductor generates, forward and
# backward (one H100, torch 2.11.0, triton 3.6.0, bfloat16, 2026-11-26: bench/results/ops_nvidia_h100_80gb_hbm3.csv).
# With windows of 1024, or half of the tokens: 0.72 of Inductor's time for 32 x 256, 0.62 for 16 x 512, 0.53 for 8 x
# 1024, 0.14 for 1 x 8192. Capped: 1.09 for 32 x 256, 1.23 for 8 x 1024, 0.95 for 4 x 2048, 0.90 for 1 x 8192; in a
# window 0.46 for 2 x 4096. Windows in float32 are not measured.
FEWEST = {  # keys: whether scores are capped, and whether they have a half precision
    (False, True): 256,
    (False, False): 1024,
    (True, True): 2048,
    (True, False): 2048,
}

DOCUMENTS_FROM = 1024  # tokens of a row

# Scales for which one kernel gives the same result as the separate steps. With 6e4, in float32, scores of 1e5 are
# rounded by 0.01, which is also the error of a weight, and gradients that are 0 in separate steps are not (on a CPU,
# torch 2.13).
LEAST_SCALE, MOST_SCALE = 1e-6, 1e3


def _attend(q, k, v, mask, dropout_p, scale):
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale, enable_gqa=True)


def _causal_mask(q):
    length = q.shape[-2]
    return torch.ones(length, length, dtype=torch.bool, device=q.device).tril()


def causal(q, k, v, dropout_p: float, scale: float):
    return _attend(q, k, v, _causal_mask(q), dropout_p, scale)


def unmasked(q, k, v, dropout_p: float, scale: float):
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    return _attend(q, k, v, mask, dropout_p, scale)


def _takes_groups(q, v) -> bool:
    """Return whether the kernel accepts fewer heads of keys than of queries; memory-efficient attention does not.

    On a CPU (one core of two, torch 2.13.0, 2026-11-22, H 8, G 2, D 32, forward and backward compiled by Inductor) 2 x
    128 tokens take 1.94 ms with groups, 2.05 ms with repeats, and 2.13 ms with repeats and the mask in float32; 5.10,
    5.17 and 5.18 ms in bfloat16.
    """
    if q.device.type != "cuda":
        return q.device.type == "cpu"
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    return is_half and q.shape[-1] == v.shape[-1] <= 256 and torch.backends.cuda.flash_sdp_enabled()


def _replacement(is_causal: bool):
    def replace(q, k, v, dropout_p, scale):
        repeats = q.shape[1] // k.shape[1]
        is_grouped = repeats > 1 and _takes_groups(q, v)
        if repeats > 1 and not is_grouped:
            k, v = (x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
        )

    return replace


def _is_written_out(match: Match) -> bool:
    return not any("scaled_dot_product_attention" in str(node.target) for node in match.nodes)


def _differs(match: Match) -> str | None:
    """Return how scaled_dot_product_attention would differ from the matched code, or None."""
    scale = match["scale"]
    if scale is not None and scale <= 0:  # kernels add the flag's -inf before they scale
        return (
            f"its scale is {scale}, which with the causal flag instead of the mask gives NaN or hidden "
            "values; negate q instead"
        )
    if (unusual := _unusual_scale(match)) is not None:
        return unusual
    p = match["dropout_p"]
    if not _is_written_out(match) or p == 0:
        return None
    how_often = f"with probability {p}" if p == p else "with a probability that is known at run time only"
    return f"it drops weights {how_often}; scaled_dot_product_attention would draw others from the same seed"


def _unusual_scale(match: Match) -> str | None:
    """Reject unusual scales: kernels add -inf before they scale, and backward recomputes weights from rounded sums."""
    scale = match["scale"]
    if not isinstance(scale, float) or LEAST_SCALE <= abs(scale) <= MOST_SCALE:
        return None
    return (
        f"its scale is {scale:g}, expected one from {LEAST_SCALE:g} to {MOST_SCALE:g}: beyond that, kernels round "
        "differently from this code"
    )


def _costs_more(match: Match) -> str | None:
    if not _is_written_out(match):
        return None
    q = match["q"]
    if (
        q.device.type == "cpu"
        and q.dtype is torch.float32
        and isinstance(q.shape[-2], int)
        and q.shape[-2] < 128
    ):
        return "on a CPU, in float32, below 128 tokens, it is no slower written out (0.66 against 0.76 ms for 32)"
    return _weights_used_elsewhere(match)


def _weights_used_elsewhere(match: Match) -> str | None:
    """Reject scores or weights with other users: they would still be computed."""
    if not _is_written_out(match):
        return None
    of_q, of_k = _reached(match, match.source("q")), _reached(match, match.source("k"))
    for node in match.escaping():
        if node in of_q and node in of_k:
            return f"its scores or weights are used elsewhere as well: {node.name}"
    return None


def _reached(match: Match, source: Node) -> set[Node]:
    """Return the nodes of a match that depend on `source`."""
    found = {source}
    for node in match.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found - {source}


def window(q, k, v, scale: float, window: int):
    return _attend(q, k, v, _window_mask(q, window), 0.0, scale)


def capped_causal(q, k, v, scale: float, softcap: float):
    return _attend_capped(q, k, v, _causal_mask(q), scale, softcap)


def capped_window(q, k, v, scale: float, softcap: float, window: int):
    return _attend_capped(q, k, v, _window_mask(q, window), scale, softcap)


def _attend_capped(q, k, v, mask, scale, softcap):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def _window_mask(q, window):
    at = torch.arange(q.shape[-2], device=q.device)
    return _causal_mask(q) & (at[:, None] < at + window)


def documents(q, k, v, scale: float, documents):
    return _attend(q, k, v, _causal_mask(q) & _same_document(documents), 0.0, scale)


def documents_window(q, k, v, scale: float, documents, window: int):
    return _attend(q, k, v, _window_mask(q, window) & _same_document(documents), 0.0, scale)


def documents_bidirectional(q, k, v, scale: float, documents):
    return _attend(q, k, v, _same_document(documents), 0.0, scale)


def capped_documents(q, k, v, scale: float, documents, softcap: float):
    return _attend_capped(q, k, v, _causal_mask(q) & _same_document(documents), scale, softcap)


def capped_documents_window(q, k, v, scale: float, documents, softcap: float, window: int):
    return _attend_capped(q, k, v, _window_mask(q, window) & _same_document(documents), scale, softcap)


def padded(q, k, v, scale: float, keys):
    return _attend(q, k, v, _causal_mask(q) & keys[:, None, None, :], 0.0, scale)


def padded_window(q, k, v, scale: float, keys, window: int):
    return _attend(q, k, v, _window_mask(q, window) & keys[:, None, None, :], 0.0, scale)


def padded_bidirectional(q, k, v, scale: float, keys):
    return _attend(q, k, v, _all(q) & keys[:, None, None, :], 0.0, scale)


def capped_padded(q, k, v, scale: float, keys, softcap: float):
    return _attend_capped(q, k, v, _causal_mask(q) & keys[:, None, None, :], scale, softcap)


def capped_padded_window(q, k, v, scale: float, keys, softcap: float, window: int):
    return _attend_capped(q, k, v, _window_mask(q, window) & keys[:, None, None, :], scale, softcap)


def _all(q):
    return torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device)


def _same_document(documents):
    """Return which query and key of a row have the same id; documents (B, T) or (1, T)."""
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def _flex_documents(is_causal: bool):
    def replace(q, k, v, scale, documents, softcap=None, window=None, inner=None):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if takes_varlen(q, v, softcap):
            starts, facts = varlen.document_starts(documents, q.shape[0])
            numbers = (scale, is_causal, window or varlen.NO_WINDOW)
            return varlen.varlen_attention(q, k, v, documents, starts, facts, *numbers)[0]
        _check_inner(q, inner)
        return flex.document_attention(
            q, k, v, documents, scale=scale, is_causal=is_causal, window=window, softcap=softcap
        )

    return replace


def _flex_padded(is_causal: bool):
    # Many parameters because they are those of a kernel.
    def replace(q, k, v, scale, keys, softcap=None, window=None, inner=None, padding_unread=False):
        _check_inner(q, inner)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return flex.padded_attention(
            q,
            k,
            v,
            keys,
            scale=scale,
            is_causal=is_causal,
            window=window,
            softcap=softcap,
            hides_queries=padding_unread,
        )

    return replace


# The fewest tokens from which variable-length attention was measured to be faster than flex_attention, by compute
# capability and head size: `python -m bench.packed` measures both. Nothing is measured yet, so that flex_attention is
# used everywhere.
VARLEN_FROM: dict[tuple[tuple[int, int], int], int] = {}

_forced: bool | None = None


@contextlib.contextmanager
def forcing_varlen(is_forced: bool):
    """Take variable-length attention for documents wherever it can compute them, or nowhere; for benches and tests."""
    global _forced
    before, _forced = _forced, is_forced
    try:
        yield
    finally:
        _forced = before


def takes_varlen(q, v, softcap) -> bool:
    """Return whether attention within documents is computed by variable-length attention, and not by flex_attention."""
    if softcap is not None or q.shape[-1] != v.shape[-1]:
        return False
    if _forced is not None:
        return _forced
    if not varlen.has_varlen_kernel(q, v):
        return False
    fewest = VARLEN_FROM.get((torch.cuda.get_device_capability(q.device), q.shape[-1]))
    return fewest is not None and isinstance(q.shape[-2], int) and q.shape[-2] >= fewest


def _check_inner(q, inner):
    if inner == "inductor" and q.device.type != "cuda":
        raise ValueError("Inductor has a backward of flex_attention on NVIDIA GPUs only")


def _flex(q, k, v, scale, softcap=None, window=None, inner=None):
    _check_inner(q, inner)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return flex.windowed_attention(q, k, v, scale=scale, window=window, softcap=softcap)


def _fits_flex(match: Match) -> str | None:
    q, v = match["q"], match["v"]
    if any(isinstance(size, int) and not size for size in q.shape):  # torch specializes graphs for sizes of 0
        return "flex_attention takes no sequence without tokens"
    if isinstance(match["scale"], torch.SymFloat):
        return "its scale is known at run time only, as under dynamic=True"
    if (unusual := _unusual_scale(match)) is not None:
        return unusual
    if "window" in match.captures and match["window"] < 1:
        return f"its window of {match['window']} hides everything"
    if q.device.type == "cuda" and min(q.shape[-1], v.shape[-1]) < flex.SMALLEST_HEAD:
        return f"flex_attention takes no heads with fewer than {flex.SMALLEST_HEAD} channels"
    if q.device.type == "cuda" and q.dtype is torch.float64:
        return "flex_attention has no kernel for float64"
    return None


def _flex_pays(match: Match) -> str | None:
    q = match["q"]
    if q.device.type != "cuda":
        return "flex_attention, which supports windows, documents and capped scores, has a backward on NVIDIA GPUs only"
    fewest = FEWEST["softcap" in match.captures, q.dtype in flex.HALF]
    if isinstance(q.shape[-2], int) and q.shape[-2] < fewest:
        return f"for fewer than {fewest} tokens the blocks of flex_attention do not pay"
    return _weights_used_elsewhere(match)


def _packed_rows_pay(match: Match) -> str | None:
    """Replace what was measured: half precision, and rows of some length.

    H200, torch 2.11.0, bf16, 2026-11-30: a step of Llama with 4 layers and 2 x 2048 tokens, four documents in a row,
    takes 0.82 of the time of stock torch.compile, and 0.92 with the mask in memory (families_nvidia_h200.csv).
    """
    q = match["q"]
    if q.dtype not in flex.HALF:
        return _not_measured(match)
    if isinstance(q.shape[-2], int) and q.shape[-2] < DOCUMENTS_FROM:
        return f"for fewer than {DOCUMENTS_FROM} tokens attention within documents was not measured"
    return _flex_pays(match)


def _not_measured(match: Match) -> str | None:
    what = "of this kind within documents" if "documents" in match.captures else "that reads padding"
    reason = f"attention {what} was not measured on a GPU yet; liger.policy='always' replaces it"
    return _flex_pays(match) or reason


_EXAMPLES = {
    "q": torch.empty(2, 4, 6, 8),
    "k": torch.empty(2, 2, 6, 8),
    "v": torch.empty(2, 2, 6, 8),
    "scale": 0.25,
}

PATTERNS = (
    *(
        Pattern(
            name=f"attention.{search.__name__}",
            search=search,
            replace=_replacement(search is causal),
            check=_differs,
            profit=_costs_more,
            saves_result=True,
            examples={**_EXAMPLES, "dropout_p": 0.0, **more},
        )
        for search, more in (
            (causal, {}),
            (unmasked, {"k": torch.empty(2, 2, 7, 8), "v": torch.empty(2, 2, 7, 8)}),
        )
    ),
    *(
        Pattern(
            name=f"attention.{search.__name__}",
            search=search,
            replace=_flex,
            check=_fits_flex,
            profit=_flex_pays,
            saves_result=True,
            examples={**_EXAMPLES, **more},
        )
        for search, more in (
            (window, {"window": 3}),
            (capped_causal, {"softcap": 5.0}),
            (capped_window, {"softcap": 5.0, "window": 3}),
        )
    ),
    *(
        Pattern(
            name=f"attention.{search.__name__}",
            search=search,
            replace=_flex_documents(search is not documents_bidirectional),
            check=_fits_flex,
            profit=pays,
            saves_result=True,
            examples={**_EXAMPLES, "documents": torch.zeros(2, 6, dtype=torch.int64), **more},
        )
        for search, pays, more in (
            (documents, _packed_rows_pay, {}),
            (documents_window, _packed_rows_pay, {"window": 3}),
            (documents_bidirectional, _not_measured, {}),
            (capped_documents, _not_measured, {"softcap": 5.0}),
            (capped_documents_window, _not_measured, {"softcap": 5.0, "window": 3}),
        )
    ),
    *(
        Pattern(
            name=f"attention.{search.__name__}",
            search=search,
            replace=_flex_padded(search is not padded_bidirectional),
            check=_fits_flex,
            profit=_not_measured,
            saves_result=True,
            examples={**_EXAMPLES, "keys": torch.tensor([[True] * 6, [True] * 4 + [False] * 2]), **more},
        )
        for search, more in (
            (padded, {}),
            (padded_window, {"window": 3}),
            (padded_bidirectional, {}),
            (capped_padded, {"softcap": 5.0}),
            (capped_padded_window, {"softcap": 5.0, "window": 3}),
        )
    ),
)
