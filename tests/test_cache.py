"""The caches on disk hand out nothing that is older than our code, and what is not older they do hand out.

Every run is a process of its own with a copy of the package, which the test may edit; all share one cache
directory. The op in it spreads over three files, and AOTAutograd and Inductor look at none of them.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import liger_compile
from liger_compile import patterns, sources

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
from liger_compile.torch_internals.aot_autograd import cache_counts


def step(is_marked):
    def backend(gm, example_inputs):
        for node in gm.graph.find_nodes(op="call_method", target="float"):
            if is_marked:
                node.meta.update(recompute=CheckpointPolicy.MUST_SAVE, ac_graph_id=0)
        return compile.compile_graph(gm, example_inputs)

    torch._dynamo.reset()
    before = cache_counts()
    x = torch.ones(4, requires_grad=True)
    y = torch.compile(lambda x: toy(x).float().sin(), backend=backend)(x)
    saved = [str(one.dtype) for one in y.grad_fn.saved_tensors]
    y.sum().backward()
    counts = {name: count - before[name] for name, count in cache_counts().items()}
    return dict(counts, file=compile.__file__, result=y[0].item(), gradient=x.grad[0].item(), saved=saved)


print(json.dumps([step(is_marked) for is_marked in json.loads(sys.argv[1])]))
"""


def run(site, cache, is_marked=(False,)):
    """One process: what came of the op, and what the cache did, in each of its steps."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),  # stands before site-packages, so the copy shadows the installed package
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(is_marked)],
        env=environment,
        cwd=site,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    steps = json.loads(child.stdout)
    for told in steps:
        assert Path(told.pop("file")) == site / "liger_compile" / "compile.py"
        assert told.pop("bypass") == 0
    return steps


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
    (told,) = run(site, cache)
    assert (told.pop("hit"), told.pop("miss")) == (0, 1)
    return site, cache, told


@pytest.fixture
def warm(cold, tmp_path):
    """Runs again, with another copy and perhaps an edit: what the first run said, and of each step what it says and
    what the cache did."""
    original, cache, before = cold
    site = tmp_path / "site"
    shutil.copytree(original, site)

    def run_again(is_marked=(False,), edit=None):
        if edit is not None:
            name, old, new = edit
            file = site / "liger_compile" / "ops" / name
            assert old in file.read_text()
            file.write_text(file.read_text().replace(old, new))
        return before, *(
            (after, (after.pop("hit"), after.pop("miss"))) for after in run(site, cache, is_marked)
        )

    return run_again


def test_what_did_not_change_is_a_hit_and_changed_recompute_marks_are_a_miss(warm):
    before, (same, hit_and_miss), (marked, hit_and_miss_of_marked) = warm(is_marked=(False, True))
    assert hit_and_miss == (1, 0)
    assert same == before
    assert hit_and_miss_of_marked == (0, 1)
    assert (before["saved"], marked["saved"]) == (["torch.bfloat16"], ["torch.float32"])
    assert marked["gradient"] == before["gradient"]


@pytest.mark.slow  # the files of the package are one digest, which the next test has too
def test_a_changed_backward_formula_is_a_miss(warm):
    before, (after, hit_and_miss) = warm(edit=("toy_formula.py", "grad * 2", "grad * 5"))
    assert hit_and_miss == (0, 1)
    assert after["gradient"] == pytest.approx(before["gradient"] * 5 / 2)


def test_a_changed_fake_is_a_miss_in_inductors_cache_too(warm):
    # An old kernel would read the half numbers as bfloat16, and say nothing.
    before, (after, hit_and_miss) = warm(edit=("toy_result.py", "bfloat16()", "half()"))
    assert hit_and_miss == (0, 1)
    assert after["result"] == before["result"]
    assert (before["saved"], after["saved"]) == (["torch.bfloat16"], ["torch.float16"])


# A user's op, whose backward calls a helper in another file that reads a number in a third

USERS_OP = """
import torch
from their_helper import scaled


