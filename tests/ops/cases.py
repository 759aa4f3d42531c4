"""Every op in every mode, beside the plain PyTorch that it stands for.

A Case has `ours` and `eager`, two functions of the same tensors, and `inputs(dtype, batch, tokens)`, which makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_compile import functional as L

D, HEADS, KV_HEADS, VOCAB = 16, 4, 2, 37
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    name: str
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    inputs: Callable[..., list[Tensor]]
    frozen: tuple[int, ...] = ()  # which inputs get no gradient

    def made(self, dtype: torch.dtype, batch: int = 3, tokens: int = 5, seed: int = 0) -> list[Tensor]:
        """The inputs, those that get a gradient as leaves that require one."""
        generator = torch.Generator().manual_seed(seed)
        tensors = self.inputs(lambda *shape: torch.randn(shape, generator=generator).to(dtype), batch, tokens)
        return [t if i in self.frozen else t.requires_grad_() for i, t in enumerate(tensors)]

    def __repr__(self) -> str:
        return self.name


def llama(x: Tensor, weight: Tensor | None) -> Tensor:
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return normed if weight is None else weight * normed


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + weight.float())).type_as(x)


def norms() -> Iterator[Case]:
    def x(randn, batch, tokens):
        return [randn(batch, tokens, D)]

    def x_weight(randn, batch, tokens):
        return [randn(batch, tokens, D), randn(D)]

    gemma_mode = {"offset": 1.0, "casting": "gemma"}
    yield Case("rms_norm.llama", lambda x, w: L.rms_norm(x, w, EPS, casting="llama"), llama, x_weight)
    yield Case("rms_norm.no_weight", lambda x: L.rms_norm(x, None, EPS), lambda x: llama(x, None), x)
    yield Case("rms_norm.gemma", lambda x, w: L.rms_norm(x, w, EPS, **gemma_mode), gemma, x_weight)
    yield Case(
        "rms_norm.torch",
        lambda x, w: L.rms_norm(x, w, None),
        lambda x, w: F.rms_norm(x, (D,), w, None),
        x_weight,
    )
    yield Case("pre_norm.llama", lambda x, w: L.pre_norm(x, w, EPS, casting="llama"), llama, x_weight)
    yield Case("pre_norm.no_weight", lambda x: L.pre_norm(x, None, EPS), lambda x: llama(x, None), x)
    yield Case("pre_norm.gemma", lambda x, w: L.pre_norm(x, w, EPS, **gemma_mode), gemma, x_weight)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotate_interleaved(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_interleaved(x) * sin


def interleaved_to_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return half(torch.cat((x[..., ::2], x[..., 1::2]), -1), cos, sin)


def complex_(x: Tensor, freqs: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(-2).type_as(x)


def rotaries() -> Iterator[Case]:
    def heads(randn, batch, tokens, width):
        tables = [randn(tokens, width), randn(tokens, width)]
        return [randn(batch, HEADS, tokens, D), randn(batch, KV_HEADS, tokens, D), *tables]

    def of(rotation, width, widen):
        def eager(q, k, cos, sin):
            cos, sin = widen(cos), widen(sin)
            turned = cos.shape[-1]
            return tuple(
                torch.cat((rotation(x[..., :turned], cos, sin), x[..., turned:]), -1) for x in (q, k)
            )

        return eager, lambda *arguments: heads(*arguments, width)

    def doubled(table):
        return torch.cat((table, table), -1)

    def repeated(table):
        return table.repeat_interleave(2, -1)

    for rotation in (half, interleaved, interleaved_to_half):
        layout = rotation.__name__
        for width in (D, D // 2):
            eager, inputs = of(rotation, width, lambda table: table)
            name = f"rotary.{layout}{'' if width == D else '_partial'}"
            ours = lambda q, k, cos, sin, layout=layout: L.rotary(q, k, cos, sin, layout=layout)  # noqa: E731
            yield Case(name, ours, eager, inputs, frozen=(2, 3))
        eager, inputs = of(rotation, D // 4, repeated if rotation is interleaved else doubled)
        ours = lambda q, k, cos, sin, layout=layout: L.rotary(  # noqa: E731
            q, k, cos, sin, layout=layout, half_tables=True
        )
        yield Case(f"rotary.{layout}_half_tables", ours, eager, inputs, frozen=(2, 3))

    def float_tables(randn, batch, tokens):
        q, _, cos, sin = heads(randn, batch, tokens, D)
        return [q, cos.float(), sin.float()]

    yield Case(
        "rotary.float_tables",
        lambda q, cos, sin: L.rotary(q, None, cos, sin, out_dtype=q.dtype),
        lambda q, cos, sin: half(q.float(), cos, sin).to(q.dtype),
        float_tables,
        frozen=(1, 2),
    )

    def complex_inputs(randn, batch, tokens):
        q, k, cos, sin = heads(randn, batch, tokens, D // 2)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return [q, k, torch.complex(cos.to(wide), sin.to(wide))]

    yield Case(
        "rotary.complex",
        L.rotary_complex,
        lambda q, k, freqs: (complex_(q, freqs), complex_(k, freqs)),
        complex_inputs,
        frozen=(2,),
    )


def norm_rotaries() -> Iterator[Case]:
    def inputs(randn, batch, tokens):
        heads = [randn(batch, HEADS, tokens, D), randn(batch, KV_HEADS, tokens, D)]
        return [*heads, randn(D), randn(D), randn(tokens, D), randn(tokens, D)]

    def without_weights(*arguments):
        return [each for at, each in enumerate(inputs(*arguments)) if at not in (2, 3)]

    for norm, mode in ((llama, {}), (gemma, {"offset": 1.0, "casting": "gemma"})):
        yield Case(
            f"norm_rotary.{norm.__name__}",
            lambda *tensors, mode=mode: L.norm_rotary(*tensors, EPS, **mode),
            norm_rotary(norm),
            inputs,
            frozen=(4, 5),
        )
    yield Case(
        "norm_rotary.no_weight",
        lambda q, k, cos, sin: L.norm_rotary(q, k, None, None, cos, sin, EPS),
        lambda q, k, cos, sin: norm_rotary(llama)(q, k, None, None, cos, sin),
        without_weights,
        frozen=(2, 3),
    )


def norm_rotary(norm: Callable[..., Tensor]) -> Callable[..., Any]:
    """functional.norm_rotary in plain PyTorch."""

    def eager(q: Tensor, k: Tensor, q_weight: Any, k_weight: Any, cos: Tensor, sin: Tensor) -> Any:
        return half(norm(q, q_weight), cos, sin), half(norm(k, k_weight), cos, sin)

    return eager


def eager_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None, **arguments: Any) -> Tensor:
    """functional.cross_entropy in plain PyTorch."""
    scale, cap = arguments.pop("logit_scale", 1.0), arguments.pop("softcap", None)
    z_loss, ignore = arguments.pop("z_loss", 0.0), arguments.get("ignore_index", -100)
    z = logits * scale if scale != 1.0 else logits
    z = (torch.tanh(z / cap) * cap if cap else z).float()
    rows, flat = z.reshape(-1, z.shape[-1]), target.reshape(-1)
    loss = F.cross_entropy(rows, flat, weight, **arguments)
    reduction = arguments.get("reduction", "mean")
    if z_loss:
        counts = (
            torch.ones_like(rows[:, 0]) if weight is None else weight[flat.masked_fill(flat == ignore, 0)]
        )
        counts = counts.masked_fill(flat == ignore, 0)
        extra = z_loss * torch.logsumexp(rows, -1).square() * counts
        extra = extra if reduction == "none" else extra.sum()
        loss = loss + (extra / counts.sum() if reduction == "mean" else extra)
    return loss.reshape(target.shape) if reduction == "none" else loss


LOSSES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing_none": {"label_smoothing": 0.1, "reduction": "none"},
    "softcap": {"softcap": 2.0, "logit_scale": 0.5},
    "z_loss": {"z_loss": 1e-2},
    "z_loss_sum": {"z_loss": 1e-2, "reduction": "sum"},
    "ignore_class": {"ignore_index": 3},
    "all": {"label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 2.0, "z_loss": 1e-2, "ignore_index": 3},
}


def targets(batch: int, tokens: int) -> Tensor:
    target = (torch.arange(batch * tokens) * 7 % VOCAB).view(batch, tokens)
    target[:, 1::3] = -100
    target[:, 2::3] = 3
    return target


def losses() -> Iterator[Case]:
    def logits(randn, batch, tokens):
        return [randn(batch, tokens, VOCAB) * 3]

    def head(randn, batch, tokens):
        return [randn(batch, tokens, D), randn(VOCAB, D), randn(VOCAB)]

    class_weight = torch.rand(VOCAB, generator=torch.Generator().manual_seed(1))
    for name, arguments in LOSSES.items():
        for weighted in (False, True) if name in ("mean", "none", "all") else (False,):
            weight = class_weight if weighted else None

            def ours(logits, arguments=arguments, weight=weight):
                return L.cross_entropy(logits, _targets(logits, arguments), weight, **arguments)

            def eager(logits, arguments=arguments, weight=weight):
                weight = None if weight is None else weight.to(_wide(logits))
                return eager_loss(logits, _targets(logits, arguments), weight, **arguments)

            def linear_ours(x, w, b, arguments=arguments, weight=weight):
                target = _targets(x, arguments)
                return L.linear_cross_entropy(x, w, target, b, class_weight=weight, **arguments)

            def linear_eager(x, w, b, eager=eager):
                return eager(F.linear(x, w, b))

            suffix = f"{name}_weighted" if weighted else name
            yield Case(f"cross_entropy.{suffix}", ours, eager, logits)
            yield Case(f"linear_cross_entropy.{suffix}", linear_ours, linear_eager, head)


def _targets(rows: Tensor, arguments: Any) -> Tensor:
    target = targets(*rows.shape[:-1])
    return target if arguments.get("ignore_index", -100) == -100 else target.masked_fill(target == -100, 5)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def adapters() -> Iterator[Case]:
    def inputs(randn, batch, tokens):
        return [randn(batch, tokens, 24), randn(batch, tokens, D), randn(2, D), randn(24, 2)]

    def ours(base, x, a, b):
        down = torch.ops.liger_compile.adapter_down.default(x, a)
        return torch.ops.liger_compile.adapter_up.default(base, down, b, 0.7)

    yield Case("adapter", ours, lambda base, x, a, b: base + F.linear(F.linear(x, a), b) * 0.7, inputs)


CASES = [*norms(), *rotaries(), *norm_rotaries(), *losses(), *adapters()]
ONE_OF_EACH_OP = [
    case
    for case in CASES
    if case.name
    in (
        "rms_norm.llama",
        "pre_norm.gemma",
        "rotary.interleaved_partial",
        "norm_rotary.llama",
        "cross_entropy.all_weighted",
        "linear_cross_entropy.all_weighted",
        "linear_cross_entropy.smoothing_none",
        "adapter",
    )
]


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
