"""Cross-entropy of materialized logits: the head is in another graph, or its logits have other users.

Formula  loss = -log softmax(logits)[target], reduced as torch.nn.functional.cross_entropy reduces
Shapes   logits (..., V), target (...) of class indices or as many in one dimension; loss () or like target
Sources  Hugging Face's ForCausalLMLoss (upcasts first), its sequence-to-sequence models (do not)

The op saves the logits in their own dtype and one number per row; no float32 tensor is as large as the logits.
"""

import torch
import torch.nn.functional as F

from liger_compile import functional
from liger_compile.pattern import Match, Pattern
from liger_compile.patterns.profit import bytes_of, few_logits, needs_kernel


def _loss(logits, target, weight, ignore_index, reduction, label_smoothing):
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        target.reshape(-1),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def upcast(
    logits, target, weight: torch.Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
):
    return _loss(logits.float(), target, weight, ignore_index, reduction, label_smoothing)


def as_is(
    logits, target, weight: torch.Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
):
    return _loss(logits, target, weight, ignore_index, reduction, label_smoothing)


def labels_of_rows(target, rows):
    """Return labels flat if their shape is not that of the rows (..., V).

    A search finds a loss through views of its labels, so that a match may have them in another shape: those of
    `h.argmax(-1)` as (B, T, 1), the reduction without the view that drops its last dimension.
    """
    pairs = zip(target.shape, rows.shape[:-1], strict=False)
    is_other = target.dim() != rows.dim() - 1 or any(
        isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs
    )
    return target.reshape(-1) if is_other else target


def replace_upcast(logits, target, weight, ignore_index, reduction, label_smoothing):
    return functional.cross_entropy(
        logits,
        labels_of_rows(target, logits),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def replace_as_is(logits, target, weight, ignore_index, reduction, label_smoothing):
    loss = replace_upcast(logits, target, weight, ignore_index, reduction, label_smoothing)
    return loss.to(logits.dtype)


def profit(match: Match) -> str | None:
    """Decide by speed: the op saves the logits, as Inductor does.

    H100, torch 2.11.0, triton 3.6.0, bf16, 2026-11-25, forward and backward: 8192 x 128256 takes 2.23 ms with the
    kernel and 2.88 ms compiled by Inductor; 16384 x 32000 takes 1.15 ms and 1.51 ms (ops_nvidia_h100_80gb_hbm3.csv).
    """
    if match.result.device.type == "cpu":
        # 2 cores, torch 2.13.0, 2026-11-22: a step of a 2-layer Llama (1024 tokens, hidden 256, vocabulary 10240, fp32)
        # takes 1.07 of Inductor's time with the op and 1.01 without, and saves the same: the logits (profit_cpu.csv).
        return "on a CPU Inductor's own loss is faster, and keeps no more"
    return needs_kernel(match) or few_logits(match.result.device, _bytes_before_upcast(match["logits"]))


def _bytes_before_upcast(logits: torch.Tensor) -> int | None:
    """Return the bytes of logits in half precision: the op takes as long to launch for upcast logits."""
    return bytes_of(logits, logits.dtype.itemsize // 2)


_EXAMPLES = {
    "logits": torch.empty(6, 11),
    "target": torch.empty(6, dtype=torch.int64),
    "weight": torch.empty(11),
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.1,
}

PATTERNS = tuple(
    Pattern(
        name=f"cross_entropy.{search.__name__}",
        search=search,
        replace=replace,
        profit=profit,
        saves=lambda match: 0,
        examples=_EXAMPLES,
        is_loss=True,
    )
    for search, replace in ((upcast, replace_upcast), (as_is, replace_as_is))
)
