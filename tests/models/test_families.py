"""Every family trains as it does in eager mode: in float32 with every site replaced, in bfloat16 as users train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_compile
from liger_compile.testing import precision
from tests.models.families import BY_NAME, FAMILIES, Family, has_experts
from tests.models.harness import (
    ALWAYS,
    assert_replaced,
    assert_within,
    batch,
    by_default,
    compiled,
    step,
)

EXACT = 1e-5  # float32: what another order of the same sums may cost
NUM_LOSSES = 24


# What is of no other structure than a family before it, or than two of them together, is a slow test.
ALIKE = {
    "llama": ("mistral", "mistral_window", "qwen2", "meta_llama", "phi3"),
    "gemma2": ("gemma", "gemma2_window", "glm4"),
    "qwen3": ("gemma3",),  # and gemma2
    "phi": ("phi_written_out", "stablelm"),  # a rotation of some channels
    "nanogpt_written_out": ("nanogpt", "gpt2_written_out", "llama_written_out", "olmo"),  # and llama
    "torchtitan_packed": ("torchtitan",),
}


def cases(is_usual: Callable[[Family], bool]) -> list[Any]:
    """All families; those that are not usual are slow tests."""
    return [
        pytest.param(family, id=str(family), marks=() if is_usual(family) else pytest.mark.slow)
        for family in FAMILIES
    ]


# Those that differ most in what AOTAutograd sees; of the whole zoo, that is the slow test in test_lengths.py.
THROUGH_AOT = ("gemma2", "mixtral", "nanogpt_written_out", "packed", "t5")


@pytest.mark.parametrize("family", cases(lambda family: family.name not in sum(ALIKE.values(), ())))
def test_float32(family: Family) -> None:
    model, inputs = family.build(), batch(family)
    inner = "aot_eager" if family.name in THROUGH_AOT else "eager"
    expected = step(family.loss, model, *inputs)
    assert_within(step(compiled(family.loss, inner, options=ALWAYS), model, *inputs), expected, EXACT)
    assert_replaced(family.counts)
    assert not near_misses()


# What users' bfloat16 adds to float32 are casts: these families differ in theirs.
ROUNDED = ("llama", "mixtral", "qwen3", "gemma2_window", "torchtitan")


@pytest.mark.parametrize("family", cases(lambda family: family.name in ROUNDED))
def test_bfloat16_is_as_exact_as_eager(family: Family) -> None:
    model, exact, inputs = family.build(torch.bfloat16), float64(family), batch(family)
    function = compiled(family.loss, "eager")  # test_float32 has AOTAutograd
    truth = step(family.loss, exact, *inputs)
    ours, eager = step(function, model, *inputs), step(family.loss, model, *inputs)
    assert_replaced(by_default(family.counts))
    assert not near_misses()
    precision.assert_no_worse(ours.gradients, eager.gradients, truth.gradients)

    # One loss is one number, which eager may by luck get right to the last bit. So the losses of many batches
    # are taken for a tensor, as the many entries of a gradient are.
    batches = [batch(family, seed=3 + seed) for seed in range(NUM_LOSSES)]
    found = (losses(*of, batches) for of in ((function, model), (family.loss, model), (family.loss, exact)))
    precision.assert_no_worse(*found)


@pytest.mark.slow  # test_modes.py has Llama of one layer under Inductor
@pytest.mark.parametrize("family", [BY_NAME["llama"], BY_NAME["gemma2"]], ids=str)
def test_inductor(family: Family) -> None:
    model, inputs = family.build(), batch(family)
    expected = step(family.loss, model, *inputs)
    assert_within(step(compiled(family.loss, "inductor"), model, *inputs), expected, EXACT)
    assert_replaced(by_default(family.counts))


def near_misses() -> list[str]:
    """What the reports say of places that look like a pattern; of these models each such place is replaced."""
    return [near.reason for report in liger_compile.reports() for near in report.near_misses]


def float64(family: Family) -> nn.Module:
    """The model with the very weights of the bfloat16 one, in float64."""
    model = family.build(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    if has_experts(model):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def losses(function: Callable[..., Tensor], model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([function(model, *inputs).detach() for inputs in batches])
