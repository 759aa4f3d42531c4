"""Compiles a rewritten graph, whole or in segments, and completes its outputs.

    graph, or segments between calls of bodies -> compile.py -> runtime/ (zeros, memory, late outputs) -> callable

In: a rewritten graph, with the facts about its outputs. Out: the callable that Dynamo calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.fx import GraphModule

from liger_compile import compile as compiling
from liger_compile.failures import or_unchanged
from liger_compile.forward_passes import segments
from liger_compile.forward_passes.inline_subgraphs import inline_subgraphs
from liger_compile.forward_passes.logits import materializing
from liger_compile.options import Options
from liger_compile.pattern import Pattern
from liger_compile.pipeline import Rewritten
from liger_compile.runtime.separate_outputs import separating, storages_of_outputs
from liger_compile.runtime.shared_zeros import sharing_zeros, strides_of_outputs


def assembled(
    graph: Rewritten,
    inputs: Sequence[Any],
    *,
    options: Options,
    patterns: Sequence[Pattern],
    inductor_options: Mapping[str, Any],
) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """Returns the callable of a rewritten graph, and notes for the report on what failed."""
    compiled = partial(_compiled, options=options, patterns=patterns, inductor_options=inductor_options)
    storages, failures = storages_of_outputs(graph.gm.graph), []

    def inlined_again(why: str) -> None:
        inline_subgraphs(graph.gm)
        failures.append(why)

    plan = or_unchanged(
        lambda: segments.cut(graph.gm) if graph.backward_of else None,
        inlined_again,
        subject="each layer of the graph",
        strict=options.strict,
    )
    if plan is None:
        result = compiled(graph.gm, inputs, graph.backward)
    else:
        backward_of = {None: graph.backward, **graph.backward_of}
        parts = [compiled(part.gm, part.fakes(), backward_of[part.body]) for part in plan.segments]
        result = segments.chained(plan, parts)
    return materializing(separating(result, storages), graph.late_outputs), tuple(failures)


def _compiled(
    gm: GraphModule,
    inputs: Sequence[Any],
    backward: compiling.BackwardPlan | None,
    *,
    options: Options,
    patterns: Sequence[Pattern],
    inductor_options: Mapping[str, Any],
) -> Callable[..., Any]:
    """Compiles one graph or segment; zeros for its unused outputs are made in its backward."""
    strides = strides_of_outputs(gm.graph)
    result = compiling.compile_graph(
        gm,
        inputs,
        mode=options.mode,
        inductor_options=inductor_options,
        inner=options.compiler,
        patterns=patterns,
        key=repr((options.policy, options.skip, options.fuel, options.backward_passes)),
        backward=backward,
    )
    if backward and "backward.shared_zeros" in backward.choices:
        return sharing_zeros(result, strides, partial(backward.chose, "backward.shared_zeros"))
    return result
