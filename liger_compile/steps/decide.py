"""decide(): decides about each match. It keeps the first two promises: never wrong, never slower.

For every match, larger patterns first, it checks legality in any graph, then the pattern's own check, then profit. The
first refusal applies and is a sentence. This file does not edit the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from liger_compile.graphs.aliasing import Mutations
from liger_compile.graphs.regions import Region, Regions, in_words
from liger_compile.pattern import Annotate, Capture, Decision, Match
from liger_compile.steps import callbacks
from liger_compile.steps.moving import moved_nodes
from liger_compile.torch_internals.dispatch import is_traceable_wrapper_subclass
from liger_compile.torch_internals.dtensor import is_dtensor


@dataclass(frozen=True)
class Rules:
    """The options of a decision.

    Args:
        policy: "auto" calls profit too, "always" does not, "never" replaces nothing.
        fuel: the largest number of matches that may be replaced; None means no limit.
        recompute: False marks nothing as cheap: matches that would only be marked are left.
        takes_marks: False if the compiler of the graph ignores marks.
        runs_once: False in the subgraph of a checkpoint, where no loss is replaced.
        strict: reraise the exceptions of a pattern's check, profit or saves.
    """

    policy: str = "auto"
    fuel: int | None = None
    recompute: bool = True
    takes_marks: bool = True
    runs_once: bool = True
    strict: bool = False


DEFAULT = Rules()


def decide(
    graph: Graph,
    matches: Sequence[Match],
    mutations: Mutations,
    *,
    regions: Regions | None = None,
    rules: Rules = DEFAULT,
    refused: Mapping[Match, Decision] | None = None,
) -> list[Decision]:
    """Returns a decision for every match that no larger accepted match contains.

    Args:
        matches: larger patterns first, in the order of find_matches.
        regions: the modes of the nodes; for a subgraph, the modes of its calls are included.
        refused: existing decisions, for matches that could not be replaced.

    Raises:
        PatternError: under `rules.strict`.
    """
    context = _Context(mutations, regions or Regions(graph), rules)
    consumed: set[Node] = set()
    replaced: set[Node] = set()
    used = 0  # the fuel used so far
    decisions: list[Decision] = []
    why_left: dict[Node, str] = {}  # by the first output of a match
    for match in matches:
        if consumed & set(match.outputs) or replaced & set(match.nodes):
            continue  # part of a larger match, or contains a smaller one
        decision = (refused or {}).get(match) or _decision(match, context)
        if decision.kind != "leave" and rules.fuel is not None and rules.fuel <= used:
            decision = Decision(match, "leave", f"liger.fuel={rules.fuel} is used up")
        used += decision.kind != "leave"
        if decision.kind == "leave":
            why_left.setdefault(match.outputs[0], decision.reason)
        else:
            decision = replace(decision, instead_of=why_left.get(match.outputs[0], ""))
        decisions.append(decision)
        if decision.kind != "leave" or decision.covers:
            replaced.update(match.outputs)
            consumed.update(match.outputs)
            consumed.update(set(match.nodes) - set(match.escaping()))
    return _without_covered(decisions, consumed)


def _decision(match: Match, context: _Context) -> Decision:
    try:
        verdict = _verdict(match, context)
    except callbacks.PatternError as error:
        return callbacks.left_for(error, match, context.rules.strict)
    if isinstance(verdict, str):
        return Decision(match, "leave", verdict)
    if verdict is None:
        before = context.insertion_point(match)
        return _with_savings(Decision(match, "replace", before=before), context)
    for why, covers in _why_unmarked(match, context):
        reason = f"{verdict.reason or 'its values are cheap to recompute in backward'}; {why}"
        return Decision(match, "leave", reason, covers=covers)
    annotated = Decision(match, "annotate", verdict.reason, keeps_outputs=verdict.keeps_outputs)
    return _with_savings(annotated, context)


def _with_savings(decision: Decision, context: _Context) -> Decision:
    """Returns the decision with its savings: 0 if nothing would have been kept for backward."""
    match = decision.match
    is_marked = decision.kind == "annotate" or match.pattern.is_cheap
    is_followed = context.rules.recompute and context.rules.takes_marks
    if not context.rules.runs_once or not _needs_gradient(match) or (is_marked and not is_followed):
        return replace(decision, saved_bytes=0)
    try:
        return replace(decision, saved_bytes=callbacks.saves(match))
    except callbacks.PatternError as error:  # only the number is lost
        if context.rules.strict:
            raise
        reason = "; ".join(filter(None, (decision.reason, str(error))))
        return replace(decision, reason=reason, failed=True)


def _verdict(match: Match, context: _Context) -> str | Annotate | None:
    """Returns why the match is left, in a sentence; an Annotate if it is only marked; None if it is replaced."""
    for refuses in LEGALITY:
        if reason := refuses(match, context):
            return reason
    if reason := callbacks.check(match):
        return reason
    if context.rules.policy == "never":
        return "liger.policy is 'never'"
    is_only_marked = match.pattern.replace is None
    verdict = None
    if context.rules.policy == "auto" or is_only_marked:  # profit also returns the reason of a mark
        verdict = callbacks.profit(match)
    if verdict is None and is_only_marked:
        verdict = Annotate("")
    return verdict


def _why_unmarked(match: Match, context: _Context) -> Iterator[tuple[str, bool]]:
    """Yields why a mark would have no effect, and whether the place counts as covered (Inductor compiles it well)."""
    if not context.rules.runs_once:
        yield "the checkpoint already determines what is recomputed", False
    if not context.rules.recompute:
        yield "liger.recompute='off' keeps them", False
    if not _needs_gradient(match):
        yield "no gradient is computed here, so nothing is kept", True
    if not context.rules.takes_marks:
        yield "liger.inner='eager' ignores marks, and keeps them", True


def _needs_gradient(match: Match) -> bool:
    """Returns whether backward passes through the match: not under no_grad, nor where no input requires a gradient."""
    return any(map(_requires_gradient, match.outputs))


def _without_covered(decisions: list[Decision], consumed: set[Node]) -> list[Decision]:
    """Keeps one decision per place, and every failure.

    Drops a refusal if another pattern replaced the place, or if a larger pattern was refused there, or the same pattern
    around it for the same reason: a sum in float32 matches with the cast of its result, and without. Of patterns that
    only mark, an MLP and the product in it are one place: a mark there, or else the larger refusal, is kept alone.
    """
    reported: set[Node] = set()
    marked = {
        node for decision in decisions if decision.kind == "annotate" for node in decision.match.outputs
    }
    unmarked: set[Node] = set()
    around = {
        (decision.match.pattern, decision.reason, node)
        for decision in decisions
        if decision.kind == "leave"
        for node in decision.match.nodes
        if node not in decision.match.outputs
    }
    kept = []
    for decision in decisions:
        match, root = decision.match, decision.match.outputs[0]
        has_place = decision.kind != "leave" or decision.covers
        is_inner = (match.pattern, decision.reason, root) in around
        is_news = has_place or (root not in consumed and root not in reported and not is_inner)
        if not has_place and match.pattern.replace is None:
            is_news = is_news and root not in unmarked and marked.isdisjoint(match.nodes)
            unmarked.update(match.nodes)
        if is_news or decision.failed:
            kept.append(decision)
            if has_place or not decision.failed:
                reported.add(root)
    return kept


@dataclass(frozen=True)
class _Context:
    mutations: Mutations
    regions: Regions
    rules: Rules

    def position(self, node: Node) -> int:
        return self.mutations.position[node]

    def span(self, match: Match) -> tuple[int, int]:
        """Returns the positions of the first replaced node and of the insertion point of the replacement."""
        return self.position(match.nodes[0]), max(
            self.position(match.nodes[0]), self.position(self.insertion_point(match))
        )

    def insertion_point(self, match: Match) -> Node:
        """Returns the node to insert the replacement before.

        Where captures are computed in another grad mode, such as those of a teacher, it is the first node after them in
        the mode of the results, if there is one before the last replaced node.
        """
        first = insertion_point(match, self.position)
        if not match.pattern.detaches:
            return first
        node, own, last = first, self.regions.of[match.outputs[0]].meaning, self.position(match.nodes[-1])
        while self.regions.of[node].meaning != own and self.position(node) < last:
            node = node.next
        return node if self.regions.of[node].meaning == own else first


def captured_nodes(match: Match) -> list[Node]:
    """Returns the nodes that a replacement reads."""
    bound = match.captures.values()
    return [b.node if isinstance(b, Capture) else b for b in bound if isinstance(b, (Capture, Node))]


def insertion_point(match: Match, position: Callable[[Node], int]) -> Node:
    """Returns the node to insert the replacement before: the first output, or the node after the last capture.

    A replacement that computes outputs of several modes comes first of all, before the modes are switched.
    """
    first = _first_in_mode(match) if match.pattern.detaches else min(match.outputs, key=position)
    writes = (b.written_by for b in match.captures.values() if isinstance(b, Capture) and b.written_by)
    last = max((*captured_nodes(match), *writes), key=position, default=first)
    return first if position(last) < position(first) else last.next


def _first_in_mode(match: Match) -> Node:
    """Returns the first node of a match, or the first with gradients if the match has gradients."""
    with_gradients = (node for node in match.nodes if _requires_gradient(node))
    return next(with_gradients, match.nodes[0])


def _requires_gradient(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


# Legality in any graph: each function returns the reason of a refusal in a sentence, or None.


def _refuse_wrapped_tensors(match: Match, context: _Context) -> str | None:
    """Refuses DTensor, Float8 and other wrappers, whose operators have other semantics."""
    for node in (*match.operands, *match.nodes):
        value = node.meta.get("example_value")
        if match.pattern.takes_dtensors and is_dtensor(value):
            continue
        if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
            return f"{node.name} is a {type(value).__name__}, and only plain tensors are replaced"
    return None


def _refuse_several_devices(match: Match, context: _Context) -> str | None:
    tensors = [match[name] for name in match.captures if isinstance(match[name], torch.Tensor)]
    devices = sorted({str(tensor.device) for tensor in [*tensors, match.result] if tensor.dim()})
    return f"its tensors are on several devices: {', '.join(devices)}" if len(devices) > 1 else None


def _refuse_several_regions(match: Match, context: _Context) -> str | None:
    regions, position = context.regions, context.position
    if regions.why_uncertain:
        return regions.why_uncertain
    # Integers and booleans, for example the positions that a mask is computed from, are equal in every region.
    floating = [node for node in match.nodes if not _is_of_integers(node)] or match.nodes
    there, own = context.insertion_point(match), regions.of[match.outputs[0]]
    if own.stream is not None:
        return "it runs on a stream that the function selects, and a replacement runs on the current stream"
    is_in_mode = regions.of[there].kernels == own.kernels and regions.of[there].meaning == own.meaning
    if is_in_mode and all(_runs_in(own, regions.of[node], match.pattern.detaches) for node in floating):
        return None
    first, last = position(floating[0]), max(position(match.nodes[-1]), context.span(match)[1])
    change = regions.change_between(first, last)
    if change is None:
        return "it runs in several modes, and a replacement runs in one mode"
    at, switch = change
    before = max((node for node in floating if position(node) < at), key=position)
    after = next((node for node in match.nodes if position(node) > at), there)
    return (
        f"{in_words(switch)} between {before.name} and {after.name}, and a replacement runs in one mode; "
        "compute the whole pattern on one side of the change"
    )


def _runs_in(own: Region, region: Region, detaches: bool) -> bool:
    """Returns whether a replacement in the region `own` may compute a value of `region`."""
    if detaches and own.grad_mode:
        region = replace(region, grad_mode=True)
    return region.meaning == own.meaning


def _is_of_integers(node: Node) -> bool:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return isinstance(value, (int, torch.SymInt))
    return not (value.is_floating_point() or value.is_complex())


def _refuse_transforms(match: Match, context: _Context) -> str | None:
    if any(context.regions.of[node].transforms for node in match.nodes):
        return "it runs under a torch.func transform (vmap, grad), for which the ops have no rule"
    return None


def _refuse_mutation(match: Match, context: _Context) -> str | None:
    first, last = context.span(match)
    last = max(last, context.position(match.nodes[-1]))
    inner = set(match.nodes) - set(match.outputs)
    made = _made_at(match, context)
    for node in dict.fromkeys((*match.operands, *made, *inner)):
        # The replacement reads captures where it is inserted: they must still have the values that were captured.
        at = context.mutations.write_between(node, made.get(node, first - 1), last + 1)
        if at is not None and not (node in inner and _is_private(node, match, context.mutations)):
            return (
                f"{node.name} is written in place while it is in use, by {context.mutations.nodes[at].name}"
            )
    escaping = match.escaping()
    for output in match.outputs:
        memory = context.mutations.memory(output)
        alias = next((node for node in escaping if memory & context.mutations.memory(node)), None)
        if alias is not None and not context.mutations.is_clean(output):
            # The result of the replacement does not share memory with the alias that stays.
            return f"{output.name} and {alias.name}, which is used elsewhere too, share memory that is written in place"
    return None


def _made_at(match: Match, context: _Context) -> dict[Node, int]:
    """Returns since when each captured node has its captured value: since its creation, or since the last write."""
    made: dict[Node, int] = {}
    for bound in match.captures.values():
        if isinstance(bound, Capture):
            at = context.position(bound.written_by or bound.node)
            made[bound.node] = min(at, made.get(bound.node, at))
        elif isinstance(bound, Node):
            made[bound] = context.position(bound)
    return made


def _is_private(node: Node, match: Match, mutations: Mutations) -> bool:
    """Returns whether the memory of a value inside a match is made and read by the match alone.

    Then an in-place write into it, which the term includes, is a step of the computation: `F.silu(gate).mul_(up)`.
    """
    memory, inside = mutations.memory(node), set(match.nodes)
    is_lent = any(memory & mutations.memory(other) for other in (*match.operands, *captured_nodes(match)))
    if is_lent or not mutations.is_known(node):
        return False
    sharing = (n for n in match.nodes if n not in match.outputs and memory & mutations.memory(n))
    return all(user in inside for node in sharing for user in node.users)


def _refuse_late_captures(match: Match, context: _Context) -> str | None:
    """Refuses outputs that are read before the insertion point, since the replacement follows all its captures.

    A reader that stays and is movable follows the replacement, unless it is read too early itself.
    """
    there = context.insertion_point(match)
    at, region = context.position(there), context.regions.of[there].meaning
    alive = set(match.escaping())
    for node in reversed(match.nodes):
        if node in alive:  # and the nodes that compute it
            alive.update(node.all_input_nodes)
    dead = set(match.nodes) - alive
    for value in (*match.outputs, *moved_nodes(match, context.position, at)):
        for user in value.users:
            may_move = user in match.movable and context.regions.of[user].meaning == region
            if user not in dead and not may_move and context.position(user) < at:
                return f"{user.name} reads {value.name} before all inputs of the replacement are computed"
    return None


def _refuse_aliases(match: Match, context: _Context) -> str | None:
    """Refuses outputs that share memory with an input: they must continue to share it."""
    memory = context.mutations.memory
    inputs: set[Any] = set().union(*(memory(node) for node in captured_nodes(match)))
    for output in match.outputs:
        if memory(output) & inputs:
            return f"{output.name} is a view of an input, and must stay a view"
    return None


def _refuse_inner_loss(match: Match, context: _Context) -> str | None:
    if match.pattern.is_loss and not context.rules.runs_once:
        return "a loss inside a checkpoint runs twice, and its replacement computes gradients in forward"
    return None


LEGALITY: tuple[Callable[[Match, _Context], str | None], ...] = (
    _refuse_wrapped_tensors,
    _refuse_inner_loss,
    _refuse_several_devices,
    _refuse_several_regions,
    _refuse_transforms,
    _refuse_aliases,
    _refuse_late_captures,
    _refuse_mutation,
)
