"""The first step of a process: a Llama under Inductor, under this backend with equal layers compiled once, and flat.

    python -m bench.compile_time                                   on the CPU, 4, 12 and 32 layers
    python -m bench.compile_time --device cuda --layers 16,32      on a GPU
    python -m bench.compile_time --variants stock,liger            some of the variants
    python -m bench.compile_time one VARIANT LAYERS DEVICE         one of them, in this process: a line of JSON

Each measurement has a process of its own with empty caches, and then a second one with the caches of the first; the
variants of one number of layers run one after the other. Phases are torch's own counts of its compile time, in the
first process. `first_step` is forward and backward, `warm_step` that of the second process, `step` the median of later
ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import compilation_time_metrics

import liger_compile
from bench.common import RESULTS, ROOT, file_name, machine, write_csv
from bench.rewrite_time import build

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "stock": {"backend": "inductor"},
    "liger": {"backend": "liger", "options": {"liger.outline": "auto"}},
    "flat": {"backend": "liger", "options": {"liger.outline": "off"}},
}
STEPS = 20


def one(variant: str, layers: int, device: str) -> dict[str, Any]:
    """Returns the measurement of this process, in seconds."""
    torch.manual_seed(0)
    model = build("llama", layers).to(device)
    ids = torch.randint(1024, (2, 64), device=device)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    compiled = torch.compile(loss, **VARIANTS[variant])
    first = _seconds(lambda: compiled(ids).backward(), device)
    phases = _phases()
    later = [_seconds(lambda: compiled(ids).backward(), device) for _ in range(STEPS)]
    return {"first_step": first, **phases, "step": statistics.median(later)}


def _seconds(run: Callable[[], None], device: str) -> float:
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _phases() -> dict[str, float]:
    """Returns the seconds of each phase. Inductor has the C++ compiler or Triton in it."""
    total = {name: sum(seconds) for name, seconds in compilation_time_metrics.items()}

    def of(*names: str) -> float:
        return sum(total.get(name, 0.0) for name in names)

    backend = of("OutputGraph.call_user_compiler")
    forward = of("compile_fx.<locals>.fw_compiler_base")
    traced = of("create_aot_dispatcher_function")
    return {
        "dynamo": of("_compile.compile_inner") - backend,
        "rewrite": sum(report.seconds or 0.0 for report in liger_compile.reports()),
        "aot_autograd": traced - forward,
        "inductor": forward + of("compile_fx.<locals>.bw_compiler"),
    }


def measured(variant: str, layers: int, device: str) -> dict[str, Any]:
    """Returns the measurement of `one` in a process with empty caches, and the first step of a second process."""
    command = [sys.executable, "-m", "bench.compile_time", "one", variant, str(layers), device]
    with tempfile.TemporaryDirectory() as caches:
        places = {"TORCHINDUCTOR_CACHE_DIR": caches, "TRITON_CACHE_DIR": f"{caches}/triton"}
        environment = {**os.environ, **places}
        cold, warm = (_run(command, environment) for _ in range(2))
    return {"first_step": cold.pop("first_step"), "warm_step": warm["first_step"], **cold}


def _run(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", default="4,12,32")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for layers in map(int, given.layers.split(",")):
        stock = None
        for variant in given.variants.split(","):
            found = measured(variant, layers, given.device)
            stock = found["first_step"] if variant == "stock" else stock
            ratio = {"of_stock": round(found["first_step"] / stock, 2)} if stock else {}
            row = {"layers": layers, "variant": variant}
            row |= {name: round(seconds, 4 if name == "step" else 2) for name, seconds in found.items()}
            if not rows:
                print("  ".join([*row, "of_stock"]))
            print(
                "  ".join(str(value).rjust(len(name)) for name, value in {**row, **ratio}.items()), flush=True
            )
            rows.append({**row, **ratio, **machine(given.device)})
    write_csv(file_name("compile_time", given.device), rows, given.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(sys.argv[2], int(sys.argv[3]), sys.argv[4])))
    else:
        main(sys.argv[1:])
