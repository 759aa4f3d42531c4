"""A norm's backward with the sums around it: the same numbers, and what is read otherwise is left."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from liger_compile import functional
from liger_compile.backward_passes import DEFAULT_PASSES, Backward, run_passes
from liger_compile.report import clear_reports, reports
from liger_compile.testing import precision
from tests.backward_passes.seen import Seen, names_of_ours
from tests.helpers.gradients import gradients_of
from tests.helpers.pairwise import parametrize

pytestmark = pytest.mark.usefixtures("uncached")

RMS_NORM = DEFAULT_PASSES[1]
_ours = torch.ops.liger_compile
BATCH, TOKENS, HIDDEN = 2, 12, 16
FORWARD = ["pre_norm_statistics", "pre_norm"]
MODES = {
    "llama": {"casting": "llama"},
    "gemma": {"casting": "gemma", "offset": 1.0},
}


class Block(nn.Module):
    """A residual stream, its norm, and some linear layers that read that."""

    def __init__(self, layers=2, has_weight=True, passes_by=True, **mode):
        super().__init__()
        self.before = nn.Linear(HIDDEN, HIDDEN)
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5) if has_weight else None
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(layers))
        self.passes_by, self.mode = passes_by, mode

    def forward(self, x):
        x = self.before(x)
        y = functional.pre_norm(x, self.weight, 1e-6, **self.mode)
        out = sum(layer(y).sin() for layer in self.layers)
        return x + out if self.passes_by else out


def differentiated(function, module, x):
    return gradients_of(function, x, parameters=module.parameters())


def graphs_of(module, x, dynamic=False, function=None):
    """What of ours is in the graphs of forward and of backward, after a comparison with eager code."""
    seen, function = Seen(), function or module
    expected = differentiated(function, module, x)
    options = {"post_grad_custom_post_pass": seen}
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)
    torch.testing.assert_close(differentiated(compiled, module, x), expected, rtol=1e-4, atol=1e-5)
    return seen.graphs


def inputs():
    return torch.randn(BATCH, TOKENS, HIDDEN, requires_grad=True)


@parametrize(mode=list(MODES), layers=[1, 3], passes_by=[True, False])
def test_one_op_takes_all_of_it(mode, layers, passes_by):
    module = Block(layers, passes_by=passes_by, **MODES[mode])
    forward, backward = graphs_of(module, inputs())
    assert (forward, backward) == (FORWARD, ["pre_norm_backward_fused"])


def test_without_a_weight():
    assert graphs_of(Block(has_weight=False), inputs())[1] == ["pre_norm_backward_fused"]


def test_with_frozen_weights():
    module = Block()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    x = inputs()
    seen = Seen()
    compiled = torch.compile(module, fullgraph=True, options={"post_grad_custom_post_pass": seen})
    found, expected = (
        (function(x).sum(), *torch.autograd.grad(function(x).sum(), x)) for function in (compiled, module)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert seen.graphs[-1] == ["pre_norm_backward_fused"]


def test_more_gradients_than_the_kernel_takes():
    assert graphs_of(Block(4), inputs())[1] == ["pre_norm_backward"]


def test_gradients_that_are_no_products():
    module = Block(1)
    module.layers = nn.ModuleList([nn.Tanh()])
    assert graphs_of(module, inputs())[1] == ["pre_norm_backward"]


def test_sizes_that_are_not_known():
    forward, backward = graphs_of(Block(), inputs(), dynamic=True)
    assert (forward, backward) == (FORWARD, ["pre_norm_backward_fused"])


class Spelled(Block):
    """The norm as a model has it."""

    def forward(self, x):
        x = self.before(x)
        wide = x.float()
        y = self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return x + sum(layer(y).sin() for layer in self.layers)


@pytest.mark.parametrize("recompute", ["auto", "off"])
def test_what_is_not_kept_is_computed_in_the_same_pass(recompute):
    """Norms are replaced, and marked for recompute."""
    clear_reports()
    module, x = Spelled(), inputs()
    expected = differentiated(module, module, x)
    options = {
        "liger.policy": "always",
        "liger.backward_passes": "always",
        "liger.recompute": recompute,
    }
    found = differentiated(torch.compile(module, backend="liger", options=options), module, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (report,) = reports()
    (site,) = report.backward.sites
    assert site.pattern == RMS_NORM.name
    assert ("and the norm" in site.reason) == (recompute == "auto")


def test_under_autocast():
    """Gradients come in in bfloat16, and the norm is read in it."""
    module, x, seen = Block(3), inputs(), Seen()

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x).float()

    compiled = torch.compile(function, fullgraph=True, options={"post_grad_custom_post_pass": seen})
    found, eager = (differentiated(each, module, x) for each in (compiled, function))
    precision.assert_no_worse(found, eager, differentiated(module, module, x))
    assert seen.graphs[-1] == ["pre_norm_backward_fused"]


def test_where_inductor_has_no_place_for_our_pass(monkeypatch):
    """In torch 2.11, where the user has one: norms are traced before, and nothing of ours is left."""
    monkeypatch.setattr("liger_compile.compile.with_backward_passes", lambda theirs, plan: None)
    seen = []

    class Theirs(CustomGraphPass):
        def __call__(self, graph):
            seen.append(names_of_ours(graph))

        def uuid(self):
            return None

    module, x = Spelled(), inputs()
    options = {
        "liger.policy": "always",
        "liger.backward_passes": "always",
        "post_grad_custom_post_pass": Theirs(),
    }
    found = differentiated(torch.compile(module, backend="liger", options=options), module, x)
    torch.testing.assert_close(found, differentiated(module, module, x), rtol=1e-4, atol=1e-5)
    assert seen == [[], []]


# Graphs as they are written ---------------------------------------------------------------------------------

MODE = 0.0, "llama"


def norm(x, rstd, weight):
    return _ours.pre_norm.default(x, rstd, weight, *MODE)


def backward(dy, x, rstd, weight):
    return _ours.pre_norm_backward.default(dy, x, rstd, weight, *MODE, True)


def all_of_it(g, ds, x, rstd, weight, w):
    y = norm(x, rstd, weight)
    dx, dweight = backward(g @ w + g.t() @ w, x, rstd, weight)
    return ds + dx, dweight, g.t() @ y


def nothing_comes_past(g, ds, x, rstd, weight, w):
    dx, dweight = backward(g @ w, x, rstd, weight)
    return dx.cos(), dweight, norm(x, rstd, weight) @ w


def two_read_the_gradient(g, ds, x, rstd, weight, w):
    dx, dweight = backward(g @ w, x, rstd, weight)
    return ds + dx, dx, dweight


def what_comes_past_is_late(g, ds, x, rstd, weight, w):
    dx, dweight = backward(g @ w, x, rstd, weight)
    return dx + ds.cos(), dweight


def of_another_norm(g, ds, x, rstd, weight, w):
    dx, dweight = backward(g @ w, x, rstd, weight)
    return ds + dx, dweight, norm(x, rstd, weight.cos()) @ w


def gradient_made_of_the_norm(g, ds, x, rstd, weight, w):
    """As in a checkpoint, where forward is run again before backward."""
    y = norm(x, rstd, weight)
    dx, dweight = backward((g * y) @ w, x, rstd, weight)
    return ds + dx, dweight


def what_comes_past_made_of_the_norm(g, ds, x, rstd, weight, w):
    y = norm(x, rstd, weight)
    past = y @ w
    dx, dweight = backward(g @ w, x, rstd, weight)
    return past + dx, dweight


def a_sum_that_is_turned(g, ds, x, rstd, weight, w):
    dx, dweight = backward((g @ w + g.cos() @ w).t(), x, rstd, weight)
    return ds + dx, dweight


def a_term_that_is_turned(g, ds, x, rstd, weight, w):
    dx, dweight = backward((g @ w).t() + g.cos() @ w, x, rstd, weight)
    return ds + dx, dweight


def gradient_that_is_turned(g, ds, x, rstd, weight, w):
    dx, dweight = backward(g @ w, x, rstd, weight)
    return ds + dx.t(), dweight


def of_other_shapes(g, ds, x, rstd, weight, w):
    terms = g.view(2, 8, 16) @ w, (g.cos() @ w).view(2, 8, 16)
    past = ds.view(4, 4, 16)
    dx, dweight = backward((terms[0] + terms[1]).view(16, 16), x, rstd, weight)
    return past + dx.view(4, 4, 16), dweight, norm(x, rstd, weight) @ w


def computed_gradient(g, ds, x, rstd, weight, w):
    dx, dweight = backward((g @ w).cos(), x, rstd, weight)
    return ds + dx, dweight


# Whether the gradient that comes past is added, and the norm computed again.
GRAPHS = {
    all_of_it: (True, True),
    nothing_comes_past: (False, True),
    two_read_the_gradient: (False, False),
    what_comes_past_is_late: (False, False),
    of_another_norm: (True, False),
    gradient_made_of_the_norm: (True, False),
    what_comes_past_made_of_the_norm: (True, False),
    a_sum_that_is_turned: None,
    a_term_that_is_turned: (True, False),
    gradient_that_is_turned: (False, False),
    of_other_shapes: (True, True),
    computed_gradient: None,
}


@pytest.mark.parametrize("function", GRAPHS, ids=lambda function: function.__name__)
def test_what_is_joined_and_what_is_left(function):
    g, ds, x, w = (torch.randn(HIDDEN, HIDDEN) for _ in range(4))
    arguments = g, ds, x, torch.rand(HIDDEN, 1), torch.rand(HIDDEN) + 0.5, w
    gm = make_fx(function, tracing_mode="fake")(*arguments)
    run_passes(Backward(gm.graph), [RMS_NORM], strict=True)
    gm.graph.lint()
    gm.recompile()
    for one, other in zip(*(tree_leaves(each(*arguments)) for each in (gm, function)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    joined = gm.graph.find_nodes(op="call_function", target=_ours.pre_norm_backward_fused.default)
    assert [(node.args[1] is not None, node.args[-1] is not None) for node in joined] == [
        each for each in [GRAPHS[function]] if each
    ]


def test_opcheck_of_what_no_model_calls():
    x, dy, weight = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8)
    of = x, torch.rand(3, 1), weight, *MODE
    torch.library.opcheck(_ours.pre_norm_backward.default, (dy, *of, True))
    torch.library.opcheck(_ours.pre_norm_backward_fused.default, ([dy, x], dy, *of, True, torch.bfloat16))
    torch.library.opcheck(_ours.pre_norm_backward_fused.default, ([dy], None, *of, False, None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_on_a_gpu(dtype, layers):
    """Gradients are as close to float64's as eager code's, or twice as far."""
    clear_reports()
    with torch.device("cuda"):
        module, x = Spelled(layers).to(dtype), inputs().to(dtype).detach().requires_grad_()
    found = differentiated(torch.compile(module, backend="liger"), module, x)
    assert [site.pattern for report in reports() for site in report.backward.sites] == [RMS_NORM.name]
    eager = differentiated(module, module, x)
    wide = copy.deepcopy(module).double()
    truth = differentiated(wide, wide, x.detach().double().requires_grad_())
    precision.assert_no_worse(found, eager, truth)
