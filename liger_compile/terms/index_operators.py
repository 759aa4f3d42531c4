"""Table functions for positions and masks: tensors created from sizes alone, comparisons, `where`.

indices.py reads their terms. No floating-point identity applies to these operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from liger_compile.terms import normalize
from liger_compile.terms.call import Call, IntVar, NumberVar, Operand, SizeArgument, negative, term_of
from liger_compile.terms.exact import is_whole, promoted
from liger_compile.terms.term import Size, Term, size_of


def _made(call: Call, op: str, *consts: Any) -> Term | None:
    """Returns the term of a tensor created from constants; another device or shape makes another term."""
    if call.out.requires_grad:
        return None
    return call.space.intern(op, (), (*consts, *call.shape, call.out.device), call.dtype, call.shape)


def _arange(call, *bounds, start=0, end=None, step=1, **options):
    """Handles arange(end), arange(start, end) and arange(start, end, step); each bound may be a keyword instead."""
    if len(bounds) > 1 or (bounds and end is not None):
        start = bounds[0]
    if len(bounds) > 2:
        step = bounds[2]
    start, step = (_whole(bound) for bound in (start, step))
    if start is None or step is None or call.dtype.is_complex:
        return None
    return _made(call, "arange", start, step)


def _whole(bound: Any) -> Size | None:
    """Returns a bound of arange if it is whole: then elements are start + position * step in every dtype."""
    if isinstance(bound, (NumberVar, IntVar)):
        return None
    if isinstance(bound, float):
        return int(bound) if is_whole(bound) else None
    return size_of(bound) if isinstance(bound, (int, torch.SymInt)) else None


def _filled(call: Call, value: Any) -> Term | None:
    if not isinstance(value, (int, float)) or isinstance(value, (NumberVar, IntVar)):
        return None
    return _made(call, "full", bool(value) if call.dtype is torch.bool else value)


def _constant(value: int) -> Callable:
    return lambda call, *args, **options: _filled(call, value)


def _full(call, size, fill_value, **options):
    return _filled(call, fill_value)


def _tensor(call, data, **options):
    return _filled(call, data)


def _operand(call: Call, value: Any) -> Term:
    return term_of(call, float(value) if isinstance(value, bool) else value)


def _compare(op: str, is_swapped: bool = False, is_negated: bool = False) -> Callable:
    def make(call, input: Operand, other: Operand):
        if call.dtype is not torch.bool:  # in place, into a tensor of numbers
            return None
        common = promoted(input, other)
        if common is None:
            return None
        # Torch promotes the operands likewise. A number stays a number; indices.py rounds it.
        terms = tuple(normalize.cast(call.space, _operand(call, value), common) for value in (input, other))
        term = _boolean(call, op, *(terms[::-1] if is_swapped else terms))
        return _boolean(call, "not", term) if is_negated else term

    return make


def _logical(op: str) -> Callable:
    def make(call, *terms):
        if not all(isinstance(term, Term) and term.dtype is torch.bool for term in terms):
            return None
        return _boolean(call, op, *terms)

    return make


def _boolean(call: Call, op: str, *terms: Term) -> Term:
    return normalize.apply(call.space, op, terms, (), torch.bool, call.shape)


def _where(call, condition: Term, input: Operand, other: Operand):
    if isinstance(input, Term) and input.dtype is torch.bool:
        return None  # may be the method, whose second argument is the condition
    return _chosen(call, condition, input, other)


def _masked_fill(call, input: Term, mask: Term, value: Operand):
    return _chosen(call, mask, value, input)


def _chosen(call: Call, condition: Term, *values: Any) -> Term | None:
    if condition.dtype is not torch.bool:
        return None
    terms = (normalize.cast(call.space, _operand(call, value), call.dtype) for value in values)
    return normalize.apply(call.space, "where", (condition, *terms), (), call.dtype, call.shape)


def _triangle(op: str) -> Callable:
    def make(call, input: Term, diagonal: SizeArgument = 0):
        return normalize.apply(call.space, op, (input,), (size_of(diagonal),), call.dtype, call.shape)

    return make


def _abs(call, input: Term):
    if call.dtype.is_complex or input.dtype != call.dtype:
        return None
    return normalize.apply(call.space, "abs", (input,), (), call.dtype, call.shape)


def _cumsum(call, input: Term, dim: int, *, dtype=None):
    if input.dtype not in (torch.bool, torch.int32, torch.int64) or dtype is not None:
        return None
    consts = (negative(dim, len(call.shape)),)
    return normalize.apply(call.space, "cumsum", (input,), consts, call.dtype, call.shape)


def _diff(call, input: Term, n=1, dim: int = -1, prepend: Term | None = None, append=None):
    dim = negative(dim, len(call.shape))
    if n != 1 or append is not None or input.dtype not in (torch.int32, torch.int64):
        return None
    if prepend is not None and (prepend.shape[dim] != 1 or prepend.dtype != input.dtype):
        return None
    args = (input, call.space.none if prepend is None else prepend)
    return normalize.apply(call.space, "diff", args, (dim,), call.dtype, call.shape)


def element(call: Call, input: Term, indices: tuple[Any, ...]) -> Term | None:
    """Returns the term of input[i, j, ...] with a tensor of positions for every dimension; otherwise None."""
    if len(indices) != len(input.shape):
        return None
    if not all(isinstance(i, Term) and i.dtype in (torch.int32, torch.int64) for i in indices):
        return None
    return normalize.apply(call.space, "index", (input, *indices), (), call.dtype, call.shape)


INDEX_TABLE: Mapping[str, Callable[..., Any]] = {
    "arange": _arange,
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _constant(1)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _constant(0)),
    "full": _full,
    "full_like": _full,
    "new_full": lambda call, input, size, fill_value, **options: _filled(call, fill_value),
    "tensor": _tensor,
    "le": _compare("le"),
    "ge": _compare("le", is_swapped=True),
    "lt": _compare("lt"),
    "gt": _compare("lt", is_swapped=True),
    "eq": _compare("eq"),
    "ne": _compare("eq", is_negated=True),
    "and": _logical("and"),
    "or": _logical("or"),
    "invert": _logical("not"),
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle("tril"),
    "triu": _triangle("triu"),
    **dict.fromkeys(("abs", "absolute"), _abs),
    "cumsum": _cumsum,
    "diff": _diff,
}
