"""find_questions(): finds heads whose logits are read by questions about their softmax alone, and plans their answers.

From a linear layer, the search follows everything that has a number for each class of each row (wide values, see
terms/questions.py). Each first value that has none is a question, and becomes an output of one match. If something else
reads a wide value, the logits are needed anyway: the place is a near miss, with the name of that reader.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from liger_compile.ops.answer_plan import Addend, Box, Columns, Output, PairPlan, Part, Plan
from liger_compile.pattern import Capture, Match, NearMiss, Pattern
from liger_compile.terms.build import Terms
from liger_compile.terms.questions import (
    LINEAR,
    PAIRS,
    Asked,
    Head,
    Narrow,
    Reader,
    Rows,
    Scores,
    Symbol,
    heads_of,
    lead_of,
    located,
)
from liger_compile.terms.term import Term

# A question beside which another reader of the logits is worth a sentence.
_OF_LOSSES = frozenset(
    ("log_probabilities", "logsumexp", "entropy", "mean_score", "cross_entropy", "log_probability_sum", "collision")
)
MOST_COLUMNS = 128  # of an index in all: the gradient compares the columns of a row with one another


class _UnansweredError(Exception):
    """Why questions are not answered together, in a sentence."""


@dataclass
class _Found:
    """The readers of the logits of one head, or of two that are read together.

    Args:
        linear: the terms of the linear layers.
        heads: their heads; a slice of the rows of an input is no other head.
        wide: the wide values, in order of their discovery.
        questions: the nodes that ask, with the question.
        others: (value, reader) for each other reader.
    """

    linear: dict[Term, None]
    heads: dict[Head, None]
    wide: dict[Node, None]
    questions: dict[Node, Narrow]
    others: list[tuple[Node, Node]]


def find_questions(pattern: Pattern, graph: Graph, terms: Terms) -> tuple[list[Match], list[NearMiss]]:
    """Returns the matches of `pattern`, whose replacement carries out a Plan, and the near misses."""
    return _find(pattern, graph, terms, _match, is_wanted=lambda found: len(found.heads) != 2)


def find_divergences(pattern: Pattern, graph: Graph, terms: Terms) -> tuple[list[Match], list[NearMiss]]:
    """Returns the matches of `pattern`, whose replacement carries out a PairPlan, and the near misses."""
    return _find(pattern, graph, terms, _match_of_pair, is_wanted=lambda found: len(found.heads) == 2)


def _find(
    pattern: Pattern,
    graph: Graph,
    terms: Terms,
    make: Callable[[Pattern, _Found, Terms], Match],
    is_wanted: Callable[[_Found], bool],
) -> tuple[list[Match], list[NearMiss]]:
    reader = Reader(terms.space, terms.written_whole)
    matches: list[Match] = []
    near_misses: list[NearMiss] = []
    for found in _places(graph, reader, terms):
        if not is_wanted(found) or not _is_worth_a_plan(found):
            continue
        try:
            if found.others:
                raise _UnansweredError(_why_read(*found.others[0]))
            matches.append(make(pattern, found, terms))
        except _UnansweredError as reason:
            near_misses.append(_near_miss(pattern, found, str(reason)))
    return matches, near_misses


def _places(graph: Graph, reader: Reader, terms: Terms) -> Iterator[_Found]:
    """Yields the readers of each head, or of several heads that are read together."""
    linear = {term: None for term in terms.of.values() if isinstance(term, Term) and term.op == "linear"}
    for term in linear:
        reader.wide(term)
    done: set[Term] = set()
    for node in graph.nodes:
        term = terms.of[node]
        if term in linear and term not in done and node not in terms.passes_through:
            found = _follow(term, reader, terms)
            done.update(found.linear)
            yield found


def _follow(linear: Term, reader: Reader, terms: Terms) -> _Found:
    """Returns the readers of a linear layer, and those of all that are read together with it."""
    found = _Found({linear: None}, {}, {node: None for node in terms.nodes[linear]}, {}, [])
    waiting = [*found.wide]
    while waiting:
        _follow_nodes(waiting, found, reader, terms)
        polynomials = (reader.wide(terms.of[node]) for node in found.wide if isinstance(terms.of[node], Term))
        found.heads.update((head, None) for wide in polynomials for head in heads_of(wide or {}))
        for narrow in found.questions.values():
            for asked in narrow.asked:
                found.heads[asked.scores.head] = None
                if asked.other is not None:
                    found.heads[asked.other.scores.head] = None
        for term in (term for head in found.heads for term in reader.linears[head]):
            if term not in found.linear:
                found.linear[term] = None
                waiting.extend(terms.nodes.get(term, ()))
        found.wide.update((node, None) for node in waiting)
    return found


def _follow_nodes(waiting: list[Node], found: _Found, reader: Reader, terms: Terms) -> None:
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user in found.wide or user in found.questions:
                continue
            value = terms.of.get(user)
            if isinstance(value, Term) and reader.wide(value) is not None:
                found.wide[user] = None
                waiting.append(user)
            elif isinstance(value, tuple) and value and user.op != "output":
                found.wide[user] = None  # a split, or the parts of a topk: the users of the parts decide
                waiting.append(user)
            elif isinstance(value, Term) and (narrow := reader.narrow(value)) is not None:
                found.questions[user] = narrow
            elif isinstance(user.meta.get("example_value"), torch.Tensor) or user.op == "output":
                found.others.append((node, user))
            elif _is_effect(user):
                found.others.append((node, user))


def _is_effect(user: Node) -> bool:
    """Returns whether a reader without a tensor may do more than ask for a size."""
    return not isinstance(user.meta.get("example_value"), (int, torch.SymInt, torch.Size, torch.dtype, torch.device))


def _is_worth_a_plan(found: _Found) -> bool:
    """Returns whether there are questions that the patterns of single losses do not answer."""
    asked = [one for narrow in found.questions.values() for one in narrow.asked]
    if len(found.questions) == 1 and len(asked) == 1 and asked[0].question == "cross_entropy":
        return False
    is_loss = any(one.question in _OF_LOSSES | PAIRS for one in asked)
    return is_loss or (bool(asked) and not found.others and any(one.question == "top" for one in asked))


def _why_read(value: Node, reader: Node) -> str:
    if reader.op == "output":
        by = "the graph returns them"
    else:
        name = reader.target if isinstance(reader.target, str) else getattr(reader.target, "__name__", reader.name)
        by = f"{name} reads them"
    return (
        f"the logits are needed ({by}: {value.name}), and the other questions about them do not pay alone; "
        "ask for log-probabilities, entropy, logsumexp, argmax or topk only, or compute the rest in another call"
    )


def _near_miss(pattern: Pattern, found: _Found, reason: str) -> NearMiss:
    root = next(iter(found.questions))
    culprit = next((reader for _, reader in found.others if reader.op != "output"), root)
    return NearMiss(pattern, root, culprit, reason, 0.9, tuple(found.wide))


# Plans


def _outputs(found: _Found, terms: Terms) -> list[Node]:
    """Returns the questions in graph order; those with gradients first, because the first decides about the mode."""
    position = terms.mutations.position
    return sorted(found.questions, key=lambda node: (not _needs_gradient(node), position[node]))


def _match(pattern: Pattern, found: _Found, terms: Terms) -> Match:
    """Returns the match of all questions about one head."""
    outputs = _outputs(found, terms)
    planned = _Planned([found.questions[node] for node in outputs], terms)
    head = planned.head
    captures: dict[str, Any] = {
        "x": _capture(head.x, terms),
        "weight": _capture(head.weight, terms),
        "bias": None if head.bias is terms.space.none else _capture(head.bias, terms),
    }
    are_detached = [not _needs_gradient(node) for node in outputs]
    captures["plan"] = planned.plan(are_detached)
    captures.update({f"input_{at}": _capture(term, terms) for at, term in enumerate(planned.inputs)})
    return _made(pattern, captures, outputs, found, terms)


def _made(
    pattern: Pattern, captures: dict[str, Any], outputs: Sequence[Node], found: _Found, terms: Terms
) -> Match:
    position = terms.mutations.position
    nodes = sorted({*found.wide, *outputs}, key=position.__getitem__)
    operands = {bound.node for bound in captures.values() if isinstance(bound, Capture)}
    in_order = sorted(operands, key=position.__getitem__)
    return Match(pattern, captures, tuple(outputs), tuple(nodes), tuple(in_order))


def _match_of_pair(pattern: Pattern, found: _Found, terms: Terms) -> Match:
    """Returns the match of one divergence of two heads."""
    outputs = _outputs(found, terms)
    asked = [one for node in outputs for one in found.questions[node].asked]
    if len({replace(one, factor=1.0) for one in asked}) > 1 or asked[0].other is None:
        raise _UnansweredError("two heads are read together, for more than one divergence")
    first = asked[0]
    assert first.other is not None, "checked above"
    p = Symbol("p", first.scores, first.rows, first.is_detached)
    learns = [_learns(symbol, terms) for symbol in (p, first.other)]
    if all(learns):
        raise _UnansweredError("both heads get gradients, and the op has gradients of one; detach the other one")
    student, teacher = (p, first.other) if learns[0] else (first.other, p)
    kind = _KINDS.get((first.question, student is p))
    if kind is None:
        raise _UnansweredError("the head whose softmax is the target gets a gradient; detach it")
    captures: dict[str, Any] = {}
    for prefix, symbol in (("", student), ("teacher_", teacher)):
        head = symbol.scores.head
        captures[f"{prefix}x"] = _capture(head.x, terms)
        captures[f"{prefix}weight"] = _capture(head.weight, terms)
        captures[f"{prefix}bias"] = None if head.bias is terms.space.none else _capture(head.bias, terms)
    captures["plan"] = PairPlan(
        kind,
        first.beta if teacher is p else 1 - first.beta,
        _form(student),
        _form(teacher),
        tuple(_of_pair(found.questions[node], not _needs_gradient(node)) for node in outputs),
    )
    return _made(pattern, captures, outputs, found, terms)


# By question, and whether the student's is the softmax p in it.
_KINDS = {
    ("kl", False): "forward",
    ("kl", True): "reverse",
    ("plain_kl", False): "plain_forward",
    ("cross", False): "cross",
    ("finite_cross", False): "finite_cross",
    ("jensen_shannon", False): "jensen_shannon",
    ("jensen_shannon", True): "jensen_shannon",
}


def _learns(symbol: Symbol, terms: Terms) -> bool:
    head = symbol.scores.head
    inputs = [term for term in (head.x, head.weight, head.bias) if term is not terms.space.none]
    return not symbol.is_detached and any(_capture(term, terms).value.requires_grad for term in inputs)


def _form(symbol: Symbol) -> tuple[Box, tuple[int, int | None], float, float | None]:
    scores, (start, end) = symbol.scores, symbol.scores.classes
    if not symbol.rows.is_whole:
        raise _UnansweredError("a divergence is about some rows of a flattened tensor")
    if scores.scale == 0 or (scores.scale < 0 and scores.inner is not None):
        raise _UnansweredError("the cap of the logits is not positive")
    scale = scores.scale * (1.0 if scores.inner is None else scores.inner)
    return _box(symbol.rows), (start, end or None), scale, None if scores.inner is None else scores.scale


def _of_pair(narrow: Narrow, is_detached: bool) -> Output:
    if len(narrow.asked) != 1:
        raise _UnansweredError("a sum has several divergences")
    return Output((Addend("divergence", narrow.asked[0].factor),), 0, None, narrow.steps, is_detached)


def _needs_gradient(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _capture(term: Term, terms: Terms) -> Capture:
    derived = terms.derive(term)
    if derived is None:
        raise _UnansweredError("an input of the head or of a question is no value of the graph by itself")
    node, steps = derived
    value = node.meta["example_value"]
    mode = getattr(value, "fake_mode", None) or contextlib.nullcontext()
    if steps:
        needs_gradient = value.requires_grad
        with mode, torch.no_grad():
            value = Capture(node, steps).derive(value).detach()
            value.requires_grad_(needs_gradient and value.is_floating_point())
    return Capture(node, steps, value, terms.written_by(term))


class _Planned:
    """The plan of all questions about one head."""

    def __init__(self, questions: Sequence[Narrow], terms: Terms) -> None:
        self.questions, self.terms = questions, terms
        if any(asked.question in PAIRS for narrow in questions for asked in narrow.asked):
            raise _UnansweredError("a divergence has the same head on both sides")
        self.asked = [asked for narrow in questions for asked in narrow.asked]
        self.scores = self._scores()
        self.head = self.scores.head
        self.hull = self._hull([asked.rows for asked in self.asked])
        self.inputs: list[Term] = []
        self.columns: list[list[tuple[tuple[int, int | None], Asked]]] = []
        self.column_of: dict[Asked, int] = {}
        for asked in self.asked:
            if asked.index is not None and asked not in self.column_of:
                self.column_of[asked] = self._place(asked)

    def _scores(self) -> Scores:
        """Returns the scores that all questions are about, with their scale."""
        if len({asked.scores.unscaled for asked in self.asked}) > 1:
            raise _UnansweredError("questions are about different classes, or about differently capped logits")
        scales = {
            asked.scores.scale: asked.scores for asked in self.asked if asked.question not in LINEAR | {"argmax"}
        }
        if len(scales) == 2 and (half := _half(scales, self.asked)) is not None:
            return scales[half]
        if len(scales) > 1:
            raise _UnansweredError("questions are about logits that are scaled in several ways")
        scores = next(iter(scales.values()), self.asked[0].scores.unscaled)
        if scores.scale == 0 or (scores.scale < 0 and scores.inner is not None):
            raise _UnansweredError("the cap of the logits is not positive")
        is_ordered = any(asked.question in ("argmax", "top", "top_columns") for asked in self.asked)
        if scores.scale < 0 and is_ordered:
            raise _UnansweredError("the scale of the logits is negative")
        return scores

    def _hull(self, rows: Sequence[Rows]) -> Rows:
        """Returns the smallest box that has all of the rows."""
        if len({one.box for one in rows}) == 1:
            return replace(rows[0], first=0, last=None)
        boxes = list(zip(*(one.box for one in rows), strict=True))
        box = tuple((min(start for start, _ in bounds), max(end for _, end in bounds)) for bounds in boxes)
        return Rows(rows[0].lead, box)

    def range_of(self, rows: Rows) -> tuple[int, int | None]:
        """Returns which rows of the flattened hull these are: (first, last)."""
        if rows.box == self.hull.box:
            return rows.first, rows.last
        found = _Range.of(self.hull, rows)
        if found is None:
            raise _UnansweredError(
                "questions are about different rows of the logits, which are no ranges of rows of known length"
            )
        return found.start, found.stop

    def _place(self, asked: Asked) -> int:
        """Returns the columns of the index that have the entries of a question."""
        rows = self.range_of(asked.rows)
        ignore = asked.loss[0] if asked.loss else None
        for at, parts in enumerate(self.columns):
            like = parts[0][1]
            if like.width != asked.width or (like.loss[0] if like.loss else None) != ignore:
                continue
            if any(own == rows and other.index is asked.index for own, other in parts):
                return at
            if all(_apart(own, rows) for own, _ in parts):
                parts.append((rows, asked))
                return at
        self.columns.append([(rows, asked)])
        if sum(parts[0][1].width for parts in self.columns) > MOST_COLUMNS:
            raise _UnansweredError(f"more than {MOST_COLUMNS} columns are gathered from each row")
        return len(self.columns) - 1

    def plan(self, are_detached: Sequence[bool]) -> Plan:
        start, end = self.scores.classes
        inner = self.scores.inner
        return Plan(
            box=_box(self.hull),
            classes=(start, end or None),
            logit_scale=self.scores.scale * (1.0 if inner is None else inner),
            softcap=None if inner is None else self.scores.scale,
            columns=tuple(self._columns(parts) for parts in self.columns),
            outputs=tuple(map(self._output, self.questions, are_detached)),
        )

    def _columns(self, parts: Sequence[tuple[tuple[int, int | None], Asked]]) -> Columns:
        asked = parts[0][1]
        ordered = sorted(parts, key=lambda part: part[0][0])
        joined: list[Part] = []
        for (first, last), one in ordered:
            assert one.index is not None
            source, rows = located(self.terms.space, one.index, one.width)
            if source not in self.inputs:
                self.inputs.append(source)
            part = _part(self.inputs.index(source), source, rows, one.width, (first, last))
            if joined and (both := _joined(joined[-1], part)) is not None:
                joined[-1] = both
            else:
                joined.append(part)
        return Columns(asked.width, tuple(joined), asked.loss[0] if asked.loss else None)

    def _output(self, narrow: Narrow, is_detached: bool) -> Output:
        rows = {self.range_of(asked.rows) for asked in narrow.asked}
        if len(rows) > 1:
            raise _UnansweredError("a sum has questions about different rows")
        ((first, last),) = rows
        addends = tuple(self._addend(asked, is_detached) for asked in narrow.asked)
        return Output(addends, first, last, narrow.steps, is_detached)

    def _addend(self, asked: Asked, is_detached: bool) -> Addend:
        question, factor = asked.question, asked.factor
        if question in LINEAR and question != "mean_score":
            factor /= self.scores.scale
        elif question == "logsumexp" and asked.scores.scale != self.scores.scale:
            question = "double_logsumexp"
        return Addend(
            question,
            factor,
            self.column_of.get(asked),
            asked.width,
            asked.loss,
            asked.is_detached and not is_detached,
        )


def _half(scales: dict[float, Scores], asked: Iterable[Asked]) -> float | None:
    """Returns the smaller of two scales if only logsumexp is asked about the other one, which is twice as large."""
    low, high = sorted(scales, key=abs)
    of_high = {one.question for one in asked if one.scores.scale == high and one.question not in LINEAR}
    is_free = scales[low].inner is None and of_high <= {"logsumexp"}
    return low if is_free and abs(high - 2 * low) <= 1e-12 * abs(high) else None


def _apart(a: tuple[int, int | None], b: tuple[int, int | None]) -> bool:
    return any(x[1] is not None and x[1] <= y[0] for x, y in ((a, b), (b, a)))


def _box(rows: Rows) -> Box:
    return Box(tuple((start, end or None) for start, end in rows.box))


def _part(source: int, term: Term, rows: Rows, width: int, at: tuple[int, int | None]) -> Part:
    """Returns a part; entries that are one range of the flattened input are that range, not a box."""
    whole = _Range.of(Rows.all(lead_of(term, width)), rows)
    if whole is not None:
        return Part(source, Box(()), whole.start, whole.stop, *at)
    return Part(source, _box(rows), rows.first, rows.last, *at)


@dataclass(frozen=True)
class _Range:
    start: int
    stop: int

    @staticmethod
    def of(hull: Rows, rows: Rows) -> _Range | None:
        """Returns the range of flattened rows of `hull` that `rows` are; None if they are none, or if sizes are symbolic."""
        sizes, own = hull.sizes, rows.sizes
        if not all(isinstance(size, int) for size in sizes):
            return None
        split = next((at for at, size in enumerate(own) if size != 1), len(own))
        if own[split + 1 :] != sizes[split + 1 :]:
            return None
        start, count = 0, 1
        for size, (low, _), (first, _), length in zip(sizes, hull.box, rows.box, own, strict=True):
            start, count = start * size + first - low, count * length
        return _Range(start + rows.first, start + (count if rows.last is None else rows.last))


def _joined(a: Part, b: Part) -> Part | None:
    """Returns two parts as one, if they follow one another both in the input and in the index."""
    follows = a.source == b.source and a.box == b.box and a.stop == b.start and a.last == b.first
    return replace(a, stop=b.stop, last=b.last) if follows else None

