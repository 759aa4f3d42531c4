"""The spelling fuzzer on built-in patterns: every respelling is replaced, and no rewrite is wrong.

Other choices every day, and other patterns; `--fuzz-seed` repeats a day. What a respelling is made of is in
liger_compile/testing. The slow tests take every pattern and search wider, and so does `liger_compile.testing.fuzz`.
"""

import collections
import math
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from liger_compile.registry import default_patterns
from liger_compile.testing import assert_mutant_is_safe, assert_respelling_matches
from liger_compile.testing.fuzzer import Choices
from liger_compile.testing.mutations import ROUNDINGS

PATTERNS = {pattern.name: pattern for pattern in default_patterns()}
OPS = collections.Counter(name.split(".")[0] for name in PATTERNS)
# How many respellings, and mutants, of each op: shared among the patterns of a day, or all.
by_least = pytest.mark.parametrize("least", [8, pytest.param(400, marks=pytest.mark.slow)])
by_op = pytest.mark.parametrize("op", OPS)
SHARE_A_DAY = (
    1 / 3
)  # of the patterns of an op, and at least two: the first example of a pattern takes longest

# What the fuzzer cannot guess: what the ops make no gradient for, and class weights, which are positive and have the
# dtype of the logits at the loss.
FROZEN = {
    "rotary": ("cos", "sin", "freqs"),
    "norm_rotary": ("cos", "sin"),
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


def random_choices(examples, fuzz_seed):
    """Runs a test with so many Randoms, the same ones for the same seed."""

    def decorate(test):
        tapes = st.binary(min_size=2048, max_size=2048)
        bounded = settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=(Phase.generate,),
            suppress_health_check=tuple(HealthCheck),
        )
        return seed(fuzz_seed)(bounded(given(tapes.map(Choices))(test)))

    return decorate


def examples_of(op, least, fuzz_seed):
    """(name, number of examples) of the patterns of the day; of all where at least 400 examples are made."""
    names = [name for name in PATTERNS if name.split(".")[0] == op]
    if least < 400:
        names = Random(fuzz_seed).sample(names, min(len(names), max(2, round(SHARE_A_DAY * len(names)))))
    return [(name, math.ceil(least / len(names))) for name in names]


@by_least
@by_op
def test_respellings_are_replaced_and_right(op, least, fuzz_seed):
    for name, wanted in examples_of(op, least, fuzz_seed):
        respell(name, wanted, fuzz_seed)


def respell(name, wanted, fuzz_seed):
    made = []

    @random_choices(wanted, fuzz_seed)
    def respelled(random):
        made.append(assert_respelling_matches(PATTERNS[name], random, **SETTINGS[name]))

    respelled()
    assert len(made) >= wanted, name


@by_least
@by_op
def test_mutants_are_refused_or_right(op, least, fuzz_seed):
    for name, wanted in examples_of(op, least, fuzz_seed):
        mutate(name, wanted, fuzz_seed)


def mutate(name, wanted, fuzz_seed):
    made = []

    @random_choices(20 + 4 * wanted, fuzz_seed)  # not every choice makes one that runs
    def mutated(random):
        if sum(made) < wanted:
            made.append(assert_mutant_is_safe(PATTERNS[name], random, **SETTINGS[name]))

    mutated()
    assert sum(made) >= wanted, name


# One pattern of each op, and of what is matched in other ways: numbers that are captured, casts, masks.
REPRESENTATIVES = (
    "rms_norm.llama",
    "rms_norm.gemma",
    "rotary.half_pair",
    "gated_mlp.swiglu",
    "gated_mlp.geglu_product",
    "mlp.quick_gelu",
    "linear_cross_entropy.plain_upcast_logits",
    "linear_cross_entropy.softcap",
    "linear_cross_entropy.log_probability",
    "cross_entropy.upcast",
    "attention.causal",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if at % 2 == 0 else pytest.mark.slow)
        for at, name in enumerate(REPRESENTATIVES)
    ],
)
def test_what_rounds_on_purpose_goes_on_rounding(name):
    """Every mutation that is none in real numbers, somewhere in the pattern."""
    made = [
        assert_mutant_is_safe(PATTERNS[name], Random(f"{name} {at}"), mutations=(mutation,), **SETTINGS[name])
        for at, mutation in enumerate(ROUNDINGS)
    ]
    assert sum(made) >= len(ROUNDINGS) / 3  # not every place goes with every one
