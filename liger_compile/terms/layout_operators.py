"""Table functions for operators that only move elements: views, slices, concatenations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from liger_compile.terms import normalize
from liger_compile.terms.call import Call, SizeArgument, flat, negative
from liger_compile.terms.index_operators import element
from liger_compile.terms.term import Term, size_of


def _view(call, input: Term, *shape, **kwargs):
    if any(isinstance(size, torch.dtype) for size in shape) or "dtype" in kwargs:
        return None
    return normalize.view(call.space, input, *call.shape)


def _expand(call, input: Term, *sizes, **kwargs):
    rank = len(call.shape) - len(input.shape)
    term = normalize.view(call.space, input, *(1,) * rank, *input.shape)
    return normalize.expand(call.space, term, *call.shape)


def _permute(call, input: Term, *dims):
    rank = len(input.shape)
    return normalize.permute(call.space, input, *(negative(d, rank) for d in flat(dims)))


def _transpose(call, input: Term, dim0: int, dim1: int):
    rank = len(input.shape)
    dims = [*range(-rank, 0)]
    first, second = negative(dim0, rank), negative(dim1, rank)
    dims[first], dims[second] = dims[second], dims[first]
    return normalize.permute(call.space, input, *dims)


def _t(call, input: Term):
    return _transpose(call, input, -1, -2) if len(input.shape) == 2 else input


def _bounded(index: Any, size: Any, default: Any) -> Any:
    """Returns a slice bound as Python resolves it."""
    if index is None:
        return default
    index = size_of(index)
    if isinstance(index, int) and isinstance(size, int):
        return max(index + size, 0) if index < 0 else min(index, size)
    return index + size if isinstance(index, int) and index < 0 else index


def _narrowed(call: Call, term: Term, dim: int, index: slice) -> Term | None:
    step = 1 if index.step is None else index.step
    if not isinstance(step, int) or step < 1 or any(isinstance(b, Term) for b in (index.start, index.stop)):
        return None
    size = term.shape[dim]
    start, stop = _bounded(index.start, size, 0), _bounded(index.stop, size, size)
    if isinstance(start, int) and isinstance(stop, int):
        stop = max(start, stop)
    return normalize.slice_(call.space, term, dim, start, stop, step)


def _getitem(call, input, index):
    if isinstance(input, (tuple, list)):
        return input[index]
    indices = index if isinstance(index, tuple) else (index,)
    if not isinstance(input, Term):
        return None
    if any(isinstance(i, (Term, list, tuple)) for i in indices):
        return element(call, input, tuple(indices))
    taken = sum(i is not None and i is not Ellipsis for i in indices)
    rest = [slice(None)] * (len(input.shape) - taken)
    at = next((n for n, i in enumerate(indices) if i is Ellipsis), len(indices))
    term, dim = input, -len(input.shape)
    for i in [*indices[:at], *rest, *indices[at + 1 :]]:
        if i is None:
            continue
        if isinstance(i, bool):
            return None
        if isinstance(i, int):
            i = slice(i, i + 1 if i != -1 else None)
        narrowed = _narrowed(call, term, dim, i) if isinstance(i, slice) else None
        if narrowed is None:
            return None
        term, dim = narrowed, dim + 1
    return normalize.view(call.space, term, *call.shape)


def _select(call, input: Term, dim: int, index: SizeArgument):
    dim = negative(dim, len(input.shape))
    term = _narrowed(call, input, dim, slice(index, index + 1 if index != -1 else None))
    return None if term is None else normalize.view(call.space, term, *call.shape)


def _narrow(call, input: Term, dim: int, start: SizeArgument, length: SizeArgument):
    dim = negative(dim, len(input.shape))
    # slice(start, start + length) could end at 0
    first = start + input.shape[dim] if isinstance(start, int) and start < 0 else start
    return _narrowed(call, input, dim, slice(first, first + length))


def _pieces(call: Call, input: Term, dim: int) -> tuple[Term, ...]:
    """Returns the parts of a chunk or split, with the sizes of the call's outputs."""
    dim, start, parts = negative(dim, len(input.shape)), 0, []
    for part in call.out:
        stop = start + size_of(part.shape[dim])
        parts.append(normalize.slice_(call.space, input, dim, start, stop, 1))
        start = stop
    return tuple(parts)


def _chunk(call, input: Term, chunks, dim: int = 0):
    return _pieces(call, input, dim)


def halves(call: Call, term: Term, dim: int) -> tuple[Term, Term]:
    """Returns the two halves of a term along a dimension."""
    dim = negative(dim, len(term.shape))
    size = term.shape[dim]
    middle = size // 2
    first = normalize.slice_(call.space, term, dim, 0, middle, 1)
    return first, normalize.slice_(call.space, term, dim, middle, size, 1)


def _split(call, input: Term, split_size_or_sections, dim: int = 0):
    return _pieces(call, input, dim)


def _unbind(call, input: Term, dim: int = 0):
    return tuple(_select(Call(call.space, part), input, dim, index) for index, part in enumerate(call.out))


def _cat(call, tensors: Sequence[Term], dim: int = 0, axis: int | None = None):
    dim = negative(dim if axis is None else axis, len(call.shape))
    parts = [normalize.cast(call.space, part, call.dtype) for part in tensors]
    return normalize.cat(call.space, *parts, dim, shape=call.shape)


def _stack(call, tensors: Sequence[Term], dim: int = 0):
    dim = negative(dim, len(call.shape))
    size = [*call.shape]
    size[dim] = 1
    return _cat(call, [normalize.view(call.space, part, *size) for part in tensors], dim)


def _attribute(call, input: Term, name: str):
    if name in ("real", "imag") and input.dtype is not None and input.dtype.is_complex:
        return normalize.apply(call.space, name, (input,), (), call.dtype, call.shape)
    of_attribute = _TRANSPOSED.get(name)
    return of_attribute(call, input) if of_attribute else None


def _matrices_transposed(call, input: Term):
    return _transpose(call, input, -1, -2)


def _matrix_transposed(call, input: Term):
    return _transpose(call, input, -1, -2) if len(input.shape) == 2 else None


# Attributes that are views. aten has other names for T and H.
_TRANSPOSED: Mapping[str, Callable[..., Any]] = {"mT": _matrices_transposed, "T": _matrix_transposed}


def _repeat_interleave(call, input: Term, repeats, dim: int | None = None, *, output_size=None):
    if not isinstance(repeats, int) or dim is None:
        return None
    consts = (repeats, negative(dim, len(call.shape)))
    return normalize.apply(call.space, "repeat_interleave", (input,), consts, call.dtype, call.shape)


LAYOUT_TABLE: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"), _view),
    **dict.fromkeys(("view_as", "reshape_as", "_unsafe_view"), _view),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "permute": _permute,
    "transpose": _transpose,
    "t": _t,
    "getitem": _getitem,
    "select": _select,
    "narrow": _narrow,
    "chunk": _chunk,
    "split": _split,
    "split_with_sizes": _split,
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
    "getattr": _attribute,
    "mT": _matrices_transposed,
    "numpy_T": _matrix_transposed,
    "repeat_interleave": _repeat_interleave,
}
