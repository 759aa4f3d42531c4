"""Nodes of autograd's graph.

part                                                    torch           can go
torch._C._autograd._get_current_graph_task_keep_graph   2.11 to 2.13    no public name
torch._C._current_graph_task_id                         2.11 to 2.13    no public name
Node._forward_cls (of an autograd.Function)             2.11 to 2.13    no public name
Node._input_metadata                                    2.11 to 2.13    no public name
torch._C._autograd._top_saved_tensors_default_hooks     2.11 to 2.13    no public name
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def graph_is_retained() -> bool:
    """Returns whether the current backward may run again, in which case its saved tensors must not change."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def current_backward() -> int:
    """Returns a number that identifies the current backward: it is the same in all threads that run its nodes."""
    return torch._C._current_graph_task_id()


def function_of(node: Any) -> Any:
    """Returns the autograd.Function that made a node of autograd's graph; None if none did."""
    return getattr(node, "_forward_cls", None)


def expected_gradients(node: Any) -> Sequence[Any] | None:
    """Returns shape, dtype and device of each gradient that a node receives; None if they are not known.

    The node may also be the context of an autograd.Function, in its backward.
    """
    return getattr(node, "_input_metadata", None)


def saved_tensors_have_hooks() -> bool:
    """Returns whether hooks get each tensor that is saved for backward, as in a checkpoint in eager code."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore[reportAttributeAccessIssue]
