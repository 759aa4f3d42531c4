"""Helpers of the passes over AOTAutograd's graphs: values, views, sums, and inserted nodes."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from liger_compile.torch_internals.fx import is_erased
from liger_compile.torch_internals.operators import UNSAFE_VIEW

_aten = torch.ops.aten

RESHAPES = (_aten.view.default, UNSAFE_VIEW, _aten.reshape.default)  # elements stay in order
VIEWS = (*RESHAPES, _aten.permute.default, _aten.transpose.int, _aten.t.default)
cast = torch.ops.prims.convert_element_type.default
mm, add, clone, slice_ = _aten.mm.default, _aten.add.Tensor, _aten.clone.default, _aten.slice.Tensor


def tensor_of(node: Any) -> torch.Tensor:
    return node.meta["val"]


def bytes_of(node: Any) -> int:
    """Returns the bytes of a node's tensor; 0 if its sizes are symbolic."""
    tensor = tensor_of(node)
    return tensor.nbytes if all(isinstance(size, int) for size in tensor.shape) else 0


def are_alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Node) or not isinstance(b, Node):
        return False
    x, y = tensor_of(a), tensor_of(b)
    return x.shape == y.shape and x.dtype == y.dtype


def origin(node: Any, through: Collection[Any] = VIEWS) -> list[Node]:
    """Returns the node, the node that it is a view of, and so on."""
    chain = [node]
    while chain[-1].target in through:
        chain.append(chain[-1].args[0])
    return chain


def is_widening(node: Node) -> bool:
    """Returns whether a node is a lossless upcast, as under autocast between half-precision and wider gradients."""
    if node.target is not cast:
        return False
    before, after = tensor_of(node.args[0]).dtype, tensor_of(node).dtype
    return before.is_floating_point and after.is_floating_point and before.itemsize < after.itemsize


def before_widening(node: Any) -> list[Node]:
    """Like `origin` through reshapes, and further through a lossless upcast."""
    chain = origin(node, RESHAPES)
    return [*chain, *origin(chain[-1].args[0], RESHAPES)] if is_widening(chain[-1]) else chain


def is_sum(node: Node) -> bool:
    """Returns whether a node adds two different tensors of equal shape and dtype."""
    if node.target is not add or node.kwargs:
        return False
    a, b = node.args
    return a is not b and are_alike(a, b)


def terms_of(node: Any) -> list[Node]:
    """Returns the terms of a nested sum; an inner sum with other users counts as one term.

    The terms may differ in shape, but not in the order of their elements: the search passes through reshapes only.
    """
    found, waiting = [], [node]
    while waiting:
        term = waiting.pop()
        chain = origin(term, RESHAPES)
        first: Any = next(node for node in chain if node.target not in RESHAPES or len(node.users) > 1)
        if not is_sum(first) or len(first.users) > 1:
            found.append(term)
        else:
            waiting.extend(reversed(first.args))
    return found


def result(node: Node, which: int) -> Node | None:
    """Returns the node of one of several results, if exactly one node selects it."""
    picked = [user for user in node.users if user.args[1] == which]
    return picked[0] if len(picked) == 1 else None


def call(graph: Graph, target: Any, *args: Any) -> Node:
    value = target(*map_arg(args, tensor_of))  # first, so that a failure leaves the graph unchanged
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node


def move_before(first: Node, node: Any) -> None:
    """Moves a node before `first`, with the nodes that it is a view of, if they come later."""
    for part in reversed(origin(node)):
        if part > first:
            first.prepend(part)


def erase_unused(graph: Graph, nodes: Iterable[Node | None], *targets: Any) -> None:
    """Erases the nodes without users, and the operands that become unused: `targets`, views, sums and casts."""
    functional = {*VIEWS, cast, mm, add, clone, slice_, operator.getitem, *targets}
    waiting = [node for node in nodes if node is not None]
    while waiting:
        node = waiting.pop()
        if not is_erased(node) and not node.users and node.target in functional:
            waiting.extend(node.all_input_nodes)
            graph.erase_node(node)
