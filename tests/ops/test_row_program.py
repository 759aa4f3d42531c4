"""Programs of losses: what they compute, and whether the gradient at a row depends on other rows."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from liger_compile.ops import row_program
from liger_compile.steps.tails import NoTailError
from tests.helpers.row_programs import program_of

B, T = 3, 4
LOGP, TWO = torch.randn(B * T), torch.randn(B * T, 2)
WEIGHTS = torch.randn(B, T)


def why_not(loss, *others, logp=LOGP, sizes=()):
    answers = {"log_probabilities": logp}
    program = program_of(lambda made, *rest: loss(made["log_probabilities"], *rest), answers, others, sizes)
    forms = row_program.forms_of([logp]), row_program.forms_of(others)
    return row_program.why_not_by_rows(program, *forms, tuple(sizes))


BY_ROWS = {
    "a sum": lambda a, w: a.sum(),
    "a mean of a function": lambda a, w: (a.exp() * w.view(-1)).mean(),
    "shapes": lambda a, w: (a.view(B, T)[:, 1:] * w[:, 1:]).pow(2).sum(),
    "a mask": lambda a, w: torch.where(w > 0, a.view(B, T), 0.0).square().sum() / (w > 0).sum(),
    "means of sequences": lambda a, w: ((a.view(B, T) * w).sum(1) / w.sum(1)).mean(),
    "a transposed view": lambda a, w: (a.view(B, T).t() * w.t()).exp().sum(),
    "a stack of rows": lambda a, w: torch.stack([row.exp() for row in a.view(B, T)]).sum(),
    "rows in another order": lambda a, w: torch.cat([a[5:], a[:5]]).exp().sum() + a.roll(2).exp().sum(),
    "a padded row": lambda a, w: F.pad(a, (1, 2)).exp().sum(),
    "detached parts": lambda a, w: (a.exp().detach() * a).sum(),
    "softmax of other operands": lambda a, w: (w.view(-1).softmax(0) * a.exp()).sum(),
    "statistics of other operands": lambda a, w: (((w - w.mean()) / w.std()).view(-1) * a.exp()).sum(),
}

NOT_BY_ROWS = {
    "a square of a sum": lambda a, w: a.sum() ** 2,
    "a product of two rows": lambda a, w: (a[1:] * a[:-1]).sum(),
    "reversed rows": lambda a, w: (a * a.flip(0)).sum(),
    "the mean of the batch": lambda a, w: (a - a.mean()).square().sum(),
    "a detached mean": lambda a, w: (a.exp() / a.exp().mean().detach()).sum(),
    "softmax": lambda a, w: (a.softmax(0) * w.view(-1)).sum(),
    "a sum of each sequence": lambda a, w: a.view(B, T).sum(1).exp().sum(),
    "a maximum": lambda a, w: a.view(B, T).amax(1).sum(),
    "a cumulative sum": lambda a, w: a.cumsum(0).exp().sum(),
    "sorted rows": lambda a, w: (a.sort().values * w.view(-1)).sum(),
    "gathered rows": lambda a, w: a[w.view(-1).argsort()].exp().sum(),
    "a matmul": lambda a, w: (a.view(B, T) @ w.t()).exp().sum(),
    "an expanded row": lambda a, w: (a[:1] * a).sum(),
    "a constant of the batch": lambda a, w: (a.exp() * (a > 0).any()).sum(),
    "a norm": lambda a, w: a.norm(),
    "a variance": lambda a, w: a.var(),
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_losses_by_rows(name):
    assert why_not(BY_ROWS[name], WEIGHTS, sizes=(B, T)) is None


@pytest.mark.parametrize("name", NOT_BY_ROWS)
def test_losses_that_need_other_rows(name):
    reason = why_not(NOT_BY_ROWS[name], WEIGHTS, sizes=(B, T))
    assert reason is not None and "other row" in reason


def test_columns_of_a_row_may_be_combined_in_any_way():
    def loss(a, w):
        return (a.log_softmax(-1).cumsum(-1) * a.sum(-1, keepdim=True) * a.prod(-1, keepdim=True)).sum()

    assert why_not(loss, WEIGHTS, logp=TWO) is None
    assert why_not(lambda a, w: a.log_softmax(0).exp().sum(), WEIGHTS, logp=TWO) is not None


def draws(a):
    return (a * torch.rand_like(a)).sum()


def drops(a):
    return F.dropout(a, 0.5).sum()


def writes_through_a_view(a):
    copy = a * 2
    copy.view(3, 4).add_(1)
    return copy.sum()


def writes_below_a_view(a):
    copy = a * 2
    view = copy.view(3, 4)
    copy.add_(1)
    return view.sum()


@pytest.mark.parametrize(
    "loss", [draws, drops, writes_through_a_view, writes_below_a_view], ids=lambda f: f.__name__
)
def test_random_numbers_and_writes_into_shared_memory_are_refused(loss):
    with pytest.raises(NoTailError):
        why_not(loss)


def test_writes_into_memory_of_their_own_are_steps():
    answers = {"log_probabilities": LOGP}
    program = program_of(lambda made: (made["log_probabilities"] * 3).mul_(2).add_(1).sum(), answers)
    assert "_." not in program
    run = row_program.Run(row_program.read(program), answers, (), ())
    (loss,) = run.results(run.program.loss)
    torch.testing.assert_close(loss, (LOGP * 6 + 1).sum())


def test_a_program_computes_the_loss_and_its_gradients():
    def loss(made, old, values):
        ratio = (made["log_probabilities"].view(B, T) - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        return -torch.minimum(ratio * values, clipped * values).mean() - 0.1 * made["entropy"].relu().sum()

    answers = {"log_probabilities": LOGP, "entropy": LOGP.roll(1)}
    others = WEIGHTS, WEIGHTS.roll(1).requires_grad_()
    program = row_program.read(program_of(loss, answers, others, (B, T)))
    dims = B, T, *(size for other in others for size in other.shape)
    run = row_program.Run(program, answers, [other.detach() for other in others], dims)
    places = program.loss, *program.gradients.values(), *program.of_others.values()
    found = run.results(*places)
    leaves = {name: value.clone().requires_grad_() for name, value in answers.items()}
    expected = loss(leaves, *others)
    gradients = torch.autograd.grad(expected, (*leaves.values(), others[1]))
    torch.testing.assert_close(found, [expected.detach(), *gradients])


def test_a_run_is_for_the_current_answers():
    answer = LOGP.clone()
    program = row_program.read(program_of(lambda made: made["entropy"].square().sum(), {"entropy": answer}))
    run = row_program.Run(program, {"entropy": answer}, (), ())
    for factor in (1, 3):
        answer.copy_(LOGP * factor)
        (gradient,) = run.results(program.gradients["entropy"])
        torch.testing.assert_close(gradient, 2 * factor * LOGP)


def test_sizes_are_polynomials_of_the_sizes_of_operands():
    assert row_program.size([[1, [0, 0, 1], [1, 1, 2]], [-3]], (5, 4)) == 5 * 3**2 - 3


def test_a_program_is_plain_json():
    program = json.loads(program_of(lambda made: (made["entropy"] * -torch.inf).nansum(), {"entropy": LOGP}))
    assert program["answers"] == ["entropy"] and all(
        name.startswith("aten.") for name, *_ in program["steps"]
    )
