"""find_matches(): finds the places where a graph computes a pattern. It names no operator.

Matching has two passes, because a search function is traced for one set of dtypes and shapes at a time:

1. The *skeleton*: search, traced with its examples, is matched against the uncast terms of the graph. This pass ignores
   casts and sizes, so it finds every place with the same mathematics, and the values that its captures would bind.
2. The *exact* match: search, traced again with the dtypes and shapes of these values, is matched against the terms of
   the graph with their casts. Now casts count: a place with other rounding is a near miss.

For a place that nearly matches a pattern, diagnose/compare.py finds the difference; diagnose/sentences.py describes it.

Products and sums match as multisets. A capture in a product binds the remaining factors, if the graph computes their
product somewhere.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from liger_compile.diagnose.compare import Comparer, Comparison, Difference
from liger_compile.diagnose.formula import Formula
from liger_compile.diagnose.roundings import Moved, moved, roundings
from liger_compile.diagnose.sentences import input_name, reported_differences, rounding_sentence, sentence
from liger_compile.graphs.guards import GuardError, no_guards
from liger_compile.graphs.regions import without_modes
from liger_compile.pattern import Capture, Match, NearMiss, Pattern
from liger_compile.steps.callbacks import raised
from liger_compile.terms.build import Terms, trace
from liger_compile.terms.call import Draw
from liger_compile.terms.term import Term
from liger_compile.terms.unify import Bindings, Unifier, operands_of
from liger_compile.torch_internals.dispatch import enable_python_dispatcher
from liger_compile.torch_internals.fake_tensors import FakeTensor, FakeTensorMode, errors_not_logged

# The number of nodes on each side of the first output that are tried as a further output, and the number of assignments
# of dtypes for one skeleton: bounds that keep matching linear in the graph.
NEARBY, ASSIGNMENTS = 24, 32
NEAR_MISS = 0.6  # the share of a pattern that must agree in a near miss
FAULT = 0.03  # subtracted from that share for each difference
REGION = 32  # the largest number of nodes of a near miss


def find_matches(
    graph: Graph, patterns: Sequence[Pattern], terms: Terms, *, strict: bool = False
) -> tuple[list[Match], list[NearMiss]]:
    """Returns all places where `graph` computes a pattern, larger patterns first, and the near misses.

    Matches may overlap; steps/decide.py chooses among them.

    Raises:
        PatternError: under `strict`, if a search function raises an error that tensors of another shape do not explain.
    """
    index = _Index(graph, terms, strict)
    places = [pattern.finds(pattern, graph, terms) for pattern in patterns if pattern.finds]
    by_op: dict[str, list[tuple[Pattern, _Skeleton]]] = {}
    for pattern in patterns:
        skeleton = None if pattern.finds else index.skeleton(pattern)
        if skeleton is None:
            continue
        by_op.setdefault(skeleton.outputs[0].uncast.op, []).append((pattern, skeleton))

    found: list[tuple[tuple[int, int], Match]] = []  # with its operations, without and with casts
    failed: list[_Attempt] = []
    taken: set[tuple[Pattern, Node]] = set()
    for node in graph.nodes:
        term = terms.of[node]
        if not isinstance(term, Term) or node in terms.passes_through or node.op == "placeholder":
            continue
        for pattern, skeleton in by_op.get(term.uncast.op, ()):
            if (pattern, node) in taken:
                continue
            attempt = _Attempt(pattern, skeleton, index, node)
            match = attempt.match()
            if match is not None:
                found.append((attempt.size, match))
                taken.update((pattern, output) for output in match.outputs)
            elif _has_near_misses(pattern):
                failed.append(attempt)
    order = {pattern: rank for rank, pattern in enumerate(patterns)}
    found.sort(  # of two equal sizes, first the match with more nodes: for example with a bias added separately
        key=lambda item: (
            *(-size for size in item[0]),
            -len(item[1].nodes),
            order[item[1].pattern],
            index.position[item[1].outputs[0]],
        )
    )
    of_search = [match for _, match in found]
    of_finders = [match for of_pattern, _ in places for match in of_pattern]
    matches = [*(match for match in of_finders if not _is_in_loss(match, of_search)), *of_search]
    roots = {output for match in matches for output in match.outputs}
    missed = [miss for _, near in places for miss in near if miss.root not in roots]
    return matches, [*index.failures, *missed, *_near_misses(failed, matches, index)]


def _is_in_loss(match: Match, others: Sequence[Match]) -> bool:
    """Returns whether a loss, which computes its gradients in forward, replaces all that `match` would replace.

    Of a match that ends in a loss, these are the values from which the loss is computed. The loss of each token has its
    own incoming gradient, so that its gradients are not computed in forward.
    """
    losses = (other for other in others if other.pattern.is_loss and not _is_of_tokens(other))
    if not match.pattern.is_loss:
        return any(set(other.nodes).issuperset(match.nodes) for other in losses)
    return any(
        all(_depends_on(node, other.outputs[0]) for node in set(match.outputs) - set(other.nodes))
        for other in losses
        if not set(match.outputs).isdisjoint(other.nodes)
    )


def _depends_on(node: Node, other: Node) -> bool:
    seen, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - seen
        seen |= new
        waiting += new
    return other in seen


def _is_of_tokens(match: Match) -> bool:
    return match.result.dim() > 0 and match.result.requires_grad


def _has_near_misses(pattern: Pattern) -> bool:
    return pattern.replace is not None if pattern.has_near_misses is None else pattern.has_near_misses


# Tracing search functions


@dataclass(frozen=True)
class _Skeleton:
    """A pattern traced with its examples."""

    outputs: tuple[Term, ...]
    tensors: tuple[str, ...]  # the tensor captures
    optional: frozenset[str]  # the tensor captures that may be absent
    text: str  # of the first output; equal for patterns that differ in rounding only


_skeletons: dict[Pattern, _Skeleton] = {}
_exact: dict[tuple, tuple[Term, ...] | None] = {}


def _skeleton(pattern: Pattern) -> _Skeleton:
    if pattern not in _skeletons:
        examples = pattern.examples
        tensors = tuple(name for name, example in examples.items() if isinstance(example, torch.Tensor))
        optional = frozenset(name for name in tensors if "None" in str(pattern.parameters[name].annotation))
        with FakeTensorMode():
            outputs = _traced(pattern, {n: (tuple(examples[n].shape), examples[n].dtype) for n in tensors})
        _skeletons[pattern] = _Skeleton(outputs, tensors, optional, outputs[0].uncast.written())
    return _skeletons[pattern]


def _traced(pattern: Pattern, tensors: Mapping[str, Any]) -> tuple[Term, ...]:
    """Returns the terms of search for tensors with these (shape, dtype); None stands for an absent tensor."""
    captures = dict(pattern.examples)
    for name, described in tensors.items():
        captures[name] = None if described is None else torch.empty(described[0], dtype=described[1])
    # Trying is the only way to find the shapes that search rejects; fake tensors log each such error with its trace.
    # An autocast around the model has inserted its casts into the graph; search contains its own casts.
    with errors_not_logged(), without_modes():
        return trace(pattern.search, captures)


# Attempts


class _Index:
    """The data about a graph that matching reads repeatedly."""

    def __init__(self, graph: Graph, terms: Terms, strict: bool = False) -> None:
        self.terms, self.strict = terms, strict
        self.failures: list[NearMiss] = []  # failures of search functions
        self.last = next(iter(reversed(graph.nodes)))
        self.position = terms.mutations.position
        self.fake_mode = next(
            (t.fake_mode for n in graph.nodes if isinstance(t := n.meta.get("example_value"), FakeTensor)),
            None,
        )
        self.exact: dict[
            tuple, tuple[Term, ...] | None
        ] = {}  # searches traced with the symbolic sizes of this graph, and searches that failed in it
        self.by_op: dict[str, list[Node]] = {}
        for node in graph.nodes:
            term = terms.of[node]
            if isinstance(term, Term) and node not in terms.passes_through:
                self.by_op.setdefault(term.uncast.op, []).append(node)
        # The first compares with the skeleton of a pattern, the second with a search traced for the sizes of a place.
        self.uncast, self.sized = (
            Comparer(self.called, self.inside, has_sizes) for has_sizes in (False, True)
        )
        self.factors = Comparer(self.called, self.inside, takes_rest=False)
        self._node_of: dict[Term, Node | None] = {}
        self._overwritten: dict[Term, Node | None] = {}
        self._inside: dict[Term, Sequence[Term]] = {}
        self._described: dict[Term, set[tuple[Any, Any]]] = {}

    def skeleton(self, pattern: Pattern) -> _Skeleton | None:
        """Returns the skeleton, or None for a pattern whose search fails: it matches nowhere."""
        try:
            return _skeleton(pattern)
        except Exception as error:
            self.fails(pattern, self.last, error)
            return None

    def fails(self, pattern: Pattern, root: Node, error: Exception, score: float = 0.0) -> None:
        """Records that the search of a pattern raised at a place."""
        failure = raised(pattern, "search", error)
        if self.strict:
            raise failure
        self.failures.append(NearMiss(pattern, root, root, str(failure), score))

    def node_of(self, term: Term) -> Node | None:
        """Returns the first node with the value of a term; for an uncast term, with its value up to casts."""
        if term not in self._node_of:
            having = (nodes[0] for other in self._rounded(term) if (nodes := self.terms.nodes.get(other)))
            self._node_of[term] = next(having, None)
        return self._node_of[term]

    def _rounded(self, term: Term) -> Sequence[Term]:
        """Returns the term; for an uncast term, the terms that equal it up to casts."""
        return (term,) if term.dtype is not None else self.terms.space.same_uncast.get(term, ())

    def overwritten(self, term: Term) -> Node | None:
        """Returns the node whose value a term is after an in-place write; None if nothing wrote into the value."""
        if term not in self._overwritten:
            written = self.terms.written
            found = (written[other] for other in self._rounded(term) if other in written)
            self._overwritten[term] = next(found, None)
        return self._overwritten[term]

    def writer(self, term: Term) -> Node | None:
        """Returns the node that writes into a value before it is read as `term`."""
        node = self.overwritten(term)
        return None if node is None else self.terms.mutations.last_write(node)

    def inside(self, uncast: Term) -> Sequence[Term]:
        """Returns the operands of an uncast term; for an opaque term, those of its node."""
        if uncast not in self._inside:
            self._inside[uncast] = self._find_inside(uncast)
        return self._inside[uncast]

    def _find_inside(self, uncast: Term) -> Sequence[Term]:
        if (before := self.overwritten(uncast)) is not None:
            return [value.uncast] if isinstance(value := self.terms.of[before], Term) else []
        node = self.node_of(uncast) if uncast.op == "leaf" else None
        if node is None:
            return uncast.args
        values = (self.terms.of[arg] for arg in _call_of(node).all_input_nodes)
        return [value.uncast for value in values if isinstance(value, Term)]

    def called(self, term: Term) -> str:
        """Returns the name, for people, of the operation that made `term`, or of the input that it is."""
        if (writer := self.writer(term)) is not None:
            return f"a write in place ({_name_of(writer)})"
        node = self.node_of(term) if term.op == "leaf" else None
        if node is None:
            return str(term.consts[0] if term.op in ("leaf", "var") else term.op.rpartition(".")[2])
        if not self.is_call(term):
            return input_name(node.name)
        return _name_of(_call_of(node)).rstrip("_")

    def is_call(self, term: Term) -> bool:
        node = self.node_of(term) if term.op == "leaf" else None
        return node is not None and node.op in ("call_function", "call_method")

    def described(self, uncast: Term) -> set[tuple[Any, Any]]:
        """Returns the (shape, dtype) of each value that equals `uncast` up to casts, here or one cheap step away."""
        if uncast not in self._described:
            self._described[uncast] = self._find_described(uncast)
        return self._described[uncast]

    def _find_described(self, uncast: Term) -> set[tuple[Any, Any]]:
        same = (term for term in self.terms.space.same_uncast.get(uncast, ()) if term.dtype is not None)
        found = {(term.shape, term.dtype) for term in same if self.terms.derive(term)}
        if not found and uncast.op == "mul" and len(uncast.args) == 1 and uncast.consts[1] == 1:
            return self.described(uncast.args[0])  # scaled by a number, for example -sin
        return found

    def formula(self, bindings: Bindings) -> Formula:
        """Returns a formula that writes the terms of the graph, and those of a pattern with these bindings."""
        captures = {term.uncast: name for name, term in bindings.items() if isinstance(term, Term)}
        numbers = {name: value for name, value in bindings.items() if isinstance(value, float)}
        return Formula(self.called, self.is_call, captures, numbers)

    def region(self, root: Node, captured: set[Term]) -> list[Node]:
        """Returns `root` and the nodes that compute it, up to the captured values, in graph order."""
        found, waiting = {root}, deque([root])
        while waiting and len(found) < REGION:
            for arg in itertools.islice(waiting.popleft().all_input_nodes, REGION):
                value = self.terms.of[arg]
                is_inner = isinstance(value, Term) and value.uncast not in captured
                if is_inner and arg.op not in ("placeholder", "get_attr") and arg not in found:
                    found.add(arg)
                    waiting.append(arg)
        return sorted(found, key=self.position.__getitem__)

    def nearby(self, op: str, node: Node) -> Iterable[Node]:
        """Returns nodes of this op, the nearest to `node` first."""
        nodes = self.by_op.get(op, [])
        at = bisect_left(nodes, self.position[node], key=self.position.__getitem__)
        window = nodes[max(0, at - NEARBY) : at + NEARBY]
        return sorted(window, key=lambda other: abs(self.position[other] - self.position[node]))


def _name_of(node: Node) -> str:
    """Returns the name of the function that a node calls."""
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _call_of(node: Node) -> Node:
    """Returns the call that made a value; `node` may be one of several results of the call."""
    is_part = node.target is operator.getitem and node.all_input_nodes
    return node.all_input_nodes[0] if is_part and node.all_input_nodes[0].op != "placeholder" else node


# Errors of a search function for tensors of shapes that it rejects: the place is another computation.
_OTHER_SHAPES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


class _Attempt:
    """One pattern at one node."""

    def __init__(self, pattern: Pattern, skeleton: _Skeleton, index: _Index, root: Node) -> None:
        self.pattern, self.skeleton, self.index, self.root = pattern, skeleton, index, root
        self.size = (0, 0)  # the number of operations of the matched pattern: without casts, and with them
        space = index.terms.space
        self._bare = Unifier(space, self._can_bind_bare, is_exact=False)
        self._exact = Unifier(space, self._can_bind_exact, is_exact=True)

    @property
    def is_single(self) -> bool:
        return len(self.skeleton.outputs) == 1

    def match(self) -> Match | None:
        for places, wanted, _ in self.candidates():
            exact = next(self._outputs(self._exact, wanted, places), None)
            if exact is not None:
                without_casts = sum(len(output.uncast.operations()) for output in wanted)
                self.size = without_casts, sum(len(output.operations()) for output in wanted)
                return self._made(*exact)
        return None

    def candidates(self) -> Iterator[tuple[list[Term], tuple[Term, ...], Bindings]]:
        """Yields for each skeleton match the uncast terms of its outputs, search traced for it, and the bindings."""
        tried: set[tuple] = set()
        of = self.index.terms.of
        for nodes, env in self._outputs(self._bare, [output.uncast for output in self.skeleton.outputs]):
            places = [of[node].uncast for node in nodes]
            for tensors in self._assignments(env):
                key = (*places, *tensors.items())
                if key not in tried:
                    tried.add(key)
                    wanted = self._exact_terms(tensors)
                    if wanted is not None:
                        yield places, wanted, env

    def _outputs(
        self, unifier: Unifier, outputs: Sequence[Term], places: Sequence[Term] | None = None
    ) -> Iterator[tuple[tuple[Node, ...], Bindings]]:
        """Yields every way to bind the outputs, one after another, beginning with the root.

        `places` are the uncast terms of the outputs if a skeleton match has found them.
        """

        def extend(nodes: tuple[Node, ...], env: Bindings) -> Iterator[tuple[tuple[Node, ...], Bindings]]:
            if len(nodes) == len(outputs):
                yield nodes, env
                return
            wanted = outputs[len(nodes)]
            for node in self.index.nearby(wanted.uncast.op, self.root) if nodes else (self.root,):
                term = self.index.terms.of[node]
                if node not in nodes and (places is None or term.uncast is places[len(nodes)]):
                    have = term if unifier.is_exact else term.uncast
                    for extended in unifier.unify(wanted, have, env):
                        yield from extend((*nodes, node), extended)

        return extend((), {})

    def rounded(self) -> tuple[Sequence[Difference], Sequence[Moved], Bindings]:
        """Returns the differences in sizes and in rounding of the nearest skeleton match, and its bindings."""
        have, found = self.index.terms.of[self.root], []
        for _, wanted, env in self.candidates():
            formula = self.index.formula(env)
            moves = moved(roundings(wanted[0], formula), roundings(have, formula))
            comparison = None if moves else self.index.sized.compare(wanted[0].uncast, have.uncast)
            found.append((comparison.differences if comparison else (), moves, env))
        return min(found, key=lambda bound: len(bound[0]) + len(bound[1]), default=((), (), {}))

    def products(self) -> Sequence[Difference]:
        """Returns the factors that one capture would bind, and whose product the graph does not compute."""
        want, have = self.skeleton.outputs[0].uncast, self.index.terms.of[self.root].uncast
        comparison = self.index.factors.compare(want, have)
        return (
            [difference for difference in comparison.differences if difference.kind == "rest"]
            if comparison
            else ()
        )

    def _can_bind_bare(self, want: Term, have: Term) -> bool:
        if have.op == "none":
            return want.consts[0] in self.skeleton.optional
        return bool(self.index.described(have))

    def _can_bind_exact(self, want: Term, have: Term) -> bool:
        if have.op == "none":
            return want.consts[0] in self.skeleton.optional
        is_like = want.dtype == have.dtype and want.shape == have.shape  # search was traced for exactly these
        return is_like and self.index.terms.derive(have) is not None

    def _assignments(self, env: Bindings) -> Iterator[dict[str, Any]]:
        """Yields the shapes and dtypes that the captures of a skeleton match may have."""
        choices = []
        for name in self.skeleton.tensors:
            uncast = env.get(name)
            if uncast is None or uncast.op == "none":
                choices.append([(name, None)])
                continue
            choices.append([(name, value) for value in sorted(self.index.described(uncast), key=str)])
        yield from (dict(choice) for choice in itertools.islice(itertools.product(*choices), ASSIGNMENTS))

    def _exact_terms(self, tensors: dict[str, Any]) -> tuple[Term, ...] | None:
        """Returns the terms of search for these tensors; None if search rejects their shapes."""
        is_static = all(d is None or all(isinstance(size, int) for size in d[0]) for d in tensors.values())
        key = (self.pattern, tuple(tensors.items()))
        traced = self.index.exact if key in self.index.exact or not is_static else _exact
        if key not in traced:
            mode = self.index.fake_mode or contextlib.nullcontext()
            real = {
                name: d if d is None else (tuple(map(self._real_size, d[0])), d[1])
                for name, d in tensors.items()
            }
            # As in Dynamo: in 2.11 F.linear rejects symbolic sizes without it.
            with mode, contextlib.nullcontext() if is_static else enable_python_dispatcher():
                try:
                    with no_guards(mode):
                        traced[key] = _traced(self.pattern, real)
                except GuardError as error:
                    traced[key] = None
                    reason = f"whether it is this computation for all sizes is not known: {error}"
                    self.index.failures.append(NearMiss(self.pattern, self.root, self.root, reason, 1.0))
                except _OTHER_SHAPES:
                    traced[key] = None
                except Exception as error:  # cached for this graph only: the next one reports it too
                    traced = self.index.exact
                    traced[key] = None
                    self.index.fails(self.pattern, self.root, error, score=1.0)
        return traced[key]

    def _real_size(self, size: Any) -> Any:
        """Returns a SymInt for a symbolic size, made by the graph's own fake mode, which has the symbols."""
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
            captures[name] = float(bound) if isinstance(bound, Draw) else bound
            if not isinstance(bound, Term):
                continue
            if bound.op == "none":
                captures[name] = None
                continue
            derived = self.index.terms.derive(bound)
            assert derived is not None, "only derivable terms are bound"
            node, steps = derived
            stops.update((bound, self.index.terms.of[node]))
            captures[name] = node
            if bound.dtype is not None:
                written_by = self.index.terms.written_by(bound)
                captures[name] = Capture(node, steps, self._value(node, steps), written_by)
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
        """Returns the nodes that compute the outputs from the captures, and the operands that they start from."""
        found: dict[Node, bool] = {}
        stack = list(outputs)
        while stack:
            node = stack.pop()
            if node in found:
                continue
            term = self.index.terms.of[node]
            is_operand = node.op in ("placeholder", "get_attr") or (isinstance(term, Term) and term in stops)
            found[node] = is_operand and node not in outputs
            if not found[node]:
                stack.extend(node.all_input_nodes)
        in_order = sorted(found, key=self.index.position.__getitem__)
        return tuple(n for n in in_order if not found[n]), tuple(n for n in in_order if found[n])


