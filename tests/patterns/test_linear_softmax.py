"""Losses after pre-training: any questions about the softmax of a head are one op, and everything else has a reason."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liger_compile
from tests.helpers.pairwise import parametrize

torch.manual_seed(0)

B, T, H, V = 3, 6, 8, 33
X, W, BIAS = torch.randn(B, T, H), torch.randn(V, H), torch.randn(V)
TOKENS, ADVANTAGES = torch.randint(V, (B, T)), torch.randn(B, T)
TEACHER_X, TEACHER_W = torch.randn(B, T, 5), torch.randn(V, 5)
PADDED = TOKENS.masked_fill(TOKENS < 8, -100)


def chosen(values, tokens):
    return values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits):
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def policy_loss(logp, advantages):
    ratio = (logp - logp.detach()).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


# Log-probabilities beside other questions. Each takes x, w, bias, tokens, advantages.


def rows_one_by_one(x, w, b, tokens, advantages):
    logits = F.linear(x, w)[:, :-1] / 0.9
    rows = [chosen(row.log_softmax(-1), ids) for row, ids in zip(logits, tokens[:, 1:], strict=True)]
    return policy_loss(torch.stack(rows), advantages[:, 1:])


def normalizers_one_by_one(x, w, b, tokens, advantages):
    logits = F.linear(x, w)[:, :-1]
    normalizer = torch.stack([row.logsumexp(-1) for row in logits])
    return policy_loss(chosen(logits, tokens[:, 1:]) - normalizer, advantages[:, 1:])


def labels_rolled(x, w, b, tokens, advantages):
    logits = F.linear(x, w).float()
    logits.div_(0.9)
    logp = chosen(logits, tokens.roll(-1, 1)) - logits.flatten(0, 1).logsumexp(-1).view(B, T)
    return policy_loss(logp[:, :-1], advantages[:, :-1])


def scaled_in_place_on_a_view(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b)[:, :-1]
    logits = logits[:, -4:]
    logits.div_(0.7)
    with torch.no_grad():
        metric = torch.cat([entropy(part) for part in logits.flatten(0, 1).split(5)]).mean()
    return policy_loss(chosen(logits.log_softmax(-1), tokens[:, -4:]), advantages[:, -4:]) + metric


def metric_before_the_loss(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b)
    with torch.no_grad():
        metric = entropy(logits.float()).mean()
    return policy_loss(chosen(logits.float().log_softmax(-1), tokens), advantages) + metric


def entropy_by_logsumexp(x, w, b, tokens, advantages):
    logits = (F.linear(x, w, b) / 0.7).float()
    bonus = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
    return policy_loss(chosen(logits.log_softmax(-1), tokens), advantages) - 0.01 * bonus.mean()


def entropy_masked(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b)[:, :-1].float()
    mask = (advantages[:, 1:] > 0).float()
    bonus = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    logp = chosen(logits.log_softmax(-1), tokens[:, 1:])
    return ((logp * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean() + (bonus * mask).sum()


def written_log_softmax(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b)
    logp = logits - logits.logsumexp(-1, keepdim=True)
    return chosen(logp, tokens).sum() + (logp.exp() * logp).sum()


def capped_and_sliced(x, w, b, tokens, advantages):
    logits = (3.0 * torch.tanh(F.linear(x, w, b) / 3.0) / 0.7)[..., : V - 2]
    return chosen(logits.log_softmax(-1), tokens.clamp(max=V - 3)).sum() + logits.logsumexp(-1).square().sum()


def label_smoother(x, w, b, tokens, advantages):
    """As transformers has it."""
    logp, labels = -F.linear(x, w, b).log_softmax(-1), tokens.masked_fill(tokens < 8, -100).unsqueeze(-1)
    padding = labels.eq(-100)
    nll = logp.gather(-1, labels.clamp(min=0)).masked_fill(padding, 0.0)
    smoothed = logp.sum(-1, keepdim=True, dtype=torch.float32).masked_fill(padding, 0.0)
    count = padding.numel() - padding.long().sum()
    return 0.9 * nll.sum() / count + 0.1 * smoothed.sum() / (count * logp.shape[-1])


def z_loss_beside_the_loss(x, w, b, tokens, advantages):
    logits, labels = F.linear(x, w).float(), tokens.masked_fill(tokens < 8, -100)
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)) + 1e-2 * logits.logsumexp(-1).square().mean()


def smoothed_loss_and_accuracy(x, w, b, tokens, advantages):
    logits, labels = F.linear(x, w), tokens.masked_fill(tokens < 8, -100)
    loss = F.cross_entropy(logits.float().view(-1, V), labels.view(-1), label_smoothing=0.1)
    return loss, (logits.detach().argmax(-1) == labels).sum(), logits.max(-1).indices


def bias_of_bart(x, w, b, tokens, advantages):
    logits = F.linear(x, w) + b.view(1, -1)
    return chosen(logits.log_softmax(-1), tokens).sum() + logits.mean(-1).sum()


def second_order(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b).float()
    return (torch.logsumexp(2 * logits, -1) - 2 * torch.logsumexp(logits, -1)).mean()


def other_rows_for_each_question(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b).float()
    ce = F.cross_entropy(logits[:, 2:].flatten(0, 1), tokens[:, 2:].flatten())
    return (
        ce + chosen(logits[:, :-1].log_softmax(-1), tokens[:, 1:]).sum() + logits.logsumexp(-1).square().sum()
    )


def halves(x, w, b, tokens, advantages):
    first, second = F.linear(x, w, b).split((1, 2))
    return chosen(first.log_softmax(-1), tokens[:1]).sum() - chosen(second.log_softmax(-1), tokens[1:]).sum()


def top_of_the_student(x, w, b, tokens, advantages):
    values, columns = F.linear(x, w, b).topk(4, -1)
    return (values.log_softmax(-1)[..., 0] + (columns == tokens[..., None]).sum(-1)).sum()


QUESTIONS = (
    rows_one_by_one,
    normalizers_one_by_one,
    labels_rolled,
    scaled_in_place_on_a_view,
    metric_before_the_loss,
    entropy_by_logsumexp,
    entropy_masked,
    written_log_softmax,
    capped_and_sliced,
    label_smoother,
    z_loss_beside_the_loss,
    smoothed_loss_and_accuracy,
    bias_of_bart,
    second_order,
    other_rows_for_each_question,
    halves,
    top_of_the_student,
)


# Divergences. Each takes x, w, tokens, and the teacher's x and w.


def forward_kl(x, w, tokens, teacher_x, teacher_w):
    student = (F.linear(x, w) / 2).log_softmax(-1)
    teacher = (F.linear(teacher_x, teacher_w).detach() / 2).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum() / tokens.numel()


def kl_of_probabilities(x, w, tokens, teacher_x, teacher_w):
    student, teacher = (F.linear(*head).view(-1, V) / 2 for head in ((x, w), (teacher_x, teacher_w)))
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean") * 4


def reverse_kl_written_out(x, w, tokens, teacher_x, teacher_w):
    with torch.no_grad():
        teacher = F.linear(teacher_x, teacher_w).log_softmax(-1)
    student = F.linear(x, w).log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1).mean()


def jensen_shannon(x, w, tokens, teacher_x, teacher_w):
    beta = 0.3
    student, teacher = (
        F.linear(x, w).float().log_softmax(-1),
        F.linear(teacher_x, teacher_w).float().log_softmax(-1),
    )
    mixture = torch.stack([student + math.log1p(-beta), teacher + math.log(beta)]).logsumexp(0)
    each = [F.kl_div(mixture, one, reduction="none", log_target=True) for one in (teacher, student)]
    return (beta * each[0] + (1 - beta) * each[1]).sum(-1).mean()


def jensen_shannon_with_a_tensor(x, w, tokens, teacher_x, teacher_w):
    beta = torch.tensor(0.5)
    student, teacher = (F.linear(*head).float().log_softmax(-1) for head in ((x, w), (teacher_x, teacher_w)))
    mixture = torch.logaddexp(student + torch.log1p(-beta), teacher + beta.log())
    each = [F.kl_div(mixture, one, reduction="none", log_target=True) for one in (teacher, student)]
    return (beta * each[0] + (1 - beta) * each[1]).sum()


def products_without_infinite_logits(x, w, tokens, teacher_x, teacher_w):
    logits = F.linear(x, w)
    teacher = F.linear(teacher_x, teacher_w).detach().softmax(-1, dtype=torch.float32)
    products = (teacher * logits.log_softmax(-1, dtype=torch.float32)).masked_fill(logits.isinf(), 0)
    return -products.sum(-1).view(-1).mean()


def soft_targets(x, w, tokens, teacher_x, teacher_w):
    target = F.linear(teacher_x, teacher_w).view(-1, V).softmax(-1)
    return F.cross_entropy(F.linear(x, w).view(-1, V), target)


def loss_and_distillation(x, w, tokens, teacher_x, teacher_w):
    logits = F.linear(x, w)
    with torch.no_grad():
        teacher = F.linear(teacher_x, teacher_w).log_softmax(-1)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return loss + F.kl_div(logits.log_softmax(-1), teacher, reduction="sum", log_target=True)


DIVERGENCES = (
    forward_kl,
    kl_of_probabilities,
    reverse_kl_written_out,
    jensen_shannon,
    jensen_shannon_with_a_tensor,
    products_without_infinite_logits,
    soft_targets,
    loss_and_distillation,
)


def top_k_distillation(x, w, tokens, teacher_x, teacher_w):
    logits, top = F.linear(x, w).float(), F.linear(teacher_x, teacher_w).detach().topk(4, -1)
    teacher = top.values.log_softmax(-1)
    student = logits.gather(-1, top.indices) - logits.logsumexp(-1, keepdim=True)
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def arguments(function, dtype=torch.float32):
    """The inputs, and which of them get no gradient."""
    if function in QUESTIONS:
        return (X.to(dtype), W.to(dtype), BIAS.to(dtype), TOKENS, ADVANTAGES), ()
    return (X.to(dtype), W.to(dtype), TOKENS, TEACHER_X.to(dtype), TEACHER_W.to(dtype)), (3, 4)


@parametrize(
    function=[*QUESTIONS, *DIVERGENCES], dtype=[torch.float32, torch.bfloat16], by=["loss", "questions"]
)
def test_forms_are_one_site_with_the_numbers(liger_is_as_right_as_eager, function, dtype, by):
    """The loss is computed inside of the op; and the same without that pattern. By default."""
    inputs, frozen = arguments(function, dtype)
    skip = ("linear_softmax.loss",) if by == "questions" else ()
    liger_is_as_right_as_eager(function, *inputs, frozen=frozen, skip=skip, policy="auto")
    (report,) = liger_compile.reports()
    assert [(site.pattern, site.kind) for site in report.sites] == [(f"linear_softmax.{by}", "replace")]
    assert not report.near_misses


def test_two_heads_with_the_columns_of_one_are_two_sites(run_liger, liger_is_as_right_as_eager):
    inputs, frozen = arguments(top_k_distillation)
    _, (report,) = run_liger(top_k_distillation, *inputs)
    assert [site.kind for site in report.sites] == ["replace", "replace"]
    torch._dynamo.reset()
    liger_is_as_right_as_eager(top_k_distillation, *inputs, frozen=frozen)


FORMS = (
    rows_one_by_one,
    scaled_in_place_on_a_view,
    entropy_masked,
    label_smoother,
    jensen_shannon,
    loss_and_distillation,
)


@pytest.mark.parametrize("function", FORMS, ids=lambda f: f.__name__)
def test_no_operation_reads_all_logits(function):
    """Neither forward nor backward, outside of the ops."""
    inputs, frozen = arguments(function)
    leaves = [
        x.clone().requires_grad_(x.is_floating_point() and at not in frozen) for at, x in enumerate(inputs)
    ]
    options = {"liger.inner": "aot_eager", "liger.policy": "always"}
    compiled = torch.compile(function, backend="liger", options=options)
    compiled(*leaves)
    with torch.profiler.profile(record_shapes=True) as profile:
        compiled(*leaves).backward()

    def is_ours(event):
        while event is not None and not event.name.startswith("liger_compile::"):
            event = event.cpu_parent
        return event is not None

    wide = [
        event
        for event in profile.events()
        if event.name.startswith("aten::")
        and not is_ours(event)
        and any(len(shape) > 1 and shape[-1] == V and shape[0] != H for shape in event.input_shapes or ())
        and not any(shape[-2:] in ([V, H], [V, 5]) for shape in event.input_shapes or ())
    ]
    assert not wide, [event.name for event in wide]


# What is left, and why


def relu_too(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b)
    return chosen(logits.log_softmax(-1), tokens).sum() + entropy(logits).sum() + logits.relu().sum()


def scaled_in_two_ways(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b)
    return chosen((logits / 2).log_softmax(-1), tokens).sum() + entropy(logits / 3).sum()


def returned(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b)
    return chosen(logits.log_softmax(-1), tokens).sum() + entropy(logits).sum(), logits


def filled_in_place(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b)
    logits.masked_fill_(logits < 0, -3.0)
    return chosen(logits.log_softmax(-1), tokens).sum() + entropy(logits).sum()


def scaled_without_gradients(x, w, b, tokens, advantages):
    """The gradient of the logits is not that of the quotient."""
    logits = F.linear(x, w, b)
    with torch.no_grad():
        logits.div_(0.5)
    return chosen(logits, tokens).sum() + logits.logsumexp(-1).sum()


def a_view_of_what_was_scaled(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b)
    logits[:, 1:].div_(0.5)
    return chosen(logits, tokens).sum() + logits.logsumexp(-1).sum()


def weights_of_classes(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b)
    return F.cross_entropy(logits.view(-1, V), tokens.view(-1), b.detach().abs()) + entropy(logits).sum()


def target_of_the_same_head(x, w, b, tokens, advantages):
    logits = F.linear(x, w, b)
    return (logits.softmax(-1).detach() * logits.log_softmax(-1)).sum() + chosen(
        logits.log_softmax(-1), tokens
    ).sum()


def a_teacher_that_learns(x, w, b, tokens, advantages):
    student, teacher = F.linear(x, w).log_softmax(-1), F.linear(x * 2, w * 0.5).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def an_unknown_loss(x, w, b, tokens, advantages):
    return F.linear(x, w, b).log_softmax(-1).relu().sum()


def a_loss_of_no_rows(x, w, b, tokens, advantages):
    """As models shift labels by one, in a call with one token."""
    logits, labels = F.linear(x[:1, :1], w, b), tokens[:1, :1]
    rows = F.cross_entropy(logits.view(-1, V), labels.view(-1), reduction="none")
    shifted = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), reduction="sum")
    return rows.mean() + shifted


LEFT = {
    relu_too: r"the logits are needed \(relu reads them: logits\)",
    scaled_in_two_ways: "scaled in several ways",
    returned: r"the logits are needed \(the graph returns them: logits\)",
    filled_in_place: None,
    scaled_without_gradients: None,
    a_view_of_what_was_scaled: None,
    weights_of_classes: r"the logits are needed \(cross_entropy reads them",
    target_of_the_same_head: "a divergence has the same head on both sides",
    a_teacher_that_learns: "both heads get gradients",
    an_unknown_loss: r"the logits are needed \(relu reads them: log_softmax\)",
}


@pytest.mark.parametrize("function", LEFT, ids=lambda f: f.__name__)
def test_what_is_left_has_a_reason_and_the_numbers(run_liger, function):
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in (X, W, BIAS, TOKENS, ADVANTAGES)]
    result, (report,) = run_liger(function, *inputs, policy="auto", logits="eager")
    expected = function(*inputs)
    torch.testing.assert_close(result, expected)
    reasons = [*(site.reason for site in report.sites), *(miss.reason for miss in report.near_misses)]
    assert reasons and not report.count("replace")
    if LEFT[function]:
        (miss,) = (miss for miss in report.near_misses if miss.pattern == "linear_softmax.questions")
        assert re.search(LEFT[function], miss.reason), miss.reason
    gradients = []
    for loss in (result, expected):
        loss = loss[0] if isinstance(loss, tuple) else loss
        gradients.append(torch.autograd.grad(loss, inputs[:3], allow_unused=True))
    torch.testing.assert_close(*gradients)


def test_a_loss_of_no_rows_leaves_the_logits(run_liger):
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in (X, W, BIAS, TOKENS, ADVANTAGES)]
    result, (report,) = run_liger(a_loss_of_no_rows, *inputs, policy="always")
    expected = a_loss_of_no_rows(*inputs)
    torch.testing.assert_close(result, expected)
    assert {site.pattern for site in report.sites} <= {"linear_cross_entropy.plain", "cross_entropy.plain"}
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs[:3]) for loss in (result, expected)))


def test_labels_that_come_after_a_reader_of_an_answer(run_liger):
    def f(x, w, b, tokens, advantages):
        logits = F.linear(x, w, b)
        bonus = entropy(logits).mean().exp()
        return chosen(logits.log_softmax(-1), tokens.clamp(max=5)).sum() + bonus

    inputs, _ = arguments(rows_one_by_one)
    result, (report,) = run_liger(f, *inputs)
    torch.testing.assert_close(result, f(*inputs))
    assert any("before all inputs of the replacement are computed" in site.reason for site in report.sites)


def test_a_single_loss_is_left_to_the_op_that_makes_gradients_in_forward(run_liger):
    def f(x, w, b, tokens, advantages):
        logits = F.linear(x, w, b).float()
        return (logits.logsumexp(-1) - chosen(logits, tokens)).mean()

    _, (report,) = run_liger(f, *arguments(rows_one_by_one)[0])
    (site,) = report.sites
    assert site.pattern.startswith("linear_cross_entropy.") and site.kind == "replace"


def test_training_is_fused_by_default(run_liger):
    inputs, _ = arguments(rows_one_by_one)
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    _, (report,) = run_liger(rows_one_by_one, *leaves, policy="auto")
    assert [site.kind for site in report.sites] == ["replace"]
    with torch.no_grad():
        _, (report,) = run_liger(rows_one_by_one, *leaves, policy="auto")
    assert [site.kind for site in report.sites] == ["replace"]


@pytest.mark.parametrize("number", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("how", [torch.mul, torch.div])
def test_scales_that_are_no_numbers_of_a_polynomial_are_left(run_liger, number, how):
    def f(x, w, tokens):
        logits = how(F.linear(x, w), number)
        return chosen(logits.log_softmax(-1), tokens).sum(), entropy(logits).sum()

    result, (report,) = run_liger(f, X, W, TOKENS)
    torch.testing.assert_close(result, f(X, W, TOKENS), equal_nan=True)
    assert not any(site.pattern == "linear_softmax.questions" for site in report.sites)


def test_few_classes_are_left_to_inductor(run_liger):
    def f(x, w, tokens):
        logits = F.linear(x, w)
        return chosen(logits.log_softmax(-1), tokens).sum() + entropy(logits).sum()

    _, (report,) = run_liger(f, X, W[:15], TOKENS.clamp(max=14), policy="auto")
    (site,) = (site for site in report.sites if site.pattern == "linear_softmax.questions")
    assert site.reason.startswith("15 classes are few for a hidden size of 8")


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.embedding = function, nn.Embedding(V, H)
        self.head, self.teacher = nn.Linear(H, V), nn.Linear(5, V).requires_grad_(False)

    def forward(self, tokens, advantages, teacher_x):
        x = self.embedding(tokens)
        if self.function in QUESTIONS:
            return self.function(
                x, self.head.weight, self.head.bias, tokens, advantages[:, : tokens.shape[1]]
            )
        return self.function(
            x, self.head.weight, tokens, teacher_x[: tokens.shape[0], : tokens.shape[1]], self.teacher.weight
        )


@pytest.mark.parametrize(
    "function",
    [
        entropy_masked,
        metric_before_the_loss,  # a loss and a question, as the two slow ones
        kl_of_probabilities,
        pytest.param(label_smoother, marks=pytest.mark.slow),
        pytest.param(z_loss_beside_the_loss, marks=pytest.mark.slow),
    ],
    ids=lambda f: f.__name__,
)
def test_dynamic_sizes(guards_of_ours, function):
    model = Model(function)
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    compiled = torch.compile(model, backend="liger", dynamic=True, options=options)
    liger_compile.clear_reports()
    for batch, length in ((2, 5), (3, 7), (4, 9)):
        inputs = torch.randint(V, (batch, length)), torch.randn(batch, length), torch.randn(batch, length, 5)
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    assert [site.kind for site in liger_compile.reports()[0].sites] == ["replace"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(run_liger, mode):
    inputs, _ = arguments(entropy_by_logsumexp)
    with mode():
        result, (report,) = run_liger(entropy_by_logsumexp, *inputs)
        torch.testing.assert_close(result, entropy_by_logsumexp(*inputs))
    assert [site.kind for site in report.sites] == ["replace"]


def test_in_a_checkpoint(run_liger):
    def f(*inputs):
        return torch.utils.checkpoint.checkpoint(entropy_by_logsumexp, *inputs, use_reentrant=False)

    inputs, _ = arguments(entropy_by_logsumexp)
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    result, (report,) = run_liger(f, *leaves, inner="aot_eager")
    expected = entropy_by_logsumexp(*leaves)
    assert [site.kind for site in report.sites] == ["replace"]
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves[:3]) for loss in (result, expected)))


@pytest.mark.parametrize(
    "function", [scaled_in_place_on_a_view, loss_and_distillation], ids=lambda f: f.__name__
)
def test_compiled_by_inductor(liger_is_as_right_as_eager, function):
    inputs, frozen = arguments(function, torch.bfloat16)
    liger_is_as_right_as_eager(function, *inputs, frozen=frozen, inner="inductor")


def test_the_budget_for_logits_reaches_the_op(run_liger, monkeypatch):
    from liger_compile.ops import linear_softmax

    budgets, answers = [], linear_softmax.answers
    monkeypatch.setattr(
        linear_softmax,
        "answers",
        lambda *a, memory, **k: budgets.append(memory) or answers(*a, memory=memory, **k),
    )
    for chosen_memory in (None, 4096):
        torch._dynamo.reset()
        run_liger(entropy_masked, *arguments(entropy_masked)[0], loss_memory=chosen_memory)
    assert budgets == [0, 4096]
