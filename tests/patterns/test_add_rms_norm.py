"""The residual add goes with the norm that reads it, across what stands between."""

import pytest
import torch

torch.manual_seed(0)

X, R, W = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.rand(16) + 0.5


def norm(x, w, eps=1e-6):
    x32 = x.float()
    return w * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def block(x, r, w):
    s = r + x
    return norm(s, w), s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_and_norm_are_one_site(run_liger, liger_is_as_right_as_eager, dtype):
    args = X.to(dtype), R.to(dtype), W.to(dtype)
    _, (report,) = run_liger(block, *args)
    assert [(site.pattern, site.kind) for site in report.sites] == [("add_rms_norm.llama", "replace")]
    torch._dynamo.reset()
    liger_is_as_right_as_eager(block, *args)


def test_a_stream_of_blocks_is_one_site_each(run_liger):
    def f(x, w):
        residual = x
        for _ in range(4):
            x = torch.tanh(norm(residual, w))
            residual = x + residual
        return norm(residual, w)

    result, (report,) = run_liger(f, X, W)
    patterns = sorted(site.pattern for site in report.sites if site.kind == "replace")
    assert patterns == ["add_rms_norm.llama"] * 4 + ["rms_norm.llama"]
    torch.testing.assert_close(result, f(X, W))


def test_an_add_that_broadcasts_is_no_residual(run_liger):
    result, (report,) = run_liger(block, X, R[:1], W)
    assert [site.pattern for site in report.sites] == ["rms_norm.llama"]
    torch.testing.assert_close(result, block(X, R[:1], W))


def test_a_sum_that_is_written_in_place_is_left(run_liger):
    def f(x, r, w):
        s = r + x
        y = norm(s, w)
        return y, s.mul_(2)

    result, _ = run_liger(f, X, R, W)
    torch.testing.assert_close(result, f(X, R, W))


def test_a_sum_written_before_the_norm_is_another_value(run_liger):
    def f(x, r, w):
        s = r + x
        s.mul_(2)
        return norm(s, w), s

    result, (report,) = run_liger(f, X, R, W)
    assert "add_rms_norm.llama" not in [site.pattern for site in report.sites if site.kind == "replace"]
    torch.testing.assert_close(result, f(X, R, W))
