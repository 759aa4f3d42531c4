"""What is changed in a graph of backward when it is whole.

In: a graph of aten operators as AOTAutograd's partitioner made it and Inductor is about to compile, in which some
ops of ours are whole. Out: the same graph,

- with one product where products of gradients are summed (products.py);
- with a norm's backward that takes the sums around it (norms.py);
- with ops that write in place where a functional one would write a copy of a table as large as the vocabulary:

    scale(saved, factor)                saved is for this backward alone ("donated"): it is scaled where it is
    total + embedding_backward(dy, ..)  total is read by nobody else: rows are added where it is, of no table of zeros

- with what ops that were kept whole consist of, traced, in their place; graphs of forward too.

Before, in a functional graph, writes could not be said: AOTAutograd traces no mutation of what a backward gets, and
sums the two gradients of a table that is embedding and head only when it has both.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from liger_compile.graphs.aliasing import storage_of
from liger_compile.norms import join_norms
from liger_compile.ops.registration import BODIES
from liger_compile.products import join_products

_aten, _ours = torch.ops.aten, torch.ops.liger_compile

# Operators whose result has memory of its own in any compiler, besides those of ours, which are functional. Elementwise
# ones are not here: a compiler may find that one does nothing, and hand on its input.
_MAKES_MEMORY = (_aten.mm.default, _aten.addmm.default)


def rewrite_backward(graph: Graph, donated: Collection[int], strict: bool = False) -> None:
    """Changes a graph of backward. `donated`: positions of the placeholders that nobody reads when it has run.

    A rewrite that fails leaves the graph as far as it got, which computes the same, with a warning; `strict` raises.
    """
    for rewrite in (join_products, join_norms, functools.partial(write_in_place, donated=donated)):
        with _warning_instead(strict):
            rewrite(graph)


def trace_through(
    graph: Graph, decompositions: Mapping[Any, Callable[..., Any]], strict: bool = False
) -> None:
    """Puts what ops that were kept whole consist of in their place. `decompositions`: of operators that the graph may
    not contain. An op that cannot be traced stays, with a warning; `strict` raises."""
    for node in graph.nodes:
        if node.target in BODIES:
            with _warning_instead(strict):
                _trace_through(graph, node, decompositions)


@contextlib.contextmanager
def _warning_instead(strict: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if strict:
            raise
        what = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"liger_compile: a rewrite of backward failed, and its graph is compiled without: {what}",
            stacklevel=2,
        )


def _trace_through(graph: Graph, node: Node, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
    """What the op consists of, in its place."""
    arguments, spec = tree_flatten((node.args, node.kwargs))
    inputs = [argument for argument in arguments if isinstance(argument, Node)]

    def body(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = tree_unflatten(
            [next(given) if isinstance(argument, Node) else argument for argument in arguments], spec
        )
        return BODIES[node.target](*args, **kwargs)

    values = [each.meta["val"] for each in inputs]
    with detect_fake_mode(values) or contextlib.nullcontext():
        traced = make_fx(body, dict(decompositions))(*values).graph
    if traced.find_nodes(op="get_attr"):
        raise NotImplementedError(f"{node.target} makes a constant, for which the graph has no place")
    placeholders = traced.find_nodes(op="placeholder")
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(traced, dict(zip(placeholders, inputs, strict=True)))
    if isinstance(results, Node):
        node.replace_all_uses_with(results)
    else:
        for reader in tuple(node.users):
            reader.replace_all_uses_with(results[reader.args[1]])
            graph.erase_node(reader)
    graph.erase_node(node)


def write_in_place(graph: Graph, donated: Collection[int]) -> None:
    """Changes `graph`. `donated`: positions of the placeholders that nobody reads when the graph has run."""
    own = _alone_in_memory(graph.find_nodes(op="placeholder"), donated)
    for node in graph.find_nodes(op="call_function", target=_ours.scale.default):
        gradient, factor = node.args
        if _may_be_written(gradient, node, own):
            _write(graph, node, gradient, _ours.scale_in_place.default, gradient, factor)
    for node in graph.find_nodes(op="call_function", target=_ours.embedding_backward.default):
        _add_rows_to_the_other(graph, node, own)


def _alone_in_memory(placeholders: list[Node], donated: Collection[int]) -> set[Node]:
    """The donated ones of whose memory no other is a view: two that are saved may be, and both be donated."""
    values = {node: node.meta.get("val") for node in placeholders}
    storages = {node: storage_of(val) for node, val in values.items() if isinstance(val, torch.Tensor)}
    shared = Counter(storages.values())
    candidates = (node for position, node in enumerate(placeholders) if position in donated)
    return {node for node in candidates if node in storages and shared[storages[node]] == 1}


def _add_rows_to_the_other(graph: Graph, node: Node, own: Collection[Node]) -> None:
    dy, indices, _, padding_idx, scales_by_frequency = node.args
    (reader, *others) = node.users
    if others or scales_by_frequency or reader.kwargs:
        return
    if (
        reader.target is _aten.addmm.default and reader.args[0] is node
    ):  # what Inductor makes of a product and a sum
        total: Any = _product_of(graph, reader)
    elif reader.target is _aten.add.Tensor:
        total = next((each for each in reader.args if each is not node), None)
    else:
        return
    if _may_be_written(total, reader, own) and _is_alike(total, reader):
        _write(graph, reader, total, _ours.add_embedding_backward.default, total, dy, indices, padding_idx)
        graph.erase_node(node)


def _product_of(graph: Graph, addmm: Node) -> Node:
    """The product alone, and the sum as a sum."""
    added, *factors = addmm.args
    with graph.inserting_before(addmm):
        product = graph.call_function(_aten.mm.default, tuple(factors))
    product.meta["val"] = addmm.meta["val"]
    addmm.target, addmm.args = _aten.add.Tensor, (product, added)
    return product


def _may_be_written(total: Any, reader: Node, own: Collection[Node]) -> bool:
    """Whether nobody else reads `total`, or memory that it shares. Scaling it in place comes before, for `reader`."""
    if not isinstance(total, Node):
        return False
    if [each for each in total.users if each.target is not _ours.scale_in_place.default] != [reader]:
        return False
    made_by: Any = total
    if total.target is operator.getitem:
        made_by = total.all_input_nodes[0]
        if any(each is not total and each.args == total.args for each in made_by.users):
            return False
    is_ours = getattr(made_by.target, "namespace", "") == _ours.name
    return total in own or made_by.target in _MAKES_MEMORY or is_ours


def _is_alike(a: Node, b: Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and x.shape == y.shape and x.is_contiguous()


def _write(graph: Graph, instead_of: Node, written: Node, op: Any, *args: Any) -> None:
    """`op`, which writes into `written`, where `instead_of` gave the same as a new tensor."""
    with graph.inserting_before(instead_of):
        graph.call_function(op, args).meta["val"] = None
    instead_of.replace_all_uses_with(written)
    graph.erase_node(instead_of)
