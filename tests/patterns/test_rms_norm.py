"""Every spelling of RMSNorm is one site; other norms are none; the rounding decides which."""

import pytest
import torch
import torch.nn.functional as F

import liger_compile

torch.manual_seed(0)

X, W = torch.randn(3, 5, 16), torch.rand(16) + 0.5


def inverse(x):
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)


SPELLINGS = {
    "hugging face": (lambda x, w: w * (x.float() * inverse(x)).to(x.dtype), "llama"),
    "meta": (lambda x, w: (x.float() * inverse(x)).type_as(x) * w, "llama"),
    "t5, which multiplies x as it is": (lambda x, w: w * (x * inverse(x)).to(w.dtype), "llama"),
    "divided by the root": (
        lambda x, w: w * (x.float() / torch.sqrt(x.float().square().mean(-1, True) + 1e-5)).to(x.dtype),
        "llama",
    ),
    "sum over n": (
        lambda x, w: (
            (x.float() * ((x.float() ** 2).sum(-1, keepdim=True) / 16 + 1e-5) ** -0.5).to(x.dtype) * w
        ),
        "llama",
    ),
    "gpt-oss": (lambda x, w: (w * (x.float() * inverse(x))).to(x.dtype), "upcast_weight"),
    "torch": (lambda x, w: F.rms_norm(x, (16,), w, 1e-5), "upcast_weight"),
    "gemma": (lambda x, w: (x.float() * inverse(x) * (1.0 + w.float())).type_as(x), "gemma"),
    "gemma 3n": (
        lambda x, w: (
            x.float() * torch.pow(x.float().pow(2).mean(-1, keepdim=True) + 1e-5, -0.5) * w.float()
        ).type_as(x),
        "upcast_weight",
    ),
    "no weight": (lambda x, w: (x.float() * inverse(x)).type_as(x), "no_weight"),
    "torch without a weight": (lambda x, w: F.rms_norm(x, (16,), eps=1e-5), "no_weight"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_rewritten_once(run_liger, name):
    function, mode = SPELLINGS[name]
    _, (report,) = run_liger(function, X.bfloat16(), W.bfloat16())
    assert [(site.pattern, site.kind) for site in report.sites] == [(f"rms_norm.{mode}", "replace")]


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers(liger_is_as_right_as_eager, name, dtype):
    liger_is_as_right_as_eager(SPELLINGS[name][0], X.to(dtype), W.to(dtype))


# A norm by its length, as F.normalize has it: it is marked.

BY_LENGTH = {
    "lucidrains": lambda x, w: F.normalize(x, dim=-1) * 16**0.5 * w,
    "weight less one": lambda x, w: F.normalize(x, dim=-1) * (w + 1) * 16**0.5,
    "written out": lambda x, w: x / x.norm(2, -1, keepdim=True).clamp_min(1e-12).expand_as(x) * 4.0 * w,
    "another eps": lambda x, w: F.normalize(x, 2.0, -1, 1e-5) * w * 4.0,
    "in float32": lambda x, w: (F.normalize(x.float(), dim=-1) * 16**0.5 * w.float()).to(x.dtype),
}


@pytest.mark.parametrize("name", BY_LENGTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_by_its_length_is_marked_and_not_kept(kept_for_backward, name, dtype):
    def f(x, w, d):
        return F.linear(BY_LENGTH[name](x, w), d)

    args, kept = [t.to(dtype) for t in (X, W, torch.randn(16, 16))], {}
    for recompute in ("off", "auto"):
        torch._dynamo.reset()
        options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.recompute": recompute}
        compiled = torch.compile(f, backend="liger", options=options)
        kept[recompute], gradients = kept_for_backward(compiled, *args)
        torch.testing.assert_close(gradients, kept_for_backward(f, *args)[1], rtol=0, atol=0)
    (site,) = liger_compile.reports()[-1].sites
    is_upcast = name == "in float32" and dtype == torch.bfloat16
    assert (site.pattern, site.kind) == (
        "rms_norm.by_l2_upcast" if is_upcast else "rms_norm.by_l2",
        "annotate",
    )
    assert kept["off"] - kept["auto"] >= site.saved_bytes == 3 * 5 * 16 * dtype.itemsize


@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: F.normalize(x, p=1.0, dim=-1) * 4.0 * w,
        lambda x, w: F.normalize(x, dim=-2) * 4.0 * w,
        lambda x, w: F.normalize(x) * 4.0 * w,
    ],
)
def test_a_norm_of_another_length_is_none(run_liger, other):
    _, (report,) = run_liger(other, X, W)
    assert not report.sites


OTHERS = {
    "l2 norm: a sum": lambda x, w: w * x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-5),
    "another dimension": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-5) * w,
    "of another tensor": lambda x, w: w * (x * torch.rsqrt(x.abs().pow(2).mean(-1, keepdim=True) + 1e-5)),
    "half a root": lambda x, w: w * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-5) ** -0.25),
    "cubes": lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-5)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_norms_are_left(run_liger, name):
    result, (report,) = run_liger(OTHERS[name], X, W)
    assert not [site for site in report.sites if site.kind == "replace"]
    torch.testing.assert_close(result, OTHERS[name](X, W))


