"""Losses after pre-training whose gradient at a row depends on that row alone: computed inside of the chunks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liger_compile
import tests
from liger_compile.ops import linear_cross_entropy as chunks
from liger_compile.ops import softmax_chunks

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
    monkeypatch.setattr(softmax_chunks, "CHUNK_BYTES", 1)


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


def metrics_before_the_operands(x, w, tokens, advantages, old, mask, reference):
    """Metrics that stay in the graph read the answers before the weights of the loss are computed."""
    logp, logits = log_probabilities(x, w, tokens)
    ratio = (logp - old).exp()
    clipped = ((ratio - 1).abs() > 0.2).float().mean()
    with torch.no_grad():
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    weights = torch.tanh(advantages) * mask / mask.sum().sqrt()
    return -(torch.min(ratio, ratio.clamp(0.8, 1.2)) * weights).sum(), clipped, entropy + weights.mean()


def metric_before_a_matmul(x, w, tokens, advantages, old, mask, reference):
    """The metric would have to wait for the matmul, and runs in another mode."""
    logp, _ = log_probabilities(x, w, tokens)
    with torch.no_grad():
        metric = logp.mean()
    weights = torch.tanh(x.detach() @ reference.t()).sum(-1)
    return -(logp * weights).sum(), metric


def test_metrics_that_come_early(liger_is_as_right_as_eager):
    check, frozen = liger_is_as_right_as_eager, (3, 4, 5, 6)
    check(metrics_before_the_operands, *arguments(), frozen=frozen, policy="auto")
    assert patterns_of(liger_compile.reports()[-1]) == ["linear_softmax.loss"]
    torch._dynamo.reset()
    check(metric_before_a_matmul, *arguments(), frozen=frozen, policy="auto")
    report = liger_compile.reports()[-1]
    assert patterns_of(report) == ["linear_softmax.questions"]
    assert "before all inputs of the replacement are computed)" in report.notes[0]


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


def with_a_hook(x, w, tokens, advantages, old, mask, reference):
    """The hook changes the gradient."""
    logp = F.linear(x, w).float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1))
    logp.register_hook(lambda gradient: gradient * 3)
    return ((logp.squeeze(-1) - old).exp() * advantages).sum()


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


def test_a_hook_changes_the_gradient(liger_is_as_right_as_eager):
    """torch 2.11 has the hook in the gradient of the loss, so that the loss is found; torch 2.13 in the graph."""
    liger_is_as_right_as_eager(with_a_hook, *arguments(), frozen=(3, 4, 5, 6), policy="auto")


def test_an_answer_that_is_written_in_place(liger_is_as_right_as_eager):
    def function(x, w, tokens, mask):
        logp = F.linear(x, w).float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1))
        first = logp.detach().exp()
        logp.mul_(mask.unsqueeze(-1))
        return (logp.squeeze(-1) * 3).sum() + first.mean()

    liger_is_as_right_as_eager(function, X, W, TOKENS, MASK, frozen=(3,), policy="auto")


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


def wide_events(run):
    """The operations on floating-point tensors with V columns and many rows, outside of the ops and inside of them."""
    with torch.profiler.profile(record_shapes=True) as profile:
        run()
    found = {True: [], False: []}
    for event in profile.events():
        shapes = [shape for shape in event.input_shapes or () if len(shape) > 1 and shape[-1] == V]
        rows = max((torch.Size(shape[:-1]).numel() for shape in shapes if shape[0] != H), default=0)
        inside, each = False, event
        while each is not None and not inside:
            inside, each = each.name.startswith("liger_compile::"), each.cpu_parent
        if event.name.startswith("aten::") and rows:
            found[inside].append((event.name, rows))
    return found


@pytest.mark.parametrize("function", LOSSES, ids=lambda f: f.__name__)
def test_no_tensor_has_the_logits_of_all_rows(function):
    leaves = [X.clone().requires_grad_(), W.clone().requires_grad_(), *arguments()[2:]]
    compiled = torch.compile(function, backend="liger", options={"liger.inner": "aot_eager"})

    def run():
        result = compiled(*leaves)
        (result[0] if isinstance(result, tuple) else result).backward()

    run()
    events = wide_events(run)
    assert not events[False]
    assert max(rows for _, rows in events[True]) < B * (T - 1)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.reference = (
            nn.Linear(H, V, bias=False),
            nn.Linear(H, V, bias=False).requires_grad_(False),
        )

    def forward(self, x, tokens, advantages, old, mask):
        operands = x, self.head.weight, tokens, advantages, old, mask, self.reference.weight
        return group_relative_policy(*operands)


def test_lengths_that_change(guards_of_ours):
    """The program refers to sizes; the op decides again for each of them whether rows are independent."""
    model = Policy()
    options = {"liger.inner": "aot_eager", "liger.strict": True}
    compiled = torch.compile(model, backend="liger", dynamic=True, options=options)
    for shape in ((2, 5), (3, 7), (4, 9), (2, 4)):
        x, tokens = torch.randn(*shape, H, requires_grad=True), torch.randint(V, shape)
        rest = torch.randn(shape), torch.randn(shape) * 0.1 - 4, torch.ones(shape)
        found, expected = (each(x, tokens, *rest) for each in (compiled, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(loss[0], (x, model.head.weight)) for loss in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    (report,) = liger_compile.reports()
    assert "linear_softmax.loss" in patterns_of(report)


def test_under_autocast(liger_is_as_right_as_eager):
    def function(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return proximal_policy(*inputs)

    liger_is_as_right_as_eager(function, *arguments(), frozen=(3, 4, 5, 6), policy="auto")
    assert patterns_of(liger_compile.reports()[-1]) == ["linear_softmax.loss"]


def test_gradients_of_gradient_accumulation():
    """The incoming gradient is not 1, backward runs twice, and the loss has two readers."""

    def step(*inputs):
        loss = proximal_policy(*inputs)
        return loss / 4 + loss.square()

    leaves = [X.clone().requires_grad_(), W.clone().requires_grad_()]
    compiled = torch.compile(step, backend="liger", options={"liger.inner": "aot_eager"})
    for _ in range(2):
        (compiled(*leaves, *arguments()[2:]) * 512).backward()
    expected = torch.autograd.grad(step(*leaves, *arguments()[2:]) * 1024, leaves)
    torch.testing.assert_close([leaf.grad for leaf in leaves], [*expected], rtol=1e-4, atol=1e-3)


def multiplied(values, mask):
    return values * mask


def chosen(values, mask):
    return torch.where(mask > 0, values, 0.0)


def filled(values, mask):
    return values.masked_fill(mask == 0, 0.0)


@pytest.mark.parametrize(
    ("masked", "inner"),
    [(multiplied, "aot_eager"), (chosen, "inductor"), (filled, "aot_eager")],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_a_mean_over_no_tokens_has_the_gradients_of_eager_code(masked, inner):
    """The sum's incoming gradient is 1 / 0: it makes NaN of what is multiplied by 0, and not of what is left out."""

    def loss(x, w, advantages, mask):
        logp, _ = log_probabilities(x, w, TOKENS)
        return masked(logp * advantages, mask).sum() / mask.sum()

    compiled = torch.compile(loss, backend="liger", options={"liger.inner": inner, "liger.strict": True})
    for mask in (MASK, torch.zeros_like(MASK)):
        leaves = [each.clone().requires_grad_() for each in (X, W, ADVANTAGES)]
        found, expected = (torch.autograd.grad(each(*leaves, mask), leaves) for each in (compiled, loss))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert any(each.isnan().any() for each in expected) == (masked is multiplied and mask is not MASK)
    assert patterns_of(liger_compile.reports()[-1]) == ["linear_softmax.loss"]


