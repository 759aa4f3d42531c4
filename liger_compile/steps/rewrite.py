"""rewrite(): carries out decisions: splices each replacement into the graph and erases the replaced nodes.

The replacement function runs once on the graph's own fake tensors; every torch function that it calls becomes a node
(steps/recording.py). A replacement is not spliced in if its result differs in form from the original's or if it has
other effects; the decision then becomes a refusal. Nothing is connected before all replacements are accepted: if one is
refused, the other matches are decided again, so that a smaller pattern may be replaced there.

Dead-code elimination over the whole graph would delete in-place writes (x.add_(1) has no users), so only matched
nodes that lost their last user are erased.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from liger_compile.graphs.aliasing import Mutations, storages_of
from liger_compile.graphs.guards import GuardError, no_guards
from liger_compile.graphs.regions import Region, Regions
from liger_compile.pattern import Capture, Decision, Match
from liger_compile.steps import callbacks
from liger_compile.steps.moving import moved_nodes
from liger_compile.steps.recording import Recorder, faults_of
from liger_compile.steps.saved import saved_by, saved_tensors_into
from liger_compile.terms.term import size_of, sizes_of
from liger_compile.torch_internals.dtensor import is_dtensor
from liger_compile.torch_internals.fake_tensors import mode_of
from liger_compile.torch_internals.fx import is_erased


@dataclass(frozen=True)
class _Copies:
    """What a replacement gets and gives as copies: flags for its results, and the names of captures."""

    results: Sequence[bool]
    operands: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Draft:
    """A replacement that is inserted into the graph and has no users yet.

    Args:
        outputs: the node that replaces each output of the match.
        copied: the number of outputs that are copies.
        copied_operands: the number of operands of which the replacement reads copies.
    """

    recorder: Recorder
    outputs: tuple[Node, ...]
    copied: int
    copied_operands: int


def rewrite(
    graph: Graph,
    decisions: Sequence[Decision],
    settings: Mapping[str, Any] | None = None,
    regions: Regions | None = None,
    *,
    decide_again: Callable[[Mapping[Match, Decision]], Sequence[Decision]] | None = None,
    strict: bool = False,
) -> list[Decision]:
    """Edits `graph` as decided. Returns the decisions; those that could not be spliced in became refusals.

    Args:
        settings: the user's settings for replacements: each replacement gets those that it has a parameter for.
        regions: the modes of the nodes, in which the replacements run.
        decide_again: decides again, given the refusals so far, which the new decisions must keep.
        strict: reraise the exception of a replacement, except ValueError and TypeError, by which an op refuses.

    Raises:
        PatternError: under `strict`.
    """
    regions = regions or Regions(graph)
    refused: dict[Match, Decision] = {}
    mutations = Mutations(graph)
    while True:
        drafts: dict[Match, _Draft] = {}
        known = len(refused)
        for decision in decisions:
            if decision.kind == "replace" and decision.match not in refused:
                drafted = _draft(graph, decision, regions, mutations, settings or {}, strict)
                if isinstance(drafted, Decision):
                    refused[decision.match] = drafted
                else:
                    drafts[decision.match] = drafted
        if len(refused) == known or decide_again is None:
            break
        for draft in reversed(drafts.values()):
            draft.recorder.undo()
        decisions = decide_again(refused)
    result = [_carried_out(decision, drafts, refused) for decision in decisions]
    for decision in result:
        if decision.kind == "replace":
            _erase_unused(graph, decision.match)
    graph.lint()
    return result


def _carried_out(
    decision: Decision, drafts: Mapping[Match, _Draft], refused: Mapping[Match, Decision]
) -> Decision:
    """Connects the draft of a decision to the graph."""
    draft = drafts.get(decision.match)
    if draft is None:
        return refused.get(decision.match, decision)
    _move(decision)
    for output, node in zip(decision.match.outputs, draft.outputs, strict=True):
        node.meta["example_value"] = output.meta["example_value"]
        output.replace_all_uses_with(node)
    return replace(
        decision,
        inserted=tuple(draft.recorder.inserted),
        copied=draft.copied,
        copied_operands=draft.copied_operands,
    )


def _move(decision: Decision) -> None:
    """Moves the movable nodes that depend on outputs behind the replacement."""
    match, before = decision.match, decision.before
    if not match.movable or before is None:
        return
    position = {node: at for at, node in enumerate(before.graph.nodes)}
    for node in moved_nodes(match, position.__getitem__, position[before]):
        before.prepend(node)


def _draft(
    graph: Graph,
    decision: Decision,
    regions: Regions,
    mutations: Mutations,
    settings: Mapping[str, Any],
    strict: bool,
) -> _Draft | Decision:
    """Inserts the replacement of one match; returns a refusal if its result differs from the original's."""
    match, region = decision.match, regions.of[decision.match.outputs[0]]
    assert decision.before is not None, "decide() sets the position of every replacement"
    recorder = Recorder(graph, decision.before, match.outputs[0])
    originals = [output.meta["example_value"] for output in match.outputs]
    copied = [match.pattern.saves_result and _may_be_written(output, mutations) for output in match.outputs]
    copies = _Copies(copied)
    results: tuple[Any, ...] = ()
    try:
        results = _results(match, recorder, region, settings, copies)
        if lent := _lent(decision, recorder, region, mutations):
            recorder.undo()
            recorder = Recorder(graph, decision.before, match.outputs[0])
            copies = _Copies(copied, lent)
            results = _results(match, recorder, region, settings, copies)
        reason = _why_not(originals, results, recorder)
    except (ValueError, TypeError, GuardError) as error:  # an op raises these for arguments that it rejects
        reason = f"the replacement refuses: {error}"
    except Exception as error:
        if _WRITES_INTO_A_LEAF not in str(error):
            recorder.undo()
            return callbacks.left_for(callbacks.raised(match.pattern, "replace", error), match, strict)
        reason = _REFUSAL.format("writes into one of its arguments")
    if reason:
        recorder.undo()
        return replace(decision, kind="leave", reason=reason, saved_bytes=None)
    outputs = tuple(recorder.node_of[id(value)] for value in results)
    return _Draft(recorder, outputs, sum(copies.results), len(copies.operands))


