"""The spelling fuzzer on every built-in pattern: no rewrite is wrong, and most respellings are replaced.

Seeds are fixed, so that a run is the same everywhere. What a respelling is made of stands in liger_compile/testing.
"""

import collections
import math
from random import Random

import pytest
import torch

from liger_compile.registry import default_patterns
from liger_compile.testing import assert_mutant_is_safe, assert_respelling_matches

# The share of respellings that are replaced, at least. A respelling changes most calls at once, so that one spelling
# which the normal form does not know (docs/known_gaps.md) leaves the whole; for rotary these are many today.
REPLACED = {
    "add_rms_norm": 0.75,
    "rms_norm": 0.9,
    "rotary": 0.2,
    "gated_mlp": 0.7,
    "linear_cross_entropy": 0.75,
    "cross_entropy": 0.9,
}

EACH_OP, EACH_PATTERN = 200, 15  # choices, of respellings and of mutants

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


def seeds(name):
    return range(max(EACH_PATTERN, math.ceil(EACH_OP / NUM_OF_OP[name.split(".")[0]])))


@pytest.mark.parametrize("op", REPLACED)
def test_respellings_are_replaced_and_right(op):
    missed, total = [], 0
    for name in (name for name in PATTERNS if name.split(".")[0] == op):
        for seed in seeds(name):
            total += 1
            try:
                assert_respelling_matches(PATTERNS[name], Random(seed), **SETTINGS[name])
            except AssertionError as error:
                if not str(error).startswith("this spelling of"):  # it was replaced, by something wrong
                    raise
                missed.append(f"{name}, seed {seed}: {error}")
    assert total >= EACH_OP
    assert len(missed) <= (1 - REPLACED[op]) * total, "\n".join(missed[:3])


@pytest.mark.parametrize("op", REPLACED)
def test_mutants_are_refused_or_right(op):
    made = 0
    for name in (name for name in PATTERNS if name.split(".")[0] == op):
        made += sum(
            assert_mutant_is_safe(PATTERNS[name], Random(seed), **SETTINGS[name]) for seed in seeds(name)
        )
    assert made >= EACH_OP / 2  # not every choice makes one that runs
