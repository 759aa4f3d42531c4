"""One process of the demo: trains one variant, and prints its measurements as lines of JSON for the parent.

demo.py runs it as `python -m liger_compile.cli.demo_process VARIANT FOLDER`; the folder has sizes and tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NUM_WARMUP = 3  # steps that compile, create the optimizer's state and warm up the allocator; not measured


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model and of the training run."""

    steps: int = 36
    hidden: int = 256
    layers: int = 3
    batch: int = 8
    length: int = 256
    vocabulary: int = 10_240


@dataclass(frozen=True)
class Run:
    """The measurements of one process."""

    losses: list[float]
    first_seconds: float  # the first step, with compilation
    step_seconds: float  # median after the warm-up
    peak_bytes: int  # above the memory that stays in use between steps
    report: str = ""
    num_replaced: int = 0


def loss_fn(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Returns the loss of a model of transformers on token ids (batch, length)."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train(variant: str, folder: Path) -> None:
    """Trains one variant on the tokens in `folder`."""
    settings = json.loads((folder / "settings.json").read_text())
    sizes, compiler = Sizes(**settings["sizes"]), settings["compiler"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute_loss = loss_fn
    if variant == "torch.compile":
        compute_loss = torch.compile(loss_fn, backend=compiler)
    if variant == "liger":
        compute_loss = torch.compile(loss_fn, backend="liger", options={"liger.inner": compiler})

    torch.manual_seed(0)
    model = _llama(sizes).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.load(folder / "tokens.pt")
    random = torch.Generator().manual_seed(0)
    memory = _Memory(device)
    losses: list[float] = []
    seconds: list[float] = []
    for step in range(sizes.steps):
        starts = torch.randint(len(tokens) - sizes.length, (sizes.batch, 1), generator=random)
        ids = tokens[starts + torch.arange(sizes.length)].to(device)
        if step == NUM_WARMUP:
            memory.start()
        begin = time.perf_counter()
        loss = compute_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        _tell(step=step + 1, loss=losses[-1])

    run = Run(losses, seconds[0], statistics.median(seconds[NUM_WARMUP:] or seconds[-1:]), memory.peak())
    if variant == "liger":
        from liger_compile.report import reports

        text = "\n\n".join(map(str, reports()))
        run = dataclasses.replace(run, report=text, num_replaced=sum(r.count("replace") for r in reports()))
    _tell(run=dataclasses.asdict(run))


def _llama(sizes: Sizes) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(sizes.hidden // 64, 1)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=sizes.length,
    )
    return LlamaForCausalLM(config)


def _tell(**message: Any) -> None:
    print(json.dumps(message), flush=True)


class _Memory:
    """Measures the peak memory since start(), above the memory that is in use at start(), between two steps."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._base = self._highest()

    def start(self) -> None:
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        # Compilation leaves freed memory in malloc: return it, and reset Linux's high-water mark to the current
        # resident memory. On other systems the reported peak includes that of compilation.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._base = self._highest()

    def peak(self) -> int:
        return self._highest() - self._base

    def _highest(self) -> int:
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated()
        with contextlib.suppress(OSError):
            return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
