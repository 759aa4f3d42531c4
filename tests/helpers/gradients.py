"""Results and gradients of a function: the one way in which tests take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from liger_compile.testing import precision
from liger_compile.torch_internals.pytree import tree_map


def gradients_of(
    function: Callable[..., Any], *args: Any, parameters: Iterable[Tensor] = ()
) -> tuple[Any, list]:
    """The results of function(*args), detached, and the gradients of the arguments that require one and of
    `parameters`, in this order. Results get the same random gradients in every call. None is a gradient that is absent.

    The arguments are taken as they are: a function that writes into one of them wants copies (precision.copied).
    """
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    results = function(*args)
    gradients = precision.gradients(results, [*leaves, *parameters])
    detached = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, results)
    return detached, gradients
