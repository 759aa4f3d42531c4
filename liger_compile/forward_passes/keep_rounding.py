"""Keeps the rounding between two operations of half precision if the second undoes the first.

    (x * 1e-8) * 1e8    0 in float16
    (x + 384) - 384     a multiple of 2 or so in bfloat16: code that quantizes rounds this way

terms/ never merges such numbers. But Inductor computes both operations in float32 and returns x, as in stock
torch.compile. The value between them is therefore passed through the op `rounded`.

In: a graph for Inductor, and its terms. Out: the same graph with the op, where terms/ found two such numbers in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, Node

from liger_compile.graphs.effects import written_arguments
from liger_compile.terms.build import Terms
from liger_compile.terms.scalars import is_ordinary
from liger_compile.terms.term import Scalar, Term, sizes_of
from liger_compile.torch_internals.fx import is_erased

HALF = (torch.float16, torch.bfloat16)
LAYOUT = ("view", "permute", "slice", "expand")  # terms/ does not move these before every operation


def keep_rounding(graph: Graph, terms: Terms) -> tuple[str, ...]:
    """Inserts the op where a value is rounded between two numbers; returns the notes for the report."""
    count = 0
    for node, term in list(terms.of.items()):
        if not isinstance(term, Term) or is_erased(node):
            continue
        for operand in dict.fromkeys(node.all_input_nodes):
            inner = _computed_by(operand, node, term, terms)
            if inner is not None and _is_undone(inner, term):
                _round(graph, operand, node)
                count += 1
    places = "1 place" if count == 1 else f"{count} places"
    note = f"half precision is rounded between two operations in {places}: the second undoes the first"
    return (note,) if count else ()


def _computed_by(operand: Node, user: Node, term: Term, terms: Terms) -> Term | None:
    """Returns the operation that computed an operand's value for `user`, also one that wrote it in place."""
    writer = terms.mutations.last_write(operand, terms.mutations.position[user])
    inner, value = terms.of.get(operand if writer is None else writer), operand.meta.get("example_value")
    if not isinstance(inner, Term) or not isinstance(value, Tensor) or inner.shape != sizes_of(value.shape):
        return None
    return inner if writer is not None or inner in term.args else None


def _is_undone(inner: Term, outer: Term) -> bool:
    """Returns whether two operations with numbers, in half precision, cancel at least in part."""
    while inner.op in LAYOUT:
        inner = inner.args[0]
    if inner.op != outer.op or inner.dtype not in HALF or outer.dtype not in HALF:
        return False
    first, second = _numbers(inner), _numbers(outer)
    if outer.op == "add":
        return any(a.value * b.value < 0 for a in first for b in second)
    # bfloat16 has the range of float32.
    return (
        outer.op == "mul" and outer.dtype is torch.float16 and _leaves_range(first) and _leaves_range(second)
    )


def _leaves_range(numbers: list[Scalar]) -> bool:
    return not all(is_ordinary(number, torch.float16) for number in numbers)


def _numbers(term: Term) -> list[Scalar]:
    """Returns the numbers of a sum, a product or a quotient."""
    divisors = [arg.consts[0] for arg in term.args if arg.op == "number"]
    return [number for number in (*divisors, *term.consts) if isinstance(number, Scalar)]


def _round(graph: Graph, value: Node, user: Node) -> None:
    with graph.inserting_before(user):
        stored = graph.call_function(torch.ops.liger_compile.rounded.default, (value,))
        stored.meta["example_value"] = torch.empty_like(value.meta["example_value"])
        if value not in written_arguments(user):
            user.replace_input_with(value, stored)
            return
        written = graph.call_method("copy_", (value, stored))
        written.meta["example_value"] = value.meta["example_value"]
