"""Random programs of eager code on lazy logits: values, gradients and errors are those of eager mode."""

import random

import torch
import torch.nn.functional as F

from tests.test_lazy_logits import Model, inputs

PROGRAMS, LENGTH = 120, 12


def tokens(t, rng):
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return torch.randint(t.shape[-1], t.shape[:-1], generator=generator)


def no_grad(function):
    def without(t, other, rng):
        with torch.no_grad():
            return function(t, other, rng)

    return without


# A tensor, another one, and random numbers -> a tensor.
STEPS = (
    lambda t, other, rng: t[:, :-1],
    lambda t, other, rng: t[1:],
    lambda t, other, rng: t[..., 1:-2],
    lambda t, other, rng: t[tokens(t, rng) % 2 == 0],
    lambda t, other, rng: t.reshape(-1, t.shape[-1]),
    lambda t, other, rng: t.view(-1, t.shape[-1]),
    lambda t, other, rng: t.transpose(0, 1),
    lambda t, other, rng: t.split(2)[rng.randrange(2)],
    lambda t, other, rng: list(t)[rng.randrange(2)],
    lambda t, other, rng: t.unsqueeze(0),
    lambda t, other, rng: t.squeeze(0),
    lambda t, other, rng: t.contiguous(),
    lambda t, other, rng: t.clone(),
    lambda t, other, rng: t.detach(),
    lambda t, other, rng: t.double(),
    lambda t, other, rng: t / rng.uniform(0.5, 2),
    lambda t, other, rng: t * rng.uniform(-0.5, 0.5),
    lambda t, other, rng: t.div_(rng.uniform(0.5, 2)),
    no_grad(lambda t, other, rng: t.mul_(rng.uniform(0.5, 2))),
    no_grad(lambda t, other, rng: t[..., 0].fill_(0.5)),
    lambda t, other, rng: -t,
    lambda t, other, rng: t.tanh(),
    lambda t, other, rng: t.exp(),
    lambda t, other, rng: t.log_softmax(-1),
    lambda t, other, rng: t.softmax(-1),
    lambda t, other, rng: t * other,
)
QUESTIONS = (
    lambda t, other, rng: t.gather(-1, tokens(t, rng).unsqueeze(-1)),
    no_grad(lambda t, other, rng: t.gather(-1, tokens(t, rng).unsqueeze(-1))),
    lambda t, other, rng: t.log_softmax(-1).gather(-1, tokens(t, rng).unsqueeze(-1)),
    lambda t, other, rng: t.logsumexp(-1),
    lambda t, other, rng: t.sum(-1, keepdim=True),
    lambda t, other, rng: t.mean(),
    lambda t, other, rng: t.argmax(-1),
    lambda t, other, rng: t.topk(2).values,
    lambda t, other, rng: F.cross_entropy(
        t.reshape(-1, t.shape[-1]), tokens(t, rng).reshape(-1), label_smoothing=rng.choice([0.0, 0.1])
    ),
    lambda t, other, rng: F.kl_div(
        t, other.detach(), log_target=True, reduction=rng.choice(["sum", "none"])
    ).sum(),
    lambda t, other, rng: t.square().sum(),
)
# Errors of eager code that an answer makes needless: backward needs no values that were overwritten.
OF_VALUES = ("one of the variables needed for gradient computation", "is a view and its base")


def outcome(make, seed):
    """The answers and errors of a program, the gradients, and all tensors at its end."""
    rng, (x, w, _) = random.Random(seed), inputs()
    tensors, answers = [make(x, w)], []
    for _ in range(rng.randint(3, LENGTH)):
        operation, t, other = rng.choice(STEPS + QUESTIONS), rng.choice(tensors), rng.choice(tensors)
        try:
            (answers if operation in QUESTIONS else tensors).append(operation(t, other, rng))
        except (RuntimeError, IndexError) as error:
            answers.append(type(error))
    parts = [each.double() for each in answers if isinstance(each, torch.Tensor) and each.is_floating_point()]
    total = sum((part * torch.linspace(-1, 2, part.numel()).view(part.shape)).sum() for part in parts)
    gradients = ()
    if isinstance(total, torch.Tensor) and total.requires_grad:
        try:
            gradients = torch.autograd.grad(total, (x, w), allow_unused=True)
        except RuntimeError as error:
            gradients = str(error)
    return answers, gradients, [each.detach() + 0 for each in tensors]


def is_close(got, expected):
    if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
        return got is expected
    for of in ("shape", "dtype", "requires_grad"):
        if getattr(got, of) != getattr(expected, of):
            return False
    if not expected.numel() or not expected.is_floating_point():
        return torch.equal(got, expected)
    size = expected.detach().nan_to_num(0, 0, 0).abs().max().clamp(min=1e-2)
    return torch.allclose(got / size, expected / size, rtol=1e-3, atol=2e-4, equal_nan=True)


def test_random_programs_are_those_of_eager(fuzz_seed):
    for seed in range(fuzz_seed * PROGRAMS, (fuzz_seed + 1) * PROGRAMS):
        (answers, gradients, tensors), expected = outcome(Model(), seed), outcome(F.linear, seed)
        assert len(answers) == len(expected[0]) and len(tensors) == len(expected[2]), seed
        pairs = [*zip(answers, expected[0], strict=True), *zip(tensors, expected[2], strict=True)]
        if isinstance(expected[1], str):
            assert gradients == expected[1] or any(text in expected[1] for text in OF_VALUES), seed
        else:
            assert len(gradients) == len(expected[1]), (seed, gradients)
            pairs += zip(gradients, expected[1], strict=True)
        assert all(is_close(got, wanted) for got, wanted in pairs), seed
