"""Sets marks for AOTAutograd's partitioner, which chooses the values to save for backward and those to recompute.

mark_for_recompute(): marks cheap values, so that backward recomputes them instead of saving them.

These are values that were left to Inductor with an `Annotate`, and results of ops whose pattern declares them cheap.
AOTAutograd copies the marks from Dynamo's nodes to the nodes that it traces from them, and its partitioner follows
them. None of torch's cache keys includes the marks; compile.py adds them.

mark_upcasts(): marks the upcasts that matmuls read, such as that of an input of a float32 adapter in a bfloat16 model.
The partitioner saves an operand of a matmul as it is, in twice the bytes of the value that it is the upcast of.

keep_what_written_inputs_give(): marks values that backward could not recompute. An input that the graph writes into has
its later value by then, and the partitioner (torch 2.11 and 2.13) recomputes from it as if it had its earlier value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from liger_compile.graphs.aliasing import Mutations, tensors_of
from liger_compile.pattern import Decision


def mark_for_recompute(decisions: Iterable[Decision]) -> None:
    """Marks the nodes of annotated matches, and the nodes of cheap replacements."""
    for decision in decisions:
        for node in _cheap_nodes(decision):
            _mark(node, CheckpointPolicy.MUST_RECOMPUTE)


_CASTS = frozenset(("to", "float", "double", "type", "type_as"))
_MATMULS = frozenset(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"))


def mark_upcasts(graph: Graph) -> int:
    """Marks lossless upcasts that matmuls keep for backward, unless another mark exists; returns their number."""
    upcasts = _kept_upcasts(graph)
    for node in upcasts:
        _mark(node, CheckpointPolicy.MUST_RECOMPUTE)
    return len(upcasts)


def _kept_upcasts(graph: Graph) -> list[Node]:
    casts = [node for node in graph.nodes if node.op == "call_method" and node.target in _CASTS]
    return [node for node in casts if _is_upcast(node) and any(_keeps(user, node) for user in node.users)]


def _is_upcast(node: Node) -> bool:
    """Returns whether a cast loses no bit, and nothing else has marked it."""
    before, after = (value.meta.get("example_value") for value in (*node.all_input_nodes[:1], node))
    if (
        "recompute" in node.meta
        or not isinstance(before, torch.Tensor)
        or not isinstance(after, torch.Tensor)
    ):
        return False
    are_floating = before.is_floating_point() and after.is_floating_point()
    return are_floating and before.dtype.itemsize < after.dtype.itemsize


def _keeps(user: Node, operand: Node) -> bool:
    """Returns whether a matmul saves this operand, for the gradient of another."""
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    factors = [node.meta.get("example_value") for node in user.all_input_nodes if node is not operand]
    return name in _MATMULS and any(isinstance(f, torch.Tensor) and f.requires_grad for f in factors)


def keep_what_written_inputs_give(graph: Graph, mutations: Mutations) -> int:
    """Marks the nodes that read or write the memory of an input that `graph` writes into; returns their number."""
    marked = 0
    inputs = graph.find_nodes(op="placeholder")
    written = {
        storage for node in inputs if not mutations.is_clean(node) for storage in mutations.memory(node)
    }
    for node in graph.nodes if written else ():
        is_call = node.op in ("call_function", "call_method")
        is_size = node.meta.get("example_value") is not None and not tensors_of(node)
        if is_call and not is_size and any(written & mutations.memory(arg) for arg in node.all_input_nodes):
            _mark(node, CheckpointPolicy.MUST_SAVE)
            marked += 1
    return marked


def _mark(node: Node, policy: CheckpointPolicy) -> None:
    node.meta["recompute"] = policy
    # The partitioner requires an id; at this level no checkpoint of the user has this one.
    node.meta["ac_graph_id"] = 0


def _cheap_nodes(decision: Decision) -> Iterator[Node]:
    match = decision.match
    if decision.kind == "replace" and match.pattern.is_cheap:
        yield from (node for node in decision.inserted if not _is_one_a_row(node))
    if decision.kind == "annotate":
        kept = match.outputs if decision.keeps_outputs else ()
        yield from (node for node in match.nodes if node not in kept and not _is_one_a_row(node))


def _is_one_a_row(node: Node) -> bool:
    """Returns whether a node is one number per row, such as a norm's statistic: costly to compute, cheap to keep."""
    value = node.meta.get("example_value")
    last = value.shape[-1] if isinstance(value, torch.Tensor) and value.dim() else None
    return isinstance(last, int) and last == 1
