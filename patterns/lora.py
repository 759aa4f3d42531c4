"""A low-rank adapter (LoRA) beside a linear layer, in the form of PEFT.

Formula  y = base(x) + scaling * (dropout(x) @ A.T) @ B.T
Shapes   base (..., O): the result of the layer, whatever computes it; x (..., H); A (R, H); B (O, R); R is small
Sources  Hu et al. 2021, "LoRA"; PEFT's lora.Linear. The adapter may be float32 beside a bfloat16 layer: PEFT then
         casts x to float32, adds in float32, and rounds the sum to bfloat16

Two ops replace it: `adapter_down` reads x as it is, and `adapter_up` adds to the result of the layer. steps/adapters.py
joins the `adapter_down`s of one x, such as those of q, k and v, to one.
"""

import torch
import torch.nn.functional as F

from liger_compile import ops  # noqa: F401 - registers what torch.ops.liger_compile has
from liger_compile.pattern import Match, Pattern

LARGEST_SHARE = 1 / 8  # of the rank in the narrower side of the layer

_ours = torch.ops.liger_compile


def scaled(base, x, a, b, scaling: float):
    return (base + F.linear(F.linear(x.to(a.dtype), a), b) * scaling).to(base.dtype)


def unscaled(base, x, a, b):
    return (base + F.linear(F.linear(x.to(a.dtype), a), b)).to(base.dtype)


def replace(base, x, a, b, scaling=1.0):
    return _ours.adapter_up.default(base, _ours.adapter_down.default(x, a), b, float(scaling))


def check(match: Match) -> str | None:
    """Require a layer and an adapter of the same result, and a small rank."""
    base, a, b = match["base"], match["a"], match["b"]
    if base.shape != match.result.shape:
        return f"base is {tuple(base.shape)} and the sum {tuple(match.result.shape)}; expected one shape"
    if a.dtype != b.dtype:
        return f"the matrices of the adapter are {a.dtype} and {b.dtype}; expected one dtype"
    if a.shape[0] > LARGEST_SHARE * min(a.shape[1], b.shape[0]):
        return f"rank {a.shape[0]} is not small beside a layer from {a.shape[1]} to {b.shape[0]} channels"
    return None


_EXAMPLES = {
    "base": torch.empty(3, 5, 24),
    "x": torch.empty(3, 5, 16),
    "a": torch.empty(2, 16),
    "b": torch.empty(24, 2),
}

PATTERNS = (
    Pattern("lora.scaled", scaled, replace, {**_EXAMPLES, "scaling": 0.7}, check=check),
    Pattern("lora.unscaled", unscaled, replace, _EXAMPLES, check=check, has_near_misses=False),
)
