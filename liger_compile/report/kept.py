"""Measures what eager mode keeps for backward, by module: a graph runs once on fake tensors, and autograd saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from liger_compile.graphs.guards import no_guards
from liger_compile.report.report import Place
from liger_compile.torch_internals.modes import restored_if_raised
from liger_compile.torch_internals.tensors import storage_of


def kept_by_module(gm: GraphModule) -> Mapping[str, int] | None:
    """Returns the bytes of the activations that autograd saves when a Dynamo graph runs, by the path of the module.

    Memory that several operations save counts once, for the first. Inputs and parameters do not count: they exist
    anyway. None if the graph does not run on fake tensors, or a size is symbolic.
    """
    inputs = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    first = next((value for value in inputs if isinstance(value, torch.Tensor)), None)
    saving = _Saving(gm, {storage_of(value) for value in inputs if isinstance(value, torch.Tensor)})
    hooks = torch.autograd.graph.saved_tensors_hooks(saving.pack, lambda tensor: tensor)
    fake_mode = getattr(first, "fake_mode", None) or nullcontext()
    try:
        with fake_mode, no_guards(first), restored_if_raised(), hooks:
            saving.run(*map(_own, inputs))
    except Exception:  # the page then has no such column
        return None
    return dict(saving.kept)


def _own(value: Any) -> Any:
    """Returns a leaf in the same memory, with a version of its own, so that the graph may write into it."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


class _Saving(Interpreter):
    """Runs a graph and counts what is saved meanwhile."""

    def __init__(self, gm: GraphModule, counted: set[int | None]) -> None:
        super().__init__(gm)
        self.kept: Counter[str] = Counter()
        self._counted, self._module = counted, ""
        self._alive: list[
            torch.UntypedStorage
        ] = []  # another one in the place of a freed one would not count

    def run_node(self, n: Node) -> Any:
        self._module = Place.of([n], n).module
        return super().run_node(n)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = storage_of(tensor)
        if storage not in self._counted and not isinstance(tensor, torch.nn.Parameter):
            self._counted.add(storage)
            self._alive.append(tensor.untyped_storage())
            self.kept[self._module] += int(self._alive[-1].nbytes())
        return tensor
