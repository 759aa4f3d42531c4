"""use_for_inductor(): which calls of torch.compile get this backend, until when, with which options."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liger_compile
from liger_compile import for_inductor, use_for_inductor
from liger_compile.cli import doctor
from liger_compile.torch_internals import inductor
from liger_compile.torch_internals.aot_autograd import cache_counts
from liger_compile.torch_internals.dynamo import lookup_backend, unwrapped

ROOT = Path(__file__).parent.parent
FAST = {"liger.inner": "aot_eager"}


def step(x, head):
    """Has one rewrite: the loss with its head."""
    return F.cross_entropy(x @ head.T, torch.zeros(len(x), dtype=torch.long))


@pytest.fixture
def inputs():
    return torch.randn(4, 8, requires_grad=True), torch.randn(64, 8)


@pytest.fixture(autouse=True)
def _nothing_stays():
    yield
    assert for_inductor.is_used_for_inductor() is None
    assert torch._TorchCompileInductorWrapper.__module__ == "torch"


@pytest.fixture
def stock(monkeypatch):
    """The graphs that Inductor gets from torch.compile without this package; they are not compiled."""
    graphs = []

    def call(self, graph, inputs, **_):
        graphs.append(self)
        return graph.forward

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", call)
    return graphs


def is_ours(compiled, *inputs) -> bool:
    """Whether this backend compiles a function, and not Inductor."""
    before = len(liger_compile.reports())
    torch._dynamo.reset()
    compiled(*inputs)
    return len(liger_compile.reports()) > before


def as_module() -> nn.Module:
    module = nn.Module()
    module.forward = step
    return module


WAYS = {
    "by name": lambda: torch.compile(step, backend="inductor"),
    "by default": lambda: torch.compile(step),
    "as a decorator": lambda: torch.compile(backend="inductor")(step),
    "with a mode": lambda: torch.compile(step, mode="max-autotune-no-cudagraphs"),
    "with options": lambda: torch.compile(step, options={"max_autotune": False}),
    "a module": lambda: torch.compile(as_module()),
    "a module in place": lambda: (module := as_module()).compile() or module,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_for_inductor_gets_this_backend(way, inputs, stock):
    with use_for_inductor(FAST):
        compiled = WAYS[way]()
        assert is_ours(compiled, *inputs)
    (report,) = liger_compile.reports()
    assert report.count("replace") == 1 and not stock
    assert any("use_for_inductor() replaces" in note for note in report.notes)
    torch.testing.assert_close(compiled(*inputs), step(*inputs))
    assert not is_ours(WAYS[way](), *inputs) and stock


def test_other_backends_are_what_they_were(inputs):
    seen = []
    with use_for_inductor(FAST):
        torch.compile(step, backend="eager")(*inputs)
        torch.compile(step, backend=lambda graph, _: seen.append(graph) or graph.forward)(*inputs)
        assert not liger_compile.reports() and len(seen) == 1
        torch.compile(step, backend="liger", options=FAST)(*inputs)
    (report,) = liger_compile.reports()
    assert not any("use_for_inductor" in note for note in report.notes)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_default_backend"), reason="torch 2.13 or later")
def test_a_default_backend_that_the_user_set_stays_the_default(inputs):
    torch.compiler.set_default_backend("eager")
    try:
        with use_for_inductor(FAST):
            assert not is_ours(torch.compile(step), *inputs)
            assert is_ours(torch.compile(step, backend="inductor"), *inputs)
        torch.compiler.set_default_backend(
            "liger"
        )  # the way of torch itself, for programs that name no backend
        assert is_ours(torch.compile(step, options=FAST), *inputs)
    finally:
        torch.compiler.set_default_backend(None)


def test_code_that_does_not_call_torch_compile_is_not_affected(inputs):
    """torch.export, AOTInductor, Inductor's own functions, and the registry of Dynamo."""
    graph = torch.fx.symbolic_trace(lambda x: x.sin() + 1)
    with use_for_inductor(FAST):
        exported = torch.export.export(as_module_of(torch.sin), (inputs[0],))
        torch.testing.assert_close(exported.module()(inputs[0]), inputs[0].sin())
        result = torch._inductor.compile(graph, [inputs[1]])(inputs[1])
        torch.testing.assert_close(torch.utils._pytree.tree_leaves(result)[0], inputs[1].sin() + 1)
        assert lookup_backend("inductor").__module__ == "torch._dynamo.backends.inductor"
        ahead = torch._TorchCompileAOTInductorWrapper("default", None, None)
        assert type(ahead).__mro__[1] is inductor.Stock and not hasattr(ahead, "compiler_fn")
    assert not liger_compile.reports()


