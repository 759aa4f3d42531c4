"""The command line, as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "liger_compile", *arguments]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=400)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_model.py").write_text(FACTORY)
    return tmp_path


def test_help_names_the_commands():
    shown = run("--help")
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in ("demo", "explain", "verify", "doctor"))
    assert run("--version").stdout == f"liger-compile {liger_compile.__version__}\n"


def test_explain_prints_the_report_of_a_users_model(folder: Path):
    done = run("explain", "my_model:with_kwargs", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("liger_compile  graph 0/0") and "my_model.py:11" in done.stdout


def test_explain_for_programs(folder: Path):
    done = run("explain", "my_model:with_both", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (graph,) = json.loads(done.stdout)["graphs"]
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
def test_explain_states_the_fault_of_its_argument(
    folder: Path, target: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    with pytest.raises(SystemExit) as ended:
        main(["explain", target])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_demo_of_tiny_size():
    sizes = {"steps": 5, "hidden": 32, "layers": 1, "batch": 2, "length": 32, "vocabulary": 512}
    arguments = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    done = run("demo", *arguments, "--compiler", "aot_eager")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [re.split(r" {2,}", line.strip(), maxsplit=1) for line in done.stdout.splitlines()]
    rows = {line[0]: line[1] for line in lines if len(line) == 2}
    assert [f"loss of step {number}" in rows for number in range(1, 7)] == [True] * 5 + [False]
    assert all(len(row.split()) == 3 for name, row in rows.items() if "loss" in name)
    seconds = [float(figure) for figure in re.findall(r"([\d.]+) s", rows["time of a step, median"])]
    mebibytes = [int(figure) for figure in re.findall(r"(\d+) MiB", rows["activations and gradients"])]
    assert len(seconds) == len(mebibytes) == 3 and min(seconds) > 0
    assert "Replaced\n  linear_cross_entropy" in done.stdout
    assert len(rows["largest difference"].split()) == 3
    assert "The losses agree" in done.stdout and "FAILED" not in done.stdout


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
