"""What logits are that a recipe computes late: a linear layer of inputs of the recipe, and steps on its result.

`reading()` takes the recipe apart when a graph is compiled; `Reading.meaning()` returns the meaning of the logits of
one call.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from liger_compile.lazy_logits.answers import Head
from liger_compile.lazy_logits.source import Source
from liger_compile.lazy_logits.steps import source_of
from liger_compile.runtime.lazy import LazyTensor, NoValuesError, never_computed
from liger_compile.runtime.promise import Promise

_log = logging.getLogger("liger_compile")
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True)
class Reading:
    """The linear layer of a recipe, and the steps on its result.

    Args:
        weight, bias: positions among the arguments of the recipe; the hidden state is the first.
        steps: takes the result of the linear layer, and returns the logits.
        memory: bytes for a chunk of logits; 0 for the default.
        said: sentences on functions that needed the values.
        templates: a source without a head, by the layout of the arguments; None if the steps make it unknown.
    """

    weight: int
    bias: int | None
    steps: Callable[[Tensor], Tensor]
    autocast: tuple[str, torch.dtype] | None
    memory: int
    said: list[str]
    templates: dict[Any, Source | None] = field(default_factory=dict)

    def meaning(self, layout: Any, arguments: Sequence[Any]) -> Callable[[Promise], Source | None] | None:
        """Return a function that gives the meaning of the logits of these arguments.

        Args:
            layout: the same for arguments of the same shapes, strides and dtypes.
        """
        hidden, weight = arguments[0], arguments[self.weight]
        bias = None if self.bias is None else arguments[self.bias]
        dtype = hidden.dtype if self.autocast is None else self.autocast[1]

        def made(promise: Promise) -> Source | None:
            head = Head(promise, hidden, weight, bias, dtype=dtype, memory=self.memory)
            if layout not in self.templates:
                self.templates[layout] = self._template(head)
            template = self.templates[layout]
            return None if template is None else replace(template, head=head)

        return made

    def _template(self, head: Head) -> Source | None:
        tensors = [each for each in (head.x, head.weight, head.bias) if each is not None]
        if self.autocast is None and any(each.dtype is not head.dtype for each in tensors):
            return None
        if not head.dtype.is_floating_point or head.weight.dim() != 2 or head.x.dim() < 2:
            return None
        like = torch.empty((*head.lead, head.classes), dtype=head.dtype, device="meta")
        rows = torch.arange(head.lead.numel()).reshape(head.lead)
        lazy = LazyTensor(like, head.x.device, never_computed())
        lazy.meaning = Source(_Dtype(head.dtype), rows, 0, head.classes, self.report)  # pyright: ignore[reportArgumentType]
        try:
            with torch.no_grad():
                return source_of(self.steps(lazy))
        except NoValuesError:  # a step that is no known one, such as logits + 1
            return None

    def report(self, function: Any) -> None:
        """Take note of a function that needed the values, once for each line of the user's code."""
        name = getattr(function, "__name__", None) or "an operation"
        if name in ("__get__", "__set__"):  # of a property, such as `T`
            name = getattr(getattr(function, "__self__", None), "__name__", name)
        text = (
            f"the logits are computed, because {name} at {_place()} needs their values: this is no question about "
            "their softmax that is answered without them"
        )
        if text not in self.said:
            self.said.append(text)
            _log.info("liger_compile  %s", text)


@dataclass(frozen=True)
class _Dtype:
    """In place of a head, in a template."""

    dtype: torch.dtype
    requires_grad: bool = False


def _place() -> str:
    """Return the file and line of the innermost frame outside of torch and this package."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith((_OURS, _TORCH, "<")):
        frame = frame.f_back
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def reading(
    recipe: Graph, autocast: tuple[str, torch.dtype] | None, memory: int, said: list[str]
) -> Reading | None:
    """Return the linear layer of a recipe and the steps on its result; None if it is not of that form."""
    placeholders = [node for node in recipe.nodes if node.op == "placeholder"]
    linears = [node for node in recipe.nodes if node.target is F.linear]
    if len(linears) != 1:
        return None
    (linear,) = linears
    operands = dict(zip(("input", "weight", "bias"), linear.args, strict=False)) | dict(linear.kwargs)
    if operands.get("input") is not placeholders[0] or operands.get("weight") not in placeholders:
        return None
    bias = operands.get("bias")
    if bias is not None and bias not in placeholders:
        return None
    steps = _after(recipe, linear)
    if steps is None:
        return None
    positions = {node: at for at, node in enumerate(placeholders)}
    weight = positions[operands["weight"]]
    return Reading(weight, None if bias is None else positions[bias], steps, autocast, memory, said)


def _after(recipe: Graph, linear: Node) -> Callable[[Tensor], Tensor] | None:
    """Return the nodes after the linear layer as a function of its result, or None if they read something else."""
    steps = Graph()
    copies = {linear: steps.placeholder("logits")}
    after = list(recipe.nodes)[list(recipe.nodes).index(linear) + 1 :]
    for node in after:
        if not copies.keys() >= set(node.all_input_nodes) or node.op == "placeholder":
            return None
        if node.op == "output":
            steps.output(copies[node.args[0]])
        else:
            copies[node] = steps.node_copy(node, copies.__getitem__)
    return GraphModule(torch.nn.Module(), steps)
