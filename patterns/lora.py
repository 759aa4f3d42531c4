"""A low-rank adapter (LoRA) beside a linear layer, in the form of PEFT.

Formula  y = base(x) + scaling * (dropout(x) @ A.T) @ B.T
Shapes   base (..., O): the result of the layer, whatever computes it; x (..., H); A (R, H); B (O, R); R is small
Sources  Hu et al. 2021, "LoRA"; PEFT's lora.Linear. The adapter may be float32 beside a bfloat16 layer: PEFT then
         casts x to float32, adds in float32, and rounds the sum to bfloat16

Two ops replace it: `adapter_down` reads x as it is, and `adapter_up` adds to the result of the layer. steps/adapters.py
joins the `adapter_down`s of one x, such as those of q, k and v, to one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

from liger_compile import functional  # noqa: F401 - registers what torch.ops.liger_compile has
from liger_compile.pattern import Match, Pattern

LARGEST_SHARE = 1 / 8  # of the rank in the narrower side of the layer

_ours = torch.ops.liger_compile


def scaled(base, x, a, b, scaling: float):
    return (base + F.linear(F.linear(x.to(a.dtype), a), b) * scaling).to(base.dtype)


def rounded(base, x, a, b, scaling: float):
    """Beside a layer of 4 bits, PEFT rounds the product before the sum; the op rounds the sum alone."""
    return base + (F.linear(F.linear(x.to(a.dtype), a), b) * scaling).to(base.dtype)


def unscaled(base, x, a, b):
    return (base + F.linear(F.linear(x.to(a.dtype), a), b)).to(base.dtype)


# Many parameters because a search function has one for each capture.
def two(base, x, a, b, scaling: float, z, c, d, scaling_2: float):
    """Two active adapters; z is x, or x with other elements dropped."""
    first = F.linear(F.linear(x.to(a.dtype), a), b) * scaling
    return (base + first + F.linear(F.linear(z.to(c.dtype), c), d) * scaling_2).to(base.dtype)


def replace(base, x, a, b, scaling=1.0):
    return _ours.adapter_up.default(base, _ours.adapter_down.default(x, a), b, float(scaling))


# Many parameters because a replacement gets each capture.
def replace_two(base, x, a, b, scaling, z, c, d, scaling_2):
    first, second = _ours.adapter_down.default(x, a), _ours.adapter_down.default(z, c)
    narrow = torch.cat((first * scaling, second * scaling_2), -1)
    return _ours.adapter_up.default(base, narrow, torch.cat((b, d), 1), 1.0)


# Estimates for one layer, in bytes a row: a channel of x, and a channel of the result, are written and read in float32
# in forward and in backward.
TRAFFIC_OF_X, TRAFFIC_OF_RESULT = 10, 16
# What the additional launches are worth: about seven small kernels, 20 us, at 3.5 TB/s, times two to be safe.
LEAST = 128 * 2**20


def profit(match: Match) -> str | None:
    """Replace what was measured: float32 adapters, and enough rows that memory traffic outweighs small kernels.

    H200, torch 2.11.0, peft 0.21, bf16 layers, rank 16 beside all projections, 2026-11-30: a step takes 0.70 of the
    time of stock torch.compile, and 0.85 with the adapters left to Inductor (families_nvidia_h200.csv).
    """
    base, a, b = match["base"], match["a"], match["b"]
    if base.device.type == "cpu":
        return "on a CPU, Inductor's matmuls of the adapter are as fast"
    if a.dtype == base.dtype:
        return "adapters in the dtype of the layer are not measured; liger.policy='always' replaces them"
    traffic = base[..., 0].numel() * (TRAFFIC_OF_X * a.shape[1] + TRAFFIC_OF_RESULT * b.shape[0])
    if not statically_known_true(traffic >= LEAST):
        return "few rows: the small kernels of the op would take longer than the memory traffic that it saves"
    return None


def check(match: Match) -> str | None:
    """Require a layer and an adapter of the same result, and a small rank."""
    base, a, b = match["base"], match["a"], match["b"]
    if base.shape != match.result.shape:
        return f"base is {tuple(base.shape)} and the sum {tuple(match.result.shape)}; expected one shape"
    if a.dtype != b.dtype or a.dtype not in (base.dtype, torch.float32):
        return f"the adapter is {a.dtype} and {b.dtype} beside {base.dtype}; expected one dtype, or float32 adapters"
    if a.shape[0] > LARGEST_SHARE * min(a.shape[1], b.shape[0]):
        return f"rank {a.shape[0]} is not small beside a layer from {a.shape[1]} to {b.shape[0]} channels"
    return None


def check_two(match: Match) -> str | None:
    """Require float32 adapters: their scaling rounds nothing that matters. Else each sum is rounded, one by one."""
    if match["c"].dtype != torch.float32 or match["base"].dtype == torch.float32:
        return "each adapter is added and rounded by itself"
    return check(match)


_EXAMPLES = {
    "base": torch.empty(3, 5, 24),
    "x": torch.empty(3, 5, 16),
    "a": torch.empty(2, 16),
    "b": torch.empty(24, 2),
}
_SECOND = {"z": _EXAMPLES["x"], "c": torch.empty(2, 16), "d": torch.empty(24, 2), "scaling_2": 0.6}
_TWO = {**_EXAMPLES, "scaling": 0.7, **_SECOND}


def _pattern(name: str, search: Callable, examples: Mapping[str, Any], **options: Any) -> Pattern:
    # Any sum with two linear layers resembles these, so there are no near misses.
    fields = {"replace": replace, "check": check, "profit": profit, "has_near_misses": False, **options}
    return Pattern(f"lora.{name}", search, examples=examples, **fields)


PATTERNS = (
    _pattern("scaled", scaled, {**_EXAMPLES, "scaling": 0.7}),
    _pattern("rounded", rounded, {**_EXAMPLES, "scaling": 0.7}),
    _pattern("unscaled", unscaled, _EXAMPLES),
    _pattern("two", two, _TWO, replace=replace_two, check=check_two),
)
