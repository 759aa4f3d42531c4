"""RMSNorm: each row of x divided by its root mean square, then multiplied by weight.

Formula  y = weight * x / sqrt(mean(x^2) + eps), the statistics in float32
Shapes   x (..., D) of any floating dtype, weight (D,), y like x
Sources  Llama's LlamaRMSNorm, Gemma's GemmaRMSNorm, T5's T5LayerNorm, torch.nn.RMSNorm. They differ in where they
         round to the dtype of x; so do the first three functions below
"""

import torch
import torch.nn.functional as F

from liger_compile import functional
from liger_compile.ops.dispatch import has_kernel
from liger_compile.pattern import Annotate, Match, Pattern
from liger_compile.patterns.placements import whole_rows
from liger_compile.patterns.profit import kept_bytes
from liger_compile.torch_internals.dtensor import is_dtensor


def llama(x, weight, eps: float):
    """RMSNorm that rounds before the weight."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def upcast_weight(x, weight, eps: float):
    """RMSNorm that rounds after the weight, as torch.nn.functional.rms_norm does."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def gemma(x, weight, eps: float):
    """RMSNorm that rounds after the weight, which is stored minus one."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight.float())).to(x.dtype)


def no_weight(x, eps: float):
    """RMSNorm without a weight."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def by_l2(x, weight, scale: float, eps: float):
    """RMSNorm of lucidrains' transformers. No op computes it, as eps bounds the norm: only marked for recompute."""
    return F.normalize(x, dim=-1, eps=eps) * scale * weight


def by_l2_upcast(x, weight, scale: float, eps: float):
    """The same, rounded after the weight."""
    return (F.normalize(x.float(), dim=-1, eps=eps) * scale * weight.float()).to(x.dtype)


# Arguments of functional.rms_norm for the rounding of each search function.
MODES = {
    llama: {"casting": "llama"},
    upcast_weight: {"casting": "gemma"},
    gemma: {"casting": "gemma", "offset": 1.0},
}


def check(match: Match) -> str | None:
    """Require a weight with one number per channel, and whole rows on each rank."""
    x, weight = match["x"], match["weight"]
    if weight.shape != x.shape[-1:]:
        return f"weight has the shape {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}"
    return whole_rows(match)


def profit(match: Match) -> Annotate | None:
    """Use pre_norm for training on a GPU, and mark the norm for recompute elsewhere.

    The forward of pre_norm is Inductor's code. Its backward has a kernel that includes the ops around the norm.
    Elsewhere Inductor fuses these as well.

    H100, torch 2.11.0, triton 3.6.0, bf16, 2026-11-26, a step of 4 layers with pre_norm, and with its backward left to
    Inductor: Llama-3.2-1B's widths, 4 x 2048 tokens, 43.64 and 43.77 ms; also without the qkv matmul fusion:
    44.31 ms, 1 x 2048 tokens 10.36 and 10.68 ms, Qwen3-0.6B's, 8 x 1024, 20.42 and 20.89 ms, at the same memory
    (profit_nvidia_h100.csv). H200, 2026-11-26, marked, and with the norms left unmarked: Llama, 4 x 2048
    tokens, 45.9 ms and 2.65 GiB, 46.2 ms and 2.90 GiB; Qwen3, 8 x 1024, 21.5 ms and 1.80 GiB, 21.7 ms and 1.92 GiB
    (profit_nvidia_h200.csv). A kernel for forward was no faster, and with the preceding add its result would be saved:
    46.2 ms and 2.68 GiB marked, 45.8 ms and 2.93 GiB by kernels, the lower quartiles of both 45.3 ms (2026-11-25).
    DTensors were not measured.
    """
    if is_dtensor(match.result):
        return marked(match)
    floating = [match[name] for name in match.captures if isinstance(match[name], torch.Tensor)]
    if match.result.requires_grad and match.result.device.type == "cuda" and has_kernel(*floating):
        return None
    return marked(match)


def marked(match: Match) -> Annotate:
    """Mark a norm that Inductor computes for recompute."""
    return Annotate(
        "Inductor fuses the norm with its neighbors; its result is cheap to recompute in backward"
    )


def saved_bytes(match: Match) -> int | None:
    """Return the bytes of the result, which linear layers that read it would save, unless they are frozen."""
    return kept_bytes(match.outputs[0])


def _pattern(search) -> Pattern:
    def replace(x, weight, eps):
        return functional.pre_norm(x, weight, eps, **MODES[search])

    return Pattern(
        name=f"rms_norm.{search.__name__}",
        search=search,
        replace=replace,
        check=check,
        profit=profit,
        saves=saved_bytes,
        is_cheap=True,
        takes_dtensors=True,
        examples={"x": torch.empty(3, 5, 16), "weight": torch.empty(16), "eps": 1e-6},
    )


PATTERNS = (
    *map(_pattern, MODES),
    Pattern(
        name="rms_norm.no_weight",
        search=no_weight,
        replace=lambda x, eps: functional.pre_norm(x, None, eps),
        check=whole_rows,
        profit=profit,
        saves=saved_bytes,
        is_cheap=True,
        takes_dtensors=True,
        examples={"x": torch.empty(3, 5, 16), "eps": 1e-6},
    ),
    *(
        Pattern(
            name=f"rms_norm.{search.__name__}",
            search=search,
            replace=None,
            check=check,
            profit=marked,
            saves=saved_bytes,
            takes_dtensors=True,
            examples={"x": torch.empty(3, 5, 16), "weight": torch.empty(16), "scale": 4.0, "eps": 1e-12},
        )
        for search in (by_l2, by_l2_upcast)
    ),
)
