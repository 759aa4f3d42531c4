"""Each line in its room: imports go one way, and private names stay where they are defined."""

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
        ".lazy_logits",
        ".ops",
        ".patterns",
        ".runtime",
        ".steps",
        ".terms",
        ".testing",
    )
}

# What a room may import of ours, besides torch_internals; a prefix allows what is below it.
ALLOWED = {
    "failures": (),
    "sources": (),
    "pattern": (),
    "options": ("pattern",),
    "graphs": ("graphs",),
    "kernels": ("kernels",),
    "runtime": ("runtime",),
    "torch_internals": (),
    "terms": ("graphs", "terms"),
    "ops": ("graphs.guards", "kernels", "ops"),
    "functional": ("ops",),
    "lazy_logits": ("lazy_logits", "ops", "runtime", "terms.scalars", "terms.term"),
    "diagnose": ("diagnose", "terms"),
    "steps.callbacks": ("graphs.guards", "pattern"),
    "steps.recording": ("graphs", "terms.term"),
    "steps.questions": ("graphs", "ops.answer_plan", "pattern", "steps.tails", "terms"),
    "steps.tails": ("graphs", "ops", "steps.saved", "terms"),
    "steps.match": ("diagnose", "graphs", "pattern", "steps.callbacks", "terms"),
    "steps.moving": ("pattern",),
    "steps.decide": ("graphs", "pattern", "steps.callbacks", "steps.moving"),
    "steps.saved": ("graphs",),
    "steps.rewrite": (
        "graphs",
        "pattern",
        "steps.callbacks",
        "steps.moving",
        "steps.recording",
        "steps.saved",
        "terms.term",
    ),
    "steps.recompute": ("graphs", "pattern"),
    "backward_passes": ("backward_passes", "graphs", "ops"),
    "compile": (
        "backward_passes",
        "ops.embedding",
        "ops.registration",
        "pattern",
        "sources",
    ),
    "report.report": ("pattern", "report.html", "report.render"),
    "report.render": ("report.report",),  # for types
    "report.html": ("report.render", "report.report"),  # report: for types
    "report.kept": ("graphs", "report.report"),
    "report.explain": ("report",),
    "report.verify": ("report", "testing.precision"),
    "forward_passes.inline_subgraphs": ("graphs",),
    "forward_passes.specialize": ("graphs",),
    "forward_passes.segments": ("graphs",),
    "forward_passes.row_rules": ("terms",),
    "forward_passes.flatten": ("forward_passes.inline_subgraphs", "forward_passes.specialize", "graphs"),
    "forward_passes.late_rows": ("forward_passes.logits", "graphs", "runtime", "terms"),
    "forward_passes.live_rows": (
        "forward_passes.flatten",
        "forward_passes.late_rows",
        "forward_passes.logits",
        "forward_passes.row_rules",
        "forward_passes.specialize",
        "graphs",
        "terms",
    ),
    "forward_passes.pack_live_rows": (
        "forward_passes",
        "graphs",
        "ops.linear_cross_entropy",
        "ops.live_rows",
        "terms.term",
    ),
    "forward_passes.outline": (
        "forward_passes.inline_subgraphs",
        "forward_passes.segments",
        "forward_passes.specialize",
        "graphs",
    ),
    "forward_passes.buckets": ("graphs", "terms"),
    "forward_passes.logits": ("graphs", "lazy_logits", "runtime", "terms"),
    "forward_passes.split_for_ddp": ("compile", "failures", "forward_passes", "graphs.aliasing", "options"),
    "validation": ("graphs", "pattern", "steps", "terms"),
    "registry": ("pattern", "patterns", "steps.callbacks", "validation"),
    "patterns": (
        "functional",
        "ops.answer_plan",
        "ops.dispatch",
        "ops.flex",
        "ops.varlen",
        "pattern",
        "patterns",
        "steps.questions",
    ),
    "assemble": ("compile", "failures", "forward_passes", "options", "pattern", "pipeline", "runtime"),
    "input_dispatch": ("compile", "failures", "forward_passes", "options", "pattern", "pipeline"),
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
                allowed = (*ALLOWED[room], "torch_internals")
                assert any(imported == a or imported.startswith(a + ".") for a in allowed), (
                    f"{path}: {imported} is not below {room}; move the code, or what it needs"
                )


def test_the_patterns_are_imported_as_a_subpackage():
    for _, path in sources():
        assert not re.search(r"^\s*(from|import) patterns\b", path.read_text(), re.MULTILINE), path


# Private names: those with a part that begins with one underscore.

BY_NAME = ("getattr", "hasattr", "setattr", "delattr")
NAMEDTUPLE = {"_asdict", "_fields", "_replace"}  # public methods, in spite of their names


def private(name: str) -> set[str]:
    return {part for part in name.split(".") if part.startswith("_") and not part.startswith("__")}


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and name of every use of a private name that no class of the file defines."""
    own = set(defined_in_classes(tree)) | NAMEDTUPLE
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if id(node) not in inner:
            yield from ((node.lineno, name) for name in names_in(node) if private(name) - own)


def defined_in_classes(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (each.name for each in node.body if isinstance(each, ast.FunctionDef))
            yield from (each.id for each in ast.walk(node) if is_stored(each, ast.Name))
            yield from (each.attr for each in ast.walk(node) if is_stored(each, ast.Attribute))


def is_stored(node: ast.AST, kind: type) -> bool:
    of_self = not isinstance(node, ast.Attribute) or ast.unparse(node.value) == "self"
    return isinstance(node, kind) and of_self and isinstance(node.ctx, ast.Store)


def names_in(node: ast.AST) -> list[str]:
    """The names that a node of the syntax tree imports or reads: x._y for getattr(x, "_y") too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module or ''}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
        return [
            f"{dotted(node.args[0])}.{ast.literal_eval(each)}" for each in node.args[1:2] if is_text(each)
        ]
    return [dotted(node)] if isinstance(node, ast.Attribute) else []


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def dotted(node: ast.AST) -> str:
    """The name of an attribute: a.b.c. What is called, and a private name of the file itself, is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) and not private(node.id) else ""


def test_private_names_of_torch_are_in_torch_internals_and_ours_in_their_files():
    for name, path in sources():
        if not name.startswith("torch_internals"):
            for line, used in private_uses(ast.parse(path.read_text())):
                pytest.fail(
                    f"{path}:{line}: {used} is private. If it is torch's, move its use to a function in "
                    "liger_compile/torch_internals/; if it is ours, give it a public name."
                )


def test_versions_of_torch_are_compared_in_torch_internals():
    for name, path in sources():
        assert name.startswith("torch_internals") or "torch.__version__" not in path.read_text(), path


# A row of the table in the docstring of a module of torch_internals: parts, the versions of torch that have them, and
# when they can go.
ROW = re.compile(r"^(\S.*?)(?: \(.*\))?\s{2,}(2\.1[13](?: to 2\.13)?)\s{2,}(\S.*)$", re.MULTILINE)


def tables() -> Iterator[tuple[Path, ast.Module, dict[str, str]]]:
    """The modules of torch_internals with their tables: from a part to the versions of torch that have it."""
    for name, path in sources():
        if name.startswith("torch_internals."):
            tree = ast.parse(path.read_text())
            rows = ROW.findall(ast.get_docstring(tree, clean=False) or "")
            yield path, tree, {part: versions for parts, versions, _ in rows for part in parts.split(", ")}


def test_every_private_part_of_torch_has_a_row():
    for path, tree, table in tables():
        used = set()
        for line, name in private_uses(tree):
            rows = [row for row in table if is_row_of(row, name)]
            assert rows, f"{path}:{line}: add a row for {name} to the table in the docstring of this module"
            used.update(rows)
        assert used == set(table), f"{path}: remove the rows of what is not used: {set(table) - used}"


def is_row_of(row: str, name: str) -> bool:
    """Whether a row is about a name: about it, about the module that has it, or about a private attribute in it."""
    return f"{name}.".startswith(f"{row}.") or row.rpartition(".")[2] in set(name.split(".")) & private(name)


def test_the_tables_hold_for_this_torch():
    version = ".".join(torch.__version__.split(".")[:2])
    for _, _, table in tables():
        for part, versions in table.items():
            if part.startswith("torch.") and versions in (version, "2.11 to 2.13"):
                pkgutil.resolve_name(part)


# Programs beside the package: the bench, and what several tests share. They use public names as users do.

PUBLIC = ("liger_compile", "liger_compile.functional", "liger_compile.patterns", "liger_compile.testing")

OF_TORCH = "the one folder with private parts of torch"

# The other names that they use, by file, with the reason. A prefix allows what is below it.
BESIDE = {
    "bench/compile_time.py": {
        "torch._dynamo.utils.compilation_time_metrics": "no public name for the time of each phase"
    },
    "bench/ddp_kept.py": {
        "liger_compile.forward_passes.buckets": "compares the places where parts begin with other places",
        "liger_compile.forward_passes.split_for_ddp.places_to_cut": "the name that it replaces for that",
    },
    "bench/family_step.py": {
        "monkey_patch._apply_liger_kernel_to_instance": "how liger-kernel patches a model",
    },
    "bench/family_table.py": {
        "cls._from_config": "transformers has no public name for a model of one class in another dtype",
    },
    "bench/rotary_tiles.py": {
        "liger_compile.kernels": "measures the tiles of kernels, which only kernels know"
    },
    "bench/step.py": {
        "torch._functorch.config": "no public name for the memory budget, with which it compares"
    },
    "bench/timing.py": {"torch.cuda._sleep": "no public name; the CPU has to launch ahead"},
    "bench/vocabulary.py": {
        "liger_compile.ops.alignment": "measures the split of the head at other alignments",
        "liger_compile.ops.linear_cross_entropy": "measures the matmuls of one chunk of that op",
    },
    "bench/zoo.py": {
        "liger_compile.backend.liger": "counts the graphs that it passes on to the backend",
        "torch.utils._pytree": "no public name in torch 2.11",
    },
    "tests/helpers/examples.py": {
        "liger_compile.for_inductor.is_used_for_inductor": "whether a call that asks for Inductor gets this backend",
        "model._orig_mod": "no public name of the module in a compiled one",
    },
    "tests/helpers/gradients.py": {
        "liger_compile.testing.precision": "gradients as the test kit takes them",
        "liger_compile.torch_internals": OF_TORCH,
    },
    "tests/helpers/kernels.py": {
        "liger_compile.kernels.launch": "the kernels are tested without the ops",
        "liger_compile.testing.precision": "numbers that the assertions of the test kit do not return",
        "liger_compile.torch_internals": OF_TORCH,
    },
    "tests/helpers/large_graphs.py": {
        "liger_compile.testing.graphs": "records graphs without Dynamo",
        "liger_compile.torch_internals": OF_TORCH,
    },
    "tests/helpers/mask_programs.py": {
        "liger_compile.terms": "the proofs about masks are tested without a graph",
        "liger_compile.torch_internals": OF_TORCH,
        "torch._dynamo.source.ConstantSource": "no public name; a symbolic size needs a source",
    },
    "tests/helpers/softmax_questions.py": {
        "liger_compile.ops": "the op answers more questions than public functions ask",
    },
    "tests/helpers/versions.py": {"torch._dynamo.exc.BackendCompilerFailed": "no public name of the error"},
    "tests/helpers/row_programs.py": {
        "liger_compile.steps.tails": "writes the programs that the op receives from the rewriter",
        "liger_compile.torch_internals": OF_TORCH,
    },
}
ROOT = Path(__file__).parents[1]
FILES_BESIDE = [
    path for folder in ("bench", "tests/helpers") for path in sorted((ROOT / folder).glob("*.py"))
]
PATH_OF_OURS = re.compile(r"liger_compile(\.\w+)+")


def names_beside(path: Path) -> Iterator[tuple[int, str]]:
    """The line and dotted name of each use of ours that is not public, and of each private name of others."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [node.value] if is_text(node) and PATH_OF_OURS.fullmatch(node.value) else names_in(node)
        yield from ((node.lineno, name) for name in names if is_ours(name) and not is_public(name))
    yield from ((line, name) for line, name in private_uses(tree) if not is_ours(name))


