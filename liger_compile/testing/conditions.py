"""Conditions of the identities in spellings.py, and helpers of their spellings. Arguments are those of the call.

All parameters are typed Any: the tensors are Values, which PyTorch's own annotations do not accept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from liger_compile.testing.graphs import Value


def exponent_is(number: float) -> Callable[..., bool]:
    return lambda x, n: n == number


def both_tensors(a: Any, b: Any, **_: Any) -> bool:
    return isinstance(a, Value) and isinstance(b, Value)


def by_number(a: Any, b: Any, **_: Any) -> bool:
    return isinstance(a, Value) and isinstance(b, (int, float)) and b != 0


def of_tensor(a: Any, b: Any, **_: Any) -> bool:
    return isinstance(a, Value)


def made_by(name: str) -> Callable[..., bool]:
    return lambda a, b: both_tensors(a, b) and b.made_by(name) is not None


def floating(x: Any, *_: Any, **__: Any) -> bool:
    return x.dtype.is_floating_point


def to_floating(x: Any, dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and x.dtype.is_floating_point


def is_common(x: Any, dtype: Any) -> bool:
    """Returns whether an input of the graph has this dtype, so that the dtype can be taken from a tensor."""
    return to_floating(x, dtype) and x.like(dtype) is not None


def last(x: Any, dim: Any = None, keepdim: bool = False) -> bool:
    return dim in (-1, [-1], (-1,)) and keepdim is True


def halved(x: Any, chunks: int, dim: int = 0) -> bool:
    return chunks == 2 and dim == -1 and x.shape[-1] % 2 == 0


def half(x: Any) -> int:
    return x.shape[-1] // 2


def ellipsis(x: Any, index: Any) -> bool:
    """Returns whether the index is x[..., one slice] of a tensor."""
    return (
        isinstance(x, Value)
        and isinstance(index, tuple)
        and len(index) == 2
        and (index[0] is Ellipsis and isinstance(index[1], slice))
    )


def colons(x: Any) -> list[slice]:
    return [slice(None)] * (x.dim() - 1)


def bounds(x: Any, index: Any) -> tuple[int, int]:
    start, stop, _ = index[1].indices(x.shape[-1])
    return start, stop - start


def unit_step(x: Any, index: Any) -> bool:
    return ellipsis(x, index) and index[1].step in (None, 1)


def of_pairs(x: Any, index: Any) -> bool:
    return (
        ellipsis(x, index) and index[1].step == 2 and index[1].start in (None, 0, 1) and x.shape[-1] % 2 == 0
    )


def pairs(x: Any) -> Any:
    return x.reshape(*x.shape[:-1], -1, 2)


def two_halves(tensors: Any, dim: int = 0) -> bool:
    return dim == -1 and len(tensors) == 2 and tensors[0].shape == tensors[1].shape


def from_behind(tensors: Any, dim: int = 0) -> bool:
    return dim < 0


def at_the_end(tensors: Any, dim: int = 0) -> bool:
    return dim == -1


def last_two(x: Any, start_dim: int = 0, end_dim: int = -1) -> bool:
    return start_dim == -2 and end_dim == -1


def to_rows(x: Any, *shape: Any) -> bool:
    return len(shape) == 2 and shape[0] == -1 and shape[1] == x.shape[-1] and x.dim() > 1


def to_one_dim(x: Any, *shape: Any) -> bool:
    return shape == (-1,)


def no_bias(x: Any, w: Any, b: Any = None) -> bool:
    return b is None


def has_bias(x: Any, w: Any, b: Any = None) -> bool:
    return b is not None


def rows(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1])


def on_rows(x: Any, w: Any, product: Callable[[Any], Any]) -> Any:
    return product(rows(x)).view(*x.shape[:-1], w.shape[0])


def tokens(x: Any, y: Any, n: Any = None, **_: Any) -> bool:
    return x.dim() == 2 and y.dim() == 1


def tokens_in_pairs(x: Any, y: Any, weight: Any = None, **options: Any) -> bool:
    return tokens(x, y) and x.shape[0] % 2 == 0 and options.get("reduction") != "none"


def unsmoothed(x: Any, y: Any, weight: Any = None, **options: Any) -> bool:
    return tokens(x, y) and not options.get("label_smoothing")


def unweighted(x: Any, y: Any, weight: Any = None, **options: Any) -> bool:
    return weight is None


def nll(scores: Any, y: Any, weight: Any, options: dict[str, Any]) -> Any:
    return F.nll_loss(scores, y, weight, **{k: v for k, v in options.items() if k != "label_smoothing"})


def positional(x, y, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    return F.cross_entropy(x, y, weight, None, ignore_index, None, reduction, label_smoothing)


def in_batches(x: Any, y: Any) -> tuple[Any, Any]:
    return x.view(2, -1, x.shape[-1]), y.view(2, -1)
