"""Programs of losses that are written as Python functions, for tests of the op that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from liger_compile.steps import tails
from liger_compile.torch_internals.fake_tensors import FakeTensorMode


def program_of(
    loss: Callable[..., Tensor],
    answers: Mapping[str, Tensor],
    others: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> str:
    """loss(answers, *others) as a program, with gradients for the answers and for others that require one."""
    with FakeTensorMode(), torch.enable_grad():
        made = {
            name: _like(value).requires_grad_(value.is_floating_point()) for name, value in answers.items()
        }
        operands = [_like(other).requires_grad_(other.requires_grad) for other in others]
        return tails.program_of(lambda: loss(made, *operands), made, operands, sizes)


def _like(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
