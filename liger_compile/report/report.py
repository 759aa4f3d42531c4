"""Turns decisions into reports: strings and numbers, so that a report may outlive its graph.

The reasons are written where they arise (a pattern's check, steps/decide.py); render.py lays them out.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from liger_compile.pattern import Decision, NearMiss
from liger_compile.report.html import in_notebook, page
from liger_compile.report.render import counted, details, plural, size
from liger_compile.torch_internals.dynamo import readable_path
from liger_compile.torch_internals.operators import OpOverload
from liger_compile.torch_internals.structured_logs import log_artifact

SCHEMA = 1  # the version of the dictionaries that to_dict() returns; docs/report_schema.md documents them

_log = logging.getLogger("liger_compile")
_reports: deque[GraphReport] = deque(maxlen=256)


Paths = Mapping[str, str]  # from module paths of Dynamo, in a body, to those in one of its calls
HERE: Sequence[Paths] = ({},)  # the place of a graph that is called where it stands


@dataclass(frozen=True)
class Place:
    """A place in the user's program: the module that ran, and the line of source."""

    module: str = ""  # "model.layers.0.mlp"; empty for the outermost module and for plain functions
    module_class: str = ""  # "LlamaMLP"
    file: str = ""
    line: int = 0
    code: str = ""

    @staticmethod
    def of(nodes: Sequence[Node], root: Node) -> Place:
        """Returns the module that most of `nodes` ran in, and the line of source of `root`."""
        module, module_class = _module_of(nodes)
        return Place(module, module_class, *_source_of(root))

    @property
    def source(self) -> str:
        """File and line, as "modeling_llama.py:67"; empty where unknown."""
        return f"{os.path.basename(self.file)}:{self.line}" if self.file else ""

    def at(self, paths: Paths) -> Place:
        """Returns the place in a call of the body that this place is in."""
        named = {readable_path(path): readable_path(to) for path, to in paths.items()}
        around = [path for path in named if f"{self.module}.".startswith(f"{path}.")]
        if not around:
            return self
        longest = max(around, key=len)
        return dataclasses.replace(self, module=named[longest] + self.module[len(longest) :])


@dataclass(frozen=True)
class Site:
    """One match of a pattern, and the decision about it."""

    pattern: str
    kind: str
    reason: str
    place: Place
    ops: tuple[str, ...]  # the ops of the replacement
    result: str  # "f32[8, 256, 256]", "2 x bf16[8, 256]"
    saved_bytes: int | None

    def at(self, paths: Paths) -> Site:
        """Returns the same site in a call of the body that it is in."""
        return dataclasses.replace(self, place=self.place.at(paths))


@dataclass(frozen=True)
class Near:
    """A near miss of a pattern; its line of source is that of the node that differs."""

    pattern: str
    reason: str
    place: Place
    score: float

    def at(self, paths: Paths) -> Near:
        """Returns the same near miss in a call of the body that it is in."""
        return dataclasses.replace(self, place=self.place.at(paths))


@dataclass(eq=False)
class BackwardReport:
    """The changes to the graph of backward. It is filled when backward is compiled, possibly after forward has run.

    Args:
        sites: the changes that passes made, in order.
        choices: other choices for backward, by name.
        has_passes: whether passes run when backward is compiled. By default they do not where a CPU runs it.
        is_compiled: whether passes have run. They do not run where Inductor's cache has the compiled code.
    """

    sites: list[Site] = field(default_factory=list[Site])
    choices: dict[str, str] = field(default_factory=dict[str, str])
    has_passes: bool = False
    is_compiled: bool = False

    def plan(self) -> None:
        """Records that passes run when backward is compiled."""
        self.has_passes = True

    def choose(self, graph: str, name: str, text: str) -> None:
        """Records a choice for backward of the named graph, and logs it the first time."""
        if name not in self.choices:
            _log.debug("liger_compile  backward of graph %s: %s: %s", graph, name, text)
        self.choices[name] = text

    def add(self, graph: str, sites: Iterable[Site]) -> None:
        """Records and logs the changes that passes made to the graph of backward of the named graph."""
        sites = list(sites)
        self.is_compiled = True
        self.sites += sites
        counts = Counter(site.pattern for site in sites)
        text = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no change"
        _log.info("liger_compile  backward of graph %s: %s", graph, text)
        log_artifact("liger_compile_backward_report", {"graph": graph, **dataclasses.asdict(self)})


