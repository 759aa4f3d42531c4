"""LayerNorm is left to Inductor, and its result is not kept for the linear layers that read it."""

import pytest
import torch
import torch.nn.functional as F

import liger_compile

X, W, B = torch.randn(3, 5, 8), torch.rand(8) + 0.5, torch.randn(8)
DOWN = torch.randn(4, 8)


CASES = {
    "affine": lambda x, w, b, d: F.linear(F.layer_norm(x, (8,), w, b, 1e-5), d),
    "no bias": lambda x, w, b, d: F.linear(F.layer_norm(x, (8,), w, eps=1e-6), d),
    "no affine": lambda x, w, b, d: F.linear(F.layer_norm(x, [8]), d),
    "module": lambda x, w, b, d: F.linear(torch.layer_norm(x, (8,), w, b), d),
}


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_not_kept(kept_for_backward, name):
    def function(*args):
        return CASES[name](*args) + 0 * sum(arg.sum() for arg in args)  # a gradient for each

    kept = {}
    for recompute in ("off", "auto"):
        torch._dynamo.reset()
        liger_compile.clear_reports()
        options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.recompute": recompute}
        compiled = torch.compile(function, backend="liger", options=options)
        kept[recompute], gradients = kept_for_backward(compiled, X, W, B, DOWN)
        torch.testing.assert_close(gradients, kept_for_backward(function, X, W, B, DOWN)[1])
        ((site,),) = [report.sites for report in liger_compile.reports()]
        assert (site.pattern, site.kind) == (
            "layer_norm.torch",
            "annotate" if recompute == "auto" else "leave",
        )
    assert kept["off"] - kept["auto"] >= 3 * 5 * 8 * 4


def test_over_two_dimensions_it_is_another_norm(run_liger):
    _, (report,) = run_liger(lambda x: F.layer_norm(x, (5, 8)), X)
    assert not report.sites
