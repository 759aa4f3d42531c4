"""Finds the values that code saves for backward, by running it on fake tensors.

A fused op may save an operand that the code it replaces does not save. If that memory is written before backward runs,
the code has the right gradients, and the op has wrong ones or autograd's error. So the op gets a copy of it:
steps/rewrite.py asks here which operands the code saves itself. These are not copied, so that the error that eager mode
raises is raised too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from liger_compile.graphs.aliasing import graph_of
from liger_compile.graphs.guards import no_guards
from liger_compile.graphs.regions import Region
from liger_compile.torch_internals.dispatch import with_inner_tensors
from liger_compile.torch_internals.fake_tensors import mode_of
from liger_compile.torch_internals.tensors import storage_of


def saved_tensors_into(storages: set[int | None]) -> torch.autograd.graph.saved_tensors_hooks:
    """Returns a context in which the storages of all tensors that autograd saves are added to `storages`.

    It also keeps away a user's hooks on saved tensors, which expect tensors that have values.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages.update(map(storage_of, with_inner_tensors(tensor)))
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def saved_by(nodes: Sequence[Node], region: Region) -> set[int | None]:
    """Returns the storages that autograd saves when `nodes`, in graph order, run in the modes of `region`.

    Storages are those of the nodes' example values where a node outside of `nodes` made the memory. If a node cannot
    run, only what the nodes before it save is returned.
    """
    storages: set[int | None] = set()
    values: dict[Node, Any] = {}
    result = nodes[-1].meta.get("example_value")
    fake_mode = mode_of(result)
    with fake_mode, no_guards(fake_mode), region.entered(), saved_tensors_into(storages):
        try:
            for node in nodes:
                values[node] = run_node(node, values)
        except Exception:  # the caller then copies more than it would need to
            return storages
    return storages


def run_node(node: Node, values: dict[Node, Any]) -> Any:
    """Returns the result of a node for the values of its operands; those without a value have their example's."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda arg: _value(arg, values))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    return _value(node, values)


def _value(node: Node, values: dict[Node, Any]) -> Any:
    """Returns the value of a node; a tensor from outside as a new one in the same memory, with its own version."""
    if node not in values:
        value = graph_of(node) or node.meta["example_value"]
        is_tensor = isinstance(value, torch.Tensor)
        values[node] = value.data.requires_grad_(value.requires_grad) if is_tensor else value
    return values[node]
