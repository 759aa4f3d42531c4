"""How long the rewrite takes, beside the whole compile, and how it grows with layers. Llamas, on the CPU.

    python -m bench.rewrite_time                    all, and bench/results/rewrite_time_cpu.csv
    python -m bench.rewrite_time one LAYERS INNER   one of them, in this process: a line of JSON

The whole compile is the first forward and backward of a fresh process with empty caches, less a later one: Dynamo,
the rewrite, AOTAutograd, Inductor and the C++ compiler. The rewrite is GraphReport.seconds: terms to rewritten graph.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

import liger_compile
from bench.common import ROOT, machine, write_csv

LAYERS = (2, 4, 8, 16, 32)
COMPILED = (16,)  # the whole of it; the others are rewritten only
REPEATS = 3


def measure(layers: int, inner: str) -> dict[str, Any]:
    """The measurement of `one`, in a process of its own with empty caches."""
    command = [sys.executable, "-m", "bench.rewrite_time", "one", str(layers), inner]
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def one(layers: int, inner: str) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(config.vocab_size, (2, 64))
    options = {"liger.inner": inner, "liger.strict": True}

    def loss_fn(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def step() -> float:
        begin = time.perf_counter()
        compiled(ids).backward()
        return time.perf_counter() - begin

    # The first rewrite of a process also imports what it needs, so its time belongs to the whole compile only.
    compiled = torch.compile(loss_fn, backend="liger", options=options)
    first, later = step(), step()
    cold = liger_compile.reports()[-1]
    warm = []
    for _ in range(REPEATS if inner == "eager" else 0):
        torch._dynamo.reset()
        compiled = torch.compile(loss_fn, backend="liger", options=options)
        step()
        warm.append(liger_compile.reports()[-1].seconds)
    return {
        "nodes": cold.num_nodes,
        "replaced": cold.count("replace"),
        "rewrite": cold.seconds,
        "rewrite_again": min(warm, default=None),
        "compile": first - later,
    }


def main() -> None:
    rows: list[dict[str, Any]] = []
    for layers in LAYERS:
        alone = measure(layers, "eager")
        cold = measure(layers, "inductor") if layers in COMPILED else None
        row = {
            "layers": layers,
            "nodes": alone["nodes"],
            "replaced": alone["replaced"],
            "rewrite_s": round(alone["rewrite_again"], 3),
            "added_ms_per_layer": "",
            "cold_rewrite_s": round(cold["rewrite"], 3) if cold else "",
            "cold_compile_s": round(cold["compile"], 1) if cold else "",
            "share_percent": round(100 * cold["rewrite"] / cold["compile"], 2) if cold else "",
        }
        if rows:
            added = row["rewrite_s"] - rows[-1]["rewrite_s"]
            row["added_ms_per_layer"] = round(1000 * added / (layers - rows[-1]["layers"]), 1)
        if not rows:
            print("  ".join(row))
        print("  ".join(str(value).rjust(len(key)) for key, value in row.items()), flush=True)
        rows.append({**row, **machine()})
    write_csv("rewrite_time_cpu.csv", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(int(sys.argv[2]), sys.argv[3])))
    else:
        main()
