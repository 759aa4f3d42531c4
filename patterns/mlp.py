"""MLP without a gate: an activation, which is cheap to recompute and need not be saved, and the down projection.

Formula  h = act(x), y = h @ weight.T + bias; act is GELU (tanh, erf or sigmoid), SiLU or the square of ReLU
Shapes   x (..., I), weight (D, I), bias (D,) or none; y (..., D)
Sources  GPT-2, GPT-J and Phi (GELU written out or not), CLIP (x * sigmoid(1.702 x)), Primer and Nemotron (ReLU squared)

ReLU alone has no pattern: its backward needs only its result, so saving its input instead would save nothing.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from liger_compile.pattern import Annotate, Match, Pattern
from liger_compile.patterns.profit import bytes_of, recomputed_input


def gelu(x, weight, bias: torch.Tensor | None, approximate: str):
    return F.linear(F.gelu(x, approximate=approximate), weight, bias)


def quick_gelu(x, weight, bias: torch.Tensor | None, slope: float):
    return F.linear(x * torch.sigmoid(slope * x), weight, bias)


def silu(x, weight, bias: torch.Tensor | None):
    return F.linear(F.silu(x), weight, bias)


def squared_relu(x, weight, bias: torch.Tensor | None):
    return F.linear(F.relu(x).square(), weight, bias)


def profit(match: Match) -> str | Annotate:
    """Mark the activation for recompute (measured in gated_mlp.py): one pass over x, which backward reads anyway."""
    return recomputed_input(match, "the activation is cheap to recompute in backward")


def saved_bytes(match: Match) -> int | None:
    """Return the bytes of the activation, which is as large as x. A frozen weight does not need it."""
    return bytes_of(match["x"]) if match["weight"].requires_grad else 0


def _pattern(search: Callable, **numbers) -> Pattern:
    return Pattern(
        name=f"mlp.{search.__name__}",
        search=search,
        replace=None,
        profit=profit,
        saves=saved_bytes,
        examples={
            "x": torch.empty(3, 5, 8),
            "weight": torch.empty(6, 8),
            "bias": torch.empty(6),
            **numbers,
        },
    )


PATTERNS = (
    _pattern(gelu, approximate="tanh"),
    _pattern(quick_gelu, slope=1.702),
    _pattern(silu),
    _pattern(squared_relu),
)
