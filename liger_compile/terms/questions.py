"""Reads terms as questions about the softmax of a head: what is computed from logits, whatever its spelling.

A *wide* term has a number for each class of each row: logits, scaled, capped and cast, their softmax and log_softmax,
and sums of products of these. It is read as a polynomial: from products of symbols (`Symbol`) to their factors. A
*narrow* term is a wide one reduced over the classes: a question, or a sum of questions with factors (`Narrow`).

    gather(z, index), gather(log_softmax(z), index), cross_entropy(z, target), logsumexp(z), argmax(z), topk(z)
    sum(p * z), sum(p * log p), sum(z), sum(log p), sum(p * p)      p = softmax(z), also as exp(log_softmax(z))

    sum(q * log p), sum(q * (log q - log p)), and the Jensen-Shannon divergence, of two heads

Views and slices of the rows are read as a box of the rows of the head's input, and a range of its flattened rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import sympy
import torch

from liger_compile.terms import normalize
from liger_compile.terms.term import Size, Space, Term

T = TypeVar("T")
DEEPEST = 48  # terms from a question to its head
MOST_MONOMIALS, MOST_SYMBOLS = 4, 2


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor: those in a box of its leading dimensions, flattened, from `first` to `last`.

    Args:
        lead: the sizes of the leading dimensions of the tensor.
        box: (start, end) for each of them; an end counts from the size, and is 0 or negative.
        last: None is the end.
    """

    lead: tuple[Size, ...]
    box: tuple[tuple[int, int], ...]
    first: int = 0
    last: int | None = None

    @staticmethod
    def all(lead: tuple[Size, ...]) -> Rows:
        return Rows(lead, tuple((0, 0) for _ in lead))

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of the box."""
        return tuple(size + end - start for size, (start, end) in zip(self.lead, self.box, strict=True))

    @property
    def is_whole(self) -> bool:
        return self.first == 0 and self.last is None

    def sliced(self, lead: tuple[Size, ...], at: int, start: Size, stop: Size) -> Rows | None:
        """Returns the rows start:stop in dimension `at` of these rows in the shape `lead`, or None."""
        end = _plain(stop - lead[at])
        if self.is_whole and lead == self.sizes and isinstance(start, int) and end is not None:
            box = [*self.box]
            box[at] = (box[at][0] + start, box[at][1] + end)
            return replace(self, box=tuple(box))
        inner = _plain(_product(lead[at + 1 :]))
        if any(size != 1 for size in lead[:at]) or inner is None:
            return None
        if not (isinstance(start, int) and isinstance(stop, int)):
            return None
        return replace(self, first=self.first + start * inner, last=self.first + stop * inner)


def _plain(size: Any) -> int | None:
    return int(size) if isinstance(size, (int, sympy.Integer)) else None


def _product(sizes: tuple[Size, ...]) -> Size:
    count: Size = 1
    for size in sizes:
        count = count * size
    return count


@dataclass(frozen=True)
class Head:
    """A linear layer: its input without views and slices of rows, its weight and bias without slices of classes."""

    x: Term
    weight: Term
    bias: Term
    dtype: torch.dtype


@dataclass(frozen=True)
class Scores:
    """scale * logits; or scale * tanh(inner * logits). Of the classes (start, end) of a head: see Rows.box."""

    head: Head
    classes: tuple[int, int] = (0, 0)
    inner: float | None = None
    scale: float = 1.0

    @property
    def unscaled(self) -> Scores:
        return replace(self, scale=1.0)


@dataclass(frozen=True)
class Symbol:
    """A factor of a wide term, at rows of the input of a head.

    Args:
        kind: "z", "lp" (log_softmax), "p" (softmax), "xlogx" (p * log p, 0 where p is 0), "isinf" (of z), or
            "finite_lp" (0 where z is infinite; so is what it is multiplied by); of several heads: "stack", "mix" (log
            of a mixture).
        of: the symbols "lp" in a stack or a mixture, in which `scores` are those of the first.
        shifts: the logarithms of their weights.
    """

    kind: str
    scores: Scores
    rows: Rows
    is_detached: bool = False
    of: tuple[Symbol, ...] = ()
    shifts: tuple[float, ...] = ()

    @property
    def source(self) -> tuple[Scores, Rows, bool]:
        """What the symbol is a function of."""
        return self.scores, self.rows, self.is_detached


Wide = Mapping[tuple[Symbol, ...], float]


@dataclass(frozen=True)
class Asked:
    """A multiple of a question's answer: ops/answer_plan.py has the questions.

    Args:
        scores: with the scale, except for questions whose answers scale as the scores do (`factor` has the scale).
        index: for questions about columns, int64: `width` entries for each row.
        other: for PAIRS, a symbol of the other head. Of "kl" and "cross", `scores` are those whose softmax is p:
            sum(p * (log p - log q)), sum(p * log q). Of "jensen_shannon" they have the weight beta.
    """

    question: str
    scores: Scores
    rows: Rows
    factor: float = 1.0
    index: Term | None = None
    width: int = 1
    loss: tuple[int, str, float] | None = None
    is_detached: bool = False
    other: Symbol | None = None
    beta: float = 0.5


@dataclass(frozen=True)
class Narrow:
    """The sum of some answers, of the same rows; and steps that follow, as in ops/answer_plan.py."""

    asked: tuple[Asked, ...]
    steps: tuple[tuple[str, Any], ...]

    def then(self, *steps: tuple[str, Any]) -> Narrow:
        return replace(self, steps=(*self.steps, *steps))


PAIRS = frozenset(("kl", "plain_kl", "cross", "finite_cross", "jensen_shannon"))
# Questions whose answers are proportional to the scores.
LINEAR = frozenset(("scores", "score_sum", "mean_score", "top"))
_OF_PRODUCTS: Mapping[tuple[str, ...], tuple[str, float]] = {
    ("z",): ("score_sum", 1.0),
    ("lp",): ("log_probability_sum", 1.0),
    ("p", "z"): ("mean_score", 1.0),
    ("lp", "p"): ("entropy", -1.0),
    ("p", "p"): ("collision", 1.0),
}


class Reader:
    """Reads the terms of one space; remembers what it read."""

    def __init__(self, space: Space, written: Mapping[Term, Term]) -> None:
        """Reads terms of a space. `written`: a value after a write -> the result of the operation that wrote it."""
        self.space, self.written = space, written
        self.linears: dict[Head, dict[Term, None]] = {}
        self._wide: dict[Term, Wide | None] = {}
        self._narrow: dict[Term, Narrow | None] = {}

    def wide(self, term: Term, depth: int = DEEPEST) -> Wide | None:
        """Returns a wide term as a polynomial, or None."""
        if term not in self._wide:
            found = self._read(_WIDE, term, depth)
            is_plain = found and all(math.isfinite(factor) and factor for factor in found.values())
            self._wide[term] = found if found and is_plain and len(found) <= MOST_MONOMIALS else None
        return self._wide[term]

    def narrow(self, term: Term, depth: int = DEEPEST) -> Narrow | None:
        """Returns a narrow term as a sum of answers, or None."""
        if term not in self._narrow:
            self._narrow[term] = self._read(_NARROW, term, depth)
        return self._narrow[term]

    def _read(
        self, table: Mapping[str, Callable[[Reader, Term, int], T | None]], term: Term, depth: int
    ) -> T | None:
        read = table.get(term.op)
        try:
            return read(self, term, depth - 1) if read and depth else None
        except ArithmeticError:  # 0**-1, or a number out of the range of a float: no polynomial
            return None

    def scores(self, term: Term, depth: int) -> Symbol | None:
        """Returns the scores that a term is, as a symbol "z" with their scale; or None."""
        wide = self.wide(term, depth)
        symbol, factor = _single(wide)
        if symbol is None or symbol.kind != "z":
            return None
        return replace(symbol, scores=replace(symbol.scores, scale=factor))


def _single(wide: Wide | None) -> tuple[Symbol | None, float]:
    """Returns the only symbol of a polynomial, and its factor; or None."""
    if wide is None or len(wide) != 1:
        return None, 0.0
    ((symbols, factor),) = wide.items()
    return (symbols[0], factor) if len(symbols) == 1 else (None, 0.0)


def _of(wide: Wide, change: Callable[[Symbol], Symbol | None]) -> Wide | None:
    """Returns a polynomial with every symbol changed; None if that is not possible."""
    found: dict[tuple[Symbol, ...], float] = {}
    for symbols, factor in wide.items():
        changed = [change(symbol) for symbol in symbols]
        if any(symbol is None for symbol in changed):
            return None
        key = tuple(symbol for symbol in changed if symbol is not None)
        found[key] = found.get(key, 0.0) + factor
    return found


# Wide terms


def _linear(reader: Reader, term: Term, _: int) -> Wide | None:
    x, weight, bias = term.args
    if len(weight.shape) != 2 or len(x.shape) < 2 or term.dtype is None:
        return None
    source, rows = located(reader.space, x, x.shape[-1])
    weight, classes = _of_classes(reader.space, weight, -2)
    if bias is not reader.space.none:
        bias, of_bias = _of_classes(reader.space, bias, -1)
        if of_bias != classes:
            return None
    head = Head(source, weight, bias, term.dtype)
    reader.linears.setdefault(head, {})[term] = None
    return {(Symbol("z", Scores(head, classes), rows),): 1.0}


def _of_classes(space: Space, term: Term, dim: int) -> tuple[Term, tuple[int, int]]:
    """Returns a weight or bias without a slice of its classes, and the slice."""
    inner = term.args[0] if term.op == "cast" else term
    if inner.op != "slice" or inner.consts[0] != dim or inner.consts[3] != 1:
        return term, (0, 0)
    _, start, stop, _ = inner.consts
    end = _plain(stop - inner.args[0].shape[dim])
    if not isinstance(start, int) or end is None:
        return term, (0, 0)
    return normalize.cast(space, inner.args[0], term.dtype), (start, end)


def located(space: Space, term: Term, width: Size) -> tuple[Term, Rows]:
    """Returns the term that a term is rows of, and which rows: views and slices of leading dimensions are undone.

    Args:
        width: the number of elements of a row. A row is the last dimension; or, of an index with one entry for each
            row, an element.
    """
    chain = [term]
    inner = term.args[0] if term.op == "cast" else term
    while inner.op in ("view", "slice") and len(chain) < DEEPEST and _keeps_rows(inner, width):
        inner = inner.args[0]
        chain.append(normalize.cast(space, inner, term.dtype))
    for source in reversed(chain):
        rows = _replayed(source, chain[: chain.index(source)], width)
        if rows is not None:
            return source, rows
    raise AssertionError("a term is the rows of itself")


def _keeps_rows(moved: Term, width: Size) -> bool:
    source = moved.args[0]
    if width == 1:
        return moved.op == "view" or moved.consts[3] == 1
    if moved.op == "view":
        return moved.shape[-1:] == source.shape[-1:] == (width,)
    return moved.consts[0] != -1 and moved.consts[3] == 1


def _replayed(source: Term, chain: list[Term], width: Size) -> Rows | None:
    """Returns the rows of `source` that the first term of a chain of moves has; the last move is the innermost."""
    rows: Rows | None = Rows.all(lead_of(source, width))
    before = source
    for moved in reversed(chain):
        inner = moved.args[0] if moved.op == "cast" else moved
        if rows is not None and inner.op == "slice":
            dim, start, stop, _ = inner.consts
            rows = rows.sliced(lead_of(before, width), dim + len(before.shape), start, stop)
        before = moved
    return rows


def lead_of(term: Term, width: Size) -> tuple[Size, ...]:
    """Returns the leading sizes of a tensor with `width` elements in a row."""
    return term.shape if width == 1 else term.shape[:-1]


def _leaf(reader: Reader, term: Term, depth: int) -> Wide | None:
    """Reads logits that were scaled in place."""
    return reader.wide(reader.written[term], depth) if term in reader.written else None


def _cast(reader: Reader, term: Term, depth: int) -> Wide | None:
    """Reads a cast; not one to a dtype that the head's does not fit into, which rounds on purpose."""
    wide = reader.wide(term.args[0], depth)
    if wide is None:
        return None
    dtypes = {symbol.scores.head.dtype for symbols in wide for symbol in symbols}
    return wide if all(normalize.widens(dtype, term.dtype) for dtype in dtypes) else None


