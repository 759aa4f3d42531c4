"""START HERE. The backend: `torch.compile(model, backend="liger")` calls `liger` with each captured graph.

    Dynamo graph -> terms -> match -> decide -> rewrite -> compile -> callable

One file a step. This file calls them in order, for the graph and for the bodies in it; twice where calls
whose masks are as expected get a graph of their own.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

from liger_compile import compile as compiling
from liger_compile import ops, variants  # noqa: F401 - ops are registered, so that cached artifacts find them
from liger_compile.backward_passes import CHOICES, DEFAULT_PASSES, Applied, Pass
from liger_compile.buckets import Places, make_masks_where_they_are_read, padding_in, places_to_cut
from liger_compile.callbacks import warn_of_failures
from liger_compile.ddp import Cut, before_ddp_cuts
from liger_compile.decide import decide, insertion_point
from liger_compile.forward_passes.inline_subgraphs import describe_operands, inline_subgraphs
from liger_compile.graphs.aliasing import BODIES, Mutations
from liger_compile.graphs.regions import Region, Regions
from liger_compile.match import find_matches
from liger_compile.options import Options, parse
from liger_compile.outputs import Filled, filling, logits_in, settle, take_out
from liger_compile.pattern import Decision, NearMiss, Pattern
from liger_compile.registry import patterns_in_use
from liger_compile.remat import keep_what_written_inputs_give, mark_for_recompute
from liger_compile.report import GraphReport, is_of_variant, record, recorded_as, site_of_pass
from liger_compile.rewrite import rewrite
from liger_compile.terms.attention import Note, notes_in, sentences
from liger_compile.terms.build import Terms
from liger_compile.terms.heads import notes_on_logits
from liger_compile.zeros import sharing_zeros, strides_of_outputs


@dataclass(frozen=True)
class _Rewritten:
    """A graph that is ready to be compiled, and what the steps found out about it."""

    gm: GraphModule
    report: GraphReport
    filled: Sequence[Filled] = ()  # outputs that are not computed in it
    # What keeps masks from being known, and nothing else does: values that are padding, and masks made elsewhere.
    padding: set[str] = field(default_factory=set)
    masks: set[str] = field(default_factory=set)
    fuel: int | None = None  # what is left for backward


def liger(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Rewrites what a Dynamo graph computes with fused ops, and compiles it.

    Args:
        gm: the graph as Dynamo captured it; rewritten in place.
        example_inputs: its inputs.
        mode: as in torch.compile.
        options: "liger.*" are ours (see options.py), all others Inductor's.

    Raises:
        ValueError: for an option that there is not, or a pattern that cannot be right.
    """
    compiling.set_up_dynamo()
    chosen, inductor_options = parse(mode, options)
    patterns = [p for p in patterns_in_use(chosen.patterns) if not chosen.skips(p.name)]
    why_logits_stay = _why_logits_stay(chosen, inductor_options)
    notes = _without_wrong_subgraphs(gm, chosen)
    original, special = gm, None
    try:
        describe_operands(gm)
        original = variants.copied(gm)
        general = _rewritten(gm, patterns, chosen, why_logits_stay)
        is_readable = not any(isinstance(each, FakeTensor) for each in example_inputs)
        if chosen.padding == "auto" and is_readable and not is_of_variant():
            special = _specialised(original, example_inputs, general, patterns, chosen, why_logits_stay)
    except Exception as error:
        # Promise one: whatever went wrong in our code, the user's program runs, and hears of it once.
        if chosen.strict:
            raise
        why = (
            f"the graph is compiled as it came, because rewriting it failed: {type(error).__name__}: {error}"
        )
        warnings.warn(f"liger_compile: {why}; liger.strict=True raises instead", stacklevel=2)
        general = _Rewritten(original, GraphReport.of(original, (), (), notes=(why,)))

    def compiled(rewritten: _Rewritten, report: GraphReport, inputs: Sequence[Any]) -> Callable[..., Any]:
        strides = strides_of_outputs(rewritten.gm.graph)
        result = compiling.compile_graph(
            rewritten.gm,
            inputs,
            mode=chosen.mode,
            inductor_options=inductor_options,
            inner=chosen.compiler,
            patterns=patterns,
            key=repr((chosen.policy, chosen.skip, chosen.fuel, chosen.backward_passes)),
            backward=_backward_plan(chosen, rewritten.fuel, report),
        )
        # Not before: Dynamo may restart the analysis and come back with another graph of the same code.
        record(report.with_notes(notes))
        return filling(sharing_zeros(result, strides), rewritten.filled)

    if special is None:
        return compiled(general, general.report, example_inputs)
    expected, rewritten = special
    return variants.chosen_at_each_call(
        original,
        expected,
        special=partial(compiled, rewritten, rewritten.report.of_variant(*variants.specialised(expected))),
        general=partial(compiled, general, general.report.of_variant(*variants.general(expected))),
        example_inputs=example_inputs,
        later=compiling.when_called,
    )


