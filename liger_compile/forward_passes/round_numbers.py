"""Rounds the numbers that tensors of half precision are compared with, or filled with, as eager mode does.

    x > 0.999                        x > 1 in bfloat16
    x.masked_fill(mask, 0.1) == y    compares y with 0.10009765625 in bfloat16

Eager mode compares and stores such a number in the dtype of the tensor. Inductor does so in float32, so that a mask may
differ from eager mode's.

In: a graph for Inductor. Out: the same graph with rounded numbers.
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
STORES += ("clamp", "clamp_min", "clamp_max", "clip")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne", "mod", "remainder", "fmod")


def round_numbers(graph: Graph) -> None:
    """Replaces numbers by what the dtype of their tensor represents."""
    for node in graph.nodes:
        name = operator_name(node)
        if name in STORES:
            _round_stored(node, node.meta.get("example_value"))
        elif name in COMPARISONS:
            _round_compared(graph, node)


def _round_stored(node: Node, out: object) -> None:
    if isinstance(out, Tensor) and out.dtype in HALF:
        # Eager mode raises for a number beyond the range of the dtype, so it stays.
        _replace_floats(node, lambda number: _if_finite(_rounded(number, out.dtype), number))


def _round_compared(graph: Graph, node: Node) -> None:
    values = {operand: operand.meta.get("example_value") for operand in node.all_input_nodes}
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    x = next((value for value in tensors if value.ndim), None)
    if x is None or x.dtype not in HALF or any(value.ndim and value.dtype != x.dtype for value in tensors):
        return
    _replace_floats(node, lambda number: _rounded(number, x.dtype), of=(float, int))
    for operand, value in values.items():
        if isinstance(value, Tensor) and not value.ndim and value.dtype in WIDER:
            _round_tensor(graph, operand, node, x.dtype)


def _replace_floats(
    node: Node, replacement: Callable[[float], float], of: tuple[type, ...] = (float,)
) -> None:
    def replaced(value: Any) -> Any:
        return replacement(value) if isinstance(value, of) and not isinstance(value, bool) else value

    node.args, node.kwargs = map_aggregate(node.args, replaced), map_aggregate(node.kwargs, replaced)


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
