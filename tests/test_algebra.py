"""Algebra is recorded, not performed: what is x in real numbers alone is not x, in terms, in matches and in results.

Rounding is meaning. Numbers of a product become one number only where nothing that lies between them is rounded away
or leaves the range of the dtype; numbers of a sum never do, and powers never vanish.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import liger_compile
from liger_compile.pattern import Pattern
from liger_compile.terms.term import Scalar, close
from tests.test_terms import terms_of

torch.manual_seed(0)
X = torch.randn(8, 16)
HALF, INTEGERS = X.half(), torch.arange(16).view(2, 8)
ROUND = 1.5 * 2**23  # float32 counts in ones from here


# What only seems to be the same, and for which x.
DIFFERENT = {
    "a sum that rounds": (X, lambda x: (x + ROUND) - ROUND, lambda x: x),
    "in place": (X, lambda x: (x * 8).add_(ROUND).sub_(ROUND), lambda x: x * 8),
    "with alpha": (X, lambda x: torch.sub(x + 8, 4, alpha=2), lambda x: x),
    "from the other side": (X, lambda x: ROUND - (ROUND - x), lambda x: x),
    "two that make a third": (X, lambda x: x + 1e8 + 1, lambda x: x + (1e8 + 1)),
    "a constant before a tensor": (X, lambda x: (x + ROUND) + x.sin(), lambda x: (x + x.sin()) + ROUND),
    "there and back": (X, lambda x: (x * 7) * (1 / 7), lambda x: x),
    "there and back by division": (X, lambda x: (x / 3) / (1 / 3), lambda x: x),
    "tiny and back": (X, lambda x: x * 1e-30 * 1e-30 * 1e30 * 1e30, lambda x: x),
    "tiny": (X, lambda x: (x * 1e-30) * 1e-30, lambda x: x * 1e-60),
    "huge and smaller": (X, lambda x: (x * 1e30) * 1e-20, lambda x: x * 1e10),
    "tiny among factors": (X, lambda x: (x * 1e-30) * x.sin(), lambda x: (x * x.sin()) * 1e-30),
    "by a subnormal number": (X, lambda x: x / 1e-40, lambda x: x * 1e40),
    "by zero": (X, lambda x: x / 0.0, lambda x: x * math.inf),
    "zero times": (X, lambda x: (x * 8) * 0, lambda x: x * 0),
    "signed zeros": (X, lambda x: x * 0.0, lambda x: x * -0.0),
    "constants that are signed zeros": (X, lambda x: x.copysign(0.0), lambda x: x.copysign(-0.0)),
    "tiny in half": (HALF, lambda x: (x * 1e-8) * 1e8, lambda x: x),
    "huge in half": (HALF, lambda x: (x * 1e4) * 1e4, lambda x: x * 1e8),
    "grouped in half": (HALF, lambda x: (x * x.sin()) * x.cos(), lambda x: x * (x.sin() * x.cos())),
    "a sum in half": (HALF, lambda x: x.sum(-1) / 16, lambda x: x.mean(-1)),
    "a norm in half": (HALF, lambda x: x.norm(dim=-1), lambda x: (x * x).sum(-1).sqrt()),
    "what half precision takes for 1": (X.bfloat16(), lambda x: x * 1.003 * 1.003, lambda x: x * 1.003**2),
    "squares of roots": (X, lambda x: x.sqrt() ** 2, lambda x: x),
    "roots that meet": (X, lambda x: x.sqrt() * x.sqrt(), lambda x: x),
    "roots of roots": (X, lambda x: x.pow(0.25).pow(4), lambda x: x),
    "squares of inverse roots": (X, lambda x: x.rsqrt().square(), lambda x: 1 / x),
    "roots of squares": (X, lambda x: x.square().sqrt(), lambda x: x),
    "cube roots": (X, lambda x: (x**3) ** (1 / 3), lambda x: x),
    "divided by itself": (X, lambda x: x.sin() * x / x, lambda x: x.sin()),
    "divided after a square": (X, lambda x: x * x / x, lambda x: x),
    "divided first": (X, lambda x: x / x * x, lambda x: x),
    "nothing's power": (X, lambda x: x / x, lambda x: x**0),
    "inverse of the inverse": (X, lambda x: 1 / (1 / x), lambda x: x),
    "logarithm and back": (X, lambda x: x.exp().log(), lambda x: x),
    "less itself": (X, lambda x: x.sin() + (x - x), lambda x: x.sin()),
    "narrow and wide again": (X, lambda x: x.half().float(), lambda x: x),
    "half and half": (X, lambda x: x.bfloat16().half().float(), lambda x: x.bfloat16().float()),
    "eight bits": (X, lambda x: x.to(torch.float8_e4m3fn).float(), lambda x: x),
    "whole numbers": (X, lambda x: x.int().float(), lambda x: x),
    "flags": (X, lambda x: x.bool().float(), lambda x: x),
    "negative bytes": (X, lambda x: x * (-x.to(torch.uint8)).float(), lambda x: x * -x.to(torch.uint8).float()),
    "whole numbers that no float is": (INTEGERS, lambda x: x + (2**53 + 1), lambda x: x + 2**53),
    "a GELU's cube by way of a root": (
        X,
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + x * (0.044715 * x * x).sqrt() ** 2))),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "twice half of a GELU": (X, lambda x: 0.5 * (2 * F.gelu(x)), F.gelu),
}  # fmt: skip

# What is the same in floating point too, but for the last digit.
SAME = {
    "numbers of one way": (X, lambda x: x * 0.5 * 0.25, lambda x: x * 0.125),
    "ordinary numbers": (X, lambda x: x * 2 / 30, lambda x: x * (1 / 15)),
    "signs": (X, lambda x: -(x * -3), lambda x: x * 3),
    "numbers among factors": (X, lambda x: (x * 2) * x.sin() * 3, lambda x: 6 * (x.sin() * x)),
    "powers": (X, lambda x: x * x * x, lambda x: x**3),
    "positions": (INTEGERS, lambda x: (x + 5) - 5, lambda x: x),
    "a number with another digit": (
        X,
        lambda x: F.gelu(x),
        lambda x: x * (torch.erf(x * 0.70710678) + 1) / 2,
    ),
    "wide and narrow again": (HALF, lambda x: x.float().half(), lambda x: x),
    "nothing": (HALF, lambda x: -((x + 0) * 1.0 - 0.0), lambda x: -x),
}


def pair(x, first, second):
    """Of what is computed, for the graph does not give back its inputs."""
    return terms_of(lambda x: (first(x.abs()), second(x.abs())), x)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_the_same_in_real_numbers_alone_is_another_term(name):
    a, b = pair(*DIFFERENT[name])
    assert a is not b


@pytest.mark.parametrize("name", SAME)
def test_what_is_the_same_in_floating_point_is_one_term(name):
    a, b = pair(*SAME[name])
    scalars = [term.consts[0] for term in (a, b) if term.op == "mul"]
    if scalars and scalars[0] != scalars[-1]:  # equal but for the last digit
        assert close(scalars[0].value, scalars[1].value, X.dtype)
        assert (a.args, a.consts[1:]) == (b.args, b.consts[1:])
    else:
        assert a is b


def test_a_constant_is_as_exact_as_its_dtype():
    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x * 0.70710678)), F.gelu(x)

    single = terms_of(gelu, X)
    double = terms_of(gelu, X.double())
    assert single[0] is single[1] and double[0] is not double[1]


@pytest.mark.parametrize(
    ("a", "b", "is_close"),
    [
        (math.inf, math.inf, True),
        (math.inf, -math.inf, False),
        (math.inf, 1.0, False),
        (math.nan, math.nan, False),
        (0.0, 0.0, True),
        (0.0, -0.0, False),
        (0.0, 1e-12, False),
        (1e-12, 1.1e-12, False),
        (1 / 30 * 30, 1.0, True),
        (0.7978845608, math.sqrt(2 / math.pi), True),
    ],
)
def test_constants_are_close(a, b, is_close):
    assert close(a, b) is close(b, a) is is_close
    assert close(a, b) is Scalar(a).is_number(b)


# Results


def results(function, *inputs, **options):
    """What it gives, and its gradients: in eager mode, and compiled."""
    found = []
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always", **options}
    for call in (function, torch.compile(function, backend="liger", options=options)):
        leaves = [each.clone().requires_grad_(each.is_floating_point()) for each in inputs]
        out = call(*leaves)
        found.append((out.detach(), *torch.autograd.grad(out.sum(), leaves, allow_unused=True)))
    return found


def replaced():
    return [s.pattern for report in liger_compile.reports() for s in report.sites if s.kind == "replace"]


WEIGHT, TARGET = torch.randn(32, 16), torch.arange(8)


def loss_of(hidden, weight):
    return F.cross_entropy(F.linear(hidden, weight).float(), TARGET)


def rms_norm(x, weight, eps=1e-6):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


PROGRAMS = {
    "quantized hidden states": (lambda x, w: loss_of((x * 8 + ROUND) - ROUND, w), X, WEIGHT),
    "quantized logits": (
        lambda x, w: F.cross_entropy(((F.linear(x, w) + ROUND) - ROUND) * 0.5, TARGET), X, WEIGHT),
    "hidden states that half precision has no room for": (
        lambda x, w: loss_of((x * 1e-8) * 1e8, w), HALF, WEIGHT.half()),
    "logits that half precision has no room for": (
        lambda x, w: F.cross_entropy(30 * torch.tanh(((F.linear(x, w) * 1e-8) * 1e8) / 30), TARGET),
        HALF, WEIGHT.half()),
    "a number that float16 has no room for": (
        lambda x, w: F.cross_entropy(F.linear(x, w) * 6e4, TARGET), HALF, WEIGHT.half()),
    "roots of what is negative": (lambda x, w: rms_norm(x.sqrt() ** 2, w), X, WEIGHT[0]),
    "an infinite eps": (lambda x, w: rms_norm(x, w, math.inf), X, WEIGHT[0]),
    "a quantized mean": (
        lambda x, w: w * x * torch.rsqrt((x.pow(2).mean(-1, keepdim=True) + 64.0) - 64.0), X, WEIGHT[0]),
    "eight bits": (lambda x, w: loss_of(x.to(torch.float8_e4m3fn).to(x.dtype), w), X, WEIGHT),
    "a gate that underflows": (
        lambda x, w: F.linear(F.silu(x) * (x.flip(0) * 1e-40 * 1e30), w), X, WEIGHT),
    "a loss that is scaled": (lambda x, w: loss_of(x, w) * 65536.0 / 65536.0, X, WEIGHT),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_results_are_those_of_eager_code(name):
    eager, compiled = results(*PROGRAMS[name])
    half = torch.float16 in (each.dtype for each in PROGRAMS[name][1:])
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-2 if half else 1e-4, atol=1e-3 if half else 1e-5, equal_nan=True
        )


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 0.0])
def test_a_loss_times_no_ordinary_number(number):
    """Its gradient, which is none, is not what this is about."""
    function = torch.compile(
        lambda x, w: F.cross_entropy(F.linear(x, w), TARGET, reduction="sum") * number,
        backend="liger",
        options={"liger.inner": "aot_eager", "liger.strict": True},
    )
    expected = F.cross_entropy(F.linear(X, WEIGHT), TARGET, reduction="sum") * number
    torch.testing.assert_close(function(X, WEIGHT), expected, equal_nan=True)


@pytest.mark.parametrize("scale", [6e4, 1e30, 1e-30, 1e-320])
def test_attention_of_a_scale_that_kernels_round_otherwise(scale):
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    q = torch.randn(1, 2, 8, 16)

    def attend(q):
        mask = torch.ones(8, 8, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, q, q, mask, scale=scale)

    eager, compiled = results(attend, q)
    assert mask.any() and replaced() == []
    torch.testing.assert_close(compiled[0], eager[0])


# Patterns of others


def pattern(name, search, replace=None, **numbers):
    return Pattern(
        name=f"{name}.test",
        search=search,
        replace=replace or search,
        examples={"x": torch.empty(8, 16), **numbers},
    )


def residual_tanh(x):
    return x + torch.tanh(x)


def gated_square(x):
    return torch.sigmoid(x) * x.square()


def shifted(x, by: float):
    return torch.sin(x) + by


def scaled(x, by: float):
    return torch.sin(x) * by


def divided(x, by: float):
    return torch.sin(x) / by


def is_replaced(search, function, x=X, **numbers):
    """Whether a pattern is found in a function; its replacement gives another value, and none that is not asked for."""
    liger_compile.clear_reports()
    torch._dynamo.reset()
    options = {
        "liger.inner": "eager",
        "liger.strict": True,
        "liger.patterns": (pattern("t", search, **numbers),),
    }
    expected = function(x)
    torch.testing.assert_close(
        torch.compile(function, backend="liger", options={**options, "liger.policy": "always"})(x),
        expected,
        equal_nan=True,
    )
    return replaced() == ["t.test"]


def test_a_sum_does_not_stand_for_one_of_its_factors():
    assert is_replaced(residual_tanh, lambda x: torch.tanh(3 * x) + 3 * x)
    assert not is_replaced(residual_tanh, lambda x: x + torch.tanh(3 * x))


def test_a_capture_under_a_power_is_no_root_of_what_is_there():
    assert is_replaced(gated_square, lambda x: x * torch.sigmoid(x) * x)

    def of_root(x):
        root = x.sqrt()
        return torch.sigmoid(root) * x

    assert not is_replaced(gated_square, of_root, X.abs())


@pytest.mark.parametrize("number", [0.0, 0.25, -3.0, 1e-30, 1e30])
def test_a_number_capture_takes_what_a_number_is(number):
    assert is_replaced(scaled, lambda x: x.sin() * number, by=0.5)
    assert is_replaced(shifted, lambda x: x.sin() + number, by=0.5) or not number  # nothing is added


@pytest.mark.parametrize("number", [math.inf, math.nan, 1e-40, 1e-320, 1e300])
def test_a_number_capture_takes_nothing_else(number):
    assert not is_replaced(scaled, lambda x: x.sin() * number, by=0.5)
    assert not is_replaced(divided, lambda x: x.sin() * number, by=0.5)
    assert not is_replaced(divided, lambda x: x.sin() / number, by=0.5)
