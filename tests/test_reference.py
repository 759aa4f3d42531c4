"""The reference pages of docs/ agree with the code: options, functions, the schema of to_dict(), lines, links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

import liger_compile
from liger_compile import backward_passes
from liger_compile.options import Options, descriptions
from liger_compile.report import BackwardReport, GraphReport, site_of_pass

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PLACED = re.compile(r"`([\w.]+)`\s+in\s+`([\w/]+\.py)`")
UPDATE = "run: python docs/update.py"

spec = importlib.util.spec_from_file_location("docs_update", DOCS / "update.py")
assert spec is not None and spec.loader is not None
update = importlib.util.module_from_spec(spec)
spec.loader.exec_module(update)


# What docs/update.py writes.


def test_generated_pages_are_up_to_date():
    differing = [path.name for path, text in update.current().items() if path.read_text() != text]
    assert not differing, f"{differing} differ from the code; {UPDATE}"


def test_the_generated_pages_have_every_option_and_name():
    page = (DOCS / "options.md").read_text()
    assert all(f"| `{option.key}` | `{option.default}` |" in page for option in descriptions())
    assert len(descriptions()) == len(Options.__dataclass_fields__)
    assert set(re.findall(r"`(backward\.\w+)` \|", page)) == {*backward_passes.NAMES}
    for name, module in (("functional", liger_compile.functional), ("api", liger_compile)):
        headings = re.findall(r"^## (\w+)$", (DOCS / f"{name}.md").read_text(), re.MULTILINE)
        assert headings == [name for name in module.__all__ if callable(getattr(module, name))]


def test_lines_follow_a_definition_that_has_moved():
    page = "`Options`,\n`liger_compile/nowhere.py:7`"
    moved = update.with_lines(page)
    line = update.definitions(ROOT / "liger_compile" / "options.py")["Options"]
    assert moved == f"`Options`,\n`liger_compile/options.py:{line}`"
    with pytest.raises(LookupError, match="no file defines 'NoSuchName'"):
        update.with_lines(page.replace("Options", "NoSuchName"))


def test_lines_are_those_of_functions_classes_methods_and_constants(tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text(
        "A = 1\n\nclass B:\n    c: int = 2\n\n    @property\n    def d(self): ...\n\ndef e(): ...\n"
    )
    assert update.definitions(file) == {"A": 1, "B": 3, "B.c": 4, "B.d": 7, "e": 9}


@pytest.mark.parametrize(
    "page", [path for path in sorted(DOCS.glob("*.md")) if PLACED.search(path.read_text())]
)
def test_a_name_that_a_page_places_in_a_file_is_defined_there(page: Path):
    """The form is (`name` in `file.py`), as in the glossary."""
    for name, file in PLACED.findall(page.read_text()):
        paths = [*(ROOT / "liger_compile").rglob(file), *ROOT.glob(file)]
        assert any(name in update.definitions(path) for path in paths), f"{file} does not define {name}"


def test_the_walk_has_its_stops_and_no_other_lines():
    page = (DOCS / "architecture.md").read_text()
    assert len(update.STOP.findall(page)) == len(re.findall(r"\.py:\d+`", page)) > 30


# The schema.


def schema() -> dict[str, dict[str, str]]:
    """The types of the fields of each object, as docs/report_schema.md has them."""
    sections = re.split(r"^## ", (DOCS / "report_schema.md").read_text(), flags=re.MULTILINE)[1:]
    return {
        section.partition("\n")[0]: dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE))
        for section in sections
    }


SCALARS = {"int": int, "str": str, "bool": bool, "float": (int, float)}


def problems(value: Any, kind: str, where: str = "") -> list[str]:
    """The ways in which a value is not of a type of the page: a scalar, an object, a list, a map, or null."""
    kind, is_optional, _ = kind.partition(" or null")
    if is_optional and value is None:
        return []
    if kind.startswith("list of "):
        is_list = isinstance(value, list)
        entries = enumerate(value if is_list else [])
        wrong = [] if is_list else [f"{where}: {value!r} is no list"]
        return wrong + [found for i, entry in entries for found in problems(entry, kind[8:], f"{where}[{i}]")]
    if kind.startswith("map of "):
        return [
            found for key, entry in value.items() for found in problems(entry, kind[7:], f"{where}.{key}")
        ]
    if kind in SCALARS:
        is_right = isinstance(value, SCALARS[kind]) and (kind == "bool") == isinstance(value, bool)
        return [] if is_right else [f"{where}: {value!r} is no {kind}"]
    fields = schema()[kind]
    differing = {*fields} ^ {*value}
    found = [f"{where}: {sorted(differing)} are not in both"] if differing else []
    for name in fields.keys() & value.keys():
        found += problems(value[name], fields[name], f"{where}.{name}")
    return found


class Model(nn.Module):
    """Has a site of each kind, a near miss, and a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 32, bias=False)
        self.norm = nn.RMSNorm(8, eps=1e-6)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.head(self.norm(x)), labels)
        torch._dynamo.graph_break()
        h = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
        log = torch.log_softmax(x, -1)
        return loss + h.float().sum() + log.gather(1, labels[:, None] % 8).sum()


def example() -> tuple[Model, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Model(), torch.randn(6, 8, requires_grad=True), torch.randint(32, (6,))


def test_an_explanation_has_the_fields_of_the_page():
    content = liger_compile.explain(*example()).to_dict()
    assert problems(content, "Explanation") == []
    assert content["graph_breaks"] and any(graph["near_misses"] for graph in content["graphs"])
    assert {site["kind"] for graph in content["graphs"] for site in graph["sites"]} >= {"replace", "annotate"}


def test_a_verification_has_the_fields_of_the_page():
    content = liger_compile.verify(*example(), options={"liger.inner": "aot_eager"}).to_dict()
    assert content["rows"] and problems(content, "Verification") == []


def test_changes_in_backward_have_the_fields_of_the_page():
    graph = Graph()
    node = graph.placeholder("tangents_1")
    node.meta["val"] = torch.empty(4, 8)
    graph.output(node)
    backward = BackwardReport(choices={"backward.early_free": "each buffer is freed"})
    backward.add("0/0", [site_of_pass("backward.rms_norm", node, "a sum is included", 64, 128)])
    report = GraphReport("0/0", 2, (), (), backward=backward)
    assert problems(report.to_dict(), "Report") == []
    assert report.to_dict()["backward"]["sites"] and GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": "1"}, r"\.schema: '1' is no int"),
        ({"seconds": True}, r"\.seconds: True is no float"),
        ({"new": 1}, r"\['new'\] are not in both"),
        ({"notes": [1]}, r"\.notes\[0\]: 1 is no str"),
        ({"saved_bytes": None}, r"\.saved_bytes: None is no int"),
    ],
)
def test_a_field_that_differs_from_the_page_is_found(change: dict[str, Any], problem: str):
    content = GraphReport("0/0", 2, (), ()).to_dict()
    assert problems(content, "Report") == []
    assert re.search(problem, "\n".join(problems(content | change, "Report")))


def test_the_page_names_the_version_of_the_code():
    from liger_compile.report import SCHEMA

    page = (DOCS / "report_schema.md").read_text()
    assert f"describes **schema {SCHEMA}**" in page
    assert page.count(f"the version of this schema: {SCHEMA} |") == 3
