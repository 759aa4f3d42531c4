"""Graph outputs that look like logits whose loss is computed in another graph, where nothing can fuse the two."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from liger_compile.terms.build import Terms
from liger_compile.terms.term import Term

WIDER = 8  # a head is so many times wider than the model, an MLP is not


def notes_on_logits(graph: Graph, terms: Terms) -> Iterator[str]:
    """A sentence for each such output."""
    if any(isinstance(term, Term) and term.op == "cross_entropy" for term in terms.of.values()):
        return
    outputs = graph.output_node().args[0]
    for position, node in enumerate(outputs if isinstance(outputs, (tuple, list)) else (outputs,)):
        term = terms.of.get(node) if isinstance(node, Node) else None
        while isinstance(term, Term) and term.op in ("cast", "mul", "tanh", "view") and len(term.args) == 1:
            term = term.args[0]
        if isinstance(term, Term) and term.op == "linear":
            channels, vocabulary = term.args[0].shape[-1], term.shape[-1]
            if isinstance(channels, int) and isinstance(vocabulary, int) and vocabulary >= WIDER * channels:
                yield (
                    f"graph output {position} ({node}) looks like logits, {vocabulary} wide, and their loss is "
                    "computed outside this graph, so head and loss cannot be fused; compute the loss in the "
                    "compiled function"
                )
