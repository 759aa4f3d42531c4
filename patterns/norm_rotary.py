"""RMSNorm of each head of q and of k, then rotary position embedding, in one pass over both.

Formula  q' = rotary(rms_norm(q, q_weight)), and the same for k
Shapes   q and k (..., D), a head's channels last; q_weight and k_weight (D,); cos and sin broadcast to q and k
Sources  Qwen 3 (normalizes tokens before heads, then transposes), Gemma 3 (transposes first, and has Gemma's norm),
         torchtitan (transposes last)

Only halves with full tables, for q and k together; any other form is matched as a norm and a rotation.
"""

from collections.abc import Callable
from itertools import product

import torch

from liger_compile import functional
from liger_compile.ops.dispatch import has_kernel
from liger_compile.pattern import Match, Pattern
from liger_compile.patterns import rms_norm, rotary
from liger_compile.patterns.profit import kept_bytes


def check(match: Match) -> str | None:
    """Require weights with one number per channel, and tables with one number per channel, in pairs."""
    channels = match["q"].shape[-1:]
    for name in ("q_weight", "k_weight"):
        if match[name].shape != channels:
            return f"{name} has the shape {tuple(match[name].shape)}, expected {tuple(channels)}"
    for name in ("cos", "sin"):
        if match[name].shape[-1:] != channels or channels[0] % 2:
            return f"{name} has {match[name].shape[-1]} channels, which is not one angle for each pair of {channels[0]}"
    return rotary.check(match)


def profit(match: Match) -> str | None:
    """Decide between this op and separate replacements of the norms and the rotation.

    The op saves a write and a read of the norms. Without a kernel it saves nothing, because Inductor fuses the
    references as it fuses the original code. A norm with other users must be written to memory anyway.

    H100, torch 2.11.0, triton 3.6.0, bf16, 2026-11-26, forward and backward: 8 x 1024 tokens, 16 + 8 heads of 128:
    0.097 ms with the kernel, 0.226 ms compiled by Inductor; 2 x 4096 tokens, 32 + 8 heads: 0.160 ms and 0.371 ms
    (ops_nvidia_h100_80gb_hbm3.csv). A step of Qwen3-0.6B with 4 layers, 8 x 1024 tokens: 24.1 ms and 1.69 GiB, 23.9
    ms and 1.87 GiB if it is not recomputed in backward, 24.5 ms and 1.88 GiB without it (profit_nvidia_h100.csv,
    2026-11-25); on an H200 21.5 ms and 1.80 GiB, 22.6 ms and 1.99 GiB without it (profit_nvidia_h200.csv).
    """
    captured = [match[name] for name in match.captures]
    if not has_kernel(*(value for value in captured if isinstance(value, torch.Tensor))):
        return "the op has no kernel here, and does not pay without one"
    for node in match.escaping():
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.shape[-1:] == match["q"].shape[-1:]:
            return f"{node.name} is used elsewhere too, so it would be computed twice"
    return None


def saved_bytes(match: Match) -> int | None:
    """Return the bytes of q and k as attention reads them, which attention would save."""
    sizes = [kept_bytes(output) for output in match.outputs]
    return None if None in sizes else sum(sizes)


def _transposed(x):
    """(..., tokens, heads, D) -> (..., heads, tokens, D)."""
    return x.transpose(-3, -2)


def _as_it_is(x):
    return x


def _pattern(norm: Callable, move: Callable) -> Pattern:
    def search(q, k, q_weight, k_weight, cos, sin, eps: float):
        q, k = move(norm(q, q_weight, eps)), move(norm(k, k_weight, eps))
        return rotary.half(q, cos, sin), rotary.half(k, cos, sin)

    def replace(q, k, q_weight, k_weight, cos, sin, eps):
        return functional.norm_rotary(
            move(q), move(k), q_weight, k_weight, cos, sin, eps, **rms_norm.MODES[norm]
        )

    return Pattern(
        name=f"norm_rotary.{norm.__name__}_half_pair{'' if move is _transposed else '_as_it_is'}",
        search=search,
        replace=replace,
        check=check,
        profit=profit,
        saves=saved_bytes,
        is_cheap=True,
        examples={
            "q": torch.empty(2, 3, 5, 16),
            "k": torch.empty(2, 3, 4, 16),
            "q_weight": torch.empty(16),
            "k_weight": torch.empty(16),
            "cos": torch.empty(16),
            "sin": torch.empty(16),
            "eps": 1e-6,
        },
    )


PATTERNS = tuple(_pattern(norm, move) for norm, move in product(rms_norm.MODES, (_transposed, _as_it_is)))
