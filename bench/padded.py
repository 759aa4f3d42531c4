"""Padded batches on one GPU: stock torch.compile, liger-kernel, ours with all rows, and ours with live rows only.

    python -m bench.padded                    all shapes, by python -m bench.train_step
    python -m bench.padded --quick            few rounds
    python -m bench.padded --device cpu       a tiny shape: shows that it runs, measures nothing

Padding is at the end of rows, of different lengths, and its labels are ignored. The function returns what the model
returns, logits included; with --returns loss, the loss alone.
Live rows need liger.rows="auto", and attention without a mask in memory needs liger.policy="always". Once these are
measured to be no slower, the default of `rows` in options.py and `_not_measured` in patterns/attention.py change.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench import train_step
from bench.common import RESULTS
from bench.step import INDUCTOR, LIGER_KERNEL, OURS


class Line(NamedTuple):
    model: str
    tokens: str
    padding: str
    has_liger_kernel: bool = True


LINES = (
    Line("llama-1b", "4x2048", "none"),  # as before: no padding at all
    Line("llama-1b", "4x2048", "quarter"),
    Line("llama-1b", "8x2048", "half"),
    Line("gemma2-2b-8l", "2x4096", "half"),
    Line("modernbert", "32x512", "half", has_liger_kernel=False),
)
TINY = (Line("tiny", "2x64", "half", has_liger_kernel=False),)
WAYS = {
    "rows": {"liger.rows": "auto", "liger.policy": "always"},
    "always": {"liger.policy": "always"},
    "default": {},
}


def arguments_of(line: Line, way: str, chosen: argparse.Namespace) -> list[str]:
    """The command line of bench.train_step; the other ways than "rows" need not measure the peers again."""
    peers = (INDUCTOR, *((LIGER_KERNEL,) if line.has_liger_kernel else ())) if way == "rows" else ()
    mask = "ones" if line.padding == "none" else line.padding
    options = json.dumps(WAYS[way])
    command = [
        "--model",
        line.model,
        "--tokens",
        line.tokens,
        "--attention-mask",
        mask,
        "--returns",
        chosen.returns,
    ]
    command += ["--variants", ",".join((*peers, OURS)), "--options", options, "--device", chosen.device]
    return [*command, "--rounds", "1" if chosen.quick else "6", "--out", str(chosen.out)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.padded", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ways", default="rows,default", help=f"of {', '.join(WAYS)}, with commas between")
    parser.add_argument("--returns", choices=("model", "loss"), default="model")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    chosen = parser.parse_args(arguments)
    for line in TINY if chosen.device == "cpu" else LINES:
        for way in chosen.ways.split(","):
            train_step.main(arguments_of(line, way, chosen))


if __name__ == "__main__":
    main()
