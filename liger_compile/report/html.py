"""Lays out reports as one HTML page without any other file: modules as a tree, sites in color, lines of source.

Equal layers are one row: modules whose names are numbers, whose classes are equal, and which have equal sites. Strings
come from the reports; nothing here decides anything.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Template
from typing import TYPE_CHECKING

from liger_compile.report.render import folded, size

if TYPE_CHECKING:
    from liger_compile.report.report import GraphReport, Near, Place, Site

LABELS = {
    "replace": "replaced",
    "annotate": "marked for recompute",
    "leave": "left alone",
    "near": "near miss",
    "backward": "in backward",
}


@dataclass(frozen=True)
class _Mark:
    """A site or a near miss, as the page shows it."""

    kind: str
    pattern: str
    reason: str
    place: Place
    facts: tuple[str, ...]
    saved_bytes: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        return self.kind, self.pattern, self.reason, self.place.source, self.facts, self.saved_bytes


@dataclass
class _Module:
    """A module of the tree, or several equal ones; `kept` are the bytes that their own code keeps for backward."""

    names: list[str]
    module_class: str = ""
    kept: int = 0
    marks: list[_Mark] = field(default_factory=list[_Mark])
    children: dict[str, _Module] = field(default_factory=dict[str, "_Module"])

    @property
    def key(self) -> tuple[object, ...]:
        marks = tuple(mark.key for mark in self.marks)
        children = tuple((name, child.key) for name, child in self.children.items())
        return self.module_class, marks, children

    @property
    def total_kept(self) -> int:
        return self.kept + sum(child.total_kept for child in self.children.values())

    @property
    def total_saved(self) -> int:
        """The bytes that the module and all below it no longer keep."""
        own = sum(mark.saved_bytes for mark in self.marks if mark.kind in ("replace", "annotate"))
        return own + sum(child.total_saved for child in self.children.values())

    def take_in(self, other: _Module) -> None:
        """Adds the bytes and marks of a module with an equal key, and of all below it."""
        self.kept += other.kept
        self.marks += other.marks
        for name, child in other.children.items():
            self.children[name].take_in(child)


def page(
    graphs: Sequence[GraphReport],
    graph_breaks: Sequence[str] = (),
) -> str:
    """Returns a complete HTML document about graphs, and about the breaks between them."""
    parts = [_graph(graph) for graph in graphs]
    if not parts:
        parts.append("<p>No graph was compiled: nothing in this call computes with tensors.</p>")
    if graph_breaks:
        reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in graph_breaks)
        parts.append(f"<section><h2>Graph breaks</h2><ul>{reasons}</ul></section>")
    buttons = "".join(
        f'<button class="{kind}" data-kind="{kind}" aria-pressed="true">{label}</button>'
        for kind, label in LABELS.items()
    )
    return _PAGE.substitute(buttons=buttons, body="\n".join(parts))


def in_notebook(document: str) -> str:
    """Returns a frame with the document, so that its style and the notebook's do not meet."""
    return f'<iframe srcdoc="{html.escape(document)}" style="width: 100%; height: 32em; border: 0"></iframe>'


def _graph(graph: GraphReport) -> str:
    tree = _folded(_tree(_marks(graph), graph.kept_by_module or {}))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in (*graph.notes, *graph.late_notes))
    choices = "".join(
        f"<li>{html.escape(name)}: {html.escape(text)}</li>" for name, text in graph.backward.choices.items()
    )
    facts = f"<h3>Notes</h3><ul>{notes}{choices}</ul>" if notes or choices else ""
    heading = html.escape(graph.summary.removeprefix("liger_compile  "))
    return f"<section><h2>{heading}</h2>\n{_rows(tree, is_open=True)}\n{facts}</section>"


def _marks(graph: GraphReport) -> Iterator[_Mark]:
    for site in graph.sites:
        yield _mark_of(site, site.kind)
    for near in graph.near_misses:
        yield _mark_of_near(near)
    for site in graph.backward.sites:
        yield _mark_of(site, "backward")


def _mark_of(site: Site, kind: str) -> _Mark:
    facts = (
        f"ops: {', '.join(site.ops)}" if site.ops else "",
        f"result: {site.result}" if site.result else "",
    )
    saved = site.saved_bytes or 0
    return _Mark(kind, site.pattern, site.reason, site.place, tuple(filter(None, facts)), saved)


def _mark_of_near(near: Near) -> _Mark:
    return _Mark("near", near.pattern, near.reason, near.place, (f"{near.score:.0%} alike",))


def _tree(marks: Iterable[_Mark], kept: Mapping[str, int]) -> _Module:
    root = _Module(["whole graph"])

    def at(path: str) -> _Module:
        module = root
        for name in filter(None, path.split(".")):
            module = module.children.setdefault(name, _Module([name]))
        return module

    for path, num_bytes in kept.items():
        at(path).kept += num_bytes
    for mark in marks:
        module = at(mark.place.module)
        module.marks.append(mark)
        module.module_class = mark.place.module_class or module.module_class
    return root


