"""What an attention mask means: its term, read as a relation between the positions of queries and keys.

Every entry of a mask is a function of its coordinates, and the reader pushes symbolic coordinates down the term
until only positions, sizes and constants are left: arange gives the coordinate, a view moves it, a comparison makes
a linear inequality of it. So the relation holds for every size that the graph is valid for: nothing is evaluated,
and no guard is added. What is not understood is named, and the mask then means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch

from liger_compile.terms.term import ConstVar, Scalar, Size, Space, Term

# Scores would have to be as large for a mask that adds this to let anything through: finfo.min of float32 and bfloat16.
HIDES = -1e30
# Positions stay far from where int32 wraps around: no mask of two million queries by as many keys exists.
MAX_COEFFICIENT, MAX_CONSTANT = 64, 2**30
MAX_ALTERNATIVES = 16

# What masks are made of beside constants, sizes and named values: what the reader below reads.
_OF_NUMBERS = ("arange", "full", "number", "cast", "add", "mul", "cumsum", "diff", "index")
_OF_TRUTHS = ("le", "lt", "eq", "not", "and", "or", "where", "tril", "triu")
OPERATIONS = frozenset((*_OF_NUMBERS, *_OF_TRUTHS, "none", "expand", "view", "permute", "slice"))

_BUT_FOR_PADDING = {"causal": "is causal", "all": "hides nothing", "window": "is causal within a window"}
_NAMES = {-1: "key", -2: "query", -3: "head", -4: "batch"}


@dataclass(frozen=True)
class Meaning:
    """What a mask lets through: of S keys to each of T queries.

    causal: just the keys j <= i to query i, and T is S; window: of these the last `window`; all: everything.
    unknown: anything else, or what could not be read; `reason` is the sentence.
    `padding` and `masks` name the values, if it is them alone that make it unknown. `padding` says of each key whether
    it is there: were it all ones, the mask would be causal, or let everything through. `masks` have an entry for each
    query and key, as masks themselves have: what they mean is not to be seen here.
    """

    kind: Literal["causal", "window", "all", "unknown"]
    reason: str = ""
    window: int | ConstVar | None = None  # a number, or a pattern's capture of one
    padding: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()


def mask_meaning(space: Space, mask: Term, queries: Size, keys: Size) -> Meaning:
    """What `mask` means, boolean or added to the scores, broadcast to (..., queries, keys)."""
    key = ("mask", mask, queries, keys)
    if key not in space.found_out:
        try:
            space.found_out[key] = _Reader(space, mask, queries, keys).meaning()
        except _UnreadError as why:
            known = _but_for_inputs(space, mask, queries, keys, str(why))
            space.found_out[key] = known or Meaning("unknown", str(why))
    return space.found_out[key]


def _but_for_inputs(space: Space, mask: Term, queries: Size, keys: Size, why: str) -> Meaning | None:
    """What a mask means that is known but for padding, or for masks in it; None if it is not."""
    try:
        reader = _Reader(space, mask, queries, keys, but_for_inputs=True)
        kind = reader.meaning().kind
    except _UnreadError:
        return None
    padding, masks = tuple(sorted(reader.padding)), tuple(sorted(reader.masks))
    if masks:
        return Meaning("unknown", why, padding=padding, masks=masks)
    if kind not in _BUT_FOR_PADDING:
        return None
    reason = f"it {_BUT_FOR_PADDING[kind]} but for the padding in {' and '.join(padding)}"
    return Meaning("unknown", reason, padding=padding)


class _UnreadError(Exception):
    """What could not be read, in a sentence."""


@dataclass(frozen=True)
class _Linear:
    """constant + sum(coefficient * part): a part is a coordinate, by its dimension (-1), or a symbolic size."""

    constant: float
    parts: frozenset[tuple[int | sympy.Expr, int]] = frozenset()

    def plus(self, other: _Linear, times: float = 1) -> _Linear:
        parts = dict(self.parts)
        for part, coefficient in other.parts:
            parts[part] = parts.get(part, 0) + int(times) * coefficient
        constant = self.constant + times * other.constant
        return _Linear(constant, frozenset((part, c) for part, c in parts.items() if c))

    def __str__(self) -> str:
        ordered = sorted(self.parts, key=str)
        text = " ".join(f"{c:+d}*{_NAMES.get(p, p) if isinstance(p, int) else p}" for p, c in ordered)
        return f"{text} {self.constant:+g}".strip()


_ZERO = _Linear(0)
_POSITION = tuple(_Linear(0, frozenset(((dim, 1),))) for dim in (-2, -1))  # of a score: its query and key

# Any of these, each of which is: all of these linear forms are <= 0.
_Condition = frozenset[frozenset[_Linear]]
_TRUE: _Condition = frozenset((frozenset(),))
_FALSE: _Condition = frozenset()

_Cases = tuple[tuple[_Condition, _Linear], ...]  # the value under each of the conditions, one of which holds
_At = tuple[_Linear, ...]  # where a term is read: its coordinates


class _Capture(sympy.Symbol):
    """A number that a pattern's search takes: positive, as far as its mask means anything."""


