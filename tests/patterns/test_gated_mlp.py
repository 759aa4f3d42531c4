"""Gated MLPs with and without their down projection, packed or not, are marked and keep their code."""

import math

import pytest
import torch
import torch.nn.functional as F

import liger_compile

torch.manual_seed(0)

X = torch.randn(3, 5, 8)
GATE, UP, DOWN = torch.randn(12, 8), torch.randn(12, 8), torch.randn(8, 12)
PACKED, BIAS = torch.cat((GATE, UP)), torch.randn(8)


@pytest.fixture
def train(kept_for_backward):
    """train(function, *args, **options) -> (sites, bytes kept for backward); the gradients are those of eager mode."""

    def run(function, *args, **options):
        torch._dynamo.reset()
        settings = {"inner": "aot_eager", "strict": True, **options}
        settings = {f"liger.{name}": value for name, value in settings.items()}
        kept, gradients = kept_for_backward(torch.compile(function, backend="liger", options=settings), *args)
        torch.testing.assert_close(gradients, kept_for_backward(function, *args)[1], rtol=0, atol=0)
        return [(site.pattern, site.kind) for site in liger_compile.reports()[-1].sites], kept

    return run


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
    "glu": (lambda x, g, u, d: F.silu(F.linear(x, g)) * F.linear(x, u) + d[0], "swiglu_product"),
    "gated norm": (
        lambda x, g, u, d: (F.linear(x, u) * F.silu(F.linear(x, g).to(torch.float32))).to(x.dtype) + d[0],
        "swiglu_product",
    ),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings_are_one_site(train, name, dtype):
    function, pattern = PLAIN[name]
    sites, _ = train(function, *(t.to(dtype) for t in (X, GATE, UP, DOWN)))
    assert [(found.removesuffix("_upcast"), kind) for found, kind in sites] == [
        (f"gated_mlp.{pattern}", "annotate")
    ]


@pytest.mark.parametrize(
    "function, pattern",
    [(packed, "swiglu_packed"), (phi3, "swiglu_packed"), (packed_second, "swiglu")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_packed_projections(train, function, pattern):
    sites, _ = train(function, X, PACKED, DOWN)
    assert sites == [(f"gated_mlp.{pattern}", "annotate")]


def test_the_bias_of_the_down_projection(train):
    def f(x, g, u, d, b):
        return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d, b)

    sites, _ = train(f, X, GATE, UP, DOWN, BIAS)
    assert sites == [("gated_mlp.swiglu", "annotate")]


@pytest.mark.parametrize("recompute", ["auto", "off"])
def test_h_that_is_returned_too_is_left_with_one_reason(run_liger, recompute):
    def f(x, g, u, d):
        h = F.silu(F.linear(x, g)) * F.linear(x, u)
        return F.linear(h, d), h.flatten()

    args = [t.clone().requires_grad_() for t in (X, GATE, UP, DOWN)]
    result, (report,) = run_liger(f, *args, policy="auto", inner="aot_eager", recompute=recompute)
    (site,) = report.sites
    assert (site.pattern, site.kind) == ("gated_mlp.swiglu", "leave")
    assert "is used elsewhere too and has to be kept" in site.reason
    torch.testing.assert_close(result, f(*args))


def test_a_product_that_is_returned_too_is_left_with_the_reason(run_liger):
    def f(x, g, u):
        h = F.silu(F.linear(x, g)) * F.linear(x, u)
        return h.square(), h

    args = [t.clone().requires_grad_() for t in (X, GATE, UP)]
    _, (report,) = run_liger(f, *args, policy="auto", inner="aot_eager")
    (site,) = report.sites
    assert (site.pattern, site.kind) == ("gated_mlp.swiglu_product", "leave")
    assert "is returned and kept by the caller" in site.reason


def test_h_that_two_linear_layers_read_is_marked_once(train):
    def with_adapter(x, g, u, d):  # as LoRA on the down projection
        h = F.silu(F.linear(x, g)) * F.linear(x, u)
        return F.linear(h, d) + F.linear(h, d[:2]) @ d[:2, :8]

    args, kept = (X, GATE, UP, DOWN), {}
    for recompute in ("off", "auto"):
        sites, kept[recompute] = train(with_adapter, *args, recompute=recompute)
        kind = "annotate" if recompute == "auto" else "leave"
        of_mlp = [site for site in liger_compile.reports()[-1].sites if not site.pattern.startswith("lora.")]
        assert of_mlp and {site.kind for site in of_mlp} == {kind}
    assert [site for site in sites if not site[0].startswith("lora.")] == [
        ("gated_mlp.swiglu_product", "annotate")
    ]
    assert kept["off"] - kept["auto"] >= 3 * 5 * 12 * 4


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_gate_and_up_may_be_of_two_dtypes(train, activation):
    def f(x, g, u):  # as autocast leaves them, where up does not come out of a linear layer
        return activation(F.linear(x, g)) * F.linear(x, u).float()

    sites, _ = train(f, *(t.bfloat16() for t in (X, GATE, UP)))
    assert [kind for _, kind in sites] == ["annotate"]


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


def experts(x, w, d):  # as a grouped matmul, which is no linear layer
    gate, up = F.linear(x, w).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate) * up, d.t().expand(3, -1, -1))


@pytest.mark.parametrize(
    "function, pattern",
    [
        (gpt_oss, "quick_geglu_product"),
        (squared_reglu, "squared_reglu_product"),
        (packed, "swiglu_packed"),
        (in_place, "swiglu_packed"),
        (experts, "swiglu_product"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_h_is_marked_and_not_kept(train, function, pattern, dtype):
    args, kept = [t.to(dtype) for t in (X, PACKED, DOWN)], {}
    for policy, recompute in (("auto", "off"), ("auto", "auto"), ("always", "auto")):
        sites, kept[policy, recompute] = train(function, *args, policy=policy, recompute=recompute)
        assert sites == [(f"gated_mlp.{pattern}", "annotate" if recompute == "auto" else "leave")]
    (site,) = liger_compile.reports()[-1].sites
    assert kept["auto", "off"] - kept["auto", "auto"] >= site.saved_bytes == 3 * 5 * 12 * dtype.itemsize
    assert kept["always", "auto"] == kept["auto", "auto"]


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
    assert not [site for site in report.sites if site.pattern.startswith("gated_mlp")], report
    torch.testing.assert_close(result, OTHERS[name](X, GATE, UP, DOWN))


def test_a_gate_that_broadcasts_is_left_with_the_reason(run_liger):
    def f(x, g, u):
        return F.silu(F.linear(x, g)) * F.linear(x, u)

    _, (report,) = run_liger(f, X, GATE[:1], UP)
    (site,) = report.sites
    assert site.kind == "leave" and "expected one shape" in site.reason


def test_two_of_them_with_a_foreign_op_between(train):
    def f(x, g, u, d):
        for _ in range(2):
            x = torch.cumsum(F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d), -1) * 0.01
        return x

    sites, _ = train(f, X, GATE, UP, DOWN)
    assert sites == [("gated_mlp.swiglu", "annotate")] * 2
