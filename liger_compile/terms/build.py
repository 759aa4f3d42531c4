"""Maps FX nodes to terms, for a whole graph (Terms) and for the search function of a pattern (trace).

Input: a graph that Dynamo captured (functions, methods, builtins and OpOverloads mixed), with meta["example_value"] on
every node; or a search function, run on fake tensors. Output: the term of every node, and the nodes of every term.
operators.py defines the term of each operator.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode

from liger_compile.graphs.aliasing import Mutations, handed_to
from liger_compile.graphs.regions import Regions
from liger_compile.graphs.sharding import passes_on
from liger_compile.terms import identities, normalize
from liger_compile.terms.call import IntVar, NumberVar, StrVar, Value, opaque
from liger_compile.terms.indices import OPERATIONS
from liger_compile.terms.operators import call, is_in_place_operation
from liger_compile.terms.scalars import is_integer
from liger_compile.terms.term import ConstVar, Scalar, Space, Term, sizes_of
from liger_compile.torch_internals.dispatch import is_traceable_wrapper_subclass
from liger_compile.torch_internals.pytree import tree_map
from liger_compile.torch_internals.shapes import shape_env_of

Step = Callable[[Any], Any]
ROUND_TRIP = 8  # most nodes between a value and a node that restores it


class Terms:
    """The terms of one graph: `of` maps nodes to terms; `nodes` and `derive` map terms to nodes."""

    def __init__(
        self,
        graph: Graph,
        mutations: Mutations,
        calls: Sequence[Sequence[Value]] = (),
        regions: Regions | None = None,
        *,
        strict: bool = True,
        empty_rows_unread: bool = False,
    ) -> None:
        """Builds all terms.

        Args:
            calls: for a subgraph, what each call passes to its placeholders (`arguments`).
            strict: raise RuleError if a rule of ours fails. Otherwise the value is opaque, and `failures` counts it.
            empty_rows_unread: nothing reads the rows of attention that see no key.
        """
        self.space = identities.new_space(strict=strict)
        self.space.empty_rows_unread = empty_rows_unread
        self.of: dict[Node, Value] = {}
        self.nodes: dict[Term, list[Node]] = {}  # in graph order
        self.written: dict[Term, Node] = {}  # value after the last in-place write -> its node
        # A value after a write -> the result of the operation that wrote all of it.
        self.written_whole: dict[Term, Term] = {}
        self._views: dict[Term, Term] | None = None
        self.passes_through: set[Node] = set()  # nodes that only restore the value of an ancestor
        self.memo: dict[str, Any] = {}  # what readers of these terms have found, by their names
        self.mutations = mutations
        self.regions = regions or Regions(graph)
        self._later: dict[tuple[Node, int], Value] = {}  # (node, number of writes) -> the value after them
        self._recordables: dict[Term, Node | None] = {}
        self._of_positions: dict[Term, bool] = {}
        self.space.shape_env = _shape_env(graph)
        placeholders = graph.find_nodes(op="placeholder") if calls else ()
        self._from_outside = dict(zip(placeholders, zip(*calls, strict=True), strict=True))
        for node in graph.nodes:
            self._visit(node)

    def _visit(self, node: Node) -> None:
        example = node.meta.get("example_value")
        is_call = node.op in ("call_function", "call_method")
        if (passed_on := self._passed_on(node)) is not None:
            value = passed_on
        elif is_call and not _moves_device(node):
            args, kwargs = map_arg((node.args, node.kwargs), lambda arg: self._seen(arg, node))
            value = call(self.space, node.target, args, kwargs, example, node.name)
        else:
            value = self._handed_in(node) or opaque(self.space, example, node.name, is_made=is_call)
        self.of[node] = value
        if isinstance(value, Term):
            if value in self.nodes and self._comes_from(node, value):
                self.passes_through.add(node)
            self.nodes.setdefault(value, []).append(node)

    def _passed_on(self, node: Node) -> Term | None:
        """Returns the value of a column-parallel linear layer that a node gathers, or None."""
        source = passes_on(node)
        value = None if source is None else self._seen(source, node)
        return value if isinstance(value, Term) and value.uncast.op == "linear" else None

    def failures(self) -> Iterator[str]:
        """Yields a sentence about each rule of ours that failed."""
        for sentence, count in self.space.findings.failures.items():
            left = "1 call is left as it is" if count == 1 else f"{count} calls are left as they are"
            yield f"{sentence}; {left}"

    def _seen(self, node: Node, reader: Node) -> Value:
        """Returns the value of `node` in the modes of `reader`.

        A result under no_grad, in inference mode or under a torch.func transform has the same numbers as elsewhere, but
        another gradient. It is therefore another value.
        """
        value, region = self._read(node, reader), self.regions.of[reader]
        example = node.meta.get("example_value")
        if not isinstance(value, Term) or not isinstance(example, torch.Tensor):
            return value
        if region.transforms and region.transforms != self.regions.of[node].transforms:
            return self.space.intern("within", (value,), region.transforms, value.dtype, value.shape)
        is_cut = self.regions.differ_in_gradients and not region.has_gradients
        if is_cut and example.requires_grad:
            return self.space.intern("detached", (value,), (), value.dtype, value.shape)
        return value

    def _read(self, node: Node, reader: Node) -> Value:
        """Returns the value of `node` when `reader` runs; an earlier in-place write makes it another value."""
        example = node.meta.get("example_value")
        if isinstance(example, (int, torch.SymInt, torch.Size, torch.dtype, torch.device)):
            return example
        if not self.mutations.is_clean(node):
            position = self.mutations.position
            epoch = self.mutations.epoch(node, position[reader])
            if epoch is None:
                name = f"{node.name} as {reader.name} reads it"
                return opaque(self.space, example, name, is_made=True)
            if epoch != self.mutations.epoch(node, position[node] + 1):
                if (node, epoch) not in self._later:
                    name = f"{node.name} after write {epoch}"
                    self._later[node, epoch] = opaque(self.space, example, name, is_made=True)
                    if (whole := self._written_whole(node, reader)) is not None:
                        self.written_whole[self._later[node, epoch]] = whole
                value = self._later[node, epoch]
                last = self.mutations.last_write(node)
                if isinstance(value, Term) and last is not None and position[last] < position[reader]:
                    self.written[value] = node
                return value
        return self.of[node]

    def _written_whole(self, node: Node, reader: Node) -> Term | None:
        """Returns the value of `node` if the last write before `reader` is an in-place operation on `node` itself.

        The operation has written all of the node's memory. If it runs without gradients, in code that has gradients,
        the gradient of the value is not the gradient of the operation, so that its term is not the value.
        """
        write = self.mutations.last_write(node, self.mutations.position[reader])
        if (
            write is None
            or write not in self.of
            or not is_in_place_operation(write)
            or write.args[0] is not node
        ):
            return None
        value, before, after = self.of[write], self.regions.of[node], self.regions.of[write]
        is_same_mode = (before.has_gradients, before.transforms) == (after.has_gradients, after.transforms)
        example = node.meta.get("example_value")
        if not isinstance(value, Term) or not isinstance(example, torch.Tensor):
            return None
        if value.op == "leaf" or not is_same_mode:
            return None
        is_like = value.dtype == example.dtype and value.shape == sizes_of(example.shape)
        return value if is_like else None

    def arguments(self, call: Node, body: Graph) -> tuple[Value, ...]:
        """Returns what a call passes to the placeholders of its subgraph: its last positional arguments."""
        handed = handed_to(call, len(body.find_nodes(op="placeholder"))) or ()
        return tuple(self._read(arg, call) if isinstance(arg, Node) else arg for arg in handed)

    def _handed_in(self, placeholder: Node) -> Term | None:
        """Returns the term that all callers pass if it consists of positions and flags only, as masks do."""
        values = self._from_outside.get(placeholder, ())
        handed = dict.fromkeys(value if isinstance(value, Term) else None for value in values)
        terms = {None if term is None else _brought_in(self.space, term) for term in handed}
        term = terms.pop() if len(terms) == 1 else None
        example = placeholder.meta.get("example_value")
        if term is None or not isinstance(example, torch.Tensor):
            return None
        is_like = term.dtype == example.dtype and term.shape == sizes_of(example.shape)
        return term if is_like else None

    def is_of_positions(self, term: Term) -> bool:
        """Returns whether a term is computed from positions and flags only, as masks are."""
        waiting = [term]
        while waiting:
            part = waiting[-1]
            unknown = [arg for arg in part.args if arg not in self._of_positions]
            if part in self._of_positions or not unknown:
                waiting.pop()
                of_args = all(self._of_positions[arg] for arg in part.args)
                self._of_positions[part] = of_args and _may_be_in_mask(part)
            else:
                waiting.extend(unknown)
        return self._of_positions[term]

    def _comes_from(self, node: Node, value: Term) -> bool:
        """Returns whether `node` only restores its value: a node that it is computed from has the same value."""
        seen, queue = {node}, [node]
        while queue and len(seen) < ROUND_TRIP:
            for arg in itertools.islice(queue.pop(0).all_input_nodes, ROUND_TRIP):
                if self.of[arg] is value:
                    return True
                if arg not in seen:
                    seen.add(arg)
                    queue.append(arg)
        return False

    def forget(self, node: Node) -> None:
        """Removes a node that is erased from the graph."""
        value = self.of.pop(node)
        if isinstance(value, Term):
            self.nodes[value].remove(node)
            self._recordables.pop(value, None)

    def derive(self, term: Term) -> tuple[Node, tuple[Step, ...]] | None:
        """Returns a node and the steps that compute `term` from it, or None if there is no such node."""
        base, steps = self._base(term)
        node = self._recordable(base)
        return None if node is None else (node, steps)

    def written_by(self, term: Term) -> Node | None:
        """Returns the last write into the node of `term`, if the node has that value only after its writes."""
        base, _ = self._base(term)
        is_written = base in self.written and not self.nodes.get(base)
        return self.mutations.last_write(self.written[base]) if is_written else None

    def _recordable(self, term: Term) -> Node | None:
        """Returns a node with the value of `term`, which backward can save: the first that is not written later.

        A copy of a tensor that is written later has the same term. Inference tensors come last.
        """
        if term not in self._recordables:
            nodes = self.nodes.get(term, ())
            recordable = [node for node in nodes if not self.regions.of[node].inference_mode]
            recordable.sort(
                key=_is_wrapped
            )  # logits that are gathered are a DTensor, and then a plain tensor
            kept = filter(self.mutations.is_as_made, recordable)
            first = next(iter(recordable or nodes), self.written.get(term))
            self._recordables[term] = next(kept, first)
        return self._recordables[term]

    def _base(self, term: Term) -> tuple[Term, tuple[Step, ...]]:
        """Returns the nearest term that has a node and from which steps alone compute `term`, and the steps.

        If no such term has a node, returns the last term reached. Terms keep a cast outside a slice, a view or a
        negation, but the graph may have the cast inside. So the search also tries the cast inside.
        """
        steps: list[Step] = []
        while self._recordable(term) is None:
            moved = self._before_moving(term)
            if moved is not None:
                term, more = moved
                return term, (*more, *reversed(steps))
            step = _step(term)
            if step is None:
                viewed = self._view_of(term)
                return (
                    (term, tuple(reversed(steps)))
                    if viewed is None
                    else (viewed[0], (viewed[1], *reversed(steps)))
                )
            steps.append(step)
            term = term.args[0]
        return term, tuple(reversed(steps))

    def _view_of(self, term: Term) -> tuple[Term, Step] | None:
        """Returns a view of `term` that has a node, and the step back; a reduction without keepdim has such a node."""
        if self._views is None:
            self._views = {viewed.args[0]: viewed for viewed in self.nodes if viewed.op == "view"}
        shape = tuple(size if isinstance(size, int) else -1 for size in term.shape)
        if term not in self._views or shape.count(-1) > 1:
            return None
        return self._views[term], operator.methodcaller("reshape", shape)

    def _before_moving(self, term: Term) -> tuple[Term, tuple[Step, ...]] | None:
        """Returns a cast that has a node, and the moves and signs that follow it; None if there is none."""
        steps: list[Step] = []
        while term.op == "cast":
            (inner,) = term.args
            is_moved = inner.op in ("slice", "view", "permute") or normalize.is_negative(inner)
            step = _step(inner) if is_moved else None
            if step is None:
                return None
            steps.append(step)
            term = normalize.cast(self.space, inner.args[0], term.dtype)
            if self.nodes.get(term):
                return term, tuple(reversed(steps))
        return None


def _may_be_in_mask(term: Term) -> bool:
    """Returns whether a term is a position, a flag, or an operation that masks use."""
    is_float = term.dtype is not None and term.dtype.is_floating_point
    return not is_float if term.op == "leaf" else term.op in OPERATIONS


def _brought_in(space: Space, term: Term) -> Term | None:
    """Returns a term of the outer graph as a term of this one; None if masks do not consist of such terms."""
    parts = term.parts()
    if not all(map(_may_be_in_mask, parts)):
        return None
    made: dict[Term, Term] = {}
    for part in parts:
        is_named = part.op == "leaf" and isinstance(part.consts[0], str)
        consts = (*part.consts, "outside") if is_named else part.consts  # nodes here may have the same names
        args = tuple(made[arg] for arg in part.args)
        made[part] = space.intern(part.op, args, consts, part.dtype, part.shape)
    return made[term]


def _shape_env(graph: Graph) -> Any:
    return shape_env_of(node.meta.get("example_value") for node in graph.nodes)


def _step(term: Term) -> Step | None:
    """Returns a function that computes a term from its argument, if that is one cheap operation."""
    if term.op == "cast":
        return operator.methodcaller("to", term.dtype)
    if term.op == "detached":
        return _detached
    if term.op == "within":
        return _as_it_is
    if term.op == "permute":
        rank, moved = len(term.shape), term.consts
        return operator.methodcaller("permute", *range(-rank, -len(moved)), *moved)
    is_scaled = term.op == "mul" and len(term.args) == 1 and term.consts[1] == 1
    if is_scaled and term.args[0].shape == term.shape and not is_integer(term.dtype):
        value = term.consts[0].value
        return lambda tensor: tensor * value
    if term.op == "slice":
        dim, start, stop, step = term.consts
        before_end = stop - term.args[0].shape[dim]  # may be a plain number although the size is symbolic
        if not isinstance(start, int) or not (isinstance(stop, int) or before_end.is_Integer):
            return None
        bound = stop if isinstance(stop, int) else int(before_end) or None
        index = (Ellipsis, slice(start, bound, step), *[slice(None)] * (-1 - dim))
        return lambda tensor: tensor[index]
    if term.op == "view" and sum(not isinstance(size, int) for size in term.shape) <= 1:
        shape = tuple(size if isinstance(size, int) else -1 for size in term.shape)
        return operator.methodcaller("reshape", shape)
    return None


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor.detach() if torch.is_grad_enabled() else tensor
    )  # AOTAutograd cannot detach in inference mode


def _as_it_is(value: Any) -> Any:
    return value


def _is_wrapped(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)


def _moves_device(node: Node) -> bool:
    """Returns whether a node copies to another device: equal in value, but no replacement for its argument."""
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor):
        return False
    inputs = (arg.meta.get("example_value") for arg in node.all_input_nodes)
    return any(isinstance(arg, torch.Tensor) and arg.dim() and arg.device != example.device for arg in inputs)


class Recorder(TorchFunctionMode):
    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space
        self.values: dict[int, Value] = {}
        self.alive: list[Any] = []  # keeps objects alive: ids are unique among live objects only

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) or (
            isinstance(out, (tuple, list)) and not isinstance(out, torch.Size)
        ):
            arguments, keywords = tree_map(self.value_of, (tuple(args), kwargs))
            self.remember(out, call(self.space, func, arguments, keywords, out, f"op{len(self.alive)}"))
        return out

    def remember(self, out: Any, value: Value) -> None:
        self.alive.append(out)
        self.values[id(out)] = value
        if isinstance(out, (tuple, list)) and isinstance(value, tuple):
            for part, part_value in zip(out, value, strict=True):
                self.remember(part, part_value)

    def value_of(self, arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor):
            return arg
        if id(arg) not in self.values:
            self.remember(arg, opaque(self.space, arg, f"constant{len(self.alive)}"))
        return self.values[id(arg)]


def trace(search: Callable[..., Any], captures: Mapping[str, Any]) -> tuple[Term, ...]:
    """Returns the terms of the outputs of a pattern's search function.

    Args:
        search: the function, which is called once.
        captures: name -> a fake tensor, an example number or string, or None. A tensor becomes a `var` term, a float a
            Scalar with a power, an int or str a ConstVar.
    """
    space = identities.new_space()
    space.empty_rows_unread = (
        True  # a pattern's replacement may give any values there: the graph's term excludes them
    )
    recorder = Recorder(space)
    arguments: dict[str, Any] = {}
    for name, example in captures.items():
        arguments[name] = example
        if isinstance(example, torch.Tensor):
            var = space.intern("var", (), (name,), example.dtype, sizes_of(example.shape))
            recorder.remember(example, var)
        elif isinstance(example, float):
            arguments[name] = NumberVar(example, Scalar(1.0, ((name, 1),)))
        elif isinstance(example, (int, str)) and not isinstance(example, bool):
            arguments[name] = (IntVar if isinstance(example, int) else StrVar)(example)
            arguments[name].var = ConstVar(name)
    with recorder:
        out = search(**arguments)
    outs = out if isinstance(out, (tuple, list)) else (out,)
    return tuple(recorder.values[id(tensor)] for tensor in outs)