@torch.library.custom_op("theirs::toy", mutates_args=())
def toy(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@toy.register_fake
def _(x):
    return torch.empty_like(x)


toy.register_autograd(lambda ctx, grad: scaled(grad))
"""
USERS_HELPER = "import their_config\n\n\ndef scaled(grad):\n    return grad * their_config.SCALE\n"
USERS_CHILD = """
import json

import torch

from liger_compile.torch_internals.aot_autograd import cache_counts
from their_op import toy

x = torch.ones(4, requires_grad=True)
torch.compile(lambda x: toy(x).sin(), backend="liger")(x).sum().backward()
expected = torch.ones(4, requires_grad=True)
toy(expected).sin().sum().backward()
print(json.dumps(dict(
    cache_counts(), is_right=torch.allclose(x.grad, expected.grad)
)))
"""


@pytest.mark.slow
def test_what_the_backward_of_a_users_op_calls_in_other_files_is_in_the_key(tmp_path):
    (tmp_path / "their_op.py").write_text(USERS_OP)
    (tmp_path / "their_helper.py").write_text(USERS_HELPER)

    def run_users(scale):
        (tmp_path / "their_config.py").write_text(f"SCALE = {scale}\n")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(liger_compile.__file__).parents[1])]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        }
        child = subprocess.run(
            [sys.executable, "-c", USERS_CHILD], env=environment, capture_output=True, text=True
        )
        assert child.returncode == 0, child.stderr
        told = json.loads(child.stdout)
        assert told["is_right"] and told["bypass"] == 0, told
        return told["hit"], told["miss"]

    assert [run_users(2.0), run_users(2.0), run_users(5.0)] == [(0, 1), (1, 0), (0, 1)]


# What a function reaches, file by file

PARTS = {
    "main.py": """
import functools
import helpers
import package.deep
from helpers import called, Base, TABLE, NUMBER
from classes import Child


def by_import(x): return called(x)
def by_module(x): return helpers.called(x)
def by_package(x): return package.deep.function(x)
def by_number(x): return x * NUMBER
def by_class(x): return Child().method(x)
def by_table(x): return TABLE["name"](x)
def by_inner_import(x):
    import late
    return late.function(x)
def by_late_package(x):
    from package.late import function
    return function(x)
def by_inner_function(x):
    return (lambda y: [called(each) for each in y])(x)
def by_default(x, function=called): return function(x)
def make(function):
    def closed(x): return function(x)
    return closed
by_closure = make(called)
by_partial = functools.partial(called, scale=2)
by_object = Child()
def alone(x): return x
""",
    "helpers.py": """
from third import innermost
NUMBER = 3
def called(x, scale=1): return innermost(x) * scale
class Base:
    def method(self, x): return called(x)
TABLE = {"name": called}
""",
    "third.py": "def innermost(x): return x + 1\n",
    "classes.py": "from helpers import Base\nclass Child(Base):\n    def __call__(self, x): return self.method(x)\n",
    "late.py": "from third import innermost\ndef function(x): return innermost(x)\n",
    "package/__init__.py": "",
    "package/late.py": "from .deep import function\n",
    "package/deep.py": "from third import innermost\nfunction = innermost\n",
}


def digests_of(directory):
    """Of each function of main.py, as a new process would see them."""
    names = {path.relative_to(directory).with_suffix("").parts[0] for path in directory.rglob("*.py")}
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]
    main = importlib.import_module("main")
    return {
        name: sources.digests([getattr(main, name)])
        for name in dir(main)
        if name.startswith(("by_", "alone"))
    }


@pytest.fixture
def parts(tmp_path, monkeypatch):
    for name, source in PARTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_every_way_to_reach_a_function_is_followed(parts):
    before = digests_of(parts)
    assert digests_of(parts) == before
    (parts / "third.py").write_text("def innermost(x): return x + 20\n")
    after = digests_of(parts)
    assert [name for name in before if before[name] == after[name]] == ["alone", "by_number"]


def test_a_number_of_another_file_counts_with_its_name(parts):
    before = digests_of(parts)["by_number"]
    (parts / "helpers.py").write_text(PARTS["helpers.py"].replace("NUMBER = 3", "NUMBER = 4"))
    assert digests_of(parts)["by_number"] != before


def test_a_function_without_a_file_counts_by_its_code_and_what_it_closes_over():
    def typed(source, **names):
        namespace = {}
        exec(compile(source, "<a cell>", "exec"), names, namespace)
        return sources.digests([namespace["f"]])

    assert typed("def f(x): return x * 2") == typed("def f(x): return x * 2")
    assert typed("def f(x): return x * 2") != typed("def f(x): return x * 3")
    assert typed("def f(x): return x * n", n=2) != typed("def f(x): return x * n", n=3)
    assert typed("def f(x): return x in {'a', 'b', 'c'}") == typed("def f(x): return x in {'c', 'b', 'a'}")


def test_what_leads_in_a_circle_ends():
    def f(x):
        return f(x) + g(x)

    def g(x):
        return f(x)

    assert sources.digests([f]) == sources.digests([f])


def test_installed_packages_and_torch_count_with_their_version():
    def f(x):
        return torch.nn.functional.relu(pytest.approx(x))

    (_own, *rest) = sources.digests([f])
    assert len(rest) < 8  # not the thousands of files that torch leads to


def test_the_built_in_patterns_cost_nothing(monkeypatch):
    # Private: no file may be read, since their files are in the digest of the package.
    monkeypatch.setattr(sources, "_file", lambda path: 1 / 0)
    for pattern in patterns.DEFAULT_PATTERNS:
        assert sources.digests([pattern.search, pattern.replace, pattern.check, pattern.profit]) == []