def _detached(reader: Reader, term: Term, depth: int) -> Wide | None:
    wide = reader.wide(term.args[0], depth)
    return (
        None
        if wide is None
        else _of(wide, lambda symbol: None if symbol.of else replace(symbol, is_detached=True))
    )


def _view(reader: Reader, term: Term, depth: int) -> Wide | None:
    return reader.wide(term.args[0], depth) if term.shape[-1:] == term.args[0].shape[-1:] else None


def _slice(reader: Reader, term: Term, depth: int) -> Wide | None:
    (source,), (dim, start, stop, step) = term.args, term.consts
    wide = reader.wide(source, depth)
    if wide is None or step != 1:
        return None
    if dim == -1:
        return _of(wide, lambda symbol: _fewer_classes(symbol, start, _plain(stop - source.shape[-1])))

    def sliced(symbol: Symbol) -> Symbol | None:
        rows = symbol.rows.sliced(source.shape[:-1], dim + len(source.shape), start, stop)
        return None if rows is None or symbol.of else replace(symbol, rows=rows)

    return _of(wide, sliced)


def _fewer_classes(symbol: Symbol, start: Size, end: int | None) -> Symbol | None:
    if symbol.kind != "z" or not isinstance(start, int) or end is None:
        return None
    first, last = symbol.scores.classes
    return replace(symbol, scores=replace(symbol.scores, classes=(first + start, last + end)))


