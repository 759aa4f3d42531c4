"""Logits that are computed late from the results of a CUDA graph, which the next replay overwrites."""

import copy

import pytest
import torch
import torch.nn.functional as F

import liger_compile
from liger_compile.runtime.lazy import LazyTensor

pytestmark = pytest.mark.gpu
OPTIONS = {"liger.mode": "reduce-overhead", "liger.policy": "always", "liger.strict": True}
STEPS = 6  # CUDA graphs run eagerly at first, then record, then replay


class Head(torch.nn.Module):
    """A layer, a head and its loss, as in a causal language model."""

    def __init__(self, classes=512, hidden=64):
        super().__init__()
        self.layer = torch.nn.Linear(hidden, hidden)
        self.head = torch.nn.Linear(hidden, classes, bias=False)

    def forward(self, x, labels):
        logits = self.head(torch.tanh(self.layer(x)))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()), logits


@pytest.fixture
def twins():
    """A compiled model and an equal one, each with its optimizer; and a function that returns the inputs of a step."""
    torch._dynamo.reset()
    liger_compile.clear_reports()
    torch.manual_seed(0)
    model = Head().cuda()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.5, fused=True) for one in (model, twin)]

    def inputs(step):
        random = torch.Generator().manual_seed(step)
        x = torch.randn(4, 32, 64, generator=random)
        return x.cuda(), torch.randint(512, (4, 32), generator=random).cuda()

    return torch.compile(model, backend="liger", options=OPTIONS), optimizers[0], twin, optimizers[1], inputs


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("read", ["after forward", "after backward", "after the step", "never"])
def test_logits_are_those_of_their_step(twins, read):
    model, optimizer, twin, other, inputs = twins
    for step in range(STEPS):
        loss, logits = model(*inputs(step))
        assert isinstance(logits, LazyTensor)
        expected, expected_logits = twin(*inputs(step))
        if read == "after forward":
            close(logits.detach() + 0, expected_logits.detach())
        loss.backward()
        expected.backward()
        if read == "after backward":
            close(logits.detach() + 0, expected_logits.detach())
        optimizer.step()
        other.step()
        if read == "after the step":
            close(logits.detach() + 0, expected_logits.detach())
        close(loss.detach(), expected.detach())
        optimizer.zero_grad()
        other.zero_grad()
    for same, weight in zip(model.parameters(), twin.parameters(), strict=True):
        close(same, weight)
    assert "linear_cross_entropy" in str(liger_compile.reports()[0])


def test_a_second_loss_of_the_logits(twins):
    model, optimizer, twin, other, inputs = twins
    for step in range(STEPS):
        for one, its in ((model, optimizer), (twin, other)):
            loss, logits = one(*inputs(step))
            (loss + logits.float().square().mean()).backward()
            its.step()
            its.zero_grad()
    for same, weight in zip(model.parameters(), twin.parameters(), strict=True):
        close(same, weight)


def test_two_calls_before_a_backward(twins):
    model, optimizer, twin, other, inputs = twins
    for step in range(0, 2 * STEPS, 2):
        for one, its in ((model, optimizer), (twin, other)):
            (first, logits), (second, _) = one(*inputs(step)), one(*inputs(step + 1))
            (first + second + logits.float().mean()).backward()
            its.step()
            its.zero_grad()
    for same, weight in zip(model.parameters(), twin.parameters(), strict=True):
        close(same, weight)


@pytest.mark.parametrize("steps", [2, 3, STEPS])
def test_logits_of_an_earlier_call_are_an_error_or_right(twins, steps):
    model, optimizer, twin, _, inputs = twins
    kept, expected = [], []
    for step in range(steps):
        loss, logits = model(*inputs(step))
        kept.append(logits)
        with torch.no_grad():
            expected.append(twin(*inputs(step))[1])
        loss.backward()
        optimizer.zero_grad()
    close(kept[-1].detach() + 0, expected[-1])
    for logits, right in zip(kept[:-1], expected[:-1], strict=True):
        try:
            close(logits.detach() + 0, right)
        except RuntimeError as error:
            assert "CUDA graph" in str(error) or "changed" in str(error)
