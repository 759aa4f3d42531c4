"""Programs that compile the model and write the loss in eager code: three steps are those of eager mode, and nothing
allocates memory for the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liger_compile

B, T, H, V = 4, 12, 16, 80


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.head = (
            nn.Embedding(V, H),
            nn.Linear(H, H),
            nn.Linear(H, V, bias=False),
        )
        nn.init.normal_(self.head.weight, std=0.4)

    def forward(self, ids):
        return self.head(torch.tanh(self.layer(self.embedding(ids))))


def selected(logits, ids):
    """As TRL's selective_log_softmax, in both of its forms."""
    index = ids.unsqueeze(-1)
    if logits.dtype is torch.float32:
        chosen = torch.gather(logits, dim=-1, index=index).squeeze(-1)
        return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    pairs = zip(logits, index, strict=True)
    rows = [F.log_softmax(row, dim=-1).gather(dim=-1, index=labels).squeeze(-1) for row, labels in pairs]
    return torch.stack(rows)


def entropy(logits, chunk=8):
    """As TRL's entropy_from_logits."""
    parts = []
    for part in logits.reshape(-1, logits.shape[-1]).split(chunk, dim=0):
        logp = F.log_softmax(part, dim=-1)
        parts.append(-(torch.exp(logp) * logp).sum(-1))
    return torch.cat(parts).reshape(logits.shape[:-1])


def preferences(model, reference, batch):
    """DPO: the first half of the rows is preferred to the second half."""

    def sums(model):
        logits = model(batch["ids"])
        logps = selected(logits[:, :-1], batch["ids"][:, 1:]) * batch["mask"][:, 1:]
        return logps.sum(-1), logits

    (policy, logits), (before, _) = sums(model), (x.detach() for x in sums(reference))
    chosen, rejected = (policy - before).chunk(2)
    metrics = [logits.detach().float().logsumexp(-1).mean()]
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean(), metrics


def policy(model, reference, batch):
    """GRPO: the last tokens, a temperature in place, ratios to old log-probabilities, a metric without gradients."""

    def logps(model, has_entropy):
        logits = model(batch["ids"])[:, :-1, :]
        logits = logits[:, -6:]
        logits.div_(0.9)
        labels = batch["ids"][:, -6:]
        found = selected(logits, labels)
        with torch.no_grad():
            return found, entropy(logits) if has_entropy else None

    new, metric = logps(model, True)
    with torch.no_grad():
        old = logps(reference, False)[0]
    ratio = torch.exp(new - old)
    advantages = batch["advantages"].unsqueeze(1)
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    divergence = torch.exp(old - new) - (old - new) - 1
    mask = batch["mask"][:, -6:]
    return ((0.04 * divergence - gain) * mask).sum() / mask.sum(), [metric.mean()]


def desirable(model, reference, batch):
    """KTO: each row is desirable or not."""

    def sums(model):
        logps = model(batch["ids"])[:, :-1].log_softmax(-1)
        chosen = torch.gather(logps, dim=2, index=batch["ids"][:, 1:].unsqueeze(2)).squeeze(2)
        return (chosen * batch["mask"][:, 1:]).sum(-1)

    with torch.no_grad():
        before = sums(reference)
    margin = 0.1 * (sums(model) - before)
    return (1 - torch.sigmoid(margin * batch["advantages"].sign())).mean(), []


def distillation(model, reference, batch):
    """The student's loss, and a divergence from the teacher at a temperature."""
    logits = model(batch["ids"])
    with torch.no_grad():
        taught = reference(batch["ids"])
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, V), batch["labels"][:, 1:].reshape(-1))
    student, teacher = F.log_softmax(logits / 2, dim=-1), F.softmax(taught / 2, dim=-1)
    return loss + 4 * F.kl_div(student.view(-1, V), teacher.view(-1, V), reduction="batchmean"), []


def smoothed(model, reference, batch):
    """As the Trainer of transformers with label smoothing, and argmax before its metrics."""
    logits = model(batch["ids"])
    shifted, labels = logits[..., :-1, :].contiguous(), batch["labels"][..., 1:]
    logp = -F.log_softmax(shifted, dim=-1)
    labels = labels.unsqueeze(-1)
    padding = labels.eq(-100)
    nll = logp.gather(dim=-1, index=torch.clamp(labels, min=0)).masked_fill_(padding, 0.0)
    smooth = logp.sum(dim=-1, keepdim=True, dtype=torch.float32).masked_fill_(padding, 0.0)
    count = padding.numel() - padding.long().sum()
    loss = 0.9 * nll.sum() / count + 0.1 * smooth.sum() / (count * V)
    return loss, [logits.argmax(dim=-1).float().mean()]


def by_hand(model, reference, batch):
    """As a person writes it: a loss, a z-loss, an entropy bonus, and an accuracy."""
    logits = model(batch["ids"]).float()[:, :-1]
    labels = batch["labels"][:, 1:]
    is_label = labels != -100
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    p = torch.softmax(logits, dim=-1)
    bonus = (torch.logsumexp(logits, dim=-1) - (p * logits).sum(-1)).mean()
    accuracy = (logits.argmax(-1) == labels)[is_label].float().mean()
    return loss + 1e-3 * logits.logsumexp(-1).square().mean() - 0.01 * bonus, [accuracy]


PROGRAMS = (preferences, policy, desirable, distillation, smoothed, by_hand)


