"""Single ops against eager code, stock torch.compile, liger-kernel and cut-cross-entropy, on one GPU.

    python -m bench.ops                       all ops, and bench/results/ops_<device>.csv
    python -m bench.ops rms_norm rotary       these
    python -m bench.ops --quick               the first shape of each, few rounds
    python -m bench.ops --device cpu          tiny shapes by the clock: shows that it runs, measures nothing

docs/benchmarks.md says what the columns mean. `OPS` is the table of what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import timing
from bench.common import RESULTS, Row, file_name, machine, merge_csv, print_row
from bench.timing import Contender, captured, interleave, peak_bytes, replayed, spread
from liger_compile import functional

OURS, INDUCTOR = "liger-compile", "inductor"
LOW_MEMORY_MIB = 128
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy")
KEYS = ("device", "torch", "op", "shape", "dtype", "variant")
WIDTHS = {
    "op": 20,
    "shape": 17,
    "variant": 25,
    "pass": 8,
    "median_ms": 9,
    "low_ms": 8,
    "high_ms": 8,
    "of_floor": 8,
    "extra_mib": 9,
    "difference": 10,
    "error": 0,
}

Make = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Op:
    """What is measured of an op, and where.

    shapes: of the measurement; `tiny`: of the try on a CPU.
    make: shape -> arguments. Activations and weights require gradients; weights are Parameters.
    variants: function of these arguments, by name. "inductor" is added, from "eager".
    elements: shape -> the elements that a pass must read and write at least.
    gemms: shape -> (N, I, O) of the linear layer in the op, if it has one.
    is_long: takes so many milliseconds that launches do not show; makes its gradients in forward or in backward.
    """

    shapes: tuple[tuple[int, ...], ...]
    tiny: tuple[int, ...]
    make: Make
    variants: Mapping[str, Callable[..., Any]]
    elements: Callable[..., dict[str, int]] | None = None
    gemms: Callable[..., tuple[int, int, int]] | None = None
    is_long: bool = False


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


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    s = residual + x
    return eager_rms_norm(s, weight), s


def liger_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm(x, residual, weight, 1e-6)


# Rotary embedding


def make_rotary(batch: int, length: int, heads: int, kv_heads: int, width: int) -> tuple[Any, ...]:
    """q and k as they come from their projections, and tables as transformers makes them."""
    q, k = (torch.randn(batch, length, n, width).transpose(1, 2) for n in (heads, kv_heads))
    frequencies = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)[None]
    return q.requires_grad_(), k.requires_grad_(), angles.cos().to(q.dtype), angles.sin().to(q.dtype)


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


# Gated MLP


def eager_gated_activation(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def liger_gated_activation(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


def eager_gated_mlp(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(eager_gated_activation(gate, up), down)


def liger_gated_mlp(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(liger_gated_activation(gate, up), down)


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


def _linear_cross_entropy() -> dict[str, Callable[..., Any]]:
    ours: dict[str, Callable[..., Any]] = {OURS: functional.linear_cross_entropy}
    if "memory" in inspect.signature(functional.linear_cross_entropy).parameters:
        ours[f"{OURS} {LOW_MEMORY_MIB} MiB"] = low_memory_linear_cross_entropy
    return {
        "eager": eager_linear_cross_entropy,
        "liger-kernel": liger_linear_cross_entropy,
        "cut-cross-entropy": cut_linear_cross_entropy,
        **ours,
    }


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
        variants=_linear_cross_entropy(),
        gemms=lambda n, h, v: (n, h, v),
        is_long=True,
    ),
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
    "add_rms_norm": Op(  # rows, hidden
        shapes=_NORM_SHAPES,
        tiny=(8, 32),
        make=lambda n, h: (activation(n, h), activation(n, h), weight(h)),
        variants={
            "eager": eager_add_rms_norm,
            "liger-kernel": liger_add_rms_norm,
            OURS: functional.add_rms_norm,
        },
        elements=lambda n, h: {"forward": 4 * n * h, "backward": 4 * n * h},
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
    "gated_activation": Op(  # tokens, inner width
        shapes=((8192, 8192), (8192, 14336)),
        tiny=(8, 32),
        make=lambda n, i: (activation(n, i), activation(n, i)),
        variants={
            "eager": eager_gated_activation,
            "liger-kernel": liger_gated_activation,
            OURS: functional.swiglu,
        },
        elements=lambda n, i: {"forward": 3 * n * i, "backward": 5 * n * i},
    ),
    "gated_mlp": Op(  # tokens, inner width, hidden
        shapes=((8192, 8192, 2048), (8192, 14336, 4096)),
        tiny=(8, 32, 16),
        make=lambda n, i, o: (activation(n, i), activation(n, i), weight(o, i)),
        variants={"eager": eager_gated_mlp, "liger-kernel": liger_gated_mlp, OURS: functional.swiglu},
        # Backward writes the product again, for the gradient of the weight: it is not kept.
        elements=lambda n, i, o: {"forward": 3 * n * i, "backward": 6 * n * i},
        gemms=lambda n, i, o: (n, i, o),
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.ops", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ops", nargs="*", default=list(OPS), help=f"of {', '.join(OPS)}")
    parser.add_argument("--variants", type=lambda text: text.split(","), help="names, with commas between")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=40, help="at most")
    parser.add_argument("--seconds", type=float, default=2.0, help="of rounds for each shape, at most about")
    parser.add_argument("--quick", action="store_true", help="the first shape of each op, five rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.ops) - set(OPS):
        parser.error(f"expected ops of {', '.join(OPS)}, got {', '.join(unknown)}")

    torch.set_float32_matmul_precision("highest")
    where = machine(chosen.device, PACKAGES)
    name = file_name("ops", chosen.device)
    is_first = True
    for op_name in chosen.ops:
        op = OPS[op_name]
        shapes = (op.tiny,) if chosen.device == "cpu" else op.shapes[:1] if chosen.quick else op.shapes
        rows: list[Row] = []
        for shape in shapes:
            known = {"op": op_name, "shape": "x".join(map(str, shape)), "dtype": chosen.dtype}
            for row in measure(op, shape, chosen):
                rows.append({**known, **row, **where})
                print_row(rows[-1], WIDTHS, is_first)
                is_first = False
        merge_csv(name, rows, KEYS, chosen.out)


def measure(op: Op, shape: tuple[int, ...], chosen: argparse.Namespace) -> Iterator[Row]:
    """A row for each variant and pass."""
    dtype, device = getattr(torch, chosen.dtype), torch.device(chosen.device)
    torch._dynamo.reset()
    gc.collect()  # the graphs of the shape before, and with them their memory
    variants = dict(op.variants)
    variants[INDUCTOR] = torch.compile(variants["eager"], dynamic=False)
    if chosen.variants is not None:
        variants = {name: variants[name] for name in chosen.variants if name in variants}
    with _factories(device, dtype):
        sets = _buffers(op, shape, is_on_cpu=device.type == "cpu")
        contenders = [_floor(op, shape, device)]
    reference = timing.step(op.variants["eager"], _copies(sets[0]))

    facts: dict[str, Row] = {}
    for name, function in variants.items():
        try:
            facts[name] = _facts(function, sets[0], reference, op.is_long)
        except Exception as error:
            facts[name] = {"error": _sentence(error)}
    del reference
    for name, function in variants.items():
        if "error" in facts[name]:
            continue
        try:
            contender = _contender(name, function, sets, op.is_long)
            interleave([contender], rounds=1, seconds=0)
            contenders.append(contender)
        except Exception as error:
            facts[name] = {"error": _sentence(error)}
    rounds = 5 if chosen.quick else chosen.rounds
    found = interleave(contenders, rounds, chosen.seconds * (4 if op.is_long else 1))
    took = {stage: spread(samples)[0] for stage, samples in found["floor"].items()}
    if "copy" in took:
        took["copy"] *= dtype.itemsize / (2 * _copied_bytes(device))  # of an element
    floors = _floors(op, shape, took)

    timed_by = {each.name: each.timed_by for each in contenders}
    for name, fact in facts.items():
        if "error" in fact:
            yield {"variant": name, "pass": "", **fact}
            continue
        samples = dict(found[name])
        if "both" not in samples:
            samples["both"] = [sum(pair) for pair in zip(*samples.values(), strict=True)]
        for pass_name, milliseconds in samples.items():
            median, low, high = spread(milliseconds)
            yield {
                "variant": name,
                "pass": pass_name,
                "median_ms": round(median, 4),
                "low_ms": round(low, 4),
                "high_ms": round(high, 4),
                "floor_ms": round(floors[pass_name], 4),
                "of_floor": round(median / floors[pass_name], 3),
                "extra_mib": fact.get(f"{pass_name}_extra_mib", ""),
                "difference": fact["difference"] if pass_name == "both" else "",
                "timed_by": timed_by[name],
                "rounds": len(milliseconds),
                "error": "",
            }


def _buffers(op: Op, shape: tuple[int, ...], is_on_cpu: bool) -> list[tuple[Any, ...]]:
    torch.manual_seed(0)
    sets = [op.make(*shape)]
    if not (op.is_long or is_on_cpu):
        # Results take about what arguments do.
        size = 2 * sum(arg.nbytes for arg in sets[0])
        sets += [op.make(*shape) for _ in range(min(timing.ROTATED_BYTES // size, timing.MAX_SETS) - 1)]
    return sets


def _contender(
    name: str, function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], is_long: bool
) -> Contender:
    args = sets[0]

    def evaluate() -> Any:
        with torch.no_grad():
            return function(*args)

    def refill() -> None:
        for arg in (arg for args in sets for arg in timing.differentiated(args)):
            if not isinstance(arg, nn.Parameter):
                arg.normal_()

    if is_long:
        # Some make the gradients in forward, so that a forward without gradients and the whole are what compares.
        stages = {"forward": evaluate, "both": lambda: timing.step(function, args)}
        return Contender(name, stages, "events" if args[0].is_cuda else "wall")
    if args[0].is_cuda:
        return captured(name, function, sets, refill)
    return Contender(name, {"both": lambda: timing.step(function, args)}, "wall")


def _floor(op: Op, shape: tuple[int, ...], device: torch.device) -> Contender:
    """What the hardware does at best: a large copy, and the GEMMs of the op with nothing around them."""
    stages: dict[str, Callable[[], Any]] = {}
    if op.elements is not None:
        source = torch.randn(_copied_bytes(device) // 2, dtype=torch.bfloat16)
        copy = torch.empty_like(source)
        stages["copy"] = lambda: copy.copy_(source)
    if op.gemms is not None:
        n, i, o = op.gemms(*shape)
        x, weight, dy, y = torch.randn(n, i), torch.randn(o, i), torch.randn(n, o), torch.empty(n, o)
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        stages["product"] = lambda: torch.mm(x, weight.t(), out=y)
        stages["dx"] = lambda: torch.mm(dy, weight, out=dx)
        stages["dweight"] = lambda: torch.mm(dy.t(), x, out=dweight)
    if device.type == "cpu":
        return Contender("floor", stages, "wall")
    return Contender("floor", stages, "events") if op.is_long else replayed("floor", stages)


def _floors(op: Op, shape: tuple[int, ...], took: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of each pass: its elements at the rate of the copy, and its GEMMs."""
    gemms = {"forward": ("product",), "backward": ("dx", "dweight")} if op.gemms is not None else {}
    elements = op.elements(*shape) if op.elements is not None else {}
    floors = {
        pass_name: elements.get(pass_name, 0) * took.get("copy", 0.0)
        + sum(took[gemm] for gemm in gemms.get(pass_name, ()))
        for pass_name in ("forward", "backward")
    }
    together = elements["both"] * took["copy"] if "both" in elements else sum(floors.values())
    return {**floors, "both": together}


