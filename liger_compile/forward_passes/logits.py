"""Defers graph outputs that may never be read: logits beside a loss that does not need them.

    logits_in()  returns the outputs that are logits of a loss in the graph
    take_out()   before matching: returns the hidden state in their place, so that no node in the graph needs them
    restore()    after rewriting: restores them where head and loss were not fused
    materializing()    after each call: returns in their place a tensor that computes them when read

Logits that stay in the graph unread would keep their memory until the end of the step, and as much again for their
gradient: AOTAutograd materializes zeros as the gradient of every unused output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from liger_compile.graphs.aliasing import storages_of
from liger_compile.lazy_logits.recipe import Reading, reading
from liger_compile.runtime.lazy import lazy
from liger_compile.runtime.promise import Recipe
from liger_compile.terms.build import Terms
from liger_compile.terms.heads import looks_like_head, vocabularies
from liger_compile.terms.term import Term
from liger_compile.torch_internals.dtensor import is_dtensor
from liger_compile.torch_internals.fake_tensors import FakeTensorMode
from liger_compile.torch_internals.fx import is_erased

# Steps from a head to its loss, or to an output. With these steps the values still count as logits.
_STEPS = ("cast", "view", "slice", "permute", "mul", "add", "tanh")
MOST_NODES = (
    64  # nodes from the head to such an output: beyond that, computing it late takes longer than keeping it
)
_ADVICE = (
    "read them before the weights change, or compile with "
    'options={"liger.logits": "eager"} to compute them in the compiled graph'
)

_MOST_LIKES = 1024  # layouts (for example sequence lengths) that are remembered


@dataclass(frozen=True)
class Logits:
    """An output that is logits, and the nodes that compute it."""

    output: Node
    hidden: Node  # the operand of the head
    head: Node  # the linear layer
    nodes: tuple[Node, ...]  # from the head to the output, in graph order

    @property
    def is_divided(self) -> bool:
        """Whether the ranks of a mesh divide the result of the head."""
        return is_dtensor(self.head.meta["example_value"])


@dataclass(frozen=True)
class Deferred:
    """An output that was taken out of a graph, and the recipe to compute it."""

    positions: tuple[int, ...]  # among the outputs
    head: Node  # the linear layer that computes it
    recipe: Graph  # its placeholders: the hidden state, then inputs of the graph
    inputs: tuple[Node, ...]  # these inputs
    originals: Mapping[Node, Node]  # from a node of the recipe to the node that it copies
    autocast: tuple[str, torch.dtype] | None  # the autocast of the head
    has_gradients: bool  # of the head


def logits_in(graph: Graph, terms: Terms, *, needs_loss: bool = True) -> list[Logits]:
    """Returns the outputs that are logits and can be computed later.

    Args:
        needs_loss: only logits of a loss in `graph`; otherwise also those that look like logits.
    """
    losses = [t for t in terms.of.values() if isinstance(t, Term) and t.op == "cross_entropy"]
    if needs_loss and not losses:
        return []
    head_of = _heads(terms.space.in_order())
    heads = {head_of.get(loss.args[0].uncast) for loss in losses} - {None}
    outputs = graph.output_node().args[0]
    found = []
    nodes = [value for value in outputs if isinstance(value, Node)] if isinstance(outputs, tuple) else []
    sharing = Counter(storage for node in dict.fromkeys(nodes) for storage in storages_of(node))
    looks = partial(looks_like_head, vocabularies=frozenset(vocabularies(graph)))
    for node in dict.fromkeys(nodes):
        if any(sharing[storage] > 1 for storage in storages_of(node)):
            continue  # a view of it is returned too, and must stay a view
        term = terms.of.get(node)
        head = head_of.get(term.uncast) if isinstance(term, Term) else None
        if head is None or not (head in heads or (not needs_loss and looks(head))):
            continue
        if (logits := _walk(node, head, terms)) is not None:
            found.append(logits)
    return found


def _heads(terms: Iterable[Term]) -> dict[Term, Term]:
    """Maps each term to the linear layer it is computed from by _STEPS alone. `terms` lists arguments first."""
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
    """Returns the path from the hidden state to `output`, or None if it cannot run again later."""
    recipe: set[Node] = set()
    hidden: Node | None = None
    stack = [output]
    while stack:
        node = stack.pop()
        value = terms.of[node]
        if isinstance(value, Term) and value.uncast is head.args[0]:
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
    heads = [n for n in in_order if isinstance(value := terms.of[n], Term) and value.uncast is head]
    if not hidden or not heads or not _is_same_later([hidden, *in_order], heads[0], terms):
        return None
    return Logits(output, hidden, heads[0], tuple(in_order))


def _is_same_later(nodes: Sequence[Node], head: Node, terms: Terms) -> bool:
    """Returns whether the operands of these nodes keep their values to the end, and run in the head's modes."""
    inputs = [arg for node in nodes[1:] for arg in node.all_input_nodes]
    # Autocast changes none of the steps after a head.
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
    """Returns the hidden state in place of the logits, and erases the nodes that become unused."""
    if not found:
        return []
    graph = found[0].output.graph
    positions = positions_of_outputs(graph)
    deferred = [_deferred(logits, positions[logits.output], terms) for logits in found]
    _return(graph, {at: logits.hidden for logits in found for at in positions[logits.output]})
    for logits in found:
        for node in reversed(logits.nodes):
            if not node.users and not is_erased(node):
                terms.forget(node)
                graph.erase_node(node)
    return deferred


