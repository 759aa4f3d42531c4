"""Constructors that build.py calls: they map equivalent spellings to one term, and apply the identities.

    x*x, x.square(), x**2                  -> mul{x: 2}
    a/b, 1/sqrt(v), v.rsqrt(), v**-0.5     -> powers of a factor in a product
    x.sum(d) / n                           -> mean(x, d)
    unsqueeze, [None], view, reshape, ...  -> view(x, shape)
    x * sigmoid(x), cat(-hi, lo), ...      -> silu(x), rotate_half(x): the tables at the end of identities.py

Products and sums are multisets. Products are flat within one dtype; sums are not, because a residual stream is one long
sum. Terms record algebra instead of performing it, because a value may depend on how x is rounded:

    (x + c) - c, x + c1 + c2               stay two sums; only whole numbers are added up
    (x * a) * (1 / a), x * 1e-8 * 1e8      stay two products: scalars.py decides which numbers merge
    x * y / y, sqrt(x) * sqrt(x), x * 0    stay separate powers, and a product with 0

A cast never moves across an operation that rounds. It moves out of operations that only move elements (view, slice,
cat, neg), where it commutes exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from liger_compile.terms.scalars import (
    EXACT,
    is_integer,
    is_normal,
    is_ordinary,
    is_whole,
    merged,
    regroups_tensors,
)
from liger_compile.terms.term import Scalar, Size, Space, Term, broadcast

MOST_FACTORS, MOST_POWER = 8, 64  # limits of a product that is flattened into another

ZERO, ONE, MINUS_ONE = Scalar(0.0), Scalar(1.0), Scalar(-1.0)

# The factors of a product, and how often each occurs: x**3 is x three times, 1 / x / x is x**-1 twice. Only equal
# factors are counted together, so only positive whole powers merge.
Factor = tuple[Term, float]
Factors = Mapping[Factor, int]


def make_uncast(space: Space, term: Term) -> Term:
    if term.op == "cast":
        return term.args[0].uncast
    args = tuple(arg.uncast for arg in term.args)
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
    """Returns the term of an operation without its own constructor; the rules for `op` may rewrite it."""
    term = space.intern(op, args, consts, dtype, shape)
    if term not in space.better:
        rules = space.rules.get(op, ())
        space.better[term] = next((new for rule in rules if (new := rule(space, term)) is not None), term)
    return space.better[term]


# Elementwise


def cast(space: Space, term: Term, dtype: torch.dtype | None) -> Term:
    """Returns term in `dtype`, without a cast to its own dtype or a detour through a wider one."""
    if dtype is None or term.dtype is None or term.dtype == dtype:
        return term
    if term.op == "cast" and widens(term.args[0].dtype, term.dtype):
        return cast(space, term.args[0], dtype)
    if term.op in ("rotate_half", "rotate_pairs") and term.may_be_passed:
        # This cast moves inward, so that the rotated tensor is one value.
        return space.intern(term.op, (cast(space, term.args[0], dtype),), (), dtype, term.shape)
    return space.intern("cast", (term,), (dtype,), dtype, term.shape)


def widens(narrow: torch.dtype | None, wide: torch.dtype | None) -> bool:
    """Returns whether every value of `narrow` is a value of `wide`."""
    if narrow is None or wide is None or not (narrow.is_floating_point and wide.is_floating_point):
        return False
    try:
        return torch.promote_types(narrow, wide) == wide
    except RuntimeError:  # torch does not promote eight-bit dtypes
        return narrow == wide


def is_coarse_cast(term: Term) -> bool:
    """Returns whether a term is a cast to or from eight bits, which does not move across copies.

    The gradients of copies are rounded as coarsely, before they are summed and not after.
    """
    return term.op == "cast" and any(
        dtype is not None and dtype.is_floating_point and dtype.itemsize == 1
        for dtype in (term.dtype, term.args[0].dtype)
    )


def mul(
    space: Space,
    factors: Iterable[tuple[Term, float]],
    scalar: Scalar,
    dtype: torch.dtype | None,
    shape: tuple[Size, ...],
) -> Term:
    """Returns scalar * prod(term ** power), computed in `dtype`."""
    scalar, given = _given(space, factors, scalar, dtype)
    # Before flattening as well as after: the operand of a broadcast may be a product.
    scalar, product = _flat(_without_broadcasts(space, given, shape), scalar, dtype)
    product = _without_broadcasts(space, product, shape)
    changed = True
    while changed:
        changed = False
        for rule in space.mul_rules:
            better = rule(space, product, scalar, dtype)
            if better is not None:
                product, scalar = better
                changed = True
    if not product:
        return space.number(scalar)
    operands = sorted(_operands(product), key=lambda operand: (operand[0].serial, operand[1]))
    if len(operands) == 1 and operands[0][1] == 1:
        (only,) = next(zip(*operands, strict=True))
        if scalar == ONE and only.shape == shape:
            return only
        if scalar == MINUS_ONE and _keeps_sign(only):
            (x,) = only.args
            return cast(space, mul(space, ((x, 1),), scalar, x.dtype, shape), dtype)
    terms, powers = zip(*operands, strict=True)
    return space.intern("mul", terms, (scalar, *powers), dtype, shape)


def _given(
    space: Space, factors: Iterable[tuple[Term, float]], scalar: Scalar, dtype: torch.dtype | None
) -> tuple[Scalar, dict[Factor, int]]:
    """Returns the factors in `dtype`, with the numbers and signs among them moved into the scalar."""
    given: dict[Factor, int] = {}
    for term, power in factors:
        term = cast(space, term, dtype)
        if power == 1 and _keeps_sign(term) and is_negative(term.args[0]):  # a sign commutes with a cast
            term, scalar = cast(space, term.args[0].args[0], dtype), scalar * MINUS_ONE
        number = _raised(term.consts[0], power, dtype) if term.op == "number" else None
        together = None if number is None else merged(scalar, number, dtype)
        if together is None:
            _join(given, term, power)
        else:
            scalar = together
    return scalar, given


def _flat(given: Factors, scalar: Scalar, dtype: torch.dtype | None) -> tuple[Scalar, dict[Factor, int]]:
    """Returns the factors with nested products flattened, and all numbers that merge in the scalar."""
    product: dict[Factor, int] = {}
    operands = [*_operands(given)]
    for term, power in sorted(operands, key=lambda operand: (operand[0].serial, operand[1])):
        number = _opened(term, power, dtype, is_alone=len(operands) == 1)
        together = None if number is None else merged(scalar, number, dtype)
        if together is None:
            _join(product, term, power)
            continue
        scalar = together
        for inner, exponent in zip(term.args, term.consts[1:], strict=True):
            _join(product, inner, exponent * power)
    return scalar, product


def _join(product: dict[Factor, int], term: Term, power: float) -> None:
    factor, times = ((term, 1), int(power)) if is_whole(power) else ((term, power), 1)
    product[factor] = product.get(factor, 0) + times


def _operands(product: Factors) -> Iterator[tuple[Term, float]]:
    """Yields the terms and powers in the form that a term stores."""
    for (term, power), times in product.items():
        if power == 1:
            yield term, times
        else:
            yield from [(term, power)] * times


def _opened(term: Term, power: float, dtype: torch.dtype | None, is_alone: bool) -> Scalar | None:
    """Returns the number of a product that may be flattened under `power`; None if the product stays a factor.

    (a * b) ** power is a ** power * b ** power, but sqrt(x * x) is abs(x). A long product, or one with high powers,
    stays a factor: otherwise each product in a chain would be as long as the chain.
    """
    if term.op != "mul" or term.dtype != dtype:
        return None
    scalar, *powers = term.consts
    is_long = len(powers) > MOST_FACTORS or max(map(abs, powers)) > MOST_POWER
    if is_long and not (is_alone and power == 1):
        return None
    if not (all(_raises(inner, power) for inner in powers) or (term.consts == (ONE, -1) and power % 1)):
        return None
    if is_alone and power == 1:
        return scalar
    if not is_ordinary(scalar, dtype) or (len(powers) > 1 and not regroups_tensors(dtype)):
        return None
    return _raised(scalar, power, dtype)


def _raises(inner: float, outer: float) -> bool:
    """Returns whether (x ** inner) ** outer is x ** (inner * outer) for every x, and no power vanishes."""
    if outer == -1:
        return inner > 0 or inner % 1 != 0
    return outer == 1 or (is_whole(inner) and is_whole(outer))


def _raised(scalar: Scalar, power: float, dtype: torch.dtype | None) -> Scalar | None:
    """Returns scalar ** power, or None if the result is not a normal number, as for 1 / 0."""
    if power == 1:
        return scalar
    raised = scalar**power
    return raised if is_normal(scalar, dtype) and is_normal(raised, dtype) else None


def is_negative(term: Term) -> bool:
    """Returns whether a term is -x."""
    return term.op == "mul" and term.consts == (MINUS_ONE, 1)


def _is_passed_cast(term: Term) -> bool:
    """Returns whether moves of elements, and signs, move inward past this cast."""
    return term.op == "cast" and term.may_be_passed


def _keeps_sign(term: Term) -> bool:
    """Returns whether a cast of -x is the negated cast of x: both dtypes are signed and do not wrap around."""
    if not _is_passed_cast(term):
        return False
    dtypes = (dtype for dtype in (term.dtype, term.args[0].dtype) if dtype is not None)
    return all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)


def add(
    space: Space,
    terms: Iterable[Term],
    constant: Scalar,
    dtype: torch.dtype | None,
    shape: tuple[Size, ...],
) -> Term:
    """Returns constant + sum(terms), computed in `dtype`."""
    addends: list[Term] = []
    for term in terms:
        term = cast(space, term, dtype)
        is_shifted = term.op == "add" and len(term.args) == 1 and term.dtype == dtype
        number = term.consts[0] if term.op == "number" or is_shifted else None
        together = None if number is None else _summed(constant, number, dtype, is_alone=term.op == "number")
        if together is None:
            addends.append(term)
        else:
            constant = together
            addends.extend(term.args)
    if not addends:
        return space.number(constant)
    if not constant.value:  # the sign of a zero addend does not matter
        constant = ZERO
    if constant == ZERO and len(addends) == 1 and addends[0].shape == shape:
        return addends[0]
    if len(set(addends)) > 1:
        addends = _unbroadcast_all(space, addends, shape)
    return apply(space, "add", tuple(sorted(addends, key=lambda t: t.serial)), (constant,), dtype, shape)


def _summed(a: Scalar, b: Scalar, dtype: torch.dtype | None, is_alone: bool) -> Scalar | None:
    """Returns one constant for two, of which b may be part of a sum; None if they stay two.

    A floating-point sum rounds off small addends.
    """
    if not a.value and is_alone:
        return b
    if not b.value:
        return a
    total = a.value + b.value
    is_plain = not a.powers and not b.powers
    return Scalar(total) if is_integer(dtype) and is_plain and abs(total) < EXACT else None


def _without_broadcasts(space: Space, product: Factors, shape: tuple[Size, ...]) -> dict[Factor, int]:
    """Returns the factors without the broadcasts that a product of several factors does implicitly."""
    terms = _unbroadcast_all(space, [term for term, _ in product], shape)
    stripped: dict[Factor, int] = {}
    for term, ((_, power), times) in zip(terms, product.items(), strict=True):
        stripped[term, power] = stripped.get((term, power), 0) + times
    return stripped


def _unbroadcast_all(space: Space, terms: list[Term], shape: tuple[Size, ...]) -> list[Term]:
    """Returns operands without the expands and leading ones that implicit broadcasting supplies."""
    stripped = [_unbroadcast(space, term) for term in terms]
    return stripped if broadcast(term.shape for term in stripped) == shape else terms


def _unbroadcast(space: Space, term: Term) -> Term:
    if not term.may_be_passed:
        return term
    known = space.findings.unbroadcast
    if term not in known:
        known[term] = _find_unbroadcast(space, term)
    return known[term]


def _find_unbroadcast(space: Space, term: Term) -> Term:
    if is_coarse_cast(term):
        return term
    if term.op == "cast":
        return cast(space, _unbroadcast(space, term.args[0]), term.dtype)
    inner = term.args[0] if term.args else term
    if term.op == "mul" and len(term.args) == 1 and inner.shape == term.shape:
        inner = _unbroadcast(space, inner)  # a view moves into a product with a number
        return mul(space, ((inner, term.consts[1]),), term.consts[0], term.dtype, inner.shape)
    adds_ones = term.op == "view" and term.shape == (1,) * (len(term.shape) - len(inner.shape)) + inner.shape
    return _unbroadcast(space, inner) if term.op == "expand" or adds_ones else term


# Layout: operations that only move elements


def view(space: Space, term: Term, *size: Size, shape: tuple[Size, ...] = ()) -> Term:
    """Returns the elements of term in the shape `size`; also for unsqueeze, squeeze, reshape, flatten and [None]."""
    if term.op == "view":
        term = term.args[0]
    if term.shape == size or term.op == "number":
        return term
    if not term.may_be_passed:
        return space.intern("view", (term,), size, term.dtype, size)
    if term.op == "cast":
        return cast(space, view(space, term.args[0], *size), term.dtype)
    return apply(space, "view", (term,), size, term.dtype, size)


def expand(space: Space, term: Term, *size: Size, shape: tuple[Size, ...] = ()) -> Term:
    """Returns term broadcast to the shape `size`."""
    if term.op == "expand":
        term = term.args[0]
    if term.shape == size:
        return term
    if _is_passed_cast(term) and not is_coarse_cast(term):
        return cast(space, expand(space, term.args[0], *size), term.dtype)
    return space.intern("expand", (term,), size, term.dtype, size)


def permute(space: Space, term: Term, *dims: int, shape: tuple[Size, ...] = ()) -> Term:
    """Returns term with its dimension dims[-i] as dimension -i; `dims` needs only the trailing ones that move."""
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
    if _is_passed_cast(term):
        return cast(space, permute(space, term.args[0], *full), term.dtype)
    sizes = term.shape[: rank - len(full)] + tuple(term.shape[dim] for dim in full)
    return apply(space, "permute", (term,), tuple(full), term.dtype, sizes)


def slice_(
    space: Space, term: Term, dim: int, start: Size, stop: Size, step: int, shape: tuple[Size, ...] = ()
) -> Term:
    """Returns term[start:stop:step] along `dim` (negative); the bounds are within the dimension."""
    size = term.shape[dim]
    if start == 0 and stop == size and step == 1:
        return term
    if term.op == "slice":
        (x,), (inner_dim, offset, _, inner_step) = term.args, term.consts
        if inner_dim == dim and inner_step == 1:
            return slice_(space, x, dim, offset + start, offset + stop, step)
        if inner_dim > dim:  # slices of different dims commute: one order
            return slice_(space, slice_(space, x, dim, start, stop, step), *term.consts)
    if term.op == "cat" and term.consts == (dim,) and step == 1:
        part = _parts_of_cat(space, term).get((start, stop))
        if part is not None:
            return part
    if _is_passed_cast(term):
        return cast(space, slice_(space, term.args[0], dim, start, stop, step), term.dtype)
    length = stop - start if step == 1 else (stop - start + step - 1) // step
    sizes = list(term.shape)
    sizes[dim] = length
    return apply(space, "slice", (term,), (dim, start, stop, step), term.dtype, tuple(sizes))


def _parts_of_cat(space: Space, term: Term) -> Mapping[tuple[Size, Size], Term]:
    """Returns (start, stop) -> the part of a cat at these positions."""
    known = space.findings.parts_of_cats
    if term not in known:
        (dim,), start, found = term.consts, 0, {}
        for part in term.args:
            stop = start + part.shape[dim]
            found[start, stop] = part
            start = stop
        known[term] = found
    return known[term]


def cat(space: Space, *args: Any, shape: tuple[Size, ...] = ()) -> Term:
    """Returns the parts (all but the last argument) concatenated along `dim` (the last, negative)."""
    dim: int = args[-1]
    parts = [part for part in args[:-1] if len(part.shape) >= -dim and part.shape[dim] != 0]
    if len(parts) == 1:
        return parts[0]
    if all(map(_is_passed_cast, parts)) and len({part.args[0].dtype for part in parts}) == 1:
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
