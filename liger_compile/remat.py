"""Marks for AOTAutograd's partitioner, which chooses what is kept for backward and what is computed again.

mark_for_recompute(): values that are cheap, so that backward computes them again instead of keeping them.

These are what Inductor was left with and told that it need not keep, and what ops returned whose pattern calls them
cheap. AOTAutograd takes the marks from Dynamo's nodes to what it traces of them, and its partitioner follows them.
They are in none of torch's cache keys; compile.py puts them there.

keep_what_written_inputs_give(): values that backward could not compute again. An input that the graph writes into holds
the later value by then, and the partitioner (torch 2.11 and 2.13) computes from it as if it held the earlier one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from liger_compile.graphs.aliasing import Mutations, tensors_of
from liger_compile.pattern import Decision


def mark_for_recompute(decisions: Iterable[Decision]) -> None:
    """Marks the nodes of the matches that are annotated, and those that stand in for what is cheap."""
    for decision in decisions:
        for node in _cheap_nodes(decision):
            _mark(node, CheckpointPolicy.MUST_RECOMPUTE)


def keep_what_written_inputs_give(graph: Graph, mutations: Mutations) -> None:
    """Marks the nodes that read or write the memory of an input that is written in `graph`."""
    inputs = graph.find_nodes(op="placeholder")
    written = {each for node in inputs if not mutations.is_clean(node) for each in mutations.memory(node)}
    for node in graph.nodes if written else ():
        is_call = node.op in ("call_function", "call_method")
        is_size = node.meta.get("example_value") is not None and not tensors_of(node)
        if is_call and not is_size and any(written & mutations.memory(arg) for arg in node.all_input_nodes):
            _mark(node, CheckpointPolicy.MUST_SAVE)


def _mark(node: Node, policy: CheckpointPolicy) -> None:
    node.meta["recompute"] = policy
    # The partitioner wants one; no user's checkpoint has it at this level.
    node.meta["ac_graph_id"] = 0


def _cheap_nodes(decision: Decision) -> Iterator[Node]:
    match = decision.match
    if decision.kind == "replace" and match.pattern.is_cheap:
        yield from (node for node in decision.inserted if not _is_one_a_row(node))
    if decision.kind == "annotate":
        kept = match.outputs if decision.keeps_outputs else ()
        yield from (node for node in match.nodes if node not in kept and not _is_one_a_row(node))


def _is_one_a_row(node: Node) -> bool:
    """A statistic, such as a norm's: it takes a reduction to make and next to nothing to keep."""
    value = node.meta.get("example_value")
    last = value.shape[-1] if isinstance(value, torch.Tensor) and value.dim() else None
    return isinstance(last, int) and last == 1
