"""linear_divergence with its kernels, and its reference, over several chunks."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from liger_compile import functional as L
from liger_compile.ops import dispatch
from liger_compile.ops import linear_cross_entropy as chunks
from liger_compile.testing import precision
from tests.helpers.pairwise import parametrize

pytest.importorskip("triton")
from liger_compile.kernels import divergence as kernels
from liger_compile.kernels import launch

V, H, TEACHERS = 37, 16, 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = (
    {},
    {"logit_scale": 0.5},
    {"logit_scale": 0.7, "softcap": 2.0, "teacher_scale": 1.5, "teacher_softcap": 3.0},
)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "LEAST_ROWS", 4)
    monkeypatch.setattr(chunks, "ROW_TILE", 4)


def tensors(rows, dtype, device, teachers=None, width=H):
    def randn(*shape, kind=dtype):
        return torch.randn(shape, generator=generator).to(device, kind)

    generator, teachers = torch.Generator().manual_seed(5), teachers or dtype
    student = [
        randn(rows, width).requires_grad_(),
        randn(V, width).requires_grad_(),
        randn(V).requires_grad_(),
    ]
    return student, [
        randn(rows, TEACHERS, kind=teachers),
        randn(V, TEACHERS, kind=teachers),
        randn(V, kind=teachers),
    ]


def eager(
    student, teacher, kind, beta=0.5, logit_scale=1.0, softcap=None, teacher_scale=None, teacher_softcap=None
):
    def log_softmax(x, weight, bias, scale, cap):
        z = F.linear(x, weight, bias).float() * scale
        return (cap * torch.tanh(z / cap) if cap else z).log_softmax(-1)

    s = log_softmax(*student, logit_scale, softcap)
    t = log_softmax(*teacher, logit_scale if teacher_scale is None else teacher_scale, teacher_softcap)

    def kl(log_p, log_q):
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    if kind == "jensen_shannon":
        m = torch.stack([s + math.log1p(-beta), t + math.log(beta)]).logsumexp(0)
        return beta * kl(t, m) + (1 - beta) * kl(s, m)
    return {"forward": lambda: kl(t, s), "reverse": lambda: kl(s, t), "cross": lambda: (t.exp() * s).sum(-1)}[
        kind
    ]()


def ours(student, teacher, kind, **arguments):
    (x, weight, bias), (teacher_x, teacher_weight, teacher_bias) = student, teacher
    return L.linear_divergence(
        x, weight, teacher_x, teacher_weight, bias, teacher_bias, kind=kind, **arguments
    )


def outcome(value, student):
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    return value.detach(), *torch.autograd.grad(
        value, [leaf for leaf in student if leaf.requires_grad], upstream
    )


def assert_no_worse(student, teacher, kind, **arguments):
    found = outcome(ours(student, teacher, kind, memory=1, **arguments), student)
    plain = outcome(eager(student, teacher, kind, **arguments), student)
    doubles = precision.as_double(student)
    with precision.in_double():
        exact = outcome(eager(doubles, precision.as_double(teacher), kind, **arguments), doubles)
    precision.assert_no_worse(found, plain, exact)


@parametrize(
    kind=["forward", "reverse", "jensen_shannon", "cross"],
    dtype=DTYPES,
    teachers=[torch.float32, torch.bfloat16],
    form=FORMS,
    beta=[0.5, 0.1],
    has_kernel=[True, False],
)
def test_each_divergence_is_no_worse_than_eager(
    device, small_chunks, monkeypatch, kind, dtype, teachers, form, beta, has_kernel
):
    if not has_kernel:
        if device == "cuda":
            monkeypatch.setattr(dispatch, "DTYPES", ())
        monkeypatch.setattr(dispatch, "INTERPRET", False)
    student, teacher = tensors(11, dtype, device, teachers)
    with patch.object(kernels, "launch", wraps=launch) as launched:
        assert_no_worse(student, teacher, kind, beta=beta, **form)
    assert launched.called == has_kernel


@pytest.mark.parametrize("frozen", [(0,), (1, 2)], ids=str)
def test_a_frozen_head_or_input_of_the_student(device, frozen):
    student, teacher = tensors(6, torch.float32, device)
    student = [leaf.detach().requires_grad_(at not in frozen) for at, leaf in enumerate(student)]
    assert_no_worse(student, teacher, "forward")


def test_a_student_that_equals_its_teacher_has_no_divergence(device):
    (x, weight, bias), _ = tensors(6, torch.float32, device)
    teacher = [tensor.detach() for tensor in (x, weight, bias)]
    for kind in ("forward", "reverse", "jensen_shannon"):
        value, *gradients = outcome(ours((x, weight, bias), teacher, kind), (x, weight, bias))
        assert value.abs().max() < 1e-6 and all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_odd_sizes(device, small_chunks, monkeypatch):
    monkeypatch.setattr(chunks, "class_parts", lambda classes, _: [slice(0, 32), slice(32, classes)])
    monkeypatch.setattr(chunks, "missing_columns", lambda x: -x.shape[1] % 8)
    student, teacher = tensors(11, torch.bfloat16, device, width=13)
    assert_no_worse(student, teacher, "reverse")


def test_compiled_and_checked_by_torch(device):
    student, teacher = tensors(6, torch.float32, device)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for kind in ("forward", "jensen_shannon"):
        found = outcome(compiled(student, teacher, kind), student)
        torch.testing.assert_close(found, outcome(ours(student, teacher, kind), student))
    torch.library.opcheck(
        torch.ops.liger_compile.linear_softmax.default,
        (*student, *teacher, None, "entropy", 0, 0.5, 3.0, "jensen_shannon", 0.3, 1.0, None, 1),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"kind": "hellinger"},
            "expected kind to be one of forward, reverse, jensen_shannon, cross, got 'hellinger'",
        ),
        ({"beta": 1.0}, "expected beta above 0 and below 1, got 1.0"),
        ({"softcap": 0.0}, "expected softcap above 0, got 0.0"),
        ({"teacher_x": torch.zeros(5, TEACHERS)}, "expected teacher_x with the leading dimensions of x"),
        (
            {"teacher_weight": torch.zeros(38, TEACHERS)},
            "expected heads of one vocabulary, got 37 and 38 classes",
        ),
        (
            {"teacher_weight": torch.zeros(V, TEACHERS, requires_grad=True)},
            "expected a teacher that needs no gradient",
        ),
        ({"memory": 0}, "expected memory as a whole number of bytes above 0"),
    ],
)
def test_what_is_refused(change, message):
    (x, weight, _), (teacher_x, teacher_weight, _) = tensors(6, torch.float32, "cpu")
    arguments = {"x": x, "weight": weight, "teacher_x": teacher_x, "teacher_weight": teacher_weight, **change}
    with pytest.raises(ValueError, match=message):
        L.linear_divergence(**arguments)