@pytest.mark.parametrize("incoming", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("masked", [multiplied, chosen], ids=lambda f: f.__name__)
def test_an_incoming_gradient_that_is_not_finite_reaches_what_it_reaches_in_eager_code(masked, incoming):
    def loss(x, w, advantages):
        logp, _ = log_probabilities(x, w, TOKENS)
        return masked(logp * advantages, MASK).sum()

    leaves = [each.clone().requires_grad_() for each in (X, W, ADVANTAGES)]
    compiled = torch.compile(loss, backend="liger", options={"liger.inner": "aot_eager"})
    incoming = torch.tensor(incoming)
    found, expected = (torch.autograd.grad(f(*leaves), leaves, incoming) for f in (compiled, loss))
    # Eager code has infinity in some entries that are NaN here.
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(found, expected, strict=True))
    torch.testing.assert_close(found[2], expected[2], equal_nan=True)


@pytest.mark.parametrize("wrong", [-100, -1, V])
@pytest.mark.parametrize("reads", [lambda logp: logp, lambda logp: (logp * MASK).mean()], ids=["all", "loss"])
def test_a_token_that_is_no_class_is_an_error_of_gather(run_liger, reads, wrong):
    """Labels of padding are an error, too: only a cross-entropy ignores them."""
    labels = TOKENS.masked_fill(MASK == 0, wrong)

    def function(x, w):
        return reads(log_probabilities(x, w, labels)[0])

    with pytest.raises(RuntimeError, match="out of bounds"):
        function(X, W)
    with pytest.raises(RuntimeError, match="out of bounds"):
        run_liger(function, X.clone().requires_grad_(), W)


