"""Forward and backward of whole models of transformers: eager, stock torch.compile, liger-kernel, backend="liger".

    python -m bench.train_step --model llama-1b --tokens 4x2048
    python -m bench.train_step --model llama-1b --tokens 4x2048 --variants each     each pattern alone, and left out
    python -m bench.train_step --model tiny --tokens 2x16 --device cpu              shows that it runs

Each variant has a process of its own, with caches of its own, that builds the same model with the same weights. They
take turns, one at a time; docs/benchmarks.md says what is measured. Rows go to bench/results/train_step_<device>.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from bench.common import RESULTS, Row, file_name, machine, merge_csv, print_row
from bench.models import MODELS
from bench.process import Process, failing_into, rotated
from bench.step import (
    FLOOR,
    INDUCTOR,
    LIGER_KERNEL,
    NONE,
    OURS,
    PADDED,
    PARALLELS,
    VARIANTS,
    Case,
    Floor,
    Step,
)
from bench.timing import spread
from bench.turns import LOCK, SLOT, SLOTS

SCALE = "scale"  # what a variant's process reads instead of a number of steps
PACKAGES = ("triton", "transformers", "liger-kernel")
CASE = ("model", "layers", "tokens", "dtype", "returns", "use_cache", "attention_mask", "options", "variant")
KEYS = ("device", "torch", "transformers", *CASE)
PARALLEL = ("parallel", "processes")  # more of KEYS, in a file of their own
WIDTHS = {
    "variant": 29,
    "step_ms": 8,
    "low_ms": 8,
    "high_ms": 8,
    "forward_ms": 10,
    "peak_gib": 8,
    "compile_s": 9,
    "compile_warm_s": 14,
    "loss": 9,
    "grad_norm": 10,
    "replaced": 8,
    "marked": 6,
    "of_floor": 8,
    "time_of_inductor": 16,
    "peak_of_inductor": 16,
    "time_of_liger_kernel": 20,
    "peak_of_liger_kernel": 20,
    "error": 0,
}

SCALE_WIDTHS = {"variant": 29, "longest": 8, "sequences": 9, "length": 7, "seconds": 7, "error": 0}

GROUPS: Mapping[str, tuple[str, ...]] = {
    "core": (FLOOR, "eager", INDUCTOR, "inductor loss", LIGER_KERNEL, OURS),
    "peers": tuple(name for name in VARIANTS if not name.startswith(("only ", "without "))),
    "each": (
        INDUCTOR,
        OURS,
        *(name for name in VARIANTS if name.startswith(("only ", "without "))),
    ),
}


def serve(case: Case, variant: str) -> None:
    """A variant's process: says what `Step.first` found, then a line for each number of steps that it reads."""
    if case.parallel != NONE:
        if case.device == "cuda":
            torch.cuda.set_device(int(os.environ["RANK"]))
        dist.init_process_group("nccl" if case.device == "cuda" else "gloo")
    step = Floor(case) if variant == FLOOR else Step(case, VARIANTS[variant])
    print(json.dumps(step.first()), flush=True)
    for line in sys.stdin:
        print(json.dumps(step.scale() if line.strip() == SCALE else step.turn(int(line))), flush=True)


def started(case: Case, variant: str, folder: Path) -> Process:
    """A variant's process, or processes, with caches of their own in `folder`."""
    variables = {
        LOCK: str(folder.parent / "lock"),
        SLOT: str(tuple(VARIANTS).index(variant) % SLOTS),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    if case.parallel != NONE:  # these wait for one another, and must not for those of other variants
        del variables[LOCK]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        variables.update(address, WORLD_SIZE=str(case.processes))
    described = json.dumps(dataclasses.asdict(case))
    command = [sys.executable, "-m", "bench.train_step", "serve", described, variant]
    return Process(command, variables, folder, case.processes)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bench.train_step", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--tokens", required=True, help="batch x length, such as 4x2048")
    parser.add_argument("--layers", type=int, help="instead of the model's")
    parser.add_argument("--variants", default="core", help=f"with commas between; or {', '.join(GROUPS)}")
    parser.add_argument(
        "--returns", choices=("model", "loss"), default="model", help="of the compiled function"
    )
    parser.add_argument(
        "--use-cache", choices=("off", "default"), default="off", help="the argument of the model"
    )
    parser.add_argument(
        "--attention-mask",
        choices=("none", *PADDED),
        default="none",
        help="ones, or padding at the end of rows",
    )
    parser.add_argument("--options", default="{}", help='more options for backend="liger", in JSON')
    parser.add_argument(
        "--parallel", choices=(NONE, *PARALLELS), default=NONE, help="several processes, with a GPU each"
    )
    parser.add_argument("--processes", type=int, help="that share the work, 2 if there are any")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="measured in a turn")
    parser.add_argument("--warm", action="store_true", help="also compile again from the caches")
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="compile all at the same time; they still take turns to be measured",
    )
    parser.add_argument(
        "--scale", action="store_true", help="instead: the longest sequence and the largest batch that fit"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.scale and chosen.parallel != NONE:
        parser.error("expected --scale or --parallel, got both: a size that fits is found in one process")
    chosen.processes = 1 if chosen.parallel == NONE else (chosen.processes or 2)
    case = Case(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Case)})
    names = [n for part in chosen.variants.split(",") for n in GROUPS.get(part, (part,))]
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"expected variants of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    if chosen.scale or chosen.parallel != NONE:  # of which there is no floor
        names = [name for name in names if name != FLOOR]

    if chosen.scale:
        found = scaled(case, list(dict.fromkeys(names)))
        rows = [
            {**_described(case, name), **row, **machine(case.device, PACKAGES)} for name, row in found.items()
        ]
        for row in rows:
            print_row(row, SCALE_WIDTHS, header=row is rows[0])
        merge_csv(file_name("scale", case.device), rows, KEYS, chosen.out)
        return

    print(f"{case.model}, {case.tokens} tokens, returns {case.returns}", flush=True)
    facts = measure(
        case, list(dict.fromkeys(names)), chosen.rounds, chosen.steps, chosen.warm, chosen.at_once
    )
    rows = [
        {**_described(case, name), **fact, **_ratios(fact, facts), **machine(case.device, PACKAGES)}
        for name, fact in facts.items()
    ]
    for row in rows:
        print_row(row, WIDTHS, header=row is rows[0])
    if case.parallel == NONE:
        merge_csv(file_name("train_step", case.device), rows, KEYS, chosen.out)
        return
    rows = [{**{key: getattr(case, key) for key in PARALLEL}, **row} for row in rows]
    merge_csv(file_name("parallel", case.device), rows, (*PARALLEL, *KEYS), chosen.out)


