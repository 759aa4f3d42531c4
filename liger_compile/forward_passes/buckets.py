"""Prepares a whole graph that DDP is about to split into buckets.

DDP's optimizer in torch.compile splits a graph where a bucket of gradients is full, and compiles the parts separately.
Two facts are visible in the whole graph only.

The meaning of a mask: the first part makes the mask; the other parts receive it and cannot see how it was made. So each
reader of a mask gets its own copy, computed directly before it. The copy is computed from positions alone, and is not
computed at all once attention takes the meaning of the mask instead.

The start of each layer: a full bucket may end anywhere in a layer. One computation is then split into two parts, and
all values that pass from one part to the other are saved for backward. Between layers few values pass.

In: a whole Dynamo graph. Out: the same graph, in which causal and window masks are computed where they are read; the
names of the padding masks in the other masks; and the positions where few bytes pass.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.fx import Graph, Node

from liger_compile.graphs.aliasing import Mutations, storage_of, tensors_of
from liger_compile.terms.build import Terms
from liger_compile.terms.indices import Meaning, mask_meaning
from liger_compile.terms.term import Term

MEANINGS = ("causal", "window")
MORE_PASSES = 1.5  # times the fewest bytes: still between layers; inside a layer twice as many pass
NEAR = 8  # nodes: no place within this distance of a cut passes fewer bytes; a norm is shorter
FEWEST_PARTS = 8  # of a graph at least, so that gradients are sent while others are computed


def make_masks_where_they_are_read(graph: Graph) -> None:
    """Changes `graph`: if several readers' masks share nodes, all readers but the first get copies."""
    found = _read(graph)
    masks = dict.fromkeys(node for node, meaning in found.items() if meaning and meaning.kind in MEANINGS)
    taken: set[Node] = set()
    for reader in [node for node in graph.nodes if node not in masks]:
        for mask in [node for node in reader.all_input_nodes if node in masks]:
            makers = _makers(mask, found)
            if taken.isdisjoint(makers):
                taken.update(makers)
            else:
                reader.replace_input_with(mask, _copied(graph, makers, reader))
    for mask in reversed(masks):
        if not mask.users:
            graph.erase_node(mask)


def padding_in(graph: Graph) -> set[str]:
    """Returns the names of padding masks in masks that would be causal, a window, or no mask without them."""
    meanings = [meaning for meaning in _read(graph).values() if meaning and not meaning.masks]
    return {name for meaning in meanings for name in meaning.padding}


def _read(graph: Graph) -> dict[Node, Meaning | None]:
    """Maps the nodes computed from positions and flags, in graph order, to their meaning as a mask, if square."""
    mutations = Mutations(graph)
    terms = Terms(graph, mutations, strict=False)  # the pipeline reads the parts again, and reports failures
    found: dict[Node, Meaning | None] = {}
    for node in graph.nodes:
        term = _of_positions(node, terms, mutations)
        if term is not None:
            is_square = len(term.shape) > 1 and term.shape[-2] == term.shape[-1]
            found[node] = mask_meaning(terms.space, term, *term.shape[-2:]) if is_square else None
    return found


def _of_positions(node: Node, terms: Terms, mutations: Mutations) -> Term | None:
    """Returns the term of a tensor that is computed from positions and flags and never written in place, else None."""
    term, value = terms.of.get(node), node.meta.get("example_value")
    if node.op not in ("call_function", "call_method") or not isinstance(value, torch.Tensor):
        return None
    is_made_of_them = isinstance(term, Term) and terms.is_of_positions(term)
    is_clean = all(map(mutations.is_clean, (node, *node.all_input_nodes)))
    return term if is_made_of_them and is_clean and not terms.regions.of[node].transforms else None


def _makers(mask: Node, of_positions: Collection[Node]) -> list[Node]:
    """Returns the mask and the nodes among `of_positions` that it is computed from, in graph order."""
    found, waiting = {mask}, [mask]
    while waiting:
        given = waiting.pop().all_input_nodes
        new = [node for node in given if node in of_positions and node not in found]
        found.update(new)
        waiting.extend(new)
    return [node for node in of_positions if node in found]


def _copied(graph: Graph, makers: Sequence[Node], reader: Node) -> Node:
    """Copies the makers before the reader, and returns the copy of the last one."""
    copies: dict[Node, Node] = {}
    with graph.inserting_before(reader):
        for maker in makers:
            copies[maker] = graph.node_copy(maker, lambda node: copies.get(node, node))
    return copies[makers[-1]]


@dataclass(frozen=True)
class Places:
    """The places to split a graph at.

    Args:
        nodes: a part may begin with these nodes; if there are none, wherever a bucket is full.
        beyond: a part may begin anywhere if the part before exceeds its bucket by more than so many bytes.
    """

    nodes: frozenset[Node] = frozenset()
    beyond: int = 0

    def may_begin(self, node: Node, beyond: int) -> bool:
        return not self.nodes or node in self.nodes or beyond > self.beyond


def places_to_cut(graph: Graph, bucket_bytes: int) -> Places:
    """Returns the places where few bytes pass, among all places with a bucket of parameters on both sides."""
    nodes = list(graph.nodes)
    parameters = _bytes_of_parameters(nodes)
    before, total = list(accumulate(parameters, initial=0)), sum(parameters)
    passing = {
        at: size
        for at, size in enumerate(_bytes_passing(nodes))
        if bucket_bytes <= before[at] <= total - bucket_bytes
    }
    most = MORE_PASSES * min(passing.values(), default=0)
    found = (
        at
        for at, size in passing.items()
        if size <= min(most, *(passing.get(near, size) for near in range(at - NEAR, at + NEAR + 1)))
    )
    return Places(frozenset(nodes[at] for at in found), total // FEWEST_PARTS)


def _bytes_of_parameters(nodes: Sequence[Node]) -> list[int]:
    """Returns for each node the bytes of the parameters that it is the first to read."""
    seen: set[Node] = set()
    sizes = []
    for node in nodes:
        new = {source for source in node.all_input_nodes if _is_parameter(source)} - seen
        seen |= new
        sizes.append(sum(parameter.meta["example_value"].untyped_storage().nbytes() for parameter in new))
    return sizes


def _is_parameter(node: Node) -> bool:
    value = node.meta.get("example_value")
    return node.op == "placeholder" and isinstance(value, torch.nn.Parameter) and value.requires_grad


def _bytes_passing(nodes: Sequence[Node]) -> list[int]:
    """Returns for each node the bytes of the tensors that are computed before it and read by it or later.

    Leaves out tensors that are read over more than half of the graph, such as tables: they pass everywhere.
    """
    sizes: dict[int | None, int] = {}
    made: dict[int | None, int] = {}
    read: dict[int | None, int] = {}
    storages: dict[Node, set[int | None]] = {}  # once for each node: a split has many tensors and many users
    for at, node in enumerate(nodes):
        storages[node] = set()
        for tensor in tensors_of(node):
            storage = storage_of(tensor)
            storages[node].add(storage)
            made.setdefault(storage, -1 if node.op in ("placeholder", "get_attr") else at)
            sizes[storage] = 0 if storage is None else tensor.untyped_storage().nbytes()
        for source in node.all_input_nodes:
            read.update(dict.fromkeys(storages[source], at))
    changes = [0] * (len(nodes) + 1)
    for storage, at in made.items():
        end = read.get(storage, 0)
        if 0 <= at < end <= at + len(nodes) // 2:
            changes[at + 1] += sizes[storage]
            changes[end + 1] -= sizes[storage]
    return list(accumulate(changes[:-1]))
