"""Combines the graphs of one captured graph into a callable: each call runs the graph that its inputs allow.

generic graph, specialized graph        -> of_all_rows    dispatches on the values of masks
graphs of live rows, else of_all_rows   -> of_live_rows   dispatches on the rows that are no padding
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def of_all_rows(
    gm: GraphModule,
    generic: Rewritten,
    special: tuple[Assumptions, Rewritten] | None,
    compiled: Compiled,
    inputs: Sequence[Any],
) -> Callable[..., Any]:
    """Returns a callable that runs the specialized graph where its assumptions hold, and the generic graph elsewhere.

    Args:
        gm: the captured graph.
        compiled: compiles a graph for inputs.
    """
    if special is None:
        return compiled(generic, specialize.of_part(gm), inputs)
    assumptions, specialized = special
    return specialize.dispatch(
        gm,
        assumptions,
        specialized=partial(compiled, specialized, specialize.specialized_variant(assumptions)),
        generic=partial(compiled, generic, specialize.generic_variant(assumptions)),
        example_inputs=inputs,
        later=compiling.when_called,
    )


# Many parameters because it rewrites graphs, as the backend does.
def of_live_rows(
    gm: GraphModule,
    generic: Rewritten,
    all_rows: specialize.Compile,
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
        all_rows: compiles the graphs of all rows.
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

    def of_size(size: int, inputs: Sequence[Any]) -> Callable[..., Any]:
        rows = or_unchanged(
            lambda: rewritten_rows(plan, size, patterns, options),
            notes.append,
            subject="the rows of the graph",
            strict=options.strict,
        )
        if rows is not None:
            return compiled(rows, live_rows.variant(plan, size), inputs)
        given = slice(len(example_inputs))  # without the live rows
        of_all = all_rows(inputs[given])
        return lambda *args: of_all(*args[given])

    sizes = {size: partial(of_size, size) for size in plan.sizes}
    return live_rows.dispatch(plan, sizes, all_rows, example_inputs, later=compiling.when_called)
