"""Tensor parallel: the loss of a head that several processes divide by classes, and norms of divided rows."""

from pathlib import Path

import pytest
import torch

from tests.helpers.processes import rows_of

PROGRAM = Path(__file__).parent / "tensor_parallel.py"
FUSED = [
    *("gathered", "divided", "sum, ignored class, labels of one rank", "no labels", "any size", "sequence"),
    *("class weights", "class weights, divided", "cap, bias, many chunks", "half", "inductor", "dropped"),
]
LEFT = {
    "returned": "the graph returns them",
    "smoothing": "expected no label smoothing or z-loss for a divided vocabulary",
    "outside": "outside of loss_parallel() each rank computes the gradient of the whole weight",
    "written": "is written in place while it is in use",
}
# The pattern and kind of the norm in the report, under the policy "always" unless the case says otherwise.
NORMS = {
    "norm": ["rms_norm.llama", "replace"],
    "norm, any size": ["rms_norm.llama", "replace"],
    "norm, default": ["rms_norm.llama", "annotate"],
    "layer norm": ["layer_norm.torch", "annotate"],
    "norm of whole rows": ["rms_norm.llama", "replace"],
    "norm of parts of rows": ["rms_norm.llama", "leave"],
}
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
EXACT = 1e-14  # relative: sums in another order, in float64


def run(processes, device, names):
    """What tensor_parallel.py found, by case."""
    return {row["case"]: row for row in rows_of(PROGRAM, processes, device, *names)}


def assert_like_one_process(row):
    """Loss and gradients have an error of at most twice that of eager code, and are divided as in eager code."""
    assert row["difference"] <= max(2 * row["eager_difference"], EXACT)
    assert row["placements"]


def fused(row):
    return [pattern for pattern, kind, _ in row["sites"] if kind == "replace" and "linear" in pattern]


@pytest.fixture(scope="module", params=DEVICES)
def rows(request):
    return run(2, request.param, [*FUSED, *LEFT, *NORMS, "function"])


@pytest.mark.parametrize("case", [*FUSED, *NORMS, *(case for case in LEFT if case != "written"), "function"])
def test_numbers_are_those_of_one_process(rows, case):
    assert_like_one_process(rows[case])


@pytest.mark.parametrize("case", FUSED)
def test_head_and_loss_are_fused(rows, case):
    assert len(fused(rows[case])) == 1


@pytest.mark.parametrize("case", NORMS)
def test_norms_of_dtensors_are_found_where_each_rank_has_whole_rows(rows, case):
    sites = [site for site in rows[case]["sites"] if "norm" in site[0]]
    assert sites[0][:2] == NORMS[case]
    if "parts" in case:
        assert "not whole rows on each rank" in sites[0][2]


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_alone_has_a_reason(rows, case):
    """One that the report gives: of the site, or beside another replacement there."""
    row = rows[case]
    assert fused(row) == []
    assert row["from_eager"] <= EXACT
    if case != "smoothing":  # there, the loss of the gathered logits is replaced
        assert any(LEFT[case] in reason for _, _, reason in row["sites"])


def test_logits_that_are_returned_stay_in_the_graph_with_a_note(rows):
    assert any("the option liger.logits='none' leaves them out" in note for note in rows["returned"]["notes"])


@pytest.mark.slow
def test_three_processes():
    for row in run(3, "cpu", ["uneven", "a rank without classes", "divided", "any size"]).values():
        assert_like_one_process(row)
        assert len(fused(row)) == 1


@pytest.mark.slow
def test_other_dtypes_with_inductor_underneath():
    rows = run(2, "cpu", ["half, divided", "inductor, divided", "no reduction", "norm, half"])
    for row in rows.values():
        assert_like_one_process(row)
    assert len(fused(rows["half, divided"])) == len(fused(rows["inductor, divided"])) == 1
    assert rows["norm, half"]["sites"][0][:2] == ["rms_norm.llama", "replace"]
