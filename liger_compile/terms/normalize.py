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

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from liger_compile.terms.term import Scalar, Size, Space, Term, broadcast, close

ZERO, ONE, MINUS_ONE = Scalar(0.0), Scalar(1.0), Scalar(-1.0)


def new_space() -> Space:
    """An empty space whose bare terms are normalised by the rules of this file."""
    return Space(_make_bare)


def _make_bare(space: Space, term: Term) -> Term:
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
    for rule in RULES.get(op, ()):
        better = rule(space, term)
        if better is not None:
            return better
    return term


# Elementwise


def cast(space: Space, term: Term, dtype: torch.dtype | None) -> Term:
    """term in `dtype`; no cast where it has that dtype, and none through a wider one and back."""
    if dtype is None or term.dtype is None or term.dtype == dtype:
        return term
    if term.op == "cast" and _widens(term.args[0].dtype, term.dtype):
        return cast(space, term.args[0], dtype)
    return space.intern("cast", (term,), (dtype,), dtype, term.shape)


def _widens(narrow: torch.dtype | None, wide: torch.dtype | None) -> bool:
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
        if term.op == "number":
            scalar = scalar * term.consts[0] ** power
        elif term.op == "mul" and term.dtype == dtype and _distributes(term, power):
            scalar = scalar * term.consts[0] ** power
            for inner, exponent in zip(term.args, term.consts[1:], strict=True):
                powers[inner] = powers.get(inner, 0) + exponent * power
        else:
            powers[term] = powers.get(term, 0) + power
    powers = _strip_broadcasts(powers, shape)
    changed = True
    while changed:
        changed = False
        for rule in MUL_RULES:
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
        (inner,) = powers  # a sign commutes with a cast
        return cast(space, mul(space, ((inner.args[0], 1),), scalar, inner.args[0].dtype, shape), dtype)
    terms = sorted(powers, key=lambda term: term.serial)
    return space.intern("mul", tuple(terms), (scalar, *(powers[t] for t in terms)), dtype, shape)


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
    addends = list(_strip_broadcasts(dict.fromkeys(addends, 1), shape)) if len(set(addends)) > 1 else addends
    return apply(space, "add", tuple(sorted(addends, key=lambda t: t.serial)), (constant,), dtype, shape)


def _strip_broadcasts(powers: Mapping[Term, float], shape: tuple[Size, ...]) -> dict[Term, float]:
    """Operands without the expand and the leading ones that broadcasting supplies anyway."""
    stripped: dict[Term, float] = {}
    for term, power in powers.items():
        term = _unbroadcast(term)
        stripped[term] = stripped.get(term, 0) + power
    if broadcast(term.shape for term in stripped) == shape:
        return stripped
    return dict(powers)


def _unbroadcast(term: Term) -> Term:
    while True:
        if term.op == "expand":
            term = term.args[0]
        elif term.op == "view" and term.shape == (1,) * (len(term.shape) - len(term.args[0].shape)) + (
            term.args[0].shape
        ):
            term = term.args[0]
        else:
            return term


# Layout: what only moves elements


def view(space: Space, term: Term, *size: Size, shape: tuple[Size, ...] = ()) -> Term:
    """The elements of term in the shape `size`; also unsqueeze, squeeze, reshape, flatten, unflatten, [None]."""
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


# The identities. A rule of MUL_RULES sees a product as {factor: power} and scalar; a rule of RULES sees a term.
# It gives the better form, or None. To teach a new identity, write its function and add a line to a table.


def _sigmoid_written_out(space, powers, scalar, dtype):
    """1 / (1 + exp(-x)) -> sigmoid(x)"""
    for term, power in powers.items():
        if power <= -1 and term.op == "add" and term.consts[0].is_number(1) and len(term.args) == 1:
            (e,) = term.args
            if e.op == "exp" and e.args[0].op == "mul" and e.args[0].consts[0].is_number(-1):
                inner = e.args[0]
                x = mul(space, zip(inner.args, inner.consts[1:], strict=True), ONE, inner.dtype, inner.shape)
                sigmoid = apply(space, "sigmoid", (x,), (), dtype, x.shape)
                return _replaced(powers, {term: -1}, sigmoid), scalar
    return None