liger.reset = compiling.reset  # pyright: ignore[reportFunctionMemberAccess]


def _rewritten(
    gm: GraphModule, patterns: Sequence[Pattern], options: Options, why_logits_stay: str | None
) -> _Rewritten:
    """Runs the steps on `gm` and its bodies."""
    start = time.perf_counter()
    modules = _graphs(gm)
    calls: dict[GraphModule, list[tuple[Any, ...]]] = {}  # body -> what each call hands in
    called_in: dict[GraphModule, list[Region]] = {}  # body -> the modes of each call
    decisions: list[Decision] = []
    near_misses: list[NearMiss] = []
    notes: list[str] = []
    attention: list[Note] = []
    filled: list[Filled] = []
    runs_once = _running_once(gm)
    for module in modules:
        is_top_level = module is gm
        mutations = Mutations(module.graph)
        regions = Regions(module.graph, called_in.get(module, ()))
        terms = Terms(module.graph, mutations, calls.get(module, ()), regions)
        for call, body in _calls(module):
            calls.setdefault(body, []).append(terms.arguments(call, body.graph))
            called_in.setdefault(body, []).append(regions.of[call])
        attention.extend(notes_in(terms.space, terms.of.values()))
        logits = logits_in(module.graph, terms) if is_top_level else []
        if is_top_level:
            notes.extend(notes_on_logits(module.graph, terms))
        staying = {each: why_logits_stay or _why_read(regions.of[each.head], options) for each in logits}
        notes.extend(
            f"the logits are computed in the graph: {why}" for why in {*filter(None, staying.values())}
        )
        deferred = take_out([each for each, why in staying.items() if not why], terms)
        matches, missed = find_matches(module.graph, patterns, terms, strict=options.strict)
        decided = partial(
            decide,
            module.graph,
            matches,
            mutations,
            regions=regions,
            policy=options.policy,
            fuel=_left(options.fuel, decisions),
            recompute=options.recompute == "auto",
            takes_marks=options.reported_inner != "eager",
            runs_once=module in runs_once,
            strict=options.strict,
        )
        rewritten = rewrite(
            module.graph,
            decided(),
            lambda m, at=mutations.position: insertion_point(m, at.__getitem__),
            settings={"loss_memory": options.loss_memory, "inner": options.reported_inner},
            regions=regions,
            decide_again=lambda refused, decided=decided: decided(refused=refused),
            strict=options.strict,
        )
        filled.extend(settle(module.graph, deferred, is_dropped=options.logits == "none"))
        # In a checkpoint the user has decided already.
        if module in runs_once and options.recompute == "auto":
            mark_for_recompute(rewritten)
        if is_top_level and options.policy != "never":
            keep_what_written_inputs_give(module.graph, mutations)
        decisions.extend(rewritten)
        near_misses.extend(missed)
    warn_of_failures(decisions)
    notes.extend([*sentences(attention), *map(str, filled)])
    report = GraphReport.of(
        gm, decisions, near_misses, notes=tuple(notes), seconds=time.perf_counter() - start
    )
    for module in modules:
        module.recompile()
    meanings = [note.meaning for note in attention if note.meaning]
    padding = {name for meaning in meanings for name in meaning.padding}
    masks = {name for meaning in meanings for name in meaning.masks}
    return _Rewritten(gm, report, filled, padding, masks, _left(options.fuel, decisions))


def _backward_plan(options: Options, fuel: int | None, report: GraphReport) -> compiling.BackwardPlan | None:
    """What is done to the graph of backward; the report hears of it."""
    if "never" in (options.policy, options.backward_passes):
        return None

    def made(changes: Iterable[tuple[Pass, Applied]]) -> None:
        sites = [
            site_of_pass(each.name, applied.node, applied.what, applied.memory, applied.traffic)
            for each, applied in changes
        ]
        report.backward.add(report.name, sites)

    return compiling.BackwardPlan(
        passes=tuple(each for each in DEFAULT_PASSES if not options.skips(each.name)),
        choices=tuple(name for name in CHOICES if not options.skips(name)),
        fuel=fuel,
        strict=options.strict,
        everywhere=options.backward_passes == "always",
        made=made,
        chose=lambda name: report.backward.choices.update({name: CHOICES[name]}),
    )


def _specialised(
    original: GraphModule,
    example_inputs: Sequence[Any],
    general: _Rewritten,
    patterns: Sequence[Pattern],
    options: Options,
    why_logits_stay: str | None,
) -> tuple[Mapping[str, variants.Expected], _Rewritten] | None:
    """What to expect of which inputs, and the graph for calls in which they are that; None where it brings nothing."""
    expected = variants.expected_inputs(original, general.padding, general.masks, example_inputs)
    if not expected:
        return None
    special = _rewritten(variants.with_expected(original, expected), patterns, options, why_logits_stay)
    if special.report.count("replace") <= general.report.count("replace"):
        return None
    return expected, special


