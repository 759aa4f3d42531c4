"""linear_cross_entropy with its kernels: chunks, their memory, and what a GPU asks of it besides."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from liger_compile import functional as L
from liger_compile.ops import alignment, blocks
from liger_compile.ops import linear_cross_entropy as op
from liger_compile.testing import precision
from tests.ops.cases import LOSSES, eager_loss

pytest.importorskip("triton")
from liger_compile.kernels import scale as scale_kernels
from tests.helpers.kernels import assert_alike

V, H = 37, 16
MIB = 2**20


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of four tokens where memory allows no more."""
    monkeypatch.setattr(op, "LEAST_ROWS", 4)
    monkeypatch.setattr(op, "ROW_TILE", 4)


def tensors(tokens, dtype, device, classes=V, width=H, ignore_index=-100):
    x = torch.randn(tokens, width).to(device, dtype).requires_grad_()
    weight = torch.randn(classes, width).to(device, dtype).requires_grad_()
    bias = torch.randn(classes).to(device, dtype).requires_grad_()
    target = torch.randint(0, classes, (tokens,))
    target[1::4] = ignore_index
    return x, weight, bias, target.to(device)


def outcome(loss, leaves, retain_graph=None):
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(0)).to(loss)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream, retain_graph=retain_graph)


def ours(x, weight, bias, target, **arguments):
    return L.linear_cross_entropy(x, weight, target, bias, **arguments)


def eager(x, weight, bias, target, class_weight=None, **arguments):
    return eager_loss(F.linear(x, weight, bias), target, class_weight, **arguments)


