"""START HERE. The backend: `torch.compile(model, backend="liger")` calls `liger` with each captured graph.

    Dynamo graph -> terms -> match -> decide -> rewrite -> compile -> callable

One file a step. This file calls them in order, for the graph and for the checkpoint bodies in it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from liger_compile import compile as compiling
from liger_compile import ops  # noqa: F401 - registers the ops, so that cached artifacts find them
from liger_compile.decide import decide, insertion_point
from liger_compile.match import find_matches
from liger_compile.options import Options, parse
from liger_compile.pattern import Decision, NearMiss, Pattern
from liger_compile.registry import patterns_in_use
from liger_compile.remat import mark_for_recompute
from liger_compile.report import GraphReport, record
from liger_compile.rewrite import restored_on_error, rewrite
from liger_compile.terms.attention import notes_on_masks
from liger_compile.terms.build import Terms
from liger_compile.terms.heads import notes_on_logits
from liger_compile.terms.mutation import Mutations

# Higher-order ops whose body is a graph like any other: activation checkpoints and nested compile regions.
_BODIES = ("tag_activation_checkpoint", "invoke_subgraph")


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
    try:
        report = _rewritten(gm, patterns, chosen)
    except Exception as error:
        # Promise one: whatever went wrong in our code, the user's program runs, and hears of it once.
        if chosen.strict:
            raise
        why = (
            f"the graph is compiled as it came, because rewriting it failed: {type(error).__name__}: {error}"
        )
        warnings.warn(f"liger_compile: {why}; liger.strict=True raises instead", stacklevel=2)
        report = GraphReport.of(gm, (), (), notes=(why,))
    compiled = compiling.compile_graph(
        gm,
        example_inputs,
        mode=chosen.mode,
        inductor_options=inductor_options,
        inner=chosen.inner,
        patterns=patterns,
        key=repr((chosen.policy, chosen.skip, chosen.fuel)),
    )
    # Not before: Dynamo may restart the analysis and come back with another graph of the same code.
    record(report)
    return compiled


liger.reset = compiling.reset  # pyright: ignore[reportFunctionMemberAccess]


def _rewritten(gm: GraphModule, patterns: Sequence[Pattern], options: Options) -> GraphReport:
    """Runs the steps on `gm` and its bodies, and reports. On an error all graphs are as they were."""
    start = time.perf_counter()
    modules = list(_graphs(gm))
    decisions: list[Decision] = []
    near_misses: list[NearMiss] = []
    notes: list[str] = []
    with restored_on_error(modules):
        for module in modules:
            mutations = Mutations(module.graph)
            terms = Terms(module.graph, mutations)
            notes.extend(notes_on_logits(module.graph, terms) if module is gm else ())
            notes.extend(notes_on_masks(terms.space, terms.of.values()))
            matches, missed = find_matches(module.graph, patterns, terms)
            decided = decide(
                module.graph,
                matches,
                mutations,
                policy=options.policy,
                fuel=_left(options.fuel, decisions),
                is_top_level=module is gm,
            )
            rewritten = rewrite(
                module.graph,
                decided,
                lambda m, at=mutations.position: insertion_point(m, at.__getitem__),
                settings={"loss_memory": options.loss_memory, "inner": options.inner},
            )
            mark_for_recompute(rewritten)
            decisions.extend(rewritten)
            near_misses.extend(missed)
        report = GraphReport.of(
            gm, decisions, near_misses, notes=tuple(notes), seconds=time.perf_counter() - start
        )
        for module in modules:
            module.recompile()
    return report


def _left(fuel: int | None, decisions: Sequence[Decision]) -> int | None:
    return None if fuel is None else max(0, fuel - sum(d.kind != "leave" for d in decisions))


def _graphs(gm: GraphModule) -> Iterator[GraphModule]:
    """`gm`, and the bodies in it that are rewritten as well; each once."""
    seen: set[GraphModule] = {gm}
    stack = [gm]
    while stack:
        module = stack.pop()
        yield module
        for node in module.graph.nodes:
            if node.op != "call_function" or getattr(node.target, "__name__", "") not in _BODIES:
                continue
            for argument in node.all_input_nodes:
                body = getattr(module, str(argument.target), None) if argument.op == "get_attr" else None
                if isinstance(body, GraphModule) and body not in seen:
                    seen.add(body)
                    stack.append(body)


compiling.set_up_dynamo()
