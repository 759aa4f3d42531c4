"""LayerNorm: Inductor's code is as fast as a kernel; the result is cheap to recompute and need not be saved.

Formula  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension
Shapes   x (..., D), weight and bias (D,) or none; y like x
Sources  Ba, Kiros and Hinton 2016; torch.nn.LayerNorm of GPT-2, Phi, StableLM, OLMo, BERT
"""

import torch
import torch.nn.functional as F

from liger_compile.pattern import Pattern
from liger_compile.patterns.placements import whole_rows
from liger_compile.patterns.profit import kept_bytes


def layer_norm(x, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


PATTERNS = (
    Pattern(
        name="layer_norm.torch",
        search=layer_norm,
        replace=None,
        check=whole_rows,
        saves=lambda match: kept_bytes(match.outputs[0]),
        takes_dtensors=True,
        examples={
            "x": torch.empty(3, 5, 16),
            "weight": torch.empty(16),
            "bias": torch.empty(16),
            "eps": 1e-5,
        },
    ),
)
