"""The softmax-loss kernel against its reference, and both against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from liger_compile import functional as L
from liger_compile.ops.softmax_loss import ELSEWHERE, SoftmaxLoss
from liger_compile.testing import precision
from tests.helpers.pairwise import parametrize

pytest.importorskip("triton")
from liger_compile.kernels import softmax_loss as kernels
from tests.helpers.kernels import assert_alike

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = {"ignore_index": -100, "label_smoothing": 0.0, "logit_scale": 1.0, "softcap": None, "z_loss": 0.0}
OPTIONS = {
    "plain": {},
    "class_weight": {"class_weight": True},
    "ignored_class": {"ignore_index": 0},
    "ignored_number": {"ignore_index": 10**12},
    "smoothing": {"label_smoothing": 0.1},
    "only_smoothing": {"label_smoothing": 1.0},
    "scale": {"logit_scale": 0.7},
    "softcap": {"softcap": 5.0},
    "z_loss": {"z_loss": 1e-2},
    "smoothing_class_weight": {"label_smoothing": 0.1, "class_weight": True},
    "all": {
        "class_weight": True,
        "ignore_index": 0,
        "label_smoothing": 0.2,
        "logit_scale": 2.0,
        "softcap": 3.0,
        "z_loss": 1e-2,
    },
}


@pytest.fixture(params=["default", "small"])
def blocks(request, monkeypatch):
    """As they are, and so small that every row takes several."""
    if request.param == "small":
        monkeypatch.setattr(
            kernels, "config", lambda classes, itemsize, _: kernels.Config(2, 1, 2 * itemsize, 16 // itemsize)
        )


def head_of(options, classes, device):
    settings = {**PLAIN, **options}
    has_weight = settings.pop("class_weight", False)
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(1)) + 0.1 if has_weight else None
    return SoftmaxLoss(None if weight is None else weight.to(device), **settings)


def reference(head, logits, target, upstream):
    """Losses and gradient, the latter rounded to the dtype of the logits."""
    z = head.scores(logits)
    logp = torch.log_softmax(z, -1)
    row_max, log_sum = head.statistics(z, logp)
    lse = row_max + log_sum
    losses = head.losses(logp, lse, target)
    return losses, head.gradient_(logp, logits, lse, target, upstream.to(z.dtype)).to(logits.dtype)


def fused(head, logits, target, upstream):
    """In place, in a copy."""
    logits = logits.clone()
    return kernels.losses(logits, target, head.terms, upstream), logits


def apart(head, logits, target, upstream):
    """As cross_entropy has it: statistics in forward, the gradient from them."""
    losses, *statistics = kernels.losses_and_statistics(logits, target, head.terms)
    return losses, kernels.gradient(logits, target, head.terms, upstream, *statistics)


both = pytest.mark.parametrize("ours", [fused, apart])


def rows_of(dtype, rows, classes, device, ignore_index=-100):
    logits = (3 * torch.randn(rows, classes)).to(device, dtype)
    target = torch.randint(0, classes, (rows,))
    target[1::4] = ignore_index
    upstream = torch.randn(rows)
    return logits, target.to(device), upstream.to(device)


def assert_right(ours, head, logits, target, upstream):
    exact_head = SoftmaxLoss(
        None if head.class_weight is None else head.class_weight.double(), *head.terms[1:]
    )
    exact = reference(exact_head, logits.double(), target, upstream)
    precision.assert_no_worse(
        ours(head, logits, target, upstream), reference(head, logits, target, upstream), exact
    )


@parametrize(
    name=[*OPTIONS], dtype=DTYPES, ours=[fused, apart], blocks=["default", "small"], indirect=["blocks"]
)
def test_no_worse_than_the_reference(device, blocks, ours, name, dtype):
    head = head_of(OPTIONS[name], 101, device)
    assert_right(ours, head, *rows_of(dtype, 6, 101, device, head.ignore_index))


@both
@pytest.mark.parametrize("rows, classes", [(1, 1), (5, 1), (1, 2), (0, 37), (7, 64), (3, 1000), (2, 50257)])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_shapes(device, ours, rows, classes, name):
    head = head_of(OPTIONS[name], classes, device)
    assert_right(ours, head, *rows_of(torch.bfloat16, rows, classes, device, head.ignore_index))


@pytest.mark.gpu
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [127, 4096, 32000, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_shapes_of_models(device, ours, dtype, classes, name):
    head = head_of(OPTIONS[name], classes, device)
    assert_right(ours, head, *rows_of(dtype, 300, classes, device, head.ignore_index))


@both
@pytest.mark.parametrize("name", ["plain", "smoothing", "smoothing_class_weight", "softcap", "z_loss"])
def test_infinite_logits_are_what_they_are_in_the_reference(device, blocks, ours, name):
    logits = torch.randn(8, 101)
    logits[0, 3:70] = -torch.inf  # some blocks of nothing else, the first among them
    logits[0, :3] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 4] = torch.inf
    logits[3, 7] = torch.nan
    logits[4, 4] = -torch.inf  # the target's own
    logits[5, 50:] = -torch.inf
    logits[6, :100] = -torch.inf  # all but the target's: certain
    logits[7] = 0.0
    target, upstream = torch.tensor([90, 2, 3, 4, 4, 5, 100, -100]), torch.rand(8)
    head = head_of(OPTIONS[name], 101, device)
    arguments = [each.to(device) for each in (logits, target, upstream)]
    torch.testing.assert_close(ours(head, *arguments), reference(head, *arguments), equal_nan=True)


@both
@pytest.mark.parametrize("name", ["plain", "smoothing_class_weight"])
@pytest.mark.parametrize("wrong", [101, -1, -99, 2**31 + 5, 2**40])
def test_a_target_that_is_no_class_makes_its_row_nan_and_no_other(device, ours, name, wrong):
    head = head_of(OPTIONS[name], 101, device)
    logits, target, upstream = rows_of(torch.float32, 4, 101, device)
    losses, dlogits = reference(head, logits, target, upstream)
    target[2] = wrong
    losses[2] = dlogits[2] = torch.nan
    torch.testing.assert_close(ours(head, logits, target, upstream), (losses, dlogits), equal_nan=True)


@parametrize(
    name=["plain", "softcap", "scale"],
    dtype=DTYPES,
    parts=[(64, 37), (100, 1)],
    blocks=["default", "small"],
    indirect=["blocks"],
)
def test_the_gradient_of_a_shard_is_its_columns_of_the_gradient_of_all(device, blocks, name, dtype, parts):
    """Given the statistics of all classes; the label of most rows is in another shard."""
    head = head_of(OPTIONS[name], sum(parts), device)
    logits, target, upstream = rows_of(dtype, 8, sum(parts), device)
    _, row_max, log_sum = kernels.losses_and_statistics(logits, target, head.terms)
    whole = kernels.gradient(logits, target, head.terms, upstream, row_max, log_sum)
    found, first = [], 0
    for columns in parts:
        labels = torch.where(target < 0, target, target - first)
        labels = labels.masked_fill((target >= 0) & ((labels < 0) | (labels >= columns)), ELSEWHERE)
        buffer = torch.zeros(len(logits), 128, dtype=dtype, device=device)
        part = buffer[:, :columns].copy_(logits[:, first : first + columns])
        kernels.gradient_of_shard_(part, labels, head.terms, upstream, row_max, log_sum)
        found.append(part)
        first += columns
    assert_alike(torch.cat(found, 1), whole)


def test_targets_that_are_classes_or_ignored_pass(device):
    kernels.assert_classes(torch.tensor([0, 100, 7, 0] * 600, device=device), 101, 7)
    kernels.assert_classes(torch.tensor([10**12, 5], device=device), 101, 10**12)
    kernels.assert_classes(torch.zeros(0, dtype=torch.int64, device=device), 101, -100)


ASSERTS = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from liger_compile.kernels.softmax_loss import _assert_classes_kernel as kernel
signature = dict.fromkeys(kernel.arg_names, "i32") | {"target_ptr": "*i64", "BLOCK": "constexpr"}
source = ASTSource(kernel, signature=signature, constexprs={(kernel.arg_names.index("BLOCK"),): 1024})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"debug": kernel.debug})
assert "__assertfail" in compiled.asm["ptx"]
"""