def _in_buckets(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    cut: Cut,
    mode: str | None,
    options: Mapping[str, Any] | None,
) -> Callable[..., Any]:
    """A whole graph that DDP cuts in parts, for each of which it calls `liger`. What masks mean, and where layers
    begin, is seen here alone."""
    chosen, _ = parse(mode, options)
    if chosen.policy == "never":
        return cut(gm, example_inputs)
    general, special, expected = gm, None, {}
    places: dict[GraphModule, Places] = {}
    try:
        reads_masks, is_symbolic = not chosen.skips("attention.causal"), variants.is_symbolic(gm)
        if reads_masks and chosen.padding == "auto" and not is_symbolic:
            expected = variants.expected_inputs(gm, padding_in(gm.graph))
        if expected:
            general, special = variants.copied(gm), variants.with_expected(gm, expected)
        for module in filter(None, (general, special)):
            if reads_masks:
                make_masks_where_they_are_read(module.graph)
                module.recompile()
            places[module] = Places() if is_symbolic else places_to_cut(module.graph, cut.bucket_bytes)
    except Exception as error:
        if chosen.strict:
            raise
        why = f"{type(error).__name__}: {error}"
        warnings.warn(f"liger_compile: DDP cuts the graph as it came, because of {why}", stacklevel=2)
        return cut(gm, example_inputs)
    if special is None:
        return cut(general, example_inputs, places[general].may_begin)

    def compiled(module: GraphModule, variant: tuple[str, str], inputs: Sequence[Any]) -> Callable[..., Any]:
        with recorded_as(*variant):
            return cut(module, inputs, places[module].may_begin)

    return variants.chosen_at_each_call(
        gm,
        expected,
        special=partial(compiled, special, variants.specialised(expected)),
        general=partial(compiled, general, variants.general(expected)),
        example_inputs=example_inputs,
        later=compiling.when_called,
    )


def _without_wrong_subgraphs(gm: GraphModule, options: Options) -> tuple[str, ...]:
    """Inlines nested regions where they would be compiled wrong, whatever the policy is. What a report says of it."""
    if compiling.is_right_for_subgraphs(options.reported_inner):
        return ()
    count = inline_subgraphs(gm)
    calls = "a call of a nested region is" if count == 1 else f"{count} calls of nested regions are"
    return (f"{calls} inlined: Inductor computes wrong gradients through them",) if count else ()


def _why_logits_stay(options: Options, inductor_options: Mapping[str, Any]) -> str | None:
    """Why logits that are returned beside their loss stay among the outputs of the graph, in a sentence."""
    if options.logits == "eager":
        return "liger.logits is 'eager'"
    if options.logits == "auto" and compiling.uses_cudagraphs(options.mode, inductor_options):
        return "the next replay of a CUDA graph would overwrite what they are computed from"
    return None


def _why_read(region: Region, options: Options) -> str | None:
    """Why logits that are computed in these modes are likely to be read, in a sentence."""
    if options.logits == "auto" and not region.has_gradients:
        return "gradients are off, so it is an evaluation, which is likely to read them"
    return None


def _left(fuel: int | None, decisions: Sequence[Decision]) -> int | None:
    return None if fuel is None else max(0, fuel - sum(d.kind != "leave" for d in decisions))


def _graphs(gm: GraphModule) -> list[GraphModule]:
    """`gm`, and the bodies in it that are rewritten as well; each once, and after all that call it."""
    finished: dict[GraphModule, None] = {}

    def visit(module: GraphModule) -> None:
        for _, body in _calls(module):
            if body not in finished:
                visit(body)
        finished[module] = None

    visit(gm)
    return list(reversed(finished))


def _running_once(gm: GraphModule) -> set[GraphModule]:
    """`gm` and the bodies of nested regions, which are layers; without checkpoints, and what they call."""
    twice: set[GraphModule] = set()
    modules = _graphs(gm)  # all that call a body before it
    for module in modules:
        for call, body in _calls(module):
            if module in twice or call.target is not torch.ops.higher_order.invoke_subgraph:
                twice.add(body)
    return set(modules) - twice


def _calls(module: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    """The calls of bodies in a graph."""
    for node in module.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in BODIES:
            continue
        for argument in node.all_input_nodes:
            body = getattr(module, str(argument.target), None) if argument.op == "get_attr" else None
            if isinstance(body, GraphModule):
                yield node, body


compiling.set_up_dynamo()
before_ddp_cuts(liger, _in_buckets)
