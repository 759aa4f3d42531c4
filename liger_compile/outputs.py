"""Graph outputs that may never be read: logits beside a loss that does without them. With rewrite.py and remat.py the
only file that edits a graph.

    logits_in()  outputs that are logits of a loss in the graph
    take_out()   before matching: returns the hidden state in their place, so that nothing in the graph needs them
    settle()     after rewriting: where head and loss were not fused, they come back
    filling()    after each call of what was compiled: puts a tensor in their place that computes them if it is read

Left in the graph, logits that nobody reads would cost their memory until the end of the step, and as much again for
their gradient: AOTAutograd makes one of zeros for every output that is not used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from liger_compile.graphs.aliasing import storages_of
from liger_compile.runtime.lazy import lazy
from liger_compile.runtime.promise import Recipe
from liger_compile.terms.build import Terms
from liger_compile.terms.term import Term

# On the way from a head to its loss, or to an output. All logits stay there.
_STEPS = ("cast", "view", "slice", "permute", "mul", "add", "tanh")
MOST_NODES = (
    64  # from the head to such an output: what is further away takes longer to compute late than to keep
)
_ADVICE = (
    "read them before the weights change, or compile with "
    'options={"liger.logits": "eager"} to have them computed in the compiled graph'
)

_MOST_LIKES = 1024  # lengths of sequences, say: so many are remembered


@dataclass(frozen=True)
class Logits:
    """An output that is logits, and how it is computed."""

    output: Node
    hidden: Node  # what the head reads
    head: Node  # the linear layer
    nodes: tuple[Node, ...]  # from there to the output, in graph order


@dataclass(frozen=True)
class Deferred:
    """An output that has been taken out of a graph, and how to compute it."""

    positions: tuple[int, ...]  # among the outputs
    head: Node  # the linear layer that it comes from
    recipe: Graph  # of the hidden state, then of inputs of the graph
    inputs: tuple[Node, ...]  # these inputs
    originals: Mapping[Node, Node]  # what a node of the recipe is a copy of
    autocast: tuple[str, torch.dtype] | None  # that the head runs under


def logits_in(graph: Graph, terms: Terms) -> list[Logits]:
    """The outputs that are logits of a loss in `graph`, and can be computed later."""
    losses = [t for t in terms.of.values() if isinstance(t, Term) and t.op == "cross_entropy"]
    if not losses:
        return []
    head_of = _heads(terms.space.in_order())
    heads = {head_of.get(loss.args[0].bare) for loss in losses} - {None}
    outputs = graph.output_node().args[0]
    found = []
    nodes = [each for each in outputs if isinstance(each, Node)] if isinstance(outputs, tuple) else []
    sharing = Counter(storage for node in dict.fromkeys(nodes) for storage in storages_of(node))
    for node in dict.fromkeys(nodes):
        if any(sharing[storage] > 1 for storage in storages_of(node)):
            continue  # a view of it is returned too, and has to stay one
        term = terms.of.get(node)
        head = head_of.get(term.bare) if isinstance(term, Term) else None
        if head is not None and head in heads and (logits := _walk(node, head, terms)) is not None:
            found.append(logits)
    return found


def _heads(terms: Iterable[Term]) -> dict[Term, Term]:
    """Of terms that are given arguments first: the linear layer that each is computed from by steps alone."""
    heads: dict[Term, Term] = {}
    for term in terms:
        if term.op == "linear":
            heads[term] = term
        elif term.op in _STEPS:
            found = [heads[arg] for arg in term.args if arg in heads]
            if len(found) == 1:
                heads[term] = found[0]
    return heads


def _walk(output: Node, head: Term, terms: Terms) -> Logits | None:
    """The way from the hidden state to `output`, if it can be gone again, later."""
    recipe: set[Node] = set()
    hidden: Node | None = None
    stack = [output]
    while stack:
        node = stack.pop()
        value = terms.of[node]
        if isinstance(value, Term) and value.bare is head.args[0]:
            first = terms.nodes[value][0]
            if hidden not in (None, first):
                return None
            hidden = first
        elif node.op != "placeholder" and node not in recipe:
            if len(recipe) == MOST_NODES or not _can_run_again(node, value, terms):
                return None
            recipe.add(node)
            stack.extend(node.all_input_nodes)
    in_order = sorted(recipe, key=terms.mutations.position.__getitem__)
    heads = [n for n in in_order if isinstance(value := terms.of[n], Term) and value.bare is head]
    if not hidden or not heads or not _is_same_later([hidden, *in_order], heads[0], terms):
        return None
    return Logits(output, hidden, heads[0], tuple(in_order))


def _is_same_later(nodes: Sequence[Node], head: Node, terms: Terms) -> bool:
    """Whether what these nodes read is at the end what it was for them, and all of them run in the head's modes."""
    inputs = [arg for node in nodes[1:] for arg in node.all_input_nodes]
    # Of the steps after a head autocast changes none.
    regions = {replace(terms.regions.of[node].meaning, autocast=()) for node in nodes[1:]}
    is_certain = terms.regions.of[head].unknown is None and not terms.regions.why_uncertain
    return is_certain and len(regions) == 1 and all(map(terms.mutations.is_as_made, (nodes[0], *inputs)))


def _can_run_again(node: Node, value: Any, terms: Terms) -> bool:
    if node.op not in ("call_function", "call_method") or not terms.mutations.is_clean(node):
        return False
    if isinstance(node.meta.get("example_value"), (int, torch.SymInt, torch.Size)):
        return True
    return isinstance(value, Term) and value.op in (*_STEPS, "linear", "matmul")


