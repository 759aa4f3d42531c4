"""What the README says is true: its code runs, its lines are what CI runs."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import liger_compile
from liger_compile import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def without_figures(report: str) -> list[str]:
    """The lines of a report, less what may differ from one machine or version to the next."""
    report = re.sub(r"\(\d+\.\d+ s\)|\d+ nodes|\w+\.py:\d+", "", report)
    return [line.rstrip() for line in report.strip().splitlines()]


@pytest.fixture
def printed(tmp_path: Path) -> Iterator[str]:
    """What the README's Python prints, all blocks in one namespace, as a reader would try them."""
    source = tmp_path / "read_me.py"  # Dynamo reads it
    source.write_text("\n".join(blocks("python")))
    before = dict(registry.REGISTERED)
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        runpy.run_path(str(source))
    yield stream.getvalue()
    registry.REGISTERED.clear()
    registry.REGISTERED.update(before)


def test_the_report_is_what_the_example_prints(printed: str):
    (shown,) = blocks("text")
    assert without_figures(printed) == without_figures(shown)


def test_other_spellings_of_the_readmes_pattern_match():
    (block,) = (block for block in blocks("python") if "register_pattern" in block)
    exec(block, {})
    try:
        x, weight = torch.ones(2, 4), torch.ones(4, 8)
        for spelling in (
            lambda x, weight: (x @ weight).relu() ** 2,
            lambda x, weight: F.relu(x.matmul(weight)) * F.relu(x.matmul(weight)),
        ):
            (graph,) = liger_compile.explain(spelling, x, weight).graphs
            assert [(site.pattern, site.kind) for site in graph.sites] == [("squared_relu.mine", "replace")]
    finally:
        liger_compile.unregister_pattern("squared_relu.mine")


def test_set_up_is_two_lines_that_differ_in_what_they_run():
    set_up = README.partition("## Set up")[2].partition("\n## ")[0]
    demo, tests = re.findall(r"```bash\n(.*?)\n```", set_up, re.DOTALL)
    assert demo.endswith(" && .venv/bin/python -m liger_compile demo")
    assert tests.endswith(" && .venv/bin/python -m pytest")
    assert demo.rpartition(" && ")[0].replace("[demo]", "[test]") == tests.rpartition(" && ")[0]


def test_ci_runs_the_second_line():
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r"grep -E '(.*?)' README\.md", script)
    _, tests = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert re.findall(pattern, README, re.MULTILINE) == [tests]
    assert 'eval "$tests"' in script
