"""The Python in docs/ and CONTRIBUTING.md runs, a page in one namespace, and prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from liger_compile import registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ALL_PAGES = [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks_of(path: Path) -> list[tuple[str, int, str]]:
    """Language, number of lines above, and content of every block of a page."""
    text = path.read_text()
    return [(m[1], text.count("\n", 0, m.start(2)), m[2]) for m in BLOCK.finditer(text)]


def without_figures(printed: str) -> list[str]:
    """The lines, less what differs from one run or version to the next."""
    printed = re.sub(r"\(\d+\.\d+ s\)|\d+ nodes|\w+\.(py|md):\d+|graph \d+/\d+", "", printed)
    return [line.rstrip() for line in printed.strip().splitlines()]


PAGES = [path for path in ALL_PAGES if any(block[0] == "python" for block in blocks_of(path))]
PAGES.remove(ROOT / "README.md")  # test_readme.py runs it, in a process of its own


@pytest.fixture
def _registered_patterns_restored():
    before = dict(registry.REGISTERED)
    yield
    registry.REGISTERED.clear()
    registry.REGISTERED.update(before)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("_registered_patterns_restored")
def test_a_page_is_a_program_that_prints_what_it_shows(path):
    namespace = {"__name__": path.stem}
    printed = None
    for language, lines_above, content in blocks_of(path):
        if language == "python":
            # As if the page were the source file: tracebacks and reports name its lines.
            code = compile("\n" * lines_above + content, str(path), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(code, namespace)
            printed = stream.getvalue()
        elif language == "text":
            assert without_figures(printed) == without_figures(content), f"{path.name}:{lines_above}"


def test_pages_with_code_are_found():
    assert {"writing_a_pattern", "CONTRIBUTING"} <= {path.stem for path in PAGES}


@pytest.mark.parametrize("path", ALL_PAGES, ids=lambda path: path.stem)
def test_the_pages_that_a_page_links_to_exist(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert all((path.parent / link).exists() for link in links), links
