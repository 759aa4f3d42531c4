"""Losses after pre-training whose gradient at a row depends on that row alone: computed inside of the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import liger_compile
from liger_compile.ops import linear_cross_entropy as chunks

torch.manual_seed(0)

B, T, H, V = 3, 6, 8, 33
X, W = torch.randn(B, T, H), torch.randn(V, H)
TOKENS, ADVANTAGES, OLD = torch.randint(V, (B, T)), torch.randn(B, T), torch.randn(B, T) * 0.1 - 4
MASK = (torch.arange(B * T).view(B, T) % 3 > 0).float()
REFERENCE_W = torch.randn(V, H)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, which begin within a sequence."""
    for name, size in {"LEAST_ROWS": 5, "ROW_TILE": 5, "ROWS_A_BYTE": 1, "CHUNK_BYTES": 1}.items():
        monkeypatch.setattr(chunks, name, size)


def log_probabilities(x, w, tokens, temperature=1.0):
    logits = F.linear(x, w).float() / temperature
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1), logits


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum().clamp(min=1)


# Each takes x, w, tokens, advantages, old log-probabilities, a mask, and the head of a reference model.


def group_relative_policy(x, w, tokens, advantages, old, mask, reference):
    """GRPO, with its KL and its metrics."""
    logp, _ = log_probabilities(x[:, :-1], w, tokens[:, 1:], 0.9)
    with torch.no_grad():
        ref, _ = log_probabilities(x[:, :-1], reference, tokens[:, 1:], 0.9)
    ratio = torch.exp(logp - old[:, 1:])
    advantages = advantages[:, :1]
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = torch.exp(ref - logp) - (ref - logp) - 1
    metrics = masked_mean(kl.detach(), mask[:, 1:]), ((ratio < 0.8) & (advantages < 0)).float().mean()
    per_sequence = ((loss + 0.04 * kl) * mask[:, 1:]).sum(-1) / mask[:, 1:].sum(-1)
    return per_sequence.mean(), *metrics


def proximal_policy(x, w, tokens, advantages, old, mask, reference):
    """PPO with a clipped ratio in both directions, and an entropy bonus."""
    logp, logits = log_probabilities(x, w, tokens)
    ratio = (logp - old).exp()
    clipped = torch.clamp(ratio, 1 - 0.2, 1 + 0.28)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    loss = torch.where(advantages < 0, torch.minimum(-advantages * 3.0, loss), loss)
    entropy = torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)
    return masked_mean(loss, mask) - 0.01 * masked_mean(entropy, mask)


def reinforce(x, w, tokens, advantages, old, mask, reference):
    return -(log_probabilities(x, w, tokens)[0] * (advantages - advantages.mean())).mean()


def sequence_means(x, w, tokens, advantages, old, mask, reference):
    logp, _ = log_probabilities(x, w, tokens)
    return -((logp * mask).sum(1) / mask.sum(1) * advantages[:, 0]).mean()


def labels_with_padding(x, w, tokens, advantages, old, mask, reference):
    labels = tokens.masked_fill(mask == 0, -100)
    logits = F.linear(x, w).float()
    logp = -F.cross_entropy(logits.view(-1, V), labels.view(-1), reduction="none", ignore_index=-100)
    return (-(logp.exp().detach() * logp)).sum() / (labels != -100).sum()


def divergence_from_a_reference(x, w, tokens, advantages, old, mask, reference):
    logp = F.linear(x, w).float().log_softmax(-1)
    with torch.no_grad():
        target = F.linear(x * 0.9, reference).float().log_softmax(-1)
    kl = (logp.exp() * (logp - target)).sum(-1)
    return masked_mean(kl, mask) + 0.1 * F.huber_loss(kl, old.abs(), reduction="none").mean()


def unusual_functions(x, w, tokens, advantages, old, mask, reference):
    logp, _ = log_probabilities(x, w, tokens)
    a = F.logsigmoid(logp * advantages) + F.softplus(logp)
    b = torch.cat([a[:, 3:], a[:, :3] * 2], 1).transpose(0, 1).reshape(-1)
    c = torch.sigmoid(logp.flip(1)) * advantages.flip(1) + logp.roll(1, 0).flip(1).roll(-1, 0)
    return torch.nan_to_num(b).clamp_min(-3).sum() + F.smooth_l1_loss(logp, old) + c.square().sum()


def of_two_heads(x, w, tokens, advantages, old, mask, reference):
    """Both learn: the gradient of the second is a vector that the first op computes, too."""
    first, _ = log_probabilities(x, w, tokens)
    second, _ = log_probabilities(x, reference, tokens)
    return -(F.logsigmoid(first - second) * mask).mean()


LOSSES = (
    group_relative_policy,
    proximal_policy,
    reinforce,
    sequence_means,
    labels_with_padding,
    divergence_from_a_reference,
    unusual_functions,
    of_two_heads,
)


def arguments(dtype=torch.float32):
    return X.to(dtype), W.to(dtype), TOKENS, ADVANTAGES, OLD, MASK, REFERENCE_W.to(dtype)


