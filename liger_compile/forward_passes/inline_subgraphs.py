"""Nested regions: inlines the subgraphs that a graph calls by `invoke_subgraph` at every call.

torch.compiler.nested_compile_region and Dynamo's use_graph_deduplication make one subgraph of equal layers. If the
compiler of the graph computes wrong results for subgraphs, the layers must be inlined.

In: a Dynamo graph. Out: the same graph without such calls; it computes the same in the same order. The example values
of its nodes record which memory they share, also for calls that the subgraph was not traced for.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from liger_compile.graphs.aliasing import graph_of, handed_to
from liger_compile.torch_internals.fake_tensors import FakeTensor
from liger_compile.torch_internals.pytree import tree_map_only
from liger_compile.torch_internals.tensors import storage_of, version_of

Stack = Mapping[str, tuple[str, Any]]  # a node's "nn_module_stack"


def inlined(gm: GraphModule) -> tuple[str, ...]:
    """Inlines the subgraphs in `gm`, for a compiler that is wrong for subgraphs; returns the notes for the report."""
    count = inline_subgraphs(gm)
    calls = "a call of a nested region is" if count == 1 else f"{count} calls of nested regions are"
    return (f"{calls} inlined: Inductor computes wrong gradients through them",) if count else ()


def inline_subgraphs(gm: GraphModule) -> int:
    """Inlines the subgraphs in `gm` and in all graphs that it calls. Returns the number of inlined calls.

    Raises:
        ValueError: for a call in a form that Dynamo does not produce.
    """
    describe_operands(gm)
    first: dict[GraphModule, Stack] = {}  # subgraph -> the module stack of the call that it was traced for
    count = 0
    for module in _innermost_first(gm):
        for call, body in _calls(module):
            stack = _stack_of(call)
            _inline(call, body, first.setdefault(body, stack), stack)
            count += 1
        drop_unnamed_graphs(module)
        module.recompile()
    return count


def describe_operands(gm: GraphModule) -> None:
    """Sets the example values of subgraph placeholders that Dynamo gave none.

    The values are those of the operands of the call that the subgraph was traced from. That call shares its results.
    """
    for module in _innermost_first(gm):
        for call, body in _calls(module):
            pairs = _pairs_of_results(call, body)
            if any(_value(inside) is not None and _value(inside) is _value(user) for inside, user in pairs):
                placeholders = body.graph.find_nodes(op="placeholder")
                for placeholder, operand in zip(placeholders, _operands(call, body), strict=True):
                    if _value(placeholder) is None and _value(operand) is not None:
                        placeholder.meta["example_value"] = _value(operand)


def _innermost_first(gm: GraphModule) -> Iterable[GraphModule]:
    """Returns the graphs in `gm` that call subgraphs, each once, after the graphs that they call."""
    found: dict[GraphModule, None] = {}

    def visit(module: GraphModule) -> None:
        for child in module.children():
            if isinstance(child, GraphModule) and child not in found:
                visit(child)
        found[module] = None

    visit(gm)
    return [module for module in found if any(_calls(module))]


def _calls(module: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    for node in list(module.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "invoke_subgraph":
            body = graph_of(node.args[0])
            if body is None:
                raise ValueError(f"{node.format_node()} calls a graph that its module does not have")
            yield node, body


def _operands(call: Node, body: GraphModule) -> tuple[Any, ...]:
    return handed_to(call, len(body.graph.find_nodes(op="placeholder"))) or ()


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else None


def _stack_of(call: Node) -> Stack:
    """Returns the module stack of a call: Dynamo records it on the call, or on its results."""
    stacks = (node.meta.get("nn_module_stack") for node in (call, *call.users))
    return next(filter(None, stacks), {})


def inline_call(call: Node, body: GraphModule) -> dict[Node, Node]:
    """Inlines a subgraph at its only call, and returns the copy of each of its nodes.

    Raises:
        ValueError: for a call in a form that Dynamo does not produce.
    """
    return _inline(call, body, {}, {})


def _inline(call: Node, body: GraphModule, first: Stack, stack: Stack) -> dict[Node, Node]:
    placeholders = body.graph.find_nodes(op="placeholder")
    copies: dict[Node, Any] = dict(zip(placeholders, _operands(call, body), strict=True))
    results = body.graph.output_node().args[0]
    memory = _Memory(copies, _pairs_of_results(call, body))
    with call.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op not in ("placeholder", "output"):
                copies[node] = copy = call.graph.node_copy(node, copies.__getitem__)
                copy.meta.update(_placed(node.meta, memory, first, stack))
                if node.op == "get_attr":
                    copy.target = _attribute(call.graph.owning_module, body, str(node.target))
    for user, result in _results_of(call, results):
        _replace(user, copies[result] if isinstance(result, Node) else result)
    name = call.args[0]
    call.graph.erase_node(call)
    if isinstance(name, Node) and not name.users:
        call.graph.erase_node(name)
    return {node: copies[node] for node in body.graph.nodes if node.op not in ("placeholder", "output")}


def _results_of(call: Node, results: Any) -> Iterator[tuple[Node, Any]]:
    """Yields the users of each result of the call, with the node of the subgraph that is that result."""
    for user in list(call.users):
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            raise ValueError(
                f"{user.format_node()} takes all results of {call.name}; one of them was expected"
            )
        yield user, results[user.args[1]]


def _pairs_of_results(call: Node, body: GraphModule) -> list[tuple[Node, Node]]:
    """Returns the results of a subgraph, each with its node in the calling graph."""
    results = body.graph.output_node().args[0]
    return [(result, user) for user, result in _results_of(call, results) if isinstance(result, Node)]


def _replace(node: Node, value: Any) -> None:
    """Replaces a node by a node or a constant."""
    if isinstance(value, Node):
        if value.op != "placeholder":
            value.meta["example_value"] = _value(node)
        node.replace_all_uses_with(value)
    for user in list(node.users):
        user.args = map_arg(user.args, lambda arg: value if arg is node else arg)
        user.kwargs = map_arg(user.kwargs, lambda arg: value if arg is node else arg)
    node.graph.erase_node(node)


def _attribute(owner: Any, body: GraphModule, path: str) -> str:
    """Returns the name under which `owner` has the attribute of `body` at a path; adds the attribute if missing."""
    value = operator.attrgetter(path)(body)
    base = name = path.replace(".", "_")
    count = 0
    while getattr(owner, name, value) is not value:
        count += 1
        name = f"{base}_{count}"
    if not hasattr(owner, name):
        setattr(owner, name, value)
    return name


def drop_unnamed_graphs(module: GraphModule) -> None:
    """Removes the subgraphs that no node of a graph names."""
    named = {str(node.target).split(".")[0] for node in module.graph.find_nodes(op="get_attr")}
    named |= {str(node.target).split(".")[0] for node in module.graph.find_nodes(op="call_module")}
    for name, child in list(module.named_children()):
        if isinstance(child, GraphModule) and name not in named:
            delattr(module, name)


def _placed(
    meta: Mapping[str, Any], memory: _Memory, first: Stack, stack: Stack
) -> Iterator[tuple[str, Any]]:
    """Yields a node copy's example value and module stack: the subgraph has the module names of its first call."""
    if "example_value" in meta:
        yield "example_value", memory.of(meta["example_value"])
    inner = meta.get("nn_module_stack")
    if inner and first and stack and first.keys() <= inner.keys():
        (old, _), (new, _) = list(first.values())[-1], list(stack.values())[-1]
        below = {key: place for key, place in inner.items() if key not in first}
        moved = {key: (path.replace(old, new, 1), kind) for key, (path, kind) in below.items()}
        yield "nn_module_stack", {**stack, **moved}


