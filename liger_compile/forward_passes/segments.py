"""Cuts a graph with outlined bodies into segments, which are compiled one by one.

Why not one graph with calls: Inductor computes wrong gradients through `invoke_subgraph` (compile.py). A segment is
compiled as if it were a whole graph, and autograd links the calls of segments. The gradients of a layer are complete
before those of the layer below begin, and no assumption about the compiler is needed.

In: a rewritten graph that calls bodies. Out: its segments, their calls in order, and the callable that makes the calls.
Autocast that begins in one segment and ends in another begins and ends in every segment between.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from liger_compile.graphs.aliasing import Mutations, graph_of, handed_to
from liger_compile.graphs.effects import written_arguments
from liger_compile.graphs.regions import Region, Regions, around, is_harmless, is_switch
from liger_compile.torch_internals.dispatch import is_traceable_wrapper_subclass
from liger_compile.torch_internals.fake_tensors import FakeTensor, like
from liger_compile.torch_internals.modes import EXIT_AUTOCAST
from liger_compile.torch_internals.shapes import symbols_of
from liger_compile.torch_internals.tensors import storage_of

BODY = "liger_compile_body"  # the identifiers of outlined bodies begin so

Strides = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A part of a graph that is compiled by itself.

    Args:
        gm: the part; it returns a tuple.
        body: the outlined body that it runs; None for a part that is called once.
        examples: the example value of each input.
    """

    gm: GraphModule
    body: GraphModule | None
    examples: tuple[Any, ...]

    def fakes(self) -> list[Any]:
        """Returns inputs to compile it with: new fake tensors, so that no two are one and none depends on a call."""
        return [like(example) for example in self.examples]


