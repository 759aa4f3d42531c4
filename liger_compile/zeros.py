"""Gradients of outputs that nobody uses: zeros, in one buffer for all of them.

AOTAutograd traces backward with a gradient for every output that can have one. Where there is none, autograd makes
zeros: of all outputs at once, before backward begins, when a step has the most in memory. A model that returns its
cache returns two such outputs a layer.

In: a compiled callable. Out: one that returns the same, with the same gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FEWEST = 3  # outputs of one backward: where one is used and one is not, there is nothing to share


def sharing_zeros(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, with zeros for its outputs made here."""

    def call(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        backward, positions = _most_outputs(outputs)
        if len(positions) < FEWEST or any(map(is_traceable_wrapper_subclass, inputs)):
            return outputs
        zeros = _Zeros()
        backward.register_hook(zeros.leave)
        shared = _Shared.apply(zeros, *(outputs[position] for position in positions))
        there = dict(zip(positions, shared, strict=True))
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
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

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
        ctx.layouts = [_Layout(each.shape, each.stride(), each.dtype, each.device) for each in outputs]
        # As they came, autograd would refuse to have them written into.
        return tuple(each.detach() for each in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        unused = [layout for layout, each in zip(ctx.layouts, gradients, strict=True) if each is None]
        zeros = iter(ctx.zeros.of(unused))
        return (None, *(next(zeros) if each is None else each for each in gradients))


class _Zeros:
    """The zeros of one backward."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def of(self, layouts: Sequence[_Layout]) -> list[Tensor]:
        """Zeros in these layouts. They share their memory."""
        spans: dict[tuple[torch.dtype, torch.device], int] = {}
        for each in layouts:
            spans[each.kind] = max(spans.get(each.kind, 0), each.span)
        self._buffers = {
            (dtype, device): torch.zeros(span, dtype=dtype, device=device)
            for (dtype, device), span in spans.items()
        }
        return [self._buffers[each.kind].as_strided(each.shape, each.strides) for each in layouts]

    def leave(self, gradients: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...]:
        """After backward: what it returns of the zeros as they are becomes tensors of their own. A parameter would take
        them for its gradient, and add to them."""
        mine = {each.untyped_storage().data_ptr() for each in self._buffers.values()}
        self._buffers = {}
        return tuple(
            each.clone() if each is not None and each.untyped_storage().data_ptr() in mine else each
            for each in gradients
        )