def _of_number(scalar: Any) -> _Linear:
    if scalar.value == 1 and len(scalar.powers) == 1 and scalar.powers[0][1] == 1:
        return _Linear(0, frozenset(((_Capture(scalar.powers[0][0], integer=True, positive=True), 1),)))
    return _Linear(_plain(scalar))


def _of_size(size: Size) -> _Linear:
    if isinstance(size, int):
        return _Linear(size)
    constant, parts = 0, {}
    for part, coefficient in sympy.expand(size).as_coefficients_dict().items():
        if not coefficient.is_Integer:
            raise _UnreadError(f"it depends on the size {size}, which is no sum of sizes")
        if part == 1:
            constant = int(coefficient)
        else:
            parts[part] = int(coefficient)
    return _Linear(constant, frozenset(parts.items()))


class _Reader:
    """Reads one mask; its coordinates range over the sizes of the scores that it is applied to."""

    def __init__(
        self, space: Space, mask: Term, queries: Size, keys: Size, *, but_for_inputs: bool = False
    ) -> None:
        if len(mask.shape) < 2 or mask.shape[-1] not in (1, keys) or mask.shape[-2] not in (1, queries):
            shape = ", ".join(map(str, mask.shape))
            raise _UnreadError(f"its shape ({shape}) is not that of {queries} queries and {keys} keys")
        self.space, self.mask, self.is_square = space, mask, queries == keys
        self.sizes = {dim: _of_size(mask.shape[dim]) for dim in range(-len(mask.shape), 0)}
        self.sizes.update({-1: _of_size(keys), -2: _of_size(queries)})
        self.but_for_inputs = but_for_inputs
        self.padding: set[str] = set()  # the flags that were taken for ones
        self.masks: set[str] = (
            set()
        )  # masks that were taken for true, or zeros: what is made of them is unknown

    def meaning(self) -> Meaning:
        at = tuple(_Linear(0, frozenset(((dim, 1),))) for dim in sorted(self.sizes))
        if self.mask.dtype is torch.bool:
            condition = self.truth(self.mask, at)
        else:
            condition = _FALSE
            for case, value in self.number(self.mask, at):
                if value.parts or not (value.constant == 0 or value.constant <= HIDES):
                    raise _UnreadError(f"it adds {value} to the scores")
                condition = self.any_of(condition, case) if value.constant == 0 else condition
        return self._classified(condition)

    def _classified(self, condition: _Condition) -> Meaning:
        if condition == _TRUE:
            return Meaning("all")
        causal = _Linear(0, frozenset(((-1, 1), (-2, -1))))
        alternatives = [sorted(forms, key=lambda form: form != causal) for forms in condition]
        if len(alternatives) == 1 and alternatives[0][0] == causal:
            (_, *others) = alternatives[0]
            if not self.is_square:
                return Meaning("unknown", "it is causal, but there are not as many queries as keys")
            if not others:
                return Meaning("causal")
            window = _ZERO.plus(others[0].plus(causal), -1).plus(_Linear(1)) if len(others) == 1 else None
            size = None if window is None else _window_size(window)
            if size is not None:
                reason = f"it is causal within a window of {size}, which may be smaller than the sequence"
                return Meaning("window", reason, size)
        text = " or ".join(" and ".join(f"{form} <= 0" for form in forms) for forms in alternatives)
        return Meaning("unknown", f"it is no causal mask: it lets through {text or 'nothing'}")

    # Inequalities

    def holds(self, form: _Linear) -> bool:
        """Whether form <= 0 at all coordinates, whatever the sizes."""
        most = _Linear(form.constant)
        for part, coefficient in form.parts:
            if not isinstance(part, int):
                most = most.plus(_Linear(0, frozenset(((part, 1),))), coefficient)
            elif coefficient > 0:
                most = most.plus(self.sizes[part].plus(_Linear(-1)), coefficient)
        bound = most.constant  # at sizes of one, or as large as they may be
        for size, coefficient in most.parts:
            if isinstance(size, int) or not (size.is_integer and size.is_positive):
                return False
            extreme = self.space.most(size) if coefficient > 0 else 1
            if extreme is None:
                return False
            bound += coefficient * extreme
        return bound <= 0

    def fails(self, form: _Linear) -> bool:
        """Whether form <= 0 at no coordinates, whatever the sizes."""
        return self.holds(_Linear(1).plus(form, -1))

    def implies(self, form: _Linear, other: _Linear) -> bool:
        return self.holds(other.plus(form, -1))

    def all_of(self, a: _Condition, b: _Condition) -> _Condition:
        return self._simplified(x | y for x in a for y in b)

    def any_of(self, a: _Condition, b: _Condition) -> _Condition:
        return self._simplified(a | b)

    def not_(self, condition: _Condition) -> _Condition:
        result = _TRUE
        for forms in condition:
            result = self.all_of(result, frozenset(frozenset((_Linear(1).plus(f, -1),)) for f in forms))
        return result

    def _simplified(self, alternatives: Iterable[frozenset[_Linear]]) -> _Condition:
        kept: list[frozenset[_Linear]] = []
        for forms in alternatives:
            left = [form for form in forms if not self.holds(form)]
            if any(self.fails(x.plus(y)) for x in left for y in left):  # y is x: one that fails alone
                continue
            for form in list(left):
                if any(self.implies(other, form) for other in left if other is not form):
                    left.remove(form)
            kept.append(frozenset(left))
        for forms in list(kept):
            if any(self._within(forms, other) for other in kept if other is not forms):
                kept.remove(forms)
        if len(kept) > MAX_ALTERNATIVES:
            raise _UnreadError("it has too many cases")
        return frozenset(kept)

    def _within(self, forms: frozenset[_Linear], other: frozenset[_Linear]) -> bool:
        """Whether all of `forms` together imply all of `other`, one by one."""
        return all(any(self.implies(form, wanted) for form in forms) for wanted in other)

    # Terms

    def truth(self, term: Term, at: _At) -> _Condition:
        """Where a boolean term is true."""
        at = _broadcast(term, at)
        if term.op in ("le", "lt", "eq"):
            a, b = (self.number(arg, at) for arg in term.args)
            return self._over(a, b, lambda x, y: self._compared(term.op, x, y))
        if term.op == "not":
            return self.not_(self.truth(term.args[0], at))
        if term.op in ("and", "or"):
            a, b = (self.truth(arg, at) for arg in term.args)
            return self.all_of(a, b) if term.op == "and" else self.any_of(a, b)
        if term.op == "mul" and term.consts[0] == Scalar(1.0):
            return self._every(self.truth(factor, at) for factor in term.args)
        if term.op == "full":
            return _TRUE if term.consts[0] else _FALSE
        if term.op == "number":
            return _TRUE if self._constant(term) else _FALSE
        if term.op in ("tril", "triu"):
            return self.all_of(self._triangle(term, at), self.truth(term.args[0], at))
        if term.op == "where":
            condition, chosen, other = (self._as_truth(arg, at) for arg in term.args)
            return self.any_of(self.all_of(condition, chosen), self.all_of(self.not_(condition), other))
        if term.op == "cast":
            return self._as_truth(term.args[0], at)
        if self._is_assumed(term, at):
            return _TRUE
        return self.truth(*self._moved(term, at))

    def number(self, term: Term, at: _At) -> _Cases:
        """The values of a term of numbers, or of a boolean one as numbers."""
        if term.dtype is torch.bool:
            condition = self.truth(term, at)
            return self._cases(((condition, _Linear(1)), (self.not_(condition), _ZERO)))
        at = _broadcast(term, at)
        return tuple((case, _checked(term, value)) for case, value in self._number(term, at))

    def _number(self, term: Term, at: _At) -> _Cases:
        if term.op == "number":
            return self._only(_of_number(term.consts[0]))
        if term.op == "leaf" and term.dtype is None and not isinstance(term.consts[0], str):
            return self._only(_of_size(term.consts[0]))
        if term.op == "full":
            return self._only(_Linear(float(term.consts[0])))
        if term.op == "arange":
            start, step = (_of_size(const) for const in term.consts[:2])
            return self._only(start.plus(_scaled(at[-1], step)))
        if term.op == "cast":
            return self.number(term.args[0], at)
        if term.op == "add":
            total = self._only(_of_number(term.consts[0]))
            for addend in term.args:
                total = self._combined(total, self.number(addend, at), _Linear.plus)
            return total
        if term.op == "mul" and set(term.consts[1:]) == {1}:
            product = self._only(_Linear(_plain(term.consts[0])))
            for factor in term.args:
                product = self._combined(product, self.number(factor, at), _scaled)
            return product
        if term.op in ("tril", "triu"):
            inside = self._triangle(term, at)
            return self._chosen(inside, self.number(term.args[0], at), self._only(_ZERO))
        if term.op == "where":
            return self._chosen(
                self._as_truth(term.args[0], at), *(self.number(arg, at) for arg in term.args[1:])
            )
        if term.op == "diff":
            return self._difference(term, at)
        if term.op == "cumsum":
            (dim,), value = term.consts, self._single(self.number(term.args[0], at), term)
            if value.parts:
                raise _UnreadError(f"it adds up {value}")
            return self._only(_scaled(at[dim].plus(_Linear(1)), value))
        if self._is_assumed(term, at):
            return self._only(_ZERO if _is_floating(term) else _Linear(1))
        return self.number(*self._moved(term, at))

    def _is_assumed(self, term: Term, at: _At) -> bool:
        """Whether this is padding or a mask in itself, and such things are to be taken for known."""
        if not self.but_for_inputs or term.op != "leaf" or term.dtype is None:
            return False
        if at[-2:] == _POSITION:
            self.masks.add(term.consts[0])
            return True
        is_flag = term.dtype in (torch.bool, torch.int32, torch.int64)
        if not is_flag or any(part == -2 for form in at for part, _ in form.parts):
            return False
        self.padding.add(term.consts[0])
        return True

    def _moved(self, term: Term, at: _At) -> tuple[Term, _At]:
        """The term whose elements `term` only moves, and where its element at `at` stands there."""
        if term.op == "expand":
            return term.args[0], at
        if term.op == "view":
            return term.args[0], _through_view(term, at)
        if term.op == "permute":
            inner = list(at)
            rank = len(at)
            for dim, source in enumerate(term.consts, -len(term.consts)):
                inner[rank + source] = at[dim]
            return term.args[0], tuple(inner)
        if term.op == "slice":
            dim, start, _, step = term.consts
            inner, first = list(at), _of_size(start)
            if not self.holds(_ZERO.plus(first, -1)):
                raise _UnreadError(f"it takes a slice from {start} on, which may be negative")
            inner[dim] = first.plus(_scaled(at[dim], _Linear(step)))
            return term.args[0], tuple(inner)
        if term.op == "index":
            source, *indices = term.args
            inner = [self._single(self.number(index, at), term) for index in indices]
            if not all(self.holds(_ZERO.plus(index, -1)) for index in inner):
                raise _UnreadError("it takes elements at positions that may be negative")
            return source, tuple(inner)
        if term.op in ("leaf", "var"):
            raise _UnreadError(f"it depends on the values of {term.consts[0]}: {_elsewhere(term)}")
        raise _UnreadError(f"it depends on the values of {term.op}: {_elsewhere(term)}")

    def _difference(self, term: Term, at: _At) -> _Cases:
        """torch.diff along a dimension, of positions with one element before them or none"""
        (source, before), (dim,) = term.args, term.consts

        def read(what: Term, where: _Linear) -> _Linear:
            moved = (*at[: len(at) + dim], where, *at[len(at) + dim + 1 :])
            return self._single(self.number(what, moved), term)

        here = at[dim]
        if before.op == "none":
            return self._only(read(source, here.plus(_Linear(1))).plus(read(source, here), -1))
        step = read(source, here).plus(read(source, here.plus(_Linear(-1))), -1)
        first = read(source, _ZERO).plus(read(before, _ZERO), -1)
        if step == first:
            return self._only(step)
        is_first = frozenset((frozenset((here,)),))
        return self._cases(((is_first, first), (self.not_(is_first), step)))

    def _triangle(self, term: Term, at: _At) -> _Condition:
        """Where tril or triu keep their argument."""
        ahead = at[-1].plus(at[-2], -1).plus(_of_size(term.consts[0]), -1)
        form = ahead if term.op == "tril" else _ZERO.plus(ahead, -1)
        return self._simplified((frozenset((form,)),))

    def _compared(self, op: str, a: _Linear, b: _Linear) -> _Condition:
        if not a.parts and not b.parts:  # also infinities
            x, y = a.constant, b.constant
            if max(x, y) <= HIDES and (x, y) != (-math.inf, -math.inf):
                raise _UnreadError(f"it compares {x:g} with {y:g}, which may be rounded")
            return _TRUE if (x <= y if op == "le" else x < y if op == "lt" else x == y) else _FALSE
        for form in (a, b):
            if not _is_whole(form.constant):
                raise _UnreadError(f"it compares positions with {form.constant:g}")
        below = a.plus(b, -1)
        if op == "eq":
            return self._simplified((frozenset((below, _ZERO.plus(below, -1))),))
        return self._simplified((frozenset((below if op == "le" else below.plus(_Linear(1)),)),))

    def _as_truth(self, term: Term, at: _At) -> _Condition:
        if term.dtype is torch.bool or term.op == "number":
            return self.truth(term, at)
        zero = self._over(self.number(term, at), self._only(_ZERO), lambda x, y: self._compared("eq", x, y))
        return self.not_(zero)

    # Cases

    @staticmethod
    def _only(value: _Linear) -> _Cases:
        return ((_TRUE, value),)

    @staticmethod
    def _constant(term: Term) -> float:
        return _plain(term.consts[0])

    def _single(self, cases: _Cases, term: Term) -> _Linear:
        if len(cases) != 1:
            raise _UnreadError(f"it takes {term.op} of values that change from place to place")
        return cases[0][1]

    def _cases(self, cases: Iterable[tuple[_Condition, _Linear]]) -> _Cases:
        """Without those that cannot be, and one for each value."""
        joined: dict[_Linear, _Condition] = {}
        for condition, value in cases:
            if condition != _FALSE:
                joined[value] = self.any_of(joined.get(value, _FALSE), condition)
        return tuple((condition, value) for value, condition in joined.items())

    def _combined(self, a: _Cases, b: _Cases, combine) -> _Cases:
        return self._cases((self.all_of(p, q), combine(x, y)) for p, x in a for q, y in b)

    def _chosen(self, condition: _Condition, a: _Cases, b: _Cases) -> _Cases:
        outside = self.not_(condition)
        return self._cases(
            [*((self.all_of(condition, p), x) for p, x in a), *((self.all_of(outside, q), y) for q, y in b)]
        )

    def _over(self, a: _Cases, b: _Cases, relation) -> _Condition:
        result = _FALSE
        for p, x in a:
            for q, y in b:
                result = self.any_of(result, self.all_of(self.all_of(p, q), relation(x, y)))
        return result

    def _every(self, conditions: Iterable[_Condition]) -> _Condition:
        result = _TRUE
        for condition in conditions:
            result = self.all_of(result, condition)
        return result


