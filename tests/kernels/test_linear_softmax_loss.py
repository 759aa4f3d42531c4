"""linear_softmax_loss with its kernels, and its reference: losses over several chunks, and their gradients."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch

from liger_compile.ops import dispatch, linear_softmax_loss, row_program
from liger_compile.ops import linear_cross_entropy as chunks
from liger_compile.ops.alignment import class_parts
from liger_compile.ops.linear_softmax import TeacherOf
from liger_compile.testing import precision
from tests.helpers.pairwise import parametrize
from tests.helpers.row_programs import program_of
from tests.helpers.softmax_questions import FORMS, eager, tensors

pytest.importorskip("triton")

ROWS = 11
ASKED = ("log_probabilities", "entropy", "logsumexp")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for name, size in {"LEAST_ROWS": 4, "ROW_TILE": 4, "ROWS_A_BYTE": 1}.items():
        monkeypatch.setattr(chunks, name, size)


@pytest.fixture(params=["kernel", "reference"])
def way(request, device, monkeypatch):
    if request.param == "reference":
        if device == "cuda":
            monkeypatch.setattr(dispatch, "DTYPES", ())
        monkeypatch.setattr(dispatch, "INTERPRET", False)
    return request.param


def policy(answers, old, advantages):
    ratio = (answers["log_probabilities"].squeeze(-1) - old).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return loss.sum() / 7 - 0.1 * answers["entropy"].mean() + 1e-2 * answers["logsumexp"].square().mean()


def of_no_row_alone(answers, old, advantages):
    logp = answers["log_probabilities"].squeeze(-1)
    return ((logp - logp.mean()) * advantages).exp().sum() + answers["entropy"].sum() ** 2


def operands(device, rows=ROWS):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, generator=generator).to(device) * 0.3 - at for at in (3, 0)]


def program_for(loss, others, asked=ASKED, top=0, rows=ROWS):
    made = {name: torch.empty((rows, 1) if name == "log_probabilities" else rows) for name in asked}
    if top:
        made |= {"top": torch.empty(rows, top), "top_columns": torch.empty(rows, top, dtype=torch.int64)}
    return program_of(
        loss, made, [other.detach().cpu().requires_grad_(other.requires_grad) for other in others]
    )


def ours(x, weight, bias, index, loss, others, memory=1, **form):
    program = program_for(loss, others, rows=len(x))
    return linear_softmax_loss.loss_of_answers(
        x, weight, bias, set(ASKED), program, others, lead=[len(x)], index=index, memory=memory, **form
    )


def gradients(loss, leaves, incoming=1.0):
    leaves = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, leaves, torch.full_like(loss, incoming))


def assert_no_worse(leaves, index, others, loss=policy, incoming=1.0, **form):
    of_others = [other for other in others if other.requires_grad]
    _, found = ours(*leaves, index, loss, others, **form)
    found = gradients(found, (*leaves, *of_others), incoming)

    def plain(leaves, others):
        answers = eager(*leaves, index, ASKED, **form)
        return gradients(loss(answers, *others), (*leaves, *(o for o in others if o.requires_grad)), incoming)

    doubles = precision.as_double((*leaves, *others))
    with precision.in_double():
        exact = plain(doubles[:3], doubles[3:])
    precision.assert_no_worse(found, plain(leaves, others), exact)


@parametrize(dtype=[torch.float32, torch.bfloat16], form=FORMS, incoming=[1.0, -2.5], learns=[False, True])
def test_a_loss_is_no_worse_than_eager(device, way, dtype, form, incoming, learns):
    *leaves, index = tensors(ROWS, dtype, device)
    others = operands(device)
    others[1].requires_grad_(learns)
    assert_no_worse(leaves, index, others, incoming=incoming, **form)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_a_frozen_head_or_input(device, frozen):
    *leaves, index = tensors(ROWS, torch.float32, device)
    leaves = [leaf.detach().requires_grad_(at not in frozen) for at, leaf in enumerate(leaves)]
    assert_no_worse(leaves, index, operands(device))


def test_an_odd_vocabulary_and_hidden_size(device, way, monkeypatch):
    monkeypatch.setattr(chunks, "class_parts", lambda classes, _: [slice(0, 32), slice(32, classes)])
    monkeypatch.setattr(chunks, "missing_columns", lambda x: -x.shape[1] % 8)
    *leaves, index = tensors(ROWS, torch.bfloat16, device, width=13)
    assert_no_worse(leaves, index, operands(device))


def test_three_matmuls_and_two_for_a_frozen_head(device):
    *leaves, index = tensors(ROWS, torch.float32, device)
    for head_learns, products in ((True, 1), (False, 0)):
        leaves = [leaves[0], *(leaf.detach().requires_grad_(head_learns) for leaf in leaves[1:])]
        with patch.object(chunks.Plain, "add", autospec=True, side_effect=chunks.Plain.add) as added:
            _, loss = ours(*leaves, index, policy, operands(device))
            in_forward = added.call_count
            gradients(loss, leaves)
        parts = len(class_parts(len(leaves[1]), leaves[1].device))  # a GPU takes few unaligned classes apart
        assert added.call_count == in_forward == 3 * (1 + products) * parts  # of three chunks


def test_a_program_that_needs_other_rows_is_right_too(device, way):
    """Sizes may decide at run time whether rows are needed."""
    *leaves, index = tensors(ROWS, torch.float32, device)
    others = operands(device)
    forms = row_program.forms_of([torch.empty(ROWS, 1), torch.empty(ROWS), torch.empty(ROWS)])
    program = program_for(of_no_row_alone, others)
    assert row_program.why_not_by_rows(program, forms, row_program.forms_of(others), (ROWS, 37))
    assert_no_worse(leaves, index, others, of_no_row_alone)


@pytest.mark.parametrize("incoming", [math.inf, -math.inf, math.nan, 0.0])
def test_an_incoming_gradient_reaches_the_rows_that_count(device, incoming):
    *leaves, index = tensors(ROWS, torch.float32, device)

    def masked(answers, old, advantages):
        return (answers["log_probabilities"].squeeze(-1).masked_fill(advantages > 0, 0) * old).sum()

    old, advantages = operands(device)
    for counts in ((advantages > 0), torch.ones_like(advantages, dtype=torch.bool)):
        kept = torch.where(counts, 1.0, -1.0)
        _, loss = ours(*leaves, index, masked, [old, kept])
        _, found = gradients(loss, leaves, incoming)
        _, expected = gradients(masked(eager(*leaves, index, ASKED), old, kept), leaves, incoming)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
            torch.testing.assert_close(a[b.isfinite()], b[b.isfinite()], rtol=1e-4, atol=1e-5)


def test_the_loss_twice_and_its_answers_too(device):
    """The answers may have gradients of their own; and a graph that is retained gives the same gradients again."""
    *leaves, index = tensors(ROWS, torch.float32, device)
    others = operands(device)

    def both(answers, loss):
        return (loss * loss + 3 * loss).sum() + answers["entropy"].square().sum()

    answers, loss = ours(*leaves, index, policy, others)
    found = both(answers._asdict(), loss)
    twice = [torch.autograd.grad(found, leaves, retain_graph=True) for _ in range(2)]
    torch.testing.assert_close(twice[0], twice[1], rtol=0, atol=0)
    plain = eager(*leaves, index, ASKED)
    expected = torch.autograd.grad(both(plain, policy(plain, *others)), leaves)
    torch.testing.assert_close(twice[0], expected, rtol=1e-4, atol=1e-5)


def test_a_divergence_beside_a_question_and_the_largest_scores(device, way):
    x, weight, bias, index = tensors(ROWS, torch.float32, device)
    teacher_x, teacher_weight, _, _ = tensors(ROWS, torch.float32, device, width=5)
    teacher = TeacherOf(teacher_x.detach(), teacher_weight.detach(), None, "forward")
    asked = "log_probabilities", "divergence"

    def loss_of(answers):
        logp = answers["log_probabilities"].squeeze(-1)
        return (
            (answers["divergence"] * logp.detach()).sum()
            - logp.mean()
            + answers["top"].log_softmax(-1).exp()[:, 0].sum()
        )

    program = program_for(loss_of, (), asked, top=3)
    _, loss = linear_softmax_loss.loss_of_answers(
        x,
        weight,
        bias,
        {"log_probabilities"},
        program,
        (),
        lead=[ROWS],
        index=index,
        top=3,
        teacher=teacher,
        memory=1,
    )
    answers = eager(x, weight, bias, index, ("log_probabilities",), top=3)
    student = torch.nn.functional.linear(x, weight, bias).log_softmax(-1)
    target = (teacher.x @ teacher.weight.t()).log_softmax(-1)
    answers["divergence"] = (target.exp() * (target - student)).sum(-1)
    expected = gradients(loss_of(answers), (x, weight, bias))
    torch.testing.assert_close(gradients(loss, (x, weight, bias)), expected, rtol=1e-4, atol=1e-5)


def test_an_incoming_nan_reaches_rows_that_are_multiplied_by_0_and_not_rows_that_are_left_out(device, way):
    *leaves, index = tensors(ROWS, torch.float32, device)
    row, others = torch.arange(ROWS, device=device), operands(device)
    others = [others[0], others[1].requires_grad_(), (row % 3 > 0).float(), row % 5 > 0]

    def loss_of(answers, old, advantages, factor, is_in):
        of_rows = (answers["log_probabilities"].squeeze(-1) - old) * advantages * factor
        return torch.where(is_in, of_rows, 0.0).sum()

    _, loss = ours(*leaves, index, loss_of, others)
    found = torch.autograd.grad(loss, (leaves[0], others[1]), torch.full_like(loss, float("nan")))
    answers = eager(*leaves, index, ASKED)
    expected = loss_of(answers, *others)
    expected = torch.autograd.grad(expected, (leaves[0], others[1]), torch.full_like(expected, float("nan")))
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_no_rows(device):
    *leaves, index = tensors(0, torch.bfloat16, device)
    _, loss = ours(
        *leaves, index, lambda answers, *_: answers["log_probabilities"].sum(), operands(device, 0)
    )
    _, found = gradients(loss, leaves)
    assert loss == 0 and all((gradient == 0).all() for gradient in found)


def test_compiled_and_checked_by_torch(device):
    *leaves, index = tensors(ROWS, torch.float32, device)
    others = operands(device)
    others[1].requires_grad_()

    def function(x, weight, bias, index, *others):
        return ours(x, weight, bias, index, policy, others)[1]

    program = program_for(policy, others)

    def called(x, weight, bias, index, *others):
        arguments = set(ASKED), program, [*others]
        return linear_softmax_loss.loss_of_answers(x, weight, bias, *arguments, lead=[len(x)], index=index)[1]

    compiled = torch.compile(called, backend="aot_eager", fullgraph=True)
    found = gradients(compiled(*leaves, index, *others), (*leaves, others[1]))
    torch.testing.assert_close(found, gradients(function(*leaves, index, *others), (*leaves, others[1])))
    scores, needs = (0.5, 3.0, "", 0.5, 1.0, None), (True, True, True)
    torch.library.opcheck(
        torch.ops.liger_compile.linear_softmax_loss.default,
        (*leaves, None, None, None, index, others, ",".join(ASKED), 0, *scores, program, [ROWS], *needs, 1),
    )


def test_a_second_derivative_is_an_error(device):
    *leaves, index = tensors(ROWS, torch.float32, device)
    _, loss = ours(*leaves, index, policy, operands(device))
    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        torch.autograd.grad(loss, leaves[:1], create_graph=True)