def as_module_of(function) -> nn.Module:
    class Module(nn.Module):
        def forward(self, x):
            return function(x)

    return Module()


def test_it_ends_with_the_block_even_if_the_block_raises():
    with pytest.raises(ZeroDivisionError), use_for_inductor():
        raise ZeroDivisionError
    assert for_inductor.is_used_for_inductor() is None


def test_the_last_call_in_effect_decides_in_whatever_order_they_end(inputs):
    def fuel():
        assert is_ours(torch.compile(step), *inputs)
        return liger_compile.reports()[-1].count("replace")

    first = use_for_inductor(FAST)
    second = use_for_inductor({**FAST, "liger.fuel": 0})
    assert fuel() == 0
    with use_for_inductor(FAST):
        assert fuel() == 1
        second.undo()
        assert fuel() == 1
    assert fuel() == 1
    second.undo()  # no effect a second time
    assert fuel() == 1
    third = use_for_inductor({**FAST, "liger.fuel": 0})
    first.undo()
    assert fuel() == 0
    third.undo()


def test_what_was_compiled_before_and_what_is_called_after_keep_their_backend(inputs, stock):
    before = torch.compile(step)
    with use_for_inductor(FAST):
        assert not is_ours(before, *inputs)
        during = torch.compile(step)
    assert is_ours(during, *inputs)
    assert not is_ours(before, *inputs)


def test_two_calls_with_the_same_arguments_share_what_is_compiled(inputs):
    """Dynamo compares the backends, as it does those of Inductor."""
    with use_for_inductor(FAST):
        torch.compile(step)(*inputs)
        torch.compile(step)(*inputs)
        assert len(liger_compile.reports()) == 1
        torch.compile(step, options={"liger.fuel": 0})(*inputs)
        assert len(liger_compile.reports()) == 2


def test_backends_of_inductor_are_equal_to_those_of_inductor_only():
    make = inductor.Stock
    before, same, other = (
        make("default", None, None),
        make("default", None, None),
        make(None, {"max_autotune": True}, None),
    )
    with use_for_inductor():
        ours = torch._TorchCompileInductorWrapper("default", None, None)
        assert before == same and before != other
        assert before != ours and ours != before
        assert isinstance(before, torch._TorchCompileInductorWrapper) and isinstance(ours, make)
        assert list(unwrapped(ours))[-1] is lookup_backend("liger")  # so DDP's parts are prepared


def test_compiled_models_are_pickled_and_copied_as_those_of_inductor():
    """torch.save(model) of a compiled model."""
    model, ids = a_llama(layers=1), torch.arange(32).view(2, 16)
    expected = model(input_ids=ids, labels=ids).loss
    with use_for_inductor(FAST):
        compiled = torch.compile(model)
        models = [copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))]
    models.append(pickle.loads(pickle.dumps(compiled)))
    for loaded in models:
        before = len(liger_compile.reports())
        torch._dynamo.reset()
        torch.testing.assert_close(loaded(input_ids=ids, labels=ids).loss, expected)
        assert len(liger_compile.reports()) == before + 1


def test_other_threads_are_affected(inputs):
    found = []
    with use_for_inductor(FAST):
        thread = threading.Thread(target=lambda: found.append(is_ours(torch.compile(step), *inputs)))
        thread.start()
        thread.join()
    assert found == [True]


# Options.


