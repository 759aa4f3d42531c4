"""How long the rewrite takes, beside the whole compile, and how it grows with layers. On the CPU.

    python -m bench.rewrite_time                          all, and bench/results/rewrite_time_cpu.csv
    python -m bench.rewrite_time gemma3n=4 llama=8        compiled as a whole at so many layers, which takes less time
    python -m bench.rewrite_time one MODEL LAYERS INNER   one of them, in this process: a line of JSON

`llama` is what most models are like. `gemma3n` is among the largest graphs of the zoo's families: it has more nodes in
a layer than most, norms that are near misses, and is given a padding mask, for which two graphs are rewritten and
compiled, with and without padding. `hrm_text` runs its layers several times and is the largest single graph.

The whole compile is the first forward and backward of a fresh process with empty caches, less a later one: Dynamo,
the rewrite, AOTAutograd, Inductor and the C++ compiler. The rewrite is GraphReport.seconds, of both graphs where there
are two: terms to rewritten graph.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers

import liger_compile
from bench.common import ROOT, machine, write_csv

LAYERS = (2, 4, 8, 16, 32)
COMPILED = {"gemma3n": 32, "hrm_text": 32, "llama": 16}  # the whole of it, at so many layers
REPEATS = 3
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def measure(model: str, layers: int, inner: str) -> dict[str, Any]:
    """The measurement of `one`, in a process of its own with empty caches."""
    command = [sys.executable, "-m", "bench.rewrite_time", "one", model, str(layers), inner]
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def build(name: str, layers: int) -> torch.nn.Module:
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=layers))
    if name == "hrm_text":
        return transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**SIZES, num_hidden_layers=layers))
    config = transformers.Gemma3nTextConfig(
        **SIZES,
        num_hidden_layers=layers,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        activation_sparsity_pattern=[0.0] * layers,
        num_kv_shared_layers=0,
        laurel_rank=16,
        hidden_size_per_layer_input=64,
        vocab_size_per_layer_input=SIZES["vocab_size"],
    )
    return transformers.Gemma3nForCausalLM(config)


def masks(name: str, shape: tuple[int, int]) -> list[torch.Tensor | None]:
    """The padding masks of the calls: one for each graph."""
    if name != "gemma3n":
        return [None]
    padded = torch.ones(shape, dtype=torch.int64)
    padded[0, :5] = 0
    return [torch.ones(shape, dtype=torch.int64), padded]


def one(name: str, layers: int, inner: str) -> dict[str, Any]:
    model = build(name, layers)
    ids = torch.randint(SIZES["vocab_size"], (2, 64))
    options = {"liger.inner": inner, "liger.strict": True}

    def loss_fn(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss

    def steps() -> float:
        begin = time.perf_counter()
        for mask in masks(name, ids.shape):
            compiled(ids, mask).backward()
        return time.perf_counter() - begin

    def seconds() -> float:
        return sum(report.seconds for report in liger_compile.reports())

    # The first rewrite of a process also imports what it needs, so its time belongs to the whole compile only.
    compiled = torch.compile(loss_fn, backend="liger", options=options)
    first, later = steps(), steps()
    reports, cold = liger_compile.reports(), seconds()
    warm = []
    for _ in range(REPEATS if inner == "eager" else 0):
        torch.compiler.reset()
        liger_compile.clear_reports()
        compiled = torch.compile(loss_fn, backend="liger", options=options)
        steps()
        warm.append(seconds())
    return {
        "graphs": len(reports),
        "nodes": sum(report.num_nodes for report in reports),
        "replaced": sum(report.count("replace") for report in reports),
        "near_misses": sum(len(report.near_misses) for report in reports),
        "rewrite": cold,
        "rewrite_again": min(warm, default=None),
        "compile": first - later,
    }


def main(whole: Mapping[str, int]) -> None:
    rows: list[dict[str, Any]] = []
    for model, compiled_layers in whole.items():
        before: dict[str, Any] | None = None
        for layers in LAYERS:
            alone = measure(model, layers, "eager")
            cold = measure(model, layers, "inductor") if layers == compiled_layers else None
            row = {
                "model": model,
                "layers": layers,
                **{key: alone[key] for key in ("graphs", "nodes", "replaced", "near_misses")},
                "rewrite_s": round(alone["rewrite_again"], 3),
                "added_ms_per_layer": "",
                "cold_rewrite_s": round(cold["rewrite"], 3) if cold else "",
                "cold_compile_s": round(cold["compile"], 1) if cold else "",
                "share_percent": round(100 * cold["rewrite"] / cold["compile"], 2) if cold else "",
            }
            if before:
                added = row["rewrite_s"] - before["rewrite_s"]
                row["added_ms_per_layer"] = round(1000 * added / (layers - before["layers"]), 1)
            if not rows:
                print("  ".join(row))
            print("  ".join(str(value).rjust(len(key)) for key, value in row.items()), flush=True)
            rows.append({**row, **machine()})
            write_csv("rewrite_time_cpu.csv", rows)
            before = row


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(sys.argv[2], int(sys.argv[3]), sys.argv[4])))
    else:
        given = (argument.split("=") for argument in sys.argv[1:])
        main({**COMPILED, **{model: int(layers) for model, layers in given}})
