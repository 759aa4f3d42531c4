"""`python -m liger_compile demo`: trains a small Llama in three ways, and compares losses, time and memory.

Eager mode, stock torch.compile and backend="liger" start with the same weights and get the same batches, one after the
other, on a GPU if there is one. Needs transformers and rich: pip install "liger-compile[demo]".
"""

from __future__ import annotations

import functools
import re
import statistics
import sysconfig
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import liger_compile
from liger_compile.cli.device import device_name, peak_bytes
from liger_compile.cli.doctor import inductor_needs
from liger_compile.torch_internals import typed
from liger_compile.torch_internals.dynamo import lookup_backend

EAGER, STOCK, OURS = "eager", "torch.compile", 'backend="liger"'
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
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
    """The loss and the seconds of each step, and the peak of the bytes that the last step allocates."""

    losses: list[float]
    seconds: list[float]
    peak: int


def main(sizes: Sizes, compiler: str = "inductor") -> int:
    """Runs the demo. Returns the exit code: 0 if the losses agree and backend="liger" replaced something."""
    from rich.console import Console
    from rich.progress import track

    console = Console(highlight=False)
    if compiler == "inductor" and (missing := inductor_needs()):
        console.print(f"Inductor cannot run here: {missing}. The compiled runs use aot_eager instead.\n")
        compiler = "aot_eager"
    console.print(f"A Llama with random weights reads the source of Python on {device_name()}.\n{sizes}\n")
    settings: dict[str, dict[str, Any]] = {
        EAGER: {},
        STOCK: {"backend": lookup_backend(compiler)},  # by name, use_for_inductor() might replace it
        OURS: {"backend": "liger", "options": {"liger.inner": compiler}},
    }
    runs: dict[str, Run] = {}
    for name, given in settings.items():
        runs[name] = train(sizes, given, track(range(sizes.steps), f"{name:<15}", console=console))
    console.print("", table_of(runs), "")
    console.print(*map(str, liger_compile.reports()), "", sep="\n\n", markup=False, soft_wrap=True)
    faults = faults_in(runs, sum(report.count("replace") for report in liger_compile.reports()))
    console.print(*faults or [f"The losses agree: differences up to {BOUND:.0e} are rounding."], sep="\n")
    return 1 if faults else 0


def train(sizes: Sizes, settings: Mapping[str, Any], steps: Iterable[int]) -> Run:
    """Trains a new model. `settings` are the arguments of torch.compile, empty for eager mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.compiler.reset()
    typed.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(sizes.hidden // 64, 1),
    )
    model: Any = LlamaForCausalLM(config)
    model.to(DEVICE, DTYPE)
    compiled = typed.compile(model, **settings) if settings else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, random, run = library_tokens(sizes.vocabulary), torch.Generator().manual_seed(0), Run([], [], 0)

    def step() -> None:
        begin = time.perf_counter()
        starts = torch.randint(len(tokens) - sizes.length, (sizes.batch, 1), generator=random)
        ids = tokens[starts + torch.arange(sizes.length)].to(DEVICE)
        loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()  # pyright: ignore[reportUnknownMemberType] - torch's annotation is incomplete
        optimizer.zero_grad()
        run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - begin)

    # A profiler counts the memory of the last step, so that the time of this step does not count.
    peaks = [peak_bytes(step) if number == sizes.steps - 1 else step() for number in steps]
    return Run(run.losses, run.seconds[NUM_WARMUP:-1], peaks[-1] or 0)


@functools.cache
def library_tokens(vocabulary: int) -> torch.Tensor:
    """Returns the words and signs of Python's standard library as token ids: their hashes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return torch.tensor([zlib.crc32(word.encode()) % vocabulary for word in re.findall(r" ?\w+|\W", text)])


def table_of(runs: Mapping[str, Run]) -> Any:
    """Returns a table of some losses, time and memory, with a column for each run. The times are no benchmark."""
    from rich.table import Table

    table = Table("", *runs, box=None)
    for number, losses in enumerate(zip(*(run.losses for run in runs.values()), strict=True), start=1):
        if number <= 5 or number % 5 == 0:
            table.add_row(f"loss of step {number}", *(f"{loss:.6f}" for loss in losses))
    table.add_row(
        "largest difference from eager", *(f"{difference(run, runs[EAGER]):.1e}" for run in runs.values())
    )
    table.add_row(
        "time of a step, median", *(f"{statistics.median(run.seconds):.3f} s" for run in runs.values())
    )
    table.add_row("activations and gradients", *(f"{run.peak / 2**20:.0f} MiB" for run in runs.values()))
    return table


def difference(run: Run, eager: Run) -> float:
    """Returns the largest relative difference of a loss from that of eager mode; NaN if a loss is NaN."""
    losses, expected = (torch.tensor(each.losses, dtype=torch.float64) for each in (run, eager))
    return (losses / expected - 1).abs().max().item()


def faults_in(runs: Mapping[str, Run], num_replaced: int) -> list[str]:
    """Returns a sentence for each fault."""
    differing = [name for name, run in runs.items() if not difference(run, runs[EAGER]) <= BOUND]  # also NaN
    faults = [f"FAILED: the losses of {name} differ in more than rounding." for name in differing]
    return faults if num_replaced else [*faults, f"FAILED: {OURS} replaced nothing; the report states why."]
