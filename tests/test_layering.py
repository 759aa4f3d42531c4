"""Each line in its room: imports go one way, and Inductor, functorch and versions are named in one file."""

import ast
import re
from pathlib import Path

import pytest

import liger_compile
import liger_compile.patterns

PACKAGE = Path(liger_compile.__file__).parent
PATTERNS = Path(liger_compile.patterns.__file__).parent

# Of these, `from package import module` names a module.
PACKAGES = {
    f"liger_compile{end}"
    for end in (
        "",
        ".cli",
        ".forward_passes",
        ".ops",
        ".patterns",
        ".runtime",
        ".steps",
        ".terms",
        ".testing",
    )
}

# What a room may import of ours; a prefix allows what is below it.
ALLOWED = {
    "failures": (),
    "sources": (),
    "pattern": (),
    "options": ("pattern",),
    "graphs": ("graphs",),
    "kernels": ("kernels",),
    "runtime": ("runtime",),
    "torch_internals": ("torch_internals",),
    "terms": ("graphs", "terms"),
    "ops": ("graphs.guards", "kernels", "ops"),
    "functional": ("ops",),
    "diagnose": ("diagnose", "terms"),
    "steps.callbacks": ("graphs.guards", "pattern"),
    "steps.recording": ("graphs", "terms.term"),
    "steps.match": ("diagnose", "graphs", "pattern", "steps.callbacks", "terms"),
    "steps.decide": ("graphs", "pattern", "steps.callbacks"),
    "steps.rewrite": ("graphs", "pattern", "steps.callbacks", "steps.recording", "terms.term"),
    "steps.recompute": ("graphs", "pattern"),
    "backward_passes": ("backward_passes", "graphs", "ops"),
    "compile": (
        "backward_passes",
        "ops.embedding",
        "ops.registration",
        "pattern",
        "sources",
        "torch_internals",
    ),
    "report.report": ("pattern", "report.render"),
    "report.render": ("report.report",),  # for types
    "report.explain": ("report",),
    "report.verify": ("report", "testing.precision"),
    "forward_passes.inline_subgraphs": ("graphs",),
    "forward_passes.specialize": ("graphs",),
    "forward_passes.buckets": ("graphs", "terms"),
    "forward_passes.logits": ("graphs", "runtime", "terms"),
    "forward_passes.split_for_ddp": ("compile", "failures", "forward_passes", "options"),
    "validation": ("graphs", "pattern", "steps", "terms"),
    "registry": ("pattern", "patterns", "steps.callbacks", "validation"),
    "patterns": ("functional", "ops.dispatch", "ops.flex", "pattern", "patterns"),
    "pipeline": (
        "backward_passes",
        "compile",
        "forward_passes",
        "graphs",
        "options",
        "pattern",
        "report",
        "steps",
        "terms",
    ),
}


def sources():
    for root, prefix in ((PACKAGE, ""), (PATTERNS, "patterns.")):
        for path in sorted(root.rglob("*.py")):
            name = prefix + ".".join(path.relative_to(root).with_suffix("").parts)
            yield name.removesuffix(".__init__").removesuffix("__init__") or "__init__", path


def imports_of(path, name):
    """The modules of ours that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
            package = ["liger_compile", *parts][: len(parts) + 2 - node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" if base in PACKAGES else base for alias in node.names]
        else:
            continue
        yield from (n.removeprefix("liger_compile.") for n in names if n.startswith("liger_compile."))


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_one_way(room):
    for name, path in sources():
        if name == room or name.startswith(room + "."):
            for imported in imports_of(path, name):
                assert any(imported == a or imported.startswith(a + ".") for a in ALLOWED[room]), (
                    name,
                    imported,
                )


def test_the_patterns_are_imported_as_a_subpackage():
    for _, path in sources():
        assert not re.search(r"^\s*(from|import) patterns\b", path.read_text(), re.MULTILINE), path


def test_only_compile_names_inductor_functorch_and_versions():
    for name, path in sources():
        if name != "compile":
            code = ast.unparse(_without_docstrings(ast.parse(path.read_text())))
            assert not re.search(r"_inductor|functorch|torch\.__version__", code), name


def test_ops_have_no_triton_at_module_level():
    for name, path in sources():
        if name.startswith("ops") or name == "functional":
            tree = ast.parse(path.read_text())
            top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            imported = " ".join(ast.unparse(node) for node in top)
            assert not re.search(r"(from|import) triton|kernels", imported), name


def test_only_kernels_are_written_in_triton():
    for name, path in sources():
        if not name.startswith("kernels"):
            assert not re.search(r"\btl\.|\bBLOCK\b|num_warps|num_stages", path.read_text()), name


def test_every_pattern_file_has_a_test():
    tests = Path(__file__).parent / "patterns"
    for path in PATTERNS.glob("*.py"):
        if path.stem not in ("__init__", "profit"):
            assert (tests / f"test_{path.stem}.py").exists(), path.stem


def _without_docstrings(tree):
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            body[0] = ast.Pass()
    return tree
