"""`python -m liger_compile doctor`: what it prints, and which faults of an installation it names."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

import liger_compile
from liger_compile.__main__ import main
from liger_compile.cli import doctor as cli
from liger_compile.report.verify import Row, Verification


@pytest.fixture
def examined(capsys):
    """examined() -> (exit code, what doctor prints), with the small model compiled by "eager"."""

    def examined():
        code = cli.doctor("eager")
        return code, capsys.readouterr().out

    return examined


def test_it_prints_versions_and_verdicts(examined, monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "")
    code, printed = examined()
    assert code == 0, printed
    facts, verdicts = printed.split("\n\n")
    assert facts.startswith(f"liger-compile  {liger_compile.__version__} ")
    names = [line.split()[0] for line in facts.splitlines() if not line.startswith(" ")]
    assert names[1:] == [
        "python",
        "torch",
        "triton",
        "transformers",
        "device",
        "CUDA",
        "backend",
        "environment",
    ]
    assert "liger = liger_compile.backend:liger" in facts and "TORCH_LOGS=" in facts
    assert 'ok   torch.compile finds backend="liger" by name' in verdicts
    assert "ok   a training step, compiled by eager, agrees with eager; replaced: " in verdicts
    assert "linear_cross_entropy" in verdicts and "NO" not in verdicts


def test_by_default_it_compiles_with_inductor(capsys):
    code, printed = main(["doctor"]), capsys.readouterr().out
    assert code == 0, printed
    assert "ok   a training step, compiled by inductor, agrees with eager" in printed


def test_a_torch_that_compiles_nothing_is_a_fault(examined, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    code, printed = examined()
    assert code == 1
    assert "NO   torch.compile passed no graph to the backend: TORCHDYNAMO_DISABLE is set" in printed


def with_versions(monkeypatch, **versions):
    """Packages have these versions, or are not installed where the version is None."""
    real = importlib.metadata.version

    def version(package):
        found = versions[package] if package in versions else real(package)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_an_old_torch_is_a_fault_and_ends_the_checks(examined, monkeypatch):
    with_versions(monkeypatch, torch="2.9.1+cu128", transformers=None)
    code, printed = examined()
    assert code == 1 and "transformers   not installed" in printed
    assert printed.splitlines()[-1] == "NO   torch 2.9.1+cu128 is too old; install torch 2.11 or later"


def test_a_later_torch_than_was_tested_is_no_fault(examined, monkeypatch):
    with_versions(monkeypatch, torch="9.0.0a0+git123")
    code, printed = examined()
    assert code == 0 and "--   torch 9.0.0a0+git123 is later than" in printed


def test_a_missing_entry_point_is_a_fault(examined, monkeypatch):
    monkeypatch.setattr(torch.compiler, "list_backends", lambda exclude_tags=(): ["inductor"])
    code, printed = examined()
    assert code == 1 and 'NO   torch.compile does not find backend="liger"' in printed


def test_a_second_backend_of_this_name_is_a_fault(examined, monkeypatch):
    real = importlib.metadata.entry_points
    other = importlib.metadata.EntryPoint("liger", "other_package:compile", cli.BACKENDS)

    def entry_points(group):
        return (*real(group=group), other) if group == cli.BACKENDS else real(group=group)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    code, printed = examined()
    assert code == 1 and 'another package has the backend name "liger" too (other_package:compile)' in printed


@pytest.mark.parametrize(
    ("name", "value", "code", "sentence"),
    [
        ("LIGER_FUEL", "0", 0, "--   LIGER_FUEL=0 applies to every compilation in this environment"),
        ("LIGER_FUEL", "some", 1, "NO   environment variable LIGER_FUEL: expected a whole number"),
        ("LIGER_POLICY", "never", 0, "--   LIGER_POLICY is set, but no option reads it"),
    ],
)
def test_options_from_the_environment(examined, monkeypatch, name, value, code, sentence):
    monkeypatch.setenv(name, value)
    found, printed = examined()
    assert found == code and sentence in printed and f"{name}={value}" in printed.split("\n\n")[0]


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (Verification((), "", ()), "NO   torch.compile passed no graph to the backend"),
        (RuntimeError("no kernel\nfor it"), "NO   a small model does not compile: RuntimeError: no kernel"),
    ],
)
def test_a_step_that_cannot_be_compared_is_a_fault(examined, monkeypatch, found, sentence):
    def verify(*_, **__):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(cli, "verify", verify)
    code, printed = examined()
    assert code == 1 and printed.splitlines()[-1] == sentence


def test_a_step_that_differs_and_one_without_rewrites_are_faults(examined, monkeypatch):
    real = cli.verify
    row = Row("gradient of norm", problem="differs from eager's")
    monkeypatch.setattr(cli, "verify", lambda *a, **k: Verification((row,), "", real(*a, **k).reports))
    code, printed = examined()
    assert code == 1 and "NO   a small model gives other numbers than eager mode; please report" in printed
    assert "gradient of norm" in printed

    def without_rewrites(*args, options):
        return real(*args, options=options | {"liger.policy": "never"})

    monkeypatch.setattr(cli, "verify", without_rewrites)
    code, printed = examined()
    assert code == 1 and "NO   nothing was replaced in a small model; please report" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="Inductor needs no C++ compiler on a GPU")
def test_a_missing_compiler_is_a_fault_of_inductor_alone(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert cli.doctor("inductor") == 1
    assert "NO   Inductor cannot compile: there is no C++ compiler" in capsys.readouterr().out