def _silu(space, powers, scalar, dtype):
    """x * sigmoid(x) -> silu(x)"""
    for term in powers:
        if term.op == "sigmoid" and powers[term] >= 1 and powers.get(term.args[0], 0) >= 1:
            x = term.args[0]
            silu = apply(space, "silu", (x,), (), dtype, x.shape)
            return _replaced(powers, {term: 1, x: 1}, silu), scalar
    return None


def _gelu(space, powers, scalar, dtype):
    """x * (1 + erf(x / sqrt(2))) -> 2 * gelu(x), and the tanh approximation likewise"""
    for term, power in powers.items():
        if power != 1 or term.op != "add" or not term.consts[0].is_number(1) or len(term.args) != 1:
            continue
        inner = term.args[0]
        if inner.op == "erf":
            x = _times(inner.args[0], math.sqrt(0.5))
            kind = "none"
        elif inner.op == "tanh":
            x = _tanh_argument(space, inner.args[0])
            kind = "tanh"
        else:
            continue
        if x is not None and powers.get(x, 0) >= 1:
            gelu = apply(space, "gelu", (x,), (kind,), dtype, x.shape)
            return _replaced(powers, {term: 1, x: 1}, gelu), scalar * Scalar(2.0)
    return None


def _tanh_argument(space: Space, term: Term) -> Term | None:
    """x, if term is sqrt(2 / pi) * (x + 0.044715 * x**3), multiplied out or not."""
    c = math.sqrt(2 / math.pi)
    inner = _times(term, c)
    linear, cubic = 1.0, 0.044715
    if inner is None:
        inner, linear, cubic = term, c, c * 0.044715
    if inner.op == "mul":  # x * (1 + 0.044715 * x**2)
        sums = [t for t in inner.args if t.op == "add" and t.consts[0].is_number(1) and len(t.args) == 1]
        if len(inner.args) == 2 and len(sums) == 1 and inner.consts[1:] == (1, 1) and inner.consts[0] == ONE:
            (x,) = (t for t in inner.args if t is not sums[0])
            square = sums[0].args[0]
            if square.op == "mul" and square.args == (x,) and square.consts[1] == 2:
                return x if square.consts[0].is_number(0.044715) and linear == 1.0 else None
        return None
    if inner.op != "add" or inner.consts[0] != ZERO or len(inner.args) != 2:
        return None
    for x, cube in (inner.args, inner.args[::-1]):
        base = x if linear == 1.0 else _times(x, linear)
        if base is not None and cube.op == "mul" and cube.args == (base,) and cube.consts[1] == 3:
            if cube.consts[0].is_number(cubic):
                return base
    return None


def _times(term: Term, number: float) -> Term | None:
    """x, if term is number * x for one factor x."""
    if term.op == "mul" and len(term.args) == 1 and term.consts[0].is_number(number) and term.consts[1] == 1:
        return term.args[0]
    return None


def _mean(space, powers, scalar, dtype):
    """sum(x, dims) / n -> mean(x, dims), under any power: sqrt(sum) / sqrt(n) too"""
    for term, power in powers.items():
        if term.op != "sum" or scalar.powers or not scalar.value > 0:
            continue
        count = 1
        for dim in term.consts:
            count = count * term.args[0].shape[dim]
        if isinstance(count, int) and count > 1 and close(scalar.value, float(count) ** -power):
            mean = apply(space, "mean", term.args, term.consts, term.dtype, term.shape)
            return _replaced(powers, {term: power}, mean, power), ONE
    return None


def _replaced(powers: Mapping[Term, float], used: Mapping[Term, float], by: Term, power: float = 1):
    left = dict(powers)
    for term, amount in used.items():
        left[term] = left[term] - amount
        if not left[term]:
            del left[term]
    left[by] = left.get(by, 0) + power
    return left


