"""Tiles of the rotary kernels: all candidates at all shapes of op_table.py, beside Inductor and liger-kernel.

    python -m bench.rotary_tiles                 minutes on one GPU, bench/results/rotary_tiles_<device>.csv
    python -m bench.rotary_tiles norm_rotary     of one op
    python -m bench.rotary_tiles --device cpu    interpreted, under TRITON_INTERPRET=1: shows that it runs

What `config` of the kernels chooses is the row "config". Forward and backward are timed alone, as in bench.ops; a
candidate's results and gradients are compared with those of eager code. Kernels are compiled before, in processes side
by side.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import ops, timing
from bench.common import RESULTS, Row, file_name, machine, merge_csv, print_row
from bench.op_table import OPS, our_norm_rotary, our_rotary
from bench.timing import Contender, interleave, replayed, spread
from liger_compile.kernels import norm_rotary, rotary

KEYS = ("device", "torch", "op", "shape", "dtype", "tile")
WIDTHS = {
    "op": 12,
    "shape": 16,
    "tile": 42,
    "forward_us": 10,
    "forward_of_floor": 16,
    "backward_us": 11,
    "backward_of_floor": 17,
    "difference": 10,
    "error": 0,
}
CHOSEN = "config"
INDUCTOR = "inductor"
PEERS = (INDUCTOR, "liger-kernel")
STAGES = ("forward", "backward")


@dataclass(frozen=True)
class Tiled:
    """An op with kernels whose `config` is a function of that module.

    tiles: channels of a head -> candidates, by name.
    forward: of the arguments of the op. backward: of the gradients of its results, and the arguments.
    """

    kernels: Any
    tiles: Callable[[int], dict[str, Any]]
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]

    def using(self, tile: Any) -> contextlib.AbstractContextManager[Any]:
        """Kernels are launched with this tile; with the one of `config` for None."""
        if tile is None:
            return contextlib.nullcontext()
        return patch.object(self.kernels, "config", lambda *_, **__: tile)

    def results(self, tile: Any, upstream: Sequence[Tensor], args: Sequence[Any]) -> tuple[Tensor, ...]:
        """Of forward and of backward."""
        with self.using(tile), torch.no_grad():
            return (*self.forward(*args), *self.backward(*upstream, *args))


def rotary_tiles(channels: int) -> dict[str, Any]:
    pairs = channels // 2
    found = {}
    for num_warps in (2, 4, 8):
        vectors = num_warps * 32 * 8 // pairs  # tokens of which each thread has 8 pairs, 16 bytes
        for heads, ahead in ((1, 1), (2, 2), (4, 2), (4, 4), (8, 2), (8, 4)):
            found[f"{num_warps} warps, {heads} heads, {ahead} ahead"] = rotary.Config(
                vectors, heads, ahead, pairs, 1, num_warps
            )
    found["4 warps, 2 vectors, 2 heads, 2 ahead"] = rotary.Config(2048 // pairs, 2, 2, pairs, 1, 4)
    return found


def rotary_backward(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    tables = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.ops.liger_compile.rotary_backward.default(dq, dk, *tables, "half", False, q.dtype, k.dtype)


def norm_rotary_tiles(channels: int) -> dict[str, Any]:
    pairs = channels // 2
    return {
        f"{num_warps} warps, {elements} elements, {heads} heads, {ahead} ahead": norm_rotary.Config(
            num_warps * 32 * elements // pairs, heads, ahead, pairs, num_warps
        )
        for num_warps in (2, 4)
        for elements in (4, 8)  # of each half of a head, that a thread reads at once
        for heads, ahead in ((2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4))
    }


def norm_rotary_backward(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    q, k = q.transpose(1, 2), k.transpose(1, 2)  # dq and dk are, as results are
    q_weight, k_weight, cos, sin = rest
    grad_q, grad_k, dweights = torch.ops.liger_compile.norm_rotary_backward.default(
        dq, dk, q, k, q_weight, k_weight, cos.unsqueeze(1), sin.unsqueeze(1), 1e-6, 0.0, True, True, True
    )
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), *dweights


TILED: Mapping[str, Tiled] = {
    "rotary": Tiled(rotary, rotary_tiles, our_rotary, rotary_backward),
    "norm_rotary": Tiled(norm_rotary, norm_rotary_tiles, our_norm_rotary, norm_rotary_backward),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.rotary_tiles")
    parser.add_argument("ops", nargs="*", default=list(TILED), help=f"of {', '.join(TILED)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiles", default="", help="only those with this in their name, and that of config")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.ops) - set(TILED):
        parser.error(f"expected ops of {', '.join(TILED)}, got {', '.join(unknown)}")
    on_cpu = chosen.device == "cpu"
    cases = [(op, shape) for op in chosen.ops for shape in ((OPS[op].tiny,) if on_cpu else OPS[op].shapes)]
    compiling = contextlib.nullcontext(lambda: None) if on_cpu else _compiling(cases, chosen)
    where = machine(chosen.device, ops.PACKAGES)
    rows: list[Row] = []
    with compiling as compiled:
        for op, shape in cases:
            known = {"op": op, "shape": "x".join(map(str, shape)), "dtype": chosen.dtype}
            rows += [{**known, **row, **where} for row in measure(op, shape, chosen, compiled)]
    merge_csv(file_name("rotary_tiles", chosen.device), rows, KEYS, chosen.out)
    for i, row in enumerate(rows):
        print_row(row, WIDTHS, header=i == 0)


def measure(
    op_name: str, shape: tuple[int, ...], chosen: argparse.Namespace, compiled: Callable[[], None]
) -> list[Row]:
    """A row for each tile and peer, the quickest first. `compiled` returns when the kernels are."""
    torch.compiler.reset()
    gc.collect()  # the graphs of the shape before, and with them their memory
    op, tiled = OPS[op_name], TILED[op_name]
    dtype, device = getattr(torch, chosen.dtype), torch.device(chosen.device)
    with ops.factories_on(device, dtype):
        sets = ops.buffers_of(op, shape, device.type == "cpu")
        contenders = [ops.floor_of(op, shape, device)]
    # Not its graph, whose nodes for the weights would tie captures to this stream.
    reference = [tensor.detach() for tensor in timing.step(op.variants["eager"], ops.copies_of(sets[0]))]
    facts: dict[str, Row] = {}
    for name in PEERS if device.type == "cuda" else ():
        function = (
            torch.compile(op.variants["eager"], dynamic=False) if name == INDUCTOR else op.variants[name]
        )
        facts[name] = {}
        try:
            contenders.append(ops.contender_of(name, function, sets, is_long=False))
        except Exception as error:
            facts[name] = ops.row_of_failure(error)
    compiled()
    upstream = [timing.upstream_of(tiled.forward(*args)) for args in sets]
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for name, tile in {CHOSEN: None, **tiled.tiles(shape[-1])}.items():
        if chosen.tiles not in name and name != CHOSEN:
            continue
        try:
            difference = max(
                ops.difference_of(a, b)
                for a, b in zip(tiled.results(tile, upstream[0], sets[0]), reference, strict=True)
            )
            facts[name] = {"difference": f"{difference:.1e}"}
            contenders.append(_contender(name, tiled, tile, upstream, sets, pool))
        except Exception as error:
            facts[name] = ops.row_of_failure(error)
    with torch.no_grad():
        samples = interleave(contenders, chosen.rounds, seconds=10)
    copy = spread(samples["floor"]["copy"])[0]
    floors = ops.floors_of(op, shape, {"copy": copy * dtype.itemsize / (2 * ops.copied_bytes(device))})
    rows = [
        {"tile": name, "error": "", **fact, **_times(samples.get(name, {}), floors)}
        for name, fact in facts.items()
    ]
    return sorted(rows, key=lambda row: sum(row.get(f"{stage}_us", math.inf) for stage in STAGES))


def _contender(
    name: str, tiled: Tiled, tile: Any, upstream: Sequence[Any], sets: Sequence[Any], pool: Any
) -> Contender:
    def forward() -> list[Any]:
        with tiled.using(tile):
            return [tiled.forward(*args) for args in sets]

    def backward() -> list[Any]:
        with tiled.using(tile):
            return [tiled.backward(*up, *args) for up, args in zip(upstream, sets, strict=True)]

    stages = {"forward": forward, "backward": backward}
    with torch.no_grad():
        if pool is None:
            return Contender(name, stages, "wall", len(sets))
        return dataclasses.replace(replayed(name, stages, pool), calls=len(sets))


def _times(samples: Mapping[str, Sequence[float]], floors: Mapping[str, float]) -> Row:
    row: Row = {}
    for stage, milliseconds in samples.items():
        median, low, high = (1000 * time for time in spread(milliseconds))
        row[f"{stage}_us"], row[f"{stage}_low_us"] = round(median, 2), round(low, 2)
        row[f"{stage}_high_us"] = round(high, 2)
        row[f"{stage}_of_floor"] = round(median / 1000 / floors[stage], 3)
    return row


@contextlib.contextmanager
def _compiling(
    cases: Sequence[tuple[str, tuple[int, ...]]], chosen: argparse.Namespace
) -> Iterator[Callable[[], None]]:
    """Compiles all tiles into Triton's cache, in processes of their own; the function waits for that."""
    work = [
        (op, channels, name, chosen.dtype)
        for op, channels in sorted({(op, shape[-1]) for op, shape in cases})
        for name in (CHOSEN, *TILED[op].tiles(channels))
        if chosen.tiles in name or name == CHOSEN
    ]
    count = max(1, min(12, len(os.sched_getaffinity(0)) - 4))
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
    done = [pool.submit(_compile, work[first::count]) for first in range(count)]

    @functools.cache
    def wait() -> None:
        for future in done:
            future.exception()
        pool.shutdown()  # their memory on the GPU too

    try:
        yield wait
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(work: Sequence[tuple[str, int, str, str]]) -> None:
    """Launches each on small inputs which a kernel is specialized for as for the large ones."""
    for op, channels, name, dtype in work:
        tiled = TILED[op]
        with contextlib.suppress(Exception), torch.no_grad():  # whoever measures it meets the error again
            with ops.factories_on(torch.device("cuda"), getattr(torch, dtype)):
                args = OPS[op].make(2, 256, 32, 8, channels)
            upstream = [torch.empty_like(tensor) for tensor in tiled.forward(*args)]
            tiled.results({CHOSEN: None, **tiled.tiles(channels)}[name], upstream, args)


if __name__ == "__main__":
    main()
