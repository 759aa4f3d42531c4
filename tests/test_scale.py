"""Time in proportion to the graph, and no recursion as deep as it: graphs of 10,000 nodes and more.

Dynamo, AOTAutograd and Inductor have limits of their own, so the graphs are recorded without them and go through the
backend's steps alone.
"""

from __future__ import annotations

import gc
import json
import time

import pytest

import liger_compile
from liger_compile.backend import liger
from liger_compile.patterns import DEFAULT_PATTERNS

from .large_graphs import KINDS, recorded

SMALL, LARGE = 2500, 10_000
# Linear is 4, with what a logarithm, a dictionary that grows and a cold cache add; quadratic is 16.
MOST = 8.0
# The time of a node is what is measured, not that of a pattern: one of each form is enough for most.
FEW = frozenset(
    (
        "rms_norm.llama",
        "add_rms_norm.llama",
        "rotary.half_pair",
        "rotary.half",
        "gated_mlp.swiglu",
        "attention.causal",
        "linear_cross_entropy.plain",
        "cross_entropy.as_is",
    )
)
SKIPPED = tuple(pattern.name for pattern in DEFAULT_PATTERNS if pattern.name not in FEW)


def rewrite(kind: str, nodes: int, skip: tuple[str, ...] = SKIPPED) -> liger_compile.GraphReport:
    gm, inputs = recorded(KINDS[kind], nodes)
    options = {"liger.inner": "eager", "liger.strict": True, "liger.policy": "always", "liger.skip": skip}
    liger(gm, inputs, options=options)
    return liger_compile.reports()[-1]


def seconds(run, *args) -> float:
    """Of the processor, without what collecting garbage takes, which depends on all that is in memory."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        run(*args)
        return time.process_time() - start
    finally:
        gc.enable()


def assert_linear(prepared, run) -> None:
    """`run` of what `prepared` gives takes in proportion to the number of nodes. What else happens on the machine only
    adds, so that the shortest of several counts, if the first is not short enough."""
    small = large = float("inf")
    for _ in range(3):
        small = min(small, seconds(run, *prepared(SMALL)))
        large = min(large, seconds(run, *prepared(LARGE)))
        if large <= MOST * small:
            return
    pytest.fail(
        f"{SMALL} nodes take {small:.2f} s, {LARGE} take {large:.2f} s: {large / small:.1f} times as long"
    )


def rewritten(gm, inputs) -> None:
    options = {"liger.inner": "eager", "liger.strict": True, "liger.policy": "always", "liger.skip": SKIPPED}
    liger(gm, inputs, options=options)
    report = liger_compile.reports()[-1]
    assert str(report) and json.dumps(report.to_dict())


@pytest.fixture(autouse=True)
def traced():
    """What is done once in a process: patterns are traced, modules imported."""
    rewrite("gated_mlps", 50)


@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind) -> None:
    assert_linear(lambda nodes: recorded(KINDS[kind], nodes), rewritten)
