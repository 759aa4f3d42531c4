"""Equal layers become one body that the graph calls for each of them: one layer is rewritten and compiled.

A call is a node of `invoke_subgraph`, as for nested regions of users, so the steps know what a call passes to its body.
No compiler gets these calls: segments.py cuts the graph at them. inline_subgraphs.py is the reverse.

In: a Dynamo graph. Out: a copy of it in which bodies replace equal regions, and notes for the report. A region that
cannot be compiled by itself stays as it is, and a note has the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from liger_compile.forward_passes.inline_subgraphs import drop_unnamed_graphs
from liger_compile.forward_passes.segments import BODY, body_called, is_of_call, numbered, why_not
from liger_compile.forward_passes.specialize import copied
from liger_compile.graphs.aliasing import Mutations, tensors_of
from liger_compile.graphs.regions import Regions
from liger_compile.graphs.repeats import FEWEST_CALLS, Repeats, agreeing, find_repeats, references
from liger_compile.torch_internals.dynamo import readable_path
from liger_compile.torch_internals.tensors import version_of

_OUTLINED = "liger_compile_outlined"  # a key in the meta of a body

Paths = Mapping[str, str]  # from the module paths of the first call to those of another one


@dataclass(frozen=True)
class Outlined:
    """What the calls of a body replaced: the module paths of each call, and the number of nodes of each."""

    paths: tuple[Paths, ...]
    num_nodes: int


def outlined(gm: GraphModule) -> tuple[GraphModule, tuple[str, ...]]:
    """Returns a copy of `gm` that calls one body for each run of equal layers; `gm` itself if there is none."""
    if not find_repeats(gm.graph, Regions(gm.graph)):
        return gm, ()
    module = copied(gm)
    facts = _Facts(Regions(module.graph), Mutations(module.graph))
    candidates = [part for each in find_repeats(module.graph, facts.regions) for part in _agreeing(each)]
    reasons = {repeats: facts.why_not_apart(repeats) for repeats in candidates}
    found = [repeats for repeats, why in reasons.items() if why is None]
    why = facts.why_not_cut(module.graph, found)
    notes = tuple(_note(repeats, reasons[repeats] or why) for repeats in candidates)
    if why or not found:
        return gm, notes
    for count, repeats in enumerate(found):
        _outline(module, f"{BODY}_{count}", repeats)
    drop_unnamed_graphs(module)
    module.recompile()
    return module, notes


def outlined_of(body: GraphModule) -> Outlined | None:
    """Returns what the calls of a body replaced; None for other subgraphs."""
    return body.meta.get(_OUTLINED)


def num_nodes_inlined(module: GraphModule) -> int:
    """Returns the number of nodes of a graph, with its bodies inlined at every call."""
    bodies = [body for node in module.graph.nodes if (body := body_called(node))]
    names = [node for node in module.graph.nodes if is_of_call(node)]
    inside = sum(node.op not in ("placeholder", "output") for body in bodies for node in body.graph.nodes)
    return len(module.graph.nodes) - len(bodies) - len(names) + inside


def drop_unread(module: GraphModule) -> None:
    """Removes the inputs that a rewritten body no longer reads, such as a mask whose meaning is known."""
    calls: dict[GraphModule, list[Node]] = {}
    for node in module.graph.nodes:
        if body := body_called(node):
            calls.setdefault(body, []).append(node)
    for body, nodes in calls.items():
        inputs = body.graph.find_nodes(op="placeholder")
        read = [at for at, node in enumerate(inputs) if node.users]
        for call in nodes:
            first, operands = call.args[:2], call.args[2:]
            call.args = (*first, *(operands[at] for at in read))
        for node in inputs:
            if not node.users:
                body.graph.erase_node(node)


# Proofs ---------------------------------------------------------------------------------------------------------


def _agreeing(repeats: Repeats) -> list[Repeats]:
    """Returns the long runs of the regions that read alike and whose results are read alike; if none, all regions."""
    return [run for run in _split(repeats) if len(run.regions) >= FEWEST_CALLS] or [repeats]


def _split(repeats: Repeats) -> list[Repeats]:
    return agreeing(repeats, [_read_outside(region) for region in repeats.regions])


def _read_outside(region: Sequence[Node]) -> tuple[int, ...]:
    """Returns the positions of the nodes that are read outside of their region."""
    inside = set(region)
    return tuple(at for at, node in enumerate(region) if not inside.issuperset(node.users))


@dataclass(frozen=True)
class _Facts:
    """The facts about a graph that decide whether its regions can be calls of a body."""

    regions: Regions
    mutations: Mutations

    def why_not_cut(self, graph: Graph, found: Iterable[Repeats]) -> str | None:
        """Returns why the graph cannot be cut into these regions and what is between them, in a sentence."""
        calls = (region for repeats in found for region in repeats.regions)
        alone = {node: at for at, region in enumerate(calls) for node in region}
        return why_not(graph, self.mutations, self.regions, numbered(graph, alone))

    def why_not_apart(self, repeats: Repeats) -> str | None:
        """Returns why regions cannot be calls of a body, in a sentence."""
        if len(_split(repeats)) > 1:
            return f"fewer than {FEWEST_CALLS} in a row read alike and give the same results"
        reasons = map(self._why_not_function, repeats.regions)
        return next(filter(None, reasons), None) or self.why_not_cut(repeats.regions[0][0].graph, [repeats])

    def _why_not_function(self, region: Sequence[Node]) -> str | None:
        """Returns why a region cannot be a function of what it reads, in a sentence."""
        operands, results = dict.fromkeys(_operands(region)), [region[at] for at in _read_outside(region)]
        if any(node.op == "get_attr" for node in operands):
            return "they read a subgraph or a constant that is named outside of them"
        if any(version_of(tensor) for node in (*operands, *results) for tensor in tensors_of(node)):
            return "a value that they read or give is written in place"
        read = frozenset[Any]().union(*map(self.mutations.memory, operands))
        if any(read & self.mutations.memory(node) for node in results):
            return "a result of theirs is a view of a value that they read"
        return None if results else "they give no result"


def _operands(region: Sequence[Node]) -> Iterator[Node]:
    """Yields what the nodes of a region read from outside, in order, as often as they read it."""
    inside = set(region)
    return (arg for node in region for arg in references(node) if arg not in inside)


# The body -------------------------------------------------------------------------------------------------------


def _outline(module: GraphModule, name: str, repeats: Repeats) -> None:
    """Replaces the regions by calls of a new body, in place."""
    first, results = repeats.regions[0], _read_outside(repeats.regions[0])
    # What the calls pass at one place is a slot. Places that get one value in every call share a slot.
    places = list(zip(*map(_operands, repeats.regions), strict=True))
    slots = list(dict.fromkeys(places))
    body = _body(module, first, places, results)
    paths = tuple(_paths(first, region) for region in repeats.regions)
    body.meta[_OUTLINED] = Outlined(paths, len(first))
    setattr(module, name, body)
    replaced: dict[Any, Node] = {}  # results of earlier regions
    for at, region in enumerate(repeats.regions):
        passed = [slot[at] for slot in slots]
        operands = [replaced[node] if node in replaced else node for node in passed]  # noqa: SIM401
        replaced.update(_replace(region, name, operands, results))


def _body(
    module: GraphModule, first: Sequence[Node], places: Sequence[tuple[Node, ...]], results: Sequence[int]
) -> GraphModule:
    """Returns the graph of a region, with an input for each slot in the order of `places`."""
    graph, inputs, copies = Graph(), {}, {}
    for slot in dict.fromkeys(places):
        inputs[slot] = graph.placeholder(f"{slot[0].name}_{len(inputs)}")  # two slots may begin with one node
        inputs[slot].meta.update({key: v for key, v in slot[0].meta.items() if key != "grapharg"})
    passed = iter(places)
    for node in first:
        copies[node] = graph.node_copy(
            node, lambda arg: copies[arg] if arg in copies else inputs[next(passed)]
        )
    graph.output(tuple(copies[first[at]] for at in results))
    return GraphModule(module, graph)


def _replace(
    region: Sequence[Node], name: str, operands: Sequence[Node], results: Sequence[int]
) -> dict[Node, Node]:
    """Replaces a region by a call of the body of this name; returns what replaces its results."""
    graph, given, made = region[0].graph, [region[at] for at in results], {}
    with graph.inserting_before(region[0]):
        body = graph.get_attr(name)
        call = graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, name, *operands))
        call.meta.update({key: region[0].meta[key] for key in _ORIGIN if key in region[0].meta})
        call.meta["example_value"] = tuple(node.meta["example_value"] for node in given)
        for at, node in enumerate(given):
            made[node] = graph.call_function(operator.getitem, (call, at))
            made[node].meta.update(node.meta)
            node.replace_all_uses_with(made[node])
    for node in reversed(region):
        graph.erase_node(node)
    return made


_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack")


# In words -------------------------------------------------------------------------------------------------------


def _paths(first: Sequence[Node], region: Sequence[Node]) -> Paths:
    """Maps the module paths of the nodes of the first region to those of the nodes of another."""
    found: dict[str, str] = {}
    for node, other in zip(first, region, strict=True):
        for (path, _), (there, _) in zip(_stack(node), _stack(other), strict=False):
            found.setdefault(path, there)
    return found


def _stack(node: Node) -> list[tuple[str, Any]]:
    return list((node.meta.get("nn_module_stack") or {}).values())


def _note(repeats: Repeats, why: str | None) -> str:
    """Returns the note for the report: what is compiled once, or why it is compiled for each layer."""
    stacks = [[[path for path, _ in _stack(node)] for node in region] for region in repeats.regions]
    around = set.intersection(*({path for stack in region for path in stack} for region in stacks))
    within = (
        next((path for path in stack if path not in around), None) for region in stacks for stack in region
    )
    layers = [readable_path(path) for path in dict.fromkeys(filter(None, within))]
    where = f" ({layers[0]} to {layers[-1]})" if layers else ""
    of_each, rest = divmod(len(layers), len(stacks))
    kind, of_each = ("layer", of_each) if of_each and not rest else ("region", 1)
    count = of_each * len(stacks)
    if why:
        return f"{count} {kind}s that are alike{where} are compiled one by one: {why}"
    which = f"1 {kind} is" if of_each == 1 else f"{of_each} {kind}s are"
    return f"{which} compiled for {count}{where}"
