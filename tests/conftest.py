"""What every test can ask for: a clean process, and what the backend did with a function."""

import atexit
import datetime
import gc
import logging
import os
from types import SimpleNamespace

# Two cores, small tensors: threads cost more than they bring, and results do not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What Inductor writes for a CPU compiles in half the time without vector instructions; what it writes is not ours.
# An environment variable, so that it holds in processes that tests start.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
# Dynamo looks for cyclic garbage after each compilation, which is of use where memory is short.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

import pytest
import torch

# Before anything imports Triton, which reads it then: without a GPU, kernels run on the tensors of a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import liger_compile
from liger_compile import pipeline
from liger_compile.ops import dispatch
from liger_compile.testing import precision
from tests.helpers.gradients import gradients_of

# Dynamo measures how long the guards of each graph take, and empties the caches of the processor before: that is half
# of the time of a small compilation, and nobody reads it.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0

# Recent versions of pytest add their handlers to each logger that does not propagate. With a handler, torch writes a
# structured trace of each compilation.
logging.getLogger("torch.__trace").propagate = True

# Python looks for cyclic garbage after every 700 new objects, and a compilation makes millions that stay until it
# ends. That took a seventh of the time of the tests.
gc.set_threshold(50_000, 10, 10)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config):
    """The whole suite runs in two processes if pytest-xdist is installed. Options and named files go before."""
    has_xdist = config.pluginmanager.hasplugin("xdist") and "PYTEST_XDIST_WORKER" not in os.environ
    is_whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    if has_xdist and is_whole and config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses = 2
        config.option.dist = "worksteal"  # the tests of a file differ by a factor of a thousand


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz-seed",
        type=int,
        default=int(datetime.date.today().strftime("%Y%m%d")),
        help="what the fuzzers draw from: other programs and spellings every day, the same ones for the same number",
    )


def pytest_terminal_summary(terminalreporter, config):
    if terminalreporter.stats.get("failed"):
        terminalreporter.line(f"The fuzzers drew from this seed: --fuzz-seed {config.option.fuzz_seed}")


@pytest.fixture
def fuzz_seed(request):
    return request.config.option.fuzz_seed


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """What is imported and collected stays until the end, so no collection of garbage needs to look at it."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


# Where there is no GPU, torch.manual_seed keeps a stack trace of the call for each kind of device that there may be.
_seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _clean():
    """No test sees what another compiled."""
    torch._dynamo.reset()
    liger_compile.clear_reports()
    _seed(0)


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

    # The interpreter makes a table of all dtypes for each operation, a tenth of the time.
    find, known = interpreter._get_np_dtype, {}

    def np_dtype(of):
        name = of.scalar.name
        if name not in known:
            known[name] = find(of)
        return known[name]

    monkeypatch.setattr(interpreter, "_get_np_dtype", np_dtype)
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
    """check(function, *args, frozen=(), inner="aot_eager", **options): results and gradients meet the numerics bar, and
    something was replaced. All floating arguments get a gradient, but those at the positions `frozen`."""

    def check(function, *args, frozen=(), inner="aot_eager", **options):
        def inputs():
            return [
                arg.requires_grad_(at not in frozen)
                if isinstance(arg, torch.Tensor) and arg.is_floating_point()
                else arg
                for at, arg in enumerate(precision.copied(args))
            ]

        with precision.in_double():
            exact = gradients_of(function, *precision.as_double(inputs()))
        eager = gradients_of(function, *inputs())
        options = {"inner": inner, "strict": True, "policy": "always", **options}
        options = {f"liger.{name}": value for name, value in options.items()}
        ours = gradients_of(torch.compile(function, backend="liger", options=options), *inputs())
        assert any(site.kind == "replace" for report in liger_compile.reports() for site in report.sites)
        precision.assert_no_worse(ours, eager, exact)

    return check
