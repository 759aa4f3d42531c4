"""Finds the regions of a graph that repeat: layers that do the same to other values.

A region is a run of consecutive nodes. Two regions are equal if their nodes, in order, call the same functions with the
same constants in the same modes on tensors with the same properties, and read from within the region at the same
positions. Values that come from outside may differ, such as the parameters of a layer.

Only the structure of the graph decides; module paths only choose between cuts that are equally good. So the layers of a
plain function are found too, and layers in groups (a window in every other layer) are found with their period.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import EllipsisType, NoneType
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from liger_compile.graphs.aliasing import graph_of
from liger_compile.graphs.regions import Regions

FEWEST_CALLS = (
    4  # of equal regions: with fewer, compiling the parts takes about as long as compiling the whole
)
FEWEST_NODES = (
    12  # of a region, with those of its subgraphs: a shorter one is part of a layer, and to be fused
)
MOST_PERIODS = 64  # that are tried

# Constants that are equal if their types and texts are; of other constants, only the same object is equal.
_PLAIN = (
    *(NoneType, bool, int, float, complex, str, range, EllipsisType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
_OPERAND = "an operand"  # in the place of a node among arguments; no string of a graph is an operand
_NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Repeats:
    """Equal regions that follow one another, in graph order; `regions[call][position]` is a node."""

    regions: tuple[tuple[Node, ...], ...]

    @property
    def nodes(self) -> Iterator[Node]:
        return (node for region in self.regions for node in region)


def find_repeats(graph: Graph, regions: Regions) -> list[Repeats]:
    """Returns runs of regions whose nodes are alike one by one, in graph order; `agreeing` proves the rest."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    bodies: dict[GraphModule, Any] = {}
    names: dict[Any, int] = {}
    masks = _masks(graph)
    labels = [
        names.setdefault((_label(node, regions, bodies), _masks_read(node, masks)), len(names))
        for node in nodes
    ]
    weights = [1 + (_size(body) if (body := graph_of(node)) else 0) for node in nodes]
    found, spans = [], [(0, len(nodes))]
    periods = _periods(labels)
    while spans:
        start, end = spans.pop()
        run = _longest_run(labels, start, end, periods)
        if run is None:
            continue
        first, last = _phased(nodes[run.start : run.end], run.period)
        spans += [(start, run.start + first), (run.start + last, end)]
        if sum(weights[run.start : run.start + run.period]) >= FEWEST_NODES:
            starts = range(run.start + first, run.start + last, run.period)
            found.append(tuple(tuple(nodes[at : at + run.period]) for at in starts))
    return [Repeats(regions) for regions in sorted(found, key=lambda regions: nodes.index(regions[0][0]))]


def _size(body: GraphModule) -> int:
    return sum(len(module.graph.nodes) for module in body.modules() if isinstance(module, GraphModule))


# Periods -------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Nodes from `start` to `end` in which each label recurs after `period`."""

    start: int
    end: int
    period: int

    @property
    def covered(self) -> int:
        return (self.end - self.start) // self.period * self.period


def _longest_run(labels: Sequence[int], start: int, end: int, periods: Iterable[int]) -> _Run | None:
    """Returns the run that covers most, and of several the one with the shortest period."""
    runs = (run for period in periods for run in _runs(labels, start, end, period))
    return max(runs, key=lambda run: (run.covered, -run.period), default=None)


def _periods(labels: Sequence[int]) -> list[int]:
    """Returns the distances at which most labels recur."""
    last: dict[int, list[int]] = {}
    votes: Counter[int] = Counter()
    for position, label in enumerate(labels):
        before = last.setdefault(label, [])
        # A label that a layer has several times recurs after the next few occurrences.
        votes.update(position - earlier for earlier in before[-8:])
        before.append(position)
    often = [period for period, count in votes.most_common(MOST_PERIODS) if count >= FEWEST_CALLS - 1]
    return sorted(often)


def _runs(labels: Sequence[int], start: int, end: int, period: int) -> Iterator[_Run]:
    """Yields the runs in which each label recurs after `period`, if it recurs often enough."""
    first = start
    for position in range(start, end - period + 1):
        ends = position == end - period
        if ends or labels[position] != labels[position + period]:
            if position + period - first >= FEWEST_CALLS * period:
                yield _Run(first, position + period, period)
            first = position + 1


def _phased(nodes: Sequence[Node], period: int) -> tuple[int, int]:
    """Returns start and end of whole periods: the fewest values pass from one to the next, and modules end there."""
    passing = _passing(nodes)

    def cost(phase: int) -> tuple[bool, int, int, int]:
        cut, count = phase + period, (len(nodes) - phase) // period
        return count < FEWEST_CALLS, passing[cut], _shared_depth(nodes[cut - 1], nodes[cut]), -count

    phase = min(range(period), key=cost)
    return phase, phase + (len(nodes) - phase) // period * period


def _passing(nodes: Sequence[Node]) -> list[int]:
    """Returns for each position how many values are computed before it and read by it or later, in these nodes."""
    position = {node: at for at, node in enumerate(nodes)}
    changes = [0] * (len(nodes) + 1)
    for node, at in position.items():
        last = max((position.get(user, 0) for user in node.users), default=0)
        if last > at:
            changes[at + 1] += 1
            changes[last + 1] -= 1
    return list(accumulate(changes))