def _mul(reader: Reader, term: Term, depth: int) -> Wide | None:
    scalar, *powers = term.consts
    if scalar.powers or len(powers) > MOST_SYMBOLS + 1:
        return None
    product: dict[tuple[Symbol, ...], float] = {(): scalar.value}
    for factor, power in zip(term.args, powers, strict=True):
        if factor.shape == () and (number := constant(factor)) is not None:
            product = {symbols: known * number**power for symbols, known in product.items()}
            continue
        if power not in (1, 2) or factor.shape != term.shape or (wide := reader.wide(factor, depth)) is None:
            return None
        for _ in range(int(power)):
            product = _product_of(product, wide)
    return product if all(0 < len(symbols) <= MOST_SYMBOLS for symbols in product) else None


def _product_of(a: Wide, b: Wide) -> dict[tuple[Symbol, ...], float]:
    found: dict[tuple[Symbol, ...], float] = {}
    for left, factor in a.items():
        for right, other in b.items():
            key = tuple(sorted((*left, *right), key=lambda symbol: symbol.kind))
            found[key] = found.get(key, 0.0) + factor * other
    return found


def _add(reader: Reader, term: Term, depth: int) -> Wide | None:
    """Reads a sum of wide terms and numbers; z - logsumexp(z) is log_softmax(z)."""
    if term.consts[0].powers:
        return None
    normalized = _written_log_softmax(reader, term, depth) if term.consts[0] == normalize.ZERO else None
    if normalized is not None:
        return normalized
    total: dict[tuple[Symbol, ...], float] = {}
    if term.consts[0].value:
        total[()] = term.consts[0].value
    for addend in term.args:
        if addend.shape == () and (number := constant(addend)) is not None:
            total[()] = total.get((), 0.0) + number
            continue
        wide = reader.wide(addend, depth) if addend.shape == term.shape else None
        if wide is None:
            return None
        for symbols, factor in wide.items():
            total[symbols] = total.get(symbols, 0.0) + factor
    return total


