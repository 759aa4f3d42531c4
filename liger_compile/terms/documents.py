"""Reads documents in a mask: several texts in one row, each of which sees only itself.

Such a mask compares integers of a query q and a key k, the document ids: `ids[b, q] == ids[b, k]`. The meaning needs no
knowledge of the ids. They may be inputs, and may be computed in any way, if both sides of the comparison are elements
of one term. Tokens with equal ids are one document, wherever they are in the row.

Positions that advance by one within documents are read as positions in the row. This is known for ids that are made of
the positions themselves, as in transformers: ids = (diff(positions) != 1).cumsum(-1). Two positions of one document
then differ by the distance of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from liger_compile.terms import normalize
from liger_compile.terms.linear import ZERO, Differs, Element, Linear, UnreadError, coordinate, of_part
from liger_compile.terms.term import Scalar, Size, Space, Term

QUERY, KEY, BATCH = coordinate(-2), coordinate(-1), coordinate(-4)

_At = tuple[Linear, ...]


def is_integer(dtype: torch.dtype | None) -> bool:
    return dtype is not None and dtype is not torch.bool and not (dtype.is_floating_point or dtype.is_complex)


def holds_all(wide: torch.dtype | None, narrow: torch.dtype | None) -> bool:
    """Returns whether an integer dtype represents every value of another one."""
    return (
        wide is not None
        and narrow is not None
        and is_integer(wide)
        and is_integer(narrow)
        and torch.promote_types(wide, narrow) == wide
    )


class _Places(NamedTuple):
    """The elements of a query and of its key that a mask compares, and the dimension of tokens in their term."""

    term: Term
    of_query: _At
    of_key: _At
    dim: int  # negative


class Documents(NamedTuple):
    """The documents of a mask, and what it demands besides that query and key are in one document.

    Args:
        ids: (B, S) or (1, S) integers; equal for the tokens of one document of a row.
        others: linear forms that are <= 0, in positions of the row.
    """

    ids: Term
    others: frozenset[Linear]


def read_documents(
    space: Space, forms: Iterable[Linear], sizes: tuple[Size, Size], value_at: Callable[[Term, _At], Linear]
) -> Documents:
    """Returns the documents in a conjunction of forms <= 0, of which at least one compares documents.

    Args:
        sizes: the number of rows of the mask, and the number of keys, which is that of queries.
        value_at: returns the value of a term at coordinates; raises UnreadError if it has several.

    Raises:
        UnreadError: the mask compares several ids, or ids of other tokens than the query and the key.
    """
    compared = [form for form in forms if _compares(form)]
    if len(compared) > 1:
        raise UnreadError(f"it compares several document ids: {' and '.join(map(str, compared))}")
    (form,) = compared
    ((part, coefficient), *others) = form.parts
    if not isinstance(part, Differs) or others or coefficient != 1 or form.constant != 0:
        raise UnreadError(f"it lets through other documents: {form} <= 0")
    places = _places(part)
    ids = _rows(space, places, *sizes)
    steps = _advancing(space, places, value_at)
    rest = frozenset(_in_row(other, steps) for other in forms if other is not form)
    return Documents(ids, rest)


def compare_documents(forms: Iterable[Linear]) -> bool:
    """Returns whether any of these forms compares integers that only the call knows."""
    return any(map(_compares, forms))


def _compares(form: Linear) -> bool:
    return any(isinstance(part, Differs) for part, _ in form.parts)


def _places(differs: Differs) -> _Places:
    """Returns which of two places is that of the query; raises UnreadError if they differ in more than that."""
    for of_query, of_key in (tuple(differs.places), tuple(differs.places)[::-1]):
        differing = [
            dim for dim in range(-len(of_query), 0) if of_query[dim] != of_key[dim] or of_query[dim] == QUERY
        ]
        others = [at for dim, at in enumerate(of_query, -len(of_query)) if dim not in differing]
        is_of_row = all(at in (ZERO, BATCH) for at in others) and others.count(BATCH) <= 1
        if len(differing) != 1 or not is_of_row:
            continue
        (dim,) = differing
        first = of_query[dim].plus(QUERY, -1)
        if not first.parts and first.constant >= 0 and of_key[dim] == KEY.plus(first):
            return _Places(differs.term, of_query, of_key, dim)
    raise UnreadError(f"it compares ids of other tokens than the query and its key: {differs} <= 0")


def _rows(space: Space, places: _Places, rows: Size, keys: Size) -> Term:
    """Returns the ids as a term of the shape (B, S), or (1, S) if all rows have the same ids."""
    term, of_batch = places.term, None
    for dim, at in enumerate(places.of_query, -len(places.of_query)):
        if dim == places.dim:
            start = int(at.plus(QUERY, -1).constant)
            term = normalize.slice_(space, term, dim, start, keys + start, 1)
        elif at == BATCH:
            of_batch = dim
            term = normalize.slice_(space, term, dim, 0, rows, 1)
        elif term.shape[dim] != 1:
            term = normalize.slice_(space, term, dim, 0, 1, 1)
    if of_batch is not None and of_batch > places.dim:
        raise UnreadError("its document ids have the tokens before the batch")
    return normalize.view(space, term, 1 if of_batch is None else rows, keys)


def _advancing(
    space: Space, places: _Places, value_at: Callable[[Term, _At], Linear]
) -> tuple[Element, Element] | None:
    """Returns the positions of query and key that advance by one within documents, if the ids are made of such.

    The flag of a token is whether its position is not one more than that before it. Equal sums of the flags up to two
    tokens mean that no token between them has a flag. Positions are assumed not to wrap around in 64 bits.
    """
    (flags, *_) = places.term.args or (None,)
    if flags is None or not _is_sum_of_flags(places) or flags.op != "not" or flags.args[0].op != "eq":
        return None
    step, one = sorted(flags.args[0].args, key=lambda arg: arg.op == "number")
    if step.op != "diff" or step.consts != (places.dim,) or step.args[1].op == "none":
        return None
    if one.op != "number" or one.consts[0] != Scalar(1.0) or step.dtype is not torch.int64:
        return None
    try:
        values = [value_at(step.args[0], at) for at in (places.of_query, places.of_key)]
    except UnreadError:
        return None
    pair = [value.elements for value in values]
    if any(len(found) != 1 or of_part(found[0]) != value for found, value in zip(pair, values, strict=True)):
        return None
    of_query, of_key = pair[0][0], pair[1][0]
    return (of_query, of_key) if of_query.term.dtype is torch.int64 else None


def _is_sum_of_flags(places: _Places) -> bool:
    """Returns whether the ids are running sums of flags along the tokens, which never decrease."""
    term = places.term
    return term.op == "cumsum" and term.consts == (places.dim,) and term.args[0].dtype is torch.bool


def _in_row(form: Linear, steps: tuple[Element, Element] | None) -> Linear:
    """Returns a form in which positions of documents are positions of the row; it holds for tokens of one document."""
    parts = dict(form.parts)
    if steps is None or parts.get(steps[0], 0) != -parts.get(steps[1], 0):
        return form
    times = parts.get(steps[0], 0)
    distance = of_part(steps[0]).plus(of_part(steps[1]), -1)
    return form.plus(distance, -times).plus(QUERY.plus(KEY, -1), times)
