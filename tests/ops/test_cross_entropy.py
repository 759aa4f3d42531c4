"""cross_entropy and linear_cross_entropy where it hurts: ignored, infinite, large, wrong; chunks and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from liger_compile import functional as L
from liger_compile.ops import blocks
from liger_compile.ops import linear_cross_entropy as op
from liger_compile.testing import precision
from tests.helpers.gradients import gradients_of
from tests.helpers.pairwise import parametrize
from tests.ops.cases import LOSSES, eager_loss

V, H = 37, 16


def linear(rows, target, **arguments):
    """linear_cross_entropy of the same logits as `rows`, by way of an identity matrix."""
    return L.linear_cross_entropy(rows, torch.eye(rows.shape[-1], dtype=rows.dtype), target, **arguments)


both = pytest.mark.parametrize("ours", [L.cross_entropy, linear], ids=["logits", "linear"])


def assert_as_eager(ours, logits, target, **arguments):
    """Loss and gradient, NaN where eager has it."""
    results = []
    for function in (ours, eager_loss):
        leaf = logits.detach().clone().requires_grad_()
        loss = function(leaf, target, **arguments)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    torch.testing.assert_close(*results, equal_nan=True)
    return results[0]


@both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_tokens_ignored(ours, reduction, smoothing):
    target = torch.full((4,), -100)
    loss, grad = assert_as_eager(
        ours, torch.randn(4, V), target, reduction=reduction, label_smoothing=smoothing
    )
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert (grad == 0).all()


@both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens(ours, reduction):
    assert_as_eager(ours, torch.randn(0, V), torch.zeros(0, dtype=torch.int64), reduction=reduction)


def test_no_tokens_give_the_weight_no_gradient():
    x, weight = torch.randn(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    L.linear_cross_entropy(x, weight, torch.zeros(0, dtype=torch.int64)).backward()
    assert (weight.grad == 0).all() and x.grad.shape == (0, H)


@pytest.mark.parametrize("arguments", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}], ids=str)
def test_infinite_logits(arguments):
    logits = torch.randn(5, V)
    logits[0, 3:20] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 4] = torch.inf
    logits[3, 7] = torch.nan
    logits[4, 2] = -torch.inf
    assert_as_eager(L.cross_entropy, logits, torch.tensor([1, 2, 3, 4, 2]), reduction="none", **arguments)


@both
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits(ours, scale):
    logits, target = torch.randn(64, V) * scale, torch.randint(0, V, (64,))
    results = []
    for function, leaf in ((ours, logits), (eager_loss, logits), (F.cross_entropy, logits.double())):
        leaf = leaf.detach().clone().requires_grad_()
        loss = function(leaf, target)
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    precision.assert_no_worse(*results)


@both
def test_a_certain_token_in_half_precision_keeps_its_gradient(ours):
    logits = torch.zeros(8, V, dtype=torch.bfloat16)
    logits[:, 5] = 16.0
    target = torch.full((8,), 5)
    leaf = logits.clone().requires_grad_()
    ours(leaf, target, reduction="sum").backward()
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, target, reduction="sum").backward()
    assert (leaf.grad - exact.grad).norm() < 2**-8 * exact.grad.norm()


@both
@pytest.mark.parametrize("wrong", [V, -1, -99])
def test_a_target_that_is_no_class_raises_what_eager_raises(ours, wrong):
    logits, target = torch.randn(3, V), torch.tensor([1, wrong, -100])
    with pytest.raises(IndexError) as eager:
        F.cross_entropy(logits, target)
    with pytest.raises(IndexError) as found:
        ours(logits, target)
    assert str(found.value) == str(eager.value)


@both
def test_an_ignored_index_may_be_any_number(ours):
    target = torch.tensor([0, 1, 10**12, V - 1])
    assert_as_eager(ours, torch.randn(4, V), target, ignore_index=10**12)
    assert_as_eager(ours, torch.randn(4, V), target.clamp(max=V - 1), ignore_index=V - 1)


@both
def test_targets_may_be_flat_and_losses_have_their_shape(ours):
    logits, target = torch.randn(2, 3, V), torch.randint(0, V, (2, 3))
    shaped, flat = (ours(logits, t, reduction="none") for t in (target, target.flatten()))
    assert shaped.shape == (2, 3) and torch.equal(shaped.flatten(), flat)


@both
@pytest.mark.parametrize("others, smoothing", [(0.0, 0.0), (1.0, 0.3)])
def test_class_weights_of_all_tokens_that_are_zero_are_as_in_eager(ours, others, smoothing):
    weight = torch.full((V,), others).index_fill(0, torch.tensor([1, 2]), 0)
    leaf = torch.randn(3, V, requires_grad=True)
    target = torch.tensor([1, 2, -100])
    name = "weight" if ours is L.cross_entropy else "class_weight"
    loss = ours(leaf, target, label_smoothing=smoothing, **{name: weight})
    assert F.cross_entropy(leaf, target, weight, label_smoothing=smoothing).isnan()
    assert loss.isnan() and torch.autograd.grad(loss, leaf)[0][:2].isnan().all()


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks and many blocks of few tokens."""
    monkeypatch.setattr(op, "CHUNK_BYTES", 4 * V * 4)
    monkeypatch.setattr(op, "LEAST_ROWS", 4)
    monkeypatch.setattr(op, "ROWS_A_BYTE", 1)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3 * V * 4)


