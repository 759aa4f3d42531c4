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
from unittest import mock

import pytest
import torch
from torch import Tensor

from liger_compile import registry
from tests.helpers.examples import trained

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "examples"

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
    "deepspeed_zero": (("transformers", "deepspeed"), LLAMA),
    "lightning_fit": (("transformers", "pytorch_lightning"), LLAMA),
    "torchtitan_loop": ((), ("linear_cross_entropy.plain", "gated_mlp.swiglu", "rms_norm.llama")),
    "nanogpt_loop": ((), ("linear_cross_entropy.plain", "mlp.gelu", "layer_norm.torch")),
    "own_pattern": ((), ("tanh_gate.mine",)),
}
CALLS = [(name, ()) for name in EXAMPLES] + [("deepspeed_zero", ("3",))]  # the stage of ZeRO
# ZeRO-3 gathers the weights of each module in code that breaks the graph: what is between two modules is found.
IN_CALL = {("deepspeed_zero", ("3",)): LAYERS_ONLY}


def skip_if_missing(name: str) -> None:
    for package in EXAMPLES[name][0]:
        if not importlib.util.find_spec(package):
            pytest.skip(f"needs {package}: pip install 'liger-compile[examples]' {package.replace('_', '-')}")


def run(name: str, folder: Path, *command: str, arguments: tuple[str, ...] = ()) -> str:
    """What an example prints. It is not allowed to ask a hub for anything."""
    skip_if_missing(name)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), *filter(None, [env.get("PYTHONPATH")])))
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


# These need no process of their own. The others are slow tests.
USUAL = ("plain_loop", "torchtitan_loop", "own_pattern")


@pytest.mark.parametrize("name", USUAL)
def test_an_example_trains_as_in_eager_mode_and_prints_its_rewrites(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_if_missing(name)
    found = []
    for way in ("eager", "liger"):
        capsys.readouterr()
        with mock.patch.dict(registry.REGISTERED):  # without the program's own patterns afterwards
            found.append(trained(str(FOLDER / f"{name}.py"), way))
    check(name, (), capsys.readouterr().out, *reversed(found))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), [call for call in CALLS if call[0] not in USUAL])
def test_an_example_in_a_process_of_its_own(name: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    def saved(way: str) -> tuple[str, dict[str, Tensor]]:
        command = "-m", "tests.helpers.examples", way, str(tmp_path / way)
        return run(name, tmp_path, *command, arguments=arguments), torch.load(tmp_path / way)

    (printed, ours), (_, eager) = saved("liger"), saved("eager")
    check(name, arguments, printed, ours, eager)


def check(
    name: str, arguments: tuple[str, ...], printed: str, ours: dict[str, Tensor], eager: dict[str, Tensor]
) -> None:
    assert "liger_compile  graph " in printed
    assert missing_in(printed, name, arguments) == [], printed
    assert eager.keys() == ours.keys() and eager
    for key, value in eager.items():
        # Adam divides by the size of a gradient, so the rounding of one that is almost zero moves a weight by much.
        assert (ours[key] - value).norm() <= 1e-3 * value.norm(), key


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_an_example_runs_as_it_is_read(name: str, arguments: tuple[str, ...], tmp_path: Path):
    printed = run(name, tmp_path, arguments=arguments)
    assert missing_in(printed, name, arguments) == [], printed


def test_examples_are_short_and_all_of_them_are_here():
    lines = {path.stem: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert lines.keys() == EXAMPLES.keys()
    assert all(length < 60 for length in lines.values()), lines
