"""Of the zoo's families, those that differ most in how they spell things: what is found, and what it computes.

Some of these are slow tests. All families, in half precision too, are `python -m bench.zoo`, whose result is
docs/coverage.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import pytest

from bench import zoo
from tests.models.harness import skip_if_missing

BY_NAME = {str(specimen): specimen for specimen in zoo.SPECIMENS}

# Each has a spelling that none before it has.
SPELLINGS = (
    "afmoe",  # experts, output gates that look like gated MLPs, a weight multiplied in float32
    "aya_vision",  # LayerNorm without a bias, interleaved rotation, tied head that is scaled
    "deepseek_v3",  # rotation that is read in pairs and written in halves, copied into a key
    "flint",  # layers without a rotation, a shared expert
    "gemma3n",  # pow(-0.5), norms without a weight, one tensor turned at a time, per-layer gates
    "glm4v",  # partial and interleaved rotation with tables of three axes
    "gpt_oss",  # half tables, and a gate that is only marked
    "gptj",  # partial rotation as GPT-J has it, a head with a bias
    "gte_mlm",  # packed gate and up with a GELU, no shift of labels
    "helium",  # repeated half tables, the weight upcast
    "hunyuan_v1_dense",  # norms after the rotation
    "llama_yarn",  # scaled tables
    "mamba2",  # grouped and gated norms, a residual stream in float32
    "nanochat",  # rotation the other way, norms without a weight, softcap
    "olmo_hybrid",  # rotation in float32 that is rounded after, gates of gated norms
    "phi3",  # packed gate and up, partial rotation
    "stablelm",  # partial rotation outside of the function
    "t5",  # the statistics of an upcast, the product without
    "zamba2",  # one block for many layers, LoRA on gate and up
    "own_gptj",
    "own_unbind",
    "own_chunks",
)


# What tests/patterns has in a smaller model too.
SLOW = (
    "afmoe",
    "gte_mlm",
    "hunyuan_v1_dense",
    "llama_yarn",
    "own_gptj",
    "aya_vision",
    "flint",
    "glm4v",
    "gptj",
    "helium",
    "phi3",
    "stablelm",
    "t5",
    "zamba2",
    "own_unbind",
)


def cases(names: Sequence[str], slow: Sequence[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


# test_bfloat16 finds the same sites in them.
IN_BFLOAT16 = ("gemma3n", "olmo_hybrid")


@pytest.mark.parametrize("name", cases(SPELLINGS, SLOW + IN_BFLOAT16))
def test_float32(name: str) -> None:
    skip_if_missing(BY_NAME[name].family)
    # The slow test in test_lengths.py takes the zoo through AOTAutograd.
    row = zoo.examine(dataclasses.replace(BY_NAME[name], inner="eager"), ["float32"])
    assert not row.problems, "\n".join(row.problems)


@pytest.mark.parametrize("name", cases((*IN_BFLOAT16, "nanochat"), ("nanochat",)))
def test_bfloat16(name: str) -> None:
    row = zoo.examine(BY_NAME[name], ["bfloat16"])
    assert not row.problems, "\n".join(row.problems)


def test_the_page_agrees_with_the_table() -> None:
    """The page is the table's, found and present; `python -m bench.zoo` makes sure that the table is right."""
    rows = re.findall(r"^\| (\w+) \|(.*)\|$", zoo.PAGE.read_text(), re.MULTILINE)
    cells = {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in rows}
    for specimen in zoo.SPECIMENS:
        for kind, cell in zip(zoo.KINDS, cells[str(specimen)], strict=False):
            expected = {way: specimen.expected(way)[kind] for way in specimen.ways}
            assert cell == zoo.counted(specimen.present[kind], expected), (str(specimen), kind)


def test_nearly_all_is_found() -> None:
    """At least 95% of the sites of each kind, in the three ways together; 94% of the losses: 85 of 90 are fused.

    A loss counts where it is fused with the head. Marian, mBART (a bias that is added apart) and own_chunks are not.
    """
    for kind in zoo.KINDS:
        trained = [(specimen, way) for specimen in zoo.SPECIMENS for way in specimen.ways]
        present = sum(specimen.present[kind] for specimen, _ in trained)
        least = 0.94 if kind == "loss" else 0.95
        assert sum(specimen.expected(way)[kind] for specimen, way in trained) >= least * present, kind


def test_what_is_left_has_a_reason() -> None:
    for specimen in zoo.SPECIMENS:
        for left in specimen.left.values():
            assert left.why.endswith(".") and (left.float32 or left.bfloat16 or left.autocast), str(specimen)
