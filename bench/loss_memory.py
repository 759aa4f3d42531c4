"""Peak memory of head + cross-entropy, forward and backward: eager, torch.compile, backend="liger". On the CPU.

    python -m bench.loss_memory                              all, and bench/results/loss_memory_cpu.csv
    python -m bench.loss_memory one VARIANT DTYPE VOCAB      one of them, in this process: a line of JSON

Measured is what one step adds to the resident memory of a warm process at its highest, logits, gradients and all.
Each measurement has a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.common import ROOT, machine, write_csv

TOKENS, HIDDEN = 2048, 256
VARIANTS = ("eager", "inductor", "liger")
DTYPES = ("float32", "bfloat16")
VOCABULARIES = (8192, 32_000, 128_256)
WARMUP, STEPS = 1, 2

# mallopt's numbers for these. Freed blocks of more than this go back to the system at once, so that resident memory
# is memory in use; the same for all variants.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_RETURN_ABOVE = 64 * 2**10


def measure(variant: str, dtype: str, vocabulary: int) -> int:
    """The peak in bytes, measured in a process of its own."""
    command = [sys.executable, "-m", "bench.loss_memory", "one", variant, dtype, str(vocabulary)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def one(variant: str, dtype: str, vocabulary: int) -> dict[str, Any]:
    for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(threshold, _RETURN_ABOVE)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    x = torch.randn(TOKENS, HIDDEN, dtype=kind, requires_grad=True)
    weight = (0.05 * torch.randn(vocabulary, HIDDEN, dtype=kind)).requires_grad_()
    target = torch.randint(vocabulary, (TOKENS,))
    function = _loss if variant == "eager" else torch.compile(_loss, backend=variant)

    def step() -> None:
        function(x, weight, target).backward()
        x.grad = weight.grad = None

    for _ in range(WARMUP):
        step()
    return {"peak_bytes": max(_peak_of(step) for _ in range(STEPS))}


def _loss(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As transformers spells it: logits in the dtype of the model, the loss in float32."""
    return F.cross_entropy(F.linear(x, weight).float(), target)


def _peak_of(step: Callable[[], None]) -> int:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    return 1024 * int(re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def main() -> None:
    rows = []
    print(f"{TOKENS} tokens, hidden size {HIDDEN}; MiB above the level before the step")
    for dtype in DTYPES:
        for vocabulary in VOCABULARIES:
            found = {variant: measure(variant, dtype, vocabulary) for variant in VARIANTS}
            for variant, peak in found.items():
                row = {
                    "dtype": dtype,
                    "tokens": TOKENS,
                    "hidden": HIDDEN,
                    "vocabulary": vocabulary,
                    "variant": variant,
                    "peak_mib": round(peak / 2**20, 1),
                    "of_inductor": round(peak / found["inductor"], 3),
                }
                rows.append({**row, **machine()})
                print("  ".join(str(value).rjust(9) for value in row.values()), flush=True)
    write_csv("loss_memory_cpu.csv", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main()
