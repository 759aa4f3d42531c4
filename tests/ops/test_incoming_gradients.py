"""Gradients that forward has made, for any incoming gradient: what eager code has, which makes them with it.

Finite where eager's are finite, not where eager's are not, and within the numerics bar; by reference and by kernel.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from liger_compile import functional as L
from liger_compile.ops import linear_cross_entropy as op
from liger_compile.testing import precision
from tests.helpers.pairwise import pairwise
from tests.ops.cases import eager_loss

TOKENS, V, H = 9, 37, 16


@pytest.fixture(params=["reference", "kernel"])
def way(request):
    if request.param == "kernel":
        pytest.importorskip("triton")
        request.getfixturevalue("interpreted")
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    for name, size in {"LEAST_ROWS": 4, "ROW_TILE": 4, "ROWS_A_BYTE": 1}.items():
        monkeypatch.setattr(op, name, size)


def tensors(dtype, features=1.0, weights=1.0, tokens=TOKENS):
    x = (torch.randn(tokens, H) * features).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    weight, bias = (torch.randn(V, H) * weights).to(dtype), torch.randn(V).to(dtype)
    return x, weight.requires_grad_(), bias.requires_grad_()


def differentiated(loss, leaves, incoming):
    incoming = incoming.to(loss) if isinstance(incoming, torch.Tensor) else torch.full_like(loss, incoming)
    return torch.autograd.grad(loss, leaves, incoming)


def three(leaves, target, incoming, frozen=None, class_weight=None, memory=1, **arguments):
    """The gradients of ours, of eager code, and exact ones. memory=1: chunks as small as they may be."""
    for name, leaf in zip(("x", "weight", "bias"), leaves, strict=True):
        leaf.requires_grad_(name != frozen)
    doubles, wide = precision.as_double(leaves), None if class_weight is None else class_weight.double()

    def gradients(function, inputs, *weight):
        loss = function(*inputs, *weight)
        return differentiated(loss, [leaf for leaf in inputs if leaf.requires_grad], incoming)

    def ours(x, w, b, class_weight):
        return L.linear_cross_entropy(x, w, target, b, class_weight=class_weight, memory=memory, **arguments)

    def eager(x, w, b, class_weight):
        return eager_loss(F.linear(x, w, b), target, class_weight, **arguments)

    with precision.in_double():
        exact = gradients(eager, doubles, wide)
    return gradients(ours, leaves, class_weight), gradients(eager, leaves, class_weight), exact


CLASS_WEIGHTS = {
    "none": None,
    "zero": torch.zeros(V),
    "some zero": (torch.arange(V) % 3).float(),
    "large": torch.linspace(1e4, 1e5, V),
}

NOT_FINITE = pairwise(
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    reduction=["mean", "sum", "none"],
    incoming=[math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0],
    ignored=["none", "some", "all"],
    smoothing=[0.0, 0.1],
    class_weight=list(CLASS_WEIGHTS),
    softcap=[None, 5.0],
    frozen=[None, "x", "weight", "bias"],
)


@pytest.mark.parametrize("settings", NOT_FINITE, ids=lambda each: " ".join(map(str, each.values())))
def test_what_is_finite_is_what_is_finite_in_eager_code(way, small_chunks, settings):
    target = torch.randint(0, V, (TOKENS,))
    target[{"none": slice(0), "some": slice(0, None, 3), "all": slice(None)}[settings["ignored"]]] = -100
    ours, eager, exact = three(
        tensors(settings["dtype"]),
        target,
        settings["incoming"],
        settings["frozen"],
        CLASS_WEIGHTS[settings["class_weight"]],
        reduction=settings["reduction"],
        label_smoothing=settings["smoothing"],
        softcap=settings["softcap"],
    )
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        finite = b.isfinite()
        precision.assert_no_worse(a[finite], b[finite], c[finite])


def test_some_tokens_have_an_infinite_incoming_gradient(way):
    incoming = torch.ones(TOKENS)
    incoming[2], incoming[3], incoming[4] = math.inf, math.nan, -math.inf
    target = torch.randint(0, V, (TOKENS,))
    target[3] = -100
    ours, eager, _ = three(tensors(torch.float16), target, incoming, reduction="none")
    for a, b in zip(ours, eager, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


SIZES = pairwise(
    dtype=[torch.bfloat16, torch.float16],
    reduction=["mean", "sum"],
    scale=[2.0**-24, 2.0**-8, 0.3, 2.0**8, 2.0**16, 2.0**24],
    features=[1e-4, 1.0, 300.0],
    weights=[1e-3, 0.1],
    chunks=["one", "three", "wide"],  # three that are summed in float32
    class_weight=["none", "large"],
)


@pytest.mark.parametrize("settings", SIZES, ids=lambda each: " ".join(map(str, each.values())))
def test_any_scale_of_the_loss_leaves_the_gradients_that_eager_code_has(
    way, small_chunks, monkeypatch, settings
):
    """Where eager's are infinite ours may be finite, but not otherwise."""
    monkeypatch.setattr(op, "ACCUMULATE_WIDE_ABOVE", 2 if settings["chunks"] == "wide" else 16)
    tokens = 12
    target = torch.randint(0, V, (tokens,))
    target[1] = -100
    leaves = tensors(settings["dtype"], settings["features"], settings["weights"], tokens)
    ours, eager, exact = three(
        leaves,
        target,
        settings["scale"],
        class_weight=CLASS_WEIGHTS[settings["class_weight"]],
        memory=None if settings["chunks"] == "one" else 1,
        reduction=settings["reduction"],
    )
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert a[b.isfinite() & (c.abs() < 0.99 * torch.finfo(a.dtype).max)].isfinite().all()
        if b.isfinite().all():  # what is finite beside infinite sums is what cancels: a matter of luck
            lost = (
                2.0**-25 * b.numel() ** 0.5 if a.dtype == torch.float16 else 0.0
            )  # below its smallest number
            assert precision.error_of(a, b, c) <= precision.bound(b, c) + lost


