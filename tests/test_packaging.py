"""The package as others get it: the wheel in an environment of its own, its version, its types, what it lists."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import liger_compile
from liger_compile.cli.doctor import NEWEST_TESTED_TORCH, OLDEST_TORCH

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
IN_WHEEL = (
    "liger_compile",
    "liger_compile_autoload.py",
    "patterns",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)

TRAIN = """
import sys
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())

torch.manual_seed(0)
model, ids = Model(), torch.arange(64).view(2, 32)
expected = model(ids)
assert "liger_compile" not in sys.modules
loss = torch.compile(model, backend="liger", options={"liger.inner": sys.argv[1]})(ids)
loss.backward()
torch.testing.assert_close(loss, expected)
assert all(parameter.grad is not None for parameter in model.parameters())

import liger_compile, liger_compile.patterns
print(liger_compile.__file__, liger_compile.patterns.__file__, liger_compile.__version__, sep="\\n")
print(*(site.pattern for site in liger_compile.reports()[-1].sites if site.kind == "replace"))

from liger_compile.__main__ import main
main(["doctor", "--inner", sys.argv[1]])
"""


def test_the_version_is_that_of_the_installed_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", liger_compile.__version__)
    assert importlib.metadata.version("liger-compile") == liger_compile.__version__


def test_every_folder_of_code_is_in_the_wheel():
    listed = ast.literal_eval(re.search(r"^packages = (\[.*?^\])", PYPROJECT, re.DOTALL | re.MULTILINE)[1])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "liger_compile").rglob("*.py")}
    assert sorted(listed) == sorted(
        {".".join(folder.parts) for folder in folders} | {"liger_compile.patterns"}
    )


def test_the_changelog_has_the_version_or_what_comes_next():
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", liger_compile.__version__)


def test_versions_are_the_same_wherever_they_are_named():
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST_TORCH, NEWEST_TESTED_TORCH))
    assert f'"torch>={oldest}"' in PYPROJECT
    assert f'torch: ["{oldest}",' in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert f"| {newest}" in (ROOT / "docs" / "tested_versions.md").read_text()
    oldest_python = re.search(r'requires-python = ">=(.*?)"', PYPROJECT)[1]
    assert f'python: ["{oldest_python}",' in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r'"(ruff==.*?)"', hooks)) == set(re.findall(r'"(ruff==.*?)"', PYPROJECT))


def test_a_run_of_the_tests_is_a_row_of_the_page(tmp_path: Path):
    results = tmp_path / "results.xml"
    results.write_text(
        '<testsuites><testsuite tests="1234" failures="1" errors="1" skipped="32"/></testsuites>'
    )
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "row.py", results, "tests/ops"], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "tested_versions.md").read_text().splitlines()
    heading = next(line for line in page if line.startswith("| torch |")).strip("|").split("|")
    row = dict(
        zip(map(str.strip, heading), map(str.strip, done.stdout.strip().strip("|").split("|")), strict=True)
    )
    assert row["torch"] == torch.__version__.partition("+")[0] and row["tests"] == "`tests/ops`"
    assert (row["passed"], row["skipped"], row["failed"]) == ("1,200", "32", "2")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources."""
    if not importlib.util.find_spec("setuptools") or not importlib.util.find_spec("pip"):
        pytest.skip("building a wheel needs pip and setuptools: pip install 'liger-compile[test]'")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in IN_WHEEL:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True, timeout=200)
    (found,) = target.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with the wheel, and with torch and what it needs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    # Everything beside torch, but not this package: it may be installed there too, in another version.
    others = folder / "others"
    others.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if "liger" not in path.name and path.suffix not in (".pth", ".egg-link"):
            (others / path.name).symlink_to(path)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{others}\n")
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, timeout=200)
    return python


def run(python: Path, *arguments: str, folder: Path) -> str:
    """What the interpreter prints, started without a path of ours in the environment."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *arguments], text=True, capture_output=True, timeout=400, cwd=folder, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "graph 0/0" not in done.stderr  # without TORCH_LOGS; see test_report.py
    return done.stdout


@pytest.mark.skipif(os.name == "nt", reason="the environment is made of symbolic links")
@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_wheel_compiles_a_model_without_an_import(environment: Path, tmp_path: Path, inner: str):
    printed = run(environment, "-c", TRAIN, inner, folder=tmp_path)
    package, patterns, version, replaced, doctor = printed.split("\n", 4)
    site = environment.parents[1]
    assert Path(package).is_relative_to(site) and Path(patterns).is_relative_to(site)
    assert version == liger_compile.__version__
    assert "linear_cross_entropy.plain" in replaced.split()
    assert doctor.startswith(f"liger-compile  {version} ({Path(package).parent})")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the environment is made of symbolic links")
def test_public_names_are_typed(environment: Path, tmp_path: Path):
    """As a type checker of somebody else sees them, through py.typed."""
    if not importlib.util.find_spec("pyright"):
        pytest.skip("needs pyright: pip install 'liger-compile[test]'")
    site = environment.parents[1]
    env = os.environ | {
        "VIRTUAL_ENV": str(site),
        "PATH": f"{environment.parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pyright",
            "--ignoreexternal",
            "--verifytypes",
            "liger_compile",
            "--outputjson",
        ],
        text=True,
        capture_output=True,
        timeout=400,
        cwd=tmp_path,
        env=env,
    )
    found = json.loads(done.stdout)["typeCompleteness"]
    symbols = {each["name"]: each for each in found["symbols"] if each["isExported"]}
    assert (
        "liger_compile.functional.rms_norm" in symbols
        and "liger_compile.patterns.DEFAULT_PATTERNS" in symbols
    )
    for name in public_names():
        inside = [symbol for key, symbol in symbols.items() if key == name or key.startswith(f"{name}.")]
        unclear = [s["name"] for s in inside if not s["isTypeKnown"] or s["isTypeAmbiguous"]]
        assert not unclear, name


def public_names() -> list[str]:
    """The names that docs/stability.md calls stable, where they are defined."""
    from liger_compile import functional, options, testing

    names = [f"liger_compile.functional.{name}" for name in functional.__all__]
    names.append(f"{options.__name__}.Options")
    for package in (liger_compile, testing):
        for name in package.__all__:
            value = getattr(package, name)
            if hasattr(value, "__qualname__"):
                names.append(f"{value.__module__}.{value.__qualname__}")
    return names


def test_modules_with_public_names_are_strictly_typed():
    """pyproject.toml lists for pyright the modules that define a public name, and the command line."""
    listed = re.search(r"^strict = \[(.*?)\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    assert listed is not None
    strict = [ROOT / path for path in re.findall(r'"(.*?)"', listed[1])]
    assert all(path.exists() for path in strict)
    modules = {module for name in public_names() for module in sys.modules if name.startswith(f"{module}.")}
    for module in (*modules, "liger_compile.__main__", "liger_compile.backend", "liger_compile.cli.doctor"):
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        path = Path(spec.origin).resolve()
        assert any(path == each or each in path.parents for each in strict), (
            f"{module}: add it to `strict` in pyproject.toml"
        )
