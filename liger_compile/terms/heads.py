"""Finds graphs that are compiled apart from their loss, so that head and loss cannot be fused.

Either the outputs of a graph look like logits, or the graph is one layer of a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Set
from typing import Any

import torch
from torch.fx import Graph, Node

from liger_compile.terms.build import Terms
from liger_compile.terms.term import Term
from liger_compile.torch_internals.dynamo import readable_path

ATTENTION = ("attention", "attention_of_any_heads")
KNOWN_MASKS = ("causal_mask", "no_mask", "window_mask")
WIDER = 8  # without embeddings, a head is this many times wider than the hidden size; an MLP is not


def notes_on_logits(graph: Graph, terms: Terms) -> Iterator[str]:
    """Yields a sentence for each output that looks like logits, where gradients are computed."""
    if _has(terms, "cross_entropy"):
        return
    classes = frozenset(vocabularies(graph))
    outputs = graph.output_node().args[0]
    for position, node in enumerate(outputs if isinstance(outputs, (tuple, list)) else (outputs,)):
        term = terms.of.get(node) if isinstance(node, Node) else None
        while isinstance(term, Term) and _is_way(term):
            term = term.args[0]
        if (
            isinstance(term, Term)
            and term.op == "linear"
            and _needs_gradient(node)
            and looks_like_head(term, classes)
        ):
            yield (
                f"graph output {position} ({node}) may be logits of {term.shape[-1]} classes, and their loss is "
                "computed outside this graph, so head and loss cannot be fused; compute the loss in the compiled "
                "function: pass the labels to a model that returns its loss, or compile a function that calls both"
            )


def notes_on_layer(graph: Graph, terms: Terms, computed: Collection[str]) -> Iterator[str]:
    """Yields a sentence if a graph is one layer of a model that is trained.

    A layer projects hidden states that other code has computed, has one attention, or two in a decoder, and returns
    hidden states.

    Args:
        computed: the names of the inputs that other differentiable code has computed.
    """
    found = {term: node for node, term in terms.of.items() if isinstance(term, Term) and term.op in ATTENTION}
    inputs = (terms.of[node] for node in graph.find_nodes(op="placeholder") if node.name in computed)
    hidden = {(value.shape, value.dtype) for value in inputs if isinstance(value, Term)}
    outputs = [node for node in graph.output_node().all_input_nodes if _needs_gradient(node)]
    if not 1 <= len(found) <= 2 or not _has(terms, "linear") or _has(terms, "cross_entropy"):
        return
    results = (terms.of.get(node) for node in outputs)
    if any(isinstance(value, Term) and (value.shape, value.dtype) in hidden for value in results):
        where = _attention_in(*found.values())
        is_known = all(term.args[0] is terms.space.none or term.args[0].op in KNOWN_MASKS for term in found)
        and_mask, and_known = (
            ("", "") if is_known else (" and with a mask from outside", " and the mask is known")
        )
        yield (
            f"the graph is one layer of a model{where}, without head and loss{and_mask}: if the layers are compiled "
            f"one by one, compile the whole model instead, so that head and loss are fused{and_known}"
        )


def _attention_in(node: Node, *_: Node) -> str:
    """Returns the module of the attention in brackets, as the user knows it; nothing for a plain function."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    names = [f"{readable_path(path)} ({getattr(cls, '__name__', cls)})".lstrip() for path, cls in stack[-1:]]
    return f" with its attention in {names[0]}" if names else ""


def _has(terms: Terms, op: str) -> bool:
    return any(isinstance(term, Term) and term.op == op for term in terms.of.values())


def _needs_gradient(node: Any) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _is_way(term: Term) -> bool:
    """Returns whether logits may pass through a term; a longer chain than any logits have ends the search."""
    return term.op in ("cast", "mul", "tanh", "view") and len(term.args) == 1 and term.may_be_passed


def looks_like_head(linear: Term, vocabularies: Set[int]) -> bool:
    """Returns whether a linear layer scores the embedded vocabulary; without embeddings, whether it is very wide."""
    channels, width = linear.args[0].shape[-1], linear.shape[-1]
    if not isinstance(channels, int) or not isinstance(width, int):
        return False
    return width in vocabularies if vocabularies else width >= WIDER * channels


def vocabularies(graph: Graph) -> Iterator[int]:
    """Yields the number of rows of each table that the graph takes embeddings from."""
    for node in graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "embedding":
            table = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            value = table.meta.get("example_value") if isinstance(table, Node) else None
            if isinstance(value, torch.Tensor) and isinstance(value.shape[0], int):
                yield value.shape[0]
