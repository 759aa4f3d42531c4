"""linear_softmax with its kernels, and its reference: any set of questions, over several chunks."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from liger_compile.ops import dispatch
from liger_compile.ops import linear_cross_entropy as chunks
from liger_compile.ops import linear_softmax as op
from liger_compile.testing import precision
from tests.helpers.pairwise import parametrize
from tests.helpers.softmax_questions import (
    DIFFERENTIABLE,
    FORMS,
    QUESTIONS,
    SETS,
    eager,
    ours,
    outcome,
    tensors,
)

pytest.importorskip("triton")
from liger_compile.kernels import launch
from liger_compile.kernels import softmax_questions as kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "LEAST_ROWS", 4)
    monkeypatch.setattr(chunks, "ROW_TILE", 4)


def assert_no_worse(leaves, index, questions, top=0, keeps="", **form):
    found = outcome(ours(*leaves, index, questions, top, memory=1, keeps=keeps, **form), leaves)
    plain = outcome(eager(*leaves, index, questions, top, **form), leaves)
    doubles = precision.as_double(leaves)
    with precision.in_double():
        exact = outcome(eager(*doubles, index, questions, top, **form), doubles)
    precision.assert_no_worse(found, plain, exact)


@parametrize(questions=SETS, dtype=DTYPES, form=FORMS, columns=[1, 3], top=[0, 2], has_kernel=[True, False])
def test_any_questions_are_no_worse_than_eager(
    device, small_chunks, monkeypatch, questions, dtype, form, columns, top, has_kernel
):
    if not has_kernel:
        if device == "cuda":
            monkeypatch.setattr(dispatch, "DTYPES", ())
        monkeypatch.setattr(dispatch, "INTERPRET", False)
    *leaves, index = tensors(11, dtype, device, columns=columns)
    with patch.object(kernels, "launch", wraps=launch) as launched:
        assert_no_worse(leaves, index, questions, top, **form)
    assert launched.called == has_kernel


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_are_kept_give_the_same_gradients(device, small_chunks, monkeypatch, dtype, has_kernel):
    monkeypatch.setattr(dispatch, "INTERPRET", has_kernel and device == "cpu")
    *leaves, index = tensors(11, dtype, device, columns=3)
    for form in FORMS:
        again, kept = (
            outcome(ours(*leaves, index, QUESTIONS, 2, memory=1, keeps=keeps, **form), leaves)
            for keeps in ("", "logits")
        )
        torch.testing.assert_close(kept, again, rtol=0, atol=0)


@parametrize(
    question=DIFFERENTIABLE, dtype=[torch.float32, torch.bfloat16], form=FORMS, has_kernel=[True, False]
)
def test_the_gradient_of_one_answer_is_kept_for_a_frozen_head(
    device, small_chunks, monkeypatch, question, dtype, form, has_kernel
):
    if not has_kernel:
        if device == "cuda":
            monkeypatch.setattr(dispatch, "DTYPES", ())
        monkeypatch.setattr(dispatch, "INTERPRET", False)
    x, weight, bias, index = tensors(11, dtype, device)
    leaves = x, weight.detach(), bias.detach()
    assert_no_worse(leaves, index, (question,), keeps=question, **form)
    made = ours(*leaves, index, (question, "argmax"), keeps=question, **form)[question]
    with patch.object(op, "gradients_by_chunk") as again:
        for incoming in (0.0, 2.0):
            torch.autograd.grad(made, x, torch.full_like(made, incoming), retain_graph=True)
    assert not again.called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_odd_vocabulary_and_hidden_size(device, small_chunks, monkeypatch, dtype):
    monkeypatch.setattr(chunks, "class_parts", lambda classes, _: [slice(0, 32), slice(32, classes)])
    monkeypatch.setattr(chunks, "missing_columns", lambda x: -x.shape[1] % 8)
    *leaves, index = tensors(11, dtype, device, width=13)
    index[0], index[1] = 36, 32
    assert_no_worse(leaves, index, ("log_probabilities", "entropy"))


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 2), (1, 2)], ids=str)
def test_a_frozen_head_or_input(device, frozen):
    *leaves, index = tensors(6, torch.float32, device)
    leaves = [leaf.detach().requires_grad_(at not in frozen) for at, leaf in enumerate(leaves)]
    assert_no_worse(leaves, index, ("log_probabilities", "entropy"))


@pytest.mark.parametrize("has_kernel", [True, False])
def test_one_column_several_times(device, monkeypatch, has_kernel):
    monkeypatch.setattr(dispatch, "INTERPRET", has_kernel and device == "cpu")
    *leaves, index = tensors(6, torch.bfloat16, device, columns=4)
    index[:, 2] = index[:, 0]
    assert_no_worse(leaves, index, ("log_probabilities", "scores"))


@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_class_that_a_bias_of_minus_infinity_rules_out(device, monkeypatch, has_kernel):
    monkeypatch.setattr(dispatch, "INTERPRET", has_kernel and device == "cpu")
    x, weight, bias, index = tensors(6, torch.float32, device)
    with torch.no_grad():
        bias[30:] = -torch.inf
    index.clamp_(max=29)
    assert_no_worse((x, weight, bias), index, ("log_probabilities", "logsumexp", "collision", "argmax"))


def test_a_probability_of_almost_one_keeps_the_digits_of_its_gradient(device):
    x, weight, _, index = tensors(6, torch.bfloat16, device, has_bias=False)
    with torch.no_grad():
        x[:] = weight[index[:, 0]]
    assert_no_worse((x, weight, None), index, ("log_probabilities",))


def test_no_rows(device):
    *leaves, index = tensors(0, torch.bfloat16, device)
    _, gradients = outcome(ours(*leaves, index, ("log_probabilities", "entropy", "argmax"), 2), leaves)
    assert all((gradient == 0).all() for gradient in gradients)


def test_equal_scores_have_the_first_column(device):
    x, weight = torch.ones(3, 8, device=device), torch.ones(37, 8, device=device)
    for form in ({}, {"softcap": 2.0}):
        found = ours(x, weight, None, None, ("argmax", "logsumexp"), **form)
        assert (found["argmax"] == 0).all()


def test_compiled_and_checked_by_torch(device):
    *leaves, index = tensors(6, torch.float32, device)
    asked = ("log_probabilities", "entropy", "argmax")

    def function(x, weight, bias, index):
        return ours(x, weight, bias, index, asked, 2)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        outcome(compiled(*leaves, index), leaves), outcome(function(*leaves, index), leaves)
    )
    torch.library.opcheck(
        torch.ops.liger_compile.linear_softmax.default,
        (*leaves, None, None, None, index, ",".join(asked), 2, 0.5, 3.0, "", 0.5, 1.0, None, 1),
    )


def test_a_second_derivative_is_an_error(device):
    *leaves, index = tensors(6, torch.float32, device)
    found = ours(*leaves, index, ("entropy",))["entropy"].sum()
    (gradient,) = torch.autograd.grad(found, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        gradient.sum().backward()