MUL_RULES = (_sigmoid_written_out, _silu, _gelu, _mean)


def _rotate_half(space: Space, term: Term) -> Term | None:
    """cat(-hi, lo) -> rotate_half(x); cat(hi, -lo), the opposite rotation -> -rotate_half(x)"""
    if len(term.args) != 2 or term.consts != (-1,):
        return None
    first, second = term.args
    for sign, hi, lo in ((ONE, _negated(first), second), (MINUS_ONE, first, _negated(second))):
        if hi is None or lo is None or not _same_source(hi, lo):
            continue
        (x,), (low, middle), (start, stop) = hi.args, lo.consts[1:3], hi.consts[1:3]
        if start == middle and middle - low == stop - middle and {lo.consts[3], hi.consts[3]} == {1}:
            x = slice_(space, x, -1, low, stop, 1)
            rotated = space.intern("rotate_half", (x,), (), x.dtype, x.shape)
            return mul(space, ((rotated, 1),), sign, x.dtype, x.shape)
    return None


def _rotate_pairs(space: Space, term: Term) -> Term | None:
    """stack(-x[1::2], x[::2], -1) flattened -> rotate_pairs(x), the rotation of interleaved pairs"""
    pair = term.args[0]
    if pair.op != "cat" or pair.consts != (-1,) or len(pair.args) != 2 or pair.shape[-1] != 2:
        return None
    odd, even = _negated(pair.args[0]), _unstacked(pair.args[1])
    odd = None if odd is None else _unstacked(odd)
    if odd is None or even is None or not _same_source(odd, even):
        return None
    (x,), (start, stop) = even.args, even.consts[1:3]
    if even.consts[3] == odd.consts[3] == 2 and odd.consts[1:3] == (start + 1, stop):
        x = slice_(space, x, -1, start, stop, 1)
        if term.shape == x.shape:
            return space.intern("rotate_pairs", (x,), (), x.dtype, x.shape)
    return None


def _same_source(a: Term, b: Term) -> bool:
    """Two slices of the channels of one term."""
    return a.op == b.op == "slice" and a.args == b.args and a.consts[0] == b.consts[0] == -1


def _unstacked(term: Term) -> Term | None:
    """x, if term is x with a dimension of one added at the end."""
    if term.op == "view" and term.shape == (*term.args[0].shape, 1):
        return term.args[0]
    return None


def _negated(term: Term) -> Term | None:
    if term.op == "mul" and len(term.args) == 1 and term.consts == (MINUS_ONE, 1):
        return term.args[0]
    return None


def _negated_view(space: Space, term: Term) -> Term | None:
    """view(-x) -> -view(x): a sign commutes with what moves elements"""
    x = _negated(term.args[0])
    if x is None:
        return None
    return mul(space, ((view(space, x, *term.consts), 1),), MINUS_ONE, term.dtype, term.shape)


def _linear_of_rows(space: Space, term: Term) -> Term | None:
    """view(linear(view(x, (n, h)), w), (..., o)) -> linear(x, w): flattening tokens changes no value"""
    inner = term.args[0]
    if inner.op != "linear" or inner.args[0].op != "view" or term.shape[-1:] != inner.shape[-1:]:
        return None
    x = inner.args[0].args[0]
    if x.shape[:-1] != term.shape[:-1] or x.shape[-1:] != inner.args[0].shape[-1:]:
        return None
    return apply(space, "linear", (x, *inner.args[1:]), (), inner.dtype, term.shape)


def _matmul_is_linear(space: Space, term: Term) -> Term | None:
    """x @ w.T -> linear(x, w) for a matrix w, and x @ w -> linear(x, w.T)"""
    x, w = term.args
    if len(w.shape) != 2 or len(x.shape) < 2:
        return None
    return apply(space, "linear", (x, permute(space, w, -1, -2), space.none), (), term.dtype, term.shape)


