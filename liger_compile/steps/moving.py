"""Nodes of a match that stay in the graph and follow the replacement: metrics that are computed before its operands."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from liger_compile.pattern import Match


def moved_nodes(match: Match, position: Callable[[Node], int], at: int) -> list[Node]:
    """Returns the movable nodes before a position that depend on outputs, in graph order."""
    found: dict[Node, None] = {}
    for node in match.nodes:
        is_reader = any(arg in match.outputs or arg in found for arg in node.all_input_nodes)
        if node in match.movable and node not in match.outputs and is_reader and position(node) < at:
            found[node] = None
    return [*found]