class Call(NamedTuple):
    """A call of a segment: the registers that it reads and writes, and those that no later call reads."""

    segment: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The segments of a graph, and their calls in order. The first registers have the inputs of the graph.

    Args:
        returns: for each output of the graph its register, or a constant in a tuple.
    """

    segments: tuple[Segment, ...]
    calls: tuple[Call, ...]
    num_registers: int
    returns: tuple[int | tuple[Any], ...]


# May a graph be cut? --------------------------------------------------------------------------------------------


def numbered(graph: Graph, alone: Mapping[Node, Any]) -> dict[Node, int]:
    """Returns the segment of each node: nodes with one value of `alone` are a segment, and so are those between."""
    number, last, found = 0, None, {}
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            number += alone.get(node) != last
            last = alone.get(node)
            found[node] = number
    return found


def why_not(graph: Graph, mutations: Mutations, regions: Regions, segments: Mapping[Node, int]) -> str | None:
    """Returns why a graph cannot be cut into these segments, in a sentence."""
    around_graph, before = _without_autocast(around()), None
    for node, number in segments.items():
        if number != before and _without_autocast(regions.of[node]) != around_graph:
            return "the modes in which they run are switched before them"
        before = number
    symbols = _symbols_of_inputs(graph)
    for node in graph.nodes:
        home = segments.get(node)
        crosses = any(segments.get(user, home) != home for user in node.users)
        if crosses and (why := why_not_passed(node, symbols)):
            return why
    return _why_written(graph, mutations, segments)


def why_not_passed(node: Node, symbols: Collection[Any]) -> str | None:
    """Returns why a value cannot pass from one segment to another, in a sentence.

    Args:
        symbols: the sizes that are inputs of the graph.
    """
    value = node.meta.get("example_value")
    if _is_autocast(node) or isinstance(value, (bool, int)):
        return None
    if isinstance(value, (float, torch.SymFloat)):
        return "a number that they read is known at run time only"
    if not symbols_of(value) <= set(symbols):
        return f"a size of {node.name} is known at run time only"
    if isinstance(value, torch.SymInt):
        return None
    if not isinstance(value, torch.Tensor):
        return f"they pass on a value that is no tensor ({node.name})"
    is_plain = isinstance(value, FakeTensor) or type(value) is torch.nn.Parameter
    if not is_plain or is_traceable_wrapper_subclass(value) or value.layout is not torch.strided:
        return f"they pass on a tensor of another class ({node.name})"
    return f"they pass on a tensor without memory ({node.name})" if storage_of(value) is None else None


def _symbols_of_inputs(graph: Graph) -> dict[Any, Node]:
    inputs = ((node, node.meta.get("example_value")) for node in graph.find_nodes(op="placeholder"))
    sizes = {value.node.expr: node for node, value in inputs if isinstance(value, torch.SymInt)}
    return {expression: node for expression, node in sizes.items() if expression.is_symbol}


def _why_written(graph: Graph, mutations: Mutations, segments: Mapping[Node, int]) -> str | None:
    """Returns which memory is written after another segment may have read it, in a sentence."""
    first: dict[Any, Node] = {}
    written_in: dict[Any, int | None] = {}
    touched: dict[Any, set[int]] = {}
    for node in graph.nodes:
        if node.op == "output" or mutations.is_clean(node):
            continue
        write = mutations.last_write(node) if mutations.is_known(node) else None
        for storage in mutations.memory(node):
            first.setdefault(storage, node)
            written_in[storage] = None if write is None else segments.get(write)
            touched.setdefault(storage, set()).update(
                segments[each] for each in (node, *node.users) if each in segments
            )
    for storage, numbers in touched.items():
        is_written_at_home = written_in[storage] is not None and written_in[storage] == segments.get(
            first[storage]
        )
        if len(numbers) > 1 and not is_written_at_home:
            return f"memory that they share with the rest of the graph is written in place ({first[storage].name})"
    return None


def _without_autocast(region: Region) -> Region:
    return replace(region.meaning, autocast=())


def _is_autocast(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "_enter_autocast"


# The cut --------------------------------------------------------------------------------------------------------


def body_called(node: Any) -> GraphModule | None:
    """Returns the outlined body that a node calls; None for all else."""
    if not isinstance(node, Node) or getattr(node.target, "__name__", "") != "invoke_subgraph":
        return None
    named, identifier = node.args[:2]
    is_ours = str(identifier).startswith(BODY)
    return graph_of(named) if is_ours and isinstance(named, Node) else None


def cut(gm: GraphModule) -> Plan:
    """Returns the segments of a graph and their calls.

    Raises:
        ValueError: if a value would pass that cannot.
    """
    cutter = _Cutter(gm)
    flat: list[Node] = []
    for node in gm.graph.nodes:
        if body := body_called(node):
            cutter.add_flat(flat)
            cutter.add_body(node, body)
            flat = []
        elif node.op not in ("placeholder", "output") and not is_of_call(node):
            flat.append(node)
    cutter.add_flat(flat)
    return cutter.plan()


def is_of_call(node: Node) -> bool:
    """Returns whether a node only names a body, or a result of its call."""
    if node.op == "get_attr":
        return bool(node.users) and all(map(body_called, node.users))
    return node.target is operator.getitem and body_called(node.args[0]) is not None


class _Cutter:
    """The segments of a graph so far."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._symbols = _symbols_of_inputs(gm.graph)
        self._registers = {node: at for at, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self._count = len(self._registers)
        self._entered: list[Node] = []  # autocast in which the next segment begins
        self._segments: list[Segment] = []
        self._bodies: dict[GraphModule, int] = {}
        self._calls: list[Call] = []

    def add_flat(self, nodes: Sequence[Node]) -> None:
        """Adds a segment of these nodes, if they have an effect."""
        inside, entered = set(nodes), list(self._entered)
        given = [node for node in nodes if _passes(node) and not inside.issuperset(node.users)]
        for node in nodes:
            self._follow_autocast(node)
        if not given and not any(map(_acts, nodes)):
            return
        outside = dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside)
        reads = self._with_sizes([node for node in outside if _passes(node)], [*outside, *nodes])
        constants = {node: node.meta["example_value"] for node in outside if _is_constant(node)}
        graph, copies = _begun(reads, entered, constants)
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        _end(graph, [copies[node] for node in self._entered], [copies[node] for node in given])
        self._add_call(
            self._add(GraphModule(self._gm, graph), None, reads), reads, [[node] for node in given]
        )

    def add_body(self, call: Node, body: GraphModule) -> None:
        """Adds a call of a body."""
        inputs = body.graph.find_nodes(op="placeholder")
        reads = list(handed_to(call, len(inputs)) or ())
        sizes = self._with_sizes(reads, [*inputs, *body.graph.nodes])[len(reads) :]
        if body not in self._bodies:
            self._bodies[body] = self._add(self._standing_alone(body, sizes), body, [*inputs, *sizes])
        results: list[list[Node]] = [[] for _ in body.graph.output_node().args[0]]  # pyright: ignore
        for user in call.users:
            results[user.args[1]].append(user)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self._add_call(self._bodies[body], [*reads, *sizes], results)

    def _standing_alone(self, body: GraphModule, sizes: Sequence[Node]) -> GraphModule:
        """Returns a body with the autocast of its calls, and further inputs for sizes."""
        if not sizes and not self._entered:
            return body
        inputs = body.graph.find_nodes(op="placeholder")
        graph, copies = _begun([*inputs, *sizes], self._entered, {})
        for node in body.graph.nodes:
            if node.op not in ("placeholder", "output"):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        results: Any = body.graph.output_node().args[0]
        _end(graph, [copies[node] for node in self._entered], [copies[node] for node in results])
        return GraphModule(body, graph)

    def _with_sizes(self, reads: Sequence[Node], nodes: Iterable[Node]) -> list[Node]:
        """Adds the inputs for the sizes in the layouts of these nodes: a compiled graph cannot solve for sizes."""
        used = {symbol for node in nodes for symbol in symbols_of(node.meta.get("example_value"))}
        sizes = (self._symbols[symbol] for symbol in sorted(used & self._symbols.keys(), key=str))
        return [*reads, *(node for node in sizes if node not in reads)]

    def _follow_autocast(self, node: Node) -> None:
        if _is_autocast(node):
            self._entered.append(node)
        elif getattr(node.target, "__name__", "") == "_exit_autocast":
            self._entered = [entered for entered in self._entered if entered is not node.args[0]]

    def _add(self, gm: GraphModule, body: GraphModule | None, reads: Sequence[Node]) -> int:
        gm.meta.update({key: value for key, value in self._gm.meta.items() if isinstance(key, str)})
        examples = tuple(node.meta.get("example_value") for node in reads)
        self._segments.append(Segment(gm, body, examples))
        return len(self._segments) - 1

    def _add_call(self, segment: int, reads: Sequence[Any], results: Sequence[Sequence[Node]]) -> None:
        for node in reads:
            if node not in self._registers:
                raise ValueError(f"{node} passes from one segment to another and cannot")
        writes = tuple(range(self._count, self._count + len(results)))
        self._count += len(results)
        self._calls.append(Call(segment, tuple(self._registers[node] for node in reads), writes))
        for register, nodes in zip(writes, results, strict=True):
            self._registers.update(dict.fromkeys(nodes, register))

    def plan(self) -> Plan:
        """Returns the plan for all that was added."""
        outputs: Any = self._gm.graph.output_node().args[0]
        returns = tuple(self._returned(value) for value in outputs)
        kept, calls = {register for register in returns if isinstance(register, int)}, []
        for call in reversed(self._calls):
            frees = sorted({*call.reads, *call.writes} - kept)
            kept.update(frees)
            calls.append(call._replace(frees=tuple(frees)))
        return Plan(tuple(self._segments), tuple(reversed(calls)), self._count, returns)

    def _returned(self, value: Any) -> int | tuple[Any]:
        if isinstance(value, Node):
            return (value.meta["example_value"],) if _is_constant(value) else self._registers[value]
        return (value,)


