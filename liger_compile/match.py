"""find_matches(): where a graph computes what the patterns search for. Knows no operator by name.

Matching has two passes, because a search function is traced for one set of dtypes and shapes at a time:

1. The *skeleton*: search, traced with its examples, against the graph's bare terms. Casts and sizes do not count,
   so this finds every place that is the same mathematics, and which values its captures would be.
2. The *exact* match: search, traced again with the dtypes and shapes of these values, against the graph's terms as
   they are. Now casts count: a place with another rounding is a near miss.

Products and sums match as multisets. A capture in a product takes the factors that are left over, as long as the
graph computes their product somewhere.
"""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from liger_compile.pattern import Capture, Match, NearMiss, Pattern
from liger_compile.terms import normalize
from liger_compile.terms.build import Terms, trace
from liger_compile.terms.term import ConstVar, Scalar, Term, close

Bindings = Mapping[str, Any]  # capture -> Term, number or string

# How many nodes near the first output are tried as a further output, how many dtype assignments of one skeleton,
# and how many steps one attempt may take: bounds that keep matching linear in the graph.
NEARBY, ASSIGNMENTS, STEPS = 24, 32, 4000
NEAR_MISS = 0.6  # the share of a pattern that must match for a place to look like it


def find_matches(
    graph: Graph, patterns: Sequence[Pattern], terms: Terms
) -> tuple[list[Match], list[NearMiss]]:
    """All places where `graph` computes a pattern, larger patterns first, and places that nearly do.

    Matches may overlap; choosing among them is decide.py's part.
    """
    index = _Index(graph, terms)
    by_op: dict[str, list[tuple[Pattern, _Skeleton]]] = {}
    for pattern in patterns:
        skeleton = _skeleton(pattern)
        by_op.setdefault(skeleton.outputs[0].bare.op, []).append((pattern, skeleton))

    found: list[tuple[int, Match]] = []  # with the number of operations in it, casts counted
    attempts: list[NearMiss] = []
    taken: set[tuple[Pattern, Node]] = set()
    for node in graph.nodes:
        term = terms.of[node]
        if not isinstance(term, Term) or node in terms.passes_through or node.op == "placeholder":
            continue
        for pattern, skeleton in by_op.get(term.bare.op, ()):
            if (pattern, node) in taken:
                continue
            attempt = _Attempt(pattern, skeleton, index, node)
            match = attempt.match()
            if match is not None:
                found.append((attempt.size, match))
                taken.update((pattern, output) for output in match.outputs)
            elif attempt.score >= NEAR_MISS:
                attempts.append(attempt.near_miss())
    order = {pattern: rank for rank, pattern in enumerate(patterns)}
    found.sort(key=lambda item: (-item[0], order[item[1].pattern], index.position[item[1].outputs[0]]))
    matches = [match for _, match in found]
    return matches, _worth_telling(attempts, matches, terms)


def _worth_telling(attempts: list[NearMiss], matches: list[Match], terms: Terms) -> list[NearMiss]:
    """The best attempt for each place that no match covers; a cast of what one covers is the same place."""
    covered = {terms.of[node].bare for m in matches for node in m.nodes if isinstance(terms.of[node], Term)}
    best: dict[tuple[str, Term], NearMiss] = {}
    for attempt in attempts:
        place = terms.of[attempt.root].bare
        key = (attempt.pattern.name.split(".")[0], place)
        if place not in covered and (key not in best or attempt.score > best[key].score):
            best[key] = attempt
    return list(best.values())


# Tracing search functions


@dataclass(frozen=True)
class _Skeleton:
    """A pattern traced with its examples."""

    outputs: tuple[Term, ...]
    tensors: tuple[str, ...]  # the tensor captures
    optional: frozenset[str]  # those that may be absent

    def weight(self, index: _Index) -> float:
        """What matching all of it would score."""
        return sum(index.weight(op) for output in self.outputs for op in output.bare.operations())


_skeletons: dict[Pattern, _Skeleton] = {}
_exact: dict[tuple, tuple[Term, ...]] = {}


def _skeleton(pattern: Pattern) -> _Skeleton:
    if pattern not in _skeletons:
        examples = pattern.examples
        tensors = tuple(name for name, example in examples.items() if isinstance(example, torch.Tensor))
        optional = frozenset(
            name for name in tensors if "None" in str(pattern.parameters[name].annotation)
        )
        with torch._subclasses.FakeTensorMode():
            outputs = _traced(pattern, {n: (tuple(examples[n].shape), examples[n].dtype) for n in tensors})
        _skeletons[pattern] = _Skeleton(outputs, tensors, optional)
    return _skeletons[pattern]


