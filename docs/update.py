"""Writes the parts of docs/ that follow from the code:

    python docs/update.py

    options.md               the table, from liger_compile/options.py
    functional.md, api.md    from the docstrings of the public names
    architecture.md          the line of each stop: `name`, `file.py:12`

tests/test_reference.py checks that nothing is out of date.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import liger_compile
from liger_compile import functional
from liger_compile.options import descriptions

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = "<!-- Written by `python docs/update.py`: edit the source instead. -->"
BETWEEN = re.compile(rf"(?<={re.escape(GENERATED)}\n).*?(?=<!-- End -->)", re.DOTALL)
# `Terms`, `liger_compile/terms/build.py:60`
STOP = re.compile(r"`(?P<name>[\w.]+)`(?P<gap>,\s+)`(?P<file>[\w/]+\.py):(?P<line>\d+)`")
INTERNAL = ("of_variant", "with_notes")  # methods that only the backend calls
SECTION = re.compile(r"^(Args|Returns|Raises):\n((?:^ +.*\n?|^\n)+)", re.MULTILINE)


def options_table() -> str:
    """Returns the options as a Markdown table."""
    rows = ["| option | default | accepts | effect |", "|---|---|---|---|"]
    rows += [
        f"| `{option.key}` | `{option.default}` | {option.accepts} | {option.effect} |"
        for option in descriptions()
    ]
    return "\n".join(rows) + "\n"


def functions() -> str:
    """Returns the reference of liger_compile.functional."""
    return "\n".join(_entry(name, getattr(functional, name)) for name in functional.__all__)


def public_names() -> str:
    """Returns the reference of the names of liger_compile."""
    values = {name: getattr(liger_compile, name) for name in liger_compile.__all__}
    return "\n".join(_entry(name, value) for name, value in values.items() if callable(value))


def _entry(name: str, value: Callable[..., Any]) -> str:
    doc = inspect.getdoc(value) or ""
    is_called = not inspect.isclass(value) or "Args:" in doc  # programs make no other objects themselves
    parts = [f"## {name}", f"`{name}{_parameters(value)}`" if is_called else "", _markdown(doc)]
    for member, what in vars(value).items() if inspect.isclass(value) else ():
        is_property = isinstance(what, property)
        if member.startswith("_") or member in INTERNAL or not (is_property or inspect.isfunction(what)):
            continue
        call = member if is_property else member + _parameters(what)
        parts.append(f"`{call}`: {_joined(inspect.getdoc(what) or '')}")
    return "\n\n".join(filter(None, (part.strip() for part in parts))) + "\n"


def _parameters(value: Callable[..., Any]) -> str:
    """Returns the parameters with their defaults; the text below has their types."""
    signature = inspect.signature(value)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def _markdown(doc: str) -> str:
    """Returns a docstring with its sections as lists."""

    def section(found: re.Match[str]) -> str:
        lines = textwrap.dedent(found[2]).splitlines()
        items = re.split(r"\n(?=\S)", "\n".join(lines))
        if found[1] == "Returns":
            return f"**Returns:** {_joined(found[2])}\n\n"
        pairs = (item.partition(": ") for item in items if item.strip())
        rows = [f"- `{name}`: {_joined(text)}" for name, _, text in pairs]
        return f"**{found[1]}:**\n\n" + "\n".join(rows) + "\n\n"

    return SECTION.sub(section, doc + "\n").rstrip() + "\n"


def _joined(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def definitions(path: Path) -> dict[str, int]:
    """Returns the line of each function, class and assignment of a file: "name" or "Class.name"."""
    found: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, int]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name, node.lineno
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, node.name + ".")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in filter(None, targets):
                names = (name for name in ast.walk(target) if isinstance(name, ast.Name))
                yield from ((prefix + name.id, node.lineno) for name in names)

    for name, line in visit(ast.parse(path.read_text()).body, ""):
        found.setdefault(name, line)
    return found


def with_lines(text: str) -> str:
    """Returns a page with the present file and line of each stop. Raises LookupError if a name is nowhere."""

    def stop(found: re.Match[str]) -> str:
        name = found["name"]
        others = (path for folder in ("liger_compile", "patterns") for path in (ROOT / folder).rglob("*.py"))
        for path in (ROOT / found["file"], *others):
            line = definitions(path).get(name) if path.exists() else None
            if line:
                file = path.relative_to(ROOT).as_posix()
                return f"`{name}`{found['gap']}`{file}:{line}`"
        raise LookupError(
            f"no file defines {name!r}, which the page places in {found['file']}: edit the page"
        )

    return STOP.sub(stop, text)


def current() -> dict[Path, str]:
    """Returns the pages as they should be, by path."""
    parts = {"options": options_table, "functional": functions, "api": public_names}
    pages = {
        DOCS / f"{name}.md": BETWEEN.sub(lambda _, part=part: "\n" + part() + "\n", text)
        for name, part in parts.items()
        for text in [(DOCS / f"{name}.md").read_text()]
    }
    return pages | {path: with_lines(path.read_text()) for path in [DOCS / "architecture.md"]}


if __name__ == "__main__":
    for path, text in current().items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"updated {path.relative_to(ROOT)}")
