"""The canonical term of attention, attention(mask, q, k, v), where `mask` is the meaning of the mask.

a mask proven causal, or proven to hide nothing        -> causal_mask, no_mask, however it was computed
a mask proven to let documents see only themselves     -> document_mask of their ids
key/value heads repeated for the query heads           -> the heads before the repeat; attention supports groups
softmax(q @ k.T * scale + mask) @ v                    -> the term of scaled_dot_product_attention

A note records each attention that keeps its mask or stays written out, and the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from liger_compile.terms import normalize
from liger_compile.terms.call import Call, Draw, const_of
from liger_compile.terms.indices import HIDES, Meaning, mask_meaning
from liger_compile.terms.normalize import ONE, ZERO
from liger_compile.terms.scalars import is_normal, merged, rounded
from liger_compile.terms.term import ConstVar, Scalar, Size, Space, Term

HEADS = -3
ZEROS, MEAN, OTHER = "zeros", "mean", "other"  # what attention gives for a row that sees no key
# Masks that hide padded keys and are known otherwise, and those that hide others too.
PADDED = {ZEROS: "padded_mask", MEAN: "padded_mask_for_means", OTHER: "padded_mask_for_other_fills"}
KEEPS, STAYS = "keeps its mask", "stays written out"
SYMBOLIC = "its scores are multiplied by numbers that are known at run time only, as under dynamic=True"
EMPTY = "rows that see no key would be zero instead of what this fill of hidden scores gives"
ELSEWHERE = "the ids of its documents are not in this graph, or are overwritten in it"
DEPTH = 8  # most adds, muls, tanhs and wheres between the matmul of q and k and its softmax
PADDED_AND_MORE = {empty: f"{name}_and_more" for empty, name in PADDED.items()}


@dataclass(frozen=True)
class _Written:
    """How attention is written: its outcome if no pattern can match it, and its rows that see no key.

    The rows are those of a mask that adds nothing to the scores.
    """

    otherwise: str
    empty: str


GIVEN = _Written(KEEPS, ZEROS)


@dataclass(frozen=True)
class Note:
    """Records that an attention keeps its mask or stays written out, why, and the mask's meaning if that is why.

    `term` is the attention if a pattern may match it nevertheless.
    """

    outcome: str
    reason: str
    meaning: Meaning | None = None
    term: Term | None = None


# Many parameters because they are those of F.scaled_dot_product_attention.
def attention(
    call: Call,
    query: Term,
    key: Term,
    value: Term,
    attn_mask: Term | None = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Term | None:
    """Returns the term of a scaled_dot_product_attention call, or None if the arguments are not supported."""
    is_one = key.shape[1:2] == value.shape[1:2] == (1,)  # one head for all queries broadcasts as one group
    if key.shape[1:2] != query.shape[1:2] and not (enable_gqa or is_one):
        return None
    if not isinstance(is_causal, bool):
        return None
    dropout_p = const_of(dropout_p)
    if type(dropout_p) is float and dropout_p:
        dropout_p = Draw(dropout_p)
    # Autocast casts the operands without a node in the graph.
    q, k, v = (normalize.cast(call.space, tensor, call.dtype) for tensor in (query, key, value))
    mask = call.space.none if attn_mask is None else attn_mask
    consts = (is_causal, dropout_p, const_of(scale))
    return _attention(call.space, GIVEN, mask, q, k, v, consts, call.shape)


def _attention(
    space: Space,
    written: _Written,
    mask: Term,
    q: Term,
    k: Term,
    v: Term,
    consts: tuple[Any, ...],
    shape: tuple[Size, ...],
) -> Term | None:
    """Returns the term of attention, or None; notes the reason if no pattern can match the term."""
    if {len(q.shape), len(k.shape), len(v.shape)} != {4}:
        return None
    if k.shape[:2] != v.shape[:2] or k.shape[:1] != q.shape[:1] or shape != (*q.shape[:-1], v.shape[-1]):
        return None  # also excludes a mask with a larger batch, whose rows see different keys
    if not all(isinstance(tensor.shape[dim], int) for tensor in (q, k, v) for dim in (1, 3)):
        if mask is space.none:
            return None
        term = space.intern("attention_of_any_heads", (mask, q, k, v), consts, q.dtype, shape)
        return _noted(space, term, written.otherwise, "the number of heads or their size is symbolic")
    plain_k, plain_v = _ungrouped(space, k, HEADS), _ungrouped(space, v, HEADS)
    if plain_k is not None and plain_v is not None and plain_k.shape[1] == plain_v.shape[1]:
        k, v = plain_k, plain_v
    reason, unknown, (_, dropout_p, _, *cap) = "", None, consts
    if mask is not space.none:
        meaning = mask_meaning(space, mask, q.shape[2], k.shape[2])
        mask = _canonical(space, mask, meaning, _empty_rows(written.empty, meaning))
        if meaning.kind == "unknown" or (meaning.kind == "window" and dropout_p):
            reason, unknown = meaning.reason, meaning
        elif meaning.kind == "documents" and dropout_p:
            reason = "it is within documents, which is supported without dropout only"
        elif meaning.kind == "padded":
            reason = meaning.reason if mask.op == "padded_mask" else f"{meaning.reason}; {EMPTY}"
            unknown = meaning
        elif cap and ("all" in (meaning.kind, meaning.within) or dropout_p):
            reason = "its scores are capped, which is supported for causal attention without dropout only"
        elif meaning.kind == "documents":
            reason, unknown = ELSEWHERE, meaning
    term = normalize.apply(space, "attention", (mask, q, k, v), consts, q.dtype, shape)
    return _noted(space, term, written.otherwise, reason, unknown) if reason else term


def _empty_rows(without_fill: str, meaning: Meaning) -> str:
    """Returns what attention gives for rows that see no key: zeros, a mean of all values, or something else."""
    if meaning.fill == "finite" and without_fill != OTHER:
        return MEAN
    is_same = meaning.fill == "" or (meaning.fill, without_fill) == ("infinite", ZEROS)
    return without_fill if is_same else OTHER


def _canonical(space: Space, mask: Term, meaning: Meaning, empty: str) -> Term:
    """Returns one term for all masks of one meaning; q and k of the attention term determine its sizes.

    Args:
        empty: the rows that see no key.
    """
    if meaning.keys is not None:
        consts = (meaning.within, meaning.window)
        name = PADDED[ZEROS if space.empty_rows_unread else empty]
        if meaning.kind == "unknown":
            name, args = PADDED_AND_MORE[empty], (meaning.keys, mask)
            return normalize.apply(space, name, args, (), torch.bool, mask.shape)
        return normalize.apply(space, name, (meaning.keys,), consts, torch.bool, ())
    if meaning.documents is not None:
        consts = (meaning.within, meaning.window)
        return normalize.apply(space, "document_mask", (meaning.documents,), consts, torch.bool, ())
    names = {"causal": "causal_mask", "all": "no_mask", "window": "window_mask"}
    if meaning.kind not in names:
        return mask
    consts = () if meaning.window is None else (meaning.window,)
    return space.intern(names[meaning.kind], (), consts, torch.bool, ())


def _noted(space: Space, term: Term, outcome: str, reason: str, meaning: Meaning | None = None) -> Term:
    is_padded = meaning is not None and meaning.kind == "padded"
    space.findings.notes[term] = Note(outcome, reason, meaning, term if is_padded else None)
    return term


def _ungrouped(space: Space, term: Term, dim: int) -> Term | None:
    """Returns x if term is x with each slice along `dim` repeated, as by repeat_interleave; otherwise None."""
    if not term.may_be_passed or normalize.is_coarse_cast(term):
        return None
    if term.op == "cast":
        x = _ungrouped(space, term.args[0], dim) if _is_floating(term) else None
        return None if x is None else normalize.cast(space, x, term.dtype)
    if term.op == "permute":
        x = _ungrouped(space, term.args[0], term.consts[dim] if -dim <= len(term.consts) else dim)
        return None if x is None else normalize.permute(space, x, *term.consts)
    if term.op == "repeat_interleave" and term.consts[1] == dim:
        return term.args[0]
    if term.op != "view" or term.args[0].op != "expand":
        return None
    (grouped,), (source,) = term.args, term.args[0].args
    before, after = term.shape[:dim], term.shape[dim:][1:]
    groups, repeats = (
        grouped.shape[dim - 1 : dim + 1] if len(grouped.shape) == len(term.shape) + 1 else (0, 0)
    )
    if grouped.shape != (*before, groups, repeats, *after) or source.shape != (*before, groups, 1, *after):
        return None
    return normalize.view(space, source, *before, groups, *after)


# Written out


def written_out(space: Space, term: Term) -> Term | None:
    """Rewrites softmax(q @ k.T * scale + mask) @ v -> attention(mask, q, k, v).

    The term omits the rounding between the two matmuls: scaled_dot_product_attention keeps scores and weights in
    float32, or as exact as in code that writes them to memory. The term keeps the rounding of q, k and v. Reading a
    mask requires dtypes, which uncast terms lack, so the uncast term is derived from the exact one.
    """
    weights, dropout_p = _undropped(_uncast(term.args[0]))
    whole = weights.args[0] if weights.op == "slice" else weights
    if term.dtype is None or len(term.shape) != 4 or whole.op != "softmax" or whole.consts != (-1,):
        return None
    try:
        if whole is not weights:
            raise _LeftError("its softmax includes scores of no key, such as attention sinks")
        scores = _scores(space, weights.args[0])
        if scores is None:
            raise _LeftError("the operand of its softmax is not recognized as scores of queries and keys")
        return _of_scores(space, scores, dropout_p, term)
    except _LeftError as why:
        _noted(space, term, STAYS, str(why))
        return None


class _LeftError(Exception):
    """Raised with a sentence that explains why attention that is written out has no term."""


def _of_scores(space: Space, scores: _Scores, dropout_p: float, product: Term) -> Term | None:
    """Returns the attention term of `product`, which is softmax(scores) @ v, or None."""
    dtype, v = product.dtype, product.args[1]
    q = _exactly(space, scores.q, dtype)
    k = _exactly(space, normalize.permute(space, scores.k, -1, -2), dtype)
    if q is None or k is None:
        raise _LeftError(
            f"its scores are of {_name(scores.q.dtype)} and {_name(scores.k.dtype)}, its values are {_name(v.dtype)}"
        )
    mask = scores.combined(space) or space.intern("full", (), (True,), torch.bool, (1, 1))
    if product.shape != (*q.shape[:-1], *v.shape[-1:]) or k.shape[1:2] not in (q.shape[1:2], (1,)):
        return None
    cap = () if scores.cap is None else (_constant(scores.cap),)
    consts = (False, dropout_p, scores.scale, *cap)
    written = _Written(f"{STAYS} for its mask", scores.empty)
    return _attention(space, written, mask, q, k, v, consts, product.shape)


@dataclass(frozen=True)
class _Scores:
    """The input of a softmax: factor * (q @ k) + masks, or cap * tanh(factor * (q @ k)) + masks.

    A boolean mask hides the scores where it is False. A hidden score is at most `fill`.
    """

    q: Term
    k: Term  # each column is a key
    factor: Scalar | Term = ONE
    masks: tuple[Term, ...] = ()
    cap: Scalar | None = None
    fill: float = -math.inf

    def times(self, space: Space, factor: Scalar | Term, dtype: torch.dtype | None) -> _Scores | None:
        """Returns the scores times a number or a symbol, computed in `dtype`; None if the result has no such form."""
        if isinstance(factor, Term):
            is_first = self.factor == ONE and not self.masks and self.cap is None
            return replace(self, factor=factor) if is_first else None
        if isinstance(self.factor, Term) or not is_normal(factor, dtype):
            return None
        if any(mask.dtype is torch.bool for mask in self.masks):
            if factor.value < 0:
                return None
            _check_fill(self.fill * factor.value)
        masks = (
            mask
            if mask.dtype is torch.bool
            else space.intern("mul", (mask,), (factor, 1), mask.dtype, mask.shape)  # keeps its numbers apart
            for mask in self.masks
        )
        scaled = replace(self, masks=tuple(masks), fill=self.fill * abs(factor.value))
        both = merged(self.factor if self.cap is None else self.cap, factor, dtype)
        if both is None:
            raise _LeftError(
                f"its scores are scaled twice, and the value in between is rounded in {_name(dtype)}"
            )
        return replace(scaled, factor=both) if self.cap is None else replace(scaled, cap=both)

    def capped(self) -> _Scores | None:
        is_plain = not self.masks and self.cap is None and isinstance(self.factor, Scalar)
        return replace(self, cap=ONE) if is_plain else None

    def plus(self, mask: Term) -> _Scores:
        return replace(self, masks=(*self.masks, mask))

    def filled(self, condition: Term, fill: float) -> _Scores:
        return replace(self.plus(condition), fill=max(self.fill, fill))

    def combined(self, space: Space) -> Term | None:
        """Returns one mask for all masks, which hides the scores that any of them hides; None if there is no mask."""
        if len(self.masks) <= 1:
            return next(iter(self.masks), None)
        shape = normalize.broadcast(mask.shape for mask in self.masks)
        if shape is None:
            raise _LeftError("its masks have different shapes")
        return space.intern("masks", self.masks, (), torch.bool, shape)

    @property
    def empty(self) -> str:
        """The rows of softmax that see no key: a finite fill gives equal weights, and -inf gives NaN."""
        is_filled = any(mask.dtype is torch.bool for mask in self.masks)
        return OTHER if is_filled and not math.isfinite(self.fill) else MEAN

    @property
    def scale(self) -> Any:
        """The scale constant of attention: with a cap, the scores are cap * tanh(scale / cap * (q @ k))."""
        if isinstance(self.factor, Term):
            return self.factor
        return _constant(self.factor if self.cap is None else self.factor * self.cap)


def _constant(scalar: Scalar) -> Any:
    if not scalar.powers:
        return scalar.value
    ((name, power), *others) = scalar.powers
    if others or power != 1 or scalar.value != 1:
        raise _LeftError(f"it is scaled by {scalar}")
    return ConstVar(name)


def _scores(space: Space, term: Term, depth: int = DEPTH) -> _Scores | None:
    """Returns the scores that `term` computes, or None if it computes something else."""
    if not depth:
        return None
    term = _uncast(term)
    if term.op == "matmul":
        q, k = term.args
        return _Scores(q, k)
    if term.op == "mul":
        return _scaled(space, term, depth - 1)
    if term.op == "add" and term.consts[0] == ZERO and len(term.args) == 2:
        for product, mask in (term.args, term.args[::-1]):
            scores = _scores(space, product, depth - 1)
            if scores is not None:
                return scores.plus(mask)
    if term.op == "tanh":
        scores = _scores(space, term.args[0], depth - 1)
        return None if scores is None else scores.capped()
    if term.op == "where":
        return _filled(space, term, depth - 1)
    return None


def _scaled(space: Space, term: Term, depth: int) -> _Scores | None:
    scalar, *powers = term.consts
    for at, product in enumerate(term.args):
        scores = _scores(space, product, depth) if powers[at] == 1 else None
        if scores is None:
            continue
        others = [(factor, powers[i]) for i, factor in enumerate(term.args) if i != at]
        for factor, power in others:
            number = _number(factor)
            together = None if number is None else merged(scalar, number**power, term.dtype)
            if together is not None:
                scalar = together
            elif number is not None or factor.dtype is not None:
                return None
            else:
                is_alone = others == [(factor, 1)] and scalar == ONE
                scaled = scores.times(space, factor, term.dtype) if is_alone else None
                if scaled is None:
                    raise _LeftError(SYMBOLIC)
                return scaled
        return scores.times(space, scalar, term.dtype)
    return None


def _number(term: Term) -> Scalar | None:
    """Returns the number that a term is, directly or as a zero-dimensional tensor; otherwise None."""
    if term.op == "number":
        return term.consts[0]
    if term.op != "full" or term.shape:
        return None
    return Scalar(rounded(float(term.consts[0]), term.dtype))


def _filled(space: Space, term: Term, depth: int) -> _Scores | None:
    """Returns the scores of where(condition, scores, -inf), or of the reverse order; otherwise None."""
    condition, chosen, other = term.args
    for product, fill, hides in ((chosen, other, False), (other, chosen, True)):
        number = _number(fill)
        scores = _scores(space, product, depth) if number is not None else None
        if scores is None or number is None:
            continue
        _check_fill(math.nan if number.powers else number.value)
        if hides:
            condition = normalize.apply(space, "not", (condition,), (), torch.bool, condition.shape)
        return scores.filled(condition, number.value)
    return None


def _check_fill(number: float) -> None:
    """Raises _LeftError unless scores of at most `number` are hidden."""
    if not number <= HIDES:
        raise _LeftError(
            f"it sets hidden scores to {number:g} instead of -inf or the lowest number of the dtype"
        )


def _undropped(term: Term) -> tuple[Term, float]:
    """Returns the term without its dropout, and the probability of the dropout."""
    return (_uncast(term.args[0]), term.consts[0]) if term.op == "dropout" else (term, 0.0)


def _uncast(term: Term) -> Term:
    while term.op == "cast" and _is_floating(term) and term.may_be_passed:
        term = term.args[0]
    return term


def _is_floating(term: Term) -> bool:
    """Returns whether code computes in the dtype of a term; rounding to eight bits is deliberate."""
    return term.dtype is None or (term.dtype.is_floating_point and term.dtype.itemsize > 1)


def _exactly(space: Space, term: Term, dtype: torch.dtype | None) -> Term | None:
    """Returns `term` in `dtype` if that rounds no value; otherwise None."""
    while term.op == "cast" and normalize.widens(term.args[0].dtype, term.dtype):
        term = term.args[0]
    return normalize.cast(space, term, dtype) if normalize.widens(term.dtype, dtype) else None


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def notes_in(
    space: Space, terms: Iterable[Any], is_here: Callable[[Term], Any] = lambda ids: False
) -> list[Note]:
    """Returns the notes on the attention among these terms, one for each distinct term.

    Args:
        is_here: returns whether document ids are a value of the graph; there is then no note on these documents.
    """
    notes = space.findings.notes
    found = dict.fromkeys(term for term in terms if isinstance(term, Term))
    return [
        note
        for term in found
        if (note := notes.get(term)) and not (note.reason == ELSEWHERE and is_here(_ids_of(note)))
    ]


def _ids_of(note: Note) -> Term:
    assert note.meaning is not None and note.meaning.documents is not None, (
        "a note on documents has their meaning"
    )
    return note.meaning.documents


def sentences(notes: Iterable[Note]) -> Iterator[str]:
    """Yields one sentence for each distinct note."""
    for (outcome, reason), times in Counter((note.outcome, note.reason) for note in notes).items():
        yield f"attention {outcome} {times}x: {reason}"
