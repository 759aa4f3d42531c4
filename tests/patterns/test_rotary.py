"""Each layout of rotary is found, q and k in one site; what turns otherwise is not taken for it."""

import pytest
import torch

import liger_compile
from liger_compile.testing import assert_refuses, assert_rewrites

torch.manual_seed(0)

B, H, K, S, D = 2, 4, 2, 6, 16
Q, KEY = torch.randn(B, H, S, D), torch.randn(B, K, S, D)
ANGLES = torch.rand(S, D // 2) * 6
FULL = torch.cat((ANGLES, ANGLES), -1)
COS, SIN = FULL.cos()[None], FULL.sin()[None]
PAIRED_COS, PAIRED_SIN = (t.repeat_interleave(2, -1)[None] for t in (ANGLES.cos(), ANGLES.sin()))


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def llama(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def olmo(q, k, cos, sin):
    a, b = llama(q, k, cos.float(), sin.float())
    return a.to(q.dtype), b.to(k.dtype)


def cohere(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = (x.float() * cos.float() + rotate_pairs(x.float()) * sin.float() for x in (q, k))
    return tuple(x.to(q.dtype) for x in turned)


def gptj(q, k, cos, sin):
    return tuple(x * cos[:, None] + rotate_pairs(x) * sin[:, None] for x in (q, k))


def phi(q, k, cos, sin):
    cos, sin, width = cos[:, None, :, :8], sin[:, None, :, :8], 8
    turned = []
    for x in (q, k):
        part, rest = x[..., :width], x[..., width:]
        turned.append(torch.cat((part * cos + rotate_half(part) * sin, rest), -1))
    return tuple(turned)


def gpt_oss(q, k, cos, sin):
    cos, sin = cos[..., :8].unsqueeze(1), sin[..., :8].unsqueeze(1)

    def turn(x):
        a, b = torch.chunk(x, 2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return turn(q), turn(k)


def deepseek(q, k, cos, sin):
    cos, sin = cos[..., :8].unsqueeze(1), sin[..., :8].unsqueeze(1)

    def turn(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    return turn(q), turn(k)


def unbound(q, k, cos, sin):
    cos, sin = cos[..., ::2].unsqueeze(1), sin[..., ::2].unsqueeze(1)

    def turn(x):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    return turn(q), turn(k)


def meta(q, k, cos, sin):
    freqs = torch.complex(cos[0, :, :8].float(), sin[0, :, :8].float()).view(1, 1, S, 8)

    def turn(x):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)

    return turn(q), turn(k)


LAYOUTS = {
    llama: (COS, SIN, "half"),
    olmo: (COS, SIN, "half"),
    cohere: (PAIRED_COS, PAIRED_SIN, "interleaved"),
    gptj: (PAIRED_COS, PAIRED_SIN, "interleaved"),
    phi: (COS, SIN, "half_partial"),
    gpt_oss: (COS, SIN, "half_tables"),
    deepseek: (COS, SIN, "to_half"),
    unbound: (PAIRED_COS, PAIRED_SIN, "interleaved_tables"),
    meta: (COS, SIN, "complex"),
}


@pytest.mark.parametrize("function", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q_and_k_are_one_site_with_the_numbers(liger_is_as_right_as_eager, function, dtype):
    cos, sin, layout = LAYOUTS[function]
    tables = (t.to(dtype) for t in (cos, sin))
    liger_is_as_right_as_eager(function, Q.to(dtype), KEY.to(dtype), *tables, frozen=(2, 3))
    (report,) = liger_compile.reports()
    (site,) = report.sites
    name = site.pattern.replace("_keeps_dtype", "")
    assert (name, site.kind) == (f"rotary.{layout}_pair", "replace")


def test_one_tensor_alone(run_liger):
    def f(q, cos, sin):
        return q * cos.unsqueeze(1) + rotate_half(q) * sin.unsqueeze(1)

    result, (report,) = run_liger(f, Q, COS, SIN)
    assert [site.pattern for site in report.sites] == ["rotary.half"]
    torch.testing.assert_close(result, f(Q, COS, SIN))


def test_the_opposite_sign_is_a_negated_table(run_liger):
    def f(q, cos, sin):
        turned = torch.cat((q[..., 8:], -q[..., :8]), -1)
        return q * cos.unsqueeze(1) + turned * sin.unsqueeze(1)

    result, (report,) = run_liger(f, Q, COS, SIN)
    assert [site.pattern for site in report.sites] == ["rotary.half"]
    torch.testing.assert_close(result, f(Q, COS, SIN))


def opposite(q, k, cos, sin):
    return llama(q, k, cos, -sin)


def scaled(q, k, cos, sin):
    return llama(q, k, (cos.float() * 1.25).to(q.dtype), (sin.float() * 1.25).to(q.dtype))


@pytest.mark.parametrize("function", [llama, olmo, phi, gpt_oss, deepseek, cohere, opposite, scaled])
def test_what_is_turned_was_rounded_right_before(run_liger, function):
    """A cast of a slice is a slice of the cast: the terms have the one, the code the other."""

    def norm(x):
        return x.float().sigmoid().to(x.dtype)

    def f(q, k, cos, sin):
        return function(norm(q), norm(k), cos, sin)

    tables = (PAIRED_COS, PAIRED_SIN) if function is cohere else (COS, SIN)
    args = [t.bfloat16() for t in (Q, KEY, *tables)]
    result, (report,) = run_liger(f, *args)
    assert [site.kind for site in report.sites] == ["replace"] and "_pair" in report.sites[0].pattern
    torch.testing.assert_close(result, f(*args), rtol=2e-2, atol=2e-2)


def test_q_before_it_is_rounded_is_no_pair_with_k_after(run_liger):
    def f(q, k, cos, sin):
        a, b = llama(q, k, cos, sin)
        return a.to(q.dtype), b.to(k.dtype)

    args = Q.bfloat16(), KEY.bfloat16(), COS, SIN
    result, (report,) = run_liger(f, *args)
    assert [(site.pattern, site.kind) for site in report.sites] == [
        ("rotary.half_keeps_dtype_pair", "replace")
    ]
    torch.testing.assert_close(result, f(*args), rtol=2e-2, atol=2e-2)


def test_a_norm_after_the_rotation_does_not_take_its_sum(run_liger):
    def f(q, k, cos, sin):
        return tuple(
            torch.rms_norm(x, (D,), torch.ones(D, dtype=x.dtype), 1e-6) for x in llama(q, k, cos, sin)
        )

    args = [t.bfloat16() for t in (Q, KEY, COS, SIN)]
    result, (report,) = run_liger(f, *args)
    names = sorted(site.pattern for site in report.sites if site.kind == "replace")
    assert names == ["rms_norm.upcast_weight"] * 2 + ["rotary.half_pair"]
    torch.testing.assert_close(result, f(*args), rtol=2e-2, atol=2e-2)


def test_strided_heads_keep_their_layout(run_liger):
    def f(q, k, cos, sin):
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        a, b = llama(q, k, cos, sin)
        return a.transpose(1, 2).reshape(B, S, -1), b.transpose(1, 2).reshape(B, S, -1)

    args = torch.randn(B, S, H, D), torch.randn(B, S, K, D), COS, SIN
    result, (report,) = run_liger(f, *args)
    assert [site.pattern for site in report.sites] == ["rotary.half_pair"]
    torch.testing.assert_close(result, f(*args))


OTHERS = {
    "no sign": lambda q, c, s: q * c + torch.cat((q[..., 8:], q[..., :8]), -1) * s,
    "other halves": lambda q, c, s: q * c + torch.cat((-q[..., :8], q[..., 8:]), -1) * s,
    "thirds": lambda q, c, s: q * c + torch.cat((-q[..., 10:], q[..., :10]), -1) * s,
    "of another tensor": lambda q, c, s: q * c + rotate_half(q + 1) * s,
    "one angle for all channels": lambda q, c, s: q * c[..., :1] + rotate_half(q) * s[..., :1],
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_turns_otherwise_is_left(run_liger, name):
    args = Q, COS[:, None], SIN[:, None]
    result, (report,) = run_liger(OTHERS[name], *args)
    assert not [site for site in report.sites if site.kind == "replace"], report
    torch.testing.assert_close(result, OTHERS[name](*args))


def test_tables_that_are_learned_are_left_with_the_reason(run_liger):
    cos = COS.clone().requires_grad_()
    _, (report,) = run_liger(llama, Q, KEY, cos, SIN)
    assert any("cos requires a gradient" in site.reason for site in report.sites)


@pytest.mark.parametrize(
    "round_trip",
    [lambda y: y.double().to(y.dtype), lambda y: (-y).neg(), lambda y: y.flatten(0, 1).view(y.shape)],
)
def test_a_round_trip_of_the_output_is_no_second_site(round_trip):
    def f(q, cos, sin):
        y = q * cos + rotate_half(q) * sin
        return y, round_trip(y)

    assert_rewrites(f, Q, COS, SIN, expect={"rotary.half": 1})


def test_rotation_back_by_a_conjugate_table():
    """The conjugate is a view with a flag, which has no real view."""

    def f(q, freqs):
        pairs = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs.conj()).flatten(-2).to(q.dtype)

    assert_rewrites(f, Q, torch.polar(torch.ones(S, D // 2), ANGLES), expect={"rotary.complex": 1})


def test_one_complex_angle_for_all_pairs_is_left():
    def f(q, freqs):
        pairs = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs.mean(-1, keepdim=True)).flatten(-2).to(q.dtype)

    freqs = torch.polar(torch.ones(S, D // 2), ANGLES)
    assert_refuses(
        f, Q, freqs, pattern="rotary", reason="1 angles, which is not one for each pair of 16 channels"
    )
