"""The spelling fuzzer on every built-in pattern: respellings are replaced, mutants are refused or right.

The choices are hypothesis's, the same in every run. A failure shows the smallest graph that it was shrunk to.
"""

import collections
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from liger_compile.registry import default_patterns
from liger_compile.testing import assert_mutant_is_safe, assert_respelling_matches
from liger_compile.testing.fuzzer import Choices

EACH_OP, EACH_PATTERN = 200, 15  # examples, of respellings and of mutants

CHOICES = st.binary(min_size=1024, max_size=1024).map(Choices)

PATTERNS = {pattern.name: pattern for pattern in default_patterns()}
NUM_OF_OP = collections.Counter(name.split(".")[0] for name in PATTERNS)

# What the fuzzer cannot guess: what the ops make no gradient for, and class weights, which are positive and have the
# dtype of the logits at the loss.
FROZEN = {
    "rotary": ("cos", "sin", "freqs"),
    "linear_cross_entropy": ("class_weight",),
    "cross_entropy": ("weight",),
}
CLASS_WEIGHT = {"linear_cross_entropy": "class_weight", "cross_entropy": "weight"}


def settings_of(name):
    op = name.split(".")[0]
    weight = torch.linspace(0.5, 2, 11) if "upcast" in name else None
    values = (
        {CLASS_WEIGHT[op]: (None, weight), "reduction": ("mean", "sum", "none")} if op in CLASS_WEIGHT else {}
    )
    if "ignore_index" in PATTERNS[name].parameters:
        values |= {"label_smoothing": (0.0, 0.1)}
    if name.startswith("gated_mlp.geglu"):
        values = {"approximate": ("tanh", "none")}
    return {"values": values, "frozen": FROZEN.get(op, ())}


SETTINGS = {name: settings_of(name) for name in PATTERNS}  # made once: samples are kept by them


def fuzzed(name):
    return settings(
        max_examples=max(EACH_PATTERN, math.ceil(EACH_OP / NUM_OF_OP[name.split(".")[0]])),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("name", PATTERNS)
def test_respellings_are_replaced(name):
    @fuzzed(name)
    @given(CHOICES)
    def check(random):
        assert_respelling_matches(PATTERNS[name], random, **SETTINGS[name])

    check()


@pytest.mark.parametrize("name", PATTERNS)
def test_mutants_are_refused_or_right(name):
    @fuzzed(name)
    @given(CHOICES)
    def check(random):
        assume(assert_mutant_is_safe(PATTERNS[name], random, **SETTINGS[name]))

    check()
