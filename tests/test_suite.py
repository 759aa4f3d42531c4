"""What holds for the tests themselves: they use public names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OURS = ("liger_compile", "bench", "tests")
EXCEPTION = "# Private:"  # begins a comment, on the line or above it, that says why nothing public serves


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def is_ours(name: str) -> bool:
    return name.partition(".")[0] in OURS


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of each private name of ours that is imported, read from an imported name, or patched."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
            imported.update(alias.asname or alias.name for alias in node.names)
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if isinstance(node.value, ast.Name) and node.value.id in imported:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and "setattr" in ast.unparse(node.func):
            texts = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
            owner = ast.unparse(node.args[0]).partition(".")[0]
            for text in filter(lambda text: isinstance(text, str) and is_private(text), texts):
                if is_ours(text) or owner in imported:
                    yield node.lineno, text


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_private_name_of_ours_is_used(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    found = [
        f"{path.relative_to(TESTS)}:{line} uses {name}"
        for line, name in private_names(ast.parse(text))
        if not any(EXCEPTION in near for near in lines[max(0, line - 3) : line])
    ]
    assert not found, (
        f"use a public name, or say why there is none in a comment that begins {EXCEPTION!r}: {found}"
    )


def test_a_private_name_is_seen() -> None:
    text = """
from liger_compile import registry
from liger_compile.terms.unify import Unifier, _scale
registry._patterns.clear()
monkeypatch.setattr(registry, "_patterns", {})
monkeypatch.setattr("liger_compile.registry._patterns", {})
monkeypatch.setattr(torch, "_dynamo", None)
"""
    names = [name for _, name in private_names(ast.parse(text))]
    assert sorted(names) == ["_patterns", "_scale", "liger_compile.registry._patterns", "registry._patterns"]
