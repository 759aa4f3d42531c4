"""Finds graph outputs that look like logits and whose loss another graph computes, so that the two cannot be fused."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from liger_compile.terms.build import Terms
from liger_compile.terms.term import Term

WIDER = 8  # without embeddings, a head is this many times wider than the hidden size; an MLP is not


def notes_on_logits(graph: Graph, terms: Terms) -> Iterator[str]:
    """Yields a sentence for each such output."""
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
                f"graph output {position} ({node}) may be logits of {term.shape[-1]} classes, and their loss is "
                "computed outside this graph, so head and loss cannot be fused; compute the loss in the "
                "compiled function"
            )


def _is_way(term: Term) -> bool:
    """Returns whether logits may pass through a term; a longer chain than any logits have ends the search."""
    return term.op in ("cast", "mul", "tanh", "view") and len(term.args) == 1 and term.may_be_passed


def _is_head(linear: Term, vocabularies: set[int]) -> bool:
    """Returns whether a linear layer scores the embedded vocabulary; without embeddings, whether it is very wide."""
    channels, width = linear.args[0].shape[-1], linear.shape[-1]
    if not isinstance(channels, int) or not isinstance(width, int):
        return False
    return width in vocabularies if vocabularies else width >= WIDER * channels


def _vocabularies(graph: Graph) -> Iterator[int]:
    """Yields the number of rows of each table that the graph takes embeddings from."""
    for node in graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "embedding":
            table = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            value = table.meta.get("example_value") if isinstance(table, Node) else None
            if isinstance(value, torch.Tensor) and isinstance(value.shape[0], int):
                yield value.shape[0]
