"""A whole training run under FSDP2: stock torch.compile, liger-kernel and backend="liger", one after the other.

    python -m bench.training_run --layers 8      Llama-3.2-1B's widths, 300 steps on two GPUs
    python -m bench.training_run --device cpu --model tiny --batch 2x16 --steps 3 --save-every 1 --compiler aot_eager

AdamW over the Python standard library's source, as in bench.convergence; each process takes other sequences. The state
is saved every `--save-every` steps. At a save after about two thirds of the steps the processes end, and new ones go on
from what was saved, with the caches of the first. The wall clock runs from the start of the first process to the end of
the last.

- `wall_s`: all of that, with imports, compilation, saving and loading. `wall_rate`: tokens of all processes, by it.
- `tokens_per_s`: the median over windows of WINDOW steps, without those that compile or save.
- `peak_gib`: the highest allocated memory of the first process, with its weights and the state of the optimizer.
- `first_s`, `again_s`: the first step of the first and of the second start.
- `difference`: the mean distance of the loss curve from that of the first variant.

Rows go to bench/results/training_run_<device>.csv, the curves to training_curve_<device>.csv.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from bench.common import RESULTS, ROOT, Row, file_name, machine, merge_csv, print_row
from bench.convergence import Vocabulary, library_source
from bench.models import MODELS
from bench.step import FSDP, INDUCTOR, LIGER_KERNEL, OURS, VARIANTS, Case, parallelized, patch
from bench.train_step import PACKAGES

LEARNING_RATE, WARMUP_STEPS = 3e-4, 20
WINDOW = 10  # steps between two looks at the clock, each of which waits for the GPU
KEYS = ("device", "torch", "transformers", "model", "layers", "batch", "steps", "processes", "variant")
WIDTHS = {
    "variant": 14,
    "wall_s": 7,
    "wall_rate": 9,
    "tokens_per_s": 12,
    "of_first": 8,
    "peak_gib": 8,
    "first_s": 7,
    "again_s": 7,
    "first_loss": 10,
    "last_loss": 9,
    "difference": 10,
}


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    if given.worker:
        _work(given)
        return
    known = {name: getattr(given, name) for name in ("model", "batch", "steps", "processes")}
    known["layers"] = given.layers or MODELS[given.model].sizes["num_hidden_layers"]
    where = machine(given.device, PACKAGES)
    rows: list[Row] = []
    base: list[float] = []
    for variant in given.variants.split(","):
        found, losses = _run(variant, given)
        rows.append({**known, "variant": variant, **found, **where})
        base = base or losses
        rows[-1]["of_first"] = round(found["tokens_per_s"] / rows[0]["tokens_per_s"], 3)
        rows[-1]["difference"] = round(
            statistics.fmean(abs(a - b) for a, b in zip(losses, base, strict=True)), 5
        )
        curve = [
            {**known, "variant": variant, "step": at, "loss": loss, **where} for at, loss in enumerate(losses)
        ]
        print_row(rows[-1], WIDTHS, header=len(rows) == 1)
        merge_csv(file_name("training_run", given.device), rows[-1:], KEYS, given.out)
        merge_csv(file_name("training_curve", given.device), curve, (*KEYS, "step"), given.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench.training_run")
    parser.add_argument("--model", choices=MODELS, default="llama-1b")
    parser.add_argument("--layers", type=int, help="other than the model's")
    parser.add_argument("--batch", default="4x2048", help="batch x length of a process")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2, help="with a GPU each")
    parser.add_argument("--variants", default=",".join((INDUCTOR, LIGER_KERNEL, OURS)))
    parser.add_argument("--compiler", default=INDUCTOR, help="of torch.compile, and behind backend='liger'")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument(
        "--worker", help=argparse.SUPPRESS
    )  # variant, first step, last step, folder of the state
    return parser


def _run(variant: str, given: argparse.Namespace) -> tuple[Row, list[float]]:
    """Returns the figures and the loss curve of a variant, whose processes are started twice."""
    batch, length = map(int, given.batch.split("x"))
    middle = max(given.steps * 2 // 3 // given.save_every * given.save_every, given.save_every)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        parts = ((0, min(middle, given.steps)), (middle, given.steps))
        legs = [_leg(variant, given, part, folder) for part in parts if part[0] < part[1]]
        wall = time.perf_counter() - begin
    losses = [loss for leg in legs for loss in leg["losses"]]
    tokens = batch * length * given.processes
    seconds = statistics.median(window for leg in legs for window in leg["windows"])
    row = {
        "wall_s": round(wall, 1),
        "wall_rate": round(tokens * given.steps / wall),
        "tokens_per_s": round(tokens / seconds),
        "peak_gib": round(max(leg["peak"] for leg in legs) / 2**30, 2),
        "first_s": round(legs[0]["first"], 1),
        "again_s": round(legs[-1]["first"], 1) if len(legs) > 1 else "",
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }
    return row, losses


def _leg(variant: str, given: argparse.Namespace, steps: tuple[int, int], folder: str) -> dict[str, Any]:
    """Returns the answer of the first process, after all processes have ended."""
    worker = json.dumps([variant, *steps, folder])
    named = ("model", "batch", "save_every", "processes", "compiler", "device")
    more = [part for name in named for part in (f"--{name.replace('_', '-')}", str(getattr(given, name)))]
    layers = [] if given.layers is None else ["--layers", str(given.layers)]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(given.processes),
    ]
    command = [*launch, "-m", "bench.training_run", *more, *layers, "--worker", worker]
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/caches", "TRITON_CACHE_DIR": f"{folder}/triton"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **caches}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{variant}, steps {steps}, failed:\n{done.stderr[-4000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def _work(given: argparse.Namespace) -> None:
    """Trains from one step to another, in one process of several; the first prints the figures."""
    variant, begin, end, folder = json.loads(given.worker)
    is_gpu = given.device == "cuda"
    if is_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if is_gpu else "gloo")
    try:
        found = _train(variant, begin, end, Path(folder), given)
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
    finally:
        dist.destroy_process_group()


def _train(variant: str, begin: int, end: int, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    case = Case(
        given.model, given.batch, given.layers, device=given.device, parallel=FSDP, processes=given.processes
    )
    chosen, device = VARIANTS[variant], torch.device(given.device)
    if chosen.patched:
        patch(MODELS[case.model].family)
    model: Any = parallelized(MODELS[case.model].build(device, case.dtype, case.layers), case)
    function = model
    if chosen.compile is not None:
        ours = {"liger.inner": given.compiler} if variant == OURS else None
        backend = "liger" if variant == OURS else given.compiler
        function = torch.compile(model, backend=backend, options=ours)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=device.type == "cuda")
    if begin:
        _load(model, optimizer, folder / str(begin))
    batches = Batches(given.model, given.batch, device)
    losses: list[torch.Tensor] = []
    windows: list[float] = []
    first = mark = 0.0
    start = time.perf_counter()
    for step in range(begin, end):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
        ids = batches.of_step(step)
        loss = function(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        done = step + 1 - begin
        if done == 1 or done % min(WINDOW, given.save_every) == 0:
            now = _clock(device)
            first = first or now - start
            if done > 1 and mark:
                windows.append((now - mark) / min(WINDOW, given.save_every))
            mark = now
        if (step + 1) % given.save_every == 0:
            _save(model, optimizer, folder / str(step + 1))
            mark = _clock(device)
    curve = torch.stack(losses).float()
    dist.all_reduce(curve)
    return {
        "losses": (curve / dist.get_world_size()).tolist(),
        "windows": windows or [(_clock(device) - start) / (end - begin)],
        "first": first,
        "peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Batches:
    """Random sequences of the text, other ones in each process, the same for a step in each run."""

    def __init__(self, model: str, batch: str, device: torch.device) -> None:
        text = library_source()
        self._tokens = torch.tensor(Vocabulary(text, MODELS[model].sizes["vocab_size"]).encode(text))
        self._batch, self._length = map(int, batch.split("x"))
        self._device = device

    def of_step(self, step: int) -> torch.Tensor:
        """Returns token ids (batch, length) of this process."""
        random = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        starts = torch.randint(len(self._tokens) - self._length, (self._batch, 1), generator=random)
        return self._tokens[starts + torch.arange(self._length)].to(self._device)


def _save(model: Any, optimizer: Any, folder: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def _load(model: Any, optimizer: Any, folder: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


if __name__ == "__main__":
    main()