def _written_log_softmax(reader: Reader, term: Term, depth: int) -> Wide | None:
    if len(term.args) != 2:
        return None
    for scores, other in (term.args, term.args[::-1]):
        symbol = reader.scores(scores, depth) if scores.shape == term.shape else None
        narrow = reader.narrow(other, depth) if symbol and other.shape[-1:] == (1,) else None
        if symbol is None or narrow is None or len(narrow.asked) != 1:
            continue
        (asked,) = narrow.asked
        factor = asked.factor
        for step, argument in narrow.steps:
            factor *= argument if step == "mul" else 1.0
        is_same = (asked.scores, asked.rows, asked.is_detached) == (
            symbol.scores,
            symbol.rows,
            symbol.is_detached,
        )
        if asked.question == "logsumexp" and is_same and factor == -1:
            return {(replace(symbol, kind="lp"),): 1.0}
    return None


def _tanh(reader: Reader, term: Term, depth: int) -> Wide | None:
    symbol = reader.scores(term.args[0], depth)
    if symbol is None or symbol.scores.inner is not None:
        return None
    scores = replace(symbol.scores, inner=symbol.scores.scale, scale=1.0)
    return {(replace(symbol, scores=scores),): 1.0}


def _softmax(kind: str) -> Callable[[Reader, Term, int], Wide | None]:
    def read(reader: Reader, term: Term, depth: int) -> Wide | None:
        symbol = reader.scores(term.args[0], depth) if term.consts == (-1,) else None
        return None if symbol is None else {(replace(symbol, kind=kind),): 1.0}

    return read


