"""Identities that map equivalent computations to one term: the tables at the end of this file.

A rule in MUL_RULES receives the factors of a product, in the form of normalize.py, and a scalar; a rule in RULES
receives a term. A rule returns the canonical form, or None. To add an identity, write a function whose docstring states
the identity, and add the function to a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from liger_compile.terms.attention import written_out
from liger_compile.terms.normalize import (
    MINUS_ONE,
    ONE,
    ZERO,
    Factor,
    Factors,
    add,
    apply,
    cast,
    cat,
    is_negative,
    make_uncast,
    mul,
    permute,
    slice_,
    view,
)
from liger_compile.terms.scalars import is_whole
from liger_compile.terms.term import Scalar, Size, Space, Term, close

# The ignore_index of a cross_entropy that ignores nothing: a gather at -100, as masked labels have it, is an error.
NO_CLASS = -(2**31)


def new_space(*, strict: bool = True) -> Space:
    """Returns an empty space whose terms the identities of this file normalize."""
    return Space(make_uncast, RULES, MUL_RULES, strict)


def _sigmoid_written_out(space, factors, scalar, dtype):
    """Rewrites 1 / (1 + exp(-x)) -> sigmoid(x)."""
    for term, power in factors:
        is_shifted = term.op == "add" and term.consts[0].is_number(1, dtype) and len(term.args) == 1
        if power == -1 and is_shifted:
            (e,) = term.args
            exponent = e.args[0] if e.op == "exp" else term
            inner = exponent.args[0] if exponent.op == "cast" else exponent  # a sign is inside a cast
            if inner.op == "mul" and inner.consts[0].is_number(-1, inner.dtype):
                x = mul(space, ((exponent, 1),), MINUS_ONE, exponent.dtype, exponent.shape)
                sigmoid = apply(space, "sigmoid", (x,), (), dtype, x.shape)
                return _replaced(factors, [(term, -1)], sigmoid), scalar
    return None


def _silu(space, factors, scalar, dtype):
    """Rewrites x * sigmoid(x) -> silu(x)."""
    for term, power in factors:
        if term.op == "sigmoid" and power == 1 and (term.args[0], 1) in factors:
            x = term.args[0]
            silu = apply(space, "silu", (x,), (), dtype, x.shape)
            return _replaced(factors, [(term, 1), (x, 1)], silu), scalar
    return None


def _gelu(space, factors, scalar, dtype):
    """Rewrites 0.5 * x * (1 + erf(x / sqrt(2))) -> gelu(x), and the tanh approximation likewise.

    Any other number than 0.5 leaves twice that number as a factor. A product without a number is not rewritten: as 2 *
    gelu(x), half of it would be a product with 1, and the two numbers would stay.
    """
    for factor, times in factors.items() if abs(scalar.value) != 1 else ():
        term, _ = factor
        if (factor, times) != ((term, 1), 1) or term.op != "add" or len(term.args) != 1:
            continue
        if not term.consts[0].is_number(1, dtype):
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
        if x is not None and (x, 1) in factors:
            gelu = apply(space, "gelu", (x,), (kind,), dtype, x.shape)
            return _replaced(factors, [(term, 1), (x, 1)], gelu), scalar * Scalar(2.0)
    return None


def _tanh_argument(space: Space, term: Term) -> Term | None:
    """Returns x if term is sqrt(2 / pi) * (x + 0.044715 * x**3), in one of its factored forms; otherwise None."""
    c, cubic = math.sqrt(2 / math.pi), 0.044715
    if term.op == "mul" and term.consts[0].is_number(c, term.dtype):
        inner = mul(space, zip(term.args, term.consts[1:], strict=True), ONE, term.dtype, term.shape)
        if inner.op == "mul":  # x * (1 + 0.044715 * x**2)
            for x, factor in (inner.args, inner.args[::-1]) if len(inner.args) == 2 else ():
                is_sum = factor.op == "add" and factor.consts[0].is_number(1, factor.dtype)
                is_sum = is_sum and len(factor.args) == 1
                if is_sum and inner.consts[1:] == (1, 1) and _is_power(factor.args[0], x, 2, cubic):
                    return x
            return None
        return next((x for x, cube in _addends(inner) if _is_power(cube, x, 3, cubic)), None)
    for scaled, cube in _addends(term):  # sqrt(2 / pi) * x + ...
        x = _times(scaled, c)
        if x is not None and _is_power(cube, x, 3, c * cubic):
            return x
    return None


def _addends(term: Term) -> tuple[tuple[Term, Term], ...]:
    """Returns both orders of the two addends of a sum; empty for other terms."""
    if term.op != "add" or term.consts[0] != ZERO or len(term.args) != 2:
        return ()
    first, second = term.args
    return (first, second), (second, first)


def _is_power(term: Term, x: Term, power: float, scale: float) -> bool:
    """Returns whether term is scale * x ** power, in any order of multiplication."""
    number, times = _monomial(term, x)
    return times == power and close(number, scale, term.dtype)


def _monomial(term: Term, x: Term, depth: int = 4) -> tuple[float, float]:
    """Returns the number and the power of x in a product of both only, without roots and inverses; otherwise NaN."""
    if term is x:
        return 1.0, 1.0
    if term.op != "mul" or not depth or term.consts[0].powers or not all(map(is_whole, term.consts[1:])):
        return math.nan, math.nan
    number, power = term.consts[0].value, 0.0
    for factor, times in zip(term.args, term.consts[1:], strict=True):
        inner, inner_power = _monomial(factor, x, depth - 1)
        number, power = number * inner**times, power + inner_power * times
    return number, power


def _times(term: Term, number: float) -> Term | None:
    """Returns x if term is number * x for one factor x; otherwise None."""
    is_product = term.op == "mul" and len(term.args) == 1 and term.consts[1] == 1
    return term.args[0] if is_product and term.consts[0].is_number(number, term.dtype) else None


def _mean(space, factors, scalar, dtype):
    """Rewrites sum(x, dims) / n -> mean(x, dims), also under a root: sqrt(sum) / sqrt(n); with or without keepdim.

    Excludes float16, where the sum may overflow although the mean does not.
    """
    for (term, power), times in factors.items():
        total = term.args[0] if term.op == "view" else term
        if total.op != "sum" or times != 1 or scalar.powers or total.dtype is torch.float16:
            continue
        count = _product(total.args[0].shape[dim] for dim in total.consts)
        is_known = isinstance(count, int) and count > 1 and abs(power) <= 1
        if is_known and close(scalar.value, float(count) ** -power, dtype):
            mean = apply(space, "mean", total.args, total.consts, total.dtype, total.shape)
            return _replaced(factors, [(term, power)], view(space, mean, *term.shape), power), ONE
    return None


def _product(sizes: Iterable[Size]) -> Size:
    count: Size = 1
    for size in sizes:
        count = count * size
    return count


def _replaced(factors: Factors, used: Iterable[Factor], by: Term, power: float = 1) -> Factors:
    left = dict(factors)
    for factor in used:
        left[factor] -= 1
        if not left[factor]:
            del left[factor]
    left[by, power] = left.get((by, power), 0) + 1
    return left


MUL_RULES = (_sigmoid_written_out, _silu, _gelu, _mean)


def _rotate_half(space: Space, term: Term) -> Term | None:
    """Rewrites cat(-hi, lo) -> rotate_half(x), and the opposite rotation cat(hi, -lo) -> -rotate_half(x)."""
    if len(term.args) != 2 or term.consts != (-1,):
        return None
    first, second = term.args
    for sign, hi, lo in ((ONE, _negated(first), second), (MINUS_ONE, first, _negated(second))):
        if hi is None or lo is None or not _same_source(hi, lo):
            continue
        (x,), (_, low, middle, lo_step), (_, start, stop, hi_step) = hi.args, lo.consts, hi.consts
        if start == middle and middle - low == stop - middle and {lo_step, hi_step} == {1}:
            x = slice_(space, x, -1, low, stop, 1)
            rotated = space.intern("rotate_half", (x,), (), x.dtype, x.shape)
            return mul(space, ((rotated, 1),), sign, x.dtype, x.shape)
    return None


def _rotate_pairs(space: Space, term: Term) -> Term | None:
    """Rewrites flattened stack(-x[1::2], x[::2], -1) -> rotate_pairs(x), the rotation of interleaved pairs."""
    pair = term.args[0]
    if pair.op != "cat" or pair.consts != (-1,) or len(pair.args) != 2 or pair.shape[-1] != 2:
        return None
    odd, even = _negated(pair.args[0]), _unstacked(pair.args[1])
    odd = None if odd is None else _unstacked(odd)
    x = None if odd is None or even is None else _interleaved(space, even, odd)
    if x is None or term.shape != x.shape:
        return None
    return space.intern("rotate_pairs", (x,), (), x.dtype, x.shape)


def _complex_of_pairs(space: Space, term: Term) -> Term | None:
    """Rewrites complex(x[..., ::2], x[..., 1::2]) -> view_as_complex of the pairs of x."""
    x = _interleaved(space, *term.args)
    if x is None:
        return None
    pairs = view(space, x, *term.shape, 2)
    return apply(space, "view_as_complex", (pairs,), (), term.dtype, term.shape)


def _pairs_of_complex(space: Space, term: Term) -> Term | None:
    """Rewrites stack((z.real, z.imag), -1) -> view_as_real(z)."""
    if len(term.args) != 2 or term.consts != (-1,):
        return None
    real, imag = map(_unstacked, term.args)
    if real is None or imag is None or (real.op, imag.op) != ("real", "imag") or real.args != imag.args:
        return None
    return apply(space, "view_as_real", real.args, (), term.dtype, term.shape)


def _interleaved(space: Space, even: Term, odd: Term) -> Term | None:
    """Returns x if even and odd are x[..., ::2] and x[..., 1::2]; otherwise None."""
    if even.op == odd.op == "cast" and even.may_be_passed:
        x = _interleaved(space, even.args[0], odd.args[0])
        return None if x is None else cast(space, x, even.dtype)
    if not _same_source(even, odd):
        return None
    (x,), (dim, start, stop, step) = even.args, even.consts
    is_interleaved = step == 2 and odd.consts == (dim, start + 1, stop, step)
    return slice_(space, x, -1, start, stop, 1) if is_interleaved else None


def _same_source(a: Term, b: Term) -> bool:
    """Returns whether two terms are slices of the channels of one term."""
    return a.op == b.op == "slice" and a.args == b.args and a.consts[0] == b.consts[0] == -1


def _unstacked(term: Term) -> Term | None:
    """Returns x if term is x with a dimension of size one added at the end; otherwise None."""
    if term.op == "view" and term.shape == (*term.args[0].shape, 1):
        return term.args[0]
    return None


def _negated(term: Term) -> Term | None:
    return term.args[0] if is_negative(term) else None


def _view_of_elementwise(space: Space, term: Term) -> Term | None:
    """Rewrites view(f(x)) -> f(view(x)) for an elementwise f of one tensor: -x, x**2, x + 1, relu(x)."""
    inner = term.args[0]
    if inner.op not in ELEMENTWISE or len(inner.args) != 1 or inner.args[0].shape != inner.shape:
        return None
    return _rebuilt(space, inner, view(space, inner.args[0], *term.shape))


def _linear_of_rows(space: Space, term: Term) -> Term | None:
    """Rewrites view(linear(view(x, (n, h)), w), (..., o)) -> linear(x, w): flattened tokens have equal values."""
    inner = term.args[0]
    if inner.op != "linear" or term.shape[-1:] != inner.shape[-1:]:
        return None
    rows = inner.args[0]
    x = view(space, rows, *term.shape[:-1], rows.shape[-1])
    if x.op == "view" or (rows.op != "view" and not _views(rows)):
        return None  # the view does not flatten tokens
    return apply(space, "linear", (x, *inner.args[1:]), (), inner.dtype, term.shape)


def _product_of_batches(space: Space, term: Term) -> Term | None:
    """Rewrites view(x @ y, (b, h, t, s)) -> view(x, (b, h, t, d)) @ view(y, (b, h, d, s)): other batch dimensions."""
    inner = term.args[0]
    if inner.op != "matmul" or len(inner.shape) < 3 or term.shape[-2:] != inner.shape[-2:]:
        return None
    if any(factor.shape[:-2] != inner.shape[:-2] for factor in inner.args):
        return None
    batches = term.shape[:-2]
    factors = tuple(
        permute(space, view(space, factor.args[0], *batches, *factor.args[0].shape[-2:]), -1, -2)
        if factor.op == "permute" and factor.consts == (-1, -2)
        else view(space, factor, *batches, *factor.shape[-2:])
        for factor in inner.args
    )
    return apply(space, "matmul", factors, (), inner.dtype, term.shape)


def _softmax_of_batches(space: Space, term: Term) -> Term | None:
    """Rewrites view(softmax(x, -1), (b, h, t, s)) -> softmax(view(x, (b, h, t, s)), -1): other batch dimensions."""
    inner = term.args[0]
    if inner.op != "softmax" or inner.consts != (-1,) or term.shape[-1:] != inner.shape[-1:]:
        return None
    x = view(space, inner.args[0], *term.shape)
    return apply(space, "softmax", (x,), inner.consts, inner.dtype, term.shape)


def _views(term: Term) -> bool:
    """Returns whether a term is elementwise functions of a view."""
    while term.op in ELEMENTWISE and len(term.args) == 1 and term.may_be_passed:
        term = term.args[0]
    return term.op == "view"


def _slice_of_groups(space: Space, term: Term) -> Term | None:
    """Rewrites view(x, (..., n, h))[..., i:j, :] -> x[..., i * h : j * h]."""
    grouped, (dim, start, stop, step) = term.args[0], term.consts
    x = _ungrouped(space, grouped, dim) if dim < -1 and step == 1 else None
    if x is None:
        return None
    inner = _product(grouped.shape[dim + 1 :])
    return view(space, slice_(space, x, -1, start * inner, stop * inner, 1), *term.shape)


def _slice_of_each_group(space: Space, term: Term) -> Term | None:
    """Rewrites view(x, (..., n, h))[..., i] -> x[..., i::h]."""
    grouped, (dim, start, stop, step) = term.args[0], term.consts
    size = grouped.shape[-1]
    if dim != -1 or step != 1 or stop - start != 1 or not isinstance(size, int):
        return None
    x = _ungrouped(space, grouped, -2)
    return None if x is None else view(space, slice_(space, x, -1, start, x.shape[-1], size), *term.shape)


def _ungrouped(space: Space, grouped: Term, dim: int) -> Term | None:
    """Returns x if `grouped` is a view of x with all or some channels in groups from `dim` on; otherwise None."""
    if grouped.op != "view" or len(grouped.shape) < 2:
        return None
    channels, width = _product(grouped.shape[dim:]), grouped.args[0].shape[-1:]
    if (
        not (width and isinstance(channels, int) and channels and isinstance(width[0], int))
        or width[0] % channels
    ):
        return None
    return view(space, grouped, *grouped.shape[:dim], channels)


def _cat_of_groups(space: Space, term: Term) -> Term | None:
    """Rewrites flattened stack((a, b), -2) -> cat((a, b), -1)."""
    joined = term.args[0]
    if joined.op != "cat" or joined.consts == (-1,):
        return None
    (dim,) = joined.consts
    inner = _product(joined.shape[dim + 1 :])
    if term.shape != (*joined.shape[:dim], joined.shape[dim] * inner):
        return None
    parts = (view(space, part, *part.shape[:dim], part.shape[dim] * inner) for part in joined.args)
    return cat(space, *parts, -1, shape=term.shape)


def _matmul_is_linear(space: Space, term: Term) -> Term | None:
    """Rewrites x @ w.T -> linear(x, w) for a matrix w, and x @ w -> linear(x, w.T)."""
    x, w = term.args
    if len(w.shape) != 2 or len(x.shape) < 2:
        return None
    return apply(space, "linear", (x, permute(space, w, -1, -2), space.none), (), term.dtype, term.shape)


def _linear_with_bias(space: Space, term: Term) -> Term | None:
    """Rewrites linear(x, w) + b -> linear(x, w, b) for a vector b."""
    if len(term.args) != 2 or term.consts[0] != ZERO:
        return None
    for product, bias in (term.args, term.args[::-1]):
        if product.op == "linear" and bias.shape == product.shape[-1:]:
            x, weight, other_bias = product.args
            if other_bias is space.none:
                return apply(space, "linear", (x, weight, bias), (), term.dtype, term.shape)
    return None


def _nll_of_log_softmax(space: Space, term: Term) -> Term | None:
    """Rewrites nll_loss(log_softmax(x), t) -> cross_entropy(x, t)."""
    scores, target, weight = term.args
    if scores.op == "view" and scores.shape[-1:] == scores.args[0].shape[-1:]:
        scores = scores.args[0]
    if scores.op != "log_softmax" or scores.consts != (-1,):
        return None
    args = (scores.args[0], target, weight)
    return apply(space, "cross_entropy", args, (*term.consts, 0.0), term.dtype, term.shape)


def _gathered_log_softmax(space: Space, term: Term) -> Term | None:
    """Rewrites gather(log_softmax(x), t) -> -cross_entropy(x, t) per token; every index is a class."""
    scores, index = term.args
    if scores.op != "log_softmax" or scores.consts != term.consts or not _picks_one(term):
        return None
    return _picked_loss(space, scores.args[0], index, term, MINUS_ONE)


def _logsumexp_less_gathered(space: Space, term: Term) -> Term | None:
    """Rewrites logsumexp(x) - gather(x, t) -> cross_entropy(x, t) per token."""
    for total, picked in _addends(term):
        total, logits = _unviewed(total), _unviewed(_negated(picked) or total)
        is_loss = total.op == "logsumexp" and logits.op == "gather" and _picks_one(logits)
        if is_loss and total.args[0] is logits.args[0] and total.consts == logits.consts:
            scores, index = logits.args
            return _picked_loss(space, scores, index, term, ONE)
    return None


def _picks_one(gathered: Term) -> bool:
    """Returns whether a gather takes one class of every token, and not only of some tokens."""
    scores, index = gathered.args
    return gathered.consts == (-1,) and index.shape == (*scores.shape[:-1], 1)


def _picked_loss(space: Space, logits: Term, index: Term, like: Term, sign: Scalar) -> Term:
    target, dtype = view(space, index, *index.shape[:-1]), logits.dtype
    args, consts = (logits, target, space.none), (NO_CLASS, "none", 0.0)
    loss = apply(space, "cross_entropy", args, consts, dtype, target.shape)
    return view(space, mul(space, ((loss, 1),), sign, dtype, target.shape), *like.shape)


def _unviewed(term: Term) -> Term:
    return term.args[0] if term.op == "view" else term


def _loss_over_tokens(space: Space, term: Term) -> Term | None:
    """Rewrites cross_entropy(view(x, (n, v)), view(t, n)) -> cross_entropy(x, t), with any leading dimensions."""
    logits, target, weight = term.args
    better = _over_tokens(space, logits)
    is_flat = target.op == "view" and term.consts[1] != "none"  # an unreduced loss has the target's shape
    if better is None and not is_flat:
        return None
    args = (better or logits, target.args[0] if is_flat else target, weight)
    return apply(space, "cross_entropy", args, term.consts, term.dtype, term.shape)


def _over_tokens(space: Space, term: Term) -> Term | None:
    """Returns the logits without the views and slices between head and loss, or None if there are none.

    The result may have other leading dimensions. Slices of tokens apply to the hidden states instead.
    """
    inner = term.args[0] if term.args else term
    if not term.may_be_passed:
        return None
    if term.op == "view" and term.shape[-1:] == inner.shape[-1:]:
        return _over_tokens(space, inner) or inner
    if term.op == "linear" and inner.op == "view" and inner.shape[-1:] == inner.args[0].shape[-1:]:
        return _linear(space, term, inner.args[0], *term.args[1:])
    if term.op == "slice" and inner.op == "linear":
        x, w, b = inner.args
        dim, *bounds = term.consts
        if dim != -1:
            sliced = _linear(space, inner, slice_(space, x, dim, *bounds), w, b)
        else:  # a slice of the vocabulary
            b = b if b is space.none else slice_(space, b, -1, *bounds)
            sliced = _linear(space, inner, x, slice_(space, w, -2, *bounds), b)
        return _over_tokens(space, sliced) or sliced
    if term.op == "slice" and _scales(inner):
        sliced = slice_(space, inner.args[0], *term.consts)
        return _rebuilt(space, inner, _over_tokens(space, sliced) or sliced)
    if _scales(term):
        better = _over_tokens(space, inner)
        return None if better is None else _rebuilt(space, term, better)
    return None


def _scales(term: Term) -> bool:
    """Returns whether a term scales, caps or upcasts logits."""
    return term.op in ("mul", "tanh", "cast") and len(term.args) == 1


def _linear(space: Space, like: Term, x: Term, w: Term, b: Term) -> Term:
    shape = (*x.shape[:-1], w.shape[-2])
    return apply(space, "linear", (x, w, b), (), like.dtype, shape)


def _rebuilt(space: Space, term: Term, arg: Term) -> Term:
    """Returns the elementwise operation of `term`, applied to `arg`."""
    if term.op == "cast":
        return cast(space, arg, term.dtype)
    if term.op == "mul":
        return mul(space, ((arg, term.consts[1]),), term.consts[0], term.dtype, arg.shape)
    if term.op == "add":
        return add(space, (arg,), term.consts[0], term.dtype, arg.shape)
    return apply(space, term.op, (arg,), term.consts, term.dtype, arg.shape)


ELEMENTWISE = frozenset(
    ("mul", "add", "exp", "log", "erf", "cos", "sin", "tanh", "relu", "sigmoid", "silu", "gelu")
)

RULES: Mapping[str, tuple[Callable[[Space, Term], Term | None], ...]] = {
    "cat": (_rotate_half, _pairs_of_complex),
    "complex": (_complex_of_pairs,),
    "slice": (_slice_of_groups, _slice_of_each_group),
    "view": (
        _view_of_elementwise,
        _cat_of_groups,
        _rotate_pairs,
        _linear_of_rows,
        _product_of_batches,
        _softmax_of_batches,
    ),
    "matmul": (_matmul_is_linear, written_out),
    "add": (_linear_with_bias, _logsumexp_less_gathered),
    "gather": (_gathered_log_softmax,),
    "nll_loss": (_nll_of_log_softmax,),
    "cross_entropy": (_loss_over_tokens,),
}
