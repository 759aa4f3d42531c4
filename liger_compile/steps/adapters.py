"""Joins the adapters of one input: one matmul computes the `adapter_down`s of q, k and v, or of gate and up.

    adapter_down(x, A_q), adapter_down(x, A_k)      adapter_down(x, cat(A_q, A_k)), in two parts

x is then read once in forward. In backward, the gradients of the weights are one matmul, which reads x once, and the
gradient of x is another, which is rounded once instead of being rounded and added for each adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Graph, Node

from liger_compile.graphs.aliasing import Mutations
from liger_compile.graphs.guards import no_guards
from liger_compile.graphs.regions import Region, Regions
from liger_compile.steps.recording import Recorder

_ours = torch.ops.liger_compile


def join_adapters(graph: Graph, calls: Sequence[Region] = ()) -> str | None:
    """Joins adapters in place. Returns a note for the report, or None if no two adapters read one input.

    Args:
        calls: for a subgraph, the regions of its calls.
    """
    downs = graph.find_nodes(op="call_function", target=_ours.adapter_down.default)
    by_input: dict[Any, list[Node]] = {}
    for down in downs:
        by_input.setdefault((down.args[0], _value(down).dtype), []).append(down)
    if len(by_input) == len(downs):
        return None
    mutations, regions = Mutations(graph), Regions(graph, calls)
    groups = [
        group
        for alike in by_input.values()
        for group in _joinable(alike, mutations, regions)
        if len(group) > 1
    ]
    for group in groups:
        _join(graph, group, regions.of[group[0]])
    count = sum(map(len, groups))
    return f"{len(groups)} matmuls replace {count} of adapters that read the same input" if groups else None


def _joinable(downs: Sequence[Node], mutations: Mutations, regions: Regions) -> Iterator[list[Node]]:
    """Yields groups of nodes that may all be computed in place of the first."""
    waiting = list(downs)
    while waiting and not regions.why_uncertain:
        first = waiting[0]
        group = [first, *(down for down in waiting[1:] if _may_move(down, first, mutations, regions))]
        yield group
        waiting = [down for down in waiting if down not in group]


def _may_move(down: Node, first: Node, mutations: Mutations, regions: Regions) -> bool:
    """Returns whether a node computes the same at the place of `first`: in the same modes, from the same values."""
    if regions.of[down] != regions.of[first]:
        return False
    start, end = mutations.position[first], mutations.position[down]
    chain = _computed_after(down.args[1], start, mutations)
    if chain is None:
        return False
    read = (*down.all_input_nodes, *(operand for node in chain for operand in node.all_input_nodes))
    return all(mutations.write_between(node, start - 1, end) is None for node in read)


def _computed_after(weight: Any, start: int, mutations: Mutations) -> list[Node] | None:
    """Returns the casts of a weight that come after a position, in order; None if other nodes compute it."""
    chain: list[Node] = []
    while mutations.position[weight] > start:
        if weight.op != "call_method" or weight.target != "to" or len(weight.all_input_nodes) != 1:
            return None
        chain.insert(0, weight)
        (weight,) = weight.all_input_nodes
    return chain


def _join(graph: Graph, group: Sequence[Node], region: Region) -> None:
    first, x = group[0], group[0].args[0]
    mutations = Mutations(graph)
    for down in group[1:]:
        for node in _computed_after(down.args[1], mutations.position[first], mutations) or ():
            first.prepend(node)
    weights: list[Any] = [down.args[1] for down in group]
    sizes = [_value(weight).shape[0] for weight in weights]
    recorder = Recorder(graph, first, first)
    given = [recorder.knows(str(at), _value(node), node) for at, node in enumerate((x, *weights))]
    fake_mode = getattr(_value(x), "fake_mode", None) or nullcontext()
    with fake_mode, no_guards(_value(x)), region.entered(), recorder:
        packed = _ours.adapter_down.default(given[0], torch.cat(given[1:]))
        parts = torch.split(packed, sizes, -1)
    for down, part in zip(group, parts, strict=True):
        down.replace_all_uses_with(recorder.node_of[id(part)])
        graph.erase_node(down)


def _value(node: Any) -> torch.Tensor:
    return node.meta["example_value"]
