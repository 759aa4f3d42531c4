"""find_questions(): finds heads whose logits are read by questions about their softmax alone, and plans their answers.

From a linear layer, the search follows everything that has a number for each class of each row (wide values, see
terms/questions.py). Each first value that has none is a question, and becomes an output of one match. If something else
reads a wide value, the logits are needed anyway: the place is a near miss, with the name of that reader.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from liger_compile.ops.answer_plan import (
    WHOLE,
    Addend,
    Box,
    Columns,
    Form,
    Output,
    Part,
    Plan,
    kept_for_backward,
)
from liger_compile.pattern import Capture, Decision, Match, NearMiss, Pattern
from liger_compile.steps.tails import FoundTail, NoTailError, find_tail
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
    (
        "log_probabilities",
        "logsumexp",
        "entropy",
        "mean_score",
        "cross_entropy",
        "log_probability_sum",
        "collision",
    )
)
_OPERATIONS_OF_LOSSES = frozenset(("logsumexp", "log_softmax", "cross_entropy", "kl_div"))
LEAST_CLASSES = 2  # times the hidden size: fewer classes are no vocabulary
RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel"))
MOST_COLUMNS = 128  # of an index in all: the gradient compares the columns of a row with one another


class _UnansweredError(Exception):
    """Why questions are not answered together, in a sentence."""


@dataclass
class _Found:
    """The readers of the logits of one head, or of two that are read together.

    Args:
        linear: the terms of the linear layers.
        wide: the wide values, in order of their discovery.
        questions: the nodes that ask, with the question.
        others: (value, reader) for each other reader.
    """

    linear: dict[Term, None]
    wide: dict[Node, None]
    questions: dict[Node, Narrow]
    others: list[tuple[Node, Node]]


def find_questions(pattern: Pattern, graph: Graph, terms: Terms) -> tuple[list[Match], list[NearMiss]]:
    """Returns the matches of `pattern`, whose replacement carries out a plan, and the near misses."""
    places = _plans(graph, terms)
    near_misses = [_near_miss(pattern, place.found, place.why_left) for place in places if place.why_left]
    return [_match(pattern, place) for place in places if not place.why_left], near_misses


def find_losses(pattern: Pattern, graph: Graph, terms: Terms) -> tuple[list[Match], list[NearMiss]]:
    """Returns the matches of `pattern`, whose replacement also computes the loss that follows the questions.

    Their last output is the loss. A place without such a loss is left to find_questions.
    """
    matches = [_match(pattern, place, place.tail) for place in _plans(graph, terms) if place.tail]
    return matches, []


@dataclass(frozen=True)
class _Site:
    """A head that only questions read, or the reason why it is left.

    Args:
        outputs: the questions.
        tail: the loss that follows them; None for the reason that the plan has.
    """

    found: _Found
    why_left: str = ""
    outputs: tuple[Node, ...] = ()
    captures: Mapping[str, Any] = field(default_factory=dict)
    position: Mapping[Node, int] = field(default_factory=dict)
    tail: FoundTail | None = None


def _plans(graph: Graph, terms: Terms) -> list[_Site]:
    """Returns the places of a graph; once for all patterns."""
    if "questions" not in terms.memo:
        reader = Reader(terms.space, terms.written_whole)
        found = [each for each in _heads(graph, reader, terms) if _is_worth_a_plan(each, reader, terms)]
        terms.memo["questions"] = [_place(each, terms) for each in found]
    return terms.memo["questions"]


def _place(found: _Found, terms: Terms) -> _Site:
    try:
        if found.others:
            raise _UnansweredError(_why_read(*found.others[0]))
        outputs = _outputs(found, terms)
        captures = _captures(found, outputs, terms)
    except _UnansweredError as reason:
        return _Site(found, str(reason))
    place = _Site(found, "", (*outputs,), captures, terms.mutations.position)
    head = tuple(_value(captures[name]) for name in ("x", "weight", "bias"))
    try:
        return replace(
            place, tail=find_tail(captures["plan"], outputs, head, _value(captures["teacher_x"]), terms)
        )
    except NoTailError as reason:
        plan = replace(captures["plan"], why_no_tail=str(reason))
        return replace(place, captures={**captures, "plan": plan})


def notes_on_answers(decisions: Iterable[Decision], memory: int | None) -> Iterator[str]:
    """Yields how many matmuls the replaced questions with gradients take in training, and why.

    Args:
        memory: the option loss_memory.
    """
    for decision in decisions:
        match = decision.match
        if decision.kind == "replace" and isinstance(plan := match.captures.get("plan"), Plan):
            head = match["x"], match["weight"], match["bias"]
            keeps = kept_for_backward(plan, head, memory) if match.result.requires_grad else ""
            if match.result.requires_grad:
                why = plan.why_no_tail or decision.instead_of
                yield f"{match.pattern.name}: {_matmuls(match, plan, keeps)}{f' ({why})' if why else ''}"


def _matmuls(match: Match, plan: Plan, keeps: str) -> str:
    of_teacher = " beside that of the second head" if plan.teacher is not None else ""
    is_frozen = not match["weight"].requires_grad
    count = f"{'two' if is_frozen else 'three'} matmuls{of_teacher}"
    if match.pattern.is_loss:
        return f"{count}: the loss is computed inside of the chunks"
    if keeps == "logits":
        dtype = str(match["x"].dtype).removeprefix("torch.")
        return f"{count}: the logits are kept in {dtype} for backward"
    if keeps:
        return f"{count}: the gradient of the only answer is computed in forward, because the head is frozen"
    return "one matmul more than Inductor: backward computes the logits again, as liger.loss_memory is set"


def _value(capture: Capture | None) -> Any:
    return None if capture is None else capture.value


def _heads(graph: Graph, reader: Reader, terms: Terms) -> Iterator[_Found]:
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
    found = _Found({linear: None}, dict.fromkeys(terms.nodes[linear]), {}, [])
    waiting = [*found.wide]
    while waiting:
        _follow_nodes(waiting, found, reader, terms)
        for term in (term for head in _heads_of(found, reader, terms) for term in reader.linears[head]):
            if term not in found.linear:
                found.linear[term] = None
                waiting.extend(terms.nodes.get(term, ()))
        found.wide.update((node, None) for node in waiting)
    return found


def _heads_of(found: _Found, reader: Reader, terms: Terms) -> set[Head]:
    """Returns the heads of all wide values and questions so far; a slice of the rows of an input is no other head."""
    polynomials = (reader.wide(value) for node in found.wide if isinstance(value := terms.of[node], Term))
    heads = {head for wide in polynomials for head in heads_of(wide or {})}
    for asked in (asked for narrow in found.questions.values() for asked in narrow.asked):
        heads.add(asked.scores.head)
        if asked.other is not None:
            heads.add(asked.other.scores.head)
    return heads


def _follow_nodes(waiting: list[Node], found: _Found, reader: Reader, terms: Terms) -> None:
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user in found.wide or user in found.questions:
                continue
            value = terms.of.get(user)
            if isinstance(value, Term) and (reader.wide(value) is not None or _is_reshape(user)):
                found.wide[user] = None
                waiting.append(user)
            elif isinstance(value, tuple) and value and all(_is_read(part, reader) for part in value):
                found.wide[user] = None  # the parts of a split, or of a topk: the readers of each decide
                waiting.append(user)
            elif isinstance(value, Term) and (narrow := reader.narrow(value)) is not None:
                found.questions[user] = narrow
            elif (
                isinstance(user.meta.get("example_value"), torch.Tensor)
                or user.op == "output"
                or _is_effect(user)
            ):
                found.others.append((node, user))


def _is_reshape(node: Node) -> bool:
    """Returns whether a node has the elements of its operand in another shape, which its readers may restore."""
    return getattr(node.target, "__name__", node.target) in RESHAPES


def _is_read(value: Any, reader: Reader) -> bool:
    return isinstance(value, Term) and (reader.wide(value) is not None or reader.narrow(value) is not None)


def _is_effect(user: Node) -> bool:
    """Returns whether a reader without a tensor may do more than ask for a size."""
    return not isinstance(
        user.meta.get("example_value"), (int, torch.SymInt, torch.Size, torch.dtype, torch.device)
    )


def _is_worth_a_plan(found: _Found, reader: Reader, terms: Terms) -> bool:
    """Returns whether there are questions that the patterns of single losses do not answer."""
    asked = [one for narrow in found.questions.values() for one in narrow.asked]
    if len(found.questions) == 1 and len(asked) == 1 and asked[0].question == "cross_entropy":
        # linear_cross_entropy computes the gradients of a mean or a sum in forward.
        is_reduced = asked[0].loss is not None and asked[0].loss[1] != "none"
        return not is_reduced and any(map(_needs_gradient, found.questions))
    if not asked:
        return bool(found.others) and _looks_like_loss(found, reader, terms)
    is_loss = any(one.question in _OF_LOSSES | PAIRS for one in asked)
    return is_loss or (bool(asked) and not found.others and any(one.question == "top" for one in asked))


def _looks_like_loss(found: _Found, reader: Reader, terms: Terms) -> bool:
    """Returns whether the log_softmax of many classes, or something like it, is read in an unknown way."""
    polynomials = (reader.wide(value) for node in found.wide if isinstance(value := terms.of[node], Term))
    kinds = {symbol.kind for wide in polynomials for symbols in wide or {} for symbol in symbols}
    linear = next(iter(found.linear))
    width, classes = linear.args[0].shape[-1], linear.shape[-1]
    is_large = isinstance(width, int) and isinstance(classes, int) and classes >= LEAST_CLASSES * width
    readers = (terms.of.get(reader) for _, reader in found.others)
    is_read = any(isinstance(value, Term) and _operation(value) in _OPERATIONS_OF_LOSSES for value in readers)
    return is_large and ("lp" in kinds or is_read)


def _operation(term: Term) -> str:
    """Returns the operation of a term without views and casts of its result."""
    while term.op in ("view", "cast") and term.may_be_passed:
        term = term.args[0]
    return term.op


def _why_read(value: Node, reader: Node) -> str:
    if reader.op == "output":
        by = "the graph returns them"
    else:
        name = (
            reader.target
            if isinstance(reader.target, str)
            else getattr(reader.target, "__name__", reader.name)
        )
        by = f"{name} reads them"
    return (
        f"the logits are needed ({by}: {value.name}), so answering the other questions without them would save "
        "nothing; known are log-probabilities, entropy, logsumexp, argmax, topk and divergences"
    )


def _near_miss(pattern: Pattern, found: _Found, reason: str) -> NearMiss:
    root = next(iter(found.questions), None) or found.others[0][0]
    culprit = next((reader for _, reader in found.others if reader.op != "output"), root)
    return NearMiss(pattern, root, culprit, reason, 0.9, tuple(found.wide))


# Plans


def _outputs(found: _Found, terms: Terms) -> list[Node]:
    """Returns the questions in graph order; those with gradients first, because the first decides about the mode."""
    position = terms.mutations.position
    return sorted(found.questions, key=lambda node: (not _needs_gradient(node), position[node]))


def _captures(found: _Found, outputs: Sequence[Node], terms: Terms) -> dict[str, Any]:
    """Returns the captures of a match of all questions about one head."""
    planned = _Planned([found.questions[node] for node in outputs], terms)
    captures: dict[str, Any] = {}
    for prefix, symbol in (("", planned.student), ("teacher_", planned.teacher)):
        head = None if symbol is None else symbol.scores.head
        captures[f"{prefix}x"] = None if head is None else _capture(head.x, terms)
        captures[f"{prefix}weight"] = None if head is None else _capture(head.weight, terms)
        has_bias = head is not None and head.bias is not terms.space.none
        captures[f"{prefix}bias"] = _capture(head.bias, terms) if head is not None and has_bias else None
    captures["plan"] = planned.plan([not _needs_gradient(node) for node in outputs])
    captures.update({f"input_{at}": _capture(term, terms) for at, term in enumerate(planned.inputs)})
    return captures


def _match(pattern: Pattern, place: _Site, tail: FoundTail | None = None) -> Match:
    captures, outputs, inner = {**place.captures}, place.outputs, [*place.found.wide, *place.outputs]
    movable: frozenset[Node] = frozenset()
    if tail is not None:
        captures["tail"] = tail.tail
        captures.update({f"other_{at}": _as_captured(node) for at, node in enumerate(tail.others)})
        outputs = outputs if tail.root in outputs else (*outputs, tail.root)
        inner += tail.nodes
        movable = frozenset(tail.nodes)
    position = place.position
    operands = {bound.node for bound in captures.values() if isinstance(bound, Capture)}
    nodes, in_order = (sorted({*each}, key=position.__getitem__) for each in (inner, operands))
    return Match(pattern, captures, outputs, tuple(nodes), tuple(in_order), movable)


def _as_captured(node: Node) -> Capture:
    return Capture(node, (), node.meta["example_value"])


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
        with mode, torch.enable_grad():  # a step may detach
            derived_value = Capture(node, steps).derive(value)
            value = derived_value.detach().requires_grad_(derived_value.requires_grad)
    return Capture(node, steps, value, terms.written_by(term))


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


@dataclass(frozen=True)
class _Place:
    """Rows of the hull: those in a box of it, flattened, from `first` to `last`."""

    box: Box
    first: int
    last: int | None


class _Planned:
    """The plan of all questions about one head, the student, and of a divergence from another head, the teacher."""

    def __init__(self, questions: Sequence[Narrow], terms: Terms) -> None:
        self.questions, self.terms = questions, terms
        self.asked = [asked for narrow in questions for asked in narrow.asked]
        self.kind, self.beta, student, self.teacher = self._pair()
        self.student = self._student(student)
        self.hull = self._hull([self._rows(asked) for asked in self.asked])
        if self.teacher is not None:
            self._check_teacher(self.teacher)
        self.inputs: list[Term] = []
        self.columns: list[list[tuple[_Place, Asked]]] = []
        self.column_of: dict[Asked, int] = {}
        for asked in self.asked:
            if asked.index is not None and asked not in self.column_of:
                self.column_of[asked] = self._column(asked)

    def _pair(self) -> tuple[str, float, Symbol | None, Symbol | None]:
        """Returns kind and beta of the divergence, student and teacher; None for both if there is no divergence."""
        pairs = {replace(asked, factor=1.0) for asked in self.asked if asked.question in PAIRS}
        if not pairs:
            return "", 0.5, None, None
        if len(pairs) > 1:
            raise _UnansweredError("several divergences of the same heads are computed, and the op has one")
        (asked,) = pairs
        assert asked.other is not None, "a divergence has two heads"
        p = Symbol("p", asked.scores, asked.rows, asked.is_detached)
        if asked.other.scores.head == p.scores.head:
            raise _UnansweredError("a divergence has the same head on both sides")
        learns = [self._learns(symbol) for symbol in (p, asked.other)]
        if all(learns):
            raise _UnansweredError(
                "both heads get gradients, and the op has gradients of one; detach the other one"
            )
        student, teacher = (p, asked.other) if learns[0] else (asked.other, p)
        kind = _KINDS.get((asked.question, student is p))
        if kind is None:
            raise _UnansweredError("the head whose softmax is the target gets a gradient; detach it")
        return kind, asked.beta if teacher is p else 1 - asked.beta, student, teacher

    def _learns(self, symbol: Symbol) -> bool:
        head = symbol.scores.head
        inputs = [term for term in (head.x, head.weight, head.bias) if term is not self.terms.space.none]
        return not symbol.is_detached and any(
            _capture(term, self.terms).value.requires_grad for term in inputs
        )

    def _student(self, of_pair: Symbol | None) -> Symbol:
        """Returns the scores that all questions are about, with their scale."""
        symbols = [
            of_pair if asked.question in PAIRS else Symbol("z", asked.scores, asked.rows)
            for asked in self.asked
        ]
        asked = list(zip(self.asked, (symbol.scores for symbol in symbols if symbol), strict=True))
        if len({scores.head for _, scores in asked}) > 1:
            raise _UnansweredError("two heads are read together, and there are questions about both")
        if len({scores.unscaled for _, scores in asked}) > 1:
            raise _UnansweredError(
                "questions are about different classes, or about differently capped logits"
            )
        scales = {scores.scale: scores for one, scores in asked if one.question not in LINEAR | {"argmax"}}
        half = _half(scales, asked) if len(scales) == 2 else None
        if len(scales) > 1 and half is None:
            raise _UnansweredError("questions are about logits that are scaled in several ways")
        scores = next(iter(scales.values()), asked[0][1].unscaled) if half is None else scales[half]
        _check_cap(scores)
        if scores.scale < 0 and any(one.question in ("argmax", "top", "top_columns") for one, _ in asked):
            raise _UnansweredError("the scale of the logits is negative")
        return Symbol("z", scores, self.asked[0].rows)

    def _check_teacher(self, teacher: Symbol) -> None:
        _check_cap(teacher.scores)
        places = [self.place_of(self._rows(one)) for one in self.asked if one.question in PAIRS]
        if not teacher.rows.is_whole or any(place != _Place(WHOLE, 0, None) for place in places):
            raise _UnansweredError("a divergence is about some of the rows that other questions are about")

    def _rows(self, asked: Asked) -> Rows:
        """Returns the rows of the student that a question is about."""
        if asked.question not in PAIRS or asked.other is None or self.teacher is None:
            return asked.rows
        return asked.rows if self.teacher is not None and asked.other == self.teacher else asked.other.rows

    def _hull(self, rows: Sequence[Rows]) -> Rows:
        """Returns the smallest box that has all of the rows."""
        if any(0 in one.sizes for one in rows):
            raise _UnansweredError("a question is about none of the rows")
        if len({one.box for one in rows}) == 1:
            return replace(rows[0], first=0, last=None)
        boxes = list(zip(*(one.box for one in rows), strict=True))
        box = tuple((min(start for start, _ in bounds), max(end for _, end in bounds)) for bounds in boxes)
        return Rows(rows[0].lead, box)

    def place_of(self, rows: Rows) -> _Place:
        if rows.box == self.hull.box:
            return _Place(WHOLE, rows.first, rows.last)
        found = _Range.of(self.hull, rows)
        if found is not None:
            return _Place(WHOLE, found.start, found.stop)
        bounds = zip(rows.box, self.hull.box, strict=True)
        box = Box(tuple((a[0] - b[0], (a[1] - b[1]) or None) for a, b in bounds))
        return _Place(box, rows.first, rows.last)

    def _column(self, asked: Asked) -> int:
        """Returns the columns of the index that have the entries of a question."""
        place = self.place_of(asked.rows)
        ignore = asked.loss[0] if asked.loss else None
        for at, parts in enumerate(self.columns):
            like = parts[0][1]
            if like.width != asked.width or (like.loss[0] if like.loss else None) != ignore:
                continue
            if any(own == place and other.index is asked.index for own, other in parts):
                return at
            if all(_apart(own, place) for own, _ in parts):
                parts.append((place, asked))
                return at
        if not place.box.is_whole and (place.first, place.last) != (0, None):
            raise _UnansweredError("a question is about some rows of a box of other rows")
        self.columns.append([(place, asked)])
        if sum(parts[0][1].width for parts in self.columns) > MOST_COLUMNS:
            raise _UnansweredError(f"more than {MOST_COLUMNS} columns are gathered from each row")
        return len(self.columns) - 1

    def plan(self, are_detached: Sequence[bool]) -> Plan:
        return Plan(
            form=_form(self.student.scores, self.hull),
            columns=tuple(self._columns(parts) for parts in self.columns),
            outputs=tuple(map(self._output, self.questions, are_detached)),
            teacher=None if self.teacher is None else _form(self.teacher.scores, self.teacher.rows),
            kind=self.kind,
            beta=self.beta,
        )

    def _columns(self, parts: Sequence[tuple[_Place, Asked]]) -> Columns:
        asked = parts[0][1]
        joined: list[Part] = []
        for place, one in sorted(parts, key=lambda part: part[0].first):
            assert one.index is not None
            source, rows = located(self.terms.space, one.index, one.width)
            if source not in self.inputs:
                self.inputs.append(source)
            part = _part(self.inputs.index(source), source, rows, one.width, (place.first, place.last))
            if joined and (both := _joined(joined[-1], part)) is not None:
                joined[-1] = both
            else:
                joined.append(part)
        return Columns(asked.width, tuple(joined), asked.loss[0] if asked.loss else None, parts[0][0].box)

    def _output(self, narrow: Narrow, is_detached: bool) -> Output:
        places = {self.place_of(self._rows(asked)) for asked in narrow.asked}
        if len(places) > 1:
            raise _UnansweredError("a sum has questions about different rows")
        (place,) = places
        addends = tuple(self._addend(asked, is_detached) for asked in narrow.asked)
        return Output(addends, place.first, place.last, narrow.steps, is_detached, place.box)

    def _addend(self, asked: Asked, is_detached: bool) -> Addend:
        question, factor, scale = asked.question, asked.factor, self.student.scores.scale
        if question in PAIRS:
            return Addend("divergence", factor, is_detached=False)
        if question in LINEAR and question != "mean_score":
            factor /= scale
        elif question == "logsumexp" and asked.scores.scale != scale:
            question = "double_logsumexp"
        return Addend(
            question,
            factor,
            self.column_of.get(asked),
            asked.width,
            asked.loss,
            asked.is_detached and not is_detached,
        )


def _check_cap(scores: Scores) -> None:
    if scores.scale == 0 or (scores.scale < 0 and scores.inner is not None):
        raise _UnansweredError("the scale or the cap of the logits is not positive")


def _form(scores: Scores, rows: Rows) -> Form:
    (start, end), inner = scores.classes, scores.inner
    scale = scores.scale * (1.0 if inner is None else inner)
    return Form(_box(rows), (start, end or None), scale, None if inner is None else scores.scale)


def _half(scales: dict[float, Scores], asked: Iterable[tuple[Asked, Scores]]) -> float | None:
    """Returns the smaller of two scales if only logsumexp is asked about the other one, which is twice as large."""
    low, high = sorted(scales, key=abs)
    of_high = {one.question for one, scores in asked if scores.scale == high and one.question not in LINEAR}
    is_free = scales[low].inner is None and of_high <= {"logsumexp"}
    return low if is_free and abs(high - 2 * low) <= 1e-12 * abs(high) else None


def _apart(a: _Place, b: _Place) -> bool:
    """Returns whether two places are ranges of rows, one after the other."""
    is_range = a.box.is_whole and b.box.is_whole
    return is_range and any(x.last is not None and x.last <= y.first for x, y in ((a, b), (b, a)))


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
        """Returns the range of rows of `hull` that `rows` are; None if they are none, or if sizes are symbolic."""
        sizes, own = hull.sizes, rows.sizes
        if not all(isinstance(size, int) for size in (*sizes, *own)):
            return None
        split = next((at for at, size in enumerate(own) if size != 1), len(own))
        if own[split + 1 :] != sizes[split + 1 :]:
            return None
        start, count = 0, 1
        for size, (low, _), (first, _), length in zip(sizes, hull.box, rows.box, own, strict=True):
            assert isinstance(size, int) and isinstance(length, int), "checked above"
            start, count = start * size + first - low, count * length
        return _Range(start + rows.first, start + (count if rows.last is None else rows.last))


def _joined(a: Part, b: Part) -> Part | None:
    """Returns two parts as one, if they follow one another both in the input and in the index."""
    follows = a.source == b.source and a.box == b.box and a.stop == b.start and a.last == b.first
    return replace(a, stop=b.stop, last=b.last) if follows else None
