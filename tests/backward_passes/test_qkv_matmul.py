"""One product for the gradients of q, k and v: the same numbers, and what is read otherwise is left."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from liger_compile import functional
from liger_compile.backward_passes import DEFAULT_PASSES, Backward, run_passes
from liger_compile.ops.registration import inlining_late
from liger_compile.report import clear_reports, reports
from liger_compile.testing import precision
from tests.backward_passes.seen import Seen, products_of
from tests.helpers.gradients import gradients_of

pytestmark = pytest.mark.usefixtures("uncached")

QKV_MATMUL = DEFAULT_PASSES[0]
_aten, _ours = torch.ops.aten, torch.ops.liger_compile
BATCH, TOKENS, HIDDEN, HEADS, KV_HEADS, CHANNELS = 2, 40, 16, 4, 2, 8


class Attention(nn.Module):
    """From a hidden state to what the output projection reads, with ops of ours."""

    def __init__(self, normed=False, heads_first=True, bias=False, v_first=False, v_channels=CHANNELS):
        super().__init__()
        self.q = nn.Linear(HIDDEN, HEADS * CHANNELS, bias=bias)
        self.k = nn.Linear(HIDDEN, KV_HEADS * CHANNELS, bias=bias)
        self.v = nn.Linear(HIDDEN, KV_HEADS * v_channels, bias=bias)
        self.q_norm = nn.Parameter(torch.rand(CHANNELS) + 0.5) if normed else None
        self.k_norm = nn.Parameter(torch.rand(CHANNELS) + 0.5) if normed else None
        self.heads_first, self.v_first, self.v_channels = heads_first, v_first, v_channels
        angles = torch.rand(TOKENS, CHANNELS // 2).repeat(1, 2)
        self.tables = angles.cos()[None], angles.sin()[None]

    def heads(self, x, count, channels=CHANNELS):
        x = x.view(*x.shape[:2], count, channels)
        return x.transpose(1, 2) if self.heads_first else x

    def forward(self, x):
        v = self.v(x) if self.v_first else None
        q, k = self.heads(self.q(x), HEADS), self.heads(self.k(x), KV_HEADS)
        v = self.heads(self.v(x) if v is None else v, KV_HEADS, self.v_channels)
        cos, sin = (table.unsqueeze(1 if self.heads_first else 2) for table in self.tables)
        if self.q_norm is None:
            q, k = functional.rotary(q, k, cos, sin)
        else:
            q, k = functional.norm_rotary(q, k, self.q_norm, self.k_norm, cos, sin, 1e-6)
        if not self.heads_first:
            q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def differentiated(function, module, x):
    return gradients_of(function, x, parameters=module.parameters())


CASES = {
    "rotary": {},
    "normed": {"normed": True},
    "tokens_first": {"heads_first": False},
    "bias": {"bias": True},
    "v_first": {"v_first": True},
    "v_narrow": {"v_channels": 4, "normed": True},
}


# test_under_autocast has "rotary", and "v_narrow" has a norm.
OFTEN = [
    pytest.param(options, id=name, marks=pytest.mark.slow if name in ("rotary", "normed") else ())
    for name, options in CASES.items()
]


@pytest.mark.parametrize("options", OFTEN)
def test_three_products_become_one(options):
    module = Attention(**options)
    x = torch.randn(BATCH, TOKENS, HIDDEN, requires_grad=True)
    function, seen = (lambda x: module(x.sin())), Seen()
    expected = differentiated(function, module, x)
    compiled = torch.compile(function, fullgraph=True, options={"post_grad_custom_post_pass": seen})
    with inlining_late():
        found = differentiated(compiled, module, x)
    op = "norm_rotary_backward_packed" if options.get("normed") else "rotary_backward_packed"
    assert (seen.graphs, seen.fewer_products) == ([[], [op]], [0, 4]), "of six products"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(gradient.is_contiguous() for gradient in found[1])


def test_under_autocast():
    """Terms are made in bfloat16 and summed in float32."""
    module, seen = Attention(), Seen()
    x = torch.randn(BATCH, TOKENS, HIDDEN, requires_grad=True)

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x.sin()).float()

    eager = differentiated(function, module, x)
    compiled = torch.compile(function, fullgraph=True, options={"post_grad_custom_post_pass": seen})
    with inlining_late():
        found = differentiated(compiled, module, x)
    assert (seen.graphs, seen.fewer_products) == ([[], ["rotary_backward_packed"]], [0, 4])
    precision.assert_no_worse(found, eager, differentiated(lambda x: module(x.sin()), module, x))


# Graphs as they are written ---------------------------------------------------------------------------------


def rows(x):
    return x.transpose(1, 2).reshape(BATCH * TOKENS, -1)


def parts(dq, dk, dv, x, cos, sin):
    """Gradients of q, k and v as matrices, and x as one."""
    q, k = _ours.rotary_backward_late.default(dq, dk, cos, sin, "half", False, dq.dtype, dk.dtype)
    return rows(q), rows(k), rows(dv), x.view(BATCH * TOKENS, HIDDEN)


def all_of_it(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, v, x = parts(dq, dk, dv, x, cos, sin)
    return q @ wq + k @ wk + v @ wv, q.t() @ x, k.t() @ x, v.t() @ x


def weights_first(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, v, x = parts(dq, dk, dv, x, cos, sin)
    weights = v.t() @ x, q.t() @ x, k.t() @ x
    return v @ wv + (k @ wk + q @ wq), *weights


def with_a_bias(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, v, x = parts(dq, dk, dv, x, cos, sin)
    return q @ wq + k @ wk + v @ wv, q.sum(0), k.sum(0), v.sum(0)


def more_is_added(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, v, x = parts(dq, dk, dv, x, cos, sin)
    return (q @ wq + x.cos()) + (k @ wk + v @ wv)


def of_two_inputs(dq, dk, dv, x, wq, wk, wv, cos, sin):
    """As in attention to something else: k and v are projections of another tensor."""
    q, k, v, x = parts(dq, dk, dv, x, cos, sin)
    return q @ wq, k @ wk + v @ wv


def read_elsewhere(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, v, x = parts(dq, dk, dv, x, cos, sin)
    return q @ wq + k @ wk + v @ wv, q.cos()


def returned(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, v, x = parts(dq, dk, dv, x, cos, sin)
    return q @ wq + k @ wk + v @ wv, k


def a_term_read_elsewhere(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, v, x = parts(dq, dk, dv, x, cos, sin)
    term = k @ wk
    return q @ wq + term + v @ wv, term.cos()


def a_term_twice(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, *_ = parts(dq, dk, dv, x, cos, sin)
    term = k @ wk
    return q @ wq + (term + term)


def a_multiple(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, *_ = parts(dq, dk, dv, x, cos, sin)
    return torch.add(q @ wq, k @ wk, alpha=2)


def rows_of_another_order(dq, dk, dv, x, wq, wk, wv, cos, sin):
    """Of heads, not of tokens."""
    q, k = _ours.rotary_backward_late.default(dq, dk, cos, sin, "half", False, dq.dtype, dk.dtype)
    q, k = (each.reshape(BATCH * TOKENS, -1) for each in (q, k))
    return q @ wq + k @ wk


def a_term_that_is_turned(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, *_ = parts(dq, dk, dv, x, cos, sin)
    return (q @ wq).t() + k @ wk


def a_sum_of_other_shapes(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, v, x = parts(dq, dk, dv, x, cos, sin)
    shape = BATCH, TOKENS, HIDDEN
    return ((q @ wq).view(shape) + (k @ wk).view(shape)).view(-1, HIDDEN) + v @ wv


def v_in_two_sums(dq, dk, dv, x, wq, wk, wv, cos, sin):
    q, k, v, x = parts(dq, dk, dv, x, cos, sin)
    term = v @ wv
    return q @ wq + k @ wk + term, term


# How many products are left, of how many, and whether v is beside q and k.
GRAPHS = {
    all_of_it: (2, 6, True),
    weights_first: (2, 6, True),
    with_a_bias: (1, 3, True),
    more_is_added: (1, 3, True),
    a_sum_of_other_shapes: (1, 3, True),
    v_in_two_sums: (2, 3, False),
    of_two_inputs: (3, 3, None),
    read_elsewhere: (3, 3, None),
    returned: (3, 3, None),
    a_term_read_elsewhere: (3, 3, None),
    a_term_twice: (2, 2, None),
    a_multiple: (2, 2, None),
    rows_of_another_order: (2, 2, None),
}


def written(function, **sizes):
    """The graph of it, joined, and its arguments."""
    heads = {"q": HEADS, "k": KV_HEADS, "v": sizes.get("v_heads", KV_HEADS)}
    gradients = [torch.randn(BATCH, TOKENS, count, CHANNELS).transpose(1, 2) for count in heads.values()]
    weights = [torch.randn(count * CHANNELS, HIDDEN) for count in heads.values()]
    angles = torch.rand(1, 1, TOKENS, CHANNELS)
    arguments = *gradients, torch.randn(BATCH, TOKENS, HIDDEN), *weights, angles.cos(), angles.sin()
    gm = make_fx(function, tracing_mode="fake")(*arguments)
    count = products_of(gm.graph)
    run_passes(Backward(gm.graph), [QKV_MATMUL], strict=True)
    gm.graph.lint()
    gm.recompile()
    for one, other in zip(*(tree_leaves(each(*arguments)) for each in (gm, function)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    joined = gm.graph.find_nodes(op="call_function", target=_ours.rotary_backward_packed.default)
    return products_of(gm.graph), count, joined[0].args[2] is not None if joined else None


@pytest.mark.parametrize("function", GRAPHS, ids=lambda function: function.__name__)
def test_what_is_joined_and_what_is_left(function):
    assert written(function) == GRAPHS[function]


def test_a_wide_matrix_is_not_copied():
    assert written(all_of_it, v_heads=HEADS + 1) == (4, 6, False)


def test_a_term_that_is_turned_is_no_term(monkeypatch):
    """Of a square matrix, so that the shapes are as if it were one."""
    monkeypatch.setattr(f"{__name__}.TOKENS", HIDDEN // BATCH)
    # Private: a graph this small does not pay, whatever the settings.
    monkeypatch.setattr("liger_compile.backward_passes.qkv_matmul._pays", lambda matrices: True)
    assert written(a_term_that_is_turned) == (2, 2, None)
    assert written(all_of_it) == (2, 6, True)


def test_few_tokens_are_left(monkeypatch):
    """The weights would be copied for them."""
    monkeypatch.setattr(f"{__name__}.TOKENS", 8)
    assert written(all_of_it) == (6, 6, None)


def test_opcheck_of_what_no_model_calls():
    dq, dk, q, k = (torch.randn(2, count, 5, 8) for count in (3, 2, 3, 2))
    tables = torch.rand(1, 1, 5, 8), torch.rand(1, 1, 5, 8)
    rest, weights = torch.randn(10, 7), (torch.rand(8), torch.rand(8))
    turned = *tables, "half", False, dq.dtype, dk.dtype
    normed = q, k, *weights, *tables, 1e-6, 0.0, True, True, True
    torch.library.opcheck(_ours.rotary_backward_late.default, (dq, dk, *turned))
    torch.library.opcheck(_ours.rotary_backward_packed.default, (dq, dk, rest, 1, *turned))
    torch.library.opcheck(_ours.norm_rotary_backward_late.default, (dq, dk, *normed))
    torch.library.opcheck(_ours.norm_rotary_backward_packed.default, (dq, dk, None, 1, *normed))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_on_a_gpu(options, mode):
    """What compiles, with kernels: eager code's gradients in float32, but for the order of sums."""
    with torch.device("cuda"):
        module = Attention(**options)
        module.tables = tuple(table.to("cuda") for table in module.tables)
        x = torch.randn(BATCH, TOKENS, HIDDEN, requires_grad=True)
    function = lambda x: module(x.sin())  # noqa: E731
    expected = differentiated(function, module, x)
    clear_reports()
    compiled = torch.compile(function, backend="liger", mode=mode)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        found = differentiated(compiled, module, x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    (report,) = reports()
    assert [site.pattern for site in report.backward.sites] == [QKV_MATMUL.name]
