"""Faults that this repository had once, planted in a copy of the sources: the normal tests still find them.

Whoever deletes or merges tests runs this file: `python -m pytest -m slow tests/test_planted_faults.py`. A fault whose
lines have changed fails with a message; write it down again as the code is now.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """Text of one file that becomes other text, and tests, one of whose cases must fail in each."""

    path: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = {
    "a rounding between two casts is dropped": Fault(
        "liger_compile/terms/normalize.py",
        '    if term.op == "cast" and widens(term.args[0].dtype, term.dtype):\n',
        '    if term.op == "cast":\n',
        ("tests/test_algebra.py::test_what_is_the_same_in_real_numbers_alone_is_another_term",),
    ),
    "views do not share memory": Fault(
        "liger_compile/graphs/aliasing.py",
        "return {storage_of(tensor) for tensor in tensors_of(node)}",
        "return {id(tensor) for tensor in tensors_of(node)}",
        (
            "tests/test_aliasing.py::test_a_write_into_an_alias_is_a_write_into_all",
            "tests/test_decide.py::test_a_result_that_shares_written_memory_stays",
        ),
    ),
    "an unknown call writes nothing": Fault(
        "liger_compile/graphs/effects.py",
        "return NOTHING if is_pure else EVERYTHING",
        "return NOTHING",
        ("tests/test_aliasing.py::test_what_a_call_writes_into",),
    ),
    "a write that no node makes is taken for the placing of a piece": Fault(
        "liger_compile/torch_internals/fake_tensors.py",
        "        if is_placed and version_of(whole) == 1:",
        "        if is_placed:",
        ("tests/test_flat_parameters.py::test_writes_in_the_graph_count",),
    ),
    "a tensor written in place is captured": Fault(
        "liger_compile/steps/decide.py",
        "        if at is not None and not (",
        "        if False and not (",
        (
            "tests/test_decide.py::test_a_captured_tensor_written_in_place_is_left",
            "tests/test_decide.py::test_what_is_written_in_place_is_captured_after_its_last_write",
        ),
    ),
    "a rotation has the wrong sign": Fault(
        "liger_compile/ops/rotary.py",
        "join_pairs(a * cos_a - b * sin_a, b * cos_b + a * sin_b, writes)",
        "join_pairs(a * cos_a + b * sin_a, b * cos_b + a * sin_b, writes)",
        ("tests/ops/test_ops.py::test_no_worse_than_eager",),
    ),
    "the backward of a rotation turns forward": Fault(
        "liger_compile/ops/rotary.py",
        "join_pairs(a * cos_a + b * sin_b, b * cos_b - a * sin_a, reads)",
        "join_pairs(a * cos_a - b * sin_b, b * cos_b + a * sin_a, reads)",
        ("tests/ops/test_ops.py::test_gradients_are_those_of_the_function",),
    ),
    "ignore_index is -100 whatever it is": Fault(
        "liger_compile/ops/softmax_loss.py",
        "return target != self.ignore_index",
        "return target != -100",
        (
            "tests/ops/test_cross_entropy.py::test_an_ignored_index_may_be_any_number",
            "tests/ops/test_ops.py::test_no_worse_than_eager",
        ),
    ),
    "an ignored row has a gradient in the kernel": Fault(
        "liger_compile/kernels/softmax_loss.py",
        "        if target == ignore_index:\n",
        "        if target == -1:\n",
        ("tests/kernels/test_softmax_loss.py::test_ignored_rows_are_zero_whatever_they_hold",),
    ),
    "the offset of a row has 32 bits": Fault(
        "liger_compile/kernels/rms_norm.py",
        "rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]",
        "rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]",
        ("tests/kernels/test_rms_norm.py::test_rows_whose_offset_needs_more_than_32_bits",),
    ),
    "a kernel runs on the current device": Fault(
        "liger_compile/kernels/__init__.py",
        "        with current(device):\n",
        "        with _NOTHING:\n",
        ("tests/kernels/test_launch.py::test_a_kernel_runs_where_its_first_tensor_is",),
    ),
    "a window is one key too narrow": Fault(
        "liger_compile/terms/indices.py",
        ".plus(Linear(1)) if len(others) == 1 else None",
        " if len(others) == 1 else None",
        ("tests/test_indices.py::test_a_window_is_as_wide_as_it_is",),
    ),
    "the key of the cache lacks the recompute marks": Fault(
        "liger_compile/compile.py",
        ', "marks", *_recompute_marks(gm)]',
        "]",
        ("tests/test_compile.py::test_marks_change_the_key_in_nested_graphs_too",),
    ),
    "late logits are computed from a weight that changed": Fault(
        "liger_compile/runtime/promise.py",
        "                if not is_same:\n",
        "                if False:\n",
        ("tests/test_lazy.py::test_a_change_without_a_version_raises_an_error_with_advice",),
    ),
    "late logits are computed after the optimizer's step": Fault(
        "liger_compile/runtime/lazy.py",
        "    keep_before_steps(promise)\n",
        "",
        ("tests/test_lazy.py::test_after_an_optimizers_step_the_values_are_those_from_before",),
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with their tests; what is imported is the copy, patterns included."""
    root = tmp_path_factory.mktemp("planted")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("liger_compile", "patterns", "tests", "bench", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    # Before an installation that is editable, which would find the patterns of the repository.
    (root / "liger_compile" / "patterns").symlink_to(root / "patterns")
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.fixture
def planted(copy: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    fault = FAULTS[request.param]
    path = copy / fault.path
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.path} has changed; plant {request.param!r} in it as it is now"
    path.write_text(text.replace(fault.old, fault.new))
    yield copy
    path.write_text(text)


def failed(root: Path, tests: tuple[str, ...]) -> list[str]:
    """The tests that fail, or stop their process, in a process of their own."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *tests,
    ]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode < 0:  # a signal, as for memory that is not the process's
        return list(tests)
    assert done.returncode in (0, 1), f"the tests did not run:\n{done.stdout}\n{done.stderr}"
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)


ALL_TESTS = tuple(dict.fromkeys(test for fault in FAULTS.values() for test in fault.tests))


@pytest.mark.slow
def test_without_a_fault_all_pass(copy: Path) -> None:
    assert not failed(copy, ALL_TESTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "name"), [(name, name) for name in FAULTS], indirect=["planted"], ids=FAULTS
)
def test_a_planted_fault_is_found(planted: Path, name: str) -> None:
    found = failed(planted, FAULTS[name].tests)
    missed = [test for test in FAULTS[name].tests if not any(one.startswith(test) for one in found)]
    assert not missed, f"{name}: these tests pass: {missed}"


def test_every_planted_fault_is_of_this_code() -> None:
    """So that it is seen at once when the code or a test of a fault changes, and not in the night."""
    for name, fault in FAULTS.items():
        for test in fault.tests:
            path, _, function = test.partition("::")
            assert f"def {function}(" in (ROOT / path).read_text(), (
                f"{test} is gone; {name!r} needs its new name"
            )
        text = (ROOT / fault.path).read_text()
        assert text.count(fault.old) == 1, f"{fault.path} has changed; plant {name!r} in it as it is now"