def given_to_inductor(monkeypatch, compiled, *inputs):
    """The patches of Inductor's config that a compilation has."""
    found = []

    def compile_fx(gm, inputs, patches, decompositions):
        found.append({key: value for key, value in patches.items() if "cacheable" not in key})
        return gm.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    torch._dynamo.reset()
    compiled(*inputs)
    return found[-1]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({}, {}, {}),
        ({"max_autotune": True}, {}, {"max_autotune": True}),
        ({"max_autotune": True}, {"options": {"max_autotune": False}}, {"max_autotune": False}),
        ({"max_autotune": True}, {"options": {"max-autotune": False}}, {"max_autotune": False}),
        (
            {"max_autotune": True},
            {"options": {"epilogue_fusion": True}},
            {"max_autotune": True, "epilogue_fusion": True},
        ),
        (
            {},
            {"mode": "max-autotune-no-cudagraphs"},
            {"max_autotune": True, "coordinate_descent_tuning": True},
        ),
        (
            {"liger.mode": "reduce-overhead"},
            {"mode": "max-autotune-no-cudagraphs"},
            {"max_autotune": True, "coordinate_descent_tuning": True},
        ),
        (
            {"liger.mode": "max-autotune-no-cudagraphs"},
            {},
            {"max_autotune": True, "coordinate_descent_tuning": True},
        ),
        (
            {},
            {"options": {"liger.mode": "max-autotune-no-cudagraphs"}},
            {"max_autotune": True, "coordinate_descent_tuning": True},
        ),
    ],
)
def test_options_of_inductor_and_modes_reach_it(ours, theirs, expected, inputs, monkeypatch):
    with use_for_inductor(ours):
        assert given_to_inductor(monkeypatch, torch.compile(step, **theirs), *inputs) == expected


def test_options_of_a_call_override_those_of_all_calls(inputs):
    with use_for_inductor({**FAST, "liger.fuel": 0}):
        torch.compile(step)(*inputs)
        torch.compile(step, options={"liger.fuel": None})(*inputs)
    assert [report.count("replace") for report in liger_compile.reports()] == [0, 1]


def test_the_options_of_the_caller_are_not_changed(inputs):
    given, own = dict(FAST), {"liger.fuel": 0}
    with use_for_inductor(given):
        given.clear()
        torch.compile(step, options=own)(*inputs)
    assert own == {"liger.fuel": 0} and len(liger_compile.reports()) == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"liger.fule": 1}, ValueError),
        ({"liger.fuel": "one"}, ValueError),
        ({"no_such_option": 1}, RuntimeError),
        ({"liger.mode": "no-such-mode"}, RuntimeError),
    ],
)
def test_wrong_options_raise_at_once_and_change_nothing(options, error):
    with pytest.raises(error):
        use_for_inductor(options)
    assert for_inductor.is_used_for_inductor() is None
    with use_for_inductor(), pytest.raises(error):
        torch.compile(step, options=options)


# accelerate, which accepts only the backends of a fixed list. The Trainer is one of the programs in docs/examples.