def positions_of_outputs(graph: Graph) -> dict[Any, list[int]]:
    """Returns where each value is among the outputs of a graph."""
    positions: dict[Any, list[int]] = {}
    for position, node in enumerate(graph.output_node().args[0]):  # pyright: ignore[reportArgumentType]
        positions.setdefault(node, []).append(position)
    return positions


def _deferred(logits: Logits, positions: Sequence[int], terms: Terms) -> Deferred:
    output, hidden, nodes = logits.output, logits.hidden, logits.nodes
    recipe = Graph()
    copies = {hidden: recipe.placeholder("hidden")}
    given = dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg.op == "placeholder")
    inputs = tuple(node for node in given if node is not hidden)
    copies.update((node, recipe.placeholder(node.name)) for node in inputs)
    for node in nodes:  # another node may have the same value as the hidden state
        copies[node] = recipe.node_copy(node, lambda arg: copies.get(arg, copies[hidden]))
    recipe.output(copies[output])
    autocast = terms.regions.of[logits.head].autocast_on(logits.head.meta["example_value"].device.type)
    originals = {copies[node]: node for node in nodes}
    has_gradients = terms.regions.of[logits.head].has_gradients
    return Deferred(tuple(positions), logits.head, recipe, inputs, originals, autocast, has_gradients)


def _return(graph: Graph, values: Mapping[int, Node | None]) -> None:
    """Replaces the outputs of the graph at these positions."""
    output = graph.output_node()
    (outputs,) = output.args
    assert isinstance(outputs, tuple)
    output.args = (tuple(values.get(at, value) for at, value in enumerate(outputs)),)


def restore(
    graph: Graph, deferred: Sequence[Deferred], is_dropped: bool, memory: int | None, said: list[str]
) -> list[LateOutput]:
    """Returns the fillers of outputs whose head is no longer in `graph`; restores the other outputs.

    Args:
        is_dropped: fill these outputs with None.
        memory: bytes for a chunk of logits in answers to questions; None for the default.
        said: takes sentences on functions that need the values of late logits.
    """
    placeholders = {node: at for at, node in enumerate(graph.find_nodes(op="placeholder"))}
    late = {at for removed in deferred if is_erased(removed.head) for at in removed.positions}
    found = []
    returned: dict[int, Node | None] = {}
    for removed in deferred:
        if not is_erased(removed.head):
            returned.update(dict.fromkeys(removed.positions, _put_back(graph, removed)))
            continue
        is_copied = False
        if is_dropped:
            returned.update(dict.fromkeys(removed.positions))
        else:
            hidden = _hidden_of_its_own(graph, removed, late)
            is_copied = hidden is not graph.output_node().args[0][removed.positions[0]]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript, reportArgumentType]
            returned.update(dict.fromkeys(removed.positions, hidden))
        found.append(_late_output(removed, placeholders, is_dropped, memory, said, is_copied=is_copied))
    if returned:
        _return(graph, returned)
    return found


def _late_output(
    deferred: Deferred,
    placeholders: Mapping[Node, int],
    is_dropped: bool,
    memory: int | None,
    said: list[str],
    *,
    is_copied: bool = False,
) -> LateOutput:
    for node in deferred.recipe.nodes:
        node.meta.clear()  # fake tensors
    function = GraphModule(torch.nn.Module(), deferred.recipe)
    recipe = None if is_dropped else Recipe(function, "logits", _ADVICE, deferred.autocast)
    inputs = tuple(map(placeholders.__getitem__, deferred.inputs))
    read = reading(deferred.recipe, deferred.autocast, memory or 0, said)
    return LateOutput(deferred.positions, inputs, recipe, is_copied, deferred.has_gradients, reading=read)


