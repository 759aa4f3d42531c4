"""The programs in docs/examples/ run as they are, and print a report with the rewrites that they are about.

Here they run without Inductor, to save time; a test that is marked slow runs them as a reader would.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "examples"

# The packages that an example needs besides torch, and the patterns that its report names.
LLAMA = (
    "linear_cross_entropy.plain",
    "attention.causal",
    "rotary.half",
    "gated_mlp.swiglu",
    "rms_norm.llama",
)
EXAMPLES = {
    "plain_loop": (("transformers",), LLAMA),
    "hf_trainer": (("transformers", "accelerate"), LLAMA),
    "trl_sft": (("transformers", "trl", "datasets"), ("attention.causal", "rotary.half_pair")),
    "peft_lora": (("transformers", "peft"), LLAMA),
    "accelerate_fsdp2": (("transformers", "accelerate"), LLAMA),
    "own_pattern": ((), ("tanh_gate.mine",)),
}

WITHOUT_INDUCTOR = """
import runpy, sys
import torch

compile = torch.compile

def without_inductor(*args, backend, options=None, **kwargs):
    return compile(*args, backend=backend, options={**(options or {}), "liger.inner": "aot_eager"}, **kwargs)

torch.compile = without_inductor
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def run(name: str, folder: Path, *command: str) -> str:
    """What an example prints. It is not allowed to ask a hub for anything."""
    for package in EXAMPLES[name][0]:
        if not importlib.util.find_spec(package):
            pytest.skip(f"needs {package}: pip install 'liger-compile[examples]'")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, *command, str(FOLDER / f"{name}.py")],
        text=True,
        capture_output=True,
        timeout=400,
        cwd=folder,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def replaced_in(report: str) -> set[str]:
    """The patterns that a printed report counts, whether they were replaced or marked for recomputation."""
    worked = re.sub(r"\nLeft alone\n.*?(?=\n\n|\Z)", "", report, flags=re.DOTALL)
    return set(re.findall(r"^  (\w+\.\w+) +\d+x", worked, re.MULTILINE))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_its_rewrites(name: str, tmp_path: Path):
    printed = run(name, tmp_path, "-c", WITHOUT_INDUCTOR)
    assert "liger_compile  graph " in printed
    found = replaced_in(printed)
    assert all(any(each.startswith(pattern) for each in found) for pattern in EXAMPLES[name][1]), printed


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_it_is_read(name: str, tmp_path: Path):
    printed = run(name, tmp_path)
    found = replaced_in(printed)
    assert all(any(each.startswith(pattern) for each in found) for pattern in EXAMPLES[name][1]), printed


def test_examples_are_short_and_all_of_them_are_here():
    lines = {path.stem: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert lines.keys() == EXAMPLES.keys()
    assert all(length < 60 for length in lines.values()), lines
