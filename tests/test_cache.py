"""The caches on disk hand out nothing that is older than our code, and what is not older they do hand out.

Every run is a process of its own with a copy of the package, which the test may edit; all share one cache
directory. The op in it spreads over three files, and AOTAutograd and Inductor look at none of them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import liger_compile
from liger_compile import patterns

FORMULA = "def backward(grad):\n    return grad * 2\n"
RESULT = "import torch\n\n\ndef forward(x):\n    return (x * 3).bfloat16()\n"
OP = """
import torch

from liger_compile.ops import toy_formula, toy_result


@torch.library.custom_op("liger_compile::toy", mutates_args=())
def toy(x: torch.Tensor) -> torch.Tensor:
    return toy_result.forward(x)


@toy.register_fake
def _(x):
    return toy_result.forward(x)


toy.register_autograd(lambda ctx, grad: toy_formula.backward(grad.float()))
"""
CHILD = """
import json
import sys

import torch
from torch.utils.checkpoint import CheckpointPolicy

from liger_compile import compile
from liger_compile.ops.toy import toy


def backend(gm, example_inputs):
    for node in gm.graph.find_nodes(op="call_method", target="float"):
        if "marked" in sys.argv:
            node.meta.update(recompute=CheckpointPolicy.MUST_SAVE, ac_graph_id=0)
    return compile.compile_graph(gm, example_inputs)


x = torch.ones(4, requires_grad=True)
y = torch.compile(lambda x: toy(x).float().sin(), backend=backend)(x)
saved = [str(one.dtype) for one in y.grad_fn.saved_tensors]
y.sum().backward()
print(json.dumps(dict(
    compile.cache_counts(), file=compile.__file__, result=y[0].item(), gradient=x.grad[0].item(), saved=saved
)))
"""


def run(site, cache, *arguments):
    """One process: what came of the op, and what the cache did."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),  # stands before site-packages, so the copy shadows the installed package
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], env=environment, cwd=site, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert Path(told.pop("file")) == site / "liger_compile" / "compile.py"
    assert told.pop("bypass") == 0
    return told


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """A copy of the package with the op in it, the cache directory after one run, and what that run said."""
    directory = tmp_path_factory.mktemp("cold")
    site, cache = directory / "site", directory / "cache"
    no_bytecode = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(liger_compile.__file__).parent, site / "liger_compile", ignore=no_bytecode)
    shutil.copytree(
        patterns.__path__[0], site / "liger_compile" / "patterns", ignore=no_bytecode, dirs_exist_ok=True
    )
    for name, source in (("toy", OP), ("toy_formula", FORMULA), ("toy_result", RESULT)):
        (site / "liger_compile" / "ops" / f"{name}.py").write_text(source)
    told = run(site, cache)
    assert (told.pop("hit"), told.pop("miss")) == (0, 1)
    return site, cache, told


@pytest.fixture
def warm(cold, tmp_path):
    """Runs again, with another copy and perhaps an edit."""
    original, cache, before = cold
    site = tmp_path / "site"
    shutil.copytree(original, site)

    def run_again(*arguments, edit=None):
        if edit is not None:
            name, old, new = edit
            file = site / "liger_compile" / "ops" / name
            assert old in file.read_text()
            file.write_text(file.read_text().replace(old, new))
        after = run(site, cache, *arguments)
        return before, after, (after.pop("hit"), after.pop("miss"))

    return run_again


def test_what_did_not_change_is_a_hit(warm):
    before, after, hit_and_miss = warm()
    assert hit_and_miss == (1, 0)
    assert after == before


def test_a_changed_backward_formula_is_a_miss(warm):
    before, after, hit_and_miss = warm(edit=("toy_formula.py", "grad * 2", "grad * 5"))
    assert hit_and_miss == (0, 1)
    assert after["gradient"] == pytest.approx(before["gradient"] * 5 / 2)


def test_a_changed_fake_is_a_miss_in_inductors_cache_too(warm):
    # An old kernel would read the half numbers as bfloat16, and say nothing.
    before, after, hit_and_miss = warm(edit=("toy_result.py", "bfloat16()", "half()"))
    assert hit_and_miss == (0, 1)
    assert after["result"] == before["result"]
    assert (before["saved"], after["saved"]) == (["torch.bfloat16"], ["torch.float16"])


def test_changed_recompute_marks_are_a_miss(warm):
    before, after, hit_and_miss = warm("marked")
    assert hit_and_miss == (0, 1)
    assert (before["saved"], after["saved"]) == (["torch.bfloat16"], ["torch.float32"])
    assert after["gradient"] == before["gradient"]