@pytest.mark.parametrize(
    "dtype, width, needs_dweight, memory, rows",
    [
        (torch.float32, 256, True, 0, 256),
        (torch.bfloat16, 256, True, 0, 131),  # of 8 MiB
        (torch.float32, 1024, True, 0, 512),  # half of its columns
        (torch.float32, 1024, False, 0, 128),  # there is no gradient to read and write
        (torch.float32, 1024, True, 2**20, 128),  # somebody wants it small
        (torch.float32, 1024, True, 2**27, 1048),
    ],
)
def test_chunks_on_a_cpu(dtype, width, needs_dweight, memory, rows):
    x, weight = (torch.empty(size, width, dtype=dtype) for size in (2048, 32000))
    assert op.chunk_rows(x, weight, needs_dweight, memory) == rows


@parametrize(name=[*LOSSES], dtype=[torch.float32, torch.bfloat16, torch.float16], tokens=[9, 601])
def test_many_chunks_are_no_worse_than_eager(small_chunks, name, dtype, tokens):
    """601 tokens of width 16 are too many for few long chunks: dweight is summed in float32."""
    x = torch.randn(tokens, H).to(dtype).requires_grad_()
    weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((V, H), (V,)))
    target = torch.randint(0, V, (tokens,))
    target[::4] = LOSSES[name].get("ignore_index", -100)
    chunks = op.split_rows(tokens, op.chunk_rows(x, weight, True))
    assert len(chunks) > (1 if tokens == 9 else op.ACCUMULATE_WIDE_ABOVE)

    def eager(x, weight, bias):
        return eager_loss(F.linear(x, weight, bias), target, **LOSSES[name])

    inputs = (x, weight, bias)
    ours = gradients_of(lambda *a: L.linear_cross_entropy(*a[:2], target, a[2], **LOSSES[name]), *inputs)
    doubles = precision.as_double(inputs)
    with precision.in_double():
        exact = gradients_of(eager, *doubles)
    precision.assert_no_worse(ours, gradients_of(eager, *inputs), exact)


def test_half_precision_is_better_than_eager_where_no_target_is_likely():
    """Eager rounds -1 / 1021, and all gradients are off by the same 0.3%; ours rounds -1, which is exact."""
    tokens, classes = 1021, 4000
    x, weight = torch.randn(tokens, 32).bfloat16(), (0.02 * torch.randn(classes, 32)).bfloat16()
    target = torch.randint(0, classes, (tokens,))

    def gradients(function, *tensors):  # of the loss itself: gradients_of would scale it, and round otherwise
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves), leaves)

    exact = gradients(lambda x, w: F.cross_entropy(x @ w.t(), target), x.double(), weight.double())
    eager = gradients(lambda x, w: F.cross_entropy((x @ w.t()).float(), target), x, weight)
    ours = gradients(lambda x, w: L.linear_cross_entropy(x, w, target), x, weight)
    for found, other, true in zip(ours, eager, exact, strict=True):
        assert (found - true).norm() < 0.7 * (other - true).norm()


def test_float16_sums_that_would_overflow_before_they_are_divided():
    tokens = 4096
    x, weight = torch.full((tokens, 4), 60.0).half(), torch.zeros(8, 4).half().requires_grad_()
    L.linear_cross_entropy(x, weight, torch.zeros(tokens, dtype=torch.int64)).backward()
    assert weight.grad.isfinite().all() and weight.grad[0, 0] == -52.5


