"""find_matches(): where a graph computes what the patterns search for. Knows no operator by name.

Matching has two passes, because a search function is traced for one set of dtypes and shapes at a time:

1. The *skeleton*: search, traced with its examples, against the graph's bare terms. Casts and sizes do not count,
   so this finds every place that is the same mathematics, and which values its captures would be.
2. The *exact* match: search, traced again with the dtypes and shapes of these values, against the graph's terms as
   they are. Now casts count: a place with another rounding is a near miss.

Products and sums match as multisets. A capture in a product takes the factors that are left over, as long as
the graph computes their product somewhere.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from liger_compile.pattern import Capture, Match, NearMiss, Pattern
from liger_compile.terms.build import Terms, trace
from liger_compile.terms.term import Term
from liger_compile.terms.unify import Bindings, Unifier

# How many nodes on each side of the first output are tried as a further output, and how many assignments of
# dtypes for one skeleton: bounds that keep matching linear in the graph.
NEARBY, ASSIGNMENTS = 24, 32
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

    found: list[
        tuple[tuple[int, int], Match]
    ] = []  # with the number of operations, without casts and with them
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
    found.sort(  # of two as large, the one that takes in more of the graph: a bias that is added separately
        key=lambda item: (
            *(-size for size in item[0]),
            -len(item[1].nodes),
            order[item[1].pattern],
            index.position[item[1].outputs[0]],
        )
    )
    matches = [match for _, match in found]
    return matches, _worth_telling(attempts, matches, terms)


def _worth_telling(attempts: list[NearMiss], matches: list[Match], terms: Terms) -> list[NearMiss]:
    """The best attempt for each place that no match covers; a cast of what one covers is the same place."""
    covered = {terms.of[node].bare for m in matches for node in m.nodes if isinstance(terms.of[node], Term)}
    told: dict[Node, NearMiss] = {}  # by every node that the attempt may have been about
    for attempt in sorted(attempts, key=lambda attempt: -attempt.score):
        around = _inputs(attempt.root)
        if terms.of[attempt.root].bare not in covered and not any(node in told for node in around):
            told.update(dict.fromkeys(around, attempt))
    return list(dict.fromkeys(told.values()))


def _inputs(root: Node, count: int = 12) -> list[Node]:
    """`root` and the nodes that it is computed from, so many of them: about as many as a pattern has."""
    found, at = [root], 0
    while at < len(found) < count:
        found.extend(arg for arg in found[at].all_input_nodes if arg.op != "placeholder" and arg not in found)
        at += 1
    return found


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
_exact: dict[tuple, tuple[Term, ...] | None] = {}


def _skeleton(pattern: Pattern) -> _Skeleton:
    if pattern not in _skeletons:
        examples = pattern.examples
        tensors = tuple(name for name, example in examples.items() if isinstance(example, torch.Tensor))
        optional = frozenset(name for name in tensors if "None" in str(pattern.parameters[name].annotation))
        with torch._subclasses.FakeTensorMode():
            outputs = _traced(pattern, {n: (tuple(examples[n].shape), examples[n].dtype) for n in tensors})
        _skeletons[pattern] = _Skeleton(outputs, tensors, optional)
    return _skeletons[pattern]


def _traced(pattern: Pattern, tensors: Mapping[str, Any]) -> tuple[Term, ...]:
    """The terms of search for tensors of these (shape, dtype); None for an absent one."""
    captures = dict(pattern.examples)
    for name, described in tensors.items():
        captures[name] = None if described is None else torch.empty(described[0], dtype=described[1])
    # Shapes that search cannot take are found out by trying; fake tensors log every such error with its trace.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        # An autocast around the model has put its casts into the graph; search says its own.
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return trace(pattern.search, captures)
    finally:
        log.disabled = disabled


# Attempts


class _Index:
    """What matching asks of a graph again and again."""

    def __init__(self, graph: Graph, terms: Terms) -> None:
        self.terms = terms
        self.position = terms.mutations.position
        self.fake_mode = next(
            (
                t.fake_mode
                for n in graph.nodes
                if isinstance(t := n.meta.get("example_value"), torch._subclasses.FakeTensor)
            ),
            None,
        )
        self.exact: dict[
            tuple, tuple[Term, ...] | None
        ] = {}  # searches traced with this graph's symbolic sizes
        self.by_op: dict[str, list[Node]] = {}
        for node in graph.nodes:
            term = terms.of[node]
            if isinstance(term, Term) and node not in terms.passes_through:
                self.by_op.setdefault(term.bare.op, []).append(node)

    def weight(self, op: str) -> float:
        """What finding this op says about a place: more, the rarer it is in the graph."""
        return 1 / (1 + len(self.by_op.get(op, ())))

    def described(self, bare: Term) -> set[tuple[Any, Any]]:
        """The (shape, dtype) of every value in the graph, or a cheap step from one, that is `bare` but for casts."""
        same = (term for term in self.terms.space.same_bare.get(bare, ()) if term.dtype is not None)
        found = {(term.shape, term.dtype) for term in same if self.terms.derive(term)}
        if not found and bare.op == "mul" and len(bare.args) == 1 and bare.consts[1] == 1:
            return self.described(bare.args[0])  # scaled by a number, as -sin is
        return found

    def nearby(self, op: str, node: Node) -> Iterable[Node]:
        """Nodes of this op, the nearest to `node` first."""
        nodes = self.by_op.get(op, [])
        at = bisect_left(nodes, self.position[node], key=self.position.__getitem__)
        window = nodes[max(0, at - NEARBY) : at + NEARBY]
        return sorted(window, key=lambda other: abs(self.position[other] - self.position[node]))


class _Attempt:
    """One pattern at one node."""

    def __init__(self, pattern: Pattern, skeleton: _Skeleton, index: _Index, root: Node) -> None:
        self.pattern, self.skeleton, self.index, self.root = pattern, skeleton, index, root
        self.size = (0, 0)  # of the pattern as it was matched: without casts, and with them
        space = index.terms.space
        self._bare = Unifier(space, self._can_bind_bare, index.weight, is_exact=False)
        self._exact = Unifier(space, self._can_bind_exact, index.weight, is_exact=True)

    def match(self) -> Match | None:
        tried: set[tuple] = set()
        of = self.index.terms.of
        for nodes, env in self._outputs(self._bare, [output.bare for output in self.skeleton.outputs]):
            places = [of[node].bare for node in nodes]
            for tensors in self._assignments(env):
                key = (*places, *tensors.items())
                if key in tried:
                    continue
                tried.add(key)
                wanted = self._exact_terms(tensors)
                if wanted is None:
                    continue
                exact = next(self._outputs(self._exact, wanted, places), None)
                if exact is not None:
                    without_casts = sum(len(output.bare.operations()) for output in wanted)
                    self.size = without_casts, sum(len(output.operations()) for output in wanted)
                    return self._made(*exact)
        return None

    def _outputs(
        self, unifier: Unifier, outputs: Sequence[Term], places: Sequence[Term] | None = None
    ) -> Iterator[tuple[tuple[Node, ...], Bindings]]:
        """Every way to bind the outputs, one after another, beginning with the root.

        `places` are the bare terms of the outputs where a skeleton match has found them.
        """

        def extend(nodes: tuple[Node, ...], env: Bindings) -> Iterator[tuple[tuple[Node, ...], Bindings]]:
            if len(nodes) == len(outputs):
                yield nodes, env
                return
            wanted = outputs[len(nodes)]
            for node in self.index.nearby(wanted.bare.op, self.root) if nodes else (self.root,):
                term = self.index.terms.of[node]
                if node not in nodes and (places is None or term.bare is places[len(nodes)]):
                    have = term if unifier.is_exact else term.bare
                    for extended in unifier.unify(wanted, have, env):
                        yield from extend((*nodes, node), extended)

        return extend((), {})

    def _can_bind_bare(self, want: Term, have: Term) -> bool:
        if have.op == "none":
            return want.consts[0] in self.skeleton.optional
        return bool(self.index.described(have))

    def _can_bind_exact(self, want: Term, have: Term) -> bool:
        if have.op == "none":
            return want.consts[0] in self.skeleton.optional
        is_like = want.dtype == have.dtype and want.shape == have.shape  # search was traced for just these
        return is_like and self.index.terms.derive(have) is not None

    def _assignments(self, env: Bindings) -> Iterator[dict[str, Any]]:
        """The shapes and dtypes that the captures of a skeleton match may have."""
        choices = []
        for name in self.skeleton.tensors:
            bare = env.get(name)
            if bare is None or bare.op == "none":
                choices.append([(name, None)])
                continue
            choices.append([(name, each) for each in sorted(self.index.described(bare), key=str)])
        yield from (dict(choice) for choice in itertools.islice(itertools.product(*choices), ASSIGNMENTS))

    def _exact_terms(self, tensors: dict[str, Any]) -> tuple[Term, ...] | None:
        """The terms of search for these; None if it does not take tensors of these shapes."""
        is_static = all(d is None or all(isinstance(size, int) for size in d[0]) for d in tensors.values())
        key = (self.pattern, tuple(tensors.items()))
        traced = _exact if is_static else self.index.exact
        if key not in traced:
            mode = self.index.fake_mode or contextlib.nullcontext()
            real = {
                name: d if d is None else (tuple(map(self._real_size, d[0])), d[1])
                for name, d in tensors.items()
            }
            with mode:
                try:
                    traced[key] = _traced(self.pattern, real)
                except (RuntimeError, ValueError, TypeError, IndexError):
                    traced[key] = None
        return traced[key]

    def _real_size(self, size: Any) -> Any:
        """A SymInt for a symbolic size; the graph's own fake mode knows its symbols."""
        shape_env = getattr(self.index.fake_mode, "shape_env", None)
        return (
            size
            if isinstance(size, int) or shape_env is None
            else shape_env.create_symintnode(size, hint=None)
        )

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

    def _between(
        self, outputs: tuple[Node, ...], stops: set[Term]
    ) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
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

    @property
    def score(self) -> float:
        """The share of the pattern that matched; what matched but for rounding and sizes is ahead of the
        rest.
        """
        if self._exact.failure:
            return 1.0
        root = self.skeleton.outputs[0].bare.op
        if self._bare.score <= self.index.weight(root):
            return 0.0  # the root alone says little
        return min(1.0, self._bare.score / self.skeleton.weight(self.index))

    def near_miss(self) -> NearMiss:
        kind, failure = (
            ("rounds elsewhere", self._exact.failure)
            if self._exact.failure
            else ("differs", self._bare.failure)
        )
        assert failure is not None
        want, have = failure
        derived = self.index.terms.derive(have) if have.op != "none" else None
        reason = f"{kind}: expected {describe(want)}, found {describe(have)}"
        return NearMiss(self.pattern, self.root, derived[0] if derived else None, reason, self.score)


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
    parts = [describe(arg, depth - 1).split(" in ")[0] for arg in term.args]
    if term.op == "mul":
        powers = ("" if power == 1 else f"**{power:g}" for power in term.consts[1:])
        parts = [part + power for part, power in zip(parts, powers, strict=True)]
    inner = ", ".join(parts)
    return f"{term.op}({inner}){dtype}"
