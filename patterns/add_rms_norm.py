"""Residual add and RMSNorm: the new residual stream and its norm, in one pass over both.

Formula  s = x + residual, y = rms_norm(s, weight)
Shapes   x and residual (..., D), weight (D,); y and s like x
Sources  every pre-norm transformer block: the add that ends one block is normalized by the next
"""

import torch

from liger_compile import functional
from liger_compile.pattern import Match, Pattern
from liger_compile.patterns import rms_norm


def check(match: Match) -> str | None:
    """Reject an add that broadcasts: it is not a residual add."""
    x, residual = match["x"], match["residual"]
    if x.shape != residual.shape:
        return f"x and residual have the shapes {tuple(x.shape)} and {tuple(residual.shape)}, which broadcast"
    if match["weight"].shape != x.shape[-1:]:
        return f"weight has the shape {tuple(match['weight'].shape)}, expected {tuple(x.shape[-1:])}"
    return None


def profit(match: Match) -> str:
    """Reject: the norm alone is marked for recompute (measured in rms_norm.py), and the next layer needs the sum."""
    return "Inductor fuses the add with the norm, which is marked alone"


def _pattern(norm) -> Pattern:
    def search(x, residual, weight, eps: float):
        s = x + residual
        return norm(s, weight, eps), s

    def replace(x, residual, weight, eps):
        return functional.add_rms_norm(x, residual, weight, eps, **rms_norm.MODES[norm])

    return Pattern(
        name=f"add_rms_norm.{norm.__name__}",
        search=search,
        replace=replace,
        check=check,
        profit=profit,
        saves=lambda match: 0,
        examples={
            "x": torch.empty(3, 5, 16),
            "residual": torch.empty(3, 5, 16),
            "weight": torch.empty(16),
            "eps": 1e-6,
        },
    )


PATTERNS = tuple(map(_pattern, rms_norm.MODES))