def a_llama(layers=2):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(("regional", "num_graphs"), [(False, 1), (True, 5)])
def test_accelerate_by_name(regional, num_graphs):
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'liger-compile[examples]'")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import TorchDynamoPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    model, ids = a_llama(), torch.arange(32).view(2, 16)
    expected = model(input_ids=ids, labels=ids).loss
    with use_for_inductor(FAST):
        plugin = TorchDynamoPlugin(backend="inductor", use_regional_compilation=regional)
        accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
        compiled = accelerator.prepare(model)
    loss = compiled(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    torch.testing.assert_close(loss, expected)
    assert len(liger_compile.reports()) == num_graphs
    notes = [note for report in liger_compile.reports() for note in report.notes]
    assert sum("the graph is one layer of a model" in note for note in notes) == regional
    AcceleratorState._reset_state(reset_partial_state=True)


# Inductor itself.


def test_inductor_compiles_below_this_backend_and_the_caches_keep_the_two_apart(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def grads():
        torch._dynamo.reset()
        x, head = inputs
        x.grad = None
        torch.compile(step)(x, head).backward()
        return x.grad

    x, head = inputs
    (expected,) = torch.autograd.grad(step(x, head), x)
    counts = []
    for replaced in (False, True, False, True):
        before = cache_counts()
        with use_for_inductor() if replaced else mock.MagicMock():
            torch.testing.assert_close(grads(), expected)
        after = cache_counts()
        counts.append({key: after[key] - before[key] for key in after})
    assert [report.count("replace") for report in liger_compile.reports()] == [1, 1]
    assert counts[0] == counts[1] and counts[2] == counts[3] and counts[0] != counts[2]


# doctor and the environment.


def test_doctor_says_that_it_is_on(capsys):
    doctor.doctor("eager")
    assert "inductor" not in capsys.readouterr().out
    with use_for_inductor():
        assert doctor.doctor("eager") == 0
    assert (
        '--   torch.compile uses backend="liger" for "inductor" too: use_for_inductor()'
        in capsys.readouterr().out
    )


def test_doctor_knows_the_variable_and_whether_it_has_an_effect(capsys, monkeypatch):
    monkeypatch.setenv(for_inductor.VARIABLE, "1")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    doctor.doctor("eager")
    printed = capsys.readouterr().out
    assert "no option reads it" not in printed
    assert (
        "takes effect only where a program imports liger_compile: TORCH_DEVICE_BACKEND_AUTOLOAD is 0"
        in printed
    )
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD")
    monkeypatch.setattr(doctor, "entry_points", lambda _: [])
    doctor.doctor("eager")
    assert "imports liger_compile: no installed package has the entry point" in capsys.readouterr().out


PROGRAM = """
import sys
import torch
assert ("liger_compile" in sys.modules) == (sys.argv[1] == "imported")
function = torch.compile(lambda x, y: torch.nn.functional.cross_entropy(x @ y, x.argmax(1)), options=eval(sys.argv[2]))
function(torch.randn(4, 8), torch.randn(8, 64))
if "liger_compile" in sys.modules:
    import liger_compile
    print(liger_compile.reports()[-1])
"""


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a process with the entry points of pyproject.toml, whatever version of this package is installed."""
    found = folder / "entry_points_of_these_sources-0.dist-info"
    found.mkdir(exist_ok=True)
    (found / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: entry-points-of-these-sources\nVersion: 0\n"
    )
    text = (ROOT / "pyproject.toml").read_text()
    entry = re.search(r'^\[project.entry-points."torch.backends"\]\n(\w+) = "(.*)"$', text, re.MULTILINE)
    (found / "entry_points.txt").write_text(f"[torch.backends]\n{entry[1]} = {entry[2]}\n")
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run(
        [sys.executable, *arguments], text=True, capture_output=True, timeout=300, env=env, cwd=folder
    )


def test_the_variable_needs_no_line_in_the_program(tmp_path):
    options = "{'liger.inner': 'eager'}"
    done = run(tmp_path, "-c", PROGRAM, "imported", options, LIGER_COMPILE_FOR_INDUCTOR="1")
    assert done.returncode == 0, done.stderr
    assert "linear_cross_entropy" in done.stdout
    assert "LIGER_COMPILE_FOR_INDUCTOR=1 replaces" in " ".join(done.stdout.split())


def test_the_package_may_be_imported_before_torch(tmp_path):
    program = "import liger_compile; print(liger_compile.for_inductor.is_used_for_inductor())"
    done = run(tmp_path, "-c", program, LIGER_COMPILE_FOR_INDUCTOR="1")
    assert done.returncode == 0 and done.stdout.strip() == "LIGER_COMPILE_FOR_INDUCTOR=1", done.stderr


@pytest.mark.parametrize("value", [pytest.param("", marks=pytest.mark.slow), "0"])
def test_without_the_variable_torch_imports_nothing_of_this_package(tmp_path, value):
    program = PROGRAM.partition("function =")[0]
    done = run(tmp_path, "-c", program, "not imported", LIGER_COMPILE_FOR_INDUCTOR=value)
    assert done.returncode == 0, done.stderr


def test_a_wrong_value_of_the_variable_is_an_error(monkeypatch):
    monkeypatch.setenv(for_inductor.VARIABLE, "yes")
    with pytest.raises(ValueError, match="expected 1 or 0, got 'yes'"):
        for_inductor.follow_environment()
