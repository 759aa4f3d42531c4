"""Graphs outside torch.compile: captures, rewrites and replays them one by one, as fast as fuzzing needs.

`capture` gets a graph from Dynamo once. `replay` runs the nodes of a graph again, each through a function that may
return something else for it, and records the calls as Dynamo would: operators, methods and torch functions as called,
every node with its fake tensor. `rewrite` runs the backend's steps on a graph.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from liger_compile.graphs.aliasing import Mutations
from liger_compile.pattern import Decision, NearMiss, Pattern
from liger_compile.registry import patterns_in_use
from liger_compile.steps.decide import Rules, decide
from liger_compile.steps.match import find_matches
from liger_compile.steps.rewrite import rewrite as carry_out
from liger_compile.terms.build import Terms
from liger_compile.torch_internals.fake_tensors import FakeTensor
from liger_compile.torch_internals.fx import LazyGraphModule


@dataclass(frozen=True)
class Rewriting:
    """A rewritten graph, with the decisions and near misses."""

    gm: GraphModule
    decisions: Sequence[Decision]
    near_misses: Sequence[NearMiss]

    @property
    def replaced(self) -> list[str]:
        """The names of the replaced patterns, once for each place."""
        return [decision.match.pattern.name for decision in self.decisions if decision.kind == "replace"]

    @property
    def reasons(self) -> list[str]:
        """The reasons of the matches that were left, and of the near misses."""
        left = [f"{d.match.pattern.name}: {d.reason}" for d in self.decisions if d.kind != "replace"]
        return left + [f"{near.pattern.name}: {near.reason}" for near in self.near_misses]


def rewrite(gm: GraphModule, patterns: Iterable[Pattern] = (), *, policy: str = "always") -> Rewriting:
    """Rewrites `gm` in place as the backend does. `patterns` are used besides the registered ones."""
    mutations = Mutations(gm.graph)
    terms = Terms(gm.graph, mutations)
    matches, near_misses = find_matches(gm.graph, patterns_in_use(patterns), terms)
    decisions = decide(gm.graph, matches, mutations, rules=Rules(policy))
    decisions = carry_out(gm.graph, decisions)
    gm.recompile()
    return Rewriting(gm, decisions, near_misses)


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphModule, tuple[Any, ...]]:
    """Returns the graph that Dynamo captures of function(*args, **kwargs), and its inputs. Raises at a graph break."""
    captured: list[tuple[GraphModule, tuple[Any, ...]]] = []

    def backend(gm: GraphModule, _: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            captured.append((gm, inputs))
            return gm(*inputs)

        return run

    torch.compiler.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    torch.compiler.reset()
    return captured[0]


class Value(Proxy):
    """A value of a graph that is being recorded. Its sizes and dtypes are concrete, as in Dynamo."""

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
        """Returns an input of the graph that has this dtype, or None."""
        for node in self.tracer.graph.nodes:
            example = node.meta["example_value"]
            if node.op == "placeholder" and isinstance(example, torch.Tensor) and example.dtype == dtype:
                return Value(node, self.tracer)
        return None

    def made_by(self, name: str) -> tuple[Any, ...] | None:
        """Returns the arguments of the call that made this value, if it called `name` without keyword arguments."""
        if name_of(self.node) != name or self.node.kwargs:
            return None
        return map_arg(self.node.args, lambda node: Value(node, self.tracer))  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Any:
        return (self[index] for index in range(len(self.fake)))  # pyright: ignore[reportIndexIssue]

    def __len__(self) -> int:
        return len(self.fake)


class Recorder(GraphAppendingTracer):
    """Appends the calls on its Values to a graph, and computes their fake tensors."""

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
        """Returns the recorded graph, without nodes that no output needs."""
        node = self.graph.output(tuple(value.node for value in outputs))
        node.meta["example_value"] = tuple(value.fake for value in outputs)
        _without_unused(self.graph)
        return LazyGraphModule(torch.nn.Module(), self.graph)  # most change again before they run


def _without_unused(graph: Graph) -> None:
    """Erases pure calls without users, as Dynamo does."""
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


Visit = Callable[[Recorder, Node, tuple[Any, ...], dict[str, Any]], Any]


def again(recorder: Recorder, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The visit that records a node unchanged."""
    if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
        return args[0][args[1]]
    return recorder.create_proxy(node.op, node.target, args, kwargs)


def replay(gm: GraphModule, visit: Visit, inputs: Mapping[str, Any] | None = None) -> GraphModule:
    """Returns a new graph of the calls that `visit` makes for each node of `gm`.

    `visit` receives the recorder, the node, and its arguments as Values; its result replaces the node.
    `inputs` maps names of placeholders to other fake tensors, or to the name of another placeholder to use its Value.
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
    """Returns the name of a node's operation, whether it is an operator, a method or a function."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return _ALIASES.get(node.target) or _ALIASES.get(name) or name