# Autograd's message for x.mul_(2) where x is an input that requires a gradient.
_WRITES_INTO_A_LEAF = "is being used in an in-place operation"
_REFUSAL = "the replacement {}; it has to compute new tensors from its arguments and nothing else"


def _results(
    match: Match,
    recorder: Recorder,
    region: Region,
    settings: Mapping[str, Any],
    copies: _Copies,
) -> tuple[Any, ...]:
    """Runs the replacement on the captures of a match, records it, and returns its results."""
    arguments: dict[str, Any] = {}
    fake_mode = mode_of(match.result)
    with fake_mode:
        for name, bound in match.captures.items():
            if isinstance(bound, (Capture, Node)):
                node = bound.node if isinstance(bound, Capture) else bound
                arguments[name] = recorder.knows(name, node.meta["example_value"], node)
    originals = [output.meta["example_value"] for output in match.outputs]
    hooks, guards = saved_tensors_into(recorder.saved), no_guards(fake_mode)
    with fake_mode, guards, hooks, region.entered(), recorder.watching(), recorder:
        for name, bound in match.captures.items():
            if name in copies.operands:
                arguments[name] = _copied(arguments[name])
            if isinstance(bound, Capture):
                arguments[name] = bound.derive(arguments[name])
            elif not isinstance(bound, Node):
                arguments[name] = bound
        assert match.pattern.replace is not None, "steps/decide.py annotates a match without a replacement"
        results = match.pattern.replace(**arguments, **_wanted(settings, match))
        results = results if isinstance(results, tuple) else (results,)
        if len(results) != len(originals):
            return results
        results = tuple(map(_laid_out_like, results, originals))
        return tuple(
            _copied(result) if is_copied else result
            for result, is_copied in zip(results, copies.results, strict=True)
        )


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy by an opaque op: Inductor removes clones, of saved values and of inputs written later too."""
    return torch.ops.liger_compile.rounded.default(tensor)


def _may_be_written(node: Node, mutations: Mutations) -> bool:
    """Returns whether the graph, or the caller to whom it returns the memory of a node, may write into its value."""
    returned = node.graph.output_node().all_input_nodes
    is_returned = any(storages_of(node) & storages_of(output) for output in returned)
    return is_returned or not mutations.is_as_made(node)


def _lent(decision: Decision, recorder: Recorder, region: Region, mutations: Mutations) -> tuple[str, ...]:
    """Returns the captures that the graph writes later and that the replacement saves, but not the replaced code."""
    assert decision.before is not None
    end, since = len(mutations.nodes), mutations.position[decision.before] - 1
    bound = decision.match.captures.items()
    captured = {name: at.node if isinstance(at, Capture) else at for name, at in bound}
    written = {
        name: storages_of(node)
        for name, node in captured.items()
        if isinstance(node, Node) and mutations.write_between(node, since, end) is not None
    }
    if not any(storages & recorder.saved for storages in written.values()):
        return ()
    known = saved_by(decision.match.nodes, region)
    return tuple(name for name, storages in written.items() if storages & recorder.saved - known)


def _wanted(settings: Mapping[str, Any], match: Match) -> dict[str, Any]:
    """Returns the settings that a replacement has a parameter for. Captures take precedence over settings."""
    try:
        known = inspect.signature(match.pattern.replace).parameters  # pyright: ignore[reportArgumentType]
    except ValueError:  # a function in C, which has none of our parameters
        return {}
    given = {**settings, "returns_dtensor": is_dtensor(match.result)}
    return {name: value for name, value in given.items() if name in known and name not in match.captures}


def _why_not(originals: Sequence[torch.Tensor], results: Sequence[Any], recorder: Recorder) -> str | None:
    """Returns why the results cannot replace the originals, in a sentence."""
    if len(results) != len(originals):
        return f"the replacement returns {len(results)} results, and {len(originals)} are expected"
    for original, value in zip(originals, results, strict=True):
        if not isinstance(value, torch.Tensor):
            return f"the replacement returns {callbacks.described(value)}; expected a tensor"
        if difference := _difference(original, value):
            return difference
    for fault in faults_of(results, recorder, originals):
        return _REFUSAL.format(fault)
    if any(id(value) not in recorder.node_of for value in results):
        return "the replacement returns a tensor that no torch function computed"
    return None


def _laid_out_like(result: Any, original: torch.Tensor) -> Any:
    """Returns the result with the original's order of dimensions in memory: a later view() may rely on it."""
    is_comparable = isinstance(result, torch.Tensor) and sizes_of(result.shape) == sizes_of(original.shape)
    if not is_comparable or _strides(result) == _strides(original):
        return result
    order = sorted(range(original.dim()), key=lambda dim: -_hint(original.stride(dim)))
    inverse = [order.index(dim) for dim in range(original.dim())]
    return result.permute(order).contiguous().permute(inverse)


def _hint(size: Any) -> int:
    """Returns the current value of a size; it is good enough to sort by, and adds no guard."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _difference(original: torch.Tensor, new: Any) -> str | None:
    """Returns the difference between the replacement's result and the original's, in a sentence."""
    for name, describe in _PROPERTIES.items():
        expected, got = describe(original), describe(new)
        if expected != got:
            return f"the replacement's result has {name} {got}, the original's {expected}"
    return None


_PROPERTIES: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda tensor: sizes_of(tensor.shape),
    "dtype": lambda tensor: tensor.dtype,
    "device": lambda tensor: tensor.device,
    "strides": lambda tensor: _strides(tensor),
    "requires_grad": lambda tensor: tensor.requires_grad,
}


def _strides(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns the strides that have an effect: those of dimensions with more than one element."""
    return tuple(
        size_of(stride)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size_of(size) != 1
    )


def _erase_unused(graph: Graph, match: Match) -> None:
    for node in reversed(match.nodes):
        if not node.users and not is_erased(node):
            graph.erase_node(node)