def test_a_gradient_that_torch_computes_for_known_sizes_only():
    """The backward of `pad` takes no symbols outside of AOTAutograd: another pattern matches, and nothing fails."""

    def function(x, w, tokens):
        logp = F.linear(x, w).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        return F.pad(logp, (0, 10 - logp.shape[1])).square().sum()

    options = {"liger.inner": "aot_eager", "liger.strict": True}
    compiled = torch.compile(function, backend="liger", dynamic=True, options=options)
    leaves = [X.clone().requires_grad_(), W.clone().requires_grad_()]
    pair = (torch.autograd.grad(each(*leaves, TOKENS), leaves) for each in (compiled, function))
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    assert patterns_of(liger_compile.reports()[-1]) == ["linear_cross_entropy.log_probability"]


def test_in_a_checkpoint_the_logits_are_kept(run_liger):
    """A checkpoint would run the op, which computes gradients in forward, twice."""

    def function(*inputs):
        return torch.utils.checkpoint.checkpoint(reinforce, *inputs, use_reentrant=False)

    leaves = [X.clone().requires_grad_(), W.clone().requires_grad_(), *arguments()[2:]]
    result, (report,) = run_liger(function, *leaves, inner="aot_eager", policy="auto")
    assert patterns_of(report) == ["linear_softmax.questions"]
    pair = (torch.autograd.grad(loss, leaves[:2]) for loss in (result, reinforce(*leaves)))
    torch.testing.assert_close(*pair)


def test_little_memory_for_logits_computes_them_again(run_liger):
    leaves = [X.clone().requires_grad_(), W.clone().requires_grad_(), *arguments()[2:]]
    _, (report,) = run_liger(preference, *leaves, policy="auto", loss_memory=4096)
    assert any("computes the logits again, as liger.loss_memory is set" in note for note in report.notes)


def test_a_frozen_head_keeps_the_gradient_of_its_only_answer(liger_is_as_right_as_eager):
    def sequences(x, w, tokens, mask):
        logp = -F.cross_entropy(F.linear(x, w).view(-1, V), tokens.view(-1), reduction="none")
        return -F.logsigmoid((logp.view(B, T) * mask).sum(1)).mean()

    liger_is_as_right_as_eager(sequences, X, W, TOKENS, MASK, frozen=(1, 3), policy="auto")
    (note,) = (note for note in liger_compile.reports()[-1].notes if "matmuls" in note)
    assert "two matmuls" in note and "because the head is frozen" in note


CHILD = """
import json, sys, torch, liger_compile
from liger_compile.torch_internals.aot_autograd import cache_counts
from tests.patterns.test_linear_softmax_loss import *

def loss(x, w, tokens, advantages, old):
    ratio = (log_probabilities(x, w, tokens)[0] - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).sum()

leaves = [X.clone().requires_grad_(), W.clone().requires_grad_(), *arguments()[2:5]]
leaves[4] = log_probabilities(*leaves[:3])[0].detach() - 0.3 * ADVANTAGES
for clip in map(float, sys.argv[1:]):
    torch._dynamo.reset()
    before = cache_counts()["hit"]
    result = torch.compile(loss, backend="liger")(*leaves)
    pair = [torch.autograd.grad(each, leaves[:2]) for each in (result, loss(*leaves))]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    print(json.dumps({"loss": result.item(), "hit": cache_counts()["hit"] - before}))
"""


def test_the_program_is_part_of_the_key_of_the_cache(tmp_path, monkeypatch, capsys):
    """Another process finds the loss that this one compiles, and does not find one for another clip."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def run(*clips):
        environment = {**os.environ, "PYTHONPATH": str(Path(tests.__file__).parents[1])}
        child = subprocess.run(
            [sys.executable, "-c", CHILD, *map(str, clips)], env=environment, capture_output=True, text=True
        )
        assert not child.returncode, child.stderr
        return found_in(child.stdout)

    def found_in(printed):
        return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]

    monkeypatch.setattr(sys, "argv", ["-c", "0.1"])
    exec(CHILD, {})
    (first,) = found_in(capsys.readouterr().out)
    again, other = run(0.1, 0.3)
    assert (first["hit"], again["hit"], other["hit"]) == (0, 1, 0)
    assert first["loss"] == again["loss"] != other["loss"]