def test_the_assertion_is_compiled_without_any_setting():
    """Triton leaves assertions out where nothing asks for them. The interpreter does so always."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment["PYTHONPATH"] = ":".join(sys.path)
    done = subprocess.run([sys.executable, "-c", ASSERTS], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr


@both
def test_ignored_rows_are_zero_whatever_they_hold(device, ours):
    head = head_of(OPTIONS["all"], 101, device)
    logits = torch.full((3, 101), torch.nan, device=device)
    target = torch.zeros(3, dtype=torch.int64, device=device)
    upstream = torch.full((3,), torch.inf, device=device)
    losses, dlogits = ours(head, logits, target, upstream)
    assert (losses == 0).all() and (dlogits == 0).all()


@parametrize(ours=[fused, apart], scale=[1e2, 1e4], name=["plain", "smoothing_class_weight"], shift=[0, 1e5])
def test_large_logits(device, blocks, ours, scale, name, shift):
    logits, target, upstream = rows_of(torch.float32, 6, 101, device)
    assert_right(ours, head_of(OPTIONS[name], 101, device), logits * scale + shift, target, upstream)


@both
def test_a_certain_token_keeps_its_gradient(device, ours):
    """p - 1 is computed in float32 and rounded once: 1e-6, where the difference of rounded ones is 0."""
    logits = torch.zeros(2, 37, dtype=torch.bfloat16, device=device)
    logits[:, 5] = 18.0
    target = torch.full((2,), 5, device=device)
    assert_right(ours, head_of({}, 37, device), logits, target, torch.ones(2, device=device))


@both
def test_the_derivative_of_a_softcap_that_is_reached(device, ours):
    """1 - tanh^2 of a tanh in float32 has no digits left here, and the derivative still 1e-7 of them."""
    head = head_of({"softcap": 2.0}, 37, device)
    logits = torch.linspace(-18, 18, 37, device=device).repeat(2, 1)
    target = torch.tensor([0, 36], device=device)
    assert_right(ours, head, logits, target, torch.ones(2, device=device))
    exact = reference(head, logits.double(), target, torch.ones(2, device=device))[1]
    found = ours(head, logits, target, torch.ones(2, device=device))[1]
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


def test_padding_between_rows_is_not_read_and_no_row_is_written_beyond_it(device, blocks):
    head = head_of(OPTIONS["all"], 37, device)
    logits, target, upstream = rows_of(torch.bfloat16, 6, 37, device, head.ignore_index)
    buffer = torch.full((8, 64), torch.nan, dtype=torch.bfloat16, device=device)
    view = buffer[1:7, :37]
    view.copy_(logits)
    losses = kernels.losses(view, target, head.terms, upstream)
    assert_alike(losses, kernels.losses(logits.clone(), target, head.terms, None))
    assert_alike(view, fused(head, logits, target, upstream)[1])
    assert buffer[[0, 7]].isnan().all()


def test_without_a_gradient_the_logits_stay(device):
    logits, target, _ = rows_of(torch.bfloat16, 6, 37, device)
    before = logits.clone()
    kernels.losses(logits, target, head_of({}, 37, device).terms, None)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "strided",
    [
        lambda logits: logits[:, :-1, 2:],
        lambda logits: logits.transpose(1, 2),
        lambda logits: logits[:1, :1].expand(2, 4, 5),
    ],
    ids=["sliced", "transposed", "expanded"],
)
def test_layouts(device, reduction, strided):
    """The op on logits that are not contiguous, with targets that are not, is the op on copies that are."""
    leaf = torch.randn(2, 5, 5, device=device, requires_grad=True)
    logits = strided(leaf)
    target = torch.randint(0, logits.shape[-1], logits.shape[1::-1], device=device).t()
    upstream = torch.randn(target.shape if reduction == "none" else (), device=device)
    copies = logits.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    results = []
    for rows, labels in ((logits, target), (copies, target.contiguous())):
        loss = L.cross_entropy(rows, labels, reduction=reduction, label_smoothing=0.1)
        results.append((loss, *torch.autograd.grad(loss, rows, upstream)))
    assert_alike(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [131072, 131080])
def test_more_than_2_to_the_31_logits(device, stride):
    rows = 16400
    logits = torch.empty(rows, stride, dtype=torch.bfloat16, device=device)[:, :131072].normal_()
    target = torch.randint(0, 131072, (rows,), device=device)
    upstream, head = torch.rand(rows, device=device), head_of({}, 131072, device)
    assert logits.numel() > 2**31
    last = slice(rows - 8, rows)
    expected = apart(head, logits[last], target[last], upstream[last])
    losses, dlogits = apart(head, logits, target, upstream)
    assert torch.equal(losses[last], expected[0]) and torch.equal(dlogits[last], expected[1])
    del dlogits
    expected = fused(head, logits[last], target[last], upstream[last])
    losses = kernels.losses(logits, target, head.terms, upstream)
    assert torch.equal(losses[last], expected[0]) and torch.equal(logits[last], expected[1])


@pytest.mark.parametrize("is_lean", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("classes", [1, 2, 37, 1000, 4096, 32000, 50257, 128256, 151936, 262144, 2**21])
def test_configs(classes, itemsize, is_lean):
    programs, num_warps, lanes, vector = kernels.config(classes, itemsize, is_lean)
    assert programs == 1 or programs * classes * itemsize <= kernels.ROWS_IN_L2
    assert programs * num_warps <= kernels.WARPS_PER_MULTIPROCESSOR and num_warps in (1, 2, 4, 8, 16, 32)
    assert lanes & (lanes - 1) == 0 and vector * itemsize == kernels.VECTOR_BYTES
    assert lanes * vector < 2 * classes + 2 * vector
