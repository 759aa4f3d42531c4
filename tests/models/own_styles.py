"""A decoder in which each computation is spelled as its caller likes: norm, rotation, gated MLP and loss are functions.

The spellings below are ones that people write and no library has: each computes what the usual one computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Style:
    norm: Callable[[Tensor, Tensor], Tensor]  # of x, weight
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]  # of x (B, H, T, D), cos and sin (T, D / 2)
    gate: Callable[[Tensor], Tensor]  # of gate_up (..., 2I)
    loss: Callable[[Tensor, Tensor], Tensor]  # of logits (B, T, V), labels (B, T)


class Styled(nn.Module):
    def __init__(self, style: Style, vocab: int, width: int, inner: int, layers: int, heads: int) -> None:
        super().__init__()
        self.style, self.heads, self.head_dim = style, heads, width // heads
        self.embed = nn.Embedding(vocab, width)
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(2 * layers + 1))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.gate_up = nn.ModuleList(nn.Linear(width, 2 * inner, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(inner, width, bias=False) for _ in range(layers))
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        style, (batch, length) = self.style, ids.shape
        angles = torch.arange(length, device=ids.device)[:, None] * 10000.0 ** -torch.linspace(
            0, 1, self.head_dim // 2, device=ids.device
        )
        h = self.embed(ids)
        cos, sin = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        for layer, qkv in enumerate(self.qkv):
            x = qkv(style.norm(h, self.norms[2 * layer]))
            q, k, v = x.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            q, k = style.rotate(q, cos, sin), style.rotate(k, cos, sin)
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + self.out[layer](x.transpose(1, 2).flatten(2))
            x = self.gate_up[layer](style.norm(h, self.norms[2 * layer + 1]))
            h = h + self.down[layer](style.gate(x))
        return style.loss(self.head(style.norm(h, self.norms[-1])), labels)


# Norms


def einsum_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    squares = torch.einsum("btd,btd->bt", wide, wide) / x.shape[-1]
    return (wide / torch.sqrt(squares + 1e-6)[..., None]).type_as(x) * weight


def linalg_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    scale = (torch.sum(wide * wide, dim=-1, keepdim=True) * (1 / x.size(-1)) + 1e-6) ** -0.5
    return torch.mul(torch.mul(scale, wide), weight.float()).to(x.dtype)


# Rotations


def every_two(x: Tensor) -> Tensor:
    """As GPT-J has it."""
    return torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).flatten(-2)


def gptj_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.repeat_interleave(cos, 2, -1), torch.repeat_interleave(sin, 2, -1)
    return (x * cos) + (every_two(x) * sin)


def unbind_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def rolled_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    signs = torch.cat((-torch.ones(half, device=x.device), torch.ones(half, device=x.device))).to(x.dtype)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    return torch.addcmul(x * cos, torch.roll(x, half, -1) * signs, sin)


# Gates


def gate_second(gate_up: Tensor) -> Tensor:
    up, gate = gate_up.chunk(2, dim=-1)
    return up * (gate * torch.sigmoid(gate))


def gelu_by_hand(gate_up: Tensor) -> Tensor:
    gate, up = torch.split(gate_up, gate_up.shape[-1] // 2, dim=-1)
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def packed_glu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.unflatten(-1, (2, -1)).unbind(-2)
    return F.silu(gate).mul_(up)


# Losses


def gathered_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities, those of the labels, and their mean over the tokens that count."""
    scores = F.log_softmax(logits[:, :-1].float(), dim=-1)
    labels = labels[:, 1:]
    counts = labels != -100
    picked = scores.gather(-1, labels.masked_fill(~counts, 0).unsqueeze(-1)).squeeze(-1)
    return -(picked * counts).sum() / counts.sum()


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss a token, weighted by a mask."""
    logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    losses = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), labels.view(-1), reduction="none")
    mask = (labels.view(-1) != -100).float()
    return (losses * mask).sum() / mask.sum()


def z_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, and what keeps logsumexp near 0."""
    logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    mask = labels != -100
    z = torch.logsumexp(logits, -1).square() * mask
    return F.cross_entropy(logits, labels) + 1e-3 * z.sum() / mask.sum()


def chunked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """A loop over pieces of the batch."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    total = logits.new_zeros((), dtype=torch.float32)
    for row, label in zip(logits, labels, strict=True):
        total = total + F.cross_entropy(row.float(), label, ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum()


STYLES = {
    "own_gptj": Style(einsum_norm, gptj_rotation, gate_second, gathered_loss),
    "own_unbind": Style(linalg_norm, unbind_rotation, packed_glu, masked_loss),
    "own_roll": Style(einsum_norm, rolled_rotation, gelu_by_hand, z_loss),
    "own_chunks": Style(linalg_norm, unbind_rotation, gate_second, chunked_loss),
}
