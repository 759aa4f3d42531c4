"""Training on two processes: DDP, FSDP2 compiled whole and layer by layer, tensor and sequence parallel."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import rows_of

PROGRAM = Path(__file__).parent / "parallel.py"
PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"
LAYER = ["gated_mlp.swiglu", "rms_norm.llama", "rms_norm.llama", "rotary.half_pair"]
TITAN = ["gated_mlp.swiglu", "rms_norm.llama", "rms_norm.llama", "rotary.complex_pair"]
# The ranks divide the weights of gate and up, so that the pattern without them matches.
TITAN_DIVIDED = ["gated_mlp.swiglu_product", *TITAN[1:]]
FOUND = {
    # Nothing breaks the graph.
    "ddp": [
        *LAYER,
        *LAYER,
        "attention.causal",
        "attention.causal",
        "linear_cross_entropy.plain",
        "rms_norm.llama",
    ],
    # Sharding does: the layers are one graph, compiled once; their mask comes from another, and is looked at. Head and
    # loss are whole.
    "fsdp": [*LAYER, "attention.causal", "linear_cross_entropy.plain", "rms_norm.llama"],
    "fsdp, root resharded": [*LAYER, "attention.causal", "linear_cross_entropy.plain", "rms_norm.llama"],
    "fsdp by layer": LAYER,
    "titan, fsdp by layer": TITAN,
    "titan, tensor": [*TITAN_DIVIDED, *TITAN_DIVIDED, "linear_cross_entropy.plain", "rms_norm.llama"],
    "titan, tensor and sequence": [
        *(*TITAN_DIVIDED, *TITAN_DIVIDED, "linear_cross_entropy.plain", "rms_norm.llama")
    ],
}
SLOW = ("titan, tensor",)  # sequence parallel divides the same weights, and norms
USUAL = [way for way in FOUND if way not in SLOW]
BY_LAYER = [way for way in FOUND if way.endswith("by layer")]
COLUMNS = ("attention", "rotary", "rms_norm", "gated_mlp", "linear_cross_entropy")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
        ],
    ),
]


@pytest.fixture(scope="module", params=DEVICES)
def rows(request):
    """What parallel.py found, by way."""
    return {row["way"]: row for row in rows_of(PROGRAM, 2, request.param, *USUAL)}


ROUNDING = 1e-5  # relative, as for whole models in float32: sums in another order


@pytest.mark.parametrize("way", USUAL)
def test_numbers_are_those_of_eager_code(rows, way):
    assert_like_eager(rows[way])


def assert_like_eager(row):
    assert row["losses"] == pytest.approx(row["eager_losses"], rel=ROUNDING)
    assert len(set(row["eager_losses"])) == 3  # it learns
    assert row["difference"] < ROUNDING


@pytest.mark.parametrize("way", USUAL)
def test_what_is_in_one_graph_is_found(rows, way):
    assert rows[way]["found"] == sorted(FOUND[way])


@pytest.mark.slow
def test_ways_that_are_parts_of_others():
    for row in rows_of(PROGRAM, 2, "cpu", *SLOW):
        assert_like_eager(row)
        assert row["found"] == sorted(FOUND[row["way"]])


def test_the_table_of_the_docs_has_these_counts():
    table = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        way, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if len(cells) == len(COLUMNS) and cells[0].isdigit():
            table[way] = [int(cell) for cell in cells]
    counts = {way: Counter(pattern.split(".")[0] for pattern in found) for way, found in FOUND.items()}
    assert table == {way: [count[column] for column in COLUMNS] for way, count in counts.items()}


@pytest.mark.parametrize("way", BY_LAYER)
def test_a_note_says_that_head_and_loss_are_in_eager_code(rows, way):
    assert any("one layer of a model" in note for note in rows[way]["notes"])


@pytest.mark.parametrize("way", [way for way in FOUND if not way.startswith("titan")])
def test_logits_that_are_read_late_are_those_of_eager_code(rows, way):
    """When their weights have been stepped, freed, or gathered again for the next step."""
    row = rows[way]
    assert row["logits"] == pytest.approx(row["eager_logits"], rel=ROUNDING)
    assert len(set(row["eager_logits"])) == 3