def measure(
    case: Case, names: Sequence[str], rounds: int, steps: int, warm: bool, at_once: bool
) -> dict[str, Row]:
    """What was found of each variant, in the columns of the CSV."""
    facts: dict[str, Row] = {}
    samples: dict[str, Row] = {name: {"step_ms": [], "forward_ms": []} for name in names}
    with tempfile.TemporaryDirectory() as name_of_folder, contextlib.ExitStack() as opened:
        folder = Path(name_of_folder)

        def start(name: str) -> Process:
            process = started(case, name, folder / name.replace(" ", "_"))
            opened.callback(process.close)
            return process

        def ready(name: str, process: Process) -> Row:
            begin = time.perf_counter()
            found = process.answer()
            print(f"  {name}: ready after {time.perf_counter() - begin:.0f} s, {found}", flush=True)
            return found

        processes = {name: start(name) for name in names} if at_once else {}
        for name in names:
            with failing_into(facts, name):
                if not at_once:
                    processes[name] = start(name)
                facts[name] = ready(name, processes[name])
                if at_once:
                    facts[name].pop("compile_s", None)  # with others on the same cores
            if "error" in facts[name]:
                processes.pop(name, None)
        for round_ in range(rounds):
            for name in rotated(list(processes), round_):
                with failing_into(facts, name):
                    processes[name].ask(steps)
                    for key, values in processes[name].answer().items():
                        samples[name][key] += values
                if "error" in facts[name]:
                    processes.pop(name, None)
        opened.close()  # their memory
        for name in list(processes) if warm else ():
            if VARIANTS[name].compile is not None:
                with failing_into(facts, name):
                    process = start(name)
                    facts[name]["compile_warm_s"] = ready(name, process)["compile_s"]
                    process.close()
    for name, fact in facts.items():
        if "error" not in fact:
            median, low, high = spread(samples[name]["step_ms"])
            fact["step_ms"], fact["low_ms"], fact["high_ms"] = round(median, 2), round(low, 2), round(high, 2)
            fact["forward_ms"] = round(spread(samples[name]["forward_ms"])[0], 2)
            fact["rounds"] = len(samples[name]["step_ms"])
    return facts


def scaled(case: Case, names: Sequence[str]) -> dict[str, Row]:
    """What `Step.scale` found, of one variant after the other: each has the GPU to itself."""
    facts: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with failing_into(facts, name), contextlib.ExitStack() as opened:
                process = started(case, name, Path(folder) / name.replace(" ", "_"))
                opened.callback(process.close)
                begin = time.perf_counter()
                process.answer()
                process.ask(SCALE)
                facts[name] = process.answer()
                facts[name]["seconds"] = round(time.perf_counter() - begin)
                print(f"  {name}: {facts[name]}", flush=True)
    return facts


def _described(case: Case, name: str) -> Row:
    """The columns that say what was measured."""
    row = {key: getattr(case, key, "") for key in CASE}
    layers = MODELS[case.model].sizes["num_hidden_layers"] if case.layers is None else case.layers
    is_ours = (VARIANTS[name].compile or {}).get("backend") == "liger"
    return {
        **row,
        "layers": layers,
        "dtype": str(case.dtype).removeprefix("torch."),
        "returns": VARIANTS[name].returns or case.returns,
        "options": case.options if is_ours else "{}",
        "variant": name,
    }


def _ratios(fact: Row, facts: Mapping[str, Row]) -> Row:
    """Time and peak memory as shares of those of two peers in the same run, and times the floor."""
    floor = facts.get(FLOOR, {}).get("step_ms")
    shares: Row = {"of_floor": round(fact["step_ms"] / floor, 3) if floor and "step_ms" in fact else ""}
    for peer in (INDUCTOR, LIGER_KERNEL):
        other = facts.get(peer, {})
        for column, key in (("time", "step_ms"), ("peak", "peak_gib")):
            mine, theirs = fact.get(key), other.get(key)
            name = f"{column}_of_{peer.replace('-', '_')}"
            shares[name] = round(mine / theirs, 3) if mine and theirs else ""
    return shares


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Case(**json.loads(sys.argv[2])), sys.argv[3])
    else:
        main()
