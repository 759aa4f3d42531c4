"""Which modes each node runs in: as a value, whatever is switched in between."""

import contextlib
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from liger_compile.graphs.regions import Region, Regions, around, in_words, is_switch, without_modes
from liger_compile.testing import graphs

autocast = partial(torch.autocast, "cpu", torch.bfloat16)
no_autocast = partial(torch.autocast, "cpu", enabled=False)
BF16 = (("cpu", torch.bfloat16),)


def nested(*contexts):
    """sin, cos within each of the contexts, one in the other, and sin again."""

    def f(x):
        first = x.sin()
        with contextlib.ExitStack() if not contexts else contexts[0]():
            if len(contexts) > 1:
                with contexts[1]():
                    inner = x.cos()
            else:
                inner = x.cos()
        return first, inner, x.tan()

    return f


def regions_of(function, *args):
    """The regions of a function's graph, by the name of what is called."""
    module, _ = graphs.capture(function, *args)
    regions = Regions(module.graph)
    return module.graph, regions, {str(node.target): regions.of[node] for node in module.graph.nodes}


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("contexts", "has_gradients", "on"),
    [
        ((torch.no_grad,), False, ()),
        ((torch.no_grad, torch.enable_grad), True, ()),
        ((torch.inference_mode,), False, ()),
        ((partial(torch.inference_mode, False),), True, ()),
        ((torch.inference_mode, torch.enable_grad), False, ()),
        ((torch.inference_mode, partial(torch.inference_mode, False)), True, ()),
        ((torch.no_grad, partial(torch.inference_mode, False)), True, ()),
        ((autocast,), True, BF16),
        ((autocast, no_autocast), True, ()),
        ((no_autocast, autocast), True, BF16),
        ((autocast, partial(torch.autocast, "cpu", torch.float16)), True, (("cpu", torch.float16),)),
        ((autocast, torch.no_grad), False, BF16),
    ],
)
def test_modes_nest(contexts, has_gradients, on):
    _, regions, of = regions_of(nested(*contexts), X)
    assert (of["cos"].has_gradients, of["cos"].autocast) == (has_gradients, on)
    assert of["sin"] == of["tan"] == around()
    assert regions.differ_in_gradients == (not has_gradients)


@pytest.mark.parametrize(
    ("context", "has_gradients", "on"),
    [(torch.no_grad, False, ()), (torch.inference_mode, False, ()), (autocast, True, BF16)],
)
def test_the_modes_around_the_function_are_read_too(context, has_gradients, on):
    with context():
        _, _, of = regions_of(nested(torch.enable_grad), X)
    assert (of["sin"].has_gradients, of["sin"].autocast) == (has_gradients, on)
    assert of["cos"].has_gradients == (context is not torch.inference_mode)


def test_a_mode_that_is_set_stays_set():
    def f(x):
        torch.set_grad_enabled(False)
        y = x.sin()
        torch.set_grad_enabled(True)
        return y, x.cos()

    _, _, of = regions_of(f, X)
    assert (of["sin"].grad_mode, of["cos"].grad_mode) == (False, True)


@pytest.mark.parametrize(
    ("transformed", "depth"),
    [
        (lambda x: torch.vmap(torch.cos)(x), 1),
        (lambda x: torch.vmap(torch.vmap(torch.cos))(x), 2),
        (lambda x: torch.func.grad(lambda t: torch.cos(t).sum())(x), 1),
        (lambda x: torch.func.jvp(torch.cos, (x,), (x,)), 2),
        (lambda x: torch.func.vjp(torch.cos, x)[0], 1),
        (lambda x: torch.vmap(torch.func.grad(lambda t: torch.cos(t).sum()))(x), 2),
    ],
    ids=["vmap", "vmap of vmap", "grad", "jvp", "vjp", "vmap of grad"],
)
def test_transforms_of_torch_func(transformed, depth):
    def f(x):
        first = x.sin()
        return first, transformed(x), x.tan()

    module, _ = graphs.capture(f, X)
    regions = Regions(module.graph)
    by_name = {graphs.name_of(node): regions.of[node] for node in module.graph.nodes}
    assert len(by_name["cos"].transforms) == depth
    assert by_name["sin"] == by_name["tan"]


def _sets_and_brings_back(x):
    y = x.sin()
    torch.set_default_dtype(torch.float64)
    z = x.cos()
    torch.set_default_dtype(torch.float32)
    return y, z, x.tan()


def _forbids_hooks(x):
    y = x.sin()
    with torch.autograd.graph.disable_saved_tensors_hooks("no"):
        z = x.cos()
    return y, z, x.tan()


def test_other_settings_make_other_regions():
    _, _, of = regions_of(_sets_and_brings_back, X)
    assert of["sin"] != of["cos"] != of["tan"]
    _, _, of = regions_of(_forbids_hooks, X)
    assert of["sin"] == of["tan"] != of["cos"]


def test_a_choice_of_kernels_changes_no_meaning():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _, _, of = regions_of(nested(partial(sdpa_kernel, SDPBackend.MATH)), X)
    assert of["cos"].kernels != of["sin"].kernels
    assert of["cos"].meaning == of["sin"].meaning == of["tan"].meaning


def _unheard_of():
    """Stands for what a later version of torch brings."""


def test_a_call_that_nobody_knows_begins_a_region_like_no_other():
    module, _ = graphs.capture(lambda x: (x.sin(), x.cos()), X)
    last = next(node for node in module.graph.nodes if node.target == "cos")
    with module.graph.inserting_before(last):
        switch = module.graph.call_function(_unheard_of)
    regions = Regions(module.graph)
    first = next(node for node in module.graph.nodes if node.target == "sin")
    assert is_switch(switch) and regions.of[first] != regions.of[last]
    assert in_words(switch) == "_unheard_of is called, which may change the modes of later operations,"


@pytest.mark.parametrize(
    "target", [torch._C._log_api_usage_once, torch.sym_max, max, torch.arange, torch.Size]
)
def test_what_only_computes_switches_nothing(target):
    graph = torch.fx.Graph()
    node = graph.call_function(target, (2, 3))
    node.meta["example_value"] = torch.arange(3) if target is torch.arange else 3
    assert not is_switch(node)


@pytest.mark.parametrize("context", [torch.no_grad, autocast, torch.enable_grad])
def test_a_body_runs_in_the_modes_of_its_call(context):
    def f(x):
        with context():
            return checkpoint(torch.sin, x, use_reentrant=False)

    module, _ = graphs.capture(f, X.clone().requires_grad_())
    outside = Regions(module.graph)
    (call,) = [node for node in module.graph.nodes if "checkpoint" in node.name]
    body = module.get_submodule(call.args[0].target)
    inside = Regions(body.graph, [outside.of[call]])
    assert {inside.of[node] for node in body.graph.nodes} == {outside.of[call]}
    assert inside.why_uncertain is None
    others = Regions(body.graph, [outside.of[call], Region(grad_mode=True, inference_mode=True)])
    assert others.why_uncertain == "the calls of its subgraph run in several modes"


def test_entering_a_region():
    with autocast(), torch.no_grad():
        region = around()
        assert not region.has_gradients and region.autocast_on("cpu") == ("cpu", torch.bfloat16)
        with without_modes():
            assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    with region.entered():
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