def test_float16_gradients_survive_until_the_loss_scale_multiplies_them():
    tokens, loss_scale = 8192, 2.0**16
    x, weight = torch.randn(tokens, 16).half(), (0.02 * torch.randn(64, 16)).half()
    target = torch.randint(0, 64, (tokens,))

    def gradients(function, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        return gradients_of(lambda *leaves: loss_scale * function(*leaves), *leaves)[1]

    exact = gradients(lambda x, w: F.cross_entropy(x @ w.t(), target), x.double(), weight.double())
    eager = gradients(lambda x, w: F.cross_entropy((x @ w.t()).float(), target), x, weight)
    ours = gradients(lambda x, w: L.linear_cross_entropy(x, w, target), x, weight)
    precision.assert_no_worse(ours, eager, exact)


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_only_the_gradients_that_are_needed_are_made(needs):
    x, weight, bias = torch.randn(6, H), torch.randn(V, H), torch.randn(V)
    target = torch.randint(0, V, (6,))
    flags = [bool(need) for need in needs]
    _, *made, token_scales, class_scales = torch.ops.liger_compile.linear_cross_entropy.default(
        x, weight, target, bias, None, -100, "mean", 0.0, 1.0, None, 0.0, *flags
    )
    assert [g.numel() > 0 for g in made] == flags
    assert (token_scales.numel(), class_scales.numel()) == (6 if any(flags) else 0, 0)


def test_no_gradients_are_made_where_none_are_wanted():
    saved = []
    x, weight = torch.randn(6, H, requires_grad=True), torch.randn(V, H)
    target = torch.randint(0, V, (6,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        L.linear_cross_entropy(x, weight, target)
        assert [t.numel() for t in saved] == [6 * H, 0, 0, 6, 0]
        saved.clear()
        with torch.no_grad():
            L.linear_cross_entropy(x, weight, target)
        L.linear_cross_entropy(x, weight, target, reduction="none")
        assert [t.shape for t in saved] == [x.shape, weight.shape, target.shape]


def test_a_gradient_that_was_not_made_is_an_error():
    x, weight = torch.randn(6, H, requires_grad=True), torch.randn(V, H)
    loss, *_ = torch.ops.liger_compile.linear_cross_entropy.default(
        x,
        weight,
        torch.zeros(6, dtype=torch.int64),
        None,
        None,
        -100,
        "sum",
        0.0,
        1.0,
        None,
        0.0,
        *[False] * 3,
    )
    with pytest.raises(
        RuntimeError, match="expected needs_dx=True for an input that requires grad, got False"
    ):
        loss.backward()


@parametrize(
    dtype=(torch.float32, torch.float16, torch.bfloat16),
    reduction=("mean", "sum", "none"),
    count=(0, 4, 9),
    needs=((True, True, True), (True, False, False), (False, True, False), (False, False, False)),
)
def test_rows_with_labels_come_first(dtype, reduction, count, needs):
    """With the number of these rows, the op gives what it gives without, and computes no logits of the others."""
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((9, H), (V, H), (V,)))
    target = torch.randint(0, V, (9,)).masked_fill(torch.arange(9) >= count, -100)
    arguments = (x, weight, target, bias, None, -100, reduction, 0.1, 1.0, None, 0.0, *needs, 0)
    function = torch.ops.liger_compile.linear_cross_entropy.default
    expected, got = function(*arguments), function(*arguments, torch.tensor(count))
    assert [a.shape for a in got] == [a.shape for a in expected]
    bound = torch.finfo(dtype).eps
    if not count:  # the sums of no rows are 0, with factors of their own
        got, expected = (
            (made[0], *op.scaled(torch.ones(()), op.Gradients(*made[1:]), dtype)) for made in (got, expected)
        )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=8 * bound, atol=8 * bound, equal_nan=True)


MEASURE = """
import re, torch, torch.nn.functional as F
from liger_compile import functional as L
def rss():  # not ru_maxrss, which a process takes over from the one that has started it
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
def ours(x, w, t):
    return L.linear_cross_entropy(x, w, t)
def eager(x, w, t):
    return F.cross_entropy(F.linear(x, w).float(), t)
def run(n, h, v):
    x, w = torch.empty(n, h).normal_().requires_grad_(), torch.empty(v, h).normal_().requires_grad_()
    before = rss()
    loss(x, w, torch.zeros(n, dtype=torch.int64)).backward()
    return rss() - before
for loss in (ours, eager):
    run(64, 64, 64)  # what the libraries take on first use
for loss in (ours, eager):  # the second takes over what the first took, so it is the larger
    print(run(2048, 64, 32000))
"""


def test_memory_of_linear_cross_entropy_is_a_fraction_of_eagers():
    """250 MiB of logits: eager has them, their log-softmax and two gradients; ours has dweight and a chunk."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read in /proc")
    # Memory that is freed goes back to the system, so that the peak is what was in use.
    environment = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    ours, eager = map(int, done.stdout.split())
    assert ours < 0.15 * eager, (ours, eager)