def batch_of(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (B, T), generator=generator)
    mask = (torch.rand(B, T, generator=generator) > 0.2).float()
    labels = ids.masked_fill(mask == 0, -100)
    return {"ids": ids, "mask": mask, "labels": labels, "advantages": torch.randn(B, generator=generator)}


def trained(program, prepared, dtype):
    """The losses and metrics of three steps, the parameters, and what allocates memory for logits in the last step."""
    torch.manual_seed(0)
    model, reference = Model().to(dtype), Model().to(dtype).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # Adam scales rounding errors up
    call, call_reference, seen = prepared(model), prepared(reference), []

    def step(number):
        loss, metrics = program(call, call_reference, batch_of(number))
        loss.backward()
        seen.append([each.detach().float() for each in (loss, *metrics)])
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    step(1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(2)
    least = B * 6 * V * dtype.itemsize  # the logits of the last six tokens
    large = [
        event.name
        for event in profile.events()
        if event.self_cpu_memory_usage >= least and not is_ours(event)
    ]
    return seen, [parameter.detach() for parameter in model.parameters()], large


def is_ours(event):
    """Whether an operation is part of one of our ops, which hold a chunk of logits."""
    while event is not None:
        if event.name.startswith("liger_compile::"):
            return True
        event = event.cpu_parent
    return False


def compiled(inner):
    options = {"liger.inner": inner, "liger.strict": True, "liger.logits": "lazy"}
    return lambda model: torch.compile(model, backend="liger", options=options)


@pytest.mark.parametrize("program", PROGRAMS)
def test_three_steps_are_those_of_eager_without_the_logits(program):
    got, parameters, large = trained(program, compiled("aot_eager"), torch.float32)
    expected, eager, large_in_eager = trained(program, lambda model: model, torch.float32)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(parameters, eager, rtol=1e-4, atol=1e-5)
    assert large_in_eager and not large
    assert not any(report.late_notes for report in liger_compile.reports())


@pytest.mark.parametrize("program", [preferences, policy])
def test_in_bfloat16(program):
    got, parameters, large = trained(program, compiled("aot_eager"), torch.bfloat16)
    expected, eager, _ = trained(program, lambda model: model, torch.bfloat16)
    torch.testing.assert_close(got[0], expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(parameters, eager, rtol=5e-2, atol=5e-2)
    assert not large


def test_with_inductor():
    got, parameters, large = trained(policy, compiled("inductor"), torch.float32)
    expected, eager, _ = trained(policy, lambda model: model, torch.float32)
    torch.testing.assert_close((got, parameters), (expected, eager), rtol=1e-4, atol=1e-5)
    assert not large


def test_an_evaluation_by_log_probabilities():
    """As lm-eval: log_softmax of the batch, then the continuation of each row, its sum and its argmax."""

    def scores(model):
        found = []
        with torch.inference_mode():
            ids = batch_of(0)["ids"]
            every = F.log_softmax(model(ids), dim=-1, dtype=None)
            for row, tokens in zip(every, ids, strict=True):
                part = row[T - 5 : T - 1].unsqueeze(0)
                wanted = tokens[T - 4 :].unsqueeze(0)
                greedy = part.argmax(dim=-1)
                chosen = torch.gather(part, 2, wanted.unsqueeze(-1)).squeeze(-1)
                found.append((float(chosen.sum()), bool((greedy == wanted).all())))
        return found

    torch.manual_seed(0)
    model = Model()
    got, expected = scores(compiled("aot_eager")(model)), scores(model)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert not any(report.late_notes for report in liger_compile.reports())


def test_by_default_a_graph_without_a_loss_returns_logits():
    model = Model()
    options = {"liger.inner": "aot_eager", "liger.strict": True}
    logits = torch.compile(model, backend="liger", options=options)(batch_of(0)["ids"])
    assert type(logits) is torch.Tensor


def test_the_report_names_what_needs_the_values():
    torch.manual_seed(0)
    model = compiled("aot_eager")(Model())
    for _ in range(2):
        model(batch_of(0)["ids"]).square().mean().backward()
    (report,) = liger_compile.reports()
    (note,) = report.late_notes
    assert "square at" in note and "test_losses_outside.py:" in note
    assert note in " ".join(str(report).split()) and report.to_dict()["late_notes"] == [note]


@pytest.mark.slow
def test_the_trainer_of_transformers_with_label_smoothing_and_metrics(tmp_path):
    """Needs accelerate. The parameters and metrics of three steps are those of eager mode."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")

    def run(prepare):
        transformers.set_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        model = transformers.LlamaForCausalLM(config)
        prepare(model)
        rows = [
            {"input_ids": row, "labels": row} for row in torch.cat([batch_of(i)["ids"] for i in range(3)])
        ]
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=B,
            per_device_eval_batch_size=B,
            max_steps=3,
            label_smoothing_factor=0.1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            learning_rate=1e-2,
            optim="sgd",
        )
        trainer = transformers.Trainer(
            model,
            settings,
            train_dataset=rows,
            eval_dataset=rows,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
            compute_metrics=lambda results: {
                "accuracy": float((results.predictions == results.label_ids).mean())
            },
        )
        trainer.train()
        return trainer.evaluate(), [parameter.detach() for parameter in model.parameters()]

    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.logits": "lazy"}
    metrics, parameters = run(lambda model: model.compile(backend="liger", options=options))
    expected, eager = run(lambda model: None)
    torch.testing.assert_close(parameters, eager, rtol=1e-4, atol=1e-6)
    for name in ("eval_loss", "eval_accuracy"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4)
    assert not any(report.late_notes for report in liger_compile.reports())
