"""A short decoder on packed documents: activations are (tokens, width), positions begin anew with each document."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).type_as(x) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (tokens, heads, D), cos and sin (tokens, 1, D / 2)."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(2))
        self.wq = nn.Linear(width, width, bias=False)
        self.wkv = nn.Linear(width, 2 * kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.mlp = MLP(width, inner)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.wq(x).view(len(x), -1, self.head_dim)
        k, v = self.wkv(x).view(len(x), 2, -1, self.head_dim).unbind(1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out[0].transpose(0, 1).flatten(1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(rms_norm(x, self.norms[0]), cos, sin)
        return x + self.mlp(rms_norm(x, self.norms[1]))


class Packed(nn.Module):
    def __init__(self, vocab: int, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** -torch.linspace(0, 1, width // heads // 2)
        self.register_buffer("angles", torch.arange(64)[:, None] * frequencies, persistent=False)
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width, inner, heads, kv_heads) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(ids)
        angles = self.angles[positions][:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(rms_norm(x, self.norm))


def packed_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Every row is a document."""
    positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids))
    return F.cross_entropy(model(ids.flatten(), positions).float(), labels.flatten())
