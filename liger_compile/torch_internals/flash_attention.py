"""The flash-attention kernels of torch for sequences of different lengths in one tensor.

part                                torch           can go
aten._flash_attention_forward       2.11 to 2.13    torch.nn.attention.varlen.varlen_attn has no way to its backward,
                                                    and its form for windows needs none of its own arguments
aten._flash_attention_backward      2.11 to 2.13    as above
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _mask(is_causal: bool, window: int | None) -> tuple[bool, dict[str, Any]]:
    """Returns the arguments of a causal mask; the kernels count keys before the query, without the query itself."""
    if window is None:
        return is_causal, {}
    return False, {"window_size_left": window - 1, "window_size_right": 0}


# Many parameters because they are those of a kernel.
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    is_causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Returns the result (N, H, D) and the logsumexp (H, N) of attention within sequences; q (N, H, D), k (N, G, D).

    Args:
        starts: (sequences + 1,), int32: where each sequence begins, and N.
        longest: the number of tokens of the longest sequence.
        window: query i sees the keys i - window + 1 to i of its sequence; only with `is_causal`.
    """
    flag, sizes = _mask(is_causal, window)
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, flag, False, scale=scale, **sizes
    )
    return out, logsumexp


# Many parameters because they are those of a kernel.
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    is_causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; the arguments are those of `forward` and its results."""
    flag, sizes = _mask(is_causal, window)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    unused = torch.empty(0, device=q.device)
    both = (starts, starts, longest, longest)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, logsumexp, *both, 0.0, flag, seed, unused, scale=scale, **sizes
    )