def test_confident_predictions_keep_their_gradients_in_float16(way):
    """1 - p is 1e-5 everywhere; eager code with a loss scale of 2^24 has all digits of it."""
    x = torch.eye(8, H).half().requires_grad_()
    weight, target = (17 * torch.eye(V, H)).half().requires_grad_(), torch.arange(8)
    leaves = (x, weight, torch.zeros(V).half().requires_grad_())
    ours, eager, exact = three(leaves, target, 2.0**24, memory=None, reduction="sum")
    assert 0 < exact[1].abs().max() < 100
    precision.assert_no_worse(ours, eager, exact)


@pytest.mark.parametrize("features", [300.0, 3e4])
def test_large_features_in_float16_keep_finite_gradients(way, features):
    x = torch.full((4, H), features).half().requires_grad_()
    weight = (torch.randn(V, H) * 1e-6).half().requires_grad_()
    leaves = (x, weight, torch.zeros(V).half().requires_grad_())
    ours, eager, exact = three(leaves, torch.zeros(4, dtype=torch.int64), 1.0, memory=None)
    assert all(each.isfinite().all() for each in eager)
    precision.assert_no_worse(ours, eager, exact)


def compiled(function, inner="eager"):
    options = {"liger.inner": inner, "liger.strict": True, "liger.policy": "always"}
    return torch.compile(function, backend="liger", options=options)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(40, H), torch.nn.Linear(H, 40, bias=False)
        self.body = torch.nn.Linear(H, H)

    def forward(self, ids, labels):
        hidden = torch.tanh(self.body(self.embed(ids))) * 100
        return F.cross_entropy(self.head(hidden).float().view(-1, 40), labels.view(-1))


def trained(compile, steps=20):
    """The losses of some steps in float16 with a loss scale, and how often one was taken."""
    torch.manual_seed(0)
    model, ids = Model(), torch.randint(0, 40, (2, 12))
    optimizer, scaler = (
        torch.optim.SGD(model.parameters(), 1e-3),
        torch.amp.GradScaler("cpu", init_scale=2.0**16),
    )
    step, losses, taken = compile(model), [], 0
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = step(ids, ids.roll(-1, 1))
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        taken += scaler.get_scale() >= before
        losses.append(float(loss.detach()))
    return losses, taken


def test_training_with_a_loss_scale_is_as_in_eager_code():
    losses, taken = trained(compiled)
    expected, expected_taken = trained(lambda model: model)
    assert taken >= expected_taken > 15
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=2e-2)


TAILS = {
    "sum / count": lambda loss, count: loss / count,
    "sum * (1 / count)": lambda loss, count: loss * (1 / count),
    "sqrt": lambda loss, count: loss.sqrt(),
    "power": lambda loss, count: loss**0.5,
    "log": lambda loss, count: loss.log(),
    "1 / sum": lambda loss, count: 1 / loss,
    "half": lambda loss, count: (loss / count).half(),
    "0 * inf": lambda loss, count: loss * 0 * torch.tensor(math.inf),
}


TRACED = ("sum / count", "sqrt")  # the others run the op's backward as it is, which takes less time


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("ignored", ["all", "some"])
def test_what_follows_the_loss_leaves_the_model_as_eager_code_does(tail, ignored):
    labels = torch.full((2, 8), -100)
    if ignored == "some":
        labels[0, :3] = torch.tensor([1, 2, 3])
    torch.manual_seed(0)
    embed, head = torch.nn.Embedding(40, H), torch.nn.Linear(H, 40)
    parameters = [*embed.parameters(), *head.parameters()]

    def f(ids):
        z = head(torch.tanh(embed(ids))).view(-1, 40)
        loss = F.cross_entropy(z, labels.view(-1), reduction="sum", label_smoothing=0.1)
        return TAILS[tail](loss, (labels != -100).sum())

    ids, inner = torch.arange(16).view(2, 8), "aot_eager" if tail in TRACED else "eager"
    found, expected = (torch.autograd.grad(g(ids), parameters) for g in (compiled(f, inner), f))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a[b.isfinite()], b[b.isfinite()])
