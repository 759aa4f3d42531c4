"""rewrite(): carries decisions out: splices each replacement into the graph and takes out what it replaced.

The replacement function runs once on the graph's own fake tensors; every torch function that it calls becomes
a node with meta["example_value"] (a node without it would switch AOTAutograd's cache off). A replacement
whose result is not just like the original's is not spliced in, and the decision becomes a refusal.

Dead-code elimination over the whole graph would delete mutations (x.add_(1) has no users), so only matched
nodes that lost their last user are erased.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch.fx import Graph, Node, symbolic_trace
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from liger_compile.graphs.regions import Region, Regions
from liger_compile.pattern import Capture, Decision, Match
from liger_compile.terms.term import size_of, sizes_of

_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


def rewrite(
    graph: Graph,
    decisions: Sequence[Decision],
    insertion_point: Callable[[Match], Node],
    settings: Mapping[str, Any] | None = None,
    regions: Regions | None = None,
) -> list[Decision]:
    """Edits `graph` as decided. Returns the decisions with what could not be spliced turned into refusals.

    Args:
        settings: what the user chose for replacements: each gets those that it has a parameter for.
        regions: the modes of the nodes, in which the replacements run.
    """
    regions = regions or Regions(graph)
    replaced: dict[Node, Node] = {}  # original output -> what stands in for it
    result = []
    for decision in decisions:
        if decision.kind == "replace":
            before = insertion_point(decision.match)
            region = regions.of[decision.match.outputs[0]]
            spliced = _splice(graph, decision.match, before, replaced, region, settings or {})
            if isinstance(spliced, str):
                decision = replace(decision, kind="leave", reason=spliced, saved_bytes=None)
            else:
                decision = replace(decision, inserted=spliced)
        result.append(decision)
    for decision in result:
        if decision.kind == "replace":
            _erase_unused(graph, decision.match)
    graph.lint()
    return result


def _splice(
    graph: Graph,
    match: Match,
    before: Node,
    replaced: dict[Node, Node],
    region: Region,
    settings: Mapping[str, Any],
) -> tuple[Node, ...] | str:
    """Inserts the replacement of one match; gives the sentence why not if it is not like the original."""
    arguments: dict[str, Any] = {}
    splicer = _Splicer(graph, before, match.outputs[0])
    for name, bound in match.captures.items():
        if isinstance(bound, (Capture, Node)):
            node = bound.node if isinstance(bound, Capture) else bound
            node = replaced.get(node, node)
            arguments[name] = splicer.knows(node.meta["example_value"], node)
    fake_mode = getattr(match.result, "fake_mode", None) or nullcontext()
    originals = [output.meta["example_value"] for output in match.outputs]
    try:
        # A user's hooks on saved tensors are for tensors that have values.
        hooks = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
        with fake_mode, hooks, region.entered(), splicer:
            for name, bound in match.captures.items():
                if isinstance(bound, Capture):
                    arguments[name] = bound.derive(arguments[name])
                elif not isinstance(bound, Node):
                    arguments[name] = bound
            assert match.pattern.replace is not None, "decide.py annotates a match without a replacement"
            known = inspect.signature(match.pattern.replace).parameters
            arguments.update((name, value) for name, value in settings.items() if name in known)
            results = match.pattern.replace(**arguments)
            results = results if isinstance(results, tuple) else (results,)
            results = tuple(map(_laid_out_like, results, originals))
    except (ValueError, TypeError, RuntimeError) as error:  # an op that does not take these arguments says so
        splicer.undo()
        return f"the replacement refuses: {error}"
    nodes = [splicer.node_of.get(id(value)) for value in results]
    for original, value, node in zip(originals, results, nodes, strict=True):
        difference = _difference(original, value)
        if node is None or difference:
            splicer.undo()
            return difference or "the replacement returns a tensor that no torch function made"
    for output, node in zip(match.outputs, nodes, strict=True):
        assert node is not None
        node.meta["example_value"] = output.meta["example_value"]
        output.replace_all_uses_with(node)
        replaced[output] = node
    return tuple(splicer.inserted)


def _as_it_is(value: Any) -> Any:
    return value


def _laid_out_like(result: Any, original: torch.Tensor) -> Any:
    """The result with the original's order of dimensions in memory: a later view() may rely on it."""
    is_comparable = isinstance(result, torch.Tensor) and sizes_of(result.shape) == sizes_of(original.shape)
    if not is_comparable or _strides(result) == _strides(original):
        return result
    order = sorted(range(original.dim()), key=lambda dim: -_hint(original.stride(dim)))
    inverse = [order.index(dim) for dim in range(original.dim())]
    return result.permute(order).contiguous().permute(inverse)


