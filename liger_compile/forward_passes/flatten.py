"""A copy of a graph without checkpointed layers: proofs about its values need no other graph.

In: a Dynamo graph that calls checkpointed layers. Out: a copy in which the layers are inlined, and for each node of the
copy the node that it copies, in the graph or in a layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from liger_compile.forward_passes import specialize
from liger_compile.forward_passes.inline_subgraphs import inline_call
from liger_compile.graphs.aliasing import graph_of

CHECKPOINT = "tag_activation_checkpoint"


def checkpoints(gm: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    """Yields the calls of checkpointed layers in a graph, with the graph of the layer."""
    for node in list(gm.graph.nodes):
        is_call = node.op == "call_function" and getattr(node.target, "__name__", "") == CHECKPOINT
        if is_call and (body := graph_of(node.args[0])) is not None:
            yield node, body


def flattened(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """Returns a copy of `gm` with inlined checkpoints, and the node that each of its nodes copies.

    Raises:
        ValueError: a layer is called more than once, or in a form that Dynamo does not produce.
    """
    flat = specialize.copied(gm)
    origin = {copy: node for node, copy in paired(gm, flat)}
    seen: set[GraphModule] = set()
    while calls := list(checkpoints(flat)):
        for call, body in calls:
            if body in seen:
                raise ValueError(f"{call.name} calls a layer that another call calls too")
            seen.add(body)
            for node, copy in inline_call(call, body).items():
                origin[copy] = origin[node]
    flat.recompile()
    return flat, origin


def paired(gm: GraphModule, copy: GraphModule) -> Iterator[tuple[Node, Node]]:
    """Yields the nodes of a graph and of its subgraphs, with their copies by `specialize.copied`."""
    yield from zip(gm.graph.nodes, copy.graph.nodes, strict=True)
    for name, child in gm.named_children():
        if isinstance(child, GraphModule):
            yield from paired(child, getattr(copy, name))
