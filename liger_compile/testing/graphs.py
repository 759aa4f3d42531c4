"""Graphs outside torch.compile: captured, rewritten and replayed one by one, at a speed that fuzzing needs.

`capture` asks Dynamo for a graph once. `replay` runs a graph's nodes again, each through a function that may put
something else in its place, and records what then runs as Dynamo would: operators, methods and torch functions as
they were called, every node with its fake tensor. `rewrite` takes a graph through the backend's steps.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from liger_compile.decide import decide
from liger_compile.graphs.aliasing import Mutations
from liger_compile.match import find_matches
from liger_compile.pattern import Decision, NearMiss, Pattern
from liger_compile.registry import patterns_in_use
from liger_compile.rewrite import rewrite as carry_out
from liger_compile.terms.build import Terms


@dataclass(frozen=True)
class Rewriting:
    """What became of a graph, and why."""

    gm: GraphModule
    decisions: Sequence[Decision]
    near_misses: Sequence[NearMiss]

    @property
    def replaced(self) -> list[str]:
        """The names of the patterns that were replaced, once for each place."""
        return [decision.match.pattern.name for decision in self.decisions if decision.kind == "replace"]

    @property
    def reasons(self) -> list[str]:
        """Why what was left is left."""
        left = [f"{d.match.pattern.name}: {d.reason}" for d in self.decisions if d.kind != "replace"]
        return left + [f"{near.pattern.name}: {near.reason}" for near in self.near_misses]


def rewrite(gm: GraphModule, patterns: Iterable[Pattern] = (), *, policy: str = "always") -> Rewriting:
    """Rewrites `gm` in place as the backend does, and says what happened. `patterns` are used besides those known."""
    mutations = Mutations(gm.graph)
    terms = Terms(gm.graph, mutations)
    matches, near_misses = find_matches(gm.graph, patterns_in_use(patterns), terms)
    decisions = decide(gm.graph, matches, mutations, policy=policy)
    decisions = carry_out(gm.graph, decisions)
    gm.recompile()
    return Rewriting(gm, decisions, near_misses)


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphModule, tuple[Any, ...]]:
    """The graph that Dynamo captures of function(*args, **kwargs), and its inputs. Raises if it captures several."""
    captured: list[tuple[GraphModule, tuple[Any, ...]]] = []

    def backend(gm: GraphModule, _: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            captured.append((gm, inputs))
            return gm(*inputs)

        return run

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    torch._dynamo.reset()
    return captured[0]


class Value(Proxy):
    """A value of a graph that is being recorded. Sizes and dtypes are as concrete as Dynamo has them."""

    tracer: Recorder

    @property
    def fake(self) -> Any:
        return self.node.meta["example_value"]

    @property
    def shape(self) -> torch.Size:
        return self.fake.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.fake.dtype

    def size(self, dim: int | None = None) -> Any:
        return self.fake.size() if dim is None else self.fake.size(dim)

    def dim(self) -> int:
        return self.fake.dim()

    def like(self, dtype: Any) -> Value | None:
        """An input of the graph that has this dtype."""
        for node in self.tracer.graph.nodes:
            example = node.meta["example_value"]
            if node.op == "placeholder" and isinstance(example, torch.Tensor) and example.dtype == dtype:
                return Value(node, self.tracer)
        return None

    def made_by(self, name: str) -> tuple[Any, ...] | None:
        """The arguments of the call that made this value, if it was one of `name` without keyword arguments."""
        if name_of(self.node) != name or self.node.kwargs:
            return None
        return map_arg(self.node.args, lambda node: Value(node, self.tracer))  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Any:
        return (self[index] for index in range(len(self.fake)))  # pyright: ignore[reportIndexIssue]

    def __len__(self) -> int:
        return len(self.fake)


class Recorder(GraphAppendingTracer):
    """Appends what is done with its Values to a graph, and computes their fake tensors."""

    def __init__(self) -> None:
        super().__init__(Graph())

    def proxy(self, node: Node) -> Value:
        return Value(node, self)

    def placeholder(self, name: str, example: Any) -> Value:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = example
        return Value(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Node:
        examples = map_arg((args, kwargs), lambda node: node.meta["example_value"])
        example = _called(kind, target, *examples)
        node = super().create_node(kind, target, args, kwargs, *rest, **named)
        node.meta["example_value"] = example
        return node

    def module(self, outputs: Sequence[Value]) -> GraphModule:
        """The graph of what was recorded, with what no output needs left out."""
        node = self.graph.output(tuple(value.node for value in outputs))
        node.meta["example_value"] = tuple(value.fake for value in outputs)
        _without_unused(self.graph)
        return _LazyGraphModule(torch.nn.Module(), self.graph)  # most are changed again before they run


def _without_unused(graph: Graph) -> None:
    """Dynamo leaves out pure calls that nobody reads."""
    impure = {node for node in graph.nodes if node.op == "placeholder" or not _is_pure(node)}
    for node in reversed(graph.nodes):
        if not node.users and node not in impure and node.op != "output":
            graph.erase_node(node)


def _is_pure(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return not name.endswith("_") and not name.startswith("_") and name not in ("iadd", "imul", "setitem")


def _called(kind: str, target: Any, args: Any, kwargs: Any) -> Any:
    if kind == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


Visit = Callable[[Recorder, Node, tuple, dict], Any]


def again(recorder: Recorder, node: Node, args: tuple, kwargs: dict) -> Any:
    """The visit that puts nothing else in the place of a node."""
    if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
        return args[0][args[1]]
    return recorder.create_proxy(node.op, node.target, args, kwargs)


def replay(gm: GraphModule, visit: Visit, inputs: Mapping[str, Any] | None = None) -> GraphModule:
    """A new graph of what `visit` does for each node of `gm`.

    `visit` is given the recorder, the node, and its arguments as Values; what it returns stands for the node.
    `inputs` gives placeholders, by name, other fake tensors or the Value of another placeholder, by its name.
    """
    recorder, values = Recorder(), {}
    outputs: Sequence[Value] = ()
    with _fake_mode_of(gm):
        for node in gm.graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                given = (inputs or {}).get(node.name, node.meta["example_value"])
                other = (
                    {n.name: value for n, value in values.items()}.get(given)
                    if isinstance(given, str)
                    else None
                )
                values[node] = other if other is not None else recorder.placeholder(str(node.target), given)
            elif node.op == "output":
                outputs = args[0]
            else:
                values[node] = visit(recorder, node, args, kwargs)
        return recorder.module(outputs)


def _fake_mode_of(gm: GraphModule) -> Any:
    examples = (node.meta.get("example_value") for node in gm.graph.nodes)
    return next(example.fake_mode for example in examples if isinstance(example, FakeTensor))


_ALIASES: Mapping[Any, str] = {
    operator.truediv: "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    builtins.getattr: "getattr",
}


def name_of(node: Node) -> str:
    """What a node does, whether it is an operator, a method or a function."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return _ALIASES.get(node.target) or _ALIASES.get(name) or name
