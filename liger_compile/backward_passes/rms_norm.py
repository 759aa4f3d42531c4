"""Fuses RMSNorm's backward with the adjacent sums.

In: a functional graph of aten operators, in which forward and backward of pre_norm are one node each. Its forward, the
norm of a residual stream, is recomputed for the gradients of the weights that multiply its result. Out:

    dx, dweight = backward(a + b + .., x, weight)
    dx + ds, norm(x, weight)                        dx, dweight, y = backward of all of it, in one pass over x

A compiler can fuse the same operators, except for dweight, the sum over the rows.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from liger_compile.backward_passes.aten_graph import (
    RESHAPES,
    before_widening,
    bytes_of,
    call,
    cast,
    erase_unused,
    is_sum,
    is_widening,
    mm,
    origin,
    result,
    tensor_of,
    terms_of,
)
from liger_compile.backward_passes.runner import Applied, Backward
from liger_compile.ops.pre_norm import MOST_SUMMED

_aten, _ours = torch.ops.aten, torch.ops.liger_compile
_norm, _backward = _ours.pre_norm.default, _ours.pre_norm_backward.default

_IN_MEMORY = (mm, _aten.addmm.default, _aten.bmm.default, _ours.scale.default, operator.getitem)


def fuse_rms_norms(backward: Backward) -> Iterator[Applied]:
    """Makes a norm's backward take up to three gradients, add that of the residual stream, and return the norm too."""
    for node in backward.graph.find_nodes(op="call_function", target=_backward):
        if applied := _fuse(backward.graph, node):
            yield applied


def _fuse(graph: Graph, backward: Node) -> Applied | None:
    dy, *of, needs_dweight = backward.args
    dys = [term for part in terms_of(dy) for term in terms_of(_unwidened(part))]
    if len(dys) > MOST_SUMMED or not all(_is_in_memory(origin(gradient)[-1]) for gradient in dys):
        return None  # a compiler better computes other gradients where they are read
    dx, dweight = result(backward, 0), result(backward, 1)
    total, ds = _added_to(dx, backward)
    norm = _norm_of(of)
    moved = () if norm is None else _between(norm, backward)
    if norm is not None and (backward in moved or ds in moved):
        norm, moved = None, ()  # x, or the gradient of the residual stream, depends on y

    y_dtype, ys = _read_as(norm)
    with graph.inserting_before(backward):
        dys, ds = (
            [_shaped(graph, gradient, dy) for gradient in dys],
            None if ds is None else _shaped(graph, ds, dy),
        )
        args = dys, ds, *of, needs_dweight, y_dtype
        fused = call(graph, _ours.pre_norm_backward_fused.default, *args)
        new_dx, new_dweight, y = (call(graph, operator.getitem, fused, which) for which in range(3))
        if total is not None:
            new_dx = _shaped(graph, new_dx, total)
    replaced = ((total or dx, new_dx), (dweight, new_dweight), *((norm, y) for norm in ys))
    for old, new in replaced:
        if old is not None:
            old.replace_all_uses_with(new)
    for node in moved:
        backward.prepend(node)
    unused = (dx, dweight, backward, norm, y, *itertools.chain.from_iterable(replaced))
    erase_unused(graph, unused, _backward, _norm)
    # One sum is written and read once less; so is x, from which the norm is recomputed.
    sums = len(dys) - 1 + (ds is not None)
    text = f"one kernel with {sums} {'sum' if sums == 1 else 'sums'}" + (
        " and the norm" if norm is not None else ""
    )
    return Applied(backward, text, traffic=(2 * sums + (norm is not None)) * bytes_of(new_dx))


def _shaped(graph: Graph, node: Node, other: Any) -> Node:
    shape = tensor_of(other).shape
    return node if tensor_of(node).shape == shape else call(graph, _aten.reshape.default, node, [*shape])


def _unwidened(dy: Node) -> Node:
    """Returns the node before a lossless upcast, if nothing else reads the upcast."""
    chain = before_widening(dy)
    cast_at = next((position for position, node in enumerate(chain) if is_widening(node)), None)
    if cast_at is None or any(len(node.users) > 1 for node in chain[: cast_at + 1]):
        return dy
    return chain[cast_at + 1]


def _read_as(norm: Node | None) -> tuple[torch.dtype | None, list[Node]]:
    """Returns the dtype in which the norm is read, and the nodes with that dtype: casts, if all readers are casts."""
    if norm is None:
        return None, []
    readers = [*norm.users]
    dtypes = {tensor_of(reader).dtype for reader in readers if reader.target is cast}
    if len(dtypes) == 1 and all(reader.target is cast for reader in readers):
        return dtypes.pop(), readers
    return tensor_of(norm).dtype, [norm]


def _is_in_memory(node: Node) -> bool:
    """Returns whether a node is materialized in any case, and not computed where it is read."""
    return node.op == "placeholder" or node.target in _IN_MEMORY


def _added_to(dx: Node | None, backward: Node) -> tuple[Node | None, Node | None]:
    """Returns the sum that is the only user of dx, and its other operand, if that is computed before backward."""
    node = dx
    while node is not None and len(node.users) == 1:
        (user,) = node.users
        if is_sum(user):
            (other,) = (addend for addend in user.all_input_nodes if addend is not node)
            return (user, other) if other < backward else (None, None)
        node = user if user.target in RESHAPES else None
    return None, None


def _norm_of(of: Sequence[Any]) -> Node | None:
    """Returns the forward of the same norm: the only such user of its statistics."""
    found = [node for node in of[1].users if node.target is _norm and node.args == (*of,)]
    return found[0] if len(found) == 1 else None


def _between(norm: Node, backward: Node) -> list[Node]:
    """Returns the nodes that depend on y up to backward, in order; with backward itself if it does."""
    found, reached = {norm}, [norm]
    for node in reached:
        new = [user for user in node.users if user not in found and user <= backward]
        found.update(new)
        reached.extend(new)
    return sorted(found - {norm})  # Nodes compare by position
