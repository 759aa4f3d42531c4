"""Single ops against eager code, stock torch.compile, liger-kernel and cut-cross-entropy, on one GPU.

    python -m bench.ops                       all ops, and bench/results/ops_<device>.csv
    python -m bench.ops rms_norm rotary       these
    python -m bench.ops --quick               the first shape of each, few rounds
    python -m bench.ops --device cpu          tiny shapes by the clock: shows that it runs, measures nothing

docs/benchmarks.md says what the columns mean, op_table.py what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import timing
from bench.common import RESULTS, Row, file_name, machine, merge_csv, print_row
from bench.op_table import OPS, Op
from bench.timing import Contender, captured, interleave, peak_bytes, replayed, spread

INDUCTOR = "inductor"
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
    torch.compiler.reset()
    gc.collect()  # the graphs of the shape before, and with them their memory
    variants = dict(op.variants)
    variants[INDUCTOR] = torch.compile(variants["eager"], dynamic=False)
    if chosen.variants is not None:
        variants = {name: variants[name] for name in chosen.variants if name in variants}
    with factories_on(device, dtype):
        sets = buffers_of(op, shape, is_on_cpu=device.type == "cpu")
        contenders = [floor_of(op, shape, device)]
    reference = timing.step(op.variants["eager"], copies_of(sets[0]))

    facts: dict[str, Row] = {}
    for name, function in variants.items():
        try:
            facts[name] = _facts(function, sets[0], reference, op.is_long)
        except Exception as error:
            facts[name] = row_of_failure(error)
    del reference
    for name, function in variants.items():
        if "error" in facts[name]:
            continue
        try:
            contender = contender_of(name, function, sets, op.is_long)
            interleave([contender], rounds=1, seconds=0)
            contenders.append(contender)
        except Exception as error:
            facts[name] = row_of_failure(error)
    rounds = 5 if chosen.quick else chosen.rounds
    found = interleave(contenders, rounds, chosen.seconds * (4 if op.is_long else 1))
    took = {stage: spread(samples)[0] for stage, samples in found["floor"].items()}
    if "copy" in took:
        took["copy"] *= dtype.itemsize / (2 * copied_bytes(device))  # of an element
    floors = floors_of(op, shape, took)

    timed_by = {contender.name: contender.timed_by for contender in contenders}
    for name, fact in facts.items():
        if "error" in fact:
            yield {"variant": name, "pass": "", **fact}
        else:
            for row in _rows_of_passes(found[name], floors, fact):
                yield {"variant": name, **row, "timed_by": timed_by[name]}


def _rows_of_passes(
    found: Mapping[str, list[float]], floors: Mapping[str, float], fact: Row
) -> Iterator[Row]:
    """A row for each pass, and for both together."""
    samples = dict(found)
    if "both" not in samples:
        samples["both"] = [sum(pair) for pair in zip(*samples.values(), strict=True)]
    for pass_name, milliseconds in samples.items():
        median, low, high = spread(milliseconds)
        yield {
            "pass": pass_name,
            "median_ms": round(median, 4),
            "low_ms": round(low, 4),
            "high_ms": round(high, 4),
            "floor_ms": round(floors[pass_name], 4),
            "of_floor": round(median / floors[pass_name], 3),
            "extra_mib": fact.get(f"{pass_name}_extra_mib", ""),
            "difference": fact["difference"] if pass_name == "both" else "",
            "rounds": len(milliseconds),
            "error": "",
        }


def buffers_of(op: Op, shape: tuple[int, ...], is_on_cpu: bool) -> list[tuple[Any, ...]]:
    torch.manual_seed(0)
    sets = [op.make(*shape)]
    if not (op.is_long or is_on_cpu):
        # Results take about what arguments do.
        size = 2 * sum(arg.nbytes for arg in sets[0])
        sets += [op.make(*shape) for _ in range(min(timing.ROTATED_BYTES // size, timing.MAX_SETS) - 1)]
    return sets


def contender_of(
    name: str, function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], is_long: bool
) -> Contender:
    args = sets[0]

    def evaluate() -> Any:
        with torch.no_grad():
            return function(*args)

    def refill() -> None:
        for arg in (arg for args in sets for arg in timing.differentiated(args)):
            if not isinstance(arg, nn.Parameter):
                timing.randomize(arg)

    if is_long:
        # Some make the gradients in forward, so that a forward without gradients and the whole are what compares.
        stages = {"forward": evaluate, "both": lambda: timing.step(function, args)}
        return Contender(name, stages, "events" if args[0].is_cuda else "wall")
    if args[0].is_cuda:
        return captured(name, function, sets, refill)
    return Contender(name, {"both": lambda: timing.step(function, args)}, "wall")


def floor_of(op: Op, shape: tuple[int, ...], device: torch.device) -> Contender:
    """What the hardware does at best: a large copy, and the GEMMs of the op with nothing around them."""
    stages: dict[str, Callable[[], Any]] = {}
    if op.elements is not None:
        source = torch.randn(copied_bytes(device) // 2, dtype=torch.bfloat16)
        copy = torch.empty_like(source)
        # No copy_, which a CUDA graph gives to the copy engine: that is slower than a kernel.
        stages["copy"] = lambda: torch.neg(source, out=copy)
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


def floors_of(op: Op, shape: tuple[int, ...], took: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of each pass: its elements at the rate of the copy, and its GEMMs."""
    of_backward = ("dx",) if op.is_frozen else ("dx", "dweight")
    gemms = {"forward": ("product",), "backward": of_backward} if op.gemms is not None else {}
    elements = op.elements(*shape) if op.elements is not None else {}
    floors = {
        pass_name: elements.get(pass_name, 0) * took.get("copy", 0.0)
        + sum(took[gemm] for gemm in gemms.get(pass_name, ()))
        for pass_name in ("forward", "backward")
    }
    together = elements["both"] * took["copy"] if "both" in elements else sum(floors.values())
    return {**floors, "both": together}


def copied_bytes(device: torch.device) -> int:
    return 2**30 if device.type == "cuda" else 2**22


def _facts(
    function: Callable[..., Any], args: Sequence[Any], reference: Sequence[Tensor], is_long: bool
) -> Row:
    """How far results and gradients are from eager code's, and the memory that a step takes."""
    found = timing.step(function, copies_of(args))
    difference = max(difference_of(a, b) for a, b in zip(found, reference, strict=True))
    del found
    facts: Row = {"difference": f"{difference:.1e}"}
    if args[0].is_cuda:
        args = copies_of(args)
        upstream = timing.upstream_of(function(*args))
        gradients = sum(arg.nbytes for arg in timing.differentiated(args))
        peak = peak_bytes(lambda: timing.step(function, args, upstream))
        facts["both_extra_mib"] = round((peak - gradients) / 2**20, 1)
        if is_long:
            with torch.no_grad():
                facts["forward_extra_mib"] = round(peak_bytes(lambda: function(*args)) / 2**20, 1)
    return facts


def difference_of(found: Tensor, reference: Tensor) -> float:
    return ((found.float() - reference.float()).norm() / reference.float().norm()).item()


def copies_of(args: Sequence[Any]) -> list[Any]:
    """Of what some functions overwrite, laid out as it is."""
    return [
        arg.detach().clone().requires_grad_()
        if arg.requires_grad and not isinstance(arg, nn.Parameter)
        else arg
        for arg in args
    ]


def row_of_failure(error: Exception) -> Row:
    traceback.print_exception(error, limit=-8)
    return {"error": _sentence(error)}


def _sentence(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def factories_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
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