def _exp(reader: Reader, term: Term, depth: int) -> Wide | None:
    symbol, factor = _single(reader.wide(term.args[0], depth))
    is_log = symbol is not None and symbol.kind == "lp" and factor == 1
    return {(replace(symbol, kind="p"),): 1.0} if symbol is not None and is_log else None


def _isinf(reader: Reader, term: Term, depth: int) -> Wide | None:
    symbol = reader.scores(term.args[0], depth)
    return None if symbol is None else {(replace(symbol, kind="isinf"),): 1.0}


def _where(reader: Reader, term: Term, depth: int) -> Wide | None:
    """Reads a product with log p that is 0 where the logits are infinite."""
    condition, filled, values = term.args
    infinite, _ = _single(reader.wide(condition, depth))
    if infinite is None or infinite.kind != "isinf" or constant(filled) != 0 or values.shape != term.shape:
        return None
    wide = reader.wide(values, depth)

    def finite(symbol: Symbol) -> Symbol:
        is_it = (symbol.scores.unscaled, symbol.rows) == (infinite.scores.unscaled, infinite.rows)
        return replace(symbol, kind="finite_lp") if symbol.kind == "lp" and is_it else symbol

    if wide is None:
        return None
    changed = _of(wide, finite)
    is_each = all(any(symbol.kind == "finite_lp" for symbol in symbols) for symbols in changed or ())
    return changed if is_each else None


def _kl_div(reader: Reader, term: Term, depth: int) -> Wide | None:
    """Reads the terms of F.kl_div: p * (log p - x)."""
    (x, factor), (target, of_target) = (_single(reader.wide(arg, depth)) for arg in term.args)
    (has_log,) = term.consts
    if x is None or target is None or (factor, of_target) != (1, 1) or x.kind not in ("lp", "mix"):
        return None
    if target.kind != ("lp" if has_log else "p"):
        return None
    p = replace(target, kind="p")
    own = (replace(target, kind="lp"), p) if has_log else (replace(target, kind="xlogx"),)
    return {own: 1.0, (x, p): -1.0}


def _cat(reader: Reader, term: Term, depth: int) -> Wide | None:
    """Reads a stack of two log_softmax, each plus a number."""
    if len(term.args) != 2 or term.consts == (-1,):
        return None
    found = [_shifted(reader.wide(part, depth)) for part in term.args if part.shape[term.consts[0]] == 1]
    return _joined("stack", [one for one in found if one is not None])


def _shifted(wide: Wide | None) -> tuple[Symbol, float] | None:
    rest = {symbols: factor for symbols, factor in (wide or {}).items() if symbols}
    symbol, factor = _single(rest)
    is_log = symbol is not None and symbol.kind == "lp" and factor == 1
    return (symbol, (wide or {}).get((), 0.0)) if symbol is not None and is_log else None


def _joined(kind: str, parts: list[tuple[Symbol, float]]) -> Wide | None:
    if len(parts) != 2:
        return None
    of, shifts = zip(*parts, strict=True)
    return {(Symbol(kind, of[0].scores, of[0].rows, False, of, shifts),): 1.0}


def _mixed(reader: Reader, term: Term, depth: int) -> Wide | None:
    """Reads logsumexp over a stack."""
    (stack,), dims = term.args, term.consts
    symbol, factor = _single(reader.wide(stack, depth))
    is_over_stack = stack.op == "cat" and stack.consts == dims and factor == 1
    if symbol is None or symbol.kind != "stack" or not is_over_stack:
        return None
    return _mixture(list(zip(symbol.of, symbol.shifts, strict=True)))


def _logaddexp(reader: Reader, term: Term, depth: int) -> Wide | None:
    found = [_shifted(reader.wide(part, depth)) for part in term.args if part.shape == term.shape]
    return _mixture([one for one in found if one is not None])


