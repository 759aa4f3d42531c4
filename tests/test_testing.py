"""The kit for pattern authors finds what is planted: a wrong replacement, a wrong count, a refusal that is none."""

from random import Random

import pytest
import torch
import torch.nn.functional as F

from liger_compile.pattern import Pattern
from liger_compile.testing import (
    assert_close_to_eager,
    assert_mutant_is_safe,
    assert_refuses,
    assert_respelling_matches,
    assert_rewrites,
    fuzz,
)

EXAMPLES = {"x": torch.empty(4, 6), "scale": 0.5}


def softplus_gate(x, scale: float):
    return F.softplus(x) * torch.tanh(x * scale)


def pattern(name, replace):
    return Pattern(name=f"{name}.test", search=softplus_gate, replace=replace, examples=EXAMPLES)


RIGHT = pattern("right", lambda x, scale: F.softplus(x) * torch.tanh(scale * x))
WRONG = {
    "another function": pattern("wrong", lambda x, scale: F.softplus(x) * torch.sigmoid(x * scale)),
    "a number that is not taken": pattern("wrong", lambda x, scale: F.softplus(x) * torch.tanh(x * 0.5)),
    "no gradient": pattern("wrong", lambda x, scale: F.softplus(x.detach()) * torch.tanh(x * scale)),
    "half of the precision": pattern(
        "wrong", lambda x, scale: (F.softplus(x.half()) * torch.tanh(x.half() * scale)).to(x.dtype)
    ),
}


def gate(x):
    return softplus_gate(x, 0.25)


@pytest.fixture
def x():
    return torch.randn(5, 6, requires_grad=True)


def test_what_is_right_passes(x):
    assert_rewrites(gate, x, expect={"right.test": 1}, patterns=(RIGHT,))
    assert_close_to_eager(gate, x, patterns=(RIGHT,))
    assert_refuses(lambda x: softplus_gate(x, 0.25).sigmoid().exp(), x, pattern="rms_norm")
    fuzz(RIGHT, respellings=20, mutants=20)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_replacement_is_caught(name, x):
    with pytest.raises(AssertionError):
        assert_close_to_eager(gate, x, patterns=(WRONG[name],))


def test_a_wrong_replacement_is_caught_by_the_fuzzer():
    with pytest.raises(AssertionError, match="error"):
        for seed in range(20):
            assert_respelling_matches(WRONG["another function"], Random(seed))
    with pytest.raises(AssertionError, match="error"):
        for seed in range(20):
            assert_mutant_is_safe(WRONG["another function"], Random(seed))


def test_a_wrong_count_fails_with_the_report(x):
    with pytest.raises(
        AssertionError, match=r"expected \{'right': 2\} to be replaced, got \{'right': 1\}\nliger_compile"
    ):
        assert_rewrites(gate, x, expect={"right": 2}, patterns=(RIGHT,))
    with pytest.raises(AssertionError, match=r"expected \{\} to be replaced, got .*right.test"):
        assert_rewrites(gate, x, expect={}, patterns=(RIGHT,))


def test_a_replacement_instead_of_a_refusal_fails(x):
    with pytest.raises(AssertionError, match=r"expected no right to be replaced, got \['right.test'\]"):
        assert_refuses(gate, x, pattern="right", patterns=(RIGHT,))
    with pytest.raises(AssertionError, match="got no such place"):
        assert_refuses(torch.sin, x, pattern="right", reason="rounds", patterns=(RIGHT,))
