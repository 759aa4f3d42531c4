"""What DDP is about to cut in buckets: a graph that is still whole, in which a mask can be seen to mean something.

DDP's optimizer in torch.compile cuts a graph where a bucket of gradients is full, and has the parts compiled apart. A
mask is made in the first part; the others are handed it, and cannot see what it means. So each reader of a mask gets
one of its own, made right before it. It is made of positions alone, and nowhere once attention has been told what it
means.

In: a Dynamo graph, whole. Out: the same, in which masks that are causal, or a window, are made where they are read; and
the names of what is padding to the others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.fx import Graph, Node

from liger_compile.terms.build import Terms, made_of_positions
from liger_compile.terms.indices import Meaning, mask_meaning
from liger_compile.terms.mutation import Mutations
from liger_compile.terms.term import Term

MEANINGS = ("causal", "window")


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
    return {name for meaning in _read(graph).values() if meaning for name in meaning.padding}


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
    is_made_of_them = isinstance(term, Term) and made_of_positions(term) is not None
    return term if is_made_of_them and mutations.is_clean(node) else None


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
