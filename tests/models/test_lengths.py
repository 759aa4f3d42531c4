"""Training at one length after another, as users run it: the second compilation has symbolic sizes, and the default
policy decides.

A few families, by how their attention, norms and MLPs are spelled; the whole zoo is `pytest -m slow`.
"""

from __future__ import annotations

import pytest
import torch
import zoo
from harness import assert_within, batch, step
from zoo import Specimen

BY_NAME = {str(specimen): specimen for specimen in zoo.SPECIMENS}
LENGTHS = (24, 32, 20)

FEW = (
    "gpt2",  # sizes that come of size arithmetic, LayerNorm
    "gemma3",  # numbers that are attributes, windows
    "gemma2",  # caps
    "t5",  # a bias of positions, encoder and decoder
    "deepseek_v3",  # experts, interleaved rotation
    "mamba2",  # no attention
    "modernbert_mlm",  # bidirectional windows
    "llama_eager",  # attention written out
    "torchtitan_packed",  # complex rotation, gathered tables
    "own_chunks",  # two losses
)


@pytest.mark.parametrize("name", FEW)
def test_three_lengths(name: str, guards_of_ours) -> None:
    check(BY_NAME[name])


@pytest.mark.slow
@pytest.mark.parametrize("specimen", [s for s in zoo.SPECIMENS if str(s) not in FEW], ids=str)
def test_three_lengths_of_the_whole_zoo(specimen: Specimen, guards_of_ours) -> None:
    check(specimen)


def check(specimen: Specimen, inner: str = "aot_eager", lengths=LENGTHS) -> float:
    """The largest error of a loss or gradient, at all lengths."""
    options = {"liger.inner": specimen.inner if inner == "aot_eager" else inner, "liger.strict": True}
    family = specimen.family
    model = family.build()
    function = torch.compile(family.loss, backend="liger", options=options)
    plain = torch.compile(family.loss, backend="eager") if specimen.is_as_dynamo else family.loss
    worst = 0.0
    for length in lengths:
        inputs = batch(family, length=length)
        expected = step(plain, model, *inputs)
        got = step(function, model, *inputs)
        assert_within(got, expected, zoo.EXACT)
        worst = max(worst, *zoo.errors(got, expected).values())
    return worst
