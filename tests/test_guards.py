"""Sizes that are known at run time only: no guard of ours is on them, and what depends on them is said."""

from __future__ import annotations

import logging

import pytest
import torch

import liger_compile
from liger_compile import Pattern
from liger_compile.graphs.aliasing import Mutations
from liger_compile.graphs.guards import GuardError, no_guards
from liger_compile.patterns import rotary
from liger_compile.terms.build import Terms

pytestmark = pytest.mark.usefixtures("guards_of_ours")


def compiled(function, *patterns):
    options = {
        "liger.inner": "eager",
        "liger.strict": True,
        "liger.policy": "always",
        "liger.patterns": patterns,
    }
    return torch.compile(function, backend="liger", options=options, dynamic=True)


def told():
    reports = liger_compile.reports()
    sites = [f"{site.pattern}: {site.reason}" for report in reports for site in report.sites]
    return sites + [f"{near.pattern}: {near.reason}" for report in reports for near in report.near_misses]


def tables(channels):
    angles = torch.rand(5, channels)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    "layout", [rotary.half_tables, rotary.interleaved_tables, rotary.half, rotary.to_half]
)
def test_heads_of_any_size(layout):
    """Whether half of the channels is half, only a guard could say."""
    width = 1 if layout is rotary.half else 2
    function = compiled(layout)
    for channels in (8, 12, 20):
        x = torch.randn(2, 5, channels)
        cos, sin = tables(channels // width)
        torch.testing.assert_close(function(x, cos, sin), layout(x, cos, sin))
    assert len(liger_compile.reports()) == 1  # compiled once, for all


def test_a_check_that_only_a_guard_answers_refuses():
    cos, sin = tables(8)
    compiled(rotary.half_tables)(torch.randn(2, 5, 16), cos, sin)
    assert any("whether it may be replaced: it depends on sizes" in line for line in told()), told()


def test_a_search_that_needs_a_guard_is_reported():
    freqs = torch.polar(torch.ones(5, 8), torch.rand(5, 8))
    compiled(rotary.complex_)(torch.randn(2, 5, 16), freqs)
    assert any("rotary.complex: whether it is this computation for all sizes" in line for line in told()), (
        told()
    )


def replacing(**functions):
    examples = {"x": torch.empty(2, 8), "y": torch.empty(2, 8)}
    return Pattern(
        "hypot.own",
        lambda x, y: torch.sqrt(x * x + y * y),
        lambda x, y: torch.hypot(x, y),
        examples,
        **functions,
    )


OWN = {
    "check": lambda match: "not even" if match["x"].shape[-1] % 2 else None,
    "profit": lambda match: "too small" if match["x"].numel() < 1000 else None,
}


@pytest.mark.parametrize("name", OWN)
def test_functions_of_a_users_pattern(name):
    options = {
        "liger.inner": "eager",
        "liger.strict": True,
        "liger.patterns": (replacing(**{name: OWN[name]}),),
    }
    function = torch.compile(
        lambda x, y: torch.sqrt(x * x + y * y), backend="liger", options=options, dynamic=True
    )
    for width in (8, 9):
        x, y = torch.randn(3, width), torch.randn(3, width)
        torch.testing.assert_close(function(x, y), torch.hypot(x, y))
    assert len(liger_compile.reports()) == 1  # compiled once, for both
    words = {"check": "whether it may be replaced", "profit": "whether it pays"}
    assert any(words[name] in line for line in told()), told()


def test_bytes_that_depend_on_sizes_are_not_known():
    pattern = replacing(saves=lambda match: match["x"].numel() if match["x"].shape[0] > 2 else 0)
    compiled(lambda x, y: torch.sqrt(x * x + y * y), pattern)(torch.randn(3, 8), torch.randn(3, 8))
    (report,) = liger_compile.reports()
    assert report.count("replace") == 1 and report.saved_bytes == 0


def test_every_value_of_a_graph_can_be_looked_up():
    """Sizes, their arithmetic and flags of them: hashing a symbolic number would fail, or take a guard."""
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        terms = Terms(gm.graph, Mutations(gm.graph))
        assert len({terms.of[node] for node in gm.graph.nodes if node.op != "output"}) > 3
        return gm.forward

    def f(x, scale):
        size = x.size()[:-1] + (3, -1)  # noqa: RUF005 - as transformers' Conv1D has it
        half = x.shape[0] // 2
        return x.view(size) * scale, x[:half] * half, x.shape

    torch.compile(f, backend=backend, dynamic=True, fullgraph=True)(torch.randn(4, 5, 6), 0.5)
    assert graphs


def test_a_refused_guard_is_not_logged():
    """torch's operators log an error with its stack, although the caller answers it."""
    log, seen = logging.getLogger("torch._subclasses.fake_tensor"), []

    def backend(gm, _):
        with no_guards(next(iter(gm.graph.find_nodes(op="output"))).args[0][0].meta["example_value"]):
            seen.append(log.disabled)
        seen.append(log.disabled)
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(torch.randn(4, 5))
    assert seen == [True, False]


def test_a_question_that_is_decided_needs_no_guard():
    def backend(gm, _):
        values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
        (x,) = (value for value in values if isinstance(value, torch.Tensor))
        with no_guards(x):
            assert x.shape[0] > 0 and x.shape[0] == x.shape[0]
            with pytest.raises(GuardError, match="known at run time only"):
                bool(x.shape[0] == 7)
        before = len(x.fake_mode.shape_env.guards)
        assert not bool(x.shape[0] == 7) and len(x.fake_mode.shape_env.guards) == before + 1  # as it was
        return gm.forward

    torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.randn(4, 5))
