"""A decoder as Meta spells Llama: complex rotary tables, RMSNorm in two functions, the loss outside."""

import torch
import torch.nn.functional as F
from torch import nn


def rotary_table(width, length, theta=10000.0):
    freqs = 1.0 / (theta ** (torch.arange(0, width, 2).float() / width))
    angles = torch.outer(torch.arange(length).float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(table, x):
    return table.view(*(size if dim in (1, x.ndim - 1) else 1 for dim, size in enumerate(x.shape)))


def apply_rotary(xq, xk, table):
    q = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    k = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    table = reshape_for_broadcast(table, q)
    return (
        torch.view_as_real(q * table).flatten(3).type_as(xq),
        torch.view_as_real(k * table).flatten(3).type_as(xk),
    )


def repeat_kv(x, times):
    batch, length, heads, width = x.shape
    return x[:, :, :, None, :].expand(batch, length, heads, times, width).reshape(batch, length, -1, width)


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x, table, mask):
        batch, length, _ = x.shape
        xq = self.wq(x).view(batch, length, self.heads, self.head_dim)
        xk = self.wk(x).view(batch, length, self.kv_heads, self.head_dim)
        xv = self.wv(x).view(batch, length, self.kv_heads, self.head_dim)
        xq, xk = apply_rotary(xq, xk, table)
        keys = repeat_kv(xk, self.heads // self.kv_heads).transpose(1, 2)
        values = repeat_kv(xv, self.heads // self.kv_heads).transpose(1, 2)
        xq = xq.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / self.head_dim**0.5 + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        return self.wo(torch.matmul(scores, values).transpose(1, 2).contiguous().view(batch, length, -1))


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
        self.attention_norm = RMSNorm(width)
        self.ffn_norm = RMSNorm(width)

    def forward(self, x, table, mask):
        h = x + self.attention(self.attention_norm(x), table, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class MetaLlama(nn.Module):
    def __init__(self, vocab, width, inner, layers, heads, kv_heads, length=64):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width, inner, heads, kv_heads) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.output = nn.Linear(width, vocab, bias=False)
        self.freqs_cis = rotary_table(width // heads, 2 * length)

    def forward(self, tokens):
        length = tokens.shape[1]
        h = self.tok_embeddings(tokens)
        self.freqs_cis = self.freqs_cis.to(h.device)
        table = self.freqs_cis[0:length]
        mask = torch.triu(torch.full((length, length), float("-inf"), device=tokens.device), diagonal=1)
        mask = mask.type_as(h)
        for layer in self.layers:
            h = layer(h, table, mask)
        return self.output(self.norm(h)).float()
