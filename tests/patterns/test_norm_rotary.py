"""q and k that are normed and rotated are one site, however their heads are moved; what comes near is not."""

import pytest
import torch

import liger_compile
from liger_compile.testing import assert_refuses, assert_rewrites

torch.manual_seed(0)

B, S, H, K, D = 2, 6, 4, 2, 16
Q, KEY = torch.randn(B, S, H, D), torch.randn(B, S, K, D)
Q_WEIGHT, K_WEIGHT = torch.randn(D), torch.randn(D)
ANGLES = torch.rand(S, D // 2) * 6
FULL = torch.cat((ANGLES, ANGLES), -1)[None]
INPUTS = Q, KEY, Q_WEIGHT, K_WEIGHT, FULL.cos(), FULL.sin()


def llama_norm(x, weight):
    x32 = x.to(torch.float32)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * x32.to(x.dtype)


def gemma_norm(x, weight):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(x)


def torch_norm(x, weight):
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotate(q, k, cos, sin, heads_dim):
    cos, sin = cos.unsqueeze(heads_dim), sin.unsqueeze(heads_dim)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def qwen3(q, k, q_weight, k_weight, cos, sin, norm=llama_norm):
    q, k = norm(q, q_weight).transpose(1, 2), norm(k, k_weight).transpose(1, 2)
    return rotate(q, k, cos, sin, 1)


def qwen3_of_projections(x, q_proj, k_proj, q_weight, k_weight, cos, sin):
    q, k = (torch.nn.functional.linear(x, proj).view(B, S, -1, D) for proj in (q_proj, k_proj))
    return qwen3(q, k, q_weight, k_weight, cos, sin)


def gemma3(q, k, q_weight, k_weight, cos, sin, norm=gemma_norm):
    q, k = norm(q.transpose(1, 2), q_weight), norm(k.transpose(1, 2), k_weight)
    return rotate(q, k, cos, sin, 1)


def torchtitan(q, k, q_weight, k_weight, cos, sin, norm=torch_norm):
    q, k = rotate(norm(q, q_weight), norm(k, k_weight), cos, sin, 2)
    return q.transpose(1, 2), k.transpose(1, 2)


NAMES = {llama_norm: "llama", gemma_norm: "gemma", torch_norm: "upcast_weight"}
by_order = pytest.mark.parametrize("order", (qwen3, gemma3, torchtitan), ids=lambda f: f.__name__)
by_norm = pytest.mark.parametrize("norm", NAMES, ids=lambda f: f.__name__)
by_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


@by_order
@by_norm
@by_dtype
def test_both_are_one_site_with_the_numbers(liger_is_as_right_as_eager, order, norm, dtype):
    inputs = [t.to(dtype) for t in INPUTS]
    liger_is_as_right_as_eager(lambda *inputs: order(*inputs, norm), *inputs, frozen=(4, 5))
    (report,) = liger_compile.reports()
    (site,) = report.sites
    # Without roundings a norm that upcasts its weight is Llama's.
    name = "llama" if norm is torch_norm and dtype == torch.float32 else NAMES[norm]
    order_name = "" if order is qwen3 else "_as_it_is"
    assert (site.pattern, site.kind) == (f"norm_rotary.{name}_half_pair{order_name}", "replace")


def test_what_projections_give_is_taken_as_it_is(run_liger):
    x, q_proj, k_proj = torch.randn(B, S, 32), torch.randn(H * D, 32), torch.randn(K * D, 32)
    inputs = x, q_proj, k_proj, *INPUTS[2:]
    result, (report,) = run_liger(qwen3_of_projections, *inputs)
    assert [site.pattern for site in report.sites] == ["norm_rotary.llama_half_pair"]
    torch.testing.assert_close(result, qwen3_of_projections(*inputs))


def test_tables_in_float32_widen_the_result(run_liger, liger_is_as_right_as_eager):
    inputs = *(t.bfloat16() for t in INPUTS[:4]), *INPUTS[4:]
    result, (report,) = run_liger(qwen3, *inputs)
    assert [site.pattern for site in report.sites] == ["norm_rotary.llama_half_pair"]
    assert all(each.dtype == torch.float32 for each in result)
    liger_is_as_right_as_eager(qwen3, *inputs, frozen=(4, 5))


@pytest.mark.parametrize("has_kernel", [False, True])
def test_it_pays_where_there_is_a_kernel(monkeypatch, has_kernel):
    from liger_compile.patterns import norm_rotary

    monkeypatch.setattr(norm_rotary, "has_kernel", lambda *tensors: has_kernel)
    expect = {"norm_rotary": 1} if has_kernel else {"rotary": 1}  # and the norms are marked
    assert_rewrites(qwen3, *INPUTS, expect=expect, policy="auto")


def test_without_it_there_are_norms_and_a_rotation(run_liger):
    _, (report,) = run_liger(qwen3, *INPUTS, skip=("norm_rotary",))
    names = sorted(site.pattern for site in report.sites if site.kind == "replace")
    assert names == ["rms_norm.llama", "rms_norm.llama", "rotary.half_pair"]


def other_eps(q, k, q_weight, k_weight, cos, sin):
    k32 = k.float()
    k = k_weight * (k32 * torch.rsqrt(k32.pow(2).mean(-1, keepdim=True) + 1e-5)).to(k.dtype)
    return rotate(llama_norm(q, q_weight).transpose(1, 2), k.transpose(1, 2), cos, sin, 1)


def other_norms(q, k, q_weight, k_weight, cos, sin):
    q, k = llama_norm(q, q_weight).transpose(1, 2), gemma_norm(k, k_weight).transpose(1, 2)
    return rotate(q, k, cos, sin, 1)


def over_all_heads(q, k, q_weight, k_weight, cos, sin):
    """As OLMo 2 norms."""
    q = llama_norm(q.flatten(2), q_weight.repeat(H)).view(q.shape).transpose(1, 2)
    k = llama_norm(k.flatten(2), k_weight.repeat(K)).view(k.shape).transpose(1, 2)
    return rotate(q, k, cos, sin, 1)


def rotated_first(q, k, q_weight, k_weight, cos, sin):
    """As Hunyuan norms."""
    q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin, 1)
    return llama_norm(q, q_weight), llama_norm(k, k_weight)


