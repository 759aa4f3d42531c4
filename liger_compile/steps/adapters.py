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
        chain = _before_casts(down.args[0])  # autocast casts x anew for each layer
        by_input.setdefault((chain[-1], *map(_kind, (*chain, down.args[1]))), []).append(down)
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
    return (
        f"adapters that read the same input are joined: {len(groups)} of {count} matmuls remain"
        if groups
        else None
    )


def _joinable(downs: Sequence[Node], mutations: Mutations, regions: Regions) -> Iterator[list[Node]]:
    """Yields groups of nodes that may all be computed in place of the first."""
    waiting = list(downs)
    while waiting and not regions.why_uncertain:
        first = waiting[0]
        group = [first, *(down for down in waiting[1:] if _may_move(down, first, mutations, regions))]
        yield group
        joined = set(group)
        waiting = [down for down in waiting if down not in joined]


def _may_move(down: Node, first: Node, mutations: Mutations, regions: Regions) -> bool:
    """Returns whether a node computes the same at the place of `first`: in the same modes, from the same values."""
    if regions.of[down] != regions.of[first]:
        return False
    position = mutations.position
    x, weight = (_before_casts(operand) for operand in down.args)
    moved = [node for node in weight if position[node] > position[first]]
    if weight[-1] in moved or any(regions.of[node] != regions.of[first] for node in moved):
        return False
    start = min(position[node] for node in (first, *_before_casts(first.args[0])[:-1]))
    return all(mutations.write_between(node, start - 1, position[down]) is None for node in (*x, *weight))


def _kind(node: Node) -> tuple[Any, ...]:
    value = _value(node)
    return value.dtype, value.device, value.requires_grad


def _before_casts(operand: Any) -> list[Node]:
    """Returns the operand, the node that it is a cast of, and so on."""
    chain: list[Node] = [operand]
    while chain[-1].op == "call_method" and chain[-1].target == "to" and len(chain[-1].all_input_nodes) == 1:
        chain.extend(chain[-1].all_input_nodes)
    return chain


def _join(graph: Graph, group: Sequence[Node], region: Region) -> None:
    first: Any = group[0]
    x: Any = first.args[0]
    for down in group[1:]:
        for cast in reversed(_before_casts(down.args[1])[:-1]):
            if cast > first:
                first.prepend(cast)
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
        casts = _before_casts(down.args[0])[:-1]
        for node in (down, *casts):
            if not node.users:
                graph.erase_node(node)


def _value(node: Any) -> torch.Tensor:
    return node.meta["example_value"]
