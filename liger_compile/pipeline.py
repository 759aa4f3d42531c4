"""Runs the steps in order, on a Dynamo graph and its subgraphs.

    terms -> match -> decide -> rewrite -> outputs -> recompute

In: a Dynamo GraphModule. Out: the same module, rewritten, with a report and the facts that the steps inferred about its
inputs. A step returns values and imports no other step; only this file defines the order of the steps.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from liger_compile.backward_passes import CHOICES, DEFAULT_PASSES, Applied, Pass
from liger_compile.compile import BackwardPlan, uses_cudagraphs, uses_freezing
from liger_compile.forward_passes import live_rows, pack_live_rows, specialize
from liger_compile.forward_passes.documents import hand_in_documents, inputs_of
from liger_compile.forward_passes.inline_subgraphs import describe_operands
from liger_compile.forward_passes.keep_copies import keep_copies
from liger_compile.forward_passes.keep_rounding import keep_rounding
from liger_compile.forward_passes.late_rows import LateRows, Returned
from liger_compile.forward_passes.logits import Deferred, LateOutput, Logits, logits_in, restore, take_out
from liger_compile.forward_passes.outline import drop_unread, num_nodes_inlined, outlined, outlined_of
from liger_compile.forward_passes.round_numbers import round_numbers
from liger_compile.graphs.aliasing import SUBGRAPH_OPS, Mutations
from liger_compile.graphs.regions import Region, Regions
from liger_compile.options import Options
from liger_compile.pattern import Capture, Decision, NearMiss, Pattern
from liger_compile.report import HERE, GraphReport, Paths, site_of_pass
from liger_compile.report.kept import kept_by_module
from liger_compile.steps.adapters import join_adapters
from liger_compile.steps.callbacks import warn_of_failures
from liger_compile.steps.decide import Rules, decide
from liger_compile.steps.match import find_matches
from liger_compile.steps.questions import notes_on_answers
from liger_compile.steps.recompute import keep_what_written_inputs_give, mark_for_recompute, mark_upcasts
from liger_compile.steps.rewrite import rewrite
from liger_compile.terms.attention import Note, notes_in, sentences
from liger_compile.terms.build import Terms
from liger_compile.terms.heads import notes_on_layer, notes_on_logits
from liger_compile.terms.term import Term
from liger_compile.torch_internals.fake_tensors import FakeTensor
from liger_compile.torch_internals.shapes import unify_sizes

Assumptions = Mapping[str, specialize.Assumption]


@dataclass(frozen=True)
class Rewritten:
    """A graph that is ready to be compiled, with the facts that the steps inferred about it.

    Args:
        late_outputs: outputs that are not computed in the graph.
        padding: names of inputs that are padding masks; more of attention would be known if they were all ones.
        masks: names of inputs that are attention masks and were built outside the graph.
        scores: the scores of the attention that was replaced, over batch, heads, queries and keys; None if a size is
            symbolic.
        backward: the changes to the graph of backward; None means no changes.
        backward_of: the same for each outlined body.
    """

    gm: GraphModule
    report: GraphReport
    late_outputs: Sequence[LateOutput | LateRows] = ()
    padding: frozenset[str] = frozenset()
    masks: frozenset[str] = frozenset()
    scores: int | None = 0
    backward: BackwardPlan | None = None
    backward_of: Mapping[GraphModule, BackwardPlan | None] = field(default_factory=dict)


@dataclass
class _Found:
    """The findings of the steps so far, over all graphs."""

    decisions: list[Decision] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    attention: list[Note] = field(default_factory=list)
    replaced: set[Term] = field(default_factory=set)  # the terms that replaced matches have computed
    late_outputs: list[LateOutput] = field(default_factory=list)
    late_notes: list[str] = field(default_factory=list)  # added in later calls
    # By subgraph: the operands of each call, and the modes of each call.
    arguments: dict[GraphModule, list[tuple[Any, ...]]] = field(default_factory=dict)
    called_in: dict[GraphModule, list[Region]] = field(default_factory=dict)
    computed: frozenset[str] = frozenset()  # the inputs that other differentiable code has computed
    # By graph: the module paths of each of its calls, where it was outlined, or of the graph that calls it.
    places: dict[GraphModule, Sequence[Paths]] = field(default_factory=dict)
    placed: dict[int, Sequence[Paths]] = field(default_factory=dict)  # by id of decision or near miss
    padding_unread: bool = False  # nothing reads the rows of attention that are padding


def with_bodies(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, inductor_options: Mapping[str, Any]
) -> tuple[GraphModule, tuple[str, ...]]:
    """Returns a copy of `gm` in which equal layers are calls of one body, or `gm`; and the notes for the report."""
    if options.outline == "off" or options.policy == "never":
        return gm, ()
    module, notes = outlined(gm)
    why = why_not_outlined(example_inputs, options, inductor_options) if notes else None
    return (gm, (f"equal layers are compiled one by one: {why}",)) if why else (module, notes)


def why_not_outlined(
    example_inputs: Sequence[Any], options: Options, inductor_options: Mapping[str, Any]
) -> str | None:
    """Returns why these settings need a compiled graph for the whole captured graph, in a sentence."""
    if options.fuel is not None:
        return "liger.fuel counts the rewrites of each layer"
    if any(isinstance(value, FakeTensor) for value in example_inputs):
        return "the inputs have no values yet, as in a part of a graph that DDP cuts"
    if uses_cudagraphs(options.mode, inductor_options):
        return "a CUDA graph is recorded for the parameters of one layer"
    if uses_freezing(options.mode, inductor_options):
        return "Inductor's freezing makes constants of the parameters"
    return None


def rewritten(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    patterns: Sequence[Pattern],
    options: Options,
) -> tuple[Rewritten, tuple[Assumptions, Rewritten] | None]:
    """Rewrites a copy of `gm` for all calls, and a second copy for typical calls if more is replaced in that copy.

    Args:
        example_inputs: the inputs of the first call.
        patterns: larger patterns first.

    Returns:
        The generic graph; and the assumptions of the specialized graph with that graph, or None.
    """
    describe_operands(gm)
    computed = _computed_inputs(gm, example_inputs)
    generic = run_steps(specialize.copied(gm), patterns, options, computed)
    is_readable = not any(isinstance(value, FakeTensor) for value in example_inputs)
    if options.padding != "auto" or not is_readable or specialize.of_part(gm):
        return generic, None
    assumptions = specialize.find_assumptions(gm, generic.padding, generic.masks, example_inputs)
    if not assumptions:
        return generic, None
    assumed = specialize.with_assumptions(gm, assumptions)
    special = run_steps(assumed, patterns, options, computed)
    if special.report.count("replace") <= generic.report.count("replace") - _num_padded(generic.report):
        return generic, None
    if options.policy == "auto" and (why := _why_not_checked(gm, assumptions, generic, special)):
        return replace(generic, report=generic.report.with_notes((why,))), None
    return generic, (assumptions, special)


def _why_not_checked(
    gm: GraphModule, assumptions: Assumptions, generic: Rewritten, special: Rewritten
) -> str | None:
    if generic.scores is None or special.scores is None:
        return None
    assumed = (node for node in gm.graph.find_nodes(op="placeholder") if node.name in assumptions)
    devices = {node.meta["example_value"].device.type for node in assumed}
    return specialize.why_not_checked(assumptions, special.scores - generic.scores, devices)


def _num_padded(report: GraphReport) -> int:
    """Returns how many sites are replaced by attention that reads padding, which is slower than without padding."""
    return sum(site.kind == "replace" and ".padded" in site.pattern for site in report.sites)


def live_rows_of(
    gm: GraphModule,
    generic: Rewritten,
    example_inputs: Sequence[Any],
    options: Options,
    inductor_options: Mapping[str, Any],
) -> tuple[live_rows.Plan | None, tuple[str, ...]]:
    """Returns how to compute the live rows of padded batches only, or None; and the notes for the report.

    Args:
        gm: the captured graph.
        generic: the graph of all rows.
        example_inputs: the inputs of the first call.
    """
    is_readable = not any(isinstance(value, FakeTensor) for value in example_inputs)
    wanted = options.rows == "auto" and options.policy != "never" and options.padding == "auto"
    if not (wanted and is_readable) or specialize.of_part(gm):
        return None, ()
    has_graphs = uses_cudagraphs(options.mode, inductor_options)
    returned = Returned(
        reason_to_keep_logits(options) or ("CUDA graphs are used" if has_graphs else None),
        is_dropped=options.logits == "none",
        is_read=options.logits != "lazy",
        memory=options.loss_memory,
    )
    if generic.padding:
        unify_sizes(node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder"))
    logits_of = partial(logits_in, needs_loss=options.logits != "lazy")
    found = live_rows.plan(
        gm, example_inputs, logits_of, returned, has_cudagraphs=has_graphs, strict=options.strict
    )
    if isinstance(found, str):
        return None, (f"padded rows are computed like others: {found}",) if generic.padding else ()
    return found, ()


def rewritten_rows(
    plan: live_rows.Plan,
    live: live_rows.Live,
    patterns: Sequence[Pattern],
    options: Options,
) -> Rewritten:
    """Returns the graph that computes live rows, which are given as values in the trace of the graph."""
    packed, late = pack_live_rows.packed(plan, live), plan.returned.late
    done = run_steps(packed, patterns, options, padding_unread=True)
    said = (pack_live_rows.compute_labeled_rows(done.gm.graph), *plan.returned.notes())
    done.gm.recompile()
    report = done.report.with_notes(filter(None, said)).with_late_notes(plan.returned.budget.said)
    return replace(done, report=report, late_outputs=[*done.late_outputs, *([late] if late else [])])


def _computed_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> frozenset[str]:
    """Returns the names of the inputs that other differentiable code has computed; none in a part of a DDP graph."""
    if any(isinstance(value, FakeTensor) for value in example_inputs):
        return frozenset()
    pairs = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
    return frozenset(
        node.name for node, value in pairs if isinstance(value, torch.Tensor) and value.grad_fn is not None
    )


def run_steps(
    gm: GraphModule,
    patterns: Sequence[Pattern],
    options: Options,
    computed: frozenset[str] = frozenset(),
    *,
    padding_unread: bool = False,
) -> Rewritten:
    """Rewrites `gm` and its subgraphs, in place.

    Args:
        computed: the names of the inputs that other differentiable code has computed.
        padding_unread: nothing reads the rows of attention that are padding, nor those that see no key.
    """
    kept = kept_by_module(gm) if options.inner == "report" else None
    start, why_logits_stay = time.perf_counter(), reason_to_keep_logits(options)
    modules, once = _graphs(gm), _running_once(gm)
    found = _Found(places={gm: HERE}, computed=computed, padding_unread=padding_unread)
    for module in modules:
        _rewrite_one(
            module, patterns, options, why_logits_stay, found, is_top=module is gm, runs_once=module in once
        )
    warn_of_failures(found.decisions, found.failures)
    notes = _notes_on(found, options)
    seconds = time.perf_counter() - start
    report = GraphReport.of(
        gm,
        found.decisions,
        found.near_misses,
        notes=notes,
        num_nodes=num_nodes_inlined(gm),
        places=lambda one: found.placed[id(one)],
        seconds=seconds,
        kept_by_module=kept,
    ).with_late_notes(found.late_notes)
    drop_unread(gm)
    for module in modules:
        module.recompile()
    fuel, meanings = (
        _left(options.fuel, found.decisions),
        [note.meaning for note in found.attention if note.meaning],
    )
    return Rewritten(
        gm,
        report,
        found.late_outputs,
        padding=frozenset(name for meaning in meanings for name in meaning.padding),
        masks=frozenset(name for meaning in meanings for name in meaning.masks),
        scores=_scores(found.decisions),
        backward=_backward_plan(options, fuel, report),
        backward_of={
            body: _backward_plan(options, fuel, report, found.places[body])
            for body in modules
            if outlined_of(body)
        },
    )


def _scores(decisions: Iterable[Decision]) -> int | None:
    total = 0
    for decision in decisions:
        captures, is_attention = decision.match.captures, decision.match.pattern.name.startswith("attention.")
        if decision.kind == "replace" and is_attention and {"q", "k"} <= captures.keys():
            q, k = decision.match["q"], decision.match["k"]
            total += q.numel() // q.shape[-1] * k.shape[-2]
    return total if isinstance(total, int) else None


def _notes_on(found: _Found, options: Options) -> tuple[str, ...]:
    return (
        *found.notes,
        *_notes_on_copies(found.decisions),
        *_notes_on_documents(found.decisions),
        *dict.fromkeys(notes_on_answers(found.decisions, options.loss_memory)),
        *found.failures,
        *sentences(note for note in found.attention if note.term not in found.replaced),
        *map(str, found.late_outputs),
    )


def _notes_on_copies(decisions: Iterable[Decision]) -> Iterator[str]:
    decisions = list(decisions)
    results = _counted(sum(decision.copied for decision in decisions), "result")
    operands = _counted(sum(decision.copied_operands for decision in decisions), "operand")
    if results:
        yield f"{results}: the op saves it for backward, and the graph or its caller may write into it"
    if operands:
        yield f"{operands}: the op saves it for backward, and the graph writes into it later"


def _note_on_upcasts(count: int) -> str:
    what = (
        "1 upcast of an operand of a matmul is"
        if count == 1
        else f"{count} upcasts of operands of matmuls are"
    )
    return f"{what} computed again in backward instead of kept"


def _counted(count: int, what: str) -> str | None:
    if count == 1:
        return f"1 {what} of a fused op is copied"
    return f"{count} {what}s of fused ops are copied" if count else None


def _notes_on_documents(decisions: Iterable[Decision]) -> Iterator[str]:
    """Yields what documents and padding of rows are computed from, and which op computes attention within them."""
    found: Counter[str] = Counter()
    for decision in decisions:
        captures, is_causal = (
            decision.match.captures,
            not decision.match.pattern.name.endswith("bidirectional"),
        )
        ids, keys = captures.get("documents"), captures.get("keys")
        if decision.kind != "replace":
            continue
        if isinstance(ids, Capture):
            mask = "causal within" if is_causal else "within"
            targets = (getattr(node.target, "__name__", "") for node in decision.inserted)
            is_flex = any(target == "flex_attention" for target in targets)
            kernel = "flex_attention" if is_flex else "variable-length attention"
            found[f"{mask} documents of {inputs_of(ids.node)}: {kernel}"] += 1
        elif isinstance(keys, Capture):
            mask = "causal" if is_causal else "to all keys"
            found[f"{mask} without the padding in {inputs_of(keys.node)}: flex_attention"] += 1
    for text, times in found.items():
        yield f"attention {times}x {text}"


def _rewrite_one(
    module: GraphModule,
    patterns: Sequence[Pattern],
    options: Options,
    why_logits_stay: str | None,
    found: _Found,
    *,
    is_top: bool,
    runs_once: bool,
) -> None:
    """Runs the steps on one graph."""
    graph = module.graph
    mutations = Mutations(graph)
    regions = Regions(graph, found.called_in.get(module, ()))
    arguments, unread = found.arguments.get(module, ()), found.padding_unread
    terms = Terms(graph, mutations, arguments, regions, strict=options.strict, empty_rows_unread=unread)
    found.failures.extend(terms.failures())
    if options.policy != "never":
        hand_in_documents(_calls(module), terms)
    for call, body in _calls(module):
        found.arguments.setdefault(body, []).append(terms.arguments(call, body.graph))
        found.called_in.setdefault(body, []).append(regions.of[call])
        outlined = outlined_of(body)
        found.places.setdefault(body, outlined.paths if outlined else found.places[module])
    places, notes = found.places[module], notes_in(terms.space, terms.of.values(), terms.derive)
    found.attention.extend(note for note in notes for _ in places)
    if is_top:
        found.notes.extend(notes_on_layer(graph, terms, found.computed))
    deferred = _without_logits(graph, terms, options, why_logits_stay, found) if is_top else []
    matches, missed = find_matches(graph, patterns, terms, strict=options.strict)
    rules = Rules(
        policy=options.policy,
        fuel=_left(options.fuel, found.decisions),
        recompute=options.recompute == "auto",
        takes_marks=options.reported_inner != "eager",
        runs_once=runs_once,
        strict=options.strict,
    )
    decided = partial(decide, graph, matches, mutations, regions=regions, rules=rules)
    decisions = rewrite(
        graph,
        decided(),
        settings=_settings(options, found),
        regions=regions,
        decide_again=lambda refused: decided(refused=refused),
        strict=options.strict,
    )
    if note := join_adapters(graph, found.called_in.get(module, ())):
        found.notes.append(note)
    late = restore(graph, deferred, options.logits == "none", options.loss_memory, found.late_notes)
    found.late_outputs.extend(late)
    found.notes.extend(_marked(graph, decisions, mutations, options, is_top=is_top, runs_once=runs_once))
    if options.reported_inner == "inductor":
        found.notes.extend(_keep_for_inductor(graph, terms, is_top))
    found.replaced.update(_replaced(decisions, terms))
    found.decisions.extend(decisions)
    found.near_misses.extend(missed)
    found.placed.update({id(one): places for one in (*decisions, *missed)})


def _keep_for_inductor(graph: Graph, terms: Terms, is_top: bool) -> tuple[str, ...]:
    """Keeps roundings and copies that Inductor would remove; returns notes for the report."""
    rounded = (*round_numbers(graph), *keep_rounding(graph, terms))
    return (*rounded, *(keep_copies(graph, terms) if is_top else ()))


def _marked(
    graph: Graph,
    decisions: Sequence[Decision],
    mutations: Mutations,
    options: Options,
    *,
    is_top: bool,
    runs_once: bool,
) -> Iterator[str]:
    """Marks the values to recompute and the values to save. Yields notes for the report."""
    if runs_once and options.recompute == "auto":  # a checkpoint already fixes what is recomputed
        mark_for_recompute(decisions)
        # Measured beside adapters. Elsewhere the trade is not known.
        if (options.policy == "always" or _replaces_adapters(decisions)) and (count := mark_upcasts(graph)):
            yield _note_on_upcasts(count)
    if is_top and options.policy != "never" and (marked := keep_what_written_inputs_give(graph, mutations)):
        values = "1 value is" if marked == 1 else f"{marked} values are"
        yield f"{values} saved for backward, because the graph writes into their inputs later"


def _replaces_adapters(decisions: Sequence[Decision]) -> bool:
    return any(one.kind == "replace" and one.match.pattern.name.startswith("lora.") for one in decisions)


def _settings(options: Options, found: _Found) -> dict[str, Any]:
    """Returns the settings that replacements may read."""
    return {
        "loss_memory": options.loss_memory,
        "inner": options.reported_inner,
        "padding_unread": found.padding_unread,
    }


def _replaced(decisions: Iterable[Decision], terms: Terms) -> Iterator[Any]:
    """Yields the terms that replaced matches computed."""
    for decision in decisions:
        if decision.kind == "replace":
            yield from (
                terms.of[node] for node in decision.match.nodes if isinstance(terms.of.get(node), Term)
            )


def _without_logits(
    graph: Graph, terms: Terms, options: Options, why_logits_stay: str | None, found: _Found
) -> list[Deferred]:
    """Takes the logits out of the outputs of a graph, except those that stay, and adds notes with the reasons."""
    if options.logits != "lazy":
        found.notes.extend(notes_on_logits(graph, terms))
    staying = {
        output: why_logits_stay or _why_stays(output, terms.regions.of[output.head], options)
        for output in logits_in(
            graph, terms, needs_loss=options.logits != "lazy" or options.policy == "never"
        )
    }
    reasons = dict.fromkeys(filter(None, staying.values()))
    found.notes.extend(f"the logits are computed in the graph: {why}" for why in reasons)
    return take_out([output for output, why in staying.items() if not why], terms)


def _why_stays(output: Logits, region: Region, options: Options) -> str | None:
    """Returns why logits are computed in the graph, in a sentence; `region`: the modes of their head."""
    if options.logits != "none" and output.is_divided:
        return (
            "the ranks divide them, and a rank that read them later, alone, would wait for the others; the option "
            "liger.logits='none' leaves them out, and head and loss are fused"
        )
    if options.logits == "auto" and not region.has_gradients:
        return "gradients are off, as in an evaluation, which is likely to read them"
    return None


def _left(fuel: int | None, decisions: Sequence[Decision]) -> int | None:
    return None if fuel is None else max(0, fuel - sum(decision.kind != "leave" for decision in decisions))


def _graphs(gm: GraphModule) -> list[GraphModule]:
    """Returns `gm` and the subgraphs that are rewritten too; each graph once, after all graphs that call it."""
    finished: dict[GraphModule, None] = {}

    def visit(module: GraphModule) -> None:
        for _, body in _calls(module):
            if body not in finished:
                visit(body)
        finished[module] = None

    visit(gm)
    return list(reversed(finished))


def _running_once(gm: GraphModule) -> set[GraphModule]:
    """Returns `gm` and the subgraphs of nested regions (layers); checkpoints and their subgraphs are left out."""
    twice: set[GraphModule] = set()
    modules = _graphs(gm)  # callers come before the subgraphs that they call
    for module in modules:
        for call, body in _calls(module):
            if module in twice or call.target is not torch.ops.higher_order.invoke_subgraph:
                twice.add(body)
    return set(modules) - twice


def _calls(module: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    """Yields the calls of subgraphs in a graph."""
    for node in module.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in SUBGRAPH_OPS:
            continue
        for argument in node.all_input_nodes:
            body = getattr(module, str(argument.target), None) if argument.op == "get_attr" else None
            if isinstance(body, GraphModule):
                yield node, body


def reason_to_keep_logits(options: Options) -> str | None:
    """Returns why logits that are returned beside their loss stay outputs of the graph, in a sentence."""
    return "liger.logits is 'eager'" if options.logits == "eager" else None


def _backward_plan(
    options: Options, fuel: int | None, report: GraphReport, places: Sequence[Paths] = HERE
) -> BackwardPlan | None:
    """Returns the changes to the graph of backward; the plan adds the applied changes to the report, at each place."""
    if "never" in (options.policy, options.backward_passes):
        return None

    def made(changes: Iterable[tuple[Pass, Applied]]) -> None:
        sites = [
            site_of_pass(one_pass.name, applied.node, applied.change, applied.memory, applied.traffic).at(
                paths
            )
            for one_pass, applied in changes
            for paths in places
        ]
        report.backward.add(report.name, sites)

    return BackwardPlan(
        passes=tuple(one_pass for one_pass in DEFAULT_PASSES if not options.skips(one_pass.name)),
        choices=tuple(name for name in CHOICES if not options.skips(name)),
        fuel=fuel,
        strict=options.strict,
        everywhere=options.backward_passes == "always",
        made=made,
        planned=report.backward.plan,
        chose=lambda name, *numbers: report.backward.choose(
            report.name, name, CHOICES[name].format(*numbers)
        ),
    )