def _traced(pattern: Pattern, tensors: Mapping[str, Any]) -> tuple[Term, ...]:
    """The terms of search for tensors of these (shape, dtype); None for an absent one."""
    captures = dict(pattern.examples)
    for name, described in tensors.items():
        captures[name] = None if described is None else torch.empty(described[0], dtype=described[1])
    with torch.no_grad():
        return trace(pattern.search, captures)


# Attempts


class _Index:
    """What matching asks of a graph again and again."""

    def __init__(self, graph: Graph, terms: Terms) -> None:
        self.terms = terms
        self.position = terms.mutations.position
        self.fake_mode = next(
            (t.fake_mode for n in graph.nodes if isinstance(t := n.meta.get("example_value"), torch._subclasses.FakeTensor)),
            None,
        )
        self.exact: dict[tuple, tuple[Term, ...]] = {}  # searches traced with this graph's symbolic sizes
        self.by_op: dict[str, list[Node]] = {}
        for node in graph.nodes:
            term = terms.of[node]
            if isinstance(term, Term) and node not in terms.passes_through:
                self.by_op.setdefault(term.bare.op, []).append(node)

    def weight(self, op: str) -> float:
        """What finding this op says about a place: more, the rarer it is in the graph."""
        return 1 / (1 + len(self.by_op.get(op, ())))

    def nearby(self, op: str, node: Node) -> Iterable[Node]:
        """Nodes of this op, the nearest to `node` first."""
        nodes = self.by_op.get(op, [])
        at = bisect_left(nodes, self.position[node], key=self.position.__getitem__)
        window = nodes[max(0, at - NEARBY) : at + NEARBY]
        return sorted(window, key=lambda other: abs(self.position[other] - self.position[node]))