def late_outputs_of(
    found: Sequence[Logits], terms: Terms, *, memory: int | None, said: list[str]
) -> list[LateOutput]:
    """Returns the fillers of outputs that are logits, from the hidden state; the graph stays as it is.

    Args:
        memory, said: as in restore().
    """
    if not found:
        return []
    graph = found[0].output.graph
    placeholders = {node: at for at, node in enumerate(graph.find_nodes(op="placeholder"))}
    positions = positions_of_outputs(graph)
    return [
        _late_output(_deferred(one, positions[one.output], terms), placeholders, False, memory, said)
        for one in found
    ]


def _hidden_of_its_own(graph: Graph, deferred: Deferred, late: Set[int]) -> Node:
    """Returns the hidden state, copied if the caller gets its memory too and may write into it before the logits exist.

    Args:
        late: the positions of all outputs that are computed late.
    """
    outputs: Any = graph.output_node().args[0]
    hidden = outputs[deferred.positions[0]]
    given = [node for at, node in enumerate(outputs) if isinstance(node, Node) and at not in late]
    is_given = not storages_of(hidden).isdisjoint(storage for node in given for storage in storages_of(node))
    if hidden.op == "placeholder" or not is_given:
        return hidden
    with graph.inserting_after(hidden):
        copy = graph.call_function(torch.clone, (hidden,))
    copy.meta["example_value"] = hidden.meta["example_value"].clone()
    return copy


def _put_back(graph: Graph, deferred: Deferred) -> Node:
    """Computes the output in the graph again, copying the nodes that were erased."""
    outputs: Any = graph.output_node().args[0]
    hidden = outputs[deferred.positions[0]]  # the hidden state is returned in its place now
    ends, *nodes = reversed(deferred.recipe.nodes)
    there: dict[Node, Node] = {}
    given = iter((hidden, *deferred.inputs))
    for node in reversed(nodes):
        if node.op == "placeholder":
            there[node] = next(given)
        elif not is_erased(original := deferred.originals[node]):
            there[node] = original
        else:  # as early as possible, in the modes of the head
            with graph.inserting_after(max(deferred.head, *map(there.__getitem__, node.all_input_nodes))):
                there[node] = graph.node_copy(node, there.__getitem__)
    (output,) = ends.all_input_nodes
    return there[output]


@dataclass(frozen=True)
class LateOutput:
    """Fills an output in each call."""

    positions: tuple[int, ...]
    inputs: tuple[int, ...]  # graph inputs that the recipe takes after the hidden state
    recipe: Recipe | None  # None fills the output with None
    is_copied: bool = False  # the hidden state is copied
    has_gradients: bool = True  # of the head
    reading: Reading | None = None  # of the recipe; None if questions about the logits need their values
    likes: dict[Any, Tensor] = field(default_factory=dict)  # a meta tensor like the output, by `_layout`

    def __str__(self) -> str:
        which = ", ".join(map(str, self.positions))
        if self.recipe is None:
            return f"the logits (graph output {which}) are None: liger.logits is 'none'"
        copied = (
            "; the hidden state is copied for them, because the graph returns it too"
            if self.is_copied
            else ""
        )
        return (
            f"the logits (graph output {which}) are computed on the first read; "
            f"the option liger.logits changes this{copied}"
        )

    def fill(self, outputs: list[Any], inputs: Sequence[Any]) -> None:
        """Puts a LazyTensor in place of the returned hidden state."""
        made = None
        if self.recipe is not None:
            arguments = (outputs[self.positions[0]], *(inputs[i] for i in self.inputs))
            key = tuple(map(_layout, arguments))
            if key not in self.likes:
                if len(self.likes) >= _MOST_LIKES:
                    self.likes.clear()
                self.likes[key] = _like(self.recipe, arguments)
            meaning = None if self.reading is None else self.reading.meaning(key, arguments)
            with torch.set_grad_enabled(self.has_gradients):  # as at the head, in any mode of the caller
                made = lazy(self.recipe, self.likes[key], *arguments, meaning=meaning)
        for position in self.positions:
            outputs[position] = made


def _layout(argument: Any) -> Any:
    """Returns what the shape, strides and dtype of a result depend on: those of a tensor argument, or a size."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    return argument if isinstance(argument, int) else type(argument)


def _like(recipe: Recipe, arguments: Sequence[Any]) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        (result,) = recipe(
            *(
                torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
                if isinstance(a, Tensor)
                else a
                for a in arguments
            )
        )
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")


class Filler(Protocol):
    """Fills outputs in each call."""

    def fill(self, outputs: list[Any], inputs: Sequence[Any]) -> None: ...


def materializing(compiled: Callable[..., Any], filled: Sequence[Filler]) -> Callable[..., Any]:
    """Returns `compiled` with its outputs filled."""
    if not filled:
        return compiled

    def call(*inputs: Any) -> tuple[Any, ...]:
        outputs = list(compiled(*inputs))
        for late in filled:
            late.fill(outputs, inputs)
        return tuple(outputs)

    return call
