"""Finds which values of a graph share memory, and when that memory is written: Dynamo's graphs are not functional.

Storages come from the fake tensors: a tensor and its views share one. effects.py lists the arguments that a call writes
into. The version counter of a fake tensor is final and counts most writes. A storage with a nonzero version and no
writer found here therefore counts as written everywhere. `forget_placement` comes first: the versions of inputs also
count how torch made their fake tensors.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from liger_compile.graphs.effects import calls_bodies, effect_of, written_arguments
from liger_compile.torch_internals import fake_tensors
from liger_compile.torch_internals.dispatch import with_inner_tensors
from liger_compile.torch_internals.pytree import tree_leaves
from liger_compile.torch_internals.tensors import storage_of, version_of

# Higher-order ops that pass their last positional arguments to the placeholders of their subgraph.
SUBGRAPH_OPS = ("tag_activation_checkpoint", "invoke_subgraph")


def tensors_of(node: Node) -> list[torch.Tensor]:
    """Returns the fake tensors in the value of a node, and the tensors that they wrap."""
    leaves = tree_leaves(node.meta.get("example_value"))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return [part for tensor in tensors for part in with_inner_tensors(tensor)]


def storages_of(node: Node) -> set[int | None]:
    """Returns the storages of the tensors in the value of a node."""
    return {storage_of(tensor) for tensor in tensors_of(node)}


def forget_placement(graph: Graph) -> None:
    """Sets versions of a captured graph's inputs to 0 where nobody wrote: those of pieces of one buffer are 1."""
    fake_tensors.forget_placement(
        tensor for node in graph.find_nodes(op="placeholder") for tensor in tensors_of(node)
    )


def graph_of(node: Node) -> GraphModule | None:
    """Returns the graph that a get_attr or a call_module refers to; None if it is no graph."""
    if node.op not in ("get_attr", "call_module"):
        return None
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, GraphModule) else None


class Mutations:
    """The in-place writes into each storage of a graph. Positions are indices into the graph's nodes."""

    def __init__(self, graph: Graph) -> None:
        self.position: dict[Node, int] = {}
        self.nodes = list(graph.nodes)
        self._memory: dict[Node, frozenset[int | None]] = {}
        self._writes: dict[int | None, list[int]] = {}  # positions, in order
        self._bodies: dict[GraphModule, Mutations] = {}  # many calls may share one subgraph
        self._everywhere: set[int | None] = set()
        versions: set[int | None] = set()
        for position, node in enumerate(self.nodes):
            self.position[node] = position
            self._memory[node] = self._memory_of(node)
            for storage in self._written_by(node):
                self._writes.setdefault(storage, []).append(position)
            versions.update(storage_of(tensor) for tensor in tensors_of(node) if version_of(tensor) > 0)
        self._everywhere.update(versions - set(self._writes))

    def _memory_of(self, node: Node) -> frozenset[int | None]:
        """Returns a node's storages; for tensors without one (sparse, or wrapped by torch.func) also its inputs'."""
        found = storages_of(node)
        if None in found:
            found.update(*(self._memory[arg] for arg in node.all_input_nodes))
        return frozenset(found)

    def _written_by(self, node: Node) -> set[int | None]:
        written = list(written_arguments(node))
        if effect_of(node).moves_memory:
            # The fake tensor shows the final state; its earlier aliases are among its neighbors.
            near = {node for arg in written for node in (arg, *arg.users, *arg.all_input_nodes)}
            self._everywhere.update(*(storages_of(node) for node in near))
        storages = set().union(*(self.memory(arg) for arg in written))
        return storages | (self._written_in_bodies(node) if _has_bodies(node) else set())

    def _written_in_bodies(self, call: Node) -> set[int | None]:
        """Returns the outer storages that the called subgraphs write."""
        written: set[int | None] = set()
        for named in (call, *call.all_input_nodes):
            body = graph_of(named)
            if body is None:
                continue
            if body not in self._bodies:
                self._bodies[body] = Mutations(body.graph)
            inside = self._bodies[body]
            written.update(inside._writes)
            placeholders = body.graph.find_nodes(op="placeholder")
            changed = [
                at for at, node in enumerate(placeholders) if inside.memory(node) & inside._writes.keys()
            ]
            handed = handed_to(call, len(placeholders))
            arguments = call.all_input_nodes if handed is None else [handed[at] for at in changed]
            if changed:
                written.update(*(self.memory(arg) for arg in arguments if isinstance(arg, Node)))
        return written

    def memory(self, node: Node) -> frozenset[int | None]:
        """Returns identities of the memory of a node's tensors; values that may alias have one in common."""
        return self._memory[node] if node in self._memory else frozenset(storages_of(node))

    def is_clean(self, node: Node) -> bool:
        """Returns whether no node ever writes into the value of `node`."""
        return all(s not in self._writes and s not in self._everywhere for s in self.memory(node))

    def is_known(self, node: Node) -> bool:
        """Returns whether all writes into the value of `node` are nodes of the graph that were recognized."""
        return not self.memory(node) & self._everywhere

    def epoch(self, node: Node, position: int) -> int | None:
        """Returns the number of writes into the value of `node` before `position`; None if that is not known."""
        if not self.is_known(node):
            return None
        return sum(bisect_left(writes, position) for writes in self._writes_into(node))

    def write_between(self, node: Node, first: int, last: int) -> int | None:
        """Returns the position of a write into the value of `node` after `first` and before `last`, or None.

        Returns `first` if the writes are not known.
        """
        if not self.is_known(node):
            return first
        for writes in self._writes_into(node):
            at = bisect_right(writes, first)
            if at < len(writes) and writes[at] < last:
                return writes[at]
        return None

    def last_write(self, node: Node, position: int | None = None) -> Node | None:
        """Returns the last known node that writes into the value of `node`, before `position` if given; or None."""
        end = len(self.nodes) if position is None else position
        before = [writes[: bisect_left(writes, end)] for writes in self._writes_into(node)]
        last = max((writes[-1] for writes in before if writes), default=None)
        return None if last is None else self.nodes[last]

    def is_as_made(self, node: Node) -> bool:
        """Returns whether no node writes into the value of `node` after its creation."""
        return self.write_between(node, self.position[node], len(self.nodes)) is None

    def _writes_into(self, node: Node) -> Iterator[list[int]]:
        return (self._writes[storage] for storage in self.memory(node) if storage in self._writes)


def handed_to(call: Node, count: int) -> tuple[Any, ...] | None:
    """Returns the arguments for the `count` placeholders of the called graph, in order; None if not known."""
    is_known = call.op == "call_module" or getattr(call.target, "__name__", "") in SUBGRAPH_OPS
    if not is_known or (call.op == "call_module" and len(call.args) != count) or len(call.args) < count:
        return None
    return call.args[len(call.args) - count :]


def _has_bodies(node: Node) -> bool:
    return calls_bodies(node) or (node.op == "call_module" and graph_of(node) is not None)
