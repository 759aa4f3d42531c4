"""Graphs of torch.fx.

part                            torch           can go
Node._erased                    2.11 to 2.13    no public name
torch.fx._lazy_graph_module     2.11 to 2.13    no public name for the class of Dynamo's graphs
Node._dynamo_source             2.11 to 2.13    no public name; AOTAutograd reads it
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

__all__ = ["LazyGraphModule", "copy_source", "is_erased", "without_source"]


LazyGraphModule: type[GraphModule] = _LazyGraphModule


def is_erased(node: Node) -> bool:
    """Returns whether a node has been erased from its graph."""
    return node._erased


def copy_source(node: Any, copy: Any) -> None:
    """Gives the copy of a placeholder the source that Dynamo recorded for it: the input that it stands for."""
    if hasattr(node, "_dynamo_source"):
        copy._dynamo_source = node._dynamo_source


def without_source(placeholder: Any) -> None:
    """Declares that a placeholder stands for no input of the user's code."""
    placeholder._dynamo_source = None