@dataclass(frozen=True, eq=False)
class GraphReport:
    """The result of the backend for one graph. `str()` is for people, `to_dict()` for programs."""

    name: str
    num_nodes: int
    sites: tuple[Site, ...]
    near_misses: tuple[Near, ...]
    notes: tuple[str, ...] = ()
    seconds: float | None = None
    variant: str = ""  # set where one graph is compiled more than once
    backward: BackwardReport = field(default_factory=BackwardReport)
    kept_by_module: Mapping[str, int] | None = None  # see kept.py; None except in an explanation
    late_notes: list[str] = field(
        default_factory=list[str]
    )  # on calls: functions that needed the values of late logits

    @staticmethod
    def of(
        gm: GraphModule,
        decisions: Iterable[Decision],
        near_misses: Iterable[NearMiss] = (),
        notes: Iterable[str] = (),
        *,
        num_nodes: int | None = None,
        places: Callable[[Any], Sequence[Paths]] = lambda _: HERE,
        seconds: float | None = None,
        kept_by_module: Mapping[str, int] | None = None,
    ) -> GraphReport:
        """Returns the report of a rewritten `gm`. Keeps no nodes.

        Args:
            num_nodes: the size of the graph, if bodies were outlined from `gm`.
            places: for a decision or a near miss in such a body, its places in the calls.
            seconds: the time that the rewrite took.
            kept_by_module: the bytes that eager mode keeps for backward, by module path.
        """
        decided = [(_site(decision), places(decision)) for decision in decisions]
        missed = [(_near(miss), places(miss)) for miss in near_misses]
        return GraphReport(
            name=str(gm.meta.get("dynamo_compile_id", "?")),
            num_nodes=len(gm.graph.nodes) if num_nodes is None else num_nodes,
            sites=tuple(site.at(paths) for site, at in decided for paths in at),
            near_misses=tuple(near.at(paths) for near, at in missed for paths in at),
            notes=tuple(notes),
            seconds=seconds,
            kept_by_module=kept_by_module,
        )

    def of_variant(self, variant: tuple[str, str] | None) -> GraphReport:
        """Returns this report with the name and the note of a variant; unchanged if `variant` is None."""
        if variant is None:
            return self
        name, note = variant
        return dataclasses.replace(self, variant=name, notes=(note, *self.notes))

    def with_notes(self, notes: Iterable[str]) -> GraphReport:
        """Returns this report with further notes at its end."""
        return dataclasses.replace(self, notes=(*self.notes, *notes))

    def with_late_notes(self, notes: list[str]) -> GraphReport:
        """Returns this report with a list that calls add notes to."""
        return dataclasses.replace(self, late_notes=notes)

    def count(self, kind: str) -> int:
        """Returns the number of sites of a kind: "replace", "annotate" or "leave"."""
        return sum(site.kind == kind for site in self.sites)

    @property
    def saved_bytes(self) -> int:
        """The bytes of activations that training no longer keeps, as far as known."""
        return sum(site.saved_bytes or 0 for site in self.sites if site.kind != "leave")

    @property
    def summary(self) -> str:
        """The report in one line."""
        counts = [f"{self.count('replace')} replaced", f"{self.count('leave')} left alone"]
        if self.count("annotate"):
            counts.insert(1, f"{self.count('annotate')} marked for recompute")
        counts.append(plural(len(self.near_misses), "near miss", "near misses"))
        variant = f" ({self.variant})" if self.variant else ""
        line = f"liger_compile  graph {self.name}{variant}, {self.num_nodes} nodes: {', '.join(counts)}"
        if self.saved_bytes:
            line += f"; {size(self.saved_bytes)} less kept for backward"
        if self.seconds is not None:
            line += f" ({self.seconds:.2f} s)"
        return line

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values that json.dumps accepts; docs/report_schema.md lists the fields."""
        counts = {kind: self.count(kind) for kind in ("replace", "annotate", "leave")}
        content = {
            "schema": SCHEMA,
            **dataclasses.asdict(self),
            "counts": counts,
            "saved_bytes": self.saved_bytes,
        }
        return json.loads(json.dumps(content))

    def _repr_html_(self) -> str:
        return in_notebook(page([self]))

    def __str__(self) -> str:
        return "\n".join([self.summary, *details(self)])


# The process-wide list of reports.


def record(report: GraphReport) -> None:
    """Appends to `reports()`, and writes to the logger (TORCH_LOGS="+liger_compile") and to tlparse."""
    _reports.append(report)
    _log.info("%s", report.summary)
    if _log.isEnabledFor(logging.DEBUG) and (lines := details(report)):
        _log.debug("%s", "\n".join(lines).lstrip("\n"))
    log_artifact("liger_compile_report", report.to_dict())


def reports() -> tuple[GraphReport, ...]:
    """Returns a report of every graph compiled in this process, oldest first (the last 256)."""
    return tuple(_reports)


def clear_reports() -> None:
    """Removes all reports."""
    _reports.clear()


# From nodes to strings.


def _site(decision: Decision) -> Site:
    match = decision.match
    return Site(
        pattern=match.pattern.name,
        kind=decision.kind,
        reason=decision.reason,
        place=Place.of(match.nodes, match.outputs[0]),
        ops=tuple(dict.fromkeys(filter(None, (_op_name(node) for node in decision.inserted)))),
        result=counted(_describe(node.meta.get("example_value")) for node in match.outputs),
        saved_bytes=decision.saved_bytes,
    )


def _op_name(node: Node) -> str:
    """Returns the name of the op that a node calls; empty for nodes that call no op."""
    target: object = node.target
    return cast("OpOverload[..., Any]", target).name() if isinstance(target, OpOverload) else ""


def site_of_pass(name: str, node: Node, text: str, memory: int, traffic: int) -> Site:
    """Returns the site of a pass: `memory` bytes are no longer allocated, about `traffic` bytes no longer moved."""
    reason = f"{text}; about {size(traffic)} less is read and written" if traffic else text
    return Site(
        pattern=name,
        kind="replace",
        reason=reason,
        place=Place.of([node], node),
        ops=(),
        result=counted(_describe(value) for value in _values(node.meta.get("val"))),
        saved_bytes=memory or None,
    )


def _values(value: Any) -> Sequence[Any]:
    return cast(Sequence[Any], value) if isinstance(value, tuple | list) else (value,)


def _near(miss: NearMiss) -> Near:
    culprit = miss.culprit if miss.culprit is not None and "stack_trace" in miss.culprit.meta else miss.root
    return Near(
        miss.pattern.name, miss.reason, Place.of(miss.nodes or [miss.root], culprit), round(miss.score, 2)
    )


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    dtype = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
    return f"{dtype}[{', '.join(str(size) for size in value.shape)}]"


def _module_of(nodes: Sequence[Node]) -> tuple[str, str]:
    # The deepest module that most of the nodes ran in. The last node alone would give "down_proj" for a whole
    # MLP; the module that all nodes share would give "layers.0" for a norm that includes the residual add before it.
    modules = [node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") for node in nodes]
    stacks = [list(stack.values()) for stack in modules if stack is not None]
    votes = Counter(entry for stack in stacks for entry in dict.fromkeys(stack))
    shared = [entry for entry, count in votes.items() if 2 * count > len(stacks)]
    if not shared:
        return "", ""
    path, cls = max(shared, key=lambda entry: len(entry[0]))
    return readable_path(path), getattr(cls, "__name__", str(cls))


_FRAME = re.compile(r'File "(?P<file>.+?)", line (?P<line>\d+), in .*(?:\n +(?P<code>.*))?')
_TORCH = os.path.dirname(torch.__file__) + os.sep


def _source_of(node: Node) -> tuple[str, int, str]:
    # The innermost frame outside PyTorch: inside nn.RMSNorm, for example, the user's line is that of the caller.
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    frames = [frame for frame in frames if not frame["file"].startswith(_TORCH)] or frames
    if not frames:
        return "", 0, ""
    return frames[-1]["file"], int(frames[-1]["line"]), (frames[-1]["code"] or "").strip()
