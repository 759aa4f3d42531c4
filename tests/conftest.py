"""What every test can ask for: a clean process, and what the backend did with a function."""

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

# Two cores, small tensors: threads cost more than they bring, and results do not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Before anything imports Triton, which reads it then: without a GPU, kernels run on the tensors of a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch._inductor.config

import liger_compile
from liger_compile import pipeline
from liger_compile.ops import dispatch

# Dynamo measures how long the guards of each graph take, and empties the caches of the processor before: that is half
# of the time of a small compilation, and nobody reads it.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0

# What Inductor writes for a CPU compiles in half the time without vector instructions; what it writes is not ours.
torch._inductor.config.cpp.simdlen = 1


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _clean():
    """No test sees what another compiled."""
    torch._dynamo.reset()
    liger_compile.clear_reports()
    torch.manual_seed(0)


@pytest.fixture
def interpreted(monkeypatch):
    """Ops run their kernels on tensors of a CPU too; not where there is a GPU, for which they are compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        """A GPU rounds float32 to bfloat16; the interpreter would cut it off."""
        if str(source) != "fp32" or str(target) != "bf16":
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(data.reshape(-1).copy()).bfloat16()
        return rounded.view(torch.int16).numpy().view("uint16").reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
    monkeypatch.setattr(dispatch, "INTERPRET", True)

    # The interpreter replaces the functions of the language in every launch, and again in every call of a function
    # that a kernel makes, which takes a third of the time. Once a test is enough.
    language = SimpleNamespace(__globals__={"tl": interpreter.tl, "core": interpreter.tl.core})
    replaced = interpreter._patch_lang(language)
    # Triton before 3.9 converts an array of one element, which numpy does no longer, for loops as long as an argument.
    replaced.set_attr(interpreter.tl.tensor, "__index__", lambda each: int(each.handle.data.item()))
    monkeypatch.setattr(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope())
    yield
    replaced.restore()


@pytest.fixture
def kept_for_backward():
    """kept(function, *args) -> the bytes that autograd keeps between forward and backward, without those of the
    arguments; and the gradients of the sum of the squares of the result."""

    def kept(function, *args):
        sizes, leaves = {}, [arg.detach().clone().requires_grad_() for arg in args]
        known = {leaf.untyped_storage().data_ptr() for leaf in leaves}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = function(*leaves)
        gradients = torch.autograd.grad(result.square().sum(), leaves)
        return sum(size for storage, size in sizes.items() if storage not in known), gradients

    return kept


@pytest.fixture
def module(monkeypatch):
    """module(name) imports one of the benches, which are in the repository and not in the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def run_liger():
    """run(function, *args, **options) -> (result, reports) of one call under backend="liger".

    What pays on this machine is left out, unless policy="auto" asks for it.
    """

    def run(function, *args, **options):
        liger_compile.clear_reports()
        settings = {"liger.inner": "eager", "liger.strict": True, "liger.policy": "always"}
        settings.update({f"liger.{name}": value for name, value in options.items()})
        result = torch.compile(function, backend="liger", options=settings)(*args)
        return result, liger_compile.reports()

    return run


@pytest.fixture
def guards_of_ours(monkeypatch):
    """The guards on sizes that the rewriting of graphs has taken: there have to be none."""
    taken, rewritten = [], pipeline.run_steps

    def counted(gm, *args, **kwargs):
        values = (node.meta.get("example_value") for node in gm.graph.nodes)
        shape_env = next((each.node.shape_env for each in values if isinstance(each, torch.SymInt)), None)
        before = len(shape_env.guards) if shape_env else 0
        result = rewritten(gm, *args, **kwargs)
        taken.extend(str(guard.expr) for guard in (shape_env.guards[before:] if shape_env else ()))
        return result

    monkeypatch.setattr(pipeline, "run_steps", counted)
    yield taken
    assert not taken


@pytest.fixture
def process_group():
    """Of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def liger_is_as_right_as_eager():
    """check(function, *args, frozen=(), inner="aot_eager", **options): results and gradients against a float64 run.

    The error (L2) may be twice that of eager code in the same dtype, plus a unit of rounding, for operations that may
    be ordered differently. A single number, such as a loss, eager code may get right by luck: four units, or a
    quarter of a unit of the dtype of the inputs, about what the rounding of the logits does to the mean of some.
    """

    def check(function, *args, frozen=(), inner="aot_eager", **options):
        exact = _differentiated(function, args, frozen, torch.float64)
        eager = _differentiated(function, args, frozen)
        options = {"inner": inner, "strict": True, "policy": "always", **options}
        options = {f"liger.{name}": value for name, value in options.items()}
        liger = _differentiated(torch.compile(function, backend="liger", options=options), args, frozen)
        assert any(site.kind == "replace" for report in liger_compile.reports() for site in report.sites)
        for wanted, plain, ours in zip(exact, eager, liger, strict=True):
            assert ours.dtype == plain.dtype and ours.shape == plain.shape
            unit = torch.finfo(ours.dtype).eps
            if not wanted.dim():
                unit = max(4 * unit, torch.finfo(args[0].dtype).eps / 4)
            allowed = 2 * (plain.double() - wanted).norm() + unit * wanted.norm()
            assert (ours.double() - wanted).norm() <= allowed

    return check


def _differentiated(function, args, frozen, dtype=None):
    """The results of a function, and the gradients of all floating arguments that are not frozen."""
    inputs = []
    for position, arg in enumerate(args):
        if isinstance(arg, torch.Tensor) and arg.is_floating_point():
            arg = arg.detach().to(dtype or arg.dtype, copy=True).requires_grad_(position not in frozen)
        inputs.append(arg)
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(r.shape, generator=generator).to(args[0].dtype).to(r) for r in results]
    wanted = [each for each in inputs if isinstance(each, torch.Tensor) and each.requires_grad]
    gradients = torch.autograd.grad(results, wanted, upstream, allow_unused=True)
    return [*(r.detach() for r in results), *(g for g in gradients if g is not None)]
