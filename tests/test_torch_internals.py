"""What touches private parts of torch: modes after a trace that raised."""

import gc
import threading
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch._C._dynamo.guards import GlobalStateGuard

from liger_compile.compile import compile_graph, when_called

is_failing = threading.Event()


@torch.library.custom_op("liger_compile_tests::fails_in_traces", mutates_args=())
def fails_in_traces(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@fails_in_traces.register_fake
def _(x):
    if is_failing.is_set():
        raise ArithmeticError("cannot be traced")
    return torch.empty_like(x)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def several():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode(False):
        yield


MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "deterministic": deterministic,
    "several": several,
}


def modes():
    return (
        GlobalStateGuard().__getstate__(),
        torch.is_inference_mode_enabled(),
        torch._C._dispatch_tls_local_include_set(),
        torch._C._dispatch_tls_local_exclude_set(),
    )


def failing(gm, inputs, inner):
    is_failing.set()
    try:
        return compile_graph(gm, inputs, inner=inner)
    finally:
        is_failing.clear()


@pytest.fixture
def modes_stay():
    """Those of the other tests, where this one fails."""
    with torch._C._PreserveDispatchKeyGuard(), torch.set_grad_enabled(True):
        yield
        torch.use_deterministic_algorithms(False)


def failing_in(mode, x):
    with MODES[mode]():
        return torch.ops.liger_compile_tests.fails_in_traces(x * 2)


def failing_in_a_body(mode, x):
    return torch.cond(x.sum() > 0, lambda x: failing_in(mode, x), lambda x: x * 3, (x,))


@pytest.mark.parametrize(
    ("mode", "function", "inner", "is_late"),
    [
        ("inference_mode", failing_in, "inductor", True),
        ("inference_mode", failing_in_a_body, "aot_eager", False),
        ("autocast", failing_in_a_body, "aot_eager", True),
        ("several", failing_in, "aot_eager", False),
        pytest.param("inference_mode", failing_in, "aot_eager", False, marks=pytest.mark.slow),
        pytest.param("no_grad", failing_in, "aot_eager", True, marks=pytest.mark.slow),
        pytest.param("autocast", failing_in, "inductor", False, marks=pytest.mark.slow),
        pytest.param("autocast", failing_in, "aot_eager", True, marks=pytest.mark.slow),
        pytest.param("deterministic", failing_in, "aot_eager", True, marks=pytest.mark.slow),
        pytest.param("several", failing_in, "aot_eager", True, marks=pytest.mark.slow),
    ],
)
def test_a_trace_that_raises_leaves_no_mode(modes_stay, mode, function, inner, is_late):
    """Neither at once nor when the exception is dropped, which holds on to what the graph has begun."""

    def backend(gm, inputs):
        compile = partial(failing, gm, inner=inner)
        return when_called(compile) if is_late else compile(inputs)

    x = torch.ones(3)
    before = modes()
    with pytest.raises((RuntimeError, ArithmeticError), match="cannot be traced") as raised:
        torch.compile(partial(function, mode), backend=backend)(x)
    at_once = modes()
    del raised
    gc.collect()
    assert before == at_once == modes()
    assert torch.equal(x * 2, x + x)