# Near misses


def _near_misses(failed: Sequence[_Attempt], matches: Sequence[Match], index: _Index) -> list[NearMiss]:
    """Returns the best attempt for each place that no match covers, or only a smaller match behind extra operators."""
    answered: set[Node] = set()  # by a match without a search, which has a reason of its own if it is left
    covered: dict[Term, float] = {}  # the weight of the largest match at each term
    for match in matches:
        if match.pattern.finds:
            answered.update(match.outputs)
            continue
        weight = index.uncast.weight(_skeleton(match.pattern).outputs[0].uncast)
        for node in match.nodes:
            if isinstance(term := index.terms.of[node], Term):
                covered[term.uncast] = max(weight, covered.get(term.uncast, 0.0))
    compared: dict[tuple[str, Term], Comparison | None] = {}
    near: list[_Near] = []
    for attempt in failed:
        want, have = attempt.skeleton.outputs[0].uncast, index.terms.of[attempt.root].uncast
        key = attempt.skeleton.text, have
        if key not in compared:
            weight = index.uncast.weight(want)
            may_tell = (
                have not in covered or covered[have] < weight * attempt.is_single
            ) and index.uncast.may_score(want, have, covered) >= NEAR_MISS * weight
            compared[key] = index.uncast.compare(want, have) if may_tell else None
        comparison = compared[key]
        found = comparison and _Near.of(attempt, comparison, covered)
        if found and answered.isdisjoint(found.region):
            near.append(found)
    reported: list[_Near] = []
    roots: set[Node] = set()
    regions: set[Node] = set()
    for miss in sorted(near, key=lambda near_miss: near_miss.rank):
        if miss.root not in regions and roots.isdisjoint(miss.region):
            reported.append(miss)
            roots.add(miss.root)
            regions.update(miss.region)
    return [miss.near_miss() for miss in reported]


