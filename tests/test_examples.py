"""The programs in docs/examples/ run as they are, train as in eager mode, and print a report of their rewrites.

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
import torch

FOLDER = Path(__file__).parent.parent / "docs" / "examples"

# The packages that an example needs besides torch, and the patterns that its report names.
LLAMA = (
    "linear_cross_entropy.plain",
    "attention.causal",
    "rotary.half",
    "gated_mlp.swiglu",
    "rms_norm.llama",
)
LAYERS_ONLY = ("attention.causal", "rotary.half_pair")  # TRL computes head and loss itself
TRL = ("transformers", "trl", "datasets")
EXAMPLES = {
    "plain_loop": (("transformers",), LLAMA),
    "hf_trainer": (("transformers", "accelerate"), LLAMA),
    "for_inductor": (("transformers", "accelerate"), LLAMA),
    "trl_sft": (TRL, LAYERS_ONLY),
    "trl_dpo": (TRL, LAYERS_ONLY),
    "trl_grpo": (TRL, LAYERS_ONLY),
    "peft_lora": (("transformers", "peft"), LLAMA),
    "accelerate_fsdp2": (("transformers", "accelerate"), LLAMA),
    # The parameters are pieces of one buffer, and count as written: docs/known_gaps.md.
    "deepspeed_zero": (("transformers", "deepspeed"), (*LAYERS_ONLY, "gated_mlp.swiglu")),
    "lightning_fit": (("transformers", "pytorch_lightning"), LLAMA),
    "torchtitan_loop": ((), ("linear_cross_entropy.plain", "gated_mlp.swiglu", "rms_norm.llama")),
    "nanogpt_loop": ((), ("linear_cross_entropy.plain", "mlp.gelu", "layer_norm.torch")),
    "own_pattern": ((), ("tanh_gate.mine",)),
}
CALLS = [(name, ()) for name in EXAMPLES] + [("deepspeed_zero", ("3",))]  # the stage of ZeRO
# ZeRO-3 gathers the weights of each module in code that breaks the graph: what is between two modules is found.
IN_CALL = {("deepspeed_zero", ("3",)): LAYERS_ONLY}

# Runs a program, prints what it prints, and saves the parameters of its model and their gradients.
RUN = """
import runpy, sys
from types import SimpleNamespace
import torch
import liger_compile
from liger_compile.for_inductor import is_used_for_inductor

way, saved, *sys.argv = sys.argv[1:]
compile = torch.compile

def without_inductor(*args, backend="inductor", options=None, **kwargs):
    if backend == "liger" or backend == "inductor" and is_used_for_inductor():
        options = {**(options or {}), "liger.inner": "aot_eager"}
    return compile(*args, backend=backend, options=options, **kwargs)

def eager(*args, backend="inductor", **kwargs):
    # What a framework compiles for itself, by stock torch.compile, is no matter of the program.
    if backend == "liger" or is_used_for_inductor():
        return args[0] if args else lambda function: function
    return compile(*args, backend=backend, **kwargs)

if way == "eager":
    liger_compile.reports = lambda: (SimpleNamespace(sites=(), count=len),)  # a program prints the last one
torch.compile = eager if way == "eager" else without_inductor
names = runpy.run_path(sys.argv[0], run_name="__main__")

def whole(tensor):
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().float()

model = getattr(names["model"], "module", names["model"])  # of DeepSpeed's engine
model = getattr(model, "_orig_mod", model)
tensors = {name: getattr(each, "ds_tensor", each) for name, each in model.named_parameters()}
gradients = {f"{name}.grad": each.grad for name, each in tensors.items() if each.grad is not None}
torch.save({name: whole(each) for name, each in (tensors | gradients).items()}, saved)
"""


def run(name: str, folder: Path, *command: str, arguments: tuple[str, ...] = ()) -> str:
    """What an example prints. It is not allowed to ask a hub for anything."""
    for package in EXAMPLES[name][0]:
        if not importlib.util.find_spec(package):
            pytest.skip(f"needs {package}: pip install 'liger-compile[examples]' {package.replace('_', '-')}")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, *command, str(FOLDER / f"{name}.py"), *arguments],
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


def missing_in(printed: str, name: str, arguments: tuple[str, ...]) -> list[str]:
    """The patterns that the report of an example should have, and has not."""
    found = replaced_in(printed)
    expected = IN_CALL.get((name, arguments), EXAMPLES[name][1])
    return [pattern for pattern in expected if not any(each.startswith(pattern) for each in found)]


# Each runs twice, in processes of their own; the others are slow tests.
USUAL = ("plain_loop", "torchtitan_loop", "own_pattern")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [pytest.param(*call, marks=() if call[0] in USUAL else pytest.mark.slow) for call in CALLS],
)
def test_an_example_trains_as_in_eager_mode_and_prints_its_rewrites(
    name: str, arguments: tuple[str, ...], tmp_path: Path
):
    ours, theirs = tmp_path / "ours.pt", tmp_path / "eager.pt"
    printed = run(name, tmp_path, "-c", RUN, "liger", str(ours), arguments=arguments)
    assert "liger_compile  graph " in printed
    assert missing_in(printed, name, arguments) == [], printed

    run(name, tmp_path, "-c", RUN, "eager", str(theirs), arguments=arguments)
    expected, trained = torch.load(theirs), torch.load(ours)
    assert expected.keys() == trained.keys() and expected
    for key, value in expected.items():
        # Adam divides by the size of a gradient, so the rounding of one that is almost zero moves a weight by much.
        assert (trained[key] - value).norm() <= 1e-3 * value.norm(), key


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_an_example_runs_as_it_is_read(name: str, arguments: tuple[str, ...], tmp_path: Path):
    printed = run(name, tmp_path, arguments=arguments)
    assert missing_in(printed, name, arguments) == [], printed


def test_examples_are_short_and_all_of_them_are_here():
    lines = {path.stem: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert lines.keys() == EXAMPLES.keys()
    assert all(length < 60 for length in lines.values()), lines