def _acts(node: Node) -> bool:
    """Returns whether a node may have an effect: it writes, or has no result, as an assertion."""
    is_known = node.op == "get_attr" or is_harmless(node) or is_switch(node)
    return any(written_arguments(node)) or (node.meta.get("example_value") is None and not is_known)


def _is_constant(node: Node) -> bool:
    return node.op != "placeholder" and isinstance(node.meta.get("example_value"), (bool, int))


def _passes(node: Node) -> bool:
    """Returns whether a value passes between segments as it is, if it is read in another one."""
    return not _is_autocast(node) and not _is_constant(node)


def _begun(
    inputs: Sequence[Node], entered: Sequence[Node], constants: Mapping[Node, Any]
) -> tuple[Graph, dict[Node, Any]]:
    """Returns a graph with these inputs that begins in this autocast, and the copies of nodes in it."""
    graph, copies = Graph(), dict(constants)
    for node in inputs:
        taken = any(node.name == other.target for other in copies.values() if isinstance(other, Node))
        copies[node] = graph.placeholder(f"{node.name}_outside" if taken else node.name)
        copies[node].meta.update({key: value for key, value in node.meta.items() if key != "grapharg"})
    for node in entered:
        copies[node] = graph.node_copy(node)
    return graph, copies


def _end(graph: Graph, entered: Sequence[Node], results: Sequence[Any]) -> None:
    for node in reversed(entered):
        graph.call_function(EXIT_AUTOCAST, (node,))
    graph.output(tuple(results))


# The callable ---------------------------------------------------------------------------------------------------


def chained(plan: Plan, compiled: Sequence[Callable[..., Any]]) -> Callable[..., tuple[Any, ...]]:
    """Returns the callable that calls the compiled segments in order."""
    num_inputs = min(
        (register for call in plan.calls for register in call.writes), default=plan.num_registers
    )
    rest: list[Any] = [None] * (plan.num_registers - num_inputs)
    steps = [
        (compiled[call.segment], call.reads, _layouts(plan, call, num_inputs), call.writes, call.frees)
        for call in plan.calls
    ]

    def run(*inputs: Any) -> tuple[Any, ...]:
        values = [*inputs, *rest]
        for function, reads, layouts, writes, frees in steps:
            arguments = [values[register] for register in reads]
            for at, strides in layouts:
                if arguments[at].stride() != strides:
                    arguments[at] = _laid_out(arguments[at], strides)
            results = function(*arguments)
            for register, result in zip(writes, results, strict=True):
                values[register] = result
            for register in frees:
                values[register] = None
            del arguments, results
        return tuple(values[each] if isinstance(each, int) else each[0] for each in plan.returns)

    return run


def _layouts(plan: Plan, call: Call, num_inputs: int) -> list[tuple[int, Strides]]:
    """Returns the strides that a segment was compiled for, of the values that another segment computes."""
    examples = plan.segments[call.segment].examples
    return [
        (at, tuple(example.stride()))
        for at, (register, example) in enumerate(zip(call.reads, examples, strict=True))
        if register >= num_inputs and isinstance(example, torch.Tensor) and not symbols_of(example)
    ]


def _laid_out(tensor: torch.Tensor, strides: Strides) -> torch.Tensor:
    """Returns the tensor in these strides; a compiler may choose others for a result."""
    differ = (
        size > 1 and given != stride
        for size, given, stride in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )
    if not any(differ):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
