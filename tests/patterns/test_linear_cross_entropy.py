"""Head and loss as they occur: shifted, sliced, scaled, capped, padded, divided by a count of tokens."""

import pytest
import torch
import torch.nn.functional as F

import liger_compile
from liger_compile import functional
from liger_compile.patterns.profit import few_logits

torch.manual_seed(0)

H, V = 8, 32
X, W, B = torch.randn(3, 6, H), torch.randn(V, H), torch.randn(V)
LABELS = torch.randint(0, V, (3, 6))
LABELS[1, 3:] = -100


def hugging_face(x, w, labels):
    logits = F.linear(x[:, 0:, :], w).float()
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, V), labels.view(-1), ignore_index=-100, reduction="mean")


def num_items(x, w, labels):
    logits = F.linear(x, w).float()
    loss = F.cross_entropy(logits.view(-1, V), labels.view(-1), reduction="sum")
    return loss / torch.tensor(11)


def nanogpt(x, w, labels):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-1)


def shifted_logits(x, w, labels):
    logits = F.linear(x, w)
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, V).float(), labels[..., 1:].reshape(-1))


def torchtitan(x, w, labels):
    return F.cross_entropy(F.linear(x, w).flatten(0, 1).float(), labels.flatten(0, 1), reduction="sum")


def cohere(x, w, labels):
    logits = F.linear(x, w) * 0.0625
    return F.cross_entropy(logits.float().view(-1, V), labels.view(-1))


def granite(x, w, labels):
    logits = F.linear(x, w) / 8.0
    return F.cross_entropy(logits.float().view(-1, V), labels.view(-1))


def gemma2(x, w, labels):
    logits = torch.tanh(F.linear(x, w) / 30.0) * 30.0
    return F.cross_entropy(logits.float().view(-1, V), labels.view(-1))


def padded_head(x, w, labels):  # nanochat: the vocabulary is padded, and capped after the upcast
    logits = F.linear(x, w)[..., :27].float()
    logits = 15 * torch.tanh(logits / 15)
    return F.cross_entropy(logits.view(-1, 27), labels.clamp(max=26).view(-1))


def classes_second(x, w, labels):
    return F.cross_entropy(F.linear(x, w).transpose(1, 2), labels)


def smoothed(x, w, labels):
    return F.cross_entropy(F.linear(x, w).view(-1, V), labels.view(-1), label_smoothing=0.1)


def weighted_tokens(x, w, labels):
    losses = F.cross_entropy(F.linear(x, w).view(-1, V).float(), labels.view(-1), reduction="none")
    return (losses * torch.arange(18)).sum() / 7


def gathered(x, w, labels):
    scores = F.log_softmax(F.linear(x, w)[:, :-1].float(), dim=-1)
    labels, counts = labels[:, 1:], labels[:, 1:] != -100
    picked = scores.gather(-1, labels.masked_fill(~counts, 0).unsqueeze(-1)).squeeze(-1)
    return -(picked * counts).sum() / counts.sum()


def less_gathered(x, w, labels):
    logits, labels = F.linear(x, w).float(), labels.clamp(min=0)
    losses = torch.logsumexp(logits, -1) - torch.gather(logits, -1, labels[..., None])[..., 0]
    return losses.mean()


def taken_along(x, w, labels):
    scores = F.log_softmax(F.linear(x, w).float(), dim=-1)
    return -scores.take_along_dim(labels.clamp(min=0)[..., None], -1).squeeze(-1).mean()


def less_taken_along(x, w, labels):
    logits, labels = F.linear(x, w).float(), labels.clamp(min=0)
    return (logits.logsumexp(-1) - torch.take_along_dim(logits, labels[..., None], dim=2).squeeze(2)).mean()


