"""Keeps copies of inputs that the graph writes into later.

    y = x.clone(); z = (y * w).sin(); x.mul_(2)     backward reads y

Inductor removes a copy that nothing writes into, and writes an input where its memory is. So backward would read the
input after the write, as in stock torch.compile. A copy made by an opaque op stays.

In: a graph for Inductor. Out: the same graph, in which such copies pass through the op `rounded`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from liger_compile.graphs.effects import written_arguments
from liger_compile.terms.build import Terms

# The operations that may only copy: Inductor removes them, or reduces them to their operand.
COPYING = frozenset(
    (
        *("clone", "copy", "copy_", "setitem", "contiguous"),
        *("reshape", "flatten", "ravel", "expand_copy", "view_copy"),
        *("to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long"),
        *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"),
        *("repeat", "tile", "pad", "roll", "flip", "index_select", "gather", "take_along_dim", "where"),
    )
)


def keep_copies(graph: Graph, terms: Terms) -> tuple[str, ...]:
    """Inserts the op at copies of inputs that are written later; returns the notes for the report."""
    mutations = terms.mutations
    inputs = [node for node in graph.find_nodes(op="placeholder") if not mutations.is_clean(node)]
    written = {storage for node in inputs for storage in mutations.memory(node)}
    outputs = (node.meta.get("example_value") for node in graph.output_node().all_input_nodes)
    if not written or not any(isinstance(value, Tensor) and value.requires_grad for value in outputs):
        return ()
    copies = [
        (node, operands)
        for node in graph.nodes
        if (operands := [one for one in _copied_by(node, terms) if mutations.memory(one) & written])
    ]
    for node, operands in copies:
        if any(written_arguments(node)):
            for operand in operands:
                node.replace_input_with(operand, _opaque_copy(graph, operand, before=node))
        else:  # the copy itself is what backward reads and what the graph returns: one tensor for both
            kept = _opaque_copy(graph, node, before=node.next)
            node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)
    number = "1 copy is" if len(copies) == 1 else f"{len(copies)} copies are"
    note = f"{number} kept for backward, because the graph writes into the input that was copied later"
    return (note,) if copies else ()


def _copied_by(node: Node, terms: Terms) -> Iterator[Node]:
    """Yields the operands that a node copies to other memory, and that are written after it."""
    name, mutations = getattr(node.target, "__name__", node.target), terms.mutations
    if node not in mutations.position or not (name in COPYING or node in terms.passes_through):
        return
    into, since = set(written_arguments(node)), mutations.position[node]
    for operand in node.all_input_nodes:
        is_read = isinstance(operand.meta.get("example_value"), Tensor) and operand not in into
        is_moved = bool(into) or not mutations.memory(operand) & mutations.memory(node)
        if is_read and is_moved and mutations.write_between(operand, since, len(mutations.nodes)) is not None:
            yield operand


def _opaque_copy(graph: Graph, value: Node, before: Node) -> Node:
    with graph.inserting_before(before):
        kept = graph.call_function(torch.ops.liger_compile.rounded.default, (value,))
    kept.meta["example_value"] = value.meta["example_value"]
    return kept
