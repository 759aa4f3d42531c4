"""A decoder as torchtitan spells one: nn.RMSNorm, a cached complex rotary table, the loss a function of its own."""

import torch
import torch.nn.functional as F
from torch import nn


def rotary_table(width, length, theta=500000.0):
    freqs = 1.0 / (theta ** (torch.arange(0, width, 2)[: width // 2].float() / width))
    angles = torch.outer(torch.arange(length), freqs).float()
    return torch.polar(torch.ones_like(angles), angles)


def broadcast_table(table, x, positions=None):
    """(length, D / 2) as (1, length, 1, D / 2), or gathered as (batch, length, 1, D / 2)."""
    length = x.shape[1]
    if positions is None:
        return table[0:length].view(1, length, 1, x.shape[-1])
    return table[positions].view(x.shape[0], length, 1, x.shape[-1])


def apply_rotary(xq, xk, table, positions=None):
    q = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    k = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    table = broadcast_table(table, q, positions)
    q_out = torch.view_as_real(q * table).flatten(3)
    k_out = torch.view_as_real(k * table).flatten(3)
    return q_out.type_as(xq), k_out.type_as(xk)


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads):
        super().__init__()
        self.head_dim = width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x, table, positions):
        batch, length, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq, xk, xv = (t.view(batch, length, -1, self.head_dim) for t in (xq, xk, xv))
        xq, xk = apply_rotary(xq, xk, table, positions)
        xq, xk, xv = (t.transpose(1, 2) for t in (xq, xk, xv))
        out = F.scaled_dot_product_attention(xq, xk, xv, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).contiguous().view(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, width, inner, heads, kv_heads):
        super().__init__()
        self.attention = Attention(width, heads, kv_heads)
        self.feed_forward = FeedForward(width, inner)
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, x, table, positions):
        h = x + self.attention(self.attention_norm(x), table, positions)
        return h + self.feed_forward(self.ffn_norm(h))


class Titan(nn.Module):
    def __init__(self, vocab, width, inner, layers, heads, kv_heads, length=64):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, width)
        self.register_buffer("freqs_cis", rotary_table(width // heads, length), persistent=False)
        blocks = {str(i): Block(width, inner, heads, kv_heads) for i in range(layers)}
        self.layers = nn.ModuleDict(blocks)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens, positions=None):
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h, self.freqs_cis, positions)
        return self.output(self.norm(h))


def cross_entropy_loss(pred, labels):
    return F.cross_entropy(pred.flatten(0, 1).float(), labels.flatten(0, 1))
