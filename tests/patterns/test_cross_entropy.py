"""Losses over logits that exist already."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import liger_compile
from liger_compile.patterns import cross_entropy, profit

torch.manual_seed(0)

LOGITS = torch.randn(3, 5, 32)
LABELS = torch.randint(0, 32, (3, 5))
LABELS[0, :2] = -100


def hugging_face(logits, labels):
    return F.cross_entropy(logits.float().view(-1, 32), labels.view(-1), ignore_index=-100, reduction="mean")


SPELLINGS = {
    "hugging face": (hugging_face, "upcast"),
    "module": (lambda x, y: torch.nn.CrossEntropyLoss()(x.view(-1, 32), y.view(-1)), "as_is"),
    "classes second": (lambda x, y: F.cross_entropy(x.transpose(1, 2), y), "as_is"),
    "log softmax": (lambda x, y: F.nll_loss(F.log_softmax(x.float(), -1).view(-1, 32), y.view(-1)), "upcast"),
    "sum": (lambda x, y: F.cross_entropy(x.flatten(0, 1).float(), y.flatten(), reduction="sum"), "upcast"),
    "none": (lambda x, y: F.cross_entropy(x.flatten(0, 1).float(), y.flatten(), reduction="none"), "upcast"),
    "smoothing": (lambda x, y: F.cross_entropy(x.view(-1, 32), y.view(-1), label_smoothing=0.1), "as_is"),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings_are_one_site_with_the_numbers(liger_is_as_right_as_eager, name, dtype):
    function, pattern = SPELLINGS[name]
    liger_is_as_right_as_eager(function, LOGITS.to(dtype), LABELS)
    (report,) = liger_compile.reports()
    (site,) = report.sites
    assert site.kind == "replace" and site.pattern in (f"cross_entropy.{pattern}", "cross_entropy.upcast")


def test_class_weights(run_liger, liger_is_as_right_as_eager):
    def f(logits, labels, weight):
        return F.cross_entropy(logits.view(-1, 32), labels.view(-1), weight)

    _, (report,) = run_liger(f, LOGITS, LABELS, torch.rand(32))
    assert [site.kind for site in report.sites] == ["replace"]
    torch._dynamo.reset()
    liger_is_as_right_as_eager(f, LOGITS, LABELS, torch.rand(32), frozen=(2,))


def test_logits_may_be_needed_elsewhere_too(run_liger):
    def f(x, labels):
        logits = torch.tanh(x)
        return hugging_face(logits, labels), logits

    result, (report,) = run_liger(f, LOGITS, LABELS)
    (site,) = report.sites
    assert site.kind == "replace"
    torch.testing.assert_close(result, f(LOGITS, LABELS))


def test_inductors_own_loss_is_faster_on_a_cpu(run_liger):
    result, (report,) = run_liger(hugging_face, LOGITS, LABELS, policy="auto")
    (site,) = report.sites
    assert site.kind == "leave" and "on a CPU" in site.reason
    torch.testing.assert_close(result, hugging_face(LOGITS, LABELS))


def test_probabilities_as_targets_are_left(run_liger):
    def f(logits, target):
        return F.cross_entropy(logits.view(-1, 32), target.view(-1, 32))

    target = torch.rand(3, 5, 32).softmax(-1)
    result, (report,) = run_liger(f, LOGITS, target)
    assert not report.sites
    torch.testing.assert_close(result, f(LOGITS, target))


class Found(dict):
    """What a profit rule reads of a match on a GPU."""

    captures = property(dict.keys)
    result = property(lambda self: self["logits"])


@pytest.mark.parametrize(("tokens", "is_left"), [(2048, True), (8192, False)])
def test_few_logits_are_left_to_inductor_also_after_an_upcast(monkeypatch, tokens, is_left):
    """125 MiB in bfloat16: as many launches with the cast before the op as with the cast in it."""
    monkeypatch.setattr(profit, "has_kernel", lambda *_: True)
    (pattern, *_) = (pattern for pattern in cross_entropy.PATTERNS if pattern.name == "cross_entropy.as_is")
    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float32):
            match = Found(logits=torch.empty(tokens, 32000, dtype=dtype, device="cuda"))
            assert ("Inductor launches fewer kernels" in str(pattern.profit(match))) == is_left