def _mixture(parts: list[tuple[Symbol, float]]) -> Wide | None:
    is_mixture = math.isclose(sum(math.exp(shift) for _, shift in parts), 1.0, rel_tol=1e-6)
    return _joined("mix", parts) if is_mixture else None


def constant(term: Term, depth: int = 6) -> float | None:
    """Returns the number that a term is, or None."""
    if term.op == "number":
        return None if term.consts[0].powers else float(term.consts[0].value)
    if term.op == "full":
        return float(term.consts[0]) if isinstance(term.consts[0], (int, float)) else None
    args = [constant(arg, depth - 1) for arg in term.args] if depth and len(term.args) <= 2 else [None]
    if any(arg is None for arg in args):
        return None
    known = [arg for arg in args if arg is not None]
    try:
        return _evaluated(term, known)
    except (ValueError, OverflowError, ZeroDivisionError):
        return None


def _evaluated(term: Term, args: list[float]) -> float | None:
    if term.op in ("cast", "view", "expand") and term.dtype is not None and term.dtype.is_floating_point:
        return args[0] if normalize.widens(torch.float32, term.dtype) or term.op != "cast" else None
    if term.op == "mul" and not term.consts[0].powers:
        return term.consts[0].value * math.prod(a**p for a, p in zip(args, term.consts[1:], strict=True))
    if term.op == "add" and not term.consts[0].powers:
        return term.consts[0].value + sum(args)
    function = {"log": math.log, "exp": math.exp, "log1p": math.log1p}.get(term.op.rpartition(".")[2])
    return function(args[0]) if function and len(args) == 1 else None


_WIDE: Mapping[str, Callable[[Reader, Term, int], Wide | None]] = {
    "leaf": _leaf,
    "linear": _linear,
    "cast": _cast,
    "detached": _detached,
    "view": _view,
    "slice": _slice,
    "mul": _mul,
    "add": _add,
    "tanh": _tanh,
    "softmax": _softmax("p"),
    "log_softmax": _softmax("lp"),
    "exp": _exp,
    "where": _where,
    "kl_div": _kl_div,
    "cat": _cat,
    "logsumexp": _mixed,
    **{f"{module}.isinf": _isinf for module in ("str", "torch")},
    **{f"{module}.logaddexp": _logaddexp for module in ("str", "torch")},
}


# Narrow terms


@dataclass(frozen=True)
class Leading:
    """The size of the leading dimension `at` of the rows of a question, for a symbolic size of a shape."""

    at: int


def shape_of(sizes: tuple[Size, ...], rows: Rows) -> tuple[Any, ...] | None:
    """Returns a shape for a view of answers for these rows; None if its symbolic sizes cannot be expressed."""
    known = {size: Leading(at) for at, size in enumerate(rows.sizes) if rows.is_whole}
    found = tuple(size if isinstance(size, int) else known.get(size, -1) for size in sizes)
    return found if found.count(-1) <= 1 else None


def _answer(term: Term, *asked: Asked) -> Narrow | None:
    """Returns the answers in the form of a term."""
    shape = shape_of(term.shape, asked[0].rows)
    return None if shape is None else Narrow(asked, (("view", shape), ("to", term.dtype)))


def _about(question: str) -> Callable[[Reader, Term, int], Narrow | None]:
    """Returns a reader of a reduction over the classes alone."""

    def read(reader: Reader, term: Term, depth: int) -> Narrow | None:
        symbol = reader.scores(term.args[0], depth) if term.consts[0] == -1 else None
        if symbol is None or len(term.consts) != 1 + (question in ("top", "top_columns")):
            return None
        if question != "logsumexp" and symbol.scores.scale <= 0:
            return None
        width = term.consts[1] if len(term.consts) > 1 else 1
        factor, scores = _split(question, symbol)
        asked = Asked(question, scores, symbol.rows, factor, width=width, is_detached=symbol.is_detached)
        return _answer(term, asked)

    return read


def _split(question: str, symbol: Symbol) -> tuple[float, Scores]:
    """Returns factor and scores: of answers that are proportional to the scores, their scale is the factor."""
    scale = symbol.scores.scale
    return (scale, symbol.scores.unscaled) if question in LINEAR else (1.0, symbol.scores)


