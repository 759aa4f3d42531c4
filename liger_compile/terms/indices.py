"""Derives the meaning of an attention mask: its term, read as a relation between positions of queries and keys.

Every entry of a mask is a function of its coordinates. The reader pushes symbolic coordinates down the term until only
positions, sizes and constants are left: arange returns the coordinate, a view moves it, a comparison turns it into a
linear inequality. The relation therefore holds for every size that the graph is valid for. The reader evaluates nothing
and adds no guard. If a part of a mask is not understood, the reader names the part, and the meaning is unknown.

Arithmetic follows the dtype (`_held`): the reader accepts a value only if no step was rounded or wrapped around.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import sympy
import torch

from liger_compile.terms import normalize
from liger_compile.terms.documents import compare_documents, holds_all, is_integer, read_documents
from liger_compile.terms.exact import MOST_TOKENS, WIDE_INTEGERS, holds, is_whole, stored, whole_numbers
from liger_compile.terms.linear import (
    HIDES,
    ZERO,
    Capture,
    Differs,
    Element,
    Flag,
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
    of_part,
    of_size,
    plain,
    scaled,
)
from liger_compile.terms.padding import has_flags, read_keys
from liger_compile.terms.term import MADE_HERE, ConstVar, Scalar, Size, Space, Term

MAX_ALTERNATIVES = 16
MAX_DEPTH = 80  # most nested operations: transformers' masks have about 30
MAX_READ = 4000  # most terms and coordinates read of one mask

# The operations that masks consist of, and that the reader understands, besides constants, sizes and named values.
_OF_NUMBERS = ("arange", "full", "number", "cast", "add", "mul", "abs", "cumsum", "diff", "index")
_OF_TRUTHS = ("le", "lt", "eq", "not", "and", "or", "where", "tril", "triu")
OPERATIONS = frozenset((*_OF_NUMBERS, *_OF_TRUTHS, "none", "expand", "view", "permute", "slice"))

_IN_WORDS = {"causal": "is causal", "all": "hides nothing", "window": "is causal within a window"}


@dataclass(frozen=True)
class Meaning:
    """The meaning of a mask: which of S keys each of T queries may attend to.

    Args:
        kind: "causal" query i sees exactly the keys j <= i, and T is S; "window" it sees the last `window` of these;
            "all" it sees every key; "documents" it sees those keys of its own document that `within` lets it see, and T
            is S; "padded" it sees those keys that are present and that `within` lets it see, and T is S; "unknown" any
            other mask, or one that could not be read.
        reason: a sentence, for "unknown", "window" and "padded".
        padding, masks: names of values, if these alone make the mask unknown. `padding` states for each key whether it
            is present: if it were all ones, the mask would be causal or hide nothing. `masks` have an entry for each
            query and key, as masks do; the graph does not show their meaning. A "padded" mask names its padding too.
    """

    kind: Literal["causal", "window", "all", "documents", "padded", "unknown"]
    reason: str = ""
    window: int | ConstVar | None = None  # a number, or a pattern's capture of one
    padding: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    documents: Term | None = (
        None  # (B, S) or (1, S) integers; two tokens of a row are in one document if equal
    )
    within: str = (
        ""  # for "documents" and "padded": the kind of the mask if each row were one document without padding
    )
    keys: Term | None = (
        None  # (B, S) or (1, S) booleans: keys that are present; the mask hides others, perhaps more
    )
    fill: Literal["", "finite", "infinite", "mixed"] = (
        ""  # what a mask that is added to the scores adds to hidden ones
    )


def mask_meaning(space: Space, mask: Term, queries: Size, keys: Size) -> Meaning:
    """Returns the meaning of `mask`, boolean or added to the scores, broadcast to (..., queries, keys)."""
    known, key = space.findings.meanings, (mask, queries, keys)
    if key not in known:
        try:
            known[key] = _proven(space, mask, queries, keys)
        except Exception as error:
            known[key] = Meaning("unknown", space.fail("the proof about its mask", error))
    return known[key]


def _proven(space: Space, mask: Term, queries: Size, keys: Size) -> Meaning:
    try:
        meaning = _Reader(space, mask, queries, keys).meaning()
    except UnreadError as why:
        meaning = Meaning("unknown", str(why))
    if meaning.kind not in ("padded", "unknown"):
        return meaning
    reason = meaning.reason or f"it {_IN_WORDS[meaning.within]} except for padding"
    found = _but_for_inputs(space, mask, queries, keys, reason) or Meaning("unknown", reason)
    return replace(meaning, reason=found.reason, padding=found.padding, masks=found.masks)


def _but_for_inputs(space: Space, mask: Term, queries: Size, keys: Size, why: str) -> Meaning | None:
    """Returns the meaning of a mask that is known except for padding or for masks in it; otherwise None."""
    try:
        reader = _Reader(space, mask, queries, keys, but_for_inputs=True)
        meaning = reader.meaning()
    except UnreadError:
        return None
    padding, masks = tuple(sorted(reader.padding)), tuple(sorted(reader.masks))
    if masks:
        return Meaning("unknown", why, padding=padding, masks=masks)
    if meaning.kind == "unknown":
        return None
    among = " within documents" if meaning.kind == "documents" else ""
    known = f"{_IN_WORDS[meaning.within or meaning.kind]}{among}"
    reason = f"it {known} except for the padding in {' and '.join(padding)}"
    return Meaning("unknown", reason, padding=padding)


_MOVES = ("expand", "view", "permute", "slice", "index")
_POSITION = tuple(Linear(0, frozenset(((dim, 1),))) for dim in (-2, -1))  # the query and key of a score

# A disjunction of conjunctions: at least one set in which all linear forms are <= 0.
_Condition = frozenset[frozenset[Linear]]
_TRUE: _Condition = frozenset((frozenset(),))
_FALSE: _Condition = frozenset()

_Cases = tuple[tuple[_Condition, Linear], ...]  # the value under each condition; one of them holds
_At = tuple[Linear, ...]  # the coordinates where a term is read


class _Reader:
    """Reads one mask; its coordinates range over the sizes of the scores that the mask applies to."""

    def __init__(
        self, space: Space, mask: Term, queries: Size, keys: Size, *, but_for_inputs: bool = False
    ) -> None:
        if len(mask.shape) < 2 or mask.shape[-1] not in (1, keys) or mask.shape[-2] not in (1, queries):
            shape = ", ".join(map(str, mask.shape))
            raise UnreadError(f"its shape ({shape}) is not that of {queries} queries and {keys} keys")
        self.space, self.mask, self.is_square = space, mask, queries == keys
        self.keys = keys
        self.sizes = {dim: of_size(mask.shape[dim]) for dim in range(-len(mask.shape), 0)}
        self.sizes.update({-1: of_size(keys), -2: of_size(queries)})
        self.of_queries: set[int | sympy.Expr] = {-2}  # coordinates along queries
        self.but_for_inputs = but_for_inputs
        self.known: dict[Any, Any] = {}  # results so far: a mask may contain one part many times
        self.depth = 0
        self.padding: set[str] = set()  # the flags that were assumed to be ones
        self.masks: set[str] = set()  # masks assumed true or zero: their users stay unknown
        self.unread = ""  # why the first integer or flag that was not read was not
        self.fills: set[float] = set()  # what the mask adds to hidden scores

    def meaning(self) -> Meaning:
        at = tuple(coordinate(dim) for dim in sorted(self.sizes))
        try:
            found = self._classified(self._lets_through(self.mask, at))
        except UnreadError as why:
            raise UnreadError(self.unread or str(why)) from why
        if found.kind == "unknown" and self.unread:
            found = replace(found, reason=self.unread)
        return replace(found, fill=self._fill())

    def _fill(self) -> Literal["", "finite", "infinite", "mixed"]:
        kinds = {math.isfinite(number) for number in self.fills}
        return "" if not kinds else "mixed" if len(kinds) == 2 else "finite" if True in kinds else "infinite"

    def _lets_through(self, mask: Term, at: _At) -> _Condition:
        """Returns where a mask is true, or adds zero to the scores; any other addend must hide."""
        if mask.dtype is torch.bool:
            return self.truth(mask, at)
        condition = _FALSE
        for case, value in self.number(mask, at):
            if value.parts or not (value.constant == 0 or value.constant <= HIDES):
                raise UnreadError(f"it adds {value} to the scores")
            self.fills.update(() if value.constant == 0 else (value.constant,))
            condition = self.any_of(condition, case) if value.constant == 0 else condition
        return condition

    def _classified(self, condition: _Condition) -> Meaning:
        if condition == _TRUE:
            return Meaning("all")
        if len(condition) == 1 and (found := self._of_documents(*condition) or self._of_keys(*condition)):
            return found
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
        reason = f"it is no causal mask: it lets through {text or 'nothing'}"
        return Meaning("unknown", reason, keys=self._keys_of_all(condition))

    def _keys_of_all(self, condition: _Condition) -> Term | None:
        """Returns the keys that are present, if a mask hides all others; None if it is not known to."""
        flagged = [frozenset(form for form in forms if has_flags((form,))) for forms in condition]
        if not flagged or not flagged[0] or flagged.count(flagged[0]) != len(flagged):
            return None
        try:
            return read_keys(self.space, flagged[0], self._rows_and_keys()).keys
        except UnreadError:
            return None

    def _rows_and_keys(self) -> tuple[Size, Size]:
        return (self.mask.shape[-4] if len(self.mask.shape) == 4 else 1), self.keys

    def _of_documents(self, forms: frozenset[Linear]) -> Meaning | None:
        """Returns the meaning of a mask that compares documents; None if it compares none."""
        if not compare_documents(forms):
            return None
        if not self.is_square:
            return Meaning("unknown", "it is of documents, but there are not as many queries as keys")
        found = read_documents(
            self.space,
            forms,
            self._rows_and_keys(),
            lambda term, at: self._single(self.number(term, at), term),
        )
        inner = self._classified(self._simplified((found.others,)))
        if inner.kind == "padded":
            return Meaning("unknown", f"it is of documents, and hides keys: {inner.keys}", keys=inner.keys)
        if inner.kind not in _IN_WORDS:
            return inner
        return Meaning("documents", "", inner.window, documents=found.ids, within=inner.kind)

    def _of_keys(self, forms: frozenset[Linear]) -> Meaning | None:
        """Returns the meaning of a mask that hides padded keys; None if it has no such flags."""
        if not has_flags(forms):
            return None
        if not self.is_square:
            return Meaning("unknown", "it is of padding, but there are not as many queries as keys")
        found = read_keys(self.space, forms, self._rows_and_keys())
        inner = self._classified(self._simplified((found.others,)))
        if inner.kind not in _IN_WORDS:
            return replace(inner, keys=found.keys)
        return Meaning("padded", "", inner.window, within=inner.kind, keys=found.keys)

    # Inequalities

    def most(self, form: Linear, assumed: int | None = None) -> float:
        """Returns an upper bound of a form over all coordinates and sizes; infinity if none is known.

        `assumed` is the upper bound of a symbolic size without a known bound.
        """
        most = Linear(form.constant)
        for part, coefficient in form.parts:
            if isinstance(part, Element):
                return math.inf
            if isinstance(part, (Differs, Flag)):
                most = most.plus(Linear(max(coefficient, 0)))
            elif not isinstance(part, int):
                most = most.plus(Linear(0, frozenset(((part, 1),))), coefficient)
            elif coefficient > 0:
                most = most.plus(self.sizes[part].plus(Linear(-1)), coefficient)
        bound = most.constant  # each size is one, or as large as it may be
        for size, coefficient in most.parts:
            if not isinstance(size, sympy.Expr) or not (size.is_integer and size.is_positive):
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
        """Returns whether form <= 0 is proven at all coordinates, for all sizes."""
        return self.most(form) <= 0

    def fails(self, form: Linear) -> bool:
        """Returns whether form <= 0 is proven false at all coordinates, for all sizes."""
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
            if any(self.fails(x.plus(y)) for x in left for y in left):  # y may be x: a form that fails alone
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
        """Returns whether `forms` imply `other`: each form of `other` follows from a single one of `forms`."""
        return all(any(self.implies(form, wanted) for form in forms) for wanted in other)

    # Terms

    def _once(self, read: Callable, term: Term, at: _At) -> Any:
        """Returns the result of `read` for a term at these coordinates, computed once; raises an error again."""
        key = (read.__name__, term, at)
        if key not in self.known:
            if self.depth == MAX_DEPTH:
                raise UnreadError(f"it is computed in more than {MAX_DEPTH} steps")
            if len(self.known) > MAX_READ:
                raise UnreadError(f"it is made of more than {MAX_READ} parts")
            self.depth += 1
            try:
                self.known[key] = read(term, at)
            except UnreadError as why:
                self.known[key] = why
            finally:
                self.depth -= 1
        if isinstance(self.known[key], UnreadError):
            raise self.known[key]
        return self.known[key]

    def truth(self, term: Term, at: _At) -> _Condition:
        """Returns where a boolean term is true."""
        return self._once(self._truth_or_flag, term, _broadcast(term, at))

    def _truth_or_flag(self, term: Term, at: _At) -> _Condition:
        """Returns where a boolean term is true; if that cannot be read, and depends on the key alone, its flag."""
        try:
            found = self._truth(term, at)
            is_read = not any(form.elements for forms in found for form in forms)
            flag = None if is_read else self._flag(term, at)
            if flag is None:
                return found
        except UnreadError as why:
            flag = self._flag(term, at)
            if flag is None:
                raise
            self.unread = self.unread or str(why)
        return self._simplified((frozenset((Linear(1).plus(of_part(flag), -1),)),))

    def _flag(self, term: Term, at: _At) -> Flag | None:
        """Returns a boolean term as a flag of the key; None if it depends on the query, or on positions alone."""
        if term.dtype is not torch.bool or self.but_for_inputs or not _has_values(self.space, term):
            return None
        if any(map(self._depends_on_queries, at)) and term.op in ("cast", "eq", "le", "lt"):
            term, at = self._unexpanded(term, at)
        return None if any(map(self._depends_on_queries, at)) else Flag(term, at)

    def _unexpanded(self, term: Term, at: _At) -> tuple[Term, _At]:
        """Returns an operation on one tensor, and numbers, without the moves of its operand."""
        tensors = [arg for arg in term.args if arg.op != "number"]
        if len(tensors) != 1:
            return term, at
        source, inner = self._source(tensors[0], at)
        args = tuple(source if arg is tensors[0] else arg for arg in term.args)
        return normalize.apply(self.space, term.op, args, term.consts, term.dtype, source.shape), inner

    def _truth(self, term: Term, at: _At) -> _Condition:
        if term.op == "eq" and (same := self._same_document(term, at)) is not None:
            return same
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
        if term.op == "add" and term.consts[0] == Scalar(0.0):  # a sum of booleans is true if any of them is
            return self.not_(self._every(self.not_(self.truth(part, at)) for part in term.args))
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
        """Returns the values of a numeric term, or of a boolean term as numbers."""
        if term.dtype is torch.bool:
            condition = self.truth(term, at)
            return self._cases(((condition, Linear(1)), (self.not_(condition), ZERO)))
        return self._once(self._number_or_element, term, _broadcast(term, at))

    def _number_or_element(self, term: Term, at: _At) -> _Cases:
        """Returns the values of a term; an integer that cannot be read is an element of the term."""
        try:
            return tuple((case, self._held(term, value)) for case, value in self._number(term, at))
        except UnreadError as why:
            if not is_integer(term.dtype):
                raise
            self.unread = self.unread or str(why)
            return self._only(of_part(Element(term, at)))

    def _number(self, term: Term, at: _At) -> _Cases:
        if term.op == "number":
            return self._only(of_number(term.consts[0]))
        if term.op == "leaf" and term.dtype is None and not isinstance(term.consts[0], str):
            return self._only(of_size(term.consts[0]))
        if term.op == "full":
            return self._only(Linear(float(term.consts[0])))
        if term.op == "arange":
            start, step, *_ = term.consts
            start, step = of_size(start), of_size(step)
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
        """Returns the values of a sum or product: its number, combined with one operand after the other."""
        cases = self._only(of_number(term.consts[0], term.dtype))
        for arg in term.args:
            operand = self._operand(arg, at, term.dtype, of_number)
            cases = self._combined(cases, operand, partial(combine, term.dtype))
        return cases

    def _operand(self, term: Term, at: _At, dtype: torch.dtype | None, of_number: Callable) -> _Cases:
        """Returns the values of an operand of an operation in `dtype`."""
        return self._only(of_number(term.consts[0], dtype)) if term.op == "number" else self.number(term, at)

    def _is_assumed(self, term: Term, at: _At) -> bool:
        """Returns whether a term is itself padding or a mask and its values are to be assumed; records its name."""
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
        """Returns the source of a term that only moves elements, and the coordinates there of the element at `at`."""
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
        """Returns cumsum of a source that has the same value all along the dimension, wherever the sum is read."""
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
        """Returns the cases of |value| under a condition."""
        if not value.parts:
            return ((condition, Linear(abs(value.constant))),)
        negated = ZERO.plus(value, -1)
        is_positive = self._simplified((frozenset((negated,)),))
        return (
            (self.all_of(condition, is_positive), value),
            (self.all_of(condition, self.not_(is_positive)), negated),
        )

    def _difference(self, term: Term, at: _At) -> _Cases:
        """Returns torch.diff of positions along a dimension, with one prepended element or none."""
        (source, before), (dim,) = term.args, term.consts

        def read(positions: Term, where: Linear) -> Linear:
            moved = (*at[: len(at) + dim], where, *at[len(at) + dim + 1 :])
            return self._single(self.number(positions, moved), term)

        here = at[dim]
        if before.op == "none":
            return self._only(read(source, here.plus(Linear(1))).plus(read(source, here), -1))
        step = read(source, here).plus(read(source, here.plus(Linear(-1))), -1)
        first = read(source, ZERO).plus(read(before, ZERO), -1)
        if step == first:
            return self._only(step)
        is_first = frozenset((frozenset((here,)),))
        return self._cases(((is_first, first), (self.not_(is_first), step)))

    def _same_document(self, term: Term, at: _At) -> _Condition | None:
        """Returns where two elements of one integer term are equal, if only the call knows them; otherwise None."""
        (first, at_first), (second, at_second) = (self._source(arg, at) for arg in term.args)
        if first is not second or not is_integer(first.dtype) or not _has_values(self.space, first):
            return None
        return self._equal_elements(first, at_first, at_second)

    def _equal_elements(self, term: Term, first: _At, second: _At) -> _Condition:
        differs = Differs(term, frozenset((first, second)))
        return _TRUE if first == second else self._simplified((frozenset((of_part(differs),)),))

    def _source(self, term: Term, at: _At) -> tuple[Term, _At]:
        """Returns a term without the operations that only move its elements, and the place there; casts are kept."""
        at, casts = _broadcast(term, at), []
        while term.op in (*_MOVES, "cast"):
            try:
                source, moved = (term.args[0], at) if term.op == "cast" else self._moved(term, at)
            except UnreadError:
                break
            if term.op == "cast" and not holds_all(term.dtype, source.dtype):
                casts.append(term.dtype)
            term, at = source, _broadcast(source, moved)
        for dtype in reversed(casts):
            term = normalize.cast(self.space, term, dtype)
        return term, at

    def _triangle(self, term: Term, at: _At) -> _Condition:
        """Returns where tril or triu keep their argument."""
        ahead = at[-1].plus(at[-2], -1).plus(of_size(term.consts[0]), -1)
        form = ahead if term.op == "tril" else ZERO.plus(ahead, -1)
        return self._simplified((frozenset((form,)),))

    def _compared(self, op: str, a: Linear, b: Linear, dtype: torch.dtype | None) -> _Condition:
        """Returns where comparison `op` of `a` and `b` holds; operands that are not numbers have `dtype`."""
        if not a.parts and not b.parts:  # infinities included
            return _TRUE if numbers_compare(op, a.constant, b.constant, dtype) else _FALSE
        for form in (a, b):
            if not is_whole(form.constant) or not (form.parts or holds(dtype, form.constant)):
                raise UnreadError(f"it compares positions with {form.constant:g}{in_(dtype)}")
        below = a.plus(b, -1)
        if op == "eq" and below.elements:
            return self._equal_values(below)
        if op == "eq":
            return self._simplified((frozenset((below, ZERO.plus(below, -1))),))
        return self._simplified((frozenset((below if op == "le" else below.plus(Linear(1)),)),))

    def _equal_values(self, difference: Linear) -> _Condition:
        """Returns where a difference with elements of terms is zero; only that of two elements of a term is read."""
        parts = dict(difference.parts)
        elements = sorted(difference.elements, key=lambda element: parts[element])
        if difference.constant == 0 and len(parts) == len(elements) == 2:
            second, first = elements
            if (parts[first], parts[second]) == (1, -1) and first.term is second.term:
                return self._equal_elements(first.term, first.at, second.at)
        return self._simplified((frozenset((difference, ZERO.plus(difference, -1))),))

    def _as_truth(self, term: Term, at: _At) -> _Condition:
        if term.dtype is torch.bool or term.op == "number":
            return self.truth(term, at)
        value, zero = self.number(term, at), self._only(ZERO)
        return self.not_(self._over(value, zero, lambda x, y: self._compared("eq", x, y, term.dtype)))

    def _held(self, term: Term, value: Linear) -> Linear:
        """Returns `value` if the dtype of `term` represents it exactly; otherwise raises UnreadError.

        Positions and integers must be whole numbers in the range of the dtype. A floating-point constant must be -1, 0,
        1 or -inf, or hide; the result is then the stored value.
        """
        dtype = term.dtype
        if dtype is None:
            return value
        if value.elements:
            return self._held_element(term, value)
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
        elif hides(stored(dtype, value.constant)):  # hides() excludes finite values that are stored as -inf
            return Linear(stored(dtype, value.constant))
        raise UnreadError(f"it computes {value}{in_(dtype)}")

    def _held_element(self, term: Term, value: Linear) -> Linear:
        """Returns `value` if it is an element that the dtype represents, or a sum of such in 64 bits.

        The sum is exact but for wraparound, which keeps equal sums equal. Other comparisons of such sums are used for
        positions only (documents.py). A multiple is not read: twice of different integers may be equal.
        """
        (element, *_) = value.elements
        if of_part(element) == value and holds_all(term.dtype, element.term.dtype):
            return value
        is_sum = all(abs(times) == 1 for part, times in value.parts if isinstance(part, Element))
        if is_sum and term.op in ("add", "mul") and term.dtype is torch.int64 and is_whole(value.constant):
            return value
        raise UnreadError(f"it computes {value}{in_(term.dtype)}")

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
        """Returns the cases without impossible ones, merged to one for each value."""
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
    """Returns a description of a mask that the positions of this graph do not determine."""
    if term.op != "leaf" or MADE_HERE in term.consts:
        return "computed in this graph by operations that proofs about masks do not support"
    if _is_floating(term):
        return "a bias, or a mask from outside this graph"
    return "padding, packed sequences, or a mask from outside this graph"


def _has_values(space: Space, term: Term) -> bool:
    """Returns whether more than sizes and positions determines a term, or they do by an operation that is not read."""
    known, waiting = space.has_values, [term]
    while waiting:
        part = waiting[-1]
        new = [arg for arg in part.args if arg not in known]
        waiting.extend(new)
        if not new:
            is_leaf = part.op in ("leaf", "var")
            own = part.dtype is not None if is_leaf else part.op not in OPERATIONS
            known[part] = own or any(known[arg] for arg in part.args)
            waiting.pop()
    return known[term]


def _is_floating(term: Term) -> bool:
    return term.dtype is not None and term.dtype.is_floating_point


def _window_size(form: Linear) -> int | ConstVar | None:
    """Returns the size of a window as a number or a capture; otherwise None."""
    if not form.parts:
        return int(form.constant)
    ((part, coefficient), *others) = form.parts
    if isinstance(part, Capture) and not others and (coefficient, form.constant) == (1, 0):
        return ConstVar(part.name)
    return None


def _broadcast(term: Term, at: _At) -> _At:
    """Returns the coordinates in a term that is broadcast to a larger shape."""
    own = at[len(at) - len(term.shape) :]
    return tuple(ZERO if size == 1 else form for size, form in zip(term.shape, own, strict=True))


def _through_view(term: Term, at: _At) -> _At:
    """Returns the coordinates in the source of a view that only adds or removes dimensions of size one."""
    source = term.args[0]
    kept = [form for size, form in zip(term.shape, at, strict=True) if size != 1]
    if [size for size in term.shape if size != 1] != [size for size in source.shape if size != 1]:
        raise UnreadError("it reshapes what depends on positions")
    forms = iter(kept)
    return tuple(ZERO if size == 1 else next(forms) for size in source.shape)
