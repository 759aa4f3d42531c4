"""Gradients of outputs that nobody uses: zeros, in one buffer for all of them.

AOTAutograd traces backward with a gradient for every output that can have one. Where there is none, autograd makes
zeros: of all outputs at once, before backward begins, when a step has the most in memory. A model that returns its
cache returns two such outputs a layer.

In: a compiled callable, and the strides of its outputs where they were traced. Out: one that returns the same, with the
same gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FEWEST = 3  # outputs of one backward: where one is used and one is not, there is nothing to share

Strides = tuple[int, ...]


def strides_of_outputs(graph: Graph) -> list[Strides | None]:
    """As they are traced: so AOTAutograd wants the gradients, whatever strides the outputs have in the end, and copies
    others. None for what has no strides, or symbolic ones."""
    (outputs,) = graph.output_node().args
    return [_strides(each) for each in outputs] if isinstance(outputs, (tuple, list)) else []


def _strides(output: Any) -> Strides | None:
    value = output.meta.get("example_value") if isinstance(output, Node) else None
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return value.stride() if all(isinstance(each, int) for each in value.stride()) else None


def sharing_zeros(compiled: Callable[..., Any], strides: Sequence[Strides | None]) -> Callable[..., Any]:
    """`compiled`, with zeros for its outputs made here, in these strides."""
    if len(strides) < FEWEST:
        return compiled

    def call(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        backward, positions = _most_outputs(outputs)
        if len(positions) < FEWEST or any(map(is_traceable_wrapper_subclass, inputs)):
            return outputs
        given = [outputs[position] for position in positions]
        zeros = _Zeros([_Layout.of(each, strides[at]) for at, each in zip(positions, given, strict=True)])
        backward.register_hook(zeros.leave)
        there = dict(zip(positions, _Shared.apply(zeros, *given), strict=True))
        return tuple(there.get(position, output) for position, output in enumerate(outputs))

    return call


def _most_outputs(outputs: Sequence[Any]) -> tuple[Any, list[int]]:
    """The backward that most outputs have, of those that autograd makes zeros for, and where these outputs are."""
    backwards = {
        position: output.grad_fn
        for position, output in enumerate(outputs)
        if type(output) is Tensor and isinstance(output.grad_fn, BackwardCFunction)
    }
    for backward, _ in Counter(backwards.values()).most_common(1):
        return backward, [position for position, each in backwards.items() if each is backward]
    return None, []


class _Layout(NamedTuple):
    shape: torch.Size
    strides: Strides
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor, strides: Strides | None) -> _Layout:
        return cls(tensor.shape, tensor.stride() if strides is None else strides, tensor.dtype, tensor.device)

    @property
    def kind(self) -> tuple[torch.dtype, torch.device]:
        return self.dtype, self.device

    @property
    def span(self) -> int:
        """The elements from the first to the last."""
        steps = ((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return 1 + sum(steps) if self.shape.numel() else 0


class _Shared(torch.autograd.Function):
    """Hands its inputs on, and for each that has no gradient zeros back."""

    @staticmethod
    def forward(ctx: Any, zeros: _Zeros, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.zeros = zeros
        # As they came, autograd would refuse to have them written into.
        return tuple(each.detach() for each in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.zeros.filled_into(gradients)


class _Zeros:
    """The zeros of one backward."""

    def __init__(self, layouts: Sequence[_Layout]) -> None:
        self._layouts = layouts
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def filled_into(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients, with zeros for those that there are not, which share their memory."""
        pairs = list(zip(gradients, self._layouts, strict=True))
        spans: dict[tuple[torch.dtype, torch.device], int] = {}
        for gradient, layout in pairs:
            if gradient is None:
                spans[layout.kind] = max(spans.get(layout.kind, 0), layout.span)
        self._buffers = {
            (dtype, device): torch.zeros(span, dtype=dtype, device=device)
            for (dtype, device), span in spans.items()
        }
        return [
            self._buffers[layout.kind].as_strided(layout.shape, layout.strides)
            if gradient is None
            else gradient
            for gradient, layout in pairs
        ]

    def leave(self, gradients: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...]:
        """After backward: what it returns of the zeros as they are becomes tensors of their own. A parameter would take
        them for its gradient, and add to them."""
        mine = {each.untyped_storage().data_ptr() for each in self._buffers.values()}
        self._buffers = {}
        return tuple(each.clone() if each is not None and _is_in(mine, each) else each for each in gradients)


def _is_in(storages: Set[int], tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in storages