def _gather(reader: Reader, term: Term, depth: int) -> Narrow | None:
    values, index = term.args
    symbol, factor = _single(reader.wide(values, depth))
    width = _plain(term.shape[-1])
    if symbol is None or term.consts != (-1,) or not width or index.shape[:-1] != values.shape[:-1]:
        return None
    if symbol.kind not in ("z", "lp"):
        return None
    question = "scores" if symbol.kind == "z" else "log_probabilities"
    asked = Asked(question, symbol.scores, symbol.rows, factor, index, width, is_detached=symbol.is_detached)
    return _answer(term, asked)


def _cross_entropy(reader: Reader, term: Term, depth: int) -> Narrow | None:
    logits, target, weight = term.args
    symbol = reader.scores(logits, depth)
    ignore_index, reduction, smoothing = term.consts
    if symbol is None or weight is not reader.space.none or reduction not in ("none", "sum", "mean"):
        return None
    if _product(target.shape) != _product(logits.shape[:-1]):
        return None
    asked = Asked(
        "cross_entropy",
        symbol.scores,
        symbol.rows,
        index=target,
        loss=(ignore_index, reduction, smoothing),
        is_detached=symbol.is_detached,
    )
    return _answer(term, asked)


def _reduced(name: str) -> Callable[[Reader, Term, int], Narrow | None]:
    def read(reader: Reader, term: Term, depth: int) -> Narrow | None:
        (wide_term,), dims = term.args, term.consts
        wide, classes = reader.wide(wide_term, depth), _plain(wide_term.shape[-1])
        if wide is None:
            return _reduced_further(reader, term, name, depth)
        if -1 not in dims or classes is None:
            return None
        pair = _of_pair(wide)
        asked = tuple(_of_monomial(symbols, factor) for symbols, factor in wide.items() if factor)
        asked = asked if pair is None else (pair,)
        if not asked or any(one is None for one in asked) or len({one.rows for one in asked if one}) > 1:
            return None
        found = tuple(one for one in asked if one is not None)
        lead, shape = (shape_of(sizes, found[0].rows) for sizes in (wide_term.shape[:-1], term.shape))
        if lead is None or shape is None:
            return None
        steps: list[tuple[str, Any]] = [("view", (*lead, 1))]
        if rest := tuple(dim for dim in dims if dim != -1):
            steps.append((name, rest))
        if name == "mean":
            steps.append(("mul", 1 / classes))
        return Narrow(found, (*steps, ("view", shape), ("to", term.dtype)))

    return read


def _reduced_further(reader: Reader, term: Term, name: str, depth: int) -> Narrow | None:
    """Reads a reduction of a question over rows."""
    narrow = reader.narrow(term.args[0], depth)
    shape = None if narrow is None else shape_of(term.shape, narrow.asked[0].rows)
    if narrow is None or shape is None:
        return None
    return narrow.then((name, term.consts), ("view", shape), ("to", term.dtype))


def _of_monomial(symbols: tuple[Symbol, ...], factor: float) -> Asked | None:
    """Returns the sum over the classes of a product of symbols of the same scores."""
    found = _OF_PRODUCTS.get(tuple(sorted(symbol.kind for symbol in symbols)))
    scaled = [symbol for symbol in symbols if symbol.kind != "z"] or [*symbols]
    first = scaled[0]
    if found is None or len({(s.scores.unscaled, s.rows, s.is_detached) for s in symbols}) > 1:
        return None
    if len({symbol.scores for symbol in scaled}) > 1:
        return None
    question, sign = found
    if question == "mean_score":  # of scores with the scale of the softmax, times a number
        factor = factor / first.scores.scale
    scores = first.scores.unscaled if question == "score_sum" else first.scores
    return Asked(question, scores, first.rows, sign * factor, is_detached=first.is_detached)


def _of_pair(wide: Wide) -> Asked | None:
    """Returns the sum over the classes of a divergence of two heads."""
    products = {tuple(symbol.kind for symbol in symbols): [] for symbols in wide}
    for symbols, factor in wide.items():
        products[tuple(symbol.kind for symbol in symbols)].append((*symbols, factor))
    of_p = products.get(("lp", "p"), [])
    if len(wide) == 1:
        ((kinds, ((*symbols, factor),)),) = products.items()
        if kinds in (("lp", "p"), ("finite_lp", "p")) and symbols[0].source != symbols[1].source:
            return _pair("cross" if kinds[0] == "lp" else "finite_cross", symbols[1], symbols[0], factor)
        return None
    if len(wide) == 2:
        return _of_kl(of_p, products.get(("xlogx",), []))
    return _of_mixture(of_p, products.get(("mix", "p"), [])) if len(wide) == 4 else None


