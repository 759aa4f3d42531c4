"""Writes gradients in place where a functional operator would write a copy of a table as large as the vocabulary.

    scale(saved, factor)                       `saved` belongs to this backward alone ("donated"): scaled in place
    total + embedding_backward(dy, indices)    `total` has no other user: rows are added in place, no table is made
    add_product(base, a, b, scale)             `base` is a matmul without another user: the product is added to it

A functional graph cannot express this before the partitioner: AOTAutograd traces no in-place writes into the inputs of
a backward. It adds the two gradients of a table that is both embedding and head only when both are computed.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from liger_compile.backward_passes.aten_graph import RESHAPES, bytes_of, origin
from liger_compile.backward_passes.runner import Applied, Backward
from liger_compile.graphs.aliasing import storage_of

_aten, _ours = torch.ops.aten, torch.ops.liger_compile

# Operators whose result has its own memory in any compiler; our ops, which are functional, have it too. Elementwise
# operators are not listed: a compiler may simplify one away and return its input.
_MAKES_MEMORY = (_aten.mm.default, _aten.addmm.default)


def scale_in_place(backward: Backward) -> Iterator[Applied]:
    """Multiplies a saved gradient by the incoming gradient in place."""
    graph, own = backward.graph, _owned(backward)
    for node in graph.find_nodes(op="call_function", target=_ours.scale.default):
        gradient, factor = node.args
        if _may_be_written(gradient, node, own):
            _write(graph, node, gradient, _ours.scale_in_place.default, gradient, factor)
            yield Applied(node, "a saved gradient is scaled in place", memory=bytes_of(gradient))


def add_embedding_rows_in_place(backward: Backward) -> Iterator[Applied]:
    """Adds the gradient of an embedding to the other gradient of the same table, row by row."""
    graph, own = backward.graph, _owned(backward)
    for node in graph.find_nodes(op="call_function", target=_ours.embedding_backward.default):
        if (total := _added_to(graph, node, own)) is not None:
            yield Applied(node, "rows are added to the gradient of the head in place", memory=bytes_of(total))


def add_products_in_place(backward: Backward) -> Iterator[Applied]:
    """Adds an adapter's product to the result of a linear layer. The graph may be one of forward too."""
    graph = backward.graph
    for node in graph.find_nodes(op="call_function", target=_ours.add_product.default):
        base, *others = node.args
        if _is_fresh(base, node):
            _write(graph, node, base, _ours.add_product_in_place.default, base, *others)
            yield Applied(node, "an adapter's product is added in place", traffic=2 * bytes_of(base))


def _is_fresh(base: Any, reader: Node) -> bool:
    """Returns whether a matmul made `base`, and only `reader` reads the matmul or a view of it."""
    chain = origin(base, RESHAPES)
    readers = (reader, *chain)
    return chain[-1].target in _MAKES_MEMORY and all(
        [*node.users] == [user] for node, user in zip(chain, readers, strict=False)
    )


def _owned(backward: Backward) -> set[Node]:
    return _alone_in_memory(backward.graph.find_nodes(op="placeholder"), backward.donated)


def _alone_in_memory(placeholders: list[Node], donated: Collection[int]) -> set[Node]:
    """Returns the donated placeholders that share memory with no other: two saved tensors may alias, both donated."""
    values = {node: node.meta.get("val") for node in placeholders}
    storages = {node: storage_of(val) for node, val in values.items() if isinstance(val, torch.Tensor)}
    shared = Counter(storages.values())
    candidates = (node for position, node in enumerate(placeholders) if position in donated)
    return {node for node in candidates if node in storages and shared[storages[node]] == 1}


def _added_to(graph: Graph, node: Node, own: Collection[Node]) -> Node | None:
    """Adds the rows in place to the other operand of their sum, if it has no other user. Returns that tensor."""
    dy, indices, _, padding_idx, scales_by_frequency = node.args
    (reader, *others) = node.users
    if others or scales_by_frequency or reader.kwargs:
        return None
    if reader.target is _aten.addmm.default and reader.args[0] is node:
        total: Any = _product_of(graph, reader)  # Inductor makes an addmm of a matmul and a sum
    elif reader.target is _aten.add.Tensor:
        total = next((addend for addend in reader.args if addend is not node), None)
    else:
        return None
    if not _may_be_written(total, reader, own) or not _is_alike(total, reader):
        return None
    _write(graph, reader, total, _ours.add_embedding_backward.default, total, dy, indices, padding_idx)
    graph.erase_node(node)
    return total


def _product_of(graph: Graph, addmm: Node) -> Node:
    """Splits an addmm into a matmul and a sum; returns the matmul."""
    added, *factors = addmm.args
    with graph.inserting_before(addmm):
        product = graph.call_function(_aten.mm.default, tuple(factors))
    product.meta["val"] = addmm.meta["val"]
    addmm.target, addmm.args = _aten.add.Tensor, (product, added)
    return product


def _may_be_written(total: Any, reader: Node, own: Collection[Node]) -> bool:
    """Returns whether only `reader` reads `total` or memory that it shares. An earlier scaling in place may read it."""
    if not isinstance(total, Node):
        return False
    if [user for user in total.users if user.target is not _ours.scale_in_place.default] != [reader]:
        return False
    made_by: Any = total
    if total.target is operator.getitem:
        made_by = total.all_input_nodes[0]
        if any(user is not total and user.args == total.args for user in made_by.users):
            return False
    is_ours = getattr(made_by.target, "namespace", "") == _ours.name
    return total in own or made_by.target in _MAKES_MEMORY or is_ours


def _is_alike(a: Node, b: Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and x.shape == y.shape and x.is_contiguous()


def _write(graph: Graph, instead_of: Node, written: Node, op: Any, *args: Any) -> None:
    """Replaces `instead_of` by `op`, which writes the same result into `written`."""
    with graph.inserting_before(instead_of):
        graph.call_function(op, args).meta["val"] = None
    instead_of.replace_all_uses_with(written)
    graph.erase_node(instead_of)