def _hint(size: Any) -> int:
    """A size as it is today; good enough to sort by, and adds no guard."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _difference(original: torch.Tensor, new: Any) -> str | None:
    """What tells the replacement's result from the original's, in a sentence."""
    for name, describe in _PROPERTIES.items():
        expected, got = describe(original), describe(new)
        if expected != got:
            return f"the replacement's result has {name} {got}, the original's {expected}"
    return None


_PROPERTIES: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda tensor: sizes_of(tensor.shape),
    "dtype": lambda tensor: tensor.dtype,
    "device": lambda tensor: tensor.device,
    "strides": lambda tensor: _strides(tensor),
    "requires_grad": lambda tensor: tensor.requires_grad,
}


def _strides(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Strides, where they mean anything: of dimensions with more than one element."""
    return tuple(
        size_of(stride)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size_of(size) != 1
    )


class _Splicer(TorchFunctionMode):
    """Records the torch functions that run under it as nodes before `before`, with the meta of `like`."""

    def __init__(self, graph: Graph, before: Node, like: Node) -> None:
        super().__init__()
        self.graph, self.before = graph, before
        self.meta = {key: like.meta[key] for key in _META if key in like.meta}
        self.node_of: dict[int, Node] = {}
        self.inserted: list[Node] = []
        self.alive: list[Any] = []  # ids are only unique among living objects

    def knows(self, value: Any, node: Node) -> Any:
        """Remembers which node has `value`. The same fake tensor may be the value of several nodes."""
        if isinstance(value, torch.Tensor):
            value = value.detach().requires_grad_(value.requires_grad) if id(value) in self.node_of else value
        self.node_of[id(value)] = node
        self.alive.append(value)
        return value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_higher = isinstance(func, torch._ops.HigherOrderOperator)
        out = _without_gradients(func, args, kwargs) if is_higher else func(*args, **kwargs)
        parts = out if isinstance(out, (tuple, list)) else (out,)
        if any(isinstance(part, torch.Tensor) for part in parts):
            self._insert(func, args, kwargs, out)
        return out

    def _insert(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        with self.graph.inserting_before(self.before):
            args, kwargs = tree_map(self._argument, (tuple(args), dict(kwargs)))
            node = self._made(func, args, kwargs)
            self._remember(node, out)
            if isinstance(out, (tuple, list)):
                for index, part in enumerate(out):
                    if isinstance(part, torch.Tensor):
                        item = self.graph.call_function(operator.getitem, (node, index))
                        self._remember(item, part)

    def _made(self, func: Any, args: tuple, kwargs: dict) -> Node:
        name = getattr(func, "__name__", "")
        if isinstance(func, torch._ops.OpOverloadPacket):
            func = getattr(func, func.overloads()[0])
        elif name == "__get__":  # a property: x.real
            return self.graph.call_function(getattr, (args[0], func.__self__.__name__))
        elif getattr(torch.Tensor, name, None) is func or type(func).__name__ == "method_descriptor":
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(func, args, kwargs)

    def _remember(self, node: Node, value: Any) -> None:
        node.meta.update(self.meta, example_value=value)
        self.inserted.append(node)
        self.alive.append(value)
        self.node_of[id(value)] = node

    def _argument(self, value: Any) -> Any:
        if id(value) in self.node_of:
            return self.node_of[id(value)]
        if isinstance(value, FunctionType):
            return self._body(value)
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, (torch.Tensor, torch.SymFloat)):
            raise ValueError(
                f"a replacement may use its captures and what torch functions make of them; it used {value!r}"
            )
        return value

    def _body(self, function: FunctionType) -> Node:
        """A function that a higher-order op is given: a submodule, as Dynamo has it."""
        owner = self.graph.owning_module
        assert owner is not None
        name = next(
            f"liger_{function.__name__}_{n}"
            for n in itertools.count()
            if not hasattr(owner, f"liger_{function.__name__}_{n}")
        )
        setattr(owner, name, symbolic_trace(function))
        node = self.graph.get_attr(name)
        node.meta.update(self.meta)
        self.inserted.append(node)
        return node

    def _size(self, value: torch.SymInt) -> Node:
        """A node for a symbolic size: the size of a tensor that the replacement knows."""
        for tensor in [each for each in self.alive if isinstance(each, torch.Tensor)]:
            for dim, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt) and size_of(size) == size_of(value):
                    node = self.graph.call_method("size", (self.node_of[id(tensor)], dim))
                    node.meta.update(self.meta, example_value=value)
                    self.inserted.append(node)
                    return node
        raise ValueError(f"no input of the replacement has the symbolic size {value} that it uses")

    def undo(self) -> None:
        """Takes out what was inserted."""
        for node in reversed(self.inserted):
            self.graph.erase_node(node)
            if node.op == "get_attr":
                delattr(self.graph.owning_module, str(node.target))


def _without_gradients(func: Any, args: tuple, kwargs: dict) -> Any:
    """The result of a higher-order op, which would trace the gradient of its body where only shapes are wanted."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.no_grad():
        out = func(*args, **kwargs)
        return tree_map_only(
            torch.Tensor, lambda part: part.requires_grad_(needs_grad and part.is_floating_point()), out
        )


def _erase_unused(graph: Graph, match: Match) -> None:
    for node in reversed(match.nodes):
        if not node.users and not node._erased:
            graph.erase_node(node)
