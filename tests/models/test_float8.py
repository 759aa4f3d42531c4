"""Training in float8 as torchao emulates it: rewrites stand between casts to eight bits, and none of the casts moves.

Quantization is discontinuous: near the middle between two values of eight bits, one ulp of bfloat16 decides for a step
of 1/16. Gradients of two correct computations therefore lie as far apart as those of eager code before and after one
weight in a hundred has moved by an ulp. What is compared is the distance from the exact gradients.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liger_compile
from tests.models.harness import step

LENGTH, WIDTH, VOCABULARY = 32, 64, 128


def quantized(x, dtype=torch.float8_e4m3fn):
    """With one scale for the tensor, so that the largest value is the dtype's."""
    largest = torch.finfo(dtype).max
    scale = largest / x.abs().amax().float().clamp(min=1e-12)
    return ((x.float() * scale).clamp(-largest, largest).to(dtype).float() / scale).to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return quantized(x) @ quantized(weight).t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = quantized(grad.contiguous(), torch.float8_e5m2)
        rows, columns = grad.flatten(0, -2), quantized(x).flatten(0, -2)
        return grad @ quantized(weight), rows.t() @ columns


class Linear(nn.Linear):
    is_quantized = True

    def forward(self, x):
        return _Product.apply(x, self.weight) if self.is_quantized else super().forward(x)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        wide = x.float() if x.dtype is torch.bfloat16 else x
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.between = Norm(), Norm()
        self.qkv, self.out = Linear(WIDTH, 3 * WIDTH, bias=False), Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = Norm(), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x, at = self.embed(ids), torch.arange(ids.shape[1])
        for block in self.blocks:
            x = block(x, at[None, :] <= at[:, None])
        logits = self.head(self.norm(x))
        return F.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32)), ids.flatten()
        )


def gradients(model, compiled=None):
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    function = model if compiled is None else compiled
    found = step(lambda _, ids: function(ids), model, ids).gradients
    return {name: gradient.double() for name, gradient in found.items()}


def as_it_is_exactly(model):
    """The same weights in float64, and nothing quantized."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if isinstance(module, Linear):
            module.is_quantized = False
    return exact


def distance(a, b):
    return float(sum((a[name] - b[name]).square().sum() for name in b).sqrt())


def moved_by_an_ulp(model, part):
    """The model with some of its weights moved to the next number of their dtype."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            up = torch.nextafter(parameter, torch.full_like(parameter, torch.inf))
            parameter.copy_(torch.where(torch.rand(parameter.shape) < part, up, parameter))
    return moved


@pytest.fixture
def model():
    return Model().to(torch.bfloat16)


@pytest.mark.parametrize("policy", ["auto", pytest.param("always", marks=pytest.mark.slow)])
def test_gradients_are_as_near_to_the_exact_ones_as_in_eager(model, policy):
    exact, eager = gradients(as_it_is_exactly(model)), gradients(copy.deepcopy(model))
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": policy}
    ours = gradients(model, torch.compile(model, backend="liger", options=options))
    report = liger_compile.reports()[0]
    assert report.count("replace") >= 3
    products = [site.kind for site in report.sites if site.pattern == "gated_mlp.swiglu_product"]
    assert products == ["annotate"] * 2
    for name, gradient in exact.items():
        error, allowed = ((each[name] - gradient).norm() for each in (ours, eager))
        assert error <= 2 * allowed, name


def test_they_differ_from_those_of_eager_as_those_do_after_an_ulp(model):
    eager, moved = gradients(copy.deepcopy(model)), gradients(moved_by_an_ulp(model, 0.01))
    options = {"liger.inner": "aot_eager", "liger.strict": True}
    ours = gradients(model, torch.compile(model, backend="liger", options=options))
    assert distance(ours, eager) <= 2 * distance(moved, eager)


def test_scores_of_eight_bits_stay_so():
    """Between its products, attention rounds scores as it likes; not to eight bits."""

    def attend(q, k, v):
        scores = (q @ k.mT).to(torch.float8_e4m3fn).to(q.dtype)
        mask = torch.ones(8, 8, dtype=torch.bool).tril()
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    q, k, v = torch.randn(3, 1, 2, 8, 4) * 2
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    compiled = torch.compile(attend, backend="liger", options=options)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@pytest.mark.parametrize(
    "repeated", [lambda x: x.repeat_interleave(4, dim=1), lambda x: x.expand(-1, 4, -1, -1)]
)
def test_values_are_rounded_to_eight_bits_after_they_are_repeated(repeated):
    """Each copy's gradient is rounded to eight bits, and their sum is not: four times 150 is more than those hold."""

    def attend(q, k, v):
        v = repeated(v).to(torch.float8_e4m3fn).to(q.dtype)
        return F.scaled_dot_product_attention(q, repeated(k), v, torch.ones(8, 8, dtype=torch.bool).tril())

    q, k, v = torch.randn(1, 4, 8, 4), torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    results = []
    for function in (attend, torch.compile(attend, backend="liger", options=options)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        (function(*inputs) * 150).sum().backward()
        results.append([x.grad for x in inputs])
    assert liger_compile.reports()[0].count("replace") == 1
    assert torch.isfinite(results[0][2]).any() and (results[0][2] > 448).any()
    torch.testing.assert_close(results[1], results[0], equal_nan=True)
