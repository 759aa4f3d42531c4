"""Attention of packed rows on one GPU: stock torch.compile, and ours by flex_attention and by varlen attention.

    python -m bench.packed                    all shapes, and bench/results/packed_<device>.csv
    python -m bench.packed --quick            few rounds
    python -m bench.packed --device cpu       tiny shapes by the clock: shows that it runs, measures nothing

Each shape is one row of documents. Stock has the mask of transformers in memory; "causal" is stock attention of the
same row as one document. Forward and backward are timed, with events. What is faster by head size and number of
tokens belongs into VARLEN_FROM and FEWEST in patterns/attention.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import timing
from bench.common import RESULTS, Row, file_name, machine, merge_csv, print_row
from bench.ops import difference_of, factories_on, row_of_failure
from bench.timing import Contender, interleave, peak_bytes, spread
from liger_compile.patterns.attention import forcing_varlen

KEYS = ("device", "torch", "shape", "dtype", "variant")
WIDTHS = {"shape": 30, "variant": 16, "median_ms": 9, "low_ms": 8, "high_ms": 8, "extra_mib": 9, "error": 0}


class Shape(NamedTuple):
    """The heads of a model, and the lengths of the documents in one row."""

    name: str
    heads: int
    groups: int
    size: int
    lengths: tuple[int, ...]
    window: int | None = None


LLAMA, QWEN = (32, 8, 64), (16, 8, 128)
SHAPES = (
    Shape("llama-1b 16x512", *LLAMA, (512,) * 16),
    Shape("llama-1b 3000,2500,1500,1192", *LLAMA, (3000, 2500, 1500, 1192)),
    Shape("llama-1b 64x128", *LLAMA, (128,) * 64),
    Shape("llama-1b 4x512", *LLAMA, (512,) * 4),
    Shape("llama-1b 1x8192", *LLAMA, (8192,)),
    Shape("qwen3-0.6b 32x512", *QWEN, (512,) * 32),
    Shape("llama-8b 16x512", 32, 8, 128, (512,) * 16),
    Shape("mistral 4x2048, window 1024", 32, 8, 128, (2048,) * 4, 1024),
)
TINY = (Shape("tiny", 4, 2, 16, (20, 30, 10)), Shape("tiny, window", 4, 2, 16, (20, 40), 8))


def mask_of(positions: Tensor, window: int | None) -> Tensor:
    """As transformers 5.24 for position_ids that begin again."""
    ids = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    seen = positions[:, None, :] <= positions[:, :, None]
    if window is not None:
        seen = seen & (positions[:, None, :] > positions[:, :, None] - window)
    return (seen & (ids[:, None, :] == ids[:, :, None]))[:, None]


def attention_of(window: int | None) -> Any:
    def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        mask = mask_of(positions, window)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    return attention


def causal(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def variants_of(shape: Shape, is_on_cpu: bool) -> dict[str, Callable[..., Tensor]]:
    attention = attention_of(shape.window)
    inner = "aot_eager" if is_on_cpu else "inductor"
    options: dict[str, Any] = {"liger.policy": "always", "liger.inner": inner, "liger.padding": "general"}
    return {
        "causal": torch.compile(causal, dynamic=False),
        "stock": torch.compile(attention, dynamic=False),
        **{
            name: _ours(torch.compile(_with_own_code(attention), backend="liger", options=options), is_varlen)
            for name, is_varlen in (("flex", False), ("varlen", True))
        },
    }


def _with_own_code(function: FunctionType) -> FunctionType:
    """A function with a code object of its own: by that, and by options, Dynamo keeps what it compiled."""
    code, scope = function.__code__.replace(), function.__globals__
    return FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)


def _ours(compiled: Callable[..., Tensor], is_varlen: bool) -> Callable[..., Tensor]:
    def function(*args: Tensor) -> Tensor:
        with forcing_varlen(is_varlen):  # read when the graph is compiled, in the first call
            return compiled(*args)

    return function


def arguments_of(shape: Shape) -> tuple[Tensor, ...]:
    length = sum(shape.lengths)
    heads = (shape.heads, shape.groups, shape.groups)
    q, k, v = (torch.randn(1, length, n, shape.size).transpose(1, 2).requires_grad_() for n in heads)
    return q, k, v, torch.cat([torch.arange(n) for n in shape.lengths])[None]


def measure(shape: Shape, chosen: argparse.Namespace) -> Iterator[Row]:
    """A row for each variant."""
    torch.compiler.reset()
    device = torch.device(chosen.device)
    with factories_on(device, getattr(torch, chosen.dtype)):
        args = arguments_of(shape)
    reference, contenders, facts = None, [], {}
    for name, function in variants_of(shape, device.type == "cpu").items():
        try:
            found = timing.step(function, args)
            row: dict[str, Any] = {"error": ""}
            if name == "stock":
                reference = found
            elif reference is not None:
                row["difference"] = f"{max(map(difference_of, found, reference)):.1e}"
            if device.type == "cuda":
                row["extra_mib"] = round(peak_bytes(lambda f=function: timing.step(f, args)) / 2**20, 1)
            stages = {"both": lambda f=function: timing.step(f, args)}
            contenders.append(Contender(name, stages, "events" if device.type == "cuda" else "wall"))
            facts[name] = row
        except Exception as error:
            facts[name] = row_of_failure(error)
    took = interleave(contenders, 5 if chosen.quick else chosen.rounds, chosen.seconds)
    for name, row in facts.items():
        if name in took:
            numbers = zip(("median_ms", "low_ms", "high_ms"), spread(took[name]["both"]), strict=True)
            row.update({column: round(number, 4) for column, number in numbers})
        yield {"shape": shape.name, "dtype": chosen.dtype, "variant": name, **row}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.packed", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=40, help="at most")
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds for each shape, at most about")
    parser.add_argument("--quick", action="store_true", help="five rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    chosen = parser.parse_args(arguments)
    where, is_first = machine(chosen.device, ("triton",)), True
    for shape in TINY if chosen.device == "cpu" else SHAPES:
        rows = []
        for row in measure(shape, chosen):
            rows.append({**row, **where})
            print_row(rows[-1], WIDTHS, is_first)
            is_first = False
        merge_csv(file_name("packed", chosen.device), rows, KEYS, chosen.out)


if __name__ == "__main__":
    main()
