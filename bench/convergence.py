"""Loss curves of a small Llama on real text: backend="liger" against eager code, and what rounding alone does.

    python -m bench.convergence                              200 steps in bfloat16, about a minute on one GPU
    python -m bench.convergence --device cpu --model tiny --steps 3 --batch 2x16 --compiler aot_eager

All runs take AdamW over the same batches of the Python standard library's source. How far two curves may be apart is
measured, not chosen:

    eager                  what the others are compared with
    eager, nudged          the same weights, each moved by a unit of rounding, down, up or not: what rounding grows to
    eager, other weights   drawn with another seed: the noise between two runs that nobody would call different

Ends with 1 if backend="liger" is further from eager, in the mean over the steps, than eager with other weights is.
Rows go to bench/results/convergence_<device>.csv; bench.plot draws them.
"""

from __future__ import annotations

import argparse
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import liger_compile
from bench.common import RESULTS, Row, file_name, machine, merge_csv, print_row
from bench.models import MODELS
from bench.train_step import PACKAGES

EAGER, NUDGED, OTHER_WEIGHTS, OURS = "eager", "eager, nudged", "eager, other weights", "liger-compile"
KEYS = ("device", "torch", "transformers", "model", "batch", "dtype", "run", "step")
WIDTHS = {
    "run": 21,
    "first_loss": 10,
    "last_loss": 9,
    "mean_difference": 15,
    "max_difference": 14,
    "of_nudged": 9,
    "of_other_weights": 16,
    "seconds": 7,
}
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Run:
    """compile: arguments of torch.compile; None is eager."""

    compile: Mapping[str, Any] | None = None
    seed: int = 0
    is_nudged: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.convergence")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", default="16x512", help="batch x length")
    parser.add_argument("--compiler", default="inductor", help="of torch.compile, and behind backend='liger'")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    runs = {
        EAGER: Run(),
        NUDGED: Run(is_nudged=True),
        OTHER_WEIGHTS: Run(seed=1),
        "inductor": Run({"backend": chosen.compiler}),
        OURS: Run({"backend": "liger", "options": {"liger.inner": chosen.compiler}}),
    }
    text = library_source()
    tokens = torch.tensor(Vocabulary(text, MODELS[chosen.model].sizes["vocab_size"]).encode(text))
    print(
        f"{chosen.model}, {chosen.steps} steps of {chosen.batch} of {len(tokens):,} tokens, {dtype}",
        flush=True,
    )
    curves, seconds = {}, {}
    for name, run in runs.items():
        begin = time.perf_counter()
        curves[name] = train(run, chosen.model, chosen.batch, chosen.steps, tokens, device, dtype)
        seconds[name] = round(time.perf_counter() - begin, 1)
    (report, *_), replaced = liger_compile.reports(), sum(r.count("replace") for r in liger_compile.reports())
    print(f"{report}\n\nsites replaced: {replaced}\n")

    where = machine(chosen.device, PACKAGES)
    known = {"model": chosen.model, "batch": chosen.batch, "dtype": str(dtype).removeprefix("torch.")}
    rows: list[Row] = [
        {**known, "run": name, "step": step, "loss": round(loss, 6), **where}
        for name, losses in curves.items()
        for step, loss in enumerate(losses)
    ]
    merge_csv(file_name("convergence", chosen.device), rows, KEYS, chosen.out)
    found = compared(curves)
    for name, row in found.items():
        print_row({"run": name, **row, "seconds": seconds[name]}, WIDTHS, header=name == EAGER)
    is_noise = found[OURS]["mean_difference"] <= found[OTHER_WEIGHTS]["mean_difference"]
    print(
        f"backend='liger' is {'within' if is_noise else 'BEYOND'} the noise between two seeds of eager code"
    )
    return 0 if is_noise and replaced else 1


class Vocabulary:
    """The most frequent words, runs of punctuation and runs of blanks of a text; all other text as bytes."""

    _PIECE = re.compile(r" ?(?:[A-Z]?[a-z]+|[A-Z]+|\d|[^\w\s]+)|\s+|.")

    def __init__(self, text: str, size: int) -> None:
        frequent = Counter(self._PIECE.findall(text)).most_common(size - 256)
        self._ids = {piece: 256 + rank for rank, (piece, _) in enumerate(frequent)}
        self._pieces = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece, _ in frequent]

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        ids: list[int] = []
        for piece in self._PIECE.findall(text):
            known = self._ids.get(piece)
            ids.extend(piece.encode() if known is None else (known,))
        return ids

    def decode(self, ids: list[int]) -> str:
        """Returns the text of token ids."""
        return b"".join(self._pieces[i] for i in ids).decode()


def library_source() -> str:
    """Returns some million characters of text that every Python has: the modules of its standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def train(
    run: Run,
    model: str,
    batch: str,
    steps: int,
    tokens: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> list[float]:
    """The loss of each step."""
    torch.compiler.reset()
    liger_compile.clear_reports()
    trained: Any = MODELS[model].build(device, dtype, seed=run.seed)
    if run.is_nudged:
        nudge(trained)
    function = trained if run.compile is None else torch.compile(trained, **run.compile)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE)
    sequences, length = map(int, batch.split("x"))
    random = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (sequences, 1), generator=random)
        ids = tokens[starts + torch.arange(length)].to(device)
        loss = function(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@torch.no_grad()
def nudge(model: torch.nn.Module) -> None:
    """Moves each weight by about a unit of its rounding: down, up, or not."""
    for parameter in model.parameters():
        random = torch.Generator(parameter.device).manual_seed(parameter.numel())
        sign = torch.randint(-1, 2, parameter.shape, generator=random, device=parameter.device)
        parameter.copy_(parameter.float() * (1 + torch.finfo(parameter.dtype).eps * sign))


def compared(curves: Mapping[str, Sequence[float]]) -> dict[str, Row]:
    """How far each curve is from eager code's, and as a multiple of the two noises."""
    reference = torch.tensor(curves[EAGER], dtype=torch.float64)
    apart = {name: (torch.tensor(c, dtype=torch.float64) - reference).abs() for name, c in curves.items()}
    means = {name: differences.mean().item() for name, differences in apart.items()}

    def times(name: str, noise: str) -> float | str:
        return round(means[name] / means[noise], 3) if means[noise] else ""

    return {
        name: {
            "first_loss": round(losses[0], 4),
            "last_loss": round(losses[-1], 4),
            "mean_difference": float(f"{means[name]:.3g}"),
            "max_difference": float(f"{apart[name].max().item():.3g}"),
            "of_nudged": times(name, NUDGED),
            "of_other_weights": times(name, OTHER_WEIGHTS),
        }
        for name, losses in curves.items()
    }


if __name__ == "__main__":
    sys.exit(main())