def _elsewhere(term: Term) -> str:
    """What a mask may be that no positions of this graph say."""
    if _is_floating(term):
        return "a bias, or a mask that was made elsewhere"
    return "padding, packed sequences, or a mask that was made elsewhere"


def _is_floating(term: Term) -> bool:
    return term.dtype is not None and term.dtype.is_floating_point


def _plain(scalar) -> float:
    """A constant of a term as a number; a pattern's own number captures are none."""
    if scalar.powers:
        raise _UnreadError(f"it depends on the number {scalar.powers[0][0]}")
    return scalar.value


def _window_size(form: _Linear) -> int | ConstVar | None:
    """A window as a constant."""
    if not form.parts:
        return int(form.constant)
    ((part, coefficient), *others) = form.parts
    if isinstance(part, _Capture) and not others and (coefficient, form.constant) == (1, 0):
        return ConstVar(part.name)
    return None


def _is_whole(number: float) -> bool:
    return math.isfinite(number) and number == int(number)


def _scaled(a: _Linear, b: _Linear) -> _Linear:
    """a * b, one of which is constant."""
    if a.parts and b.parts:
        raise _UnreadError("it multiplies positions")
    form, by = (b, a.constant) if b.parts else (a, b.constant)
    if form.parts and not _is_whole(by):
        raise _UnreadError(f"it multiplies positions by {by:g}")
    return _ZERO.plus(form, by)


