"""The numerics bar: against float64, at most twice the error of eager in the same dtype. It is never a fixed tolerance.

In: the results of a computation, the results of eager in the same dtypes, and the exact results. Out: nothing, or an
AssertionError that names the tensor and its error. `in_double` computes the exact results: it runs code written for
other dtypes in float64, and treats every cast to a floating dtype as a cast to float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from liger_compile.torch_internals import typed
from liger_compile.torch_internals.pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

_DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
_ORDER = 2 * torch.finfo(torch.float32).eps  # relative; what the order of a sum in float32 may change
_CASTS = ("float", "half", "bfloat16")


def assert_no_worse(actual: Any, eager: Any, exact: Any, *, factor: float = 2.0) -> None:
    """Asserts that every tensor is about as close to `exact` as `eager` is, in the L2 norm.

    The three are tensors, or trees of tensors with equal structure: tuples, lists, dictionaries, None. Where `exact` is
    not finite, `actual` must equal eager's value.

    The allowed error is `factor` times eager's error, plus a floor: rounding an exact result leaves an error of
    eps / sqrt(12) times its norm; long sums in float32 differ by two eps of float32 if their order differs, and eager's
    may be accurate by chance; so may eager be with few elements, for which some eps of the coarsest dtype among the
    results are allowed (a loss in float32 may come from bfloat16 logits).
    """
    coarsest = max((_eps(leaf) for leaf in tree_leaves(eager)), default=0.0)
    results, expected, trues = (tree_flatten_with_path(tree)[0] for tree in (actual, eager, exact))
    names = [[f"value{keystr(path)}" for path, _ in leaves] for leaves in (results, expected, trues)]
    assert names[0] == names[1] == names[2], f"expected results {names[1]}, got {names[0]}"
    for name, (_, got), (_, wanted), (_, true) in zip(names[0], results, expected, trues, strict=True):
        if isinstance(wanted, Tensor):
            _assert_tensor(name, got, wanted, true, factor, coarsest)
        else:
            assert got is wanted or got == wanted, f"{name}: expected {wanted!r}, got {got!r}"


def _assert_tensor(
    name: str, actual: Tensor | None, eager: Tensor, exact: Tensor, factor: float, coarsest: float
) -> None:
    assert isinstance(actual, Tensor), f"{name}: expected a tensor like eager's, got {actual!r}"
    described = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (actual, eager)]
    assert described[0] == described[1], f"{name}: got {described[0]}, eager gives {described[1]}"
    if not (eager.is_floating_point() or eager.is_complex()):
        assert torch.equal(actual, eager), f"{name}: differs from eager's"
        return
    error, allowed = error_of(actual, eager, exact), bound(eager, exact, factor, coarsest)
    if error > allowed:
        norm = typed.norm(_finite(exact, exact, exact)) or 1.0
        eagers = error_of(eager, eager, exact)
        raise AssertionError(
            f"{name}: error {error / norm:.3g} relative to float64, eager's is {eagers / norm:.3g}, "
            f"allowed were {allowed / norm:.3g} ({tuple(eager.shape)} {eager.dtype})"
        )


def error_of(actual: Tensor, eager: Tensor, exact: Tensor) -> float:
    """Returns the L2 norm of actual - exact. Infinite if actual differs from eager where exact is not finite."""
    wide = _finite(actual, exact, exact) - _finite(exact, exact, exact)
    rest = ~torch.isfinite(exact)
    same = torch.equal(torch.nan_to_num(actual[rest]), torch.nan_to_num(eager[rest]))
    error = typed.norm(wide)
    return error if same and math.isfinite(error) else math.inf


def bound(eager: Tensor, exact: Tensor, factor: float = 2.0, coarsest: float = 0.0) -> float:
    """Returns the allowed error of a result that eager computes as `eager`; see assert_no_worse."""
    numel = max(1, int(torch.isfinite(exact).sum()))
    floor = _eps(eager) * 12**-0.5 + max(_eps(eager), coarsest) * 2 * numel**-0.5
    if eager.dtype != torch.float64:
        floor += _ORDER
    return factor * error_of(eager, eager, exact) + floor * typed.norm(_finite(exact, exact, exact))


def _eps(value: Any) -> float:
    is_inexact = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return torch.finfo(value.dtype).eps if is_inexact else 0.0


def _finite(tensor: Tensor, exact: Tensor, like: Tensor) -> Tensor:
    """Returns tensor in the dtype of `like`, with zeros where exact is not finite."""
    return torch.where(torch.isfinite(exact), tensor.detach().to(like.dtype), 0)


class _InDouble(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        values: tuple[Any, ...] = tree_map(_doubled, args)
        keywords: dict[str, Any] = tree_map(_doubled, dict(kwargs or {}))
        if getattr(func, "__name__", "") in _CASTS and isinstance(values[0], Tensor):
            return values[0].to(torch.complex128 if values[0].is_complex() else torch.float64)
        return func(*values, **keywords)


def _doubled(value: Any) -> Any:
    return _DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def in_double() -> Generator[None, None, None]:
    """Treats every cast to a floating dtype as a cast to float64. Inputs must be float64: `as_double`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InDouble():
            yield
    finally:
        torch.set_default_dtype(default)


def as_double(value: Any) -> Any:
    """Returns a copy of a tree of tensors and modules, floating ones in float64; shared objects stay shared."""
    return copied(value, double=True)


def copied(value: Any, *, double: bool = False) -> Any:
    """Returns a copy of a tree of tensors and modules that shares no memory with it; its tensors are leaves."""
    copies: dict[int, Any] = {}

    def copy_of(value: Any) -> Any:
        if id(value) not in copies:
            copies[id(value)] = _copy_of(value, double)
        return copies[id(value)]

    return tree_map(copy_of, value)


def _copy_of(value: Any, double: bool) -> Any:
    if isinstance(value, nn.Module):
        module = copy.deepcopy(value)
        for parameter in module.parameters():
            parameter.grad = None
        return module.double() if double else module
    if not isinstance(value, Tensor):
        return value
    dtype = _DOUBLE.get(value.dtype, value.dtype) if double else value.dtype
    return value.detach().clone().to(dtype).requires_grad_(value.requires_grad)


def gradients(outputs: Any, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns the gradients of the leaves for a fixed random gradient of every output that requires one."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    roots = [tensor for tensor in tensors if tensor.requires_grad]
    if not roots or not leaves:
        return [None] * len(leaves)
    generator = torch.Generator().manual_seed(0)
    # Rounded to bfloat16, so that they are the same numbers in every dtype. Drawn in float32 even under in_double,
    # which would draw float64: torch.randn gives other numbers then.
    with torch.DisableTorchFunction():
        drawn = [
            torch.randn(root.shape, generator=generator, dtype=torch.float32).bfloat16() for root in roots
        ]
    drawn = [upstream.to(root) for upstream, root in zip(drawn, roots, strict=True)]
    return [*torch.autograd.grad(roots, list(leaves), drawn, allow_unused=True)]
