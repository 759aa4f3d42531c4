"""START HERE. The backend: `torch.compile(model, backend="liger")` calls `liger` with each captured graph.

    Dynamo graph -> pipeline.py (terms, match, decide, rewrite) -> assemble.py (compile.py) -> callable

`pipeline.py` rewrites one copy of the graph for all calls (generic), and a second copy for calls whose masks have the
values that they have in most calls (specialized). `input_dispatch.py`: each call runs the graph that its inputs allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.fx import GraphModule

from liger_compile import compile as compiling
from liger_compile import ops  # noqa: F401  # pyright: ignore[reportUnusedImport] - ops are registered, so that cached artifacts find them
from liger_compile.assemble import assembled
from liger_compile.backward_passes import NAMES
from liger_compile.failures import or_unchanged
from liger_compile.forward_passes import specialize
from liger_compile.forward_passes.inline_subgraphs import inlined
from liger_compile.forward_passes.split_for_ddp import before_ddp_cuts
from liger_compile.graphs.aliasing import forget_placement
from liger_compile.input_dispatch import of_all_rows, of_live_rows
from liger_compile.options import Options, parse
from liger_compile.pattern import Pattern
from liger_compile.pipeline import Rewritten, rewritten, with_bodies
from liger_compile.registry import patterns_in_use
from liger_compile.report import GraphReport, record
from liger_compile.runtime.optimizer_steps import watch_steps
from liger_compile.torch_internals import inductor


# Long because it lists the parts of the whole, and the failures that each part may have.
def liger(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    **_: Any,
) -> Callable[..., Any]:
    """Rewrites parts of a Dynamo graph with fused ops, and compiles the graph.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: the inputs of the graph.
        mode: as in torch.compile.
        options: options that begin with "liger." belong to this package (see options.py), all others to Inductor.
        notes: sentences for the report.

    Raises:
        ValueError: if an option does not exist, or a pattern is invalid.
    """
    compiling.set_up_dynamo()
    chosen, inductor_options = parse(mode, options)
    known = patterns_in_use(chosen.patterns)
    patterns = [pattern for pattern in known if not chosen.skips(pattern.name)]
    notes = [*notes, *chosen.notes_on_skip([*(pattern.name for pattern in known), *NAMES])]
    forget_placement(gm.graph)
    if not compiling.is_right_for_subgraphs(chosen.reported_inner):
        notes.extend(inlined(gm))
    graph, said = or_unchanged(
        lambda: with_bodies(gm, example_inputs, chosen, inductor_options),
        lambda why: (gm, (why,)),
        subject="each layer of the graph",
        strict=chosen.strict,
    )
    notes.extend(said)
    generic, special = or_unchanged(
        lambda: rewritten(graph, example_inputs, patterns, chosen),
        lambda why: (Rewritten(gm, GraphReport.of(gm, (), (), notes=(why,))), None),
        subject="the graph",
        strict=chosen.strict,
    )
    compiled = partial(
        _compiled, chosen=chosen, patterns=patterns, inductor_options=inductor_options, notes=notes
    )
    return of_live_rows(
        graph,
        generic,
        partial(of_all_rows, gm, generic, special, compiled),
        compiled,
        example_inputs,
        patterns=patterns,
        options=chosen,
        inductor_options=inductor_options,
        notes=notes,
    )


def _compiled(
    graph: Rewritten,
    variant: specialize.Variant | None,
    inputs: Sequence[Any],
    *,
    chosen: Options,
    patterns: Sequence[Pattern],
    inductor_options: Mapping[str, Any],
    notes: Sequence[str],
) -> Callable[..., Any]:
    """Compiles a rewritten graph and records its report."""
    result, failures = assembled(
        graph, inputs, options=chosen, patterns=patterns, inductor_options=inductor_options
    )
    # Recorded last: Dynamo may restart the analysis and call the backend again with another graph of the same code.
    record(graph.report.of_variant(variant).with_notes((*notes, *failures)))
    return result


liger.reset = inductor.free_cudagraphs  # pyright: ignore[reportFunctionMemberAccess]

compiling.set_up_dynamo()
watch_steps()
before_ddp_cuts(liger)
