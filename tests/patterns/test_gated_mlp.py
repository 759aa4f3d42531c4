"""Gated MLPs with and without their down projection, packed or not; false friends keep their code."""

import math

import pytest
import torch
import torch.nn.functional as F

import liger_compile

torch.manual_seed(0)

X = torch.randn(3, 5, 8)
GATE, UP, DOWN = torch.randn(12, 8), torch.randn(12, 8), torch.randn(8, 12)
PACKED, BIAS = torch.cat((GATE, UP)), torch.randn(8)


def gelu_written_out(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def packed(x, w, d):
    gate, up = F.linear(x, w).chunk(2, dim=-1)
    return F.linear(up * F.silu(gate), d)


def packed_second(x, w, d):  # the gate in the second half
    up, gate = F.linear(x, w).split(12, dim=-1)
    return F.linear(F.silu(gate) * up, d)


def phi3(x, w, d):
    states = F.linear(x, w)
    return F.linear(states[..., 12:] * F.silu(states[..., :12]), d)


PLAIN = {
    "llama": (lambda x, g, u, d: F.linear(F.silu(x @ g.t()) * (x @ u.t()), d), "swiglu"),
    "meta": (lambda x, g, u, d: F.linear(F.linear(x, u) * F.silu(F.linear(x, g)), d), "swiglu"),
    "sigmoid": (
        lambda x, g, u, d: F.linear(F.linear(x, g) * torch.sigmoid(F.linear(x, g)) * F.linear(x, u), d),
        "swiglu",
    ),
    "gemma": (
        lambda x, g, u, d: F.linear(F.gelu(F.linear(x, g), approximate="tanh") * F.linear(x, u), d),
        "geglu",
    ),
    "exact gelu": (lambda x, g, u, d: F.linear(F.gelu(F.linear(x, g)) * F.linear(x, u), d), "geglu"),
    "written out": (
        lambda x, g, u, d: F.linear(gelu_written_out(F.linear(x, g)) * F.linear(x, u), d),
        "geglu",
    ),
    "no dropout": (
        lambda x, g, u, d: F.linear(F.dropout(F.silu(F.linear(x, g)) * F.linear(x, u), 0.0), d),
        "swiglu",
    ),
    "glu": (lambda x, g, u, d: F.silu(F.linear(x, g)) * F.linear(x, u), "swiglu_product"),
    "gated norm": (
        lambda x, g, u, d: (F.linear(x, u) * F.silu(F.linear(x, g).to(torch.float32))).to(x.dtype),
        "swiglu_product",
    ),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings_are_one_site_with_the_numbers(run_liger, liger_is_as_right_as_eager, name, dtype):
    function, pattern = PLAIN[name]
    args = [t.to(dtype) for t in (X, GATE, UP, DOWN)]
    _, (report,) = run_liger(function, *args)
    found = [(site.pattern.removesuffix("_upcast"), site.kind) for site in report.sites]
    assert found == [(f"gated_mlp.{pattern}", "replace")]
    torch._dynamo.reset()
    liger_is_as_right_as_eager(function, *args)


@pytest.mark.parametrize(
    "function, pattern",
    [(packed, "swiglu_packed"), (phi3, "swiglu_packed"), (packed_second, "swiglu")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_packed_projections(run_liger, liger_is_as_right_as_eager, function, pattern):
    _, (report,) = run_liger(function, X, PACKED, DOWN)
    assert [site.pattern for site in report.sites] == [f"gated_mlp.{pattern}"]
    torch._dynamo.reset()
    liger_is_as_right_as_eager(function, X, PACKED, DOWN)


def test_the_bias_of_the_down_projection(run_liger, liger_is_as_right_as_eager):
    def f(x, g, u, d, b):
        return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d, b)

    _, (report,) = run_liger(f, X, GATE, UP, DOWN, BIAS)
    assert [site.pattern for site in report.sites] == ["gated_mlp.swiglu"]
    torch._dynamo.reset()
    liger_is_as_right_as_eager(f, X, GATE, UP, DOWN, BIAS)


def test_h_that_is_needed_elsewhere_is_left_with_the_reason(run_liger):
    def f(x, g, u, d):
        h = F.silu(F.linear(x, g)) * F.linear(x, u)
        return F.linear(h, d), h

    result, (report,) = run_liger(f, X, GATE, UP, DOWN, policy="auto")
    left = [site for site in report.sites if site.kind == "leave"]
    assert left and "is used elsewhere too and has to be kept" in left[0].reason
    torch.testing.assert_close(result, f(X, GATE, UP, DOWN))


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_gate_and_up_may_be_of_two_dtypes(run_liger, liger_is_as_right_as_eager, activation):
    def f(x, g, u):  # as autocast leaves them, where up does not come out of a linear layer
        return activation(F.linear(x, g)) * F.linear(x, u).float()

    args = [t.bfloat16() for t in (X, GATE, UP)]
    _, (report,) = run_liger(f, *args)
    assert [site.kind for site in report.sites] == ["replace"]
    torch._dynamo.reset()
    liger_is_as_right_as_eager(f, *args)


def gpt_oss(x, w, d):
    states = F.linear(x, w)
    gate, up = states[..., ::2].clamp(max=7.0), states[..., 1::2].clamp(-7.0, 7.0)
    return ((up + 1) * (gate * torch.sigmoid(gate * 1.702))) @ d.t()


def squared_reglu(x, w, d):
    gate, up = F.linear(x, w).chunk(2, dim=-1)
    return F.linear(F.relu(gate) ** 2 * up, d)


def in_place(x, w, d):
    gate, up = F.linear(x, w).chunk(2, dim=-1)
    return F.linear(F.silu(gate).mul_(up), d)


@pytest.mark.parametrize(
    "function, pattern",
    [
        (gpt_oss, "quick_geglu_product"),
        (squared_reglu, "squared_reglu_product"),
        (packed, "swiglu_packed"),
        (in_place, "swiglu_packed"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_default_h_is_marked_and_not_kept(kept_for_backward, function, pattern, dtype):
    args, kept, gradients = [t.to(dtype) for t in (X, PACKED, DOWN)], {}, {}
    for recompute in ("off", "auto"):
        torch._dynamo.reset()
        options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.recompute": recompute}
        compiled = torch.compile(function, backend="liger", options=options)
        kept[recompute], gradients[recompute] = kept_for_backward(compiled, *args)
    torch.testing.assert_close(gradients["auto"], kept_for_backward(function, *args)[1], rtol=0, atol=0)
    (site,) = liger_compile.reports()[-1].sites
    assert (site.pattern, site.kind) == (f"gated_mlp.{pattern}", "annotate")
    assert kept["off"] - kept["auto"] >= site.saved_bytes == 3 * 5 * 12 * dtype.itemsize


OTHERS = {
    "output gate": lambda x, g, u, d: F.linear(torch.sigmoid(F.linear(x, g)) * F.linear(x, u), d),
    "quick gelu": lambda x, g, u, d: F.linear(F.linear(x, g) * torch.sigmoid(1.702 * F.linear(x, g)), d),
    "relu": lambda x, g, u, d: F.linear(F.relu(F.linear(x, g)) * F.linear(x, u), d),
    "ungated": lambda x, g, u, d: F.linear(F.gelu(F.linear(x, g)), d),
    "random dropout": lambda x, g, u, d: F.linear(torch.tanh(F.linear(x, g)) * F.linear(x, u), d),
}


@pytest.mark.parametrize("name", OTHERS)
def test_false_friends_are_left(run_liger, name):
    result, (report,) = run_liger(OTHERS[name], X, GATE, UP, DOWN)
    assert not [site for site in report.sites if site.kind == "replace"], report
    torch.testing.assert_close(result, OTHERS[name](X, GATE, UP, DOWN))


def test_a_gate_that_broadcasts_is_left_with_the_reason(run_liger):
    def f(x, g, u):
        return F.silu(F.linear(x, g)) * F.linear(x, u)

    _, (report,) = run_liger(f, X, GATE[:1], UP)
    (site,) = report.sites
    assert site.kind == "leave" and "expected one shape" in site.reason


def test_two_of_them_with_a_foreign_op_between(run_liger):
    def f(x, g, u, d):
        for _ in range(2):
            x = torch.cumsum(F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d), -1) * 0.01
        return x

    result, (report,) = run_liger(f, X, GATE, UP, DOWN, inner="aot_eager")
    assert [site.pattern for site in report.sites] == ["gated_mlp.swiglu"] * 2
    torch.testing.assert_close(result, f(X, GATE, UP, DOWN))
