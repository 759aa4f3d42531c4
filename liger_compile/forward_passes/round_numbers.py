"""Rounds the numbers that tensors of half precision are compared with, or filled with, as eager mode does.

    x > 0.999                        x > 1 in bfloat16
    x.masked_fill(mask, 0.1) == y    compares y with 0.10009765625 in bfloat16

Eager mode compares and stores such a number in the dtype of the tensor. Inductor does so in float32, so that a mask may
differ from eager mode's.

In: a graph for Inductor. Out: the same graph with rounded numbers, and a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from liger_compile.terms.operators import operator_name

HALF = (torch.float16, torch.bfloat16)
WIDER = (torch.float32, torch.float64)
STORES = ("full", "full_like", "new_full", "fill", "masked_fill", "where", "hardtanh")
STORES += ("clamp", "clamp_min", "clamp_max", "clip", "pad", "constant_pad_nd")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne", "mod", "remainder", "fmod")


def round_numbers(graph: Graph) -> tuple[str, ...]:
    """Replaces numbers by what the dtype of their tensor represents; returns the notes for the report."""
    count = 0
    for node in graph.nodes:
        name = operator_name(node)
        if name in STORES:
            count += _round_stored(node, node.meta.get("example_value"))
        elif name in COMPARISONS:
            count += _round_compared(graph, node)
    places = "1 place" if count == 1 else f"{count} places"
    note = f"a number beside half precision is rounded to its dtype in {places}, as in eager mode"
    return (note,) if count else ()


def _round_stored(node: Node, out: object) -> bool:
    """Returns whether a number changed."""
    if not isinstance(out, Tensor) or out.dtype not in HALF:
        return False
    # Eager mode raises for a number beyond the range of the dtype, so it stays.
    return _replace_numbers(node, lambda number: _if_finite(_rounded(number, out.dtype), number), of=(float,))


def _round_compared(graph: Graph, node: Node) -> bool:
    """Returns whether a number changed, or a tensor without dimensions is rounded."""
    values = {operand: operand.meta.get("example_value") for operand in node.all_input_nodes}
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    # Torch computes in the dtype of the tensors that have dimensions, if there are any.
    leading = [tensor for tensor in tensors if tensor.ndim] or tensors
    dtypes = {tensor.dtype for tensor in leading}
    if len(dtypes) != 1 or not dtypes <= {*HALF}:
        return False
    (dtype,) = dtypes
    is_changed = _replace_numbers(node, lambda number: _rounded(number, dtype), of=(float, int))
    for operand, value in values.items():
        if isinstance(value, Tensor) and not value.ndim and value.dtype in WIDER:
            _round_tensor(graph, operand, node, dtype)
            is_changed = True
    return is_changed


def _replace_numbers(node: Node, replacement: Callable[[float], float], of: tuple[type, ...]) -> bool:
    """Replaces the numbers of these types that change; returns whether there are any."""
    changed: list[float] = []

    def replaced(value: Any) -> Any:
        if not isinstance(value, of) or isinstance(value, bool) or math.isnan(value):
            return value
        if (new := replacement(value)) != value:
            changed.append(new)
            return new
        return value

    args, kwargs = map_aggregate(node.args, replaced), map_aggregate(node.kwargs, replaced)
    if changed:
        node.args, node.kwargs = args, kwargs
    return bool(changed)


def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(float(number), dtype=torch.float64).to(dtype).item()


def _if_finite(rounded: float, number: float) -> float:
    return rounded if math.isfinite(rounded) else number


def _round_tensor(graph: Graph, scalar: Node, user: Node, dtype: torch.dtype) -> None:
    value = scalar.meta["example_value"].to(dtype)
    with graph.inserting_before(user):
        cast = graph.call_method("to", (scalar, dtype))
        stored = graph.call_function(torch.ops.liger_compile.rounded.default, (cast,))
    for made in (cast, stored):
        made.meta["example_value"] = value
    user.replace_input_with(scalar, stored)
