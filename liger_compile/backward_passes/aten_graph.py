"""What passes over AOTAutograd's graphs share: values, views, sums, and nodes that are put in."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

_aten = torch.ops.aten

RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)  # elements stay in order
VIEWS = (*RESHAPES, _aten.permute.default, _aten.transpose.int, _aten.t.default)
cast = torch.ops.prims.convert_element_type.default
mm, add, clone, slice_ = _aten.mm.default, _aten.add.Tensor, _aten.clone.default, _aten.slice.Tensor


def tensor_of(node: Any) -> torch.Tensor:
    return node.meta["val"]


def bytes_of(node: Any) -> int:
    """The size of its tensor; 0 where sizes are symbolic."""
    tensor = tensor_of(node)
    return tensor.nbytes if all(isinstance(size, int) for size in tensor.shape) else 0


def are_alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Node) or not isinstance(b, Node):
        return False
    x, y = tensor_of(a), tensor_of(b)
    return x.shape == y.shape and x.dtype == y.dtype


def origin(node: Any, through: Collection[Any] = VIEWS) -> list[Node]:
    """The node and what it is a view of, and so on."""
    chain = [node]
    while chain[-1].target in through:
        chain.append(chain[-1].args[0])
    return chain


def is_widening(node: Node) -> bool:
    """A cast that loses nothing, as under autocast, between gradients in a half precision and what is kept wider."""
    if node.target is not cast:
        return False
    before, after = tensor_of(node.args[0]).dtype, tensor_of(node).dtype
    return before.is_floating_point and after.is_floating_point and before.itemsize < after.itemsize


def before_widening(node: Any) -> list[Node]:
    """As `origin` through reshapes, to what was there before a cast that loses nothing."""
    chain = origin(node, RESHAPES)
    return [*chain, *origin(chain[-1].args[0], RESHAPES)] if is_widening(chain[-1]) else chain


def is_sum(node: Node) -> bool:
    """Of two different tensors of one shape and dtype."""
    if node.target is not add or node.kwargs:
        return False
    a, b = node.args
    return a is not b and are_alike(a, b)


def terms_of(node: Any) -> list[Node]:
    """What is summed there, sums of which something else is read being one. Terms are of any shape that has the same
    elements in the same order: sums are found through reshapes, and not through what moves elements."""
    found, waiting = [], [node]
    while waiting:
        term = waiting.pop()
        chain = origin(term, RESHAPES)
        first: Any = next(each for each in chain if each.target not in RESHAPES or len(each.users) > 1)
        if not is_sum(first) or len(first.users) > 1:
            found.append(term)
        else:
            waiting.extend(reversed(first.args))
    return found


def result(node: Node, which: int) -> Node | None:
    """One of several, if it is picked, and only once."""
    picked = [user for user in node.users if user.args[1] == which]
    return picked[0] if len(picked) == 1 else None


def call(graph: Graph, target: Any, *args: Any) -> Node:
    value = target(*map_arg(args, tensor_of))  # first, so that nothing is left behind if that fails
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node


def move_before(first: Node, node: Any) -> None:
    """With what it is a view of, where that comes later."""
    for each in reversed(origin(node)):
        if each > first:
            first.prepend(each)


def erase_unused(graph: Graph, nodes: Iterable[Node | None], *targets: Any) -> None:
    """Those of the nodes that nobody reads, and what they alone have read: of these targets, views, sums and casts."""
    functional = {*VIEWS, cast, mm, add, clone, slice_, operator.getitem, *targets}
    waiting = [node for node in nodes if node is not None]
    while waiting:
        node = waiting.pop()
        if not node._erased and not node.users and node.target in functional:
            waiting.extend(node.all_input_nodes)
            graph.erase_node(node)
