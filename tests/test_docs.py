"""The Python in docs/ and CONTRIBUTING.md runs, a page in one namespace, and prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from liger_compile import registry
from liger_compile.for_inductor import is_used_for_inductor

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ALL_PAGES = [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("bench/*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUOTED = re.compile(r"^<!-- from (\S+) -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks_of(path: Path) -> list[tuple[str, int, str]]:
    """Language, number of lines above, and content of the blocks of a page that are no quotation."""
    text = QUOTED.sub(lambda found: "\n" * found[0].count("\n"), path.read_text())
    return [(m[1], text.count("\n", 0, m.start(2)), m[2]) for m in BLOCK.finditer(text)]


def without_figures(printed: str) -> list[str]:
    """The lines, less what differs from one run or version to the next."""
    printed = re.sub(r"\(\d+\.\d+ s\)|\d+ nodes|\w+\.(py|md):\d+|graph \d+/\d+", "", printed)
    return [line.rstrip() for line in printed.strip().splitlines()]


PAGES = [path for path in ALL_PAGES if any(block[0] == "python" for block in blocks_of(path))]
PAGES.remove(ROOT / "README.md")  # test_readme.py runs it, with Inductor


@pytest.fixture
def _registered_patterns_restored():
    before = dict(registry.REGISTERED)
    yield
    registry.REGISTERED.clear()
    registry.REGISTERED.update(before)


@pytest.fixture
def _without_inductor(monkeypatch):
    """Compiles by aot_eager where a page selects no compiler, to save time."""
    compile = torch.compile

    def without_inductor(*args, backend="inductor", options=None, **kwargs):
        is_ours = backend == "liger" or (backend == "inductor" and is_used_for_inductor())
        options = {"liger.inner": "aot_eager", **(options or {})} if is_ours else options
        return compile(*args, backend=backend, options=options, **kwargs)

    monkeypatch.setattr(torch, "compile", without_inductor)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("_registered_patterns_restored", "_without_inductor")
def test_a_page_is_a_program_that_prints_what_it_shows(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a page may write files
    blocks, lines = blocks_of(path), [""] * path.read_text().count("\n")
    for language, above, content in blocks:
        if language == "python":
            lines[above : above + content.count("\n")] = content.splitlines()
    source = tmp_path / f"{path.stem}.py"  # Dynamo and tracebacks read it; a line has its number on the page
    source.write_text("\n".join(lines))
    namespace = {"__name__": path.stem}
    printed = None
    for language, above, content in blocks:
        if language == "python":
            code = compile("\n" * above + content, str(source), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(code, namespace)
            printed = stream.getvalue()
        elif language == "text":
            assert without_figures(printed) == without_figures(content), f"{path.name}:{above}"


def test_pages_with_code_are_found():
    assert {"architecture", "tutorial", "how_to", "writing_a_pattern", "CONTRIBUTING"} <= {
        path.stem for path in PAGES
    }


def test_a_block_from_an_example_is_in_the_example():
    quoted = [(path, *found) for path in ALL_PAGES for found in QUOTED.findall(path.read_text())]
    assert quoted
    for path, file, block in quoted:
        assert block in (path.parent / file).read_text(), f"{path.name}: {file} does not contain\n{block}"


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", ALL_PAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_links_of_a_page_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = path.parent / file if file else path
        assert target.exists(), f"{path.name} links to {file}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{path.name}: {target.name} has no heading #{anchor}"


def test_the_index_lists_every_page():
    linked = set(re.findall(r"\]\((?:\.\./)?([\w./]+?)(?:#[^)]*)?\)", (DOCS / "README.md").read_text()))
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert pages <= linked, pages - linked
    assert {f"examples/{path.name}" for path in (DOCS / "examples").glob("*.py")} <= linked