def take_out(found: Sequence[Logits], terms: Terms) -> list[Deferred]:
    """Returns the hidden state in their place, and erases what nobody needs any more."""
    if not found:
        return []
    graph = found[0].output.graph
    positions: dict[Any, list[int]] = {}
    for position, node in enumerate(graph.output_node().args[0]):  # pyright: ignore[reportArgumentType]
        positions.setdefault(node, []).append(position)
    deferred = [_deferred(each, positions[each.output], terms) for each in found]
    _return(graph, {at: each.hidden for each in found for at in positions[each.output]})
    for each in found:
        for node in reversed(each.nodes):
            if not node.users and not node._erased:
                terms.forget(node)
                graph.erase_node(node)
    return deferred


def _deferred(logits: Logits, positions: Sequence[int], terms: Terms) -> Deferred:
    output, hidden, nodes = logits.output, logits.hidden, logits.nodes
    recipe = Graph()
    copies = {hidden: recipe.placeholder("hidden")}
    given = dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg.op == "placeholder")
    inputs = tuple(node for node in given if node is not hidden)
    copies.update((node, recipe.placeholder(node.name)) for node in inputs)
    for node in nodes:  # another node may have the value of the hidden state
        copies[node] = recipe.node_copy(node, lambda arg: copies.get(arg, copies[hidden]))
    recipe.output(copies[output])
    autocast = terms.regions.of[logits.head].autocast_on(logits.head.meta["example_value"].device.type)
    originals = {copies[node]: node for node in nodes}
    return Deferred(tuple(positions), logits.head, recipe, inputs, originals, autocast)


def _return(graph: Graph, values: Mapping[int, Node | None]) -> None:
    """Returns these at these positions among the outputs."""
    output = graph.output_node()
    (outputs,) = output.args
    assert isinstance(outputs, tuple)
    output.args = (tuple(values.get(at, each) for at, each in enumerate(outputs)),)


def settle(graph: Graph, deferred: Sequence[Deferred], is_dropped: bool) -> list[Filled]:
    """What to put in the place of outputs whose head is gone from `graph`; the other outputs come back.

    Args:
        is_dropped: None is put there.
    """
    placeholders = {node: at for at, node in enumerate(graph.find_nodes(op="placeholder"))}
    found = []
    returned: dict[int, Node | None] = {}
    for each in deferred:
        if not each.head._erased:
            returned.update(dict.fromkeys(each.positions, _put_back(graph, each)))
            continue
        if is_dropped:
            returned.update(dict.fromkeys(each.positions))
        for node in each.recipe.nodes:
            node.meta.clear()  # fake tensors
        function = GraphModule(torch.nn.Module(), each.recipe)
        recipe = None if is_dropped else Recipe(function, "logits", _ADVICE, each.autocast)
        found.append(Filled(each.positions, tuple(map(placeholders.__getitem__, each.inputs)), recipe))
    if returned:
        _return(graph, returned)
    return found


def _put_back(graph: Graph, deferred: Deferred) -> Node:
    """Computes the output in the graph again, as far as it is gone."""
    outputs: Any = graph.output_node().args[0]
    hidden = outputs[deferred.positions[0]]  # what stands in for it now
    ends, *nodes = reversed(deferred.recipe.nodes)
    there: dict[Node, Node] = {}
    given = iter((hidden, *deferred.inputs))
    for node in reversed(nodes):
        if node.op == "placeholder":
            there[node] = next(given)
        elif not (original := deferred.originals[node])._erased:
            there[node] = original
        else:  # as early as it can, in the modes of the head
            with graph.inserting_after(max(deferred.head, *map(there.__getitem__, node.all_input_nodes))):
                there[node] = graph.node_copy(node, there.__getitem__)
    (output,) = ends.all_input_nodes
    return there[output]


@dataclass(frozen=True)
class Filled:
    """Stands in for an output, call for call."""

    positions: tuple[int, ...]
    inputs: tuple[int, ...]  # which of the graph's inputs the recipe takes after the hidden state
    recipe: Recipe | None  # None puts None there
    likes: dict[Any, Tensor] = field(default_factory=dict)  # what the output looks like, by what decides that

    def __str__(self) -> str:
        which = ", ".join(map(str, self.positions))
        if self.recipe is None:
            return f"the logits (graph output {which}) are None: liger.logits is 'none'"
        return (
            f"the logits (graph output {which}) are computed when they are read; liger.logits says otherwise"
        )

    def fill(self, outputs: list[Any], inputs: Sequence[Any]) -> None:
        """Puts a LazyTensor where the hidden state was returned."""
        made = None
        if self.recipe is not None:
            arguments = (outputs[self.positions[0]], *(inputs[i] for i in self.inputs))
            key = tuple(map(_layout, arguments))
            if key not in self.likes:
                if len(self.likes) >= _MOST_LIKES:
                    self.likes.clear()
                self.likes[key] = _like(self.recipe, arguments)
            with (
                torch.enable_grad()
            ):  # as at the head, whatever the caller's mode is: else nothing is deferred
                made = lazy(self.recipe, self.likes[key], *arguments)
        for position in self.positions:
            outputs[position] = made


def _layout(argument: Any) -> Any:
    """What the shape, strides and dtype of a result may depend on: the same of a tensor, and a size."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    return argument if isinstance(argument, int) else type(argument)


def _like(recipe: Recipe, arguments: Sequence[Any]) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        result = recipe(
            *(
                torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
                if isinstance(a, Tensor)
                else a
                for a in arguments
            )
        )
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")


def filling(compiled: Callable[..., Any], filled: Sequence[Filled]) -> Callable[..., Any]:
    """`compiled`, with its outputs filled in."""
    if not filled:
        return compiled

    def call(*inputs: Any) -> tuple[Any, ...]:
        outputs = list(compiled(*inputs))
        for each in filled:
            each.fill(outputs, inputs)
        return tuple(outputs)

    return call