def patterns_of(report):
    return [site.pattern for site in report.sites if site.kind == "replace"]


@pytest.mark.parametrize("function", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_is_inside_of_the_op(liger_is_as_right_as_eager, function, dtype):
    frozen = () if function is of_two_heads else (3, 4, 5, 6)
    liger_is_as_right_as_eager(function, *arguments(dtype), frozen=frozen, policy="auto")
    assert "linear_softmax.loss" in patterns_of(liger_compile.reports()[-1])


def test_other_operands_get_their_gradients(liger_is_as_right_as_eager):
    liger_is_as_right_as_eager(proximal_policy, *arguments(), policy="auto")
    assert patterns_of(liger_compile.reports()[-1]) == ["linear_softmax.loss"]


@pytest.mark.parametrize(
    "function", [group_relative_policy, divergence_from_a_reference], ids=lambda f: f.__name__
)
def test_compiled_by_inductor(liger_is_as_right_as_eager, function):
    frozen = 3, 4, 5, 6
    liger_is_as_right_as_eager(function, *arguments(torch.bfloat16), frozen=frozen, inner="inductor")
    assert "linear_softmax.loss" in patterns_of(liger_compile.reports()[-1])


# What is no such loss


def normalized_over_the_batch(x, w, tokens, advantages, old, mask, reference):
    logp, _ = log_probabilities(x, w, tokens)
    return (((logp - logp.mean()) / logp.std()) * advantages).sum()


def detached_statistics_of_the_batch(x, w, tokens, advantages, old, mask, reference):
    logp, _ = log_probabilities(x, w, tokens)
    return (logp * logp.detach().softmax(-1)).sum()


def neighbors(x, w, tokens, advantages, old, mask, reference):
    logp, _ = log_probabilities(x, w, tokens)
    return (logp[:, 1:] * logp[:, :-1]).sum()


def rewards_to_go(x, w, tokens, advantages, old, mask, reference):
    return (log_probabilities(x, w, tokens)[0].cumsum(1) ** 2).sum()


def sorted_values(x, w, tokens, advantages, old, mask, reference):
    values, _ = log_probabilities(x, w, tokens)[0].sort(1)
    return (values * advantages).sum()


def preference(x, w, tokens, advantages, old, mask, reference):
    """DPO, and the ratios of whole sequences (GSPO)."""
    sums = (log_probabilities(x, w, tokens)[0] * mask).sum(1)
    return -F.logsigmoid(0.1 * (sums[0] - sums[1])) + (sums / mask.sum(1)).exp().mean()


def with_dropout(x, w, tokens, advantages, old, mask, reference):
    return F.dropout(log_probabilities(x, w, tokens)[0], 0.5).sum()


def returned(x, w, tokens, advantages, old, mask, reference):
    """The caller may differentiate both."""
    logp, _ = log_probabilities(x, w, tokens)
    return logp.sum(), logp


def written_in_place(x, w, tokens, advantages, old, mask, reference):
    logp, _ = log_probabilities(x, w, tokens)
    weighted = logp * advantages
    weighted.mul_(mask)
    return weighted.sum()


LEFT = {
    normalized_over_the_batch: "depends on other rows",
    detached_statistics_of_the_batch: "depends on other rows",
    neighbors: "depends on other rows",
    rewards_to_go: "depends on other rows",
    sorted_values: "depends on other rows",
    preference: "depends on other rows",
    with_dropout: "draws random numbers",
    returned: "do not come from one loss",
    written_in_place: "written in place",
}


@pytest.mark.parametrize("function", LEFT, ids=lambda f: f.__name__)
def test_what_is_no_such_loss_keeps_the_logits_and_says_why(liger_is_as_right_as_eager, function):
    if function is with_dropout:
        leaves = [X.clone().requires_grad_(), W.clone().requires_grad_()]
        torch.compile(function, backend="liger", options={"liger.inner": "aot_eager"})(
            *leaves, *arguments()[2:]
        )
    else:
        liger_is_as_right_as_eager(function, *arguments(), frozen=(3, 4, 5, 6), policy="auto")
    report = liger_compile.reports()[-1]
    assert patterns_of(report) == ["linear_softmax.questions"]
    (note,) = (note for note in report.notes if "logits are kept" in note)
    assert LEFT[function] in note


def test_float16_is_left(liger_is_as_right_as_eager):
    liger_is_as_right_as_eager(reinforce, *arguments(torch.float16), frozen=(3, 4, 5, 6), policy="auto")
    assert patterns_of(liger_compile.reports()[-1]) == ["linear_softmax.questions"]


def test_a_mean_of_losses_alone_stays_with_the_op_of_the_loss(run_liger):
    def half_of_a_mean(x, w, tokens):
        logits = F.linear(x, w)
        return 0.5 * F.cross_entropy(logits.view(-1, V), tokens.view(-1))

    _, (report,) = run_liger(half_of_a_mean, X.requires_grad_(), W, TOKENS)
    X.requires_grad_(False)
    assert [site.pattern.partition(".")[0] for site in report.sites] == ["linear_cross_entropy"]