@dataclass(frozen=True, eq=False)
class _Near:
    """A near miss of one pattern.

    Args:
        differences: the differences in mathematics; if there are none, `roundings` are the differences in rounding.
        region: the nodes from the root to the values that the captures would bind.
    """

    attempt: _Attempt
    score: float
    bindings: Mapping[str, Any]
    differences: Sequence[Difference]
    roundings: Sequence[Moved]
    region: Sequence[Node]

    @staticmethod
    def of(attempt: _Attempt, comparison: Comparison, covered: Mapping[Term, float]) -> _Near | None:
        """Returns None if the place is not near enough, or is covered by a match."""
        index, root = attempt.index, attempt.index.terms.of[attempt.root].uncast
        weight = index.uncast.weight(attempt.skeleton.outputs[0].uncast)
        score = comparison.score / weight - FAULT * len(comparison.differences)
        if score < NEAR_MISS:
            return None
        by = max(covered.get(term, 0.0) for term in (root, *comparison.anchors))
        is_behind = attempt.is_single and all(
            difference.kind in ("between", "extra") for difference in comparison.differences
        )
        if by and not (comparison.differences and is_behind and by < weight):
            return None
        if comparison.differences:
            differences, moves, bindings = comparison.differences, (), comparison.bindings
        elif attempt.is_single:
            differences, moves, bindings = attempt.rounded()
            if not differences and not moves:
                differences, bindings = attempt.products(), comparison.bindings
        else:  # the first output of several is present, which is not a near miss
            return None
        if not differences and not moves:
            return None
        region = index.region(attempt.root, {term for term in bindings.values() if isinstance(term, Term)})
        return _Near(attempt, score - FAULT / 10 * len(moves), bindings, differences, moves, region)

    @property
    def root(self) -> Node:
        return self.attempt.root

    @property
    def rank(self) -> tuple[int, float, int]:
        """The sort key: nearest first, then more captures; patterns of several outputs come after simpler patterns."""
        return len(self.attempt.skeleton.outputs), -self.score, -len(self.bindings)

    def near_miss(self) -> NearMiss:
        formula = self.attempt.index.formula(self.bindings)
        if self.differences:
            differences = reported_differences(self.differences, formula)
            reason, culprit = sentence(differences, formula), self._culprit(differences[0])
        else:
            reason, culprit = rounding_sentence(self.roundings), self._rounding_node(self.roundings[0])
        return NearMiss(self.attempt.pattern, self.root, culprit, reason, self.score, tuple(self.region))

    def _culprit(self, different: Difference) -> Node:
        """Returns the first node that computes the different value; if the region has none, a node that reads it."""
        of = self.attempt.index.terms.of
        uncast = {node: of[node].uncast for node in self.region}
        if different.kind == "power":
            factor = different.have, different.found
            return next(
                (n for n, t in uncast.items() if t.op == "mul" and factor in operands_of(t, "mul")[1]),
                self.root,
            )
        if (writer := self.attempt.index.writer(different.have)) is not None:
            return writer
        for term in (different.have, different.around):
            makes = (node for node in uncast if uncast[node] is term)
            reads = (
                n for n in uncast for arg in n.all_input_nodes if getattr(of[arg], "uncast", None) is term
            )
            alike = (
                n for n in uncast if uncast[n].op == term.op
            )  # the same op in another shape, from before a view was moved through it
            if (node := next(itertools.chain(makes, reads, alike), None)) is not None:
                return node
        return self.root

    def _rounding_node(self, different: Moved) -> Node:
        """Returns the node that rounds, or the node whose result should be rounded."""
        of, found = self.attempt.index.terms.of, different.found
        if found is None:
            return self.root
        casts = (n for n in self.region if of[n].op == "cast" and of[n].args[0] is found.term)
        rounds = casts if found.rounded else ()
        computes = (n for n in self.region if of[n] is found.term)
        return next(itertools.chain(rounds, computes), self.root)
