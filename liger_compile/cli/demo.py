"""`python -m liger_compile demo`: trains a small Llama in three ways, and compares losses, time and memory.

Eager mode, stock torch.compile and backend="liger" start with the same weights and get the same batches, one after the
other, on a GPU if there is one. Needs transformers and rich: pip install "liger-compile[demo]".
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import liger_compile
from liger_compile.cli.doctor import inductor_needs

EAGER, STOCK, OURS = "eager", "torch.compile", 'backend="liger"'
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The largest relative difference of a loss that counts as rounding. In float32 stock torch.compile stays within 3e-7 of
# eager over 40 steps (two cores, torch 2.13). In bfloat16 a rounding is 4e-3, and every step rounds the weights.
BOUND = 5e-2 if DEVICE == "cuda" else 1e-5
NUM_WARMUP = 3  # steps that compile and allocate the optimizer's state; their time does not count


class Sizes(NamedTuple):
    """The sizes of the model and of the run."""

    steps: int = 36
    hidden: int = 256
    layers: int = 3
    batch: int = 32 if DEVICE == "cuda" else 8  # on a GPU, a loss of few logits is left to Inductor
    length: int = 256
    vocabulary: int = 10_240


class Run(NamedTuple):
    """The loss of each step, the median time of a step, and the peak of the bytes that a step allocates."""

    losses: list[float]
    seconds: float
    peak_bytes: int


def main(sizes: Sizes, compiler: str = "inductor") -> int:
    """Runs the demo. Returns the exit code: 0 if the losses agree and backend="liger" replaced something."""
    from rich.console import Console
    from rich.progress import track

    console = Console(highlight=False)
    if compiler == "inductor" and (missing := inductor_needs()):
        console.print(f"Inductor cannot run here: {missing}. The compiled runs use aot_eager instead.\n")
        compiler = "aot_eager"
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(
        f"Model  LlamaForCausalLM of transformers, {sizes.layers} layers of width {sizes.hidden}, random weights\n"
        f"Text   the source of Python's standard library, with a vocabulary of {sizes.vocabulary:,}\n"
        f"Run    {sizes.steps} steps of AdamW, each with {sizes.batch} x {sizes.length} tokens, on {device}\n"
    )
    calls = {
        EAGER: {},
        STOCK: {"backend": compiler},
        OURS: {"backend": "liger", "options": {"liger.inner": compiler}},
    }
    tokens, runs = library_tokens(sizes.vocabulary), {}
    for name, call in calls.items():
        runs[name] = train(sizes, tokens, call, track(range(sizes.steps), f"{name:<15}", console=console))
    reports = liger_compile.reports()
    console.print(
        "", table_of(runs), "The memory is that of activations and gradients. The times are no benchmark.\n"
    )
    console.print(f"The report of {OURS}:\n")
    console.print("\n\n".join(map(str, reports)), "", sep="\n", markup=False, soft_wrap=True)
    faults, differences = faults_in(runs, sum(report.count("replace") for report in reports))
    console.print(
        *faults,
        f"The losses differ from eager mode's by at most {differences}. {BOUND:.0e} is rounding.",
        sep="\n",
    )
    return 1 if faults else 0


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Returns the loss of a model of transformers on token ids (batch, length)."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train(sizes: Sizes, tokens: torch.Tensor, call: Mapping[str, Any], steps: Iterable[int]) -> Run:
    """Trains a new model. `call` is the arguments of torch.compile, empty for eager mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.compiler.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(sizes.hidden // 64, 1),
    )
    model: Any = LlamaForCausalLM(config)
    model.to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    compute_loss = torch.compile(loss_of, **call) if call else loss_of
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    random = torch.Generator().manual_seed(0)
    losses, seconds, peak = [], [], 0

    def step() -> None:
        starts = torch.randint(len(tokens) - sizes.length, (sizes.batch, 1), generator=random)
        loss = compute_loss(model, tokens[starts + torch.arange(sizes.length)].to(DEVICE))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    for number in steps:
        begin = time.perf_counter()
        if number == sizes.steps - 1:  # its time does not count, since a profiler makes a step slower
            peak = peak_of(step)
        else:
            step()
            seconds.append(time.perf_counter() - begin)
    return Run(losses, statistics.median(seconds[NUM_WARMUP:]), peak)


def peak_of(step: Callable[[], None]) -> int:
    """Returns the peak of the bytes that tensors take in a step, above what is allocated before it."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def library_tokens(vocabulary: int) -> torch.Tensor:
    """Returns the source of the standard library as token ids: frequent words and signs; 0 is all other text."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    pieces = re.findall(r" ?\w+|\s+|[^\w\s]+", text)
    ids = {piece: i for i, (piece, _) in enumerate(Counter(pieces).most_common(vocabulary - 1), start=1)}
    return torch.tensor([ids.get(piece, 0) for piece in pieces])


def table_of(runs: Mapping[str, Run]) -> Any:
    """Returns a table of losses, time and memory, with a column for each run."""
    from rich.table import Table

    table = Table("", *runs, box=None)
    for number, losses in enumerate(zip(*(run.losses for run in runs.values()), strict=True), start=1):
        table.add_row(f"loss of step {number}", *(f"{loss:.6f}" for loss in losses))
    table.add_row("time of a step, median", *(f"{run.seconds:.3f} s" for run in runs.values()))
    table.add_row("peak memory of a step", *(f"{run.peak_bytes / 2**20:.0f} MiB" for run in runs.values()))
    return table


def faults_in(runs: Mapping[str, Run], num_replaced: int) -> tuple[list[str], str]:
    """Returns a sentence for each fault, and the largest relative differences of the losses in words."""
    faults = (
        [] if num_replaced else [f"FAILED: {OURS} replaced nothing in this model; the report states why."]
    )
    expected, shown = torch.tensor(runs[EAGER].losses, dtype=torch.float64), []
    for name in (STOCK, OURS):
        losses = torch.tensor(runs[name].losses, dtype=torch.float64)
        difference = (losses / expected - 1).abs().max().item()
        shown.append(f"{difference:.1e} ({name})")
        if not difference <= BOUND:  # also NaN
            faults.append(f"FAILED: the losses of {name} differ by more than rounding explains.")
    return faults, " and ".join(shown)
