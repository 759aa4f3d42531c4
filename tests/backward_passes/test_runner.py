"""Passes over backward as users meet them: reported, skipped by name, counted by fuel, left out where they fail."""

from __future__ import annotations

import logging
from functools import cache, partial

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import liger_compile
from liger_compile import backend
from liger_compile.backward_passes import CHOICES, DEFAULT_PASSES, NAMES, Applied, Pass
from liger_compile.compile import BackwardPlan, compile_graph

pytestmark = pytest.mark.usefixtures("uncached")

TOKENS, HIDDEN, VOCABULARY = 96, 16, 64


class Layer(nn.Module):
    """Embedding, pre-norm, attention with rotated heads, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(3))
        angles = torch.rand(TOKENS, 4).repeat(1, 2)
        self.cos, self.sin = angles.cos()[None, None], angles.sin()[None, None]

    def rotated(self, x):
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat((-second, first), -1) * self.sin

    def forward(self, ids, labels):
        x = self.embedding(ids)
        x = x.sin()
        y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        q, k, v = (each(y).view(1, TOKENS, 2, 8).transpose(1, 2) for each in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True)
        x = x + out.transpose(1, 2).flatten(2)
        return F.cross_entropy(F.linear(x, self.embedding.weight)[0], labels[0])


def stepped(**options):
    """The gradients of one step, and its report."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    liger_compile.clear_reports()
    model, ids = Layer(), torch.randint(VOCABULARY, (1, TOKENS))
    settings = {"liger.policy": "always", "liger.backward_passes": "always", "liger.strict": True}
    settings.update({f"liger.{name}": value for name, value in options.items()})
    torch.compile(model, backend="liger", options=settings)(ids, ids).backward()
    (report,) = liger_compile.reports()
    return [parameter.grad for parameter in model.parameters()], report


@cache
def everything():
    """What all passes together do: gradients and report."""
    return stepped()


def applied(report):
    return [site.pattern for site in report.backward.sites]


@cache
def eager():
    torch.manual_seed(0)
    model, ids = Layer(), torch.randint(VOCABULARY, (1, TOKENS))
    model(ids, ids).backward()
    return [parameter.grad for parameter in model.parameters()]