ALL = (hugging_face, num_items, nanogpt, shifted_logits, torchtitan, cohere, granite, gemma2, padded_head,
       classes_second, smoothed, weighted_tokens, gathered, less_gathered,
       taken_along, less_taken_along)  # fmt: skip


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings_are_one_site_with_the_numbers(liger_is_as_right_as_eager, function, dtype):
    labels = LABELS.clamp(min=-1) if function is nanogpt else LABELS
    labels = labels.clamp(min=0) if function is padded_head else labels
    skip = ("linear_softmax",) if function in OF_TOKENS else ()
    liger_is_as_right_as_eager(function, X.to(dtype), W.to(dtype), labels, skip=skip)
    (report,) = liger_compile.reports()
    (site,) = report.sites
    assert site.pattern.startswith("linear_cross_entropy.") and site.kind == "replace"


# The loss of each token has its own gradient, and linear_cross_entropy would compute the logits again in backward.
OF_TOKENS = weighted_tokens, gathered, less_gathered, taken_along, less_taken_along


@pytest.mark.parametrize("function", OF_TOKENS, ids=lambda f: f.__name__)
def test_losses_of_tokens_have_their_sum_inside_of_the_op(liger_is_as_right_as_eager, function):
    liger_is_as_right_as_eager(function, X, W, LABELS)
    (report,) = liger_compile.reports()
    assert [site.pattern for site in report.sites] == ["linear_softmax.loss"]


def test_the_bias_of_the_head(run_liger, liger_is_as_right_as_eager):
    def linear(x, w, b, labels):
        return F.cross_entropy(F.linear(x, w, b).view(-1, V), labels.view(-1))

    def added(x, w, b, labels):
        return F.cross_entropy((F.linear(x, w) + b).view(-1, V), labels.view(-1))

    for function in (linear, added):
        torch._dynamo.reset()
        _, (report,) = run_liger(function, X, W, B, LABELS)
        assert [site.kind for site in report.sites] == ["replace"]
        torch._dynamo.reset()
        liger_is_as_right_as_eager(function, X, W, B, LABELS)


@pytest.mark.parametrize(
    "pick",
    [
        lambda scores, labels: scores.gather(-1, labels[..., None].expand(-1, -1, 2))[..., 0],
        lambda scores, labels: scores.gather(1, labels[..., None])[..., 0],
        lambda scores, labels: scores.take_along_dim(labels[:1, :, None], -1)[..., 0],  # one row for all
        lambda scores, labels: scores.take_along_dim(labels[..., None], 1)[..., 0],
        lambda scores, labels: scores.take_along_dim(labels.flatten()),
        lambda scores, labels: scores[:, 1:].gather(-1, labels[:, :-2, None])[..., 0],
        lambda scores, labels: F.log_softmax(scores, 1).gather(-1, labels[..., None])[..., 0],
    ],
)
def test_what_is_gathered_otherwise_is_right(run_liger, pick):
    def f(x, w, labels):
        return pick(F.log_softmax(F.linear(x, w).float(), -1), labels.clamp(0, 5)).sum()

    result, _ = run_liger(f, X, W, LABELS)
    torch.testing.assert_close(result, f(X, W, LABELS))


@pytest.mark.parametrize(
    "labels_of",
    [
        lambda h: h.argmax(-1),
        lambda h: h.argmax(-1, keepdim=True).squeeze(-1),
        lambda h: h.max(-1).indices,
        lambda h: h.topk(1).indices[..., 0],
    ],
    ids=["argmax", "argmax_kept", "max", "topk"],
)
def test_labels_that_the_graph_computes(run_liger, labels_of):
    """As in self-training: the reductions have terms, of which the graph holds a view alone."""

    def f(x, w, h):
        return F.cross_entropy(F.linear(x, w).view(-1, V), labels_of(h).view(-1))

    h = torch.randn(3, 6, V)
    result, (report,) = run_liger(f, X, W, h)
    torch.testing.assert_close(result, f(X, W, h))
    assert [site.kind for site in report.sites] == ["replace"]


@pytest.mark.parametrize("frozen", [(0,), (1,)])
def test_frozen_input_or_head(liger_is_as_right_as_eager, frozen):
    liger_is_as_right_as_eager(hugging_face, X, W, LABELS, frozen=frozen)


def test_the_report_states_the_saved_memory(run_liger):
    _, (report,) = run_liger(hugging_face, X.clone().requires_grad_(), W, LABELS)
    assert report.saved_bytes == 3 * 6 * V * 4


