"""What an attention mask means: its term, read as a relation between the positions of queries and keys.

Every entry of a mask is a function of its coordinates, and the reader pushes symbolic coordinates down the term
until only positions, sizes and constants are left: arange gives the coordinate, a view moves it, a comparison makes
a linear inequality of it. So the relation holds for every size that the graph is valid for: nothing is evaluated,
and no guard is added. What is not understood is named, and the mask then means nothing.

Arithmetic is that of the dtype at hand (`_held`): a value is read only if no step to it was rounded or wrapped around.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import sympy
import torch

from liger_compile.terms.exact import MOST_TOKENS, WIDE_INTEGERS, holds, is_whole, stored, whole_numbers
from liger_compile.terms.linear import (
    HIDES,
    ZERO,
    Capture,
    Linear,
    UnreadError,
    add,
    added,
    coordinate,
    hides,
    in_,
    multiplied,
    multiply,
    numbers_compare,
    of_number,
    of_size,
    plain,
    scaled,
)
from liger_compile.terms.term import MADE_HERE, ConstVar, Scalar, Size, Space, Term

MAX_ALTERNATIVES = 16
MAX_DEPTH = 80  # operations one upon another: transformers' masks have about 30
MAX_READ = 4000  # terms and places that are read of one mask

# What masks are made of beside constants, sizes and named values: what the reader below reads.
_OF_NUMBERS = ("arange", "full", "number", "cast", "add", "mul", "abs", "cumsum", "diff", "index")
_OF_TRUTHS = ("le", "lt", "eq", "not", "and", "or", "where", "tril", "triu")
OPERATIONS = frozenset((*_OF_NUMBERS, *_OF_TRUTHS, "none", "expand", "view", "permute", "slice"))

_BUT_FOR_PADDING = {"causal": "is causal", "all": "hides nothing", "window": "is causal within a window"}


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
        except UnreadError as why:
            known = _but_for_inputs(space, mask, queries, keys, str(why))
            space.found_out[key] = known or Meaning("unknown", str(why))
    return space.found_out[key]


def _but_for_inputs(space: Space, mask: Term, queries: Size, keys: Size, why: str) -> Meaning | None:
    """What a mask means that is known but for padding, or for masks in it; None if it is not."""
    try:
        reader = _Reader(space, mask, queries, keys, but_for_inputs=True)
        kind = reader.meaning().kind
    except UnreadError:
        return None
    padding, masks = tuple(sorted(reader.padding)), tuple(sorted(reader.masks))
    if masks:
        return Meaning("unknown", why, padding=padding, masks=masks)
    if kind not in _BUT_FOR_PADDING:
        return None
    reason = f"it {_BUT_FOR_PADDING[kind]} but for the padding in {' and '.join(padding)}"
    return Meaning("unknown", reason, padding=padding)


_POSITION = tuple(Linear(0, frozenset(((dim, 1),))) for dim in (-2, -1))  # of a score: its query and key

# Any of these, each of which is: all of these linear forms are <= 0.
_Condition = frozenset[frozenset[Linear]]
_TRUE: _Condition = frozenset((frozenset(),))
_FALSE: _Condition = frozenset()

_Cases = tuple[tuple[_Condition, Linear], ...]  # the value under each of the conditions, one of which holds
_At = tuple[Linear, ...]  # where a term is read: its coordinates


class _Reader:
    """Reads one mask; its coordinates range over the sizes of the scores that it is applied to."""

    def __init__(
        self, space: Space, mask: Term, queries: Size, keys: Size, *, but_for_inputs: bool = False
    ) -> None:
        if len(mask.shape) < 2 or mask.shape[-1] not in (1, keys) or mask.shape[-2] not in (1, queries):
            shape = ", ".join(map(str, mask.shape))
            raise UnreadError(f"its shape ({shape}) is not that of {queries} queries and {keys} keys")
        self.space, self.mask, self.is_square = space, mask, queries == keys
        self.sizes = {dim: of_size(mask.shape[dim]) for dim in range(-len(mask.shape), 0)}
        self.sizes.update({-1: of_size(keys), -2: of_size(queries)})
        self.of_queries: set[int | sympy.Expr] = {-2}  # coordinates that run along queries
        self.but_for_inputs = but_for_inputs
        self.known: dict[
            Any, Any
        ] = {}  # what was read already, where: a mask may have one part in many places
        self.depth = 0
        self.padding: set[str] = set()  # the flags that were taken for ones
        self.masks: set[str] = (
            set()
        )  # masks that were taken for true, or zeros: what is made of them is unknown

    def meaning(self) -> Meaning:
        at = tuple(coordinate(dim) for dim in sorted(self.sizes))
        return self._classified(self._lets_through(self.mask, at))

    def _lets_through(self, mask: Term, at: _At) -> _Condition:
        """Where a mask is true, or adds nothing to the scores; all else that it adds hides."""
        if mask.dtype is torch.bool:
            return self.truth(mask, at)
        condition = _FALSE
        for case, value in self.number(mask, at):
            if value.parts or not (value.constant == 0 or value.constant <= HIDES):
                raise UnreadError(f"it adds {value} to the scores")
            condition = self.any_of(condition, case) if value.constant == 0 else condition
        return condition

    def _classified(self, condition: _Condition) -> Meaning:
        if condition == _TRUE:
            return Meaning("all")
        causal = Linear(0, frozenset(((-1, 1), (-2, -1))))
        alternatives = [sorted(forms, key=lambda form: form != causal) for forms in condition]
        if len(alternatives) == 1 and alternatives[0][0] == causal:
            (_, *others) = alternatives[0]
            if not self.is_square:
                return Meaning("unknown", "it is causal, but there are not as many queries as keys")
            if not others:
                return Meaning("causal")
            window = ZERO.plus(others[0].plus(causal), -1).plus(Linear(1)) if len(others) == 1 else None
            size = None if window is None else _window_size(window)
            if size is not None:
                reason = f"it is causal within a window of {size}, which may be smaller than the sequence"
                return Meaning("window", reason, size)
        text = " or ".join(" and ".join(f"{form} <= 0" for form in forms) for forms in alternatives)
        return Meaning("unknown", f"it is no causal mask: it lets through {text or 'nothing'}")

    # Inequalities

    def most(self, form: Linear, assumed: int | None = None) -> float:
        """The largest that a form may be at all coordinates, whatever the sizes; infinite if that is not known.

        `assumed` is the largest that a size may be of which nothing is known.
        """
        most = Linear(form.constant)
        for part, coefficient in form.parts:
            if not isinstance(part, int):
                most = most.plus(Linear(0, frozenset(((part, 1),))), coefficient)
            elif coefficient > 0:
                most = most.plus(self.sizes[part].plus(Linear(-1)), coefficient)
        bound = most.constant  # at sizes of one, or as large as they may be
        for size, coefficient in most.parts:
            if isinstance(size, int) or not (size.is_integer and size.is_positive):
                return math.inf
            largest = self.space.most(size)
            if largest is None and size.is_Symbol:
                largest = assumed
            extreme = largest if coefficient > 0 else 1
            if extreme is None:
                return math.inf
            bound += coefficient * extreme
        return bound

    def holds(self, form: Linear) -> bool:
        """Whether form <= 0 at all coordinates, whatever the sizes."""
        return self.most(form) <= 0

    def fails(self, form: Linear) -> bool:
        """Whether form <= 0 at no coordinates, whatever the sizes."""
        return self.holds(Linear(1).plus(form, -1))

    def implies(self, form: Linear, other: Linear) -> bool:
        return self.holds(other.plus(form, -1))

    def all_of(self, a: _Condition, b: _Condition) -> _Condition:
        return self._simplified(x | y for x in a for y in b)

    def any_of(self, a: _Condition, b: _Condition) -> _Condition:
        return self._simplified(a | b)

    def not_(self, condition: _Condition) -> _Condition:
        result = _TRUE
        for forms in condition:
            result = self.all_of(result, frozenset(frozenset((Linear(1).plus(f, -1),)) for f in forms))
        return result

    def _simplified(self, alternatives: Iterable[frozenset[Linear]]) -> _Condition:
        kept: list[frozenset[Linear]] = []
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
            raise UnreadError("it has too many cases")
        return frozenset(kept)

    def _within(self, forms: frozenset[Linear], other: frozenset[Linear]) -> bool:
        """Whether all of `forms` together imply all of `other`, one by one."""
        return all(any(self.implies(form, wanted) for form in forms) for wanted in other)

    # Terms

    def _once(self, read: Callable, term: Term, at: _At) -> Any:
        """What `read` finds out about a term at these coordinates."""
        key = (read.__name__, term, at)
        if key not in self.known:
            if self.depth == MAX_DEPTH:
                raise UnreadError(f"it is made in more than {MAX_DEPTH} steps")
            if len(self.known) > MAX_READ:
                raise UnreadError(f"it is made of more than {MAX_READ} parts")
            self.depth += 1
            self.known[key] = read(term, at)
            self.depth -= 1
        return self.known[key]

    def truth(self, term: Term, at: _At) -> _Condition:
        """Where a boolean term is true."""
        return self._once(self._truth, term, _broadcast(term, at))

    def _truth(self, term: Term, at: _At) -> _Condition:
        if term.op in ("le", "lt", "eq"):
            a, b = (self.number(arg, at) for arg in term.args)
            dtype = next((arg.dtype for arg in term.args if arg.dtype is not None), None)
            return self._over(a, b, lambda x, y: self._compared(term.op, x, y, dtype))
        if term.op == "not":
            return self.not_(self.truth(term.args[0], at))
        if term.op in ("and", "or"):
            a, b = (self.truth(arg, at) for arg in term.args)
            return self.all_of(a, b) if term.op == "and" else self.any_of(a, b)
        if term.op == "mul" and term.consts[0] == Scalar(1.0) and all(p >= 1 for p in term.consts[1:]):
            return self._every(self.truth(factor, at) for factor in term.args)
        if term.op == "add" and term.consts[0] == Scalar(0.0):  # of truths, one of which is enough
            return self.not_(self._every(self.not_(self.truth(each, at)) for each in term.args))
        if term.op == "masks":
            return self._every(self._lets_through(mask, at) for mask in term.args)
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
            return self._cases(((condition, Linear(1)), (self.not_(condition), ZERO)))
        cases = self._once(self._number, term, _broadcast(term, at))
        return tuple((case, self._held(term, value)) for case, value in cases)

    def _number(self, term: Term, at: _At) -> _Cases:
        if term.op == "number":
            return self._only(of_number(term.consts[0]))
        if term.op == "leaf" and term.dtype is None and not isinstance(term.consts[0], str):
            return self._only(of_size(term.consts[0]))
        if term.op == "full":
            return self._only(Linear(float(term.consts[0])))
        if term.op == "arange":
            start, step = (of_size(const) for const in term.consts[:2])
            return self._only(start.plus(scaled(at[-1], step)))
        if term.op == "cast":
            return self.number(term.args[0], at)
        if term.op == "add":
            return self._folded(term, at, added, add)
        if term.op == "mul" and set(term.consts[1:]) == {1}:
            return self._folded(term, at, multiplied, multiply)
        if term.op == "abs":
            return self._cases(
                case for p, x in self.number(term.args[0], at) for case in self._absolute(p, x)
            )
        if term.op in ("tril", "triu"):
            inside = self._triangle(term, at)
            return self._chosen(inside, self.number(term.args[0], at), self._only(ZERO))
        if term.op == "where":
            return self._chosen(
                self._as_truth(term.args[0], at), *(self.number(arg, at) for arg in term.args[1:])
            )
        if term.op == "diff":
            return self._difference(term, at)
        if term.op == "cumsum":
            return self._only(self._summed(term, at))
        if self._is_assumed(term, at):
            return self._only(ZERO if _is_floating(term) else Linear(1))
        return self.number(*self._moved(term, at))

    def _folded(self, term: Term, at: _At, of_number: Callable, combine: Callable) -> _Cases:
        """A sum or a product: its number, and its operands one after the other."""
        cases = self._only(of_number(term.consts[0], term.dtype))
        for arg in term.args:
            operand = self._operand(arg, at, term.dtype, of_number)
            cases = self._combined(cases, operand, partial(combine, term.dtype))
        return cases

    def _operand(self, term: Term, at: _At, dtype: torch.dtype | None, of_number: Callable) -> _Cases:
        """The values of an operand of what is computed in `dtype`."""
        return self._only(of_number(term.consts[0], dtype)) if term.op == "number" else self.number(term, at)

    def _is_assumed(self, term: Term, at: _At) -> bool:
        """Whether this is padding or a mask in itself, and such things are to be taken for known."""
        if not self.but_for_inputs or term.op != "leaf" or term.dtype is None:
            return False
        if at[-2:] == _POSITION:
            self.masks.add(term.consts[0])
            return True
        is_flag = term.dtype in (torch.bool, torch.int32, torch.int64)
        if not is_flag or any(map(self._depends_on_queries, at)):
            return False
        self.padding.add(term.consts[0])
        return True

    def _depends_on_queries(self, form: Linear) -> bool:
        return any(part in self.of_queries for part, _ in form.parts)

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
            inner, first = list(at), of_size(start)
            if not self.holds(ZERO.plus(first, -1)):
                raise UnreadError(f"it takes a slice from {start} on, which may be negative")
            inner[dim] = first.plus(scaled(at[dim], Linear(step)))
            return term.args[0], tuple(inner)
        if term.op == "index":
            source, *indices = term.args
            inner = [self._single(self.number(index, at), term) for index in indices]
            if not all(self.holds(ZERO.plus(index, -1)) for index in inner):
                raise UnreadError("it takes elements at positions that may be negative")
            return source, tuple(inner)
        if term.op in ("leaf", "var"):
            raise UnreadError(f"it depends on the values of {term.consts[0]}: {_elsewhere(term)}")
        raise UnreadError(f"it depends on the values of {term.op}: {_elsewhere(term)}")

    def _summed(self, term: Term, at: _At) -> Linear:
        """cumsum of what is the same number all along the dimension, wherever the sum is read"""
        (dim,), (source,) = term.consts, term.args
        along = max(self.sizes) + 1
        self.sizes[along] = of_size(source.shape[dim])
        if self._depends_on_queries(at[dim]):
            self.of_queries.add(along)
        everywhere = (*at[: len(at) + dim], coordinate(along), *at[len(at) + dim + 1 :])
        value = self._single(self.number(source, everywhere), term)
        if value.parts:
            raise UnreadError(f"it adds up {value}")
        return scaled(at[dim].plus(Linear(1)), value)

    def _absolute(self, condition: _Condition, value: Linear) -> _Cases:
        """|value|, where the condition holds"""
        if not value.parts:
            return ((condition, Linear(abs(value.constant))),)
        negated = ZERO.plus(value, -1)
        is_positive = self._simplified((frozenset((negated,)),))
        return (
            (self.all_of(condition, is_positive), value),
            (self.all_of(condition, self.not_(is_positive)), negated),
        )

    def _difference(self, term: Term, at: _At) -> _Cases:
        """torch.diff along a dimension, of positions with one element before them or none"""
        (source, before), (dim,) = term.args, term.consts

        def read(what: Term, where: Linear) -> Linear:
            moved = (*at[: len(at) + dim], where, *at[len(at) + dim + 1 :])
            return self._single(self.number(what, moved), term)

        here = at[dim]
        if before.op == "none":
            return self._only(read(source, here.plus(Linear(1))).plus(read(source, here), -1))
        step = read(source, here).plus(read(source, here.plus(Linear(-1))), -1)
        first = read(source, ZERO).plus(read(before, ZERO), -1)
        if step == first:
            return self._only(step)
        is_first = frozenset((frozenset((here,)),))
        return self._cases(((is_first, first), (self.not_(is_first), step)))

    def _triangle(self, term: Term, at: _At) -> _Condition:
        """Where tril or triu keep their argument."""
        ahead = at[-1].plus(at[-2], -1).plus(of_size(term.consts[0]), -1)
        form = ahead if term.op == "tril" else ZERO.plus(ahead, -1)
        return self._simplified((frozenset((form,)),))

    def _compared(self, op: str, a: Linear, b: Linear, dtype: torch.dtype | None) -> _Condition:
        """Where `a` and `b`, whose dtype is `dtype` unless they are numbers, compare so."""
        if not a.parts and not b.parts:  # also infinities
            return _TRUE if numbers_compare(op, a.constant, b.constant, dtype) else _FALSE
        for form in (a, b):
            if not is_whole(form.constant) or not (form.parts or holds(dtype, form.constant)):
                raise UnreadError(f"it compares positions with {form.constant:g}{in_(dtype)}")
        below = a.plus(b, -1)
        if op == "eq":
            return self._simplified((frozenset((below, ZERO.plus(below, -1))),))
        return self._simplified((frozenset((below if op == "le" else below.plus(Linear(1)),)),))

    def _as_truth(self, term: Term, at: _At) -> _Condition:
        if term.dtype is torch.bool or term.op == "number":
            return self.truth(term, at)
        value, zero = self.number(term, at), self._only(ZERO)
        return self.not_(self._over(value, zero, lambda x, y: self._compared("eq", x, y, term.dtype)))

    def _held(self, term: Term, value: Linear) -> Linear:
        """`value`, if the dtype of `term` holds it exactly: positions as long as they are whole numbers in its range,
        and in floating point also flags, and what hides."""
        dtype = term.dtype
        if dtype is None:
            return value
        if value.parts or not dtype.is_floating_point:
            first, last = whole_numbers(dtype)
            assumed = MOST_TOKENS if dtype in WIDE_INTEGERS else None
            is_in_range = (
                self.most(value, assumed) <= last and self.most(ZERO.plus(value, -1), assumed) <= -first
            )
            if is_whole(value.constant) and is_in_range:
                return value
        elif value.constant in (-1, 0, 1, -math.inf):
            return value
        elif hides(stored(dtype, value.constant)):  # and is not infinite: then it is not added to
            return Linear(stored(dtype, value.constant))
        raise UnreadError(f"it computes {value}{in_(dtype)}")

    # Cases

    @staticmethod
    def _only(value: Linear) -> _Cases:
        return ((_TRUE, value),)

    @staticmethod
    def _constant(term: Term) -> float:
        return plain(term.consts[0])

    def _single(self, cases: _Cases, term: Term) -> Linear:
        if len(cases) != 1:
            raise UnreadError(f"it takes {term.op} of values that change from place to place")
        return cases[0][1]

    def _cases(self, cases: Iterable[tuple[_Condition, Linear]]) -> _Cases:
        """Without those that cannot be, and one for each value."""
        joined: dict[Linear, _Condition] = {}
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
    if term.op != "leaf" or MADE_HERE in term.consts:
        return "made in this graph, in a way that proofs about masks do not follow"
    if _is_floating(term):
        return "a bias, or a mask that was made elsewhere"
    return "padding, packed sequences, or a mask that was made elsewhere"


def _is_floating(term: Term) -> bool:
    return term.dtype is not None and term.dtype.is_floating_point


def _window_size(form: Linear) -> int | ConstVar | None:
    """A window as a constant."""
    if not form.parts:
        return int(form.constant)
    ((part, coefficient), *others) = form.parts
    if isinstance(part, Capture) and not others and (coefficient, form.constant) == (1, 0):
        return ConstVar(part.name)
    return None


def _broadcast(term: Term, at: _At) -> _At:
    """The coordinates of a term that is broadcast to a larger shape."""
    own = at[len(at) - len(term.shape) :]
    return tuple(ZERO if size == 1 else form for size, form in zip(term.shape, own, strict=True))


def _through_view(term: Term, at: _At) -> _At:
    """Where an element of a view stands in what it views, if only dimensions of one come and go."""
    source = term.args[0]
    kept = [form for size, form in zip(term.shape, at, strict=True) if size != 1]
    if [size for size in term.shape if size != 1] != [size for size in source.shape if size != 1]:
        raise UnreadError("it reshapes what depends on positions")
    forms = iter(kept)
    return tuple(ZERO if size == 1 else next(forms) for size in source.shape)