def test_a_rounding_without_a_kernel_is_a_near_miss(run_liger):
    def f(x, w):
        return w * (x * inverse(x).to(x.dtype))

    _, (report,) = run_liger(f, X.bfloat16(), W.bfloat16())
    assert not report.sites
    assert [near.pattern.split(".")[0] for near in report.near_misses] == ["rms_norm"]
    assert "rounds elsewhere" in report.near_misses[0].reason


def test_a_weight_of_another_shape_is_left_with_the_reason(run_liger):
    def f(x, w):
        return w * (x * inverse(x))

    _, (report,) = run_liger(f, X, torch.rand(3, 5, 16))
    weighted = [site for site in report.sites if site.pattern == "rms_norm.llama"]
    assert not [site for site in weighted if site.kind == "replace"]
    assert report.sites[0].pattern == "rms_norm.no_weight" or "weight has the shape" in weighted[0].reason


def test_head_wise_norms_on_strided_tensors(run_liger):
    def f(x, w):
        heads = x.view(3, 5, 2, 8).transpose(1, 2)
        return (w * (heads * inverse(heads))).transpose(1, 2).reshape(3, 5, 16)

    result, (report,) = run_liger(f, X, W[:8])
    assert [site.pattern for site in report.sites] == ["rms_norm.llama"]
    torch.testing.assert_close(result, f(X, W[:8]))


def test_a_dynamic_batch(run_liger):
    function = SPELLINGS["hugging face"][0]
    compiled = torch.compile(
        function, backend="liger", dynamic=True, options={"liger.inner": "aot_eager", "liger.strict": True}
    )
    for rows in (3, 4, 7):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(compiled(x, W), function(x, W))


# The norm of a residual stream: the addition stays.


def block(x, r, w):
    s = r + x
    return SPELLINGS["hugging face"][0](s, w), s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_sum_that_is_read_again(run_liger, liger_is_as_right_as_eager, dtype):
    args = X.to(dtype), X.flip(0).to(dtype), W.to(dtype)
    _, (report,) = run_liger(block, *args)
    assert [(site.pattern, site.kind) for site in report.sites] == [("rms_norm.llama", "replace")]
    torch._dynamo.reset()
    liger_is_as_right_as_eager(block, *args)


def test_a_stream_of_blocks(run_liger):
    def f(x, w):
        for _ in range(4):
            y, x = block(x, torch.tanh(x), w)
            x = x + y
        return block(x, x, w)[0]

    result, (report,) = run_liger(f, X, W)
    assert [(site.pattern, site.kind) for site in report.sites] == [("rms_norm.llama", "replace")] * 5
    torch.testing.assert_close(result, f(X, W))


@pytest.mark.parametrize("written", ["before the norm", "after the norm"])
def test_the_norm_of_a_sum_that_is_written_in_place(run_liger, written):
    def f(x, r, w):
        s = r + x
        if written == "before the norm":
            s.mul_(2)
        y = SPELLINGS["hugging face"][0](s, w)
        return y, s if written == "before the norm" else s.mul_(2)

    args = X, X.flip(0), W
    result, (report,) = run_liger(f, *args)
    assert [site.pattern for site in report.sites] == ["rms_norm.llama"]
    torch.testing.assert_close(result, f(*args))
