"""Reads padding in a mask: flags of keys, which state whether a key is present.

Such a mask lets a query q see a key k only if `present[b, k]`. The meaning needs no knowledge of the flags: they may be
an input of any dtype, or a comparison such as `ids != pad`, as long as they are one boolean term of the batch and key.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from liger_compile.terms import normalize
from liger_compile.terms.documents import BATCH, KEY
from liger_compile.terms.linear import ZERO, Flag, Linear, UnreadError
from liger_compile.terms.term import Size, Space, Term


class Keys(NamedTuple):
    """The keys of a mask that are present, and what it demands besides.

    Args:
        keys: (B, S) or (1, S) booleans; true for the keys that are present.
        others: linear forms that are <= 0.
    """

    keys: Term
    others: frozenset[Linear]


def has_flags(forms: Iterable[Linear]) -> bool:
    """Returns whether any of these forms has a flag that only the call knows."""
    return any(_flags(form) for form in forms)


def _flags(form: Linear) -> list[Flag]:
    return [part for part, _ in form.parts if isinstance(part, Flag)]


def read_keys(space: Space, forms: Iterable[Linear], sizes: tuple[Size, Size]) -> Keys:
    """Returns the keys in a conjunction of forms <= 0, of which at least one has flags.

    Args:
        sizes: the number of rows of the mask, and the number of keys, which is that of queries.

    Raises:
        UnreadError: the mask has several flags, or flags of other tokens than the key.
    """
    flagged = [form for form in forms if _flags(form)]
    if len(flagged) > 1:
        raise UnreadError(f"it has several flags of keys: {' and '.join(map(str, flagged))}")
    (form,) = flagged
    ((part, times), *others) = form.parts
    if not isinstance(part, Flag) or others or (times, form.constant) not in ((-1, 1), (1, 0)):
        raise UnreadError(f"it lets through other keys: {form} <= 0")
    keys = _of_keys(space, part, *sizes)
    if times == 1:  # the flag states that a key is absent
        keys = normalize.apply(space, "not", (keys,), (), torch.bool, keys.shape)
    return Keys(keys, frozenset(other for other in forms if other is not form))


def _of_keys(space: Space, flag: Flag, rows: Size, keys: Size) -> Term:
    """Returns the flags as a term of the shape (B, S), or (1, S) if all rows have the same flags."""
    term, of_key, of_batch = flag.term, None, None
    for dim, at in enumerate(flag.at, -len(flag.at)):
        first = at.plus(KEY, -1)
        if of_key is None and not first.parts and first.constant >= 0:
            of_key, start = dim, int(first.constant)
            term = normalize.slice_(space, term, dim, start, keys + start, 1)
        elif of_batch is None and at == BATCH:
            of_batch = dim
            term = normalize.slice_(space, term, dim, 0, rows, 1)
        elif at == ZERO:
            term = term if term.shape[dim] == 1 else normalize.slice_(space, term, dim, 0, 1, 1)
        else:
            raise UnreadError(f"it has flags of other tokens than the key: {flag}")
    if of_key is None or (of_batch is not None and of_batch > of_key):
        raise UnreadError(f"its flags are not those of a batch of keys: {flag}")
    return normalize.view(space, term, 1 if of_batch is None else rows, keys)
