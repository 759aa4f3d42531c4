"""A layer of Llama whose projections have adapters, with the structure and the statements of PEFT's lora.Linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, INNER, HEADS, KV_HEADS = 64, 96, 4, 2
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Form:
    """How the adapters are configured.

    Args:
        names: the adapters of each projection.
        active: those that take part.
        bias: the matrix B has a bias.
    """

    layer: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32
    rank: int = 2
    scaling: float = 2.0
    dropout: float = 0.0
    names: tuple[str, ...] = ("default",)
    active: tuple[str, ...] = ("default",)
    bias: bool = False


class Adapted(nn.Module):
    """A frozen linear layer and its adapters. As in PEFT, a class with modules in its modules."""

    def __init__(self, inputs: int, outputs: int, form: Form) -> None:
        super().__init__()
        rank, dtype = form.rank, form.adapter
        self.base_layer = nn.Linear(inputs, outputs, bias=False, dtype=form.layer).requires_grad_(False)
        self.scaling = dict.fromkeys(form.names, form.scaling)
        self.active = [*form.active]
        self.merged = False

        def made(make: Any) -> nn.ModuleDict:
            return nn.ModuleDict({name: make() for name in form.names})

        self.lora_A = made(lambda: nn.Linear(inputs, rank, bias=False, dtype=dtype))
        self.lora_B = made(lambda: nn.Linear(rank, outputs, bias=form.bias, dtype=dtype))
        self.lora_dropout = made(lambda: nn.Dropout(form.dropout) if form.dropout else nn.Identity())

    def __getattr__(self, name: str) -> Any:  # that a class has one changes the paths that Dynamo writes
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        dtype = result.dtype
        for name in self.active if not self.merged else ():
            down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            x = x if x.dtype == down.weight.dtype else x.to(dtype=down.weight.dtype)
            result = result + up(down(dropout(x))) * self.scaling[name]
        return result.to(dtype)

    @torch.no_grad()
    def merge(self) -> None:
        for name in self.active:
            delta = self.lora_B[name].weight @ self.lora_A[name].weight * self.scaling[name]
            self.base_layer.weight += delta.to(self.base_layer.weight.dtype)
        self.merged = True


class Norm(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, dtype=form.layer), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32) if x.dtype != torch.float64 else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Layer(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        head = WIDTH // HEADS
        sizes = {
            **dict.fromkeys(PROJECTIONS, (WIDTH, WIDTH)),
            **dict.fromkeys(("k", "v"), (WIDTH, KV_HEADS * head)),
            **dict.fromkeys(("gate", "up"), (WIDTH, INNER)),
            "down": (INNER, WIDTH),
        }
        self.proj = nn.ModuleDict({name: Adapted(*size, form) for name, size in sizes.items()})
        self.before, self.after = Norm(form), Norm(form)

    def forward(self, x: Tensor) -> Tensor:
        proj, (batch, tokens, _) = self.proj, x.shape
        h = self.before(x)
        q, k, v = (proj[n](h).view(batch, tokens, -1, WIDTH // HEADS).transpose(1, 2) for n in "qkv")
        angles = torch.arange(tokens, device=x.device)[:, None] * 0.1 ** torch.arange(8, device=x.device)
        cos, sin = (torch.cat((table, table), -1).to(q.dtype) for table in (angles.cos(), angles.sin()))
        attended = F.scaled_dot_product_attention(
            rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        x = x + proj["o"](attended.transpose(1, 2).reshape(batch, tokens, WIDTH))
        h = self.after(x)
        return x + proj["down"](F.silu(proj["gate"](h)) * proj["up"](h))


def layer(form: Form, seed: int = 0) -> Layer:
    torch.manual_seed(seed)
    return Layer(form)


def inputs(form: Form, tokens: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, WIDTH, generator=generator).to(form.layer).requires_grad_()
