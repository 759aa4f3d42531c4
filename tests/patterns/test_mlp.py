"""MLPs without a gate: the activation before the down projection is marked, in every spelling; the numbers stay."""

import math

import pytest
import torch
import torch.nn.functional as F

import liger_compile

X, UP, DOWN, BIAS = torch.randn(3, 5, 8), torch.randn(12, 8), torch.randn(8, 12), torch.randn(8)


def gelu_written_out(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


SPELLINGS = {
    "gelu": (lambda x, u, d: F.linear(F.gelu(F.linear(x, u)), d), "gelu"),
    "gelu, tanh": (
        lambda x, u, d: F.linear(F.gelu(F.linear(x, u), approximate="tanh"), d, BIAS.to(x.dtype)),
        "gelu",
    ),
    "gelu written out": (lambda x, u, d: F.linear(gelu_written_out(F.linear(x, u)), d), "gelu"),
    "conv1d": (lambda x, u, d: torch.addmm(BIAS.to(x.dtype), F.gelu(x.view(-1, 8) @ u.t()), d.t()), "gelu"),
    "quick gelu": (
        lambda x, u, d: (h := F.linear(x, u), F.linear(h * torch.sigmoid(1.702 * h), d))[1],
        "quick_gelu",
    ),
    "silu": (lambda x, u, d: F.linear(F.silu(F.linear(x, u)), d), "silu"),
    "relu squared": (lambda x, u, d: F.linear(F.relu(F.linear(x, u)) ** 2, d), "squared_relu"),
    "no dropout": (lambda x, u, d: F.linear(F.dropout(F.gelu(F.linear(x, u)), 0.0), d), "gelu"),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_is_not_kept(kept_for_backward, name, dtype):
    function, activation = SPELLINGS[name]
    args = [arg.to(dtype) for arg in (X, UP, DOWN)]
    kept = {}
    for recompute in ("off", "auto"):
        torch._dynamo.reset()
        liger_compile.clear_reports()
        options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.recompute": recompute}
        compiled = torch.compile(function, backend="liger", options=options)
        kept[recompute], gradients = kept_for_backward(compiled, *args)
        torch.testing.assert_close(gradients, kept_for_backward(function, *args)[1])
        ((site,),) = [report.sites for report in liger_compile.reports()]
        assert site.pattern == f"mlp.{activation}"
        assert site.kind == ("annotate" if recompute == "auto" else "leave")
        assert recompute == "auto" or "liger.recompute='off'" in site.reason
    assert kept["off"] - kept["auto"] >= 3 * 5 * 12 * dtype.itemsize


@pytest.mark.parametrize(
    "function",
    [
        lambda x, u, d: F.linear(F.relu(F.linear(x, u)), d),  # its backward needs the result alone
        lambda x, u, d: F.linear(F.dropout(F.gelu(F.linear(x, u)), 0.5), d),
        lambda x, u, d: F.gelu(F.linear(F.linear(x, u), d)),
    ],
)
def test_what_would_save_nothing_or_is_not_cheap_is_left(run_liger, function):
    _, (report,) = run_liger(function, X, UP, DOWN)
    assert not report.sites


def test_an_activation_that_is_read_elsewhere_too_is_left(run_liger):
    def f(x, u, d):
        h = F.gelu(F.linear(x, u))
        return F.linear(h, d), h

    _, (report,) = run_liger(f, X, UP, DOWN, policy="auto")
    (site,) = report.sites
    assert site.kind == "leave" and "is used elsewhere too" in site.reason
