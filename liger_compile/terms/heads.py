"""Graph outputs that look like logits whose loss is computed in another graph, where nothing can fuse the two."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from liger_compile.terms.build import Terms
from liger_compile.terms.term import Term

WIDER = 8  # where a graph embeds nothing, a head is so many times wider than the model; an MLP is not


def notes_on_logits(graph: Graph, terms: Terms) -> Iterator[str]:
    """A sentence for each such output."""
    if any(isinstance(term, Term) and term.op == "cross_entropy" for term in terms.of.values()):
        return
    vocabularies = set(_vocabularies(graph))
    outputs = graph.output_node().args[0]
    for position, node in enumerate(outputs if isinstance(outputs, (tuple, list)) else (outputs,)):
        term = terms.of.get(node) if isinstance(node, Node) else None
        while isinstance(term, Term) and _is_way(term):
            term = term.args[0]
        if isinstance(term, Term) and term.op == "linear" and _is_head(term, vocabularies):
            yield (
                f"graph output {position} ({node}) looks like logits, {term.shape[-1]} wide, and their loss is "
                "computed outside this graph, so head and loss cannot be fused; compute the loss in the "
                "compiled function"
            )


def _is_way(term: Term) -> bool:
    """Whether logits may come past it; one of a row of so many that no logits have is where the row is taken to end."""
    return term.op in ("cast", "mul", "tanh", "view") and len(term.args) == 1 and term.may_be_passed


def _is_head(linear: Term, vocabularies: set[int]) -> bool:
    """Whether it gives a score to each token that the graph embeds; of a graph that embeds none, to very many."""
    channels, width = linear.args[0].shape[-1], linear.shape[-1]
    if not isinstance(channels, int) or not isinstance(width, int):
        return False
    return width in vocabularies if vocabularies else width >= WIDER * channels


def _vocabularies(graph: Graph) -> Iterator[int]:
    """How many rows the tables have that the graph takes embeddings from."""
    for node in graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "embedding":
            table = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            value = table.meta.get("example_value") if isinstance(table, Node) else None
            if isinstance(value, torch.Tensor) and isinstance(value.shape[0], int):
                yield value.shape[0]