def is_ours(name: str) -> bool:
    return name.partition(".")[0] == "liger_compile"


def is_public(name: str) -> bool:
    """Whether a name is one that docs/stability.md lists, or an attribute of such a name."""
    owner = next(
        (package for package in sorted(PUBLIC, reverse=True) if name.startswith(f"{package}.")), None
    )
    if owner is None:
        return name in PUBLIC
    first = name.removeprefix(f"{owner}.").partition(".")[0]
    module = pkgutil.resolve_name(owner)
    return first in getattr(module, "__all__", vars(module)) and not first.startswith("_")


@pytest.mark.parametrize("path", FILES_BESIDE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_programs_beside_the_package_use_public_names(path: Path):
    listed, used = BESIDE.get(path.relative_to(ROOT).as_posix(), {}), set()
    for line, name in names_beside(path):
        reasons = {entry for entry in listed if f"{name}.".startswith(f"{entry}.")}
        used |= reasons
        assert reasons, f"{path}:{line}: {name} is not public; use a public name, or list it with the reason"
    assert used == set(listed), f"{path} does not use {set(listed) - used}: remove the reasons"


def test_paths_in_strings_are_names():
    """As of mock.patch: a module that no longer has the name would be noticed only when the program runs."""
    for path in FILES_BESIDE:
        for node in ast.walk(ast.parse(path.read_text())):
            if is_text(node) and PATH_OF_OURS.fullmatch(node.value):
                assert pkgutil.resolve_name(node.value), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from liger_compile.steps import match", "liger_compile.steps.match"),
        ("import liger_compile.steps.match", "liger_compile.steps.match"),
        ("import liger_compile\nliger_compile.steps.match", "liger_compile.steps.match"),
        ('patch("liger_compile.steps.match")', "liger_compile.steps.match"),
        ("from liger_compile import validation", "liger_compile.validation"),
    ],
)
def test_a_use_of_what_is_not_public_is_found(tmp_path: Path, source: str, name: str):
    (tmp_path / "program.py").write_text(source)
    assert name in {found for _, found in names_beside(tmp_path / "program.py")}


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
        if path.stem not in ("__init__", "placements", "profit"):  # shared rules
            assert (tests / f"test_{path.stem}.py").exists(), path.stem
