"""Spellings -> one: the constructors that build.py calls, and the identities they apply.

    x*x, x.square(), x**2                  -> mul{x: 2}
    a/b, 1/sqrt(v), v.rsqrt(), v**-0.5     -> powers of a factor in a product
    x.sum(d) / n                           -> mean(x, d)
    unsqueeze, [None], view, reshape, ...  -> view(x, shape)
    x * sigmoid(x), cat(-hi, lo), ...      -> silu(x), rotate_half(x): the tables at the end of this file

Products and sums are multisets: products flat within one dtype, sums not (a residual stream is one long sum).
Algebra is recorded, not performed, and a cast is never moved across anything that rounds. It does move out of
what only moves elements (view, slice, cat, neg), where it commutes exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from liger_compile.terms.term import Scalar, Size, Space, Term, broadcast

ZERO, ONE, MINUS_ONE = Scalar(0.0), Scalar(1.0), Scalar(-1.0)


def make_bare(space: Space, term: Term) -> Term:
    if term.op == "cast":
        return term.args[0].bare
    args = tuple(arg.bare for arg in term.args)
    if term.op == "mul":
        scalar, *powers = term.consts
        return mul(space, zip(args, powers, strict=True), scalar, None, term.shape)
    if term.op == "add":
        return add(space, args, term.consts[0], None, term.shape)
    make = LAYOUT.get(term.op)
    if make:
        return make(space, *args, *term.consts, shape=term.shape)
    return apply(space, term.op, args, term.consts, None, term.shape)


def apply(
    space: Space,
    op: str,
    args: tuple[Term, ...],
    consts: tuple[Any, ...],
    dtype: torch.dtype | None,
    shape: tuple[Size, ...],
) -> Term:
    """Any operation without a constructor of its own; the rules for `op` may turn it into another."""
    term = space.intern(op, args, consts, dtype, shape)
    for rule in space.rules.get(op, ()):
        better = rule(space, term)
        if better is not None:
            return better
    return term


# Elementwise


def cast(space: Space, term: Term, dtype: torch.dtype | None) -> Term:
    """term in `dtype`; no cast where it has that dtype, and none through a wider one and back."""
    if dtype is None or term.dtype is None or term.dtype == dtype:
        return term
    if term.op == "cast" and widens(term.args[0].dtype, term.dtype):
        return cast(space, term.args[0], dtype)
    if term.op in ("rotate_half", "rotate_pairs"):  # here it moves in, so that what is turned is one value
        return space.intern(term.op, (cast(space, term.args[0], dtype),), (), dtype, term.shape)
    return space.intern("cast", (term,), (dtype,), dtype, term.shape)


def widens(narrow: torch.dtype | None, wide: torch.dtype | None) -> bool:
    """Every value of `narrow` is a value of `wide`."""
    if narrow is None or wide is None or not (narrow.is_floating_point and wide.is_floating_point):
        return False
    return torch.promote_types(narrow, wide) == wide


def mul(
    space: Space,
    factors: Iterable[tuple[Term, float]],
    scalar: Scalar,
    dtype: torch.dtype | None,
    shape: tuple[Size, ...],
) -> Term:
    """scalar * prod(term ** power), computed in `dtype`."""
    powers: dict[Term, float] = {}
    for term, power in factors:
        term = cast(space, term, dtype)
        if term.op == "cast" and is_negative(term.args[0]) and power == 1:  # a sign commutes with a cast
            term, scalar = cast(space, term.args[0].args[0], dtype), scalar * MINUS_ONE
        if term.op == "number":
            scalar = scalar * term.consts[0] ** power
        elif term.op == "mul" and term.dtype == dtype and _distributes(term, power):
            scalar = scalar * term.consts[0] ** power
            for inner, exponent in zip(term.args, term.consts[1:], strict=True):
                powers[inner] = powers.get(inner, 0) + exponent * power
        else:
            powers[term] = powers.get(term, 0) + power
    powers = _strip_broadcasts(space, powers, shape)
    changed = True
    while changed:
        changed = False
        for rule in space.mul_rules:
            better = rule(space, powers, scalar, dtype)
            if better is not None:
                powers, scalar = better
                changed = True
    if not powers:
        return space.number(scalar)
    if scalar == ONE and len(powers) == 1:
        ((term, power),) = powers.items()
        if power == 1 and term.shape == shape:
            return term
    if scalar == MINUS_ONE and [*powers.values()] == [1] and next(iter(powers)).op == "cast":
        (x,) = next(iter(powers)).args
        if x.dtype is not None and (x.dtype.is_floating_point or x.dtype.is_complex):
            # A sign commutes with a cast, of what has one: a boolean has none.
            return cast(space, mul(space, ((x, 1),), scalar, x.dtype, shape), dtype)
    terms = sorted(powers, key=lambda term: term.serial)
    return space.intern("mul", tuple(terms), (scalar, *(powers[t] for t in terms)), dtype, shape)


def is_negative(term: Term) -> bool:
    """-x"""
    return term.op == "mul" and term.consts == (MINUS_ONE, 1)


def _distributes(product: Term, power: float) -> bool:
    """(a * b) ** power = a ** power * b ** power; not so for sqrt(x * x), which is abs(x)."""
    return power == int(power) or (len(product.args) == 1 and product.consts == (ONE, -1))


def add(
    space: Space,
    terms: Iterable[Term],
    constant: Scalar,
    dtype: torch.dtype | None,
    shape: tuple[Size, ...],
) -> Term:
    """constant + sum(terms), computed in `dtype`."""
    addends: list[Term] = []
    for term in terms:
        term = cast(space, term, dtype)
        if term.op == "number" and not constant.value and not constant.powers:
            constant = term.consts[0]
        elif term.op == "number" and not constant.powers and not term.consts[0].powers:
            constant = Scalar(constant.value + term.consts[0].value)
        elif term.op == "add" and len(term.args) == 1 and term.dtype == dtype and not constant.powers:
            constant = Scalar(constant.value + term.consts[0].value, term.consts[0].powers)
            addends.append(term.args[0])
        else:
            addends.append(term)
    if not addends:
        return space.number(constant)
    if constant == ZERO and len(addends) == 1 and addends[0].shape == shape:
        return addends[0]
    addends = (
        list(_strip_broadcasts(space, dict.fromkeys(addends, 1), shape)) if len(set(addends)) > 1 else addends
    )
    return apply(space, "add", tuple(sorted(addends, key=lambda t: t.serial)), (constant,), dtype, shape)


def _strip_broadcasts(
    space: Space, powers: Mapping[Term, float], shape: tuple[Size, ...]
) -> dict[Term, float]:
    """Operands without the expand and the leading ones that broadcasting supplies anyway."""
    stripped: dict[Term, float] = {}
    for term, power in powers.items():
        term = _unbroadcast(space, term)
        stripped[term] = stripped.get(term, 0) + power
    if broadcast(term.shape for term in stripped) == shape:
        return stripped
    return dict(powers)


def _unbroadcast(space: Space, term: Term) -> Term:
    if term.op == "cast":
        return cast(space, _unbroadcast(space, term.args[0]), term.dtype)
    inner = term.args[0] if term.args else term
    if term.op == "mul" and len(term.args) == 1 and inner.shape == term.shape:
        inner = _unbroadcast(space, inner)  # a view moves into a product with a number
        return mul(space, ((inner, term.consts[1]),), term.consts[0], term.dtype, inner.shape)
    adds_ones = term.op == "view" and term.shape == (1,) * (len(term.shape) - len(inner.shape)) + inner.shape
    return _unbroadcast(space, inner) if term.op == "expand" or adds_ones else term


# Layout: what only moves elements


def view(space: Space, term: Term, *size: Size, shape: tuple[Size, ...] = ()) -> Term:
    """The elements of term in the shape `size`; also unsqueeze, squeeze, reshape, flatten and [None]."""
    if term.op == "view":
        term = term.args[0]
    if term.shape == size or term.op == "number":
        return term
    if term.op == "cast":
        return cast(space, view(space, term.args[0], *size), term.dtype)
    return apply(space, "view", (term,), size, term.dtype, size)


def expand(space: Space, term: Term, *size: Size, shape: tuple[Size, ...] = ()) -> Term:
    """term broadcast to the shape `size`."""
    if term.op == "expand":
        term = term.args[0]
    if term.shape == size:
        return term
    if term.op == "cast":
        return cast(space, expand(space, term.args[0], *size), term.dtype)
    return space.intern("expand", (term,), size, term.dtype, size)


def permute(space: Space, term: Term, *dims: int, shape: tuple[Size, ...] = ()) -> Term:
    """Dimension -i of the result is dims[-i] of term; only the trailing dims that move are given."""
    rank = len(term.shape)
    full = [*range(-rank, -len(dims)), *dims]
    if term.op == "permute":
        inner = [*range(-rank, -len(term.consts)), *term.consts]
        full = [inner[dim] for dim in full]
        term = term.args[0]
    while full and full[0] == -len(full):
        full.pop(0)
    if not full:
        return term
    if term.op == "cast":
        return cast(space, permute(space, term.args[0], *full), term.dtype)
    sizes = term.shape[: rank - len(full)] + tuple(term.shape[dim] for dim in full)
    return apply(space, "permute", (term,), tuple(full), term.dtype, sizes)


def slice_(
    space: Space, term: Term, dim: int, start: Size, stop: Size, step: int, shape: tuple[Size, ...] = ()
) -> Term:
    """term[start:stop:step] along `dim` (negative), bounds within the dimension."""
    size = term.shape[dim]
    if start == 0 and stop == size and step == 1:
        return term
    if term.op == "slice" and term.consts[0] == dim and term.consts[3] == 1:
        offset = term.consts[1]
        return slice_(space, term.args[0], dim, offset + start, offset + stop, step)
    if term.op == "slice" and term.consts[0] > dim:  # slices of different dims commute: one order
        inner = slice_(space, term.args[0], dim, start, stop, step)
        return slice_(space, inner, *term.consts)
    if term.op == "cat" and term.consts == (dim,) and step == 1:
        offset: Size = 0
        for part in term.args:
            if start == offset and stop == offset + part.shape[dim]:
                return part
            offset = offset + part.shape[dim]
    if term.op == "cast":
        return cast(space, slice_(space, term.args[0], dim, start, stop, step), term.dtype)
    length = stop - start if step == 1 else (stop - start + step - 1) // step
    sizes = list(term.shape)
    sizes[dim] = length
    return apply(space, "slice", (term,), (dim, start, stop, step), term.dtype, tuple(sizes))


def cat(space: Space, *args: Any, shape: tuple[Size, ...] = ()) -> Term:
    """The parts (all but the last argument) joined along `dim` (the last, negative)."""
    dim: int = args[-1]
    parts = [part for part in args[:-1] if len(part.shape) >= -dim and part.shape[dim] != 0]
    if len(parts) == 1:
        return parts[0]
    if all(part.op == "cast" for part in parts) and len({part.args[0].dtype for part in parts}) == 1:
        return cast(space, cat(space, *(part.args[0] for part in parts), dim, shape=shape), parts[0].dtype)
    dtype = parts[0].dtype if parts else None
    return apply(space, "cat", tuple(parts), (dim,), dtype, shape)


LAYOUT: Mapping[str, Callable[..., Term]] = {
    "view": view,
    "expand": expand,
    "permute": permute,
    "slice": slice_,
    "cat": cat,
}