class _Memory:
    """The memory of one call of a subgraph: operands and results use the caller's memory, other values new memory."""

    def __init__(self, operands: Mapping[Node, Any], results: Iterable[tuple[Node, Node]]) -> None:
        self._whole: dict[int | None, Tensor] = {}  # storage in subgraph -> tensor in the call's
        self._is_known = True  # whether it is known which memory in the subgraph belongs to operands
        for inside, outside in (*operands.items(), *results):
            here, there = _value(inside), _value(outside)
            if isinstance(here, Tensor) and isinstance(there, Tensor):
                self._whole.setdefault(storage_of(here), there)
                _count_writes(there, version_of(here))
            elif isinstance(there, Tensor) and inside in operands:
                self._is_known = False

    def of(self, value: Any) -> Any:
        """Returns the value in this call that corresponds to a value of the subgraph."""
        return tree_map_only(Tensor, self._tensor, value)

    def _tensor(self, tensor: Tensor) -> Tensor:
        storage = storage_of(tensor)
        if storage is None or type(tensor) is not FakeTensor:
            return tensor
        with tensor.fake_mode, torch.no_grad():
            num_bytes = tensor.untyped_storage().nbytes()
            if storage not in self._whole:
                count = num_bytes // tensor.dtype.itemsize
                self._whole[storage] = torch.empty(count, dtype=tensor.dtype, device=tensor.device)
                _count_writes(self._whole[storage], 0 if self._is_known else 1)
            whole = self._whole[storage]
            if whole.dtype != tensor.dtype:
                whole = whole.as_strided((num_bytes // whole.dtype.itemsize,), (1,), 0).view(tensor.dtype)
            result = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        _count_writes(result, version_of(tensor))
        return result.requires_grad_(tensor.requires_grad)


def _count_writes(tensor: Tensor, version: int) -> None:
    """Marks a fake tensor as written if `version` says so and it is not marked yet."""
    if version and not version_of(tensor) and isinstance(tensor, FakeTensor):
        with tensor.fake_mode, torch.no_grad():
            tensor.as_strided((0,), (1,)).zero_()
