"""The ops that are measured: what eager code, the peers and backend="liger" call them, shapes and least traffic.

A peer is imported where it is called, so that one which is not installed fails alone. `OPS` at the end is the table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_compile import functional

OURS = "liger-compile"
LOW_MEMORY_MIB = 128
WINDOW, SOFTCAP = 1024, 50.0  # of attention; of fewer than 2 * WINDOW tokens, half are the window

Make = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Op:
    """What is measured of an op, and where.

    shapes: of the measurement; `tiny`: of the try on a CPU.
    make: shape -> arguments. Activations and weights require gradients; weights are Parameters.
    variants: function of these arguments, by name. "inductor" is added, from "eager".
    elements: shape -> the elements that a pass must read and write at least.
    gemms: shape -> (N, I, O) of the linear layer in the op, if it has one.
    is_frozen: its weight gets no gradient.
    is_long: takes so many milliseconds that launches do not show; makes its gradients in forward or in backward.
    """

    shapes: tuple[tuple[int, ...], ...]
    tiny: tuple[int, ...]
    make: Make
    variants: Mapping[str, Callable[..., Any]]
    elements: Callable[..., dict[str, int]] | None = None
    gemms: Callable[..., tuple[int, int, int]] | None = None
    is_long: bool = False
    is_frozen: bool = False


def activation(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def weight(*shape: int) -> nn.Parameter:
    """As large as trained ones: about 1 for a norm, and such that a linear layer's results are about 1."""
    noise = torch.randn(shape)
    return nn.Parameter(1 + 0.1 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5)


# Norms


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As in transformers' LlamaRMSNorm."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * x32.to(x.dtype)


def liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, 1e-6)


# Rotary embedding


def make_rotary(batch: int, length: int, heads: int, kv_heads: int, width: int) -> tuple[Any, ...]:
    """q and k as they come from their projections, and tables as transformers makes them."""
    q, k = (torch.randn(batch, length, n, width).transpose(1, 2) for n in (heads, kv_heads))
    frequencies = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)[None]
    return q.requires_grad_(), k.requires_grad_(), angles.cos().to(q.dtype), angles.sin().to(q.dtype)


def make_norm_rotary(batch: int, length: int, heads: int, kv_heads: int, width: int) -> tuple[Any, ...]:
    """q and k not yet transposed, and the weights of their norms over a head."""
    _, _, cos, sin = make_rotary(batch, length, heads, kv_heads, width)
    q, k = (activation(batch, length, n, width) for n in (heads, kv_heads))
    return q, k, weight(width), weight(width), cos, sin


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def eager_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def liger_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_rope

    return liger_rope(q, k, cos, sin)


def our_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return functional.rotary(q, k, cos.unsqueeze(1), sin.unsqueeze(1))


def _norm_rotary(norm: Callable[..., Tensor], rotary: Callable[..., Any]) -> Callable[..., Any]:
    """Qwen 3's order: q and k are normalized over each head, then rotated."""

    def function(
        q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        return rotary(norm(q, q_weight).transpose(1, 2), norm(k, k_weight).transpose(1, 2), cos, sin)

    return function


def our_norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = q.transpose(1, 2), k.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    return functional.norm_rotary(q, k, q_weight, k_weight, cos, sin)


# Attention


def make_attention(batch: int, length: int, heads: int, kv_heads: int, width: int) -> tuple[Any, ...]:
    """q, k and v as they come from their projections."""
    q, k, v = (torch.randn(batch, length, n, width).transpose(1, 2) for n in (heads, kv_heads, kv_heads))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def _window_of(q: Tensor) -> int:
    return min(WINDOW, q.shape[-2] // 2)


def _seen(q: Tensor, has_window: bool) -> Tensor:
    at = torch.arange(q.shape[-2], device=q.device)
    seen = at[None, :] <= at[:, None]
    return seen & (at[None, :] > at[:, None] - _window_of(q)) if has_window else seen


def _repeated(x: Tensor, heads: int) -> Tensor:
    batch, groups, length, width = x.shape
    x = x[:, :, None].expand(batch, groups, heads // groups, length, width)
    return x.reshape(batch, heads, length, width)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, has_window: bool = False, softcap: float | None = None
) -> Tensor:
    """Written out, as transformers' eager_attention_forward."""
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = torch.finfo(q.dtype).min
    scores = scores + torch.where(
        _seen(q, has_window), torch.zeros((), dtype=q.dtype, device=q.device), hidden
    )
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, has_window: bool = False) -> Tensor:
    """As transformers' sdpa_attention_forward with a mask in memory."""
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(q, has_window)[None, None])


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, has_window: bool = False, softcap: float | None = None
) -> Tensor:
    """As its documentation has it."""
    from torch.nn.attention import flex_attention as flex

    window = _window_of(q)

    def score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window) if has_window else query >= key

    blocks = flex.create_block_mask(mask, None, None, q.shape[-2], k.shape[-2], device=q.device)
    return flex.flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True)