def test_what_passes_did_is_in_the_report():
    gradients, report = everything()
    for one, other in zip(gradients, eager(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert {*applied(report)} >= {"backward.qkv_matmul", "backward.rms_norm"}
    assert list(report.backward.choices) == ["backward.early_free"]
    text = str(report)
    assert "In backward" in text and CHOICES["backward.early_free"] in " ".join(text.split())
    content = report.to_dict()["backward"]
    assert content["is_compiled"] and content["sites"][0]["pattern"] == "backward.qkv_matmul"
    assert content["sites"][0]["place"]["line"] > 0


def test_a_pass_that_is_skipped_leaves_the_graph_as_it_was():
    all_passes = applied(everything()[1])
    for name in dict.fromkeys(all_passes):
        gradients, report = stepped(skip=(name,))
        assert applied(report) == [each for each in all_passes if each != name]
        for one, other in zip(gradients, eager(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    _, nothing = stepped(skip=("backward",))
    assert applied(nothing) == [] and not nothing.backward.choices


@pytest.mark.parametrize("options", [{"backward_passes": "never"}, {"policy": "never"}])
def test_nothing_is_done_where_nothing_is_wanted(options):
    _, report = stepped(**options)
    assert not report.backward.is_compiled and not applied(report)
    assert "In backward" not in str(report)


def test_a_cpu_gets_none_of_it_by_default():
    _, report = stepped(backward_passes="auto")
    assert not report.backward.is_compiled and not report.backward.choices


def test_fuel_goes_on_into_backward():
    _, report = everything()
    forward, backward = report.count("replace") + report.count("annotate"), applied(report)
    for left in (0, 1):
        gradients, report = stepped(fuel=forward + left)
        assert applied(report) == backward[:left]
    for one, other in zip(gradients, eager(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    _, report = stepped(fuel=forward - 1)
    assert applied(report) == []


def fails(backward):
    raise ZeroDivisionError("on purpose")
    yield


def changes_then_fails(backward):
    (first, *_) = backward.graph.nodes
    yield Applied(first, "nothing")
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("broken", [fails, changes_then_fails])
def test_a_pass_that_fails_is_left_out_with_a_warning(broken):
    made = []
    passes = (Pass("backward.broken", broken), *DEFAULT_PASSES)

    def stepped(strict):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, ids = Layer(), torch.randint(VOCABULARY, (1, TOKENS))
        plan = BackwardPlan(passes, everywhere=True, strict=strict, made=made.extend)
        torch.compile(model, backend=partial(compile_graph, backward=plan))(ids, ids).backward()
        return [parameter.grad for parameter in model.parameters()]

    with pytest.warns(UserWarning, match=r"'backward\.broken' failed and is left out: .*on purpose"):
        gradients = stepped(strict=False)
    for one, other in zip(gradients, eager(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert [each.name for each, _ in made] == ["backward.broken"] * (broken is changes_then_fails)
    with pytest.raises(Exception, match="on purpose"):
        stepped(strict=True)


def test_an_op_that_cannot_be_inlined_stays(monkeypatch):
    def cannot(*args, **kwargs):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr("liger_compile.backward_passes.inline_late.make_fx", cannot)
    with pytest.warns(UserWarning, match="'backward.inline_late' failed"):
        gradients, _ = stepped(strict=False)
    for one, other in zip(gradients, eager(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_debug_logs_show_the_graph_before_and_after():
    class Records(logging.Handler):
        def emit(self, record):
            shown.append(record.getMessage())

    shown, logger = [], logging.getLogger("liger_compile")
    handler, level = Records(), logger.level
    logger.addHandler(
        handler
    )  # not caplog: torch's own setting of logs may keep records from the root logger
    logger.setLevel(logging.DEBUG)
    try:
        stepped()
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    first = next(text for text in shown if "changed the graph" in text)
    assert first.startswith("backward.qkv_matmul changed the graph of backward. Before:\n")
    before, after = first.split("\nAfter:\n")
    assert "rotary_backward_packed" in after and "rotary_backward_packed" not in before


def test_names_are_one_kind():
    assert len({*NAMES}) == len(NAMES) and all(name.startswith("backward.") for name in NAMES)


def test_verify_names_a_wrong_pass(monkeypatch):
    """Fuel finds it, as it finds a wrong rewrite of forward."""

    def wrong(backward):
        for node in backward.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            with backward.graph.inserting_after(node):
                twice = backward.graph.call_function(torch.ops.aten.mul.Tensor, (node, 2.0))
            twice.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(twice, delete_user_cb=lambda user, twice=twice: user is not twice)
            yield Applied(node, "a wrong factor")
            return

    passes = (*DEFAULT_PASSES, Pass("backward.wrong", wrong))
    monkeypatch.setattr("liger_compile.pipeline.DEFAULT_PASSES", passes)
    model, ids = Layer(), torch.randint(VOCABULARY, (1, TOKENS))
    options = {"liger.policy": "always", "liger.backward_passes": "always"}
    found = liger_compile.verify(model, ids, ids, options=options)
    assert not found and [site.pattern for site in found.culprits] == ["backward.wrong"]
    assert "\"liger.skip\": ('backward.wrong',)" in str(found)


def test_verify_names_the_choices_that_fuel_does_not_count(monkeypatch):
    """Nothing that fuel counts makes this difference: it is there without any."""
    compile_graph = backend.compiling.compile_graph

    def wrong(*args, **kwargs):
        compiled = compile_graph(*args, **kwargs)
        return lambda *inputs: [2 * compiled(*inputs)[0]]

    monkeypatch.setattr(backend.compiling, "compile_graph", wrong)
    model, ids = Layer(), torch.randint(VOCABULARY, (1, TOKENS))
    options = {"liger.policy": "always", "liger.backward_passes": "always"}
    found = liger_compile.verify(model, ids, ids, options=options)
    assert not found and not found.culprits
    assert "Fuel does not count the choices for backward ('backward.early_free')" in found.note