def one_of_them(q, k, q_weight, k_weight, cos, sin):
    return rotate(llama_norm(q, q_weight).transpose(1, 2), (k * k_weight).transpose(1, 2), cos, sin, 1)


@pytest.mark.parametrize(
    "function",
    (other_eps, other_norms, over_all_heads, rotated_first, one_of_them),
    ids=lambda f: f.__name__,
)
def test_what_is_otherwise_is_not_one_site(liger_is_as_right_as_eager, function):
    inputs = [t.bfloat16() for t in INPUTS]
    assert_refuses(function, *inputs, pattern="norm_rotary")
    liger_is_as_right_as_eager(function, *inputs, frozen=(4, 5))


def test_weights_of_each_token_are_not_one_site(liger_is_as_right_as_eager):
    inputs = Q.transpose(1, 2), KEY.transpose(1, 2), torch.randn(S, D), torch.randn(S, D), *INPUTS[4:]

    def function(q, k, q_weight, k_weight, cos, sin):
        return rotate(llama_norm(q, q_weight), llama_norm(k, k_weight), cos, sin, 1)

    assert_refuses(function, *inputs, pattern="norm_rotary")
    liger_is_as_right_as_eager(function, *inputs, frozen=(4, 5))


def test_tables_that_are_learned_are_left_with_the_reason():
    cos = INPUTS[4].clone().requires_grad_()
    assert_refuses(
        qwen3, *INPUTS[:4], cos, INPUTS[5], pattern="norm_rotary", reason="cos requires a gradient"
    )


def test_one_angle_for_all_channels_is_left_with_the_reason():
    cos, sin = (table[..., :1] for table in INPUTS[4:])
    assert_refuses(qwen3, *INPUTS[:4], cos, sin, pattern="norm_rotary", reason="cos has 1 channels")


def test_a_norm_that_is_read_elsewhere_too_is_computed_once(monkeypatch, liger_is_as_right_as_eager):
    from liger_compile.patterns import norm_rotary

    def f(q, k, q_weight, k_weight, cos, sin):
        normed = llama_norm(q, q_weight)
        return *rotate(normed.transpose(1, 2), llama_norm(k, k_weight).transpose(1, 2), cos, sin, 1), normed

    liger_is_as_right_as_eager(f, *INPUTS, frozen=(4, 5))
    monkeypatch.setattr(norm_rotary, "has_kernel", lambda *tensors: True)
    assert_rewrites(f, *INPUTS, expect={"rotary": 1}, policy="auto")  # and the norms are marked


def test_any_number_of_tokens():
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    compiled = torch.compile(qwen3, backend="liger", options=options)
    for length in (S, S + 3):  # the second time it is symbolic
        angles = torch.rand(1, length, D)
        heads = torch.randn(B, length, H, D), torch.randn(B, length, K, D)
        inputs = *heads, Q_WEIGHT, K_WEIGHT, angles.cos(), angles.sin()
        torch.testing.assert_close(compiled(*inputs), qwen3(*inputs))
    sites = [site.pattern for report in liger_compile.reports() for site in report.sites]
    assert sites == 2 * ["norm_rotary.llama_half_pair"]