def _compiled(
    function: Callable[..., Any], backend: str = "inductor", skip: tuple[str, ...] = ()
) -> Callable[..., Any]:
    options: Any = {"liger.policy": "always", "liger.skip": skip} if backend == "liger" else None
    return torch.compile(function, backend=backend, dynamic=False, options=options)


def _attention_elements(b: int, t: int, h: int, k: int, d: int) -> dict[str, int]:
    """q, k, v and the result; in backward their gradients too. The products take longer, so this is a low floor."""
    return {"forward": 2 * b * t * (h + k) * d, "backward": 4 * b * t * (h + k) * d}


window_attention = functools.partial(masked_attention, has_window=True)
capped_attention = functools.partial(eager_attention, softcap=SOFTCAP)
capped_window_attention = functools.partial(eager_attention, has_window=True, softcap=SOFTCAP)


# Embedding


class _Embedding(torch.autograd.Function):
    """With the backward that backend="liger" gives it in half precision."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.num_rows = table.shape[0]
        return F.embedding(indices, table)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        op = torch.ops.liger_compile.embedding_backward.default
        return None, op(dy, *ctx.saved_tensors, ctx.num_rows, -1, False)


def our_embedding(indices: Tensor, table: Tensor) -> Tensor:
    found: Tensor = _Embedding.apply(indices, table)
    return found


# Losses


def make_target(num_tokens: int, num_classes: int) -> Tensor:
    return torch.randint(num_classes, (num_tokens,))


def eager_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """As transformers spells it: logits in the dtype of the model, the loss in float32."""
    return F.cross_entropy(logits.float(), target)


def liger_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, target)


def eager_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return eager_cross_entropy(F.linear(x, weight), target)


def liger_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, target)


def cut_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, target)


def low_memory_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, weight, target, memory=LOW_MEMORY_MIB * 2**20)


# Losses after pre-training, of SEQUENCES sequences

SEQUENCES = 4
_LOSS_SHAPES = ((8192, 2048, 151936), (8192, 4096, 128256))


def make_policy(n: int, h: int, v: int, is_frozen: bool = False) -> tuple[Any, ...]:
    """Hidden states, the head, tokens, an advantage for each sequence, and the log-probabilities of an older policy."""
    head = weight(v, h).requires_grad_(not is_frozen)
    old = torch.full((n,), -float(math.log(v)), dtype=torch.float32)
    return activation(n, h), head, make_target(n, v), torch.randn(SEQUENCES, dtype=torch.float32), old


def _log_probabilities(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight).float()
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0], logits


def policy_loss(
    x: Tensor, weight: Tensor, target: Tensor, advantages: Tensor, old: Tensor, entropy_bonus: float = 0.0
) -> Tensor:
    """GRPO's loss without a reference model, averaged over all tokens; with an entropy bonus, PPO's."""
    logp, logits = _log_probabilities(x, weight, target)
    of_token = advantages.repeat_interleave(len(x) // SEQUENCES)
    ratio = (logp - old).exp()
    loss = -torch.min(ratio * of_token, ratio.clamp(0.8, 1.2) * of_token).mean()
    if not entropy_bonus:
        return loss
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return loss - entropy_bonus * entropy.mean()


policy_loss_and_entropy = functools.partial(policy_loss, entropy_bonus=0.01)


def liger_policy_loss(x: Tensor, weight: Tensor, target: Tensor, advantages: Tensor, old: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")
    tokens, older = (each.view(SEQUENCES, -1) for each in (target, old))
    x = x.view(*tokens.shape, -1)
    return loss(x, weight, tokens, torch.ones_like(tokens), advantages, old_per_token_logps=older)[0]


def log_probabilities(x: Tensor, weight: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    """With an incoming gradient of its own for each token, as the loss of a preference has it."""
    return _log_probabilities(x, weight, target)[0]


def make_distillation(n: int, h: int, v: int) -> tuple[Any, ...]:
    teacher = torch.randn(n, h), weight(v, h).requires_grad_(False)
    return activation(n, h), weight(v, h), *teacher


def forward_kl(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor) -> Tensor:
    student, teacher = (
        F.linear(*head).float().log_softmax(-1) for head in ((x, weight), (teacher_x, teacher_weight))
    )
    return F.kl_div(student, teacher.detach(), reduction="batchmean", log_target=True)


def liger_forward_kl(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    return loss(x, weight, teacher_x, teacher_weight, torch.zeros(len(x), dtype=torch.int64, device=x.device))


def _loss(eager: Callable[..., Any], peer: Callable[..., Any] | None = None, **settings: Any) -> Op:
    """A loss in eager code, of the hidden states (tokens, hidden) and a vocabulary."""
    return Op(
        shapes=_LOSS_SHAPES,
        tiny=(32, 16, 48),
        make=settings.pop("make", make_policy),
        variants={
            "eager": eager,
            **({} if peer is None else {"liger-kernel": peer}),
            OURS: _compiled(eager, "liger"),
            f"{OURS} without its loss": _compiled(eager, "liger", skip=("linear_softmax.loss",)),
        },
        gemms=lambda n, h, v: (n, h, v),
        is_long=True,
        **settings,
    )


_NORM_SHAPES = (
    (8192, 4096),
    (8192, 2048),
    (8192, 3584),
    (8192, 5120),
    (8192, 8192),
    (16384, 4096),
    (2048, 4096),
)

OPS: Mapping[str, Op] = {
    "linear_cross_entropy": Op(  # tokens, hidden, vocabulary
        shapes=((8192, 4096, 128256), (16384, 4096, 32000), (8192, 2048, 128256), (8192, 1024, 151936)),
        tiny=(32, 16, 48),
        make=lambda n, h, v: (activation(n, h), weight(v, h), make_target(n, v)),
        variants={
            "eager": eager_linear_cross_entropy,
            "liger-kernel": liger_linear_cross_entropy,
            "cut-cross-entropy": cut_linear_cross_entropy,
            OURS: functional.linear_cross_entropy,
            f"{OURS} {LOW_MEMORY_MIB} MiB": low_memory_linear_cross_entropy,
        },
        gemms=lambda n, h, v: (n, h, v),
        is_long=True,
    ),
    # As linear_cross_entropy. "without its loss" keeps the logits. The floor of forward_kl lacks the teacher's matmul.
    "policy_loss": _loss(policy_loss, liger_policy_loss),
    "policy_loss_entropy": _loss(policy_loss_and_entropy),
    "frozen_policy_loss": _loss(
        policy_loss,
        liger_policy_loss,
        make=functools.partial(make_policy, is_frozen=True),
        is_frozen=True,
    ),
    "log_probability": _loss(log_probabilities),
    "frozen_log_probability": _loss(
        log_probabilities, make=functools.partial(make_policy, is_frozen=True), is_frozen=True
    ),
    "forward_kl": _loss(forward_kl, liger_forward_kl, make=make_distillation),
    "cross_entropy": Op(  # tokens, vocabulary
        shapes=((8192, 128256), (16384, 32000)),
        tiny=(32, 48),
        make=lambda n, v: (activation(n, v), make_target(n, v)),
        variants={
            "eager": eager_cross_entropy,
            "liger-kernel": liger_cross_entropy,
            OURS: functional.cross_entropy,
        },
        # Logits are read once and their gradients written once, if that is done in one pass over each row.
        elements=lambda n, v: {"forward": n * v, "backward": 2 * n * v, "both": 2 * n * v},
    ),
    "rms_norm": Op(  # rows, hidden; the last is one for each head
        shapes=(*_NORM_SHAPES, (131072, 128)),
        tiny=(8, 32),
        make=lambda n, h: (activation(n, h), weight(h)),
        variants={"eager": eager_rms_norm, "liger-kernel": liger_rms_norm, OURS: functional.rms_norm},
        elements=lambda n, h: {"forward": 2 * n * h, "backward": 3 * n * h},
    ),
    "rotary": Op(  # batch, length, heads, heads of k, width of a head
        shapes=((4, 2048, 32, 8, 64), (2, 4096, 32, 8, 128), (8, 1024, 16, 8, 128)),
        tiny=(1, 8, 4, 2, 16),
        make=make_rotary,
        variants={"eager": eager_rotary, "liger-kernel": liger_rotary, OURS: our_rotary},
        elements=lambda b, t, h, k, d: dict.fromkeys(
            ("forward", "backward"), 2 * b * t * (h + k) * d + 2 * t * d
        ),
    ),
    "norm_rotary": Op(  # as rotary
        shapes=((8, 1024, 16, 8, 128), (2, 4096, 32, 8, 128)),
        tiny=(1, 8, 4, 2, 16),
        make=make_norm_rotary,
        variants={
            "eager": _norm_rotary(eager_rms_norm, eager_rotary),
            "liger-kernel": _norm_rotary(liger_rms_norm, liger_rotary),
            OURS: our_norm_rotary,
        },
        elements=lambda b, t, h, k, d: {
            "forward": 2 * b * t * (h + k) * d + 2 * t * d,
            "backward": 3 * b * t * (h + k) * d + 2 * t * d,
        },
    ),
    "causal_attention": Op(  # batch, length, heads, heads of keys, width of a head
        shapes=((4, 2048, 32, 8, 64), (1, 8192, 32, 8, 64), (2, 4096, 32, 8, 128)),
        tiny=(1, 8, 4, 2, 16),
        make=make_attention,
        elements=_attention_elements,
        variants={
            "eager": eager_attention,
            "SDPA causal": causal_attention,
            OURS: _compiled(eager_attention, "liger"),
        },
    ),
    "window_attention": Op(  # as causal_attention, and the last WINDOW keys
        shapes=(
            (4, 2048, 32, 8, 64),
            (1, 8192, 32, 8, 128),
            (2, 4096, 8, 4, 256),
            (8, 1024, 16, 8, 128),
            (16, 512, 32, 8, 128),
            (32, 256, 32, 8, 128),
        ),
        tiny=(1, 8, 4, 2, 16),
        make=make_attention,
        elements=_attention_elements,
        variants={
            "eager": window_attention,
            "SDPA causal": causal_attention,
            "flex_attention": _compiled(functools.partial(flex_attention, has_window=True)),
            OURS: _compiled(window_attention, "liger"),
        },
    ),
    "capped_attention": Op(  # as causal_attention, written out with the scores bent by tanh
        shapes=(
            (2, 4096, 8, 4, 256),
            (1, 8192, 8, 4, 256),
            (4, 2048, 8, 4, 256),
            (8, 1024, 8, 4, 256),
            (32, 256, 8, 4, 256),
        ),
        tiny=(1, 8, 4, 2, 16),
        make=make_attention,
        elements=_attention_elements,
        variants={
            "eager": capped_attention,
            "flex_attention": _compiled(functools.partial(flex_attention, softcap=SOFTCAP)),
            OURS: _compiled(capped_attention, "liger"),
        },
    ),
    "capped_window_attention": Op(  # as capped_attention, and the last WINDOW keys
        shapes=((2, 4096, 8, 4, 256), (1, 8192, 8, 4, 256)),
        tiny=(1, 8, 4, 2, 16),
        make=make_attention,
        elements=_attention_elements,
        variants={
            "eager": capped_window_attention,
            "flex_attention": _compiled(functools.partial(flex_attention, has_window=True, softcap=SOFTCAP)),
            OURS: _compiled(capped_window_attention, "liger"),
        },
    ),
    "embedding": Op(  # tokens, rows of the table, width; an eighth of the tokens are one and the same
        shapes=(
            (8192, 128256, 4096),
            (8192, 128256, 2048),
            (8192, 151936, 1024),
            (8192, 256000, 2304),
            (8192, 32000, 1024),
            (8192, 50257, 256),
            (8192, 1024, 768),
        ),
        tiny=(16, 24, 8),
        make=lambda n, r, w: (torch.randint(r, (n,)).clamp_(max=r - r // 8), weight(r, w)),
        variants={"eager": F.embedding, OURS: our_embedding},
        # Backward writes zeros, and reads and writes the rows of the tokens.
        elements=lambda n, r, w: {"forward": 2 * n * w, "backward": r * w + 3 * n * w},
    ),
}
