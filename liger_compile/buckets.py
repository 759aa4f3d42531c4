"""What DDP is about to cut in buckets: a graph that is still whole.

DDP's optimizer in torch.compile cuts a graph where a bucket of gradients is full, and has the parts compiled apart. Two
things can only be seen before.

What a mask means: it is made in the first part; the others are handed it, and cannot see. So each reader of a mask gets
one of its own, made right before it. It is made of positions alone, and nowhere once attention has been told what it
means.

Where layers begin: a full bucket may end anywhere in one. What is one computation is then in two parts, and all that
passes from the one to the other is kept for backward. Between layers little passes.

In: a Dynamo graph, whole. Out: the same, in which masks that are causal, or a window, are made where they are read; the
names of what is padding to the others; and the places where little passes.
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
MORE_PASSES = 1.5  # than where the least passes, and it is between layers; inside, twice as much does
NEAR = 8  # nodes: within so many of a place, less passes nowhere; a norm is shorter
FEWEST_PARTS = 8  # in which a graph is cut at least, so that gradients are sent while others are computed


def make_masks_where_they_are_read(graph: Graph) -> None:
    """Changes `graph`: of what several readers' masks are made of, all but the first get copies."""
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
    """The values that are padding to masks which would be causal, a window, or nothing without."""
    meanings = [meaning for meaning in _read(graph).values() if meaning and not meaning.masks]
    return {name for meaning in meanings for name in meaning.padding}


def _read(graph: Graph) -> dict[Node, Meaning | None]:
    """What is made of positions and flags, in the order of the graph, and what it means as a mask, if it is square."""
    mutations = Mutations(graph)
    terms = Terms(graph, mutations)
    found: dict[Node, Meaning | None] = {}
    for node in graph.nodes:
        term = _of_positions(node, terms, mutations)
        if term is not None:
            is_square = len(term.shape) > 1 and term.shape[-2] == term.shape[-1]
            found[node] = mask_meaning(terms.space, term, *term.shape[-2:]) if is_square else None
    return found


def _of_positions(node: Node, terms: Terms, mutations: Mutations) -> Term | None:
    """The term of a tensor that is computed from positions and flags, and that nobody writes into."""
    term, value = terms.of.get(node), node.meta.get("example_value")
    if node.op not in ("call_function", "call_method") or not isinstance(value, torch.Tensor):
        return None
    is_made_of_them = isinstance(term, Term) and terms.is_of_positions(term)
    is_clean = all(map(mutations.is_clean, (node, *node.all_input_nodes)))
    return term if is_made_of_them and is_clean and not terms.regions.of[node].transforms else None


def _makers(mask: Node, of_positions: Collection[Node]) -> list[Node]:
    """The mask and what of positions it is computed from, in the order of the graph."""
    found, waiting = {mask}, [mask]
    while waiting:
        given = waiting.pop().all_input_nodes
        new = [node for node in given if node in of_positions and node not in found]
        found.update(new)
        waiting.extend(new)
    return [node for node in of_positions if node in found]


def _copied(graph: Graph, makers: Sequence[Node], reader: Node) -> Node:
    """The last of the makers' copies, which stand before the reader."""
    copies: dict[Node, Node] = {}
    with graph.inserting_before(reader):
        for maker in makers:
            copies[maker] = graph.node_copy(maker, lambda node: copies.get(node, node))
    return copies[makers[-1]]


@dataclass(frozen=True)
class Places:
    """Where to cut a graph: before these nodes, or where a part would exceed its bucket by so many bytes; without any,
    wherever a bucket is full."""

    nodes: frozenset[Node] = frozenset()
    beyond: int = 0

    def may_begin(self, node: Node, beyond: int) -> bool:
        return not self.nodes or node in self.nodes or beyond > self.beyond


def places_to_cut(graph: Graph, bucket_bytes: int) -> Places:
    """Where little passes, of all places that have a bucket of parameters on both sides."""
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
    """Of those that each node is the first to read."""
    seen: set[Node] = set()
    sizes = []
    for node in nodes:
        new = {each for each in node.all_input_nodes if _is_parameter(each)} - seen
        seen |= new
        sizes.append(sum(each.meta["example_value"].untyped_storage().nbytes() for each in new))
    return sizes


def _is_parameter(node: Node) -> bool:
    value = node.meta.get("example_value")
    return node.op == "placeholder" and isinstance(value, torch.nn.Parameter) and value.requires_grad


def _bytes_passing(nodes: Sequence[Node]) -> list[int]:
    """Of the tensors that are computed before each node, and read by it or later. Without what is read in more than
    half of the graph, as tables are: that passes everywhere."""
    sizes: dict[int | None, int] = {}
    made: dict[int | None, int] = {}
    read: dict[int | None, int] = {}
    for at, node in enumerate(nodes):
        for tensor in tensors_of(node):
            storage = storage_of(tensor)
            made.setdefault(storage, -1 if node.op in ("placeholder", "get_attr") else at)
            sizes[storage] = 0 if storage is None else tensor.untyped_storage().nbytes()
        for each in node.all_input_nodes:
            read.update((storage_of(tensor), at) for tensor in tensors_of(each))
    changes = [0] * (len(nodes) + 1)
    for storage, at in made.items():
        end = read.get(storage, 0)
        if 0 <= at < end <= at + len(nodes) // 2:
            changes[at + 1] += sizes[storage]
            changes[end + 1] -= sizes[storage]
    return list(accumulate(changes[:-1]))
