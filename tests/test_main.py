"""The command line: once as a user runs it, in a process of its own, and otherwise its function."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import liger_compile
from liger_compile.__main__ import main
from liger_compile.cli import demo
from liger_compile.cli.device import peak_bytes

FACTORY = """
import torch
from torch import nn

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x, eps=1e-6):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

def with_kwargs():
    return Norm(), {"x": torch.ones(4, 8)}

def with_both():
    return Norm(), (torch.ones(4, 8),), {"eps": 1e-5}

def nothing():
    return None
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a model of a user."""
    (tmp_path / "my_model.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield tmp_path
    sys.modules.pop("my_model", None)


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]):
    shown = []
    for argument in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert ended.value.code == 0
        shown.append(capsys.readouterr().out)
    assert all(command in shown[0] for command in ("demo", "explain", "verify", "doctor"))
    assert shown[1] == f"liger-compile {liger_compile.__version__}\n"


def test_explain_prints_the_report_of_a_users_model(folder: Path):
    command = [sys.executable, "-m", "liger_compile", "explain", "my_model:with_kwargs"]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("liger_compile  graph 0/0") and "my_model.py:11" in done.stdout


@pytest.mark.usefixtures("folder")
def test_explain_for_programs(capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "my_model:with_both", "--json"]) == 0
    (graph,) = json.loads(capsys.readouterr().out)["graphs"]
    assert graph["sites"][0]["pattern"].startswith("rms_norm.")


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("my_model", "expected MODULE:FACTORY"),
        ("missing_model:factory", "there is no module 'missing_model'"),
        ("my_model:factory", "module 'my_model' has no function 'factory'"),
        ("my_model:nothing", "return (model, kwargs) or (model, args, kwargs)"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_explain_states_the_fault_of_its_argument(
    target: str, sentence: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        main(["explain", target])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_demo_of_tiny_size(capsys: pytest.CaptureFixture[str]):
    sizes = {"steps": 5, "hidden": 32, "layers": 1, "batch": 2, "length": 32, "vocabulary": 512}
    arguments = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    code, printed = main(["demo", *arguments, "--compiler", "aot_eager"]), capsys.readouterr().out
    assert code == 0, printed
    lines = [re.split(r" {2,}", line.strip(), maxsplit=1) for line in printed.splitlines()]
    rows = {line[0]: line[1] for line in lines if len(line) == 2}
    assert [f"loss of step {number}" in rows for number in range(1, 7)] == [True] * 5 + [False]
    assert all(len(row.split()) == 3 for name, row in rows.items() if "loss" in name)
    seconds = [float(figure) for figure in re.findall(r"([\d.]+) s", rows["time of a step, median"])]
    mebibytes = [int(figure) for figure in re.findall(r"(\d+) MiB", rows["activations and gradients"])]
    assert len(seconds) == len(mebibytes) == 3 and min(seconds) > 0
    assert "Replaced\n  linear_cross_entropy" in printed
    assert len(rows["largest difference from eager"].split()) == 3
    assert "The losses agree" in printed and "FAILED" not in printed


def runs(ours: list[float]) -> dict[str, demo.Run]:
    good = [9.0, 8.0, 7.0]
    curves = {demo.EAGER: good, demo.STOCK: good, demo.OURS: ours}
    return {name: demo.Run(losses, [0.1], 2**20) for name, losses in curves.items()}


@pytest.mark.parametrize(("last", "is_right"), [(7.000001, True), (7.8, False), (float("nan"), False)])
def test_the_demo_fails_where_losses_disagree(last: float, is_right: bool):
    faults = demo.faults_in(runs([9.0, 8.0, last]), num_replaced=1)
    assert faults == (
        [] if is_right else [f"FAILED: the losses of {demo.OURS} differ in more than rounding."]
    )


def test_the_demo_fails_where_nothing_was_replaced():
    (fault,) = demo.faults_in(runs([9.0, 8.0, 7.0]), num_replaced=0)
    assert "replaced nothing" in fault


@pytest.mark.skipif(demo.DEVICE != "cpu", reason="counts the memory of a CPU")
def test_the_demo_counts_what_a_step_allocates_at_its_peak():
    kept = torch.ones(2**20)

    def step() -> None:
        first = torch.ones(2**18)  # 1 MiB
        second = torch.ones(2**20)  # 4 MiB
        del first
        torch.add(second, kept)  # 4 MiB

    assert peak_bytes(step) == 8 * 2**20


def test_the_text_of_the_demo_is_long_and_uses_its_vocabulary():
    ids = demo.library_tokens(demo.Sizes().vocabulary)
    assert len(ids) > 300_000 and int(ids.max()) < demo.Sizes().vocabulary
    assert len(ids.unique()) > 0.9 * demo.Sizes().vocabulary