def _folded(module: _Module) -> _Module:
    """Returns the tree with equal numbered modules as one."""
    children: dict[str, _Module] = {}
    of_key: dict[tuple[object, ...], _Module] = {}
    equal: list[tuple[_Module, _Module]] = []
    for name, child in module.children.items():
        below = _folded(child)
        if name.isdigit() and (first := of_key.setdefault(below.key, below)) is not below:
            equal.append((first, below))
        else:
            children[name] = below
    for first, other in equal:
        first.names += other.names
        first.take_in(other)
    return _Module(module.names, module.module_class, module.kept, module.marks, children)


def _rows(module: _Module, *, is_open: bool) -> str:
    """Returns a module and all below it, as an element that opens and closes."""
    label = folded(module.names)[0] if len(module.names) > 1 else module.names[0]
    count = f' <span class="count">{len(module.names)} equal</span>' if len(module.names) > 1 else ""
    kind = f' <span class="class">{html.escape(module.module_class)}</span>' if module.module_class else ""
    marks = [*_grouped(module.marks)]
    chips = "".join(f'<i class="{mark.kind}" title="{html.escape(mark.pattern)}"></i>' for mark, _ in marks)
    summary = f"<b>{html.escape(label)}</b>{kind}{count} {chips}{_bytes(module)}"
    below = [_mark(mark, times) for mark, times in marks]
    below += [
        _rows(child, is_open=is_open and len(module.children) < 8) for child in module.children.values()
    ]
    opened = " open" if is_open else ""
    return f'<details class="module"{opened}><summary>{summary}</summary>{"".join(below)}</details>'


def _bytes(module: _Module) -> str:
    """Returns what a module keeps for backward, before and after, or only what it no longer keeps."""
    before, saved = module.total_kept, module.total_saved
    if before:
        after = max(before - saved, 0)
        bar = f'<meter min="0" max="{before}" value="{after}"></meter>'
        return f'<span class="bytes">{size(before)} &rarr; {size(after)} kept {bar}</span>'
    return f'<span class="bytes">{size(saved)} less kept</span>' if saved else ""


def _grouped(marks: Iterable[_Mark]) -> Iterator[tuple[_Mark, int]]:
    counts: dict[tuple[object, ...], list[_Mark]] = {}
    for mark in marks:
        counts.setdefault(mark.key, []).append(mark)
    for equal in counts.values():
        yield equal[0], len(equal)


def _mark(mark: _Mark, times: int) -> str:
    count = f" {times}x" if times > 1 else ""
    saved = f"{size(times * mark.saved_bytes)} less kept" if mark.saved_bytes else ""
    facts = html.escape("; ".join(filter(None, (*mark.facts, saved))))
    reason = f"<p>{html.escape(mark.reason)}</p>" if mark.reason else ""
    source = ""
    if mark.place.file:
        line = f"{html.escape(mark.place.source)}</a>  {html.escape(mark.place.code)}"
        source = f'<pre><a title="{html.escape(mark.place.file)}">{line}</pre>'
    head = f'<i class="{mark.kind}"></i> {html.escape(mark.pattern)}{count} <em>{LABELS[mark.kind]}</em>'
    body = f"{reason}{source}<p>{facts}</p>" if facts else f"{reason}{source}"
    return f'<details class="mark {mark.kind}"><summary>{head}</summary>{body}</details>'


_STYLE = """
:root { color-scheme: light dark; --replace: #2a9d57; --annotate: #2f7fd1; --leave: #8a8a8a; --near: #d98a1f;
  --backward: #8a5bd1; }
body { font: 14px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 1.5rem auto; padding: 0 1rem; }
h2 { font-size: 1.05rem; }
details { margin-left: 1.2rem; }
summary { cursor: pointer; padding: 0.1rem 0; }
i { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%; margin-right: 0.2em; background: var(--c); }
.class, .count, em { opacity: 0.7; font-style: normal; }
.bytes { float: right; font-variant-numeric: tabular-nums; }
meter { width: 6rem; }
pre { white-space: pre-wrap; margin: 0.2rem 0; padding: 0.3rem 0.5rem; border-left: 3px solid var(--c); }
.mark p { margin: 0.2rem 0; }
button { border: 1px solid var(--c); border-radius: 1em; padding: 0.1em 0.8em; margin-right: 0.4em; background: none;
  font: inherit; color: inherit; cursor: pointer; }
button[aria-pressed="false"] { opacity: 0.4; }
"""
_STYLE_OF_KINDS = "".join(
    f".{kind} {{ --c: var(--{kind}); }}\n"
    f"body.no-{kind} .mark.{kind}, body.no-{kind} i.{kind} {{ display: none; }}\n"
    for kind in LABELS
)
_SCRIPT = """
for (const button of document.querySelectorAll("button[data-kind]"))
  button.onclick = () => {
    const hidden = document.body.classList.toggle("no-" + button.dataset.kind);
    button.setAttribute("aria-pressed", String(!hidden));
  };
document.getElementById("all").onclick = () => {
  const all = [...document.querySelectorAll("details.module")], open = all.some(each => !each.open);
  for (const each of all) each.open = open;
};
"""
_PAGE = Template(
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>liger-compile</title>\n'
    f"<style>{_STYLE}{_STYLE_OF_KINDS}</style></head>\n"
    '<body><nav>$buttons<button id="all">open or close all modules</button></nav>\n$body\n'
    f"<script>{_SCRIPT}</script></body></html>\n"
)