def _copied_bytes(device: torch.device) -> int:
    return 2**30 if device.type == "cuda" else 2**22


def _facts(
    function: Callable[..., Any], args: Sequence[Any], reference: Sequence[Tensor], is_long: bool
) -> Row:
    """How far results and gradients are from eager code's, and the memory that a step takes."""
    found = timing.step(function, _copies(args))
    difference = max(_apart(a, b) for a, b in zip(found, reference, strict=True))
    del found
    facts: Row = {"difference": f"{difference:.1e}"}
    if args[0].is_cuda:
        args = _copies(args)
        upstream = timing.upstream_of(function(*args))
        gradients = sum(arg.nbytes for arg in timing.differentiated(args))
        peak = peak_bytes(lambda: timing.step(function, args, upstream))
        facts["both_extra_mib"] = round((peak - gradients) / 2**20, 1)
        if is_long:
            with torch.no_grad():
                facts["forward_extra_mib"] = round(peak_bytes(lambda: function(*args)) / 2**20, 1)
    return facts


def _apart(found: Tensor, reference: Tensor) -> float:
    return ((found.float() - reference.float()).norm() / reference.float().norm()).item()


def _copies(args: Sequence[Any]) -> list[Any]:
    """Of what some functions overwrite, laid out as it is."""
    return [
        arg.detach().clone().requires_grad_()
        if arg.requires_grad and not isinstance(arg, nn.Parameter)
        else arg
        for arg in args
    ]


def _sentence(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _factories(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """torch.randn and the like make tensors of this device and dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    main()