def _pair(question: str, p: Symbol, other: Symbol, factor: float, beta: float = 0.5) -> Asked:
    return Asked(question, p.scores, p.rows, factor, is_detached=p.is_detached, other=other, beta=beta)


def _of_kl(of_p: list[Any], of_xlogx: list[Any]) -> Asked | None:
    own = [(p, factor) for lp, p, factor in of_p if lp.source == p.source]
    own += [(symbol, factor) for symbol, factor in of_xlogx]
    crossed = [(lp, p, factor) for lp, p, factor in of_p if lp.source != p.source]
    if len(own) != 1 or len(crossed) != 1:
        return None
    ((p, factor),), ((lp, other_p, other_factor),) = own, crossed
    if p.source != other_p.source or other_factor != -factor:
        return None
    return _pair("plain_kl" if of_xlogx else "kl", p, lp, factor)


def _of_mixture(of_p: list[Any], of_mix: list[Any]) -> Asked | None:
    """Returns beta * KL(p, m) + (1 - beta) * KL(q, m), for the mixture m with these weights."""
    if len(of_p) != 2 or len(of_mix) != 2 or any(lp.source != p.source for lp, p, _ in of_p):
        return None
    total = sum(factor for *_, factor in of_p)
    (_, p, first), (_, q, _) = of_p
    mixture = of_mix[0][0]
    weights = {
        symbol.source: math.exp(shift) for symbol, shift in zip(mixture.of, mixture.shifts, strict=True)
    }
    expected = {(mixture.source, symbol.source): factor for _, symbol, factor in of_p}
    found = {(mix.source, symbol.source): -factor for mix, symbol, factor in of_mix if mix == mixture}
    is_weighted = total and {p.source, q.source} == set(weights) and p.source != q.source
    if (
        expected != found
        or not is_weighted
        or not math.isclose(first / total, weights[p.source], rel_tol=1e-6)
    ):
        return None
    return _pair("jensen_shannon", p, q, total, weights[p.source])


def heads_of(wide: Wide) -> Iterator[Head]:
    """Yields the heads of the symbols of a polynomial."""
    for symbols in wide:
        for symbol in symbols:
            yield from (part.scores.head for part in symbol.of or (symbol,))


def _after(
    step: Callable[[Term, Narrow], tuple[str, Any] | None],
) -> Callable[[Reader, Term, int], Narrow | None]:
    def read(reader: Reader, term: Term, depth: int) -> Narrow | None:
        narrow = reader.narrow(term.args[0], depth)
        following = None if narrow is None else step(term, narrow)
        return None if narrow is None or following is None else narrow.then(following)

    return read


def _step_of_view(term: Term, narrow: Narrow) -> tuple[str, Any] | None:
    shape = shape_of(term.shape, narrow.asked[0].rows)
    return None if shape is None else ("view", shape)


def _step_of_product(term: Term, _: Narrow) -> tuple[str, Any] | None:
    scalar, *powers = term.consts
    is_scaled = powers == [1] and not scalar.powers and term.args[0].shape == term.shape
    return ("mul", scalar.value) if is_scaled else None


def _narrow_detached(reader: Reader, term: Term, depth: int) -> Narrow | None:
    narrow = reader.narrow(term.args[0], depth)
    if narrow is None:
        return None
    return replace(narrow, asked=tuple(replace(asked, is_detached=True) for asked in narrow.asked))


_NARROW: Mapping[str, Callable[[Reader, Term, int], Narrow | None]] = {
    "logsumexp": _about("logsumexp"),
    "argmax": _about("argmax"),
    "top_values": _about("top"),
    "top_columns": _about("top_columns"),
    "gather": _gather,
    "cross_entropy": _cross_entropy,
    "sum": _reduced("sum"),
    "mean": _reduced("mean"),
    "view": _after(_step_of_view),
    "cast": _after(lambda term, _: ("to", term.dtype)),
    "mul": _after(_step_of_product),
    "detached": _narrow_detached,
}
