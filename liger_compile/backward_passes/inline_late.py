"""Inlines late: replaces each op that was kept as one node by the operators that it consists of.

Passes over backward match an op of ours as one node. Inductor fuses the operators that the op consists of. So
`ops.registration.inlining_late` keeps such an op as one node while AOTAutograd traces, and this pass runs
last before Inductor compiles a graph: on graphs of forward too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from liger_compile.backward_passes.runner import warn_of_failure
from liger_compile.ops.registration import LATE_OPS
from liger_compile.torch_internals.fake_tensors import detect_fake_mode
from liger_compile.torch_internals.pytree import tree_flatten, tree_unflatten

NAME = "backward.inline_late"


def inline_late_ops(
    graph: Graph, decompositions: Mapping[Any, Callable[..., Any]], strict: bool = False
) -> None:
    """Inlines the ops in `graph`.

    Args:
        decompositions: for operators that the graph may not contain.
        strict: raise if an op cannot be traced. Otherwise it warns, and the op stays, which computes the same result.
    """
    for node in graph.nodes:
        if node.target in LATE_OPS:
            try:
                _inline(graph, node, decompositions)
            except Exception as error:
                if strict:
                    raise
                warn_of_failure(NAME, error)


def _inline(graph: Graph, node: Node, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
    arguments, spec = tree_flatten((node.args, node.kwargs))
    inputs = [argument for argument in arguments if isinstance(argument, Node)]

    def body(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = tree_unflatten(
            [next(given) if isinstance(argument, Node) else argument for argument in arguments], spec
        )
        return LATE_OPS[node.target](*args, **kwargs)

    values = [node.meta["val"] for node in inputs]
    with detect_fake_mode(values) or contextlib.nullcontext():
        traced = make_fx(body, dict(decompositions))(*values).graph
    if traced.find_nodes(op="get_attr"):
        raise NotImplementedError(f"{node.target} creates a constant, which cannot be added to the graph")
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