def _linear_with_bias(space: Space, term: Term) -> Term | None:
    """linear(x, w) + b -> linear(x, w, b) for a vector b"""
    if len(term.args) != 2 or term.consts[0] != ZERO:
        return None
    for product, bias in (term.args, term.args[::-1]):
        if product.op == "linear" and product.args[2] is space.none and bias.shape == product.shape[-1:]:
            return apply(space, "linear", (*product.args[:2], bias), (), term.dtype, term.shape)
    return None


def _nll_of_log_softmax(space: Space, term: Term) -> Term | None:
    """nll_loss(log_softmax(x), t) -> cross_entropy(x, t)"""
    scores, target, weight = term.args
    if scores.op != "log_softmax" or scores.consts != (-1,):
        return None
    return apply(
        space, "cross_entropy", (scores.args[0], target, weight), (*term.consts, 0.0), term.dtype, term.shape
    )


def _loss_over_tokens(space: Space, term: Term) -> Term | None:
    """cross_entropy(view(x, (n, v)), t) -> cross_entropy(x, t): a loss takes its tokens in any leading shape"""
    logits, target, weight = term.args
    casts = []
    while logits.op == "cast":
        casts.append(logits.dtype)
        logits = logits.args[0]
    before = logits, target
    if logits.op == "view" and logits.shape[-1:] == logits.args[0].shape[-1:]:
        logits = logits.args[0]
    if target.op == "view" and term.consts[1] != "none":  # a loss for each token has the target's shape
        target = target.args[0]
    if (logits, target) == before:
        return None
    for dtype in reversed(casts):
        logits = cast(space, logits, dtype)
    return apply(space, "cross_entropy", (logits, target, weight), term.consts, term.dtype, term.shape)


def _slice_before_head(space: Space, term: Term) -> Term | None:
    """The logits of some tokens are the head applied to these tokens; the same of a slice of the vocabulary"""
    logits = _sliced_head(space, term.args[0])
    if logits is None:
        return None
    return apply(space, "cross_entropy", (logits, *term.args[1:]), term.consts, term.dtype, term.shape)


def _sliced_head(space: Space, term: Term) -> Term | None:
    """term with the slices on its way to a linear taken of the linear's arguments; None if there are none."""
    if term.op == "slice":
        inner, (dim, *bounds) = term.args[0], term.consts
        if inner.op == "linear":
            x, w, b = inner.args
            if dim != -1:
                x = slice_(space, x, dim, *bounds)
            else:
                w = slice_(space, w, -2, *bounds)
                b = b if b is space.none else slice_(space, b, -1, *bounds)
            return apply(space, "linear", (x, w, b), (), term.dtype, term.shape)
        if inner.op in ("mul", "tanh", "cast") and len(inner.args) == 1:
            sliced = slice_(space, inner.args[0], *term.consts)
            return _rebuilt(space, inner, _sliced_head(space, sliced) or sliced)
        return None
    if term.op in ("mul", "tanh", "cast") and len(term.args) == 1:
        better = _sliced_head(space, term.args[0])
        return None if better is None else _rebuilt(space, term, better)
    return None


def _rebuilt(space: Space, term: Term, arg: Term) -> Term:
    """The elementwise `term` of one argument, of another argument."""
    if term.op == "cast":
        return cast(space, arg, term.dtype)
    if term.op == "mul":
        return mul(space, ((arg, term.consts[1]),), term.consts[0], term.dtype, arg.shape)
    return apply(space, term.op, (arg,), term.consts, term.dtype, arg.shape)


RULES: Mapping[str, tuple[Callable[[Space, Term], Term | None], ...]] = {
    "cat": (_rotate_half,),
    "view": (_negated_view, _rotate_pairs, _linear_of_rows),
    "matmul": (_matmul_is_linear,),
    "add": (_linear_with_bias,),
    "nll_loss": (_nll_of_log_softmax,),
    "cross_entropy": (_loss_over_tokens, _slice_before_head),
}