def assert_no_worse(leaves, target, memory=None, class_weight=None, **arguments):
    found = outcome(ours(*leaves, target, memory=memory, class_weight=class_weight, **arguments), leaves)
    plain = outcome(eager(*leaves, target, class_weight, **arguments), leaves)
    doubles = precision.as_double(leaves)
    wide = None if class_weight is None else class_weight.double()
    with precision.in_double():
        exact = outcome(eager(*doubles, target, wide, **arguments), doubles)
    precision.assert_no_worse(found, plain, exact)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_few_chunks_are_no_worse_than_eager(device, small_chunks, name, dtype):
    arguments = LOSSES[name]
    *leaves, target = tensors(11, dtype, device, ignore_index=arguments.get("ignore_index", -100))
    class_weight = torch.rand(V, device=device) if name == "all" else None
    assert len(op.chunks_of(*leaves[:2], True, 1)) == 3
    assert_no_worse(leaves, target, 1, class_weight, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_chunks_are_no_worse_than_eager(device, small_chunks, dtype, reduction):
    """More than 16, and too wide for 16 longer ones: dweight is summed in float32."""
    *leaves, target = tensors(69, dtype, device, width=2)
    assert len(op.chunks_of(*leaves[:2], True, 1)) > op.ACCUMULATE_WIDE_ABOVE
    assert_no_worse(leaves, target, 1, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_vocabulary_in_parts_is_no_worse_than_eager(device, small_chunks, monkeypatch, dtype, reduction):
    monkeypatch.setattr(op, "class_parts", lambda classes, _: [slice(0, 32), slice(32, classes)])
    *leaves, target = tensors(11, dtype, device)
    target[0], target[2] = V - 1, 32
    assert_no_worse(leaves, target, 1, label_smoothing=0.1, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_padded_hidden_size_is_no_worse_than_eager(device, small_chunks, monkeypatch, dtype, reduction):
    monkeypatch.setattr(op, "missing_columns", lambda x: -x.shape[1] % 8)
    *leaves, target = tensors(11, dtype, device, width=13)
    assert_no_worse(leaves, target, 1, reduction=reduction)


@pytest.mark.parametrize(
    "classes, where, sizes", [(37, "cuda", [32, 5]), (40, "cuda", [40]), (7, "cuda", [7]), (37, "cpu", [37])]
)
def test_parts_of_a_vocabulary(classes, where, sizes):
    parts = alignment.class_parts(classes, torch.device(where))
    assert [part.stop - part.start for part in parts] == sizes
    assert (parts[0].start, parts[-1].stop) == (0, classes)


@pytest.mark.parametrize(
    "rows, most, tile, sizes",
    [(10, 4, 1, [3, 3, 4]), (0, 4, 1, []), (10, 4, 4, [4, 4, 2]), (7, 3, 4, [4, 3]), (8, 100, 4, [8])],
)
def test_rows_are_split_at_multiples(rows, most, tile, sizes):
    slices = blocks.split_rows(rows, most, tile)
    assert [part.stop - part.start for part in slices] == sizes
    assert all(part.start % tile == 0 for part in slices)


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_is_the_same_without_the_others(device, small_chunks, needs, reduction):
    *leaves, target = tensors(6, torch.float32, device)
    loss, *gradients = outcome(ours(*leaves, target, reduction=reduction, memory=1), leaves)
    inputs = [leaf.detach().requires_grad_(bool(need)) for leaf, need in zip(leaves, needs, strict=True)]
    wanted = [leaf for leaf in inputs if leaf.requires_grad]
    fewer = ours(*inputs, target, reduction=reduction, memory=1)
    assert_alike(fewer, loss)  # without a gradient the kernel is another
    if wanted:
        found = iter(outcome(fewer, wanted)[1:])
        expected = [gradient for gradient, need in zip(gradients, needs, strict=True) if need]
        assert_alike(list(found), expected)
    else:
        assert not fewer.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_of_a_retained_graph(device, reduction, dtype):
    *leaves, target = tensors(6, dtype, device)
    loss = ours(*leaves, target, reduction=reduction)
    first, second, third = (outcome(loss, leaves, retain_graph=keep) for keep in (True, True, False))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_tokens_ignored(device, reduction, dtype):
    *leaves, target = tensors(5, dtype, device)
    loss, *gradients = outcome(ours(*leaves, target.fill_(-100), reduction=reduction), leaves)
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_classes_that_a_bias_of_minus_infinity_rules_out(device, small_chunks, reduction, dtype):
    """As padding of a vocabulary is masked; and a target among them, whose loss is infinite and nothing else."""
    x, weight, bias, target = tensors(11, dtype, device)
    with torch.no_grad():
        bias[30:] = -torch.inf
    target[0], target[2] = 3, 33
    arguments = {"reduction": reduction, "memory": 1}
    found = outcome(ours(x, weight, bias, target, **arguments), (x, weight, bias))
    plain = outcome(eager(x, weight, bias, target, reduction=reduction), (x, weight, bias))
    assert (found[0].isinf() == plain[0].isinf()).all() and found[0].isinf().any()
    assert all(gradient.isfinite().all() for gradient in (*found[1:], *plain[1:]))
    target[target >= 30] = 3
    assert_no_worse((x, weight, bias), target, 1, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens(device, reduction):
    *leaves, target = tensors(0, torch.bfloat16, device)
    loss, *gradients = outcome(ours(*leaves, target, reduction=reduction), leaves)
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("tokens, classes, width", [(1, 1, 1), (1, 37, 3), (5, 1, 8), (3, 65, 1), (2, 64, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_shapes(device, tokens, classes, width, dtype):
    *leaves, target = tensors(tokens, dtype, device, classes, width)
    assert_no_worse(leaves, target)


def test_inputs_that_are_not_contiguous(device):
    *leaves, target = tensors(6, torch.float32, device)
    x, weight, bias = (leaf.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for leaf in leaves)
    assert not x.is_contiguous() and not weight.is_contiguous()
    found = outcome(ours(x, weight, bias, target), (x, weight, bias))
    torch.testing.assert_close(found, outcome(ours(*leaves, target), leaves))


def test_float16_sums_that_would_overflow_before_they_are_divided(device):
    tokens = 4096 if device == "cuda" else 128
    x = torch.full((tokens, 4), 60.0, device=device).half()
    weight = torch.zeros(8, 4, device=device).half().requires_grad_()
    L.linear_cross_entropy(x, weight, torch.zeros(tokens, dtype=torch.int64, device=device)).backward()
    assert weight.grad[0, 0] == -52.5


@pytest.mark.parametrize("tokens", [1, 40, pytest.param(129, marks=pytest.mark.slow)])
def test_float16_gradients_survive_until_the_loss_scale_multiplies_them(device, tokens):
    """Most classes are unlikely: their probability, divided by the number of tokens, is nothing in float16."""
    classes, loss_scale = 200, 2.0**16
    *leaves, target = tensors(tokens, torch.float16, device, classes)
    x, weight, bias = (0.05 * leaf.detach() for leaf in leaves)
    bias[20:] -= 6
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    target[0] = 3

    def scaled(loss, leaves):
        return torch.autograd.grad(loss * loss_scale, leaves)

    doubles = precision.as_double(leaves)
    with precision.in_double():
        exact = scaled(eager(*doubles, target), doubles)
    precision.assert_no_worse(
        scaled(ours(*leaves, target), leaves), scaled(eager(*leaves, target), leaves), exact
    )


def test_compiled(device):
    *leaves, target = tensors(6, torch.bfloat16, device)
    for reduction in ("mean", "none"):
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        found = outcome(compiled(*leaves, target, reduction=reduction), leaves)
        torch.testing.assert_close(found, outcome(ours(*leaves, target, reduction=reduction), leaves))


def test_opcheck(device, small_chunks):
    *leaves, target = tensors(6, torch.float32, device)
    x, weight, bias = leaves
    settings = (torch.rand(V, device=device), -100, "mean", 0.1, 2.0, 3.0, 1e-2)
    torch.library.opcheck(
        torch.ops.liger_compile.linear_cross_entropy.default,
        (x, weight, target, bias, *settings, True, True, True, 1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.3, float("nan")])
@pytest.mark.parametrize("numel", [1, 100, 20000])
def test_scale(device, dtype, factor, numel):
    gradient = torch.randn(numel).to(device, dtype)
    number = torch.tensor(factor, device=device)
    expected = (gradient.float() * number).to(dtype)
    out = torch.empty_like(gradient)
    scale_kernels.scale(gradient, number, out)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert scale_kernels.scale(gradient, number, gradient) is gradient
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


# What bench.ops is asked to keep to: tokens, width, classes, and the most that a chunk may take.
BUDGETS = [
    (8192, 4096, 128256, None, 600 * MIB),
    (16384, 4096, 32000, None, 600 * MIB),
    (8192, 2048, 128256, None, 600 * MIB),
    (8192, 1024, 151936, None, 600 * MIB),
    (8192, 3584, 152064, None, 600 * MIB),
    (2048, 1024, 50257, None, 600 * MIB),
    (8192, 768, 50257, None, 800 * MIB),  # in one chunk
    (8192, 768, 52000, None, 600 * MIB),
    (8192, 768, 50257, 600 * MIB, 600 * MIB),
    (8192, 4096, 128256, 128 * MIB, 150 * MIB),
    (8192, 2048, 128256, 128 * MIB, 150 * MIB),
]


@pytest.mark.parametrize("tokens, width, classes, memory, most", BUDGETS)
def test_chunks_are_as_large_as_they_may_be(tokens, width, classes, memory, most):
    x = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(classes, width, dtype=torch.bfloat16, device="meta")
    chunks = op.chunks_of(x, weight, True, memory or 0)
    assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
    assert chunks[0].start == 0 and chunks[-1].stop == tokens
    rows = [chunk.stop - chunk.start for chunk in chunks]
    assert all(count % op.ROW_TILE == 0 for count in rows[:-1]) and max(rows) - min(rows) <= op.ROW_TILE
    assert max(rows) * 2 * classes <= most and len(chunks) <= op.ACCUMULATE_WIDE_ABOVE
    assert len(chunks) == 1 or (max(rows) * 2 * classes > most / 2)
    assert (len(chunks) == 1) == (tokens * 2 * classes <= (memory or 800 * MIB))


@pytest.mark.parametrize("memory", [0, -1, 2.5, True, "1GiB"])
def test_a_budget_that_is_none_is_refused(memory):
    *leaves, target = tensors(2, torch.float32, "cpu")
    with pytest.raises(
        ValueError, match=r"expected memory as a whole number of bytes above 0, got .*; pass None"
    ):
        ours(*leaves, target, memory=memory)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, width, classes, memory, most", BUDGETS)
def test_peak_memory(tokens, width, classes, memory, most):
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(classes, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, classes, (tokens,), device="cuda")
    torch.mm(x[:128], weight[:128].t())  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    L.linear_cross_entropy(x, weight, target, memory=memory).backward()
    gradients = 2 * (x.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients <= most


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens, width, classes", [(700, 256, 50257), (1000, 320, 32000)])
@pytest.mark.parametrize("memory", [None, 30 * MIB])
def test_shapes_of_models(device, name, dtype, tokens, width, classes, memory):
    arguments = LOSSES[name]
    ignore_index = arguments.get("ignore_index", -100)
    *leaves, target = tensors(tokens, dtype, device, classes, width, ignore_index)
    leaves = [(leaf.detach() * width**-0.25).requires_grad_() for leaf in leaves]
    assert_no_worse(leaves, target, memory, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory", [None, 30 * MIB])
def test_a_width_that_is_no_power_of_two(device, dtype, memory):
    *leaves, target = tensors(301, dtype, device, 50257, 5120)
    leaves = [(leaf.detach() * 5120**-0.25).requires_grad_() for leaf in leaves]
    assert_no_worse(leaves, target, memory)


@pytest.mark.gpu
def test_many_chunks_of_a_gpu(device):
    *leaves, target = tensors(4096, torch.bfloat16, device, 1000, 64)
    assert len(op.chunks_of(*leaves[:2], True, 1)) > op.ACCUMULATE_WIDE_ABOVE
    assert_no_worse(leaves, target, 1)


NO_CLASS = """
import sys, torch
from liger_compile import functional as L
x, weight = torch.randn(6, 16, device="cuda"), torch.randn(37, 16, device="cuda")
target = torch.tensor([0, 36, -100, 5, int(sys.argv[2]), 1], device="cuda")
ignored = int(sys.argv[3])
if sys.argv[1] == "linear":
    loss = L.linear_cross_entropy(x, weight, target, ignore_index=ignored)
else:
    loss = L.cross_entropy(x @ weight.t(), target, ignore_index=ignored)
torch.cuda.synchronize()
print(loss.item())
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, wrong, ignored",
    [("linear", 37, -100), ("linear", -1, -100), ("logits", 10**12, -100), ("logits", 4, -1)],
)
def test_a_target_that_is_no_class_stops_the_device(name, wrong, ignored):
    """In a process of its own, which can do nothing with the device any more."""
    command = [sys.executable, "-c", NO_CLASS, name, str(wrong), str(ignored)]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode and "device-side assert triggered" in done.stderr, done.stdout
    assert "target >= 0 && target < n_classes" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_waits_for_the_gpu(device, small_chunks, reduction, dtype):
    *leaves, target = tensors(40, dtype, device)
    class_weight = torch.rand(V, device=device)
    upstream = torch.ones(40 if reduction == "none" else (), device=device)

    def step():
        loss = ours(
            *leaves, target, reduction=reduction, class_weight=class_weight, label_smoothing=0.1, memory=1
        )
        torch.autograd.grad(loss, leaves, upstream)
        logits = torch.ones(4, 8, device=device, requires_grad=True)
        torch.autograd.grad(L.cross_entropy(logits, target[:4].clamp(0, 7)), logits)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_cuda_graph_replays_it(device, reduction):
    *leaves, target = tensors(300, torch.bfloat16, device, 1000, 64)
    upstream = torch.rand(300 if reduction == "none" else (), device=device)

    def step():
        loss = ours(*leaves, target, reduction=reduction, memory=1)
        return loss, *torch.autograd.grad(loss, leaves, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            leaves[0].copy_(torch.randn(300, 64))
            target.copy_(torch.randint(0, 1000, (300,)))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_a_chunk_of_more_than_2_to_the_31_logits(device):
    tokens, classes = 16400, 131072
    x = torch.randn(tokens, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(classes, 64, device=device, dtype=torch.bfloat16)
    target = torch.randint(0, classes, (tokens,), device=device)
    loss = L.linear_cross_entropy(x, weight, target, reduction="sum", memory=8 * 2**30)
    dx = torch.autograd.grad(loss, x)[0]
    last = x.detach()[-256:].requires_grad_()
    rows = L.linear_cross_entropy(last, weight, target[-256:], reduction="sum")
    torch.testing.assert_close(dx[-256:], torch.autograd.grad(rows, last)[0], rtol=2e-2, atol=1e-2)