def test_returned_logits_prevent_fusion_and_are_reported(run_liger):
    def f(x, w, labels):
        logits = F.linear(x, w)
        return F.cross_entropy(logits.float().view(-1, V), labels.view(-1)), logits

    result, (report,) = run_liger(f, X, W, LABELS, policy="auto", logits="eager")
    (site,) = report.sites
    assert site.kind == "leave" and site.pattern.startswith("linear_cross_entropy.")
    assert "the logits are used elsewhere (the graph returns them)" in site.reason
    torch.testing.assert_close(result, f(X, W, LABELS))


def test_a_second_loss_on_the_logits_prevents_it(run_liger):
    def f(x, w, labels):
        logits = F.linear(x, w)
        return F.cross_entropy(logits.view(-1, V), labels.view(-1)) + logits.square().mean()

    result, (report,) = run_liger(f, X, W, LABELS, policy="auto")
    (site,) = report.sites
    assert site.kind == "leave" and "reads them" in site.reason
    torch.testing.assert_close(result, f(X, W, LABELS))


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(run_liger, inside):
    def f(x, w, labels):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return hugging_face(x, w, labels)

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        result, (report,) = run_liger(f, X, W, LABELS, inner="aot_eager")
        expected = f(X, W, LABELS)
    assert [site.kind for site in report.sites] == ["replace"]
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)


def test_dynamic_lengths():
    compiled = torch.compile(
        shifted_logits,
        backend="liger",
        dynamic=True,
        options={"liger.inner": "aot_eager", "liger.strict": True},
    )
    for length in (5, 7, 9):
        x, labels = torch.randn(2, length, H), torch.randint(0, V, (2, length))
        torch.testing.assert_close(compiled(x, W, labels), shifted_logits(x, W, labels))


def test_the_budget_for_logits_reaches_the_op(run_liger, monkeypatch):
    budgets = []
    loss = functional.linear_cross_entropy
    monkeypatch.setattr(
        functional,
        "linear_cross_entropy",
        lambda *a, memory, **k: budgets.append(memory) or loss(*a, memory=memory, **k),
    )
    for chosen in (None, 4096):
        torch._dynamo.reset()
        result, _ = run_liger(hugging_face, X, W, LABELS, loss_memory=chosen)
        torch.testing.assert_close(result, hugging_face(X, W, LABELS))
    assert budgets == [None, 4096]


@pytest.mark.parametrize(
    "function", [nanogpt, shifted_logits, classes_second, smoothed, weighted_tokens, cohere]
)
@pytest.mark.parametrize("wrong", [V, -7])
def test_a_label_that_is_no_class_raises_what_eager_raises(run_liger, function, wrong):
    labels = LABELS.clamp(min=-1) if function is nanogpt else LABELS.clone()
    labels[1, 4] = wrong
    with pytest.raises(IndexError) as eager:
        function(X, W, labels)
    with pytest.raises(IndexError) as found:
        run_liger(function, X, W, labels)
    assert str(found.value) == str(eager.value)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_label_that_is_no_class_raises_in_a_compiled_step(run_liger, inner):
    labels = LABELS.clone()
    labels[1, 4] = V
    with pytest.raises(IndexError, match=f"Target {V} is out of bounds"):
        run_liger(hugging_face, X.clone().requires_grad_(), W, labels, inner=inner)


def test_a_cap_of_zero_is_no_cap(run_liger):
    def f(x, w, labels):
        logits = torch.tanh(F.linear(x, w).float() / 30.0) * 0.0
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    result, _ = run_liger(f, X, W, LABELS)
    torch.testing.assert_close(result, f(X, W, LABELS))


@pytest.mark.parametrize(
    ("device", "mib", "is_left"),
    [("cuda", 128, True), ("cuda", 129, False), ("cuda", None, False), ("cpu", 1, False)],
)
def test_few_logits_are_left_to_inductor_on_a_gpu(device, mib, is_left):
    reason = few_logits(torch.device(device), mib and mib * 2**20)
    assert (reason is not None) == is_left
    assert not is_left or "128.0 MiB" in reason
