"""Linear + cross-entropy: the language-model head and its loss, without the logits of the whole batch.

Formula  z = softcap * tanh(scale * (x @ weight.T + bias) / softcap), loss = cross_entropy(z, target)
Shapes   x (..., H), weight (V, H), bias (V,), target (...) of class indices; loss () or like target
Sources  Hugging Face's *ForCausalLM (upcasts the logits), Cohere and Granite (scale), Gemma 2 (softcap),
         nanoGPT and T5 (no upcast)

The op computes the gradients chunk by chunk in forward. The logits are the largest tensor in training, and never exist
as a whole. normalize.py removes slices and views between head and loss.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from liger_compile import functional
from liger_compile.pattern import Match, Pattern
from liger_compile.patterns.cross_entropy import labels_of_rows
from liger_compile.patterns.profit import few_logits, needs_kernel
from liger_compile.torch_internals import dtensor


def _as_computed(logits):
    return logits


# Where the code upcasts: never, after the head, or before the loss.
_ROUNDINGS = {
    "": (_as_computed, _as_computed),
    "_upcast_logits": (torch.Tensor.float, _as_computed),
    "_upcast_loss": (_as_computed, torch.Tensor.float),
}


def check(match: Match) -> str | None:
    """Reject a DTensor as the loss where the ranks do not have it, or where its gradients have other placements.

    functional.linear_cross_entropy rejects the placements of the inputs that it does not take.
    """
    if not dtensor.is_dtensor(match.result):
        return None
    if not dtensor.is_replicated(match.result):
        return "its loss is divided over the ranks"
    if not dtensor.in_loss_parallel():
        return "outside of loss_parallel() each rank computes the gradient of the whole weight, and keeps it"
    return None


def profit(match: Match) -> str | None:
    """Reject matches whose logits have other users: the fused op would compute the head a second time.

    H100, torch 2.11.0, triton 3.6.0, bf16, 2026-11-25, forward and backward of 8192 tokens: hidden 4096, vocabulary
    128256 takes 35.9 ms and 501 MiB beside the gradients, 38.5 ms and 2004 MiB compiled by Inductor; hidden 1024,
    vocabulary 151936 11.9 ms and 594 MiB, 12.8 ms and 2374 MiB (ops_nvidia_h100_80gb_hbm3.csv). H200, 2026-11-26, a
    step of 4 layers, output returned whole, with all patterns, without this one, and with this one alone: Llama-3.2-1B,
    4 x 2048 tokens, 45.9 ms and 2.65 GiB, 47.3 ms and 8.00 GiB, 50.4 ms and 3.61 GiB, of Inductor's 52.4 ms and 8.63
    GiB; Qwen3-0.6B, 8 x 1024, 21.5 and 1.80, 24.0 and 8.05, 24.4 and 2.44, of 26.2 and 8.67 (profit_nvidia_h200.csv).
    """
    vocab = match["weight"].shape[0]
    for node in match.escaping():
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.shape[-1:] == (vocab,):
            users = [user for user in node.users if user not in set(match.nodes)]
            returned = any(user.op == "output" for user in users)
            by = "the graph returns them" if returned else f"{users[0].name} reads them"
            advice = (
                "compile a function that returns only the loss"
                if returned
                else "compute them in another call"
            )
            return f"the logits are used elsewhere ({by}), so fusion would save nothing; {advice} to fuse head and loss"
    return needs_kernel(match) or few_logits(match.result.device, saved_bytes(match))


def saved_bytes(match: Match) -> int | None:
    """Return the bytes of the logits in the dtype of the head, which backward would need.

    If the ranks divide them, and they are not gathered, a rank needs its part.
    """
    x, vocab = match["x"], match["weight"].shape[0]
    if dtensor.is_dtensor(match.result):
        vocab = -(-vocab // dtensor.group_of(match["weight"])[1])
    bytes_ = x.numel() // x.shape[-1] * vocab * x.dtype.itemsize
    return bytes_ if isinstance(bytes_, int) else None


def _search(rounding: str, has_softcap: bool, is_negative: bool) -> Callable[..., torch.Tensor]:
    after_head, before_loss = _ROUNDINGS[rounding]

    def loss_of(logits, target, class_weight, ignore_index, reduction, label_smoothing):
        loss = F.cross_entropy(
            before_loss(logits).reshape(-1, logits.shape[-1]),
            target.reshape(-1),
            class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return -loss if is_negative else loss  # negative: log-probabilities, gathered from a log_softmax

    def search(
        x,
        weight,
        bias: torch.Tensor | None,
        target,
        class_weight: torch.Tensor | None,
        scale: float,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ):
        logits = after_head(F.linear(x, weight, bias)) * scale
        return loss_of(logits, target, class_weight, ignore_index, reduction, label_smoothing)

    def search_softcap(
        x,
        weight,
        bias: torch.Tensor | None,
        target,
        class_weight: torch.Tensor | None,
        scale: float,
        softcap: float,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ):
        logits = softcap * torch.tanh(after_head(F.linear(x, weight, bias)) * (scale / softcap))
        return loss_of(logits, target, class_weight, ignore_index, reduction, label_smoothing)

    return search_softcap if has_softcap else search


def _pattern(rounding: str, has_softcap: bool, is_negative: bool = False) -> Pattern:
    def replace(
        x,
        weight,
        target,
        scale,
        softcap=None,
        loss_memory=None,
        returns_dtensor=False,
        **loss_arguments,
    ):
        target = labels_of_rows(target, x)
        loss = functional.linear_cross_entropy(
            x, weight, target, logit_scale=scale, softcap=softcap, memory=loss_memory, **loss_arguments
        )
        loss = loss.to(x.dtype) if not rounding else loss
        loss = -loss if is_negative else loss
        return dtensor.replicated(loss, x) if returns_dtensor else loss

    name = "softcap" if has_softcap else "log_probability" if is_negative else "plain"
    examples = {
        "x": torch.empty(6, 8),
        "weight": torch.empty(11, 8),
        "bias": torch.empty(11),
        "target": torch.empty(6, dtype=torch.int64),
        "class_weight": torch.empty(11),
        "scale": 0.5,
        **({"softcap": 30.0} if has_softcap else {}),
        "ignore_index": -100,
        "reduction": "mean",
        "label_smoothing": 0.1,
    }
    return Pattern(
        name=f"linear_cross_entropy.{name}{rounding}",
        search=_search(rounding, has_softcap, is_negative),
        replace=replace,
        check=check,
        profit=profit,
        saves=saved_bytes,
        examples=examples,
        is_loss=True,
        takes_dtensors=True,
    )


PATTERNS = (
    *(_pattern(rounding, has_softcap) for has_softcap in (True, False) for rounding in _ROUNDINGS),
    *(_pattern(rounding, has_softcap=False, is_negative=True) for rounding in _ROUNDINGS),
)
