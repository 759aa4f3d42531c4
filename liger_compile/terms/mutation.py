"""Which nodes of a Dynamo graph write into tensors, and when: graphs at this level are not functional.

Storages come from the fake tensors, so aliases come free: views share one. The version counter of a fake
tensor is final and counts every write, so a storage whose writers are not all found here is known, and is
held to be written everywhere.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

_OPERATORS = {
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "setitem", "__setitem__"),
}


def tensors_of(node: Node) -> list[torch.Tensor]:
    """The fake tensors that a node stands for."""
    leaves = tree_leaves(node.meta.get("example_value"))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def storage_of(tensor: torch.Tensor) -> int | None:
    """An identity that a tensor shares with its views; None where there is no storage (sparse)."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def storages_of(node: Node) -> set[int | None]:
    """The storages of the tensors that a node stands for."""
    return {storage_of(tensor) for tensor in tensors_of(node)}


def written_arguments(node: Node) -> Iterator[Node]:
    """The arguments that a node writes into."""
    if node.op not in ("call_function", "call_method"):
        return
    out = node.kwargs.get("out")
    if out is not None:
        yield from (arg for arg in _nodes(out))
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _nodes(value)
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _nodes(node.kwargs.get(argument.name))
        return
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target in (operator.and_, operator.or_):  # named so because "and" and "or" are taken
        return
    if is_in_place(name) or _inplace_flag(node):
        yield from _nodes(node.args[0] if node.args else node.kwargs.get("input"))


def is_in_place(name: str) -> bool:
    """Whether an operator of this name writes into its first argument: x.mul_(y), x *= y, x[i] = y."""
    return name in _OPERATORS or (name.endswith("_") and not name.endswith("__"))


def _inplace_flag(node: Node) -> bool:
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if node.op != "call_function" or not inspect.isfunction(node.target):
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return False
    return bool(bound.arguments.get("inplace", False))


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _nodes(part)


class Mutations:
    """When each storage of a graph is written. Positions are indices into the graph's nodes."""

    def __init__(self, graph: Graph) -> None:
        self.position: dict[Node, int] = {}
        self._nodes = list(graph.nodes)
        self._writes: dict[int | None, list[int]] = {}
        self._everywhere: set[int | None] = set()
        written: set[int | None] = set()
        for position, node in enumerate(self._nodes):
            self.position[node] = position
            for argument in written_arguments(node):
                for storage in storages_of(argument):
                    self._writes.setdefault(storage, []).append(position)
            written.update(storage_of(tensor) for tensor in tensors_of(node) if tensor._version > 0)
        self._everywhere = written - set(self._writes)

    def is_clean(self, node: Node) -> bool:
        """True if nothing ever writes into what the node stands for."""
        return all(s not in self._writes and s not in self._everywhere for s in storages_of(node))

    def is_known(self, node: Node) -> bool:
        """True if all writes into what the node stands for are nodes of the graph that were recognised."""
        return not storages_of(node) & self._everywhere

    def epoch(self, node: Node, position: int) -> int | None:
        """How many writes what `node` stands for has seen before `position`; None if that is not known."""
        if not self.is_known(node):
            return None
        storages = storages_of(node)
        return sum(at < position for storage in storages for at in self._writes.get(storage, ()))

    def last_write(self, node: Node) -> Node | None:
        """What writes last into what `node` stands for."""
        writes = (at for storage in storages_of(node) for at in self._writes.get(storage, ()))
        last = max(writes, default=None)
        return None if last is None else self._nodes[last]

    def write_between(self, node: Node, first: int, last: int) -> int | None:
        """The position of a write into what `node` stands for, after `first` and before `last`."""
        if not self.is_known(node):
            return first
        for storage in storages_of(node):
            for at in self._writes.get(storage, ()):
                if first < at < last:
                    return at
        return None