@dataclass
class _Attempt:
    """One pattern at one node."""

    pattern: Pattern
    skeleton: _Skeleton
    index: _Index
    root: Node
    score: float = 0.0
    failure: tuple[Term, Term] | None = None  # what was expected, what stands there
    is_exact: bool = False
    size: int = 0  # of the pattern as it was matched
    steps: int = field(default=0, repr=False)

    def match(self) -> Match | None:
        tried: set[tuple] = set()
        for bare in self._outputs(self.skeleton.outputs, bare=True):
            for tensors in self._assignments(bare):
                key = tuple(tensors.items())
                if key in tried:
                    continue
                tried.add(key)
                self.is_exact = True
                wanted = self._exact_terms(tensors)
                exact = next(self._outputs(wanted, bare=False), None)
                self.is_exact = False
                if exact is not None:
                    self.size = sum(len(output.operations()) for output in wanted)
                    return self._made(*exact)
        return None

    def _outputs(self, outputs: tuple[Term, ...], bare: bool) -> Iterator[tuple[tuple[Node, ...], Bindings]]:
        """Every way to bind the outputs, one after another, beginning with the root."""
        self.steps = 0

        def extend(nodes: tuple[Node, ...], env: Bindings) -> Iterator[tuple[tuple[Node, ...], Bindings]]:
            if len(nodes) == len(outputs):
                yield nodes, env
                return
            wanted = outputs[len(nodes)]
            for node in self.index.nearby(wanted.bare.op, self.root):
                if node not in nodes:
                    term = self.index.terms.of[node]
                    pair = (wanted.bare, term.bare) if bare else (wanted, term)
                    for extended in self._unify([pair], env, 0):
                        yield from extend((*nodes, node), extended)

        term = self.index.terms.of[self.root]
        first = (outputs[0].bare, term.bare) if bare else (outputs[0], term)
        for env in self._unify([first], {}, 0):
            yield from extend((self.root,), env)

    def _assignments(self, found: tuple[tuple[Node, ...], Bindings]) -> Iterator[dict[str, Any]]:
        """The shapes and dtypes that the captures of a skeleton match may have."""
        env = found[1]
        choices = []
        for name in self.skeleton.tensors:
            bare = env.get(name)
            if bare is None or bare.op == "none":
                choices.append([(name, None)])
                continue
            same = self.index.terms.space.same_bare[bare]
            described = {(t.shape, t.dtype) for t in same if self.index.terms.derive(t) and t.dtype is not None}
            choices.append([(name, each) for each in sorted(described, key=str)])
        yield from (dict(choice) for choice in itertools.islice(itertools.product(*choices), ASSIGNMENTS))

    def _exact_terms(self, tensors: dict[str, Any]) -> tuple[Term, ...]:
        is_static = all(d is None or all(isinstance(size, int) for size in d[0]) for d in tensors.values())
        key = (self.pattern, tuple(tensors.items()))
        traced = _exact if is_static else self.index.exact
        if key not in traced:
            mode = self.index.fake_mode or contextlib.nullcontext()
            real = {
                name: d if d is None else (tuple(map(self._real_size, d[0])), d[1]) for name, d in tensors.items()
            }
            with mode:
                traced[key] = _traced(self.pattern, real)
        return traced[key]

    def _real_size(self, size: Any) -> Any:
        """A SymInt for a symbolic size; the graph's own fake mode knows its symbols."""
        if isinstance(size, int) or self.index.fake_mode is None:
            return size
        shape_env = self.index.fake_mode.shape_env
        return shape_env.create_symintnode(size, hint=None)

    # Unification: binds captures so that a pattern's term is a graph's term, in every way there is

    def _unify(self, goals: list[tuple[Term, Term]], env: Bindings, done: float) -> Iterator[Bindings]:
        if not goals:
            yield env
            return
        self.steps += 1
        if self.steps > STEPS:
            return
        (want, have), rest = goals[0], goals[1:]
        if want.op == "var":
            yield from self._bind(want, have, rest, env, done)
            return
        if want.op in ("mul", "add"):
            yield from self._unify_multiset(want, have, rest, env, done)
            return
        if want.op == "number":
            extended = self._scale(want.consts[0], have.consts[0], env) if have.op == "number" else None
            if extended is not None and extended[0] == normalize.ONE:
                yield from self._unify(rest, extended[1], done)
                return
            self._fail(want, have, done)
            return
        extended = self._same_head(want, have, env)
        if extended is None:
            self._fail(want, have, done)
            return
        goals = [*zip(want.args, have.args, strict=True), *rest]
        yield from self._unify(goals, extended, done + self.index.weight(want.op))

    def _bind(self, want: Term, have: Term, rest: list, env: Bindings, done: float) -> Iterator[Bindings]:
        name = want.consts[0]
        bound = env.get(name)
        if bound is have:
            yield from self._unify(rest, env, done)
        elif bound is None and self._can_bind(want, have):
            yield from self._unify(rest, {**env, name: have}, done)
        else:
            self._fail(want, have, done)

    def _can_bind(self, want: Term, have: Term) -> bool:
        if have.op == "none":
            return want.consts[0] in self.skeleton.optional
        if not self.is_exact:
            same = self.index.terms.space.same_bare.get(have, ())
            return any(term.dtype is not None and self.index.terms.derive(term) for term in same)
        return want.dtype == have.dtype and self.index.terms.derive(have) is not None

    def _same_head(self, want: Term, have: Term, env: Bindings) -> Bindings | None:
        """The bindings if op, dtype and constants agree."""
        if want.op != have.op or want.dtype != have.dtype or len(want.args) != len(have.args):
            return None
        if not self.is_exact and want.op in ("view", "expand"):
            return env  # sizes are the exact pass's business
        sizes = (1, 2) if want.op == "slice" and not self.is_exact else ()
        if len(want.consts) != len(have.consts):
            return None
        for at, (expected, found) in enumerate(zip(want.consts, have.consts, strict=True)):
            if isinstance(expected, ConstVar):
                if expected.name in env and env[expected.name] != found:
                    return None
                env = {**env, expected.name: found}
            elif at not in sizes and expected != found:
                return None
        return env

    def _unify_multiset(self, want: Term, have: Term, rest: list, env: Bindings, done: float) -> Iterator[Bindings]:
        """Products and sums: every operand of the pattern takes one of the graph's, captures last."""
        is_product = want.op == "mul"
        if have.dtype != want.dtype or not (have.op == want.op or is_product):
            self._fail(want, have, done)
            return
        wanted = list(zip(want.args, want.consts[1:] if is_product else (1,) * len(want.args), strict=True))
        if have.op != want.op:  # one times have
            constant, operands = normalize.ONE, [(have, 1)]
        else:
            powers = have.consts[1:] if is_product else (1,) * len(have.args)
            constant, operands = have.consts[0], list(zip(have.args, powers, strict=True))
        expected = want.consts[0]
        if is_product and expected.powers:  # number captures first: what is inside may use them again
            scaled = self._scale(expected, constant, env)
            if scaled is None:
                self._fail(want, have, done)
                return
            (constant, env), expected = scaled, normalize.ONE
        inner = [item for item in wanted if item[0].op != "var"]
        captures = [item for item in wanted if item[0].op == "var"]
        for goals, left in self._assigned(want, have, inner, operands, done):
            # What the inner operands bind decides which captures are known when their turn comes.
            for extended in self._unify(goals, env, done + self.index.weight(want.op)):
                yield from self._captured(
                    want, have, captures, left, (expected, constant), rest, extended, done
                )

    def _assigned(self, want, have, inner, operands, done) -> Iterator[tuple[list[tuple[Term, Term]], list]]:
        """Every way to give each operand of the pattern that is no capture one of the graph's."""
        if not inner:
            yield [], operands
            return
        (term, power), others = inner[0], inner[1:]
        found = False
        for at, (operand, exponent) in enumerate(operands):
            if exponent == power and term.op in (operand.op, "mul"):
                found = True
                left = operands[:at] + operands[at + 1 :]
                for goals, still_left in self._assigned(want, have, others, left, done):
                    yield [(term, operand), *goals], still_left
        if not found:
            self._fail(term, operands[0][0] if len(operands) == 1 else have, done + self.index.weight(want.op))

    def _captured(self, want, have, captures, left, constants, rest, env, done) -> Iterator[Bindings]:
        """Gives the captures what is left: those bound already their own, the others one operand or several."""
        (expected, constant), unbound = constants, []
        for var, power in captures:
            bound = env.get(var.consts[0])
            if bound is None:
                unbound.append((var, power))
                continue
            remaining = _without(left, bound, power)
            if remaining is None:
                self._fail(want, have, done)
                return
            left, scalar = remaining
            constant = constant * scalar**-1
        if want.op == "add":
            symbols = [operand for operand in left if operand[0].op == "leaf" and operand[0].dtype is None]
            offset = symbols[:1] if len(left) == len(unbound) + 1 else []
            left = [operand for operand in left if operand not in offset]
            ratio, extended = normalize.ONE, self._offset(expected, constant, offset, env)
        else:
            ratio, extended = self._scale(expected, constant, env) or (normalize.ONE, None)
        if extended is None or len(left) < len(unbound):
            self._fail(want, have, done)
            return
        found = False
        for parts in _partitions(left, unbound, may_join=want.op == "mul"):
            bindings = self._products(parts, ratio, have.dtype)
            if bindings is not None:
                found = True
                yield from self._unify([*bindings, *rest], extended, done + self.index.weight(want.op))
        if not found:
            self._fail(want, have, done)

    def _products(self, parts, ratio: Scalar, dtype) -> list[tuple[Term, Term]] | None:
        """Goals that bind each capture to the product of its part; the first takes the number that is left."""
        goals = []
        for var, power, operands in parts:
            takes = power == 1 or (ratio.value > 0 and not ratio.powers)
            scale, ratio = (ratio ** (1 / power), normalize.ONE) if takes else (normalize.ONE, ratio)
            shape = normalize.broadcast(operand.shape for operand, _ in operands)
            if shape is None:
                return None
            if len(operands) == 1 and operands[0][1] == power and scale == normalize.ONE:
                goals.append((var, operands[0][0]))
                continue
            factors = [(operand, exponent / power) for operand, exponent in operands]
            goals.append((var, normalize.mul(self.index.terms.space, factors, scale, dtype, shape)))
        return goals if ratio == normalize.ONE else None

    def _scale(self, want: Scalar, have: Scalar, env: Bindings) -> tuple[Scalar, Bindings] | None:
        """What is left of have / want once number captures are bound; None if they are bound otherwise."""
        value, unbound = want.value, []
        for name, power in want.powers:
            if name not in env:
                unbound.append((name, power))
            elif isinstance(env[name], float):
                value *= env[name] ** power
            else:
                return None
        if not value:
            return (normalize.ONE, env) if have.value == 0 and not unbound else None
        ratio = have.value / value
        if len(unbound) == 1:
            ((name, power),) = unbound
            if ratio <= 0 and power != 1:
                return None
            return normalize.ONE, {**env, name: ratio ** (1 / power) if power != 1 else ratio}
        if unbound:
            return None
        return (normalize.ONE if close(ratio, 1.0) else Scalar(ratio)), env

    def _offset(self, want: Scalar, have: Scalar, left: list[tuple[Term, float]], env: Bindings) -> Bindings | None:
        """The bindings that make the constant of a sum the same; a number capture may be a symbolic float."""
        if len(want.powers) == 1 and len(left) == 1 and have.value == 0:
            name, symbol = want.powers[0][0], left[0][0]
            if symbol.op == "leaf" and symbol.dtype is None and want.value == 1 and env.get(name, symbol) is symbol:
                return {**env, name: symbol}
        if left:
            return None
        scaled = self._scale(want, have, env)
        return scaled[1] if scaled is not None and scaled[0] == normalize.ONE else None

    def _fail(self, want: Term, have: Term, done: float) -> None:
        """Remembers the attempt that came farthest; an exact one has the whole skeleton behind it."""
        score = min(1.0, done / self.skeleton.weight(self.index))
        score = 0.75 + score / 4 if self.is_exact else score
        if score > self.score:
            self.score, self.failure = score, (want, have)

    # Results

    def _made(self, outputs: tuple[Node, ...], env: Bindings) -> Match:
        captures: dict[str, Any] = {}
        stops: set[Term] = set()
        for name in self.pattern.parameters:
            bound = env.get(name)
            captures[name] = bound
            if not isinstance(bound, Term):
                continue
            if bound.op == "none":
                captures[name] = None
                continue
            derived = self.index.terms.derive(bound)
            assert derived is not None, "only derivable terms are bound"
            node, steps = derived
            stops.update((bound, self.index.terms.of[node]))
            captures[name] = node if bound.dtype is None else Capture(node, steps, self._value(node, steps))
        nodes, operands = self._between(outputs, stops)
        return Match(self.pattern, captures, outputs, nodes, operands)

    def _value(self, node: Node, steps: tuple) -> Any:
        value = node.meta["example_value"]
        if steps:
            with self.index.fake_mode or contextlib.nullcontext(), torch.no_grad():
                needs_grad = value.requires_grad
                value = Capture(node, steps).derive(value)
                return value.detach().requires_grad_(needs_grad and value.is_floating_point())
        return value

    def _between(self, outputs: tuple[Node, ...], stops: set[Term]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
        """The nodes that compute the outputs from the captures, and the operands where that begins."""
        found: dict[Node, bool] = {}
        stack = list(outputs)
        while stack:
            node = stack.pop()
            if node in found:
                continue
            is_operand = node.op in ("placeholder", "get_attr") or self.index.terms.of[node] in stops
            found[node] = is_operand and node not in outputs
            if not found[node]:
                stack.extend(node.all_input_nodes)
        in_order = sorted(found, key=self.index.position.__getitem__)
        return tuple(n for n in in_order if not found[n]), tuple(n for n in in_order if found[n])

    def near_miss(self) -> NearMiss:
        assert self.failure is not None
        want, have = self.failure
        derived = self.index.terms.derive(have) if have.op != "none" else None
        culprit = derived[0] if derived else None
        kind = "rounds elsewhere" if self.is_exact or want.op == "cast" or have.op == "cast" else "differs"
        reason = f"{kind}: expected {describe(want)}, found {describe(have)}"
        return NearMiss(self.pattern, self.root, culprit, reason, self.score)


def _without(operands: list, bound: Term, power: float) -> tuple[list, Scalar] | None:
    """The operands less `bound ** power`, which may be several of them and a number; None if it is not there."""
    wanted, scalar = [(bound, power)], normalize.ONE
    if (bound, power) not in operands and bound.op == "mul":
        wanted = [(term, exponent * power) for term, exponent in zip(bound.args, bound.consts[1:], strict=True)]
        scalar = bound.consts[0] ** power
    left = list(operands)
    for operand in wanted:
        if operand not in left:
            return None
        left.remove(operand)
    return left, scalar


def _partitions(operands: list, captures: list, may_join: bool) -> Iterator[list]:
    """Every way to give each capture an operand, and all that is then left over to one of them."""
    for chosen in itertools.permutations(range(len(operands)), len(captures)):
        parts = [(v, p, [operands[at]]) for (v, p), at in zip(captures, chosen, strict=True)]
        over = [operand for at, operand in enumerate(operands) if at not in chosen]
        if not over:
            yield parts
        elif may_join:
            for at, (var, power, part) in enumerate(parts):
                yield [*parts[:at], (var, power, [*part, *over]), *parts[at + 1 :]]


def describe(term: Term, depth: int = 2) -> str:
    """A term in a line: op, dtype, and its arguments down to a depth."""
    dtype = "" if term.dtype is None else f" in {str(term.dtype).removeprefix('torch.')}"
    if term.op in ("leaf", "var"):
        return f"{term.consts[0]}{dtype}"
    if term.op == "number":
        scalar = term.consts[0]
        return " * ".join([f"{scalar.value:g}", *(f"{n}**{p:g}" for n, p in scalar.powers)])
    if not depth:
        return f"{term.op}(...){dtype}"
    inner = ", ".join(describe(arg, depth - 1).split(" in ")[0] for arg in term.args)
    return f"{term.op}({inner}){dtype}"
