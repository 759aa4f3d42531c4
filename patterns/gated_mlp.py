"""Gated MLP: an activation of one projection times another projection, and the down projection.

Formula  h = act(gate) * up, y = h @ weight.T + bias; act is SiLU (SwiGLU) or GELU (GeGLU), tanh, erf or sigmoid
Shapes   gate and up (..., I), or packed gate_up (..., 2I) with gate first; weight (D, I), bias (D,); y (..., D)
Sources  Shazeer 2020, "GLU Variants Improve Transformer"; Llama's LlamaMLP, Gemma's GemmaMLP, Phi-3's packed MLP;
         GPT-OSS, which clamps gate and up, and multiplies the activation by up + 1

No op computes it: Inductor's code is as fast as a kernel. The match is marked for recompute, so that backward keeps
gate and up, and not h; Inductor alone also keeps h.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from liger_compile.pattern import Annotate, Match, Pattern
from liger_compile.patterns.profit import bytes_of, is_returned, kept_bytes, recomputed_input


def swiglu(gate, up):
    return F.silu(gate) * up


def geglu(gate, up, approximate: str):
    return F.gelu(gate, approximate=approximate) * up


def swiglu_upcast(gate, up):
    """SwiGLU in float32, rounded once to the dtype of up, as in the gates of gated norms."""
    return (F.silu(gate.float()) * up.float()).to(up.dtype)


def quick_geglu(gate, up, slope: float):
    """GEGLU by the sigmoid approximation."""
    return gate * torch.sigmoid(slope * gate) * up


def squared_reglu(gate, up):
    """Gated squared ReLU."""
    return F.relu(gate).square() * up


def check(match: Match) -> str | None:
    """Reject gate and up of different shapes: a gate that broadcasts is another operation. Their dtypes may differ."""
    if "gate_up" in match.captures:
        size = match["gate_up"].shape[-1]
        return None if size % 2 == 0 else f"gate_up has {size} channels, which is not twice as many"
    gate, up = match["gate"], match["up"]
    if gate.shape != up.shape:
        return f"gate is {tuple(gate.shape)} and up {tuple(up.shape)}; expected one shape"
    return None


_MARKED = "Inductor fuses the gate with its neighbors; h is cheap to recompute in backward"


def profit(match: Match) -> str | Annotate:
    """Mark h for recompute: Inductor recomputes it in backward, in the kernel that needs it.

    H200, torch 2.11.0, triton 3.6.0, bf16, 2026-11-22, a step of a Llama of 4 layers, hidden 2048, inner 8192, 4 x 2048
    tokens: 48.5 ms and 3.17 GiB marked, 49.7 ms and 3.17 GiB by a kernel, 48.7 ms and 3.67 GiB by Inductor alone; on
    2026-11-26, marked and unmarked, 45.9 ms and 2.65 GiB, 45.3 ms and 3.14 GiB, and Qwen3-0.6B, 4 layers, 8 x 1024,
    21.5 ms and 1.80 GiB, 22.2 ms and 1.98 GiB (profit_nvidia_h200.csv). On two CPU cores (torch 2.13.0, 2 layers,
    hidden 256, 1024 tokens, bf16) a step by an op takes 1.06 times as long as a marked step.
    """
    return recomputed_input(match, _MARKED)


def marked(match: Match) -> str | Annotate:
    """Mark the elementwise part alone for recompute, unless h is a result of the graph and would be kept anyway."""
    (h,) = match.outputs
    if is_returned(h) and kept_bytes(h) != 0:
        return f"{h.name} is returned and kept by the caller, so there is nothing to save"
    return Annotate(_MARKED)


def saved_bytes(match: Match) -> int | None:
    """Return the bytes of h, which is as large as up; its linear layer saves it for the gradient of the weight."""
    if "weight" not in match.captures:
        return kept_bytes(match.outputs[0])
    if not match["weight"].requires_grad:
        return 0
    return bytes_of(match["up"]) if "up" in match.captures else bytes_of(match["gate_up"], parts=2)


INNER, OUTER = 8, 6  # widths of h and of y in the examples
_GATE_AND_UP = {"gate": torch.empty(3, 5, INNER), "up": torch.empty(3, 5, INNER)}
_PACKED = {"gate_up": torch.empty(3, 5, 2 * INNER)}
_DOWN = {"weight": torch.empty(OUTER, INNER), "bias": torch.empty(OUTER)}
_GELU = {"approximate": "tanh"}


def swiglu_mlp(gate, up, weight, bias: torch.Tensor | None):
    return F.linear(swiglu(gate, up), weight, bias)


def swiglu_mlp_packed(gate_up, weight, bias: torch.Tensor | None):
    gate, up = gate_up.chunk(2, -1)
    return F.linear(swiglu(gate, up), weight, bias)


def geglu_mlp(gate, up, weight, bias: torch.Tensor | None, approximate: str):
    return F.linear(geglu(gate, up, approximate), weight, bias)


def geglu_mlp_packed(gate_up, weight, bias: torch.Tensor | None, approximate: str):
    gate, up = gate_up.chunk(2, -1)
    return F.linear(geglu(gate, up, approximate), weight, bias)


def _pattern(name: str, search: Callable, profit: Callable, **options) -> Pattern:
    fields = {"check": check, "has_near_misses": True, **options}
    return Pattern(f"gated_mlp.{name}", search, None, profit=profit, saves=saved_bytes, **fields)


PATTERNS = (
    _pattern("swiglu", swiglu_mlp, profit, examples={**_GATE_AND_UP, **_DOWN}),
    _pattern("swiglu_packed", swiglu_mlp_packed, profit, examples={**_PACKED, **_DOWN}),
    _pattern("geglu", geglu_mlp, profit, examples={**_GATE_AND_UP, **_DOWN, **_GELU}),
    _pattern("geglu_packed", geglu_mlp_packed, profit, examples={**_PACKED, **_DOWN, **_GELU}),
    # The elementwise part alone, where h is not read by a linear layer (an expert's grouped matmul, dropout).
    _pattern("swiglu_product", swiglu, marked, examples=_GATE_AND_UP),
    _pattern("swiglu_product_upcast", swiglu_upcast, marked, examples=_GATE_AND_UP),
    _pattern("geglu_product", geglu, marked, examples={**_GATE_AND_UP, **_GELU}),
    # Almost any product resembles these.
    _pattern(
        "quick_geglu_product",
        quick_geglu,
        marked,
        check=None,
        has_near_misses=False,
        examples={**_GATE_AND_UP, "slope": 1.702},
    ),
    _pattern("squared_reglu_product", squared_reglu, marked, has_near_misses=False, examples=_GATE_AND_UP),
)