def _broadcast(term: Term, at: _At) -> _At:
    """The coordinates of a term that is broadcast to a larger shape."""
    own = at[len(at) - len(term.shape) :]
    return tuple(_ZERO if size == 1 else form for size, form in zip(term.shape, own, strict=True))


def _through_view(term: Term, at: _At) -> _At:
    """Where an element of a view stands in what it views, if only dimensions of one come and go."""
    source = term.args[0]
    kept = [form for size, form in zip(term.shape, at, strict=True) if size != 1]
    if [size for size in term.shape if size != 1] != [size for size in source.shape if size != 1]:
        raise _UnreadError("it reshapes what depends on positions")
    forms = iter(kept)
    return tuple(_ZERO if size == 1 else next(forms) for size in source.shape)


def _checked(term: Term, value: _Linear) -> _Linear:
    """`value`, if the dtype of `term` holds it exactly: floating-point numbers may be flags, and what hides."""
    if term.dtype is None:
        return value
    if term.dtype in (torch.int32, torch.int64):
        is_small = _is_whole(value.constant) and abs(value.constant) <= MAX_CONSTANT
        if is_small and all(abs(c) <= MAX_COEFFICIENT for _, c in value.parts):
            return value
    elif term.dtype.is_floating_point and not value.parts:
        lowest = torch.finfo(term.dtype).min  # what is lower becomes infinite
        if value.constant in (-1, 0, 1, -math.inf) or lowest <= value.constant <= HIDES:
            return value
    raise _UnreadError(f"it computes {value} in {str(term.dtype).removeprefix('torch.')}")
