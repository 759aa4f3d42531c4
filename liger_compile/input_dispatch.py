"""Combines the graphs of one captured graph into a callable: each call runs the graph that its inputs allow.

generic graph, specialized graph        -> of_all_rows    dispatches on the values of masks
graphs of live rows, else of_all_rows   -> of_live_rows   dispatches on the rows that are no padding
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch.fx import GraphModule

from liger_compile import compile as compiling
from liger_compile.failures import or_unchanged
from liger_compile.forward_passes import live_rows, specialize
from liger_compile.options import Options
from liger_compile.pattern import Pattern
from liger_compile.pipeline import Assumptions, Rewritten, live_rows_of, rewritten_rows

Compiled = Callable[[Rewritten, specialize.Variant | None, Sequence[Any]], Callable[..., Any]]
Later = Callable[[specialize.Compile], Callable[..., Any]]


def of_all_rows(
    gm: GraphModule,
    generic: Rewritten,
    special: tuple[Assumptions, Rewritten] | None,
    compiled: Compiled,
    inputs: Sequence[Any] | None,
    later: Later = compiling.when_called,
) -> specialize.Dispatch:
    """Returns a callable that runs the specialized graph where its assumptions hold, and the generic graph elsewhere.

    Args:
        gm: the captured graph.
        compiled: compiles a graph for inputs.
        inputs: of the first call; None if no graph is compiled now.
        later: returns a callable that compiles for the inputs of its first call, and for others if it has to.
    """

    def compiling_it(graph: Rewritten, variant: specialize.Variant | None) -> specialize.Compile:
        def compile_it(inputs: Sequence[Any]) -> Callable[..., Any]:
            return compiled(graph if is_owned else _copied(graph), variant, inputs)

        return compile_it

    is_owned = later is compiling.when_called  # each graph is compiled once
    if special is None:
        compile_it = compiling_it(generic, specialize.of_part(gm))
        return specialize.Dispatch((), {False: later(compile_it) if inputs is None else compile_it(inputs)})
    assumptions, specialized = special
    return specialize.dispatch(
        gm,
        assumptions,
        specialized=compiling_it(specialized, specialize.specialized_variant(assumptions)),
        generic=compiling_it(generic, specialize.generic_variant(assumptions)),
        example_inputs=inputs,
        later=later,
    )


def _copied(graph: Rewritten) -> Rewritten:
    assert not graph.backward_of, "a graph with outlined bodies has static sizes here"
    return replace(graph, gm=specialize.copied(graph.gm))


# Many parameters because it rewrites graphs, as the backend does.
def of_live_rows(
    gm: GraphModule,
    generic: Rewritten,
    all_rows: Callable[..., specialize.Dispatch],
    compiled: Compiled,
    example_inputs: Sequence[Any],
    *,
    patterns: Sequence[Pattern],
    options: Options,
    inductor_options: Mapping[str, Any],
    notes: list[str],
) -> Callable[..., Any]:
    """Returns a callable that computes the live rows of padded batches only, and all rows where that does not pay.

    Args:
        gm: the captured graph, with bodies of equal layers.
        generic: the rewritten graph of all rows.
        all_rows: `of_all_rows` without its last two arguments.
        notes: receives the reasons for which all rows are computed.
    """
    plan, reasons = or_unchanged(
        lambda: live_rows_of(gm, generic, example_inputs, options, inductor_options),
        lambda why: (None, (why,)),
        subject="the rows of the graph",
        strict=options.strict,
    )
    notes.extend(reasons)
    if plan is None:
        return all_rows(example_inputs)
    later: Later = compiling.when_called
    if plan.is_symbolic:
        later = partial(later, examples=plan.examples, otherwise=gm)

    def of_rows(live: live_rows.Live, size: int | None, inputs: Sequence[Any]) -> Callable[..., Any] | None:
        rows = or_unchanged(
            lambda: rewritten_rows(plan, live, patterns, options),
            notes.append,
            subject="the rows of the graph",
            strict=options.strict,
        )
        return None if rows is None else compiled(rows, live_rows.variant(plan, size), inputs)

    others = all_rows(None, later)
    return live_rows.dispatch(plan, _graphs_of_live_rows(plan, of_rows, others), others)


def _graphs_of_live_rows(
    plan: live_rows.Plan, compiled: Callable[..., Callable[..., Any] | None], others: Callable[..., Any]
) -> live_rows.Graphs:
    """Returns the graphs of live rows, each of which is compiled when a call first needs it.

    Args:
        compiled: compiles the graph of live rows, given in its trace, and of a number of slots, for inputs.
        others: the graphs of all rows.
    """
    given = slice(len(plan.examples))

    def without_live_rows(*args: Any) -> Any:
        return others(*args[given])

    def of_size(inputs: Sequence[Any]) -> Callable[..., Any]:
        index = inputs[given.stop]
        return compiled(plan.example(len(index)), len(index), inputs) or without_live_rows

    def of_any(inputs: Sequence[Any]) -> Callable[..., Any]:
        return compiled(symbolic, None, inputs) or without_live_rows

    unused = [compiling.when_called(of_size) for _ in range(plan.num_static)]
    if not plan.takes_any_number:
        return live_rows.Graphs(unused, None)
    symbolic = plan.example(None)
    examples = (*plan.examples, *symbolic.inputs)
    return live_rows.Graphs(unused, compiling.when_called(of_any, examples, otherwise=without_live_rows))
