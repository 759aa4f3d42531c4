"""Gated MLP: an activation of one projection times another projection, and the down projection.

Formula  h = act(gate) * up, y = h @ weight.T + bias; act is SiLU (SwiGLU) or GELU (GeGLU), tanh, erf or sigmoid
Shapes   gate and up (..., I), or packed gate_up (..., 2I) with gate first; weight (D, I), bias (D,); y (..., D)
Sources  Shazeer 2020, "GLU Variants Improve Transformer"; Llama's LlamaMLP, Gemma's GemmaMLP, Phi-3's packed MLP;
         GPT-OSS, which clamps gate and up, and multiplies the activation by up + 1

With the down projection, the op saves gate and up for backward and recomputes h; Inductor alone also saves h.
"""

import torch
import torch.nn.functional as F

from liger_compile import functional
from liger_compile.pattern import Annotate, Match, Pattern
from liger_compile.patterns.profit import bytes_of, kept_bytes, recomputed_input


def swiglu(gate, up):
    return F.silu(gate) * up


def geglu(gate, up, approximate: str):
    return F.gelu(gate, approximate=approximate) * up


def swiglu_upcast(gate, up):
    """SwiGLU in float32, rounded once to the dtype of up, as in the gates of gated norms."""
    return (F.silu(gate.float()) * up.float()).to(up.dtype)


def quick_geglu(gate, up, slope: float):
    """GEGLU by the sigmoid approximation. No op computes it; the match is only marked for recompute."""
    return gate * torch.sigmoid(slope * gate) * up


def squared_reglu(gate, up):
    """Gated squared ReLU. No op computes it; the match is only marked for recompute."""
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
    tokens: 48.5 ms and 3.17 GiB marked, 49.7 ms and 3.17 GiB as an op, 48.7 ms and 3.67 GiB by Inductor alone; on
    2026-11-26, marked and unmarked, 45.9 ms and 2.65 GiB, 45.3 ms and 3.14 GiB, and Qwen3-0.6B, 4 layers, 8 x 1024,
    21.5 ms and 1.80 GiB, 22.2 ms and 1.98 GiB (profit_nvidia_h200.csv). On two CPU cores (torch 2.13.0, 2 layers,
    hidden 256, 1024 tokens, bf16) a step with the op takes 1.06 times as long as a marked step.
    """
    return recomputed_input(match, _MARKED)


def marked(match: Match) -> Annotate:
    """Mark the elementwise part alone for recompute, whatever reads it."""
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


PATTERNS = (
    Pattern(
        name="gated_mlp.swiglu",
        search=swiglu_mlp,
        replace=lambda gate, up, weight, bias: functional.swiglu(gate, up, weight, bias),
        check=check,
        profit=profit,
        saves=saved_bytes,
        examples={**_GATE_AND_UP, **_DOWN},
    ),
    Pattern(
        name="gated_mlp.swiglu_packed",
        search=swiglu_mlp_packed,
        replace=lambda gate_up, weight, bias: functional.swiglu(gate_up, None, weight, bias),
        check=check,
        profit=profit,
        saves=saved_bytes,
        examples={**_PACKED, **_DOWN},
    ),
    Pattern(
        name="gated_mlp.geglu",
        search=geglu_mlp,
        replace=lambda gate, up, weight, bias, approximate: functional.geglu(
            gate, up, weight, bias, approximate=approximate
        ),
        check=check,
        profit=profit,
        saves=saved_bytes,
        examples={**_GATE_AND_UP, **_DOWN, **_GELU},
    ),
    Pattern(
        name="gated_mlp.geglu_packed",
        search=geglu_mlp_packed,
        replace=lambda gate_up, weight, bias, approximate: functional.geglu(
            gate_up, None, weight, bias, approximate=approximate
        ),
        check=check,
        profit=profit,
        saves=saved_bytes,
        examples={**_PACKED, **_DOWN, **_GELU},
    ),
    # The elementwise part alone, where h is not read by a linear layer (an expert's grouped matmul, dropout).
    Pattern(
        name="gated_mlp.swiglu_product",
        search=swiglu,
        replace=lambda gate, up: functional.swiglu(gate, up),
        check=check,
        saves=lambda match: 0,
        examples=_GATE_AND_UP,
    ),
    Pattern(
        name="gated_mlp.swiglu_product_upcast",
        search=swiglu_upcast,
        replace=lambda gate, up: functional.swiglu(gate, up),
        check=check,
        saves=lambda match: 0,
        examples=_GATE_AND_UP,
    ),
    Pattern(
        name="gated_mlp.geglu_product",
        search=geglu,
        replace=lambda gate, up, approximate: functional.geglu(gate, up, approximate=approximate),
        check=check,
        saves=lambda match: 0,
        examples={**_GATE_AND_UP, **_GELU},
    ),
    Pattern(
        name="gated_mlp.quick_geglu_product",
        search=quick_geglu,
        replace=None,
        profit=marked,
        saves=saved_bytes,
        examples={**_GATE_AND_UP, "slope": 1.702},
    ),
    Pattern(
        name="gated_mlp.squared_reglu_product",
        search=squared_reglu,
        replace=None,
        check=check,
        profit=marked,
        saves=saved_bytes,
        examples=_GATE_AND_UP,
    ),
)