def _shared_depth(first: Node, second: Node) -> int:
    """Returns how many modules are around both nodes."""
    stacks = [list(node.meta.get("nn_module_stack") or ()) for node in (first, second)]
    return next(
        (depth for depth, (a, b) in enumerate(zip(*stacks, strict=False)) if a != b), min(map(len, stacks))
    )


# Masks ---------------------------------------------------------------------------------------------------------


def _masks(graph: Graph) -> dict[Node, Any]:
    """Returns values that are equal for nodes with the same tensor that may be a mask: made of positions and flags.

    A body that gets one mask from all calls knows its meaning (terms/build.py); layers with other masks are others.
    """
    found: dict[Node, Any] = {}
    ids: dict[Any, int] = {}
    for node in graph.nodes:
        inputs = references(node)
        if node.op == "placeholder":
            if _may_be_mask(node):
                found[node] = node
        elif node.op in ("call_function", "call_method") and all(
            arg in found or isinstance(arg.meta.get("example_value"), _NUMBERS) for arg in inputs
        ):
            made_of = tuple(found.get(arg, arg) for arg in inputs)
            found[node] = ids.setdefault((described(node.target), _skeleton(node), made_of), len(ids))
    return found


def _may_be_mask(placeholder: Node) -> bool:
    """Returns whether an input has positions or flags, or numbers for all pairs of positions."""
    value = placeholder.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter) or value.requires_grad:
        return False
    rows, columns = map(described, value.shape[-2:]) if value.dim() > 1 else (None, 0)
    return value.dtype in (torch.bool, torch.int32, torch.int64) or rows == columns


def _masks_read(node: Node, masks: Mapping[Node, Any]) -> tuple[Any, ...]:
    return tuple(masks.get(arg) for arg in references(node))


# Labels --------------------------------------------------------------------------------------------------------


def _label(node: Node, regions: Regions, bodies: dict[GraphModule, Any]) -> Any:
    """Returns a value that is equal for nodes that do the same, whatever their operands."""
    body = graph_of(node)
    is_named = node.op in ("placeholder", "output")
    target = described_graph(body, bodies) if body else described(None if is_named else node.target)
    custom = node.meta.get("custom")
    return (
        node.op,
        target,
        *_skeleton(node),
        described(node.meta.get("example_value")),
        regions.of[node],
        described(custom) if custom else None,
        tuple(described(node.meta.get(mark)) for mark in ("recompute", "ac_graph_id")),
    )


def _skeleton(node: Node) -> tuple[Any, Any]:
    """Returns the arguments of a node, with a mark in the place of each node."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda _: _OPERAND)
    return described(args), described(kwargs)


def described_graph(body: GraphModule, known: dict[GraphModule, Any]) -> Any:
    """Returns a value that is equal for graphs that compute the same from their placeholders."""
    if body in known:
        return known[body]
    known[body] = ("in itself",)
    position = {node: at for at, node in enumerate(body.graph.nodes)}
    regions = Regions(body.graph)
    nodes = tuple(
        (_label(node, regions, known), tuple(position[arg] for arg in references(node))) for node in position
    )
    known[body] = (nodes, described({key: value for key, value in body.meta.items() if key.startswith("_")}))
    return known[body]


def references(node: Node) -> list[Node]:
    """Returns the nodes in the arguments of a node, in order, as often as they occur."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), lambda arg: found.append(arg))
    return found


def described(value: Any) -> Any:
    """Returns a hashable value that is equal for values with which a graph computes the same."""
    if isinstance(value, torch.Tensor):
        return _described_tensor(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expression = value.node.expr
        return ("symbol", expression) if expression.free_symbols else (str(type(value)), str(expression))
    if isinstance(value, Mapping):
        return type(value), tuple((key, described(each)) for key, each in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(described, value))
    if isinstance(value, slice):
        return "slice", described((value.start, value.stop, value.step))
    return (type(value), repr(value)) if isinstance(value, _PLAIN) else (type(value), _Same(value))


@dataclass(frozen=True)
class _Same:
    """An object that is equal to itself only."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _described_tensor(tensor: torch.Tensor) -> Any:
    if tensor.layout is not torch.strided:
        return _Same(tensor)
    return (
        type(tensor),
        described(tuple(tensor.shape)),
        described(tensor.stride()),
        described(tensor.storage_offset()),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        (tensor.is_conj(), tensor.is_neg(), tensor.is_inference()),
    )


# Proofs --------------------------------------------------------------------------------------------------------


def agreeing(repeats: Repeats, facts: Iterable[Any]) -> list[Repeats]:
    """Splits a run of regions where they read differently, or where these facts differ, one for each region."""
    seen = [(_reads(region), fact) for region, fact in zip(repeats.regions, facts, strict=True)]
    starts = [at for at in range(len(seen)) if at == 0 or seen[at] != seen[at - 1]]
    ends = [*starts[1:], len(seen)]
    return [Repeats(repeats.regions[start:end]) for start, end in zip(starts, ends, strict=True)]


def _reads(region: Sequence[Node]) -> Any:
    """Returns what each node of a region reads: a position in the region, or the properties of a value outside."""
    position = {node: at for at, node in enumerate(region)}
    return tuple(
        tuple(
            position[arg] if arg in position else (described(arg.meta.get("example_value")),)
            for arg in references(node)
        )
        for node in region
    )
