"""The command line, as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import liger_compile
from liger_compile.cli import demo

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
def test_explain_says_what_is_wrong_with_its_argument(folder: Path, target: str, sentence: str):
    done = run("explain", target, cwd=folder)
    assert done.returncode == 2 and sentence in done.stderr


def test_demo_of_tiny_size():
    sizes = {"steps": 5, "hidden": 32, "layers": 1, "batch": 2, "length": 32, "vocabulary": 512}
    arguments = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    done = run("demo", *arguments, "--compiler", "aot_eager")
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (
        "peak memory",
        "Largest relative difference",
        "Replaced",
        "linear_cross_entropy",
        "step   5 of 5",
    ):
        assert expected in done.stdout
    assert "FAILED" not in done.stdout


def runs(**losses: list[float]) -> dict[str, demo.Run]:
    found = {name: demo.Run(curve, 1.0, 0.1, 2**20, num_replaced=1) for name, curve in losses.items()}
    return {"eager": found["eager"], "torch.compile": found["stock"], "liger": found["liger"]}


def test_the_demo_fails_where_losses_disagree():
    good = [9.0, 8.0, 7.0]
    verdict_of = demo._verdict  # Private: its public caller trains three models.
    assert verdict_of(runs(eager=good, stock=good, liger=[9.0, 8.0, 7.000001]))[0]
    is_good, verdict = verdict_of(runs(eager=good, stock=good, liger=[9.0, 8.0, 7.01]))
    assert not is_good and "FAILED: the losses differ" in verdict
    assert not verdict_of(runs(eager=good, stock=good, liger=[9.0, float("nan"), 7.0]))[0]


def test_the_demo_fails_where_nothing_was_replaced():
    good = [9.0, 8.0, 7.0]
    nothing = runs(eager=good, stock=good, liger=good) | {"liger": demo.Run(good, 1.0, 0.1, 2**20)}
    is_good, verdict = demo._verdict(nothing)  # Private: its public caller trains three models.
    assert not is_good and "replaced nothing" in verdict


def test_the_vocabulary_loses_nothing():
    text = "def f(x):\n    return some_name + 'caf\u00e9 \u4f60'\n\n" * 3 + "rareword"
    vocabulary = demo.Vocabulary(text, 256 + 12)
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert max(ids) < 256 + 12 and len(ids) < len(text)


def test_the_standard_library_is_long_enough():
    assert len(demo.library_source()) > 1_000_000
