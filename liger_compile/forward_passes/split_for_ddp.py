"""Prepares a graph before DDP splits it: masks are computed in the parts that read them, and parts begin with layers.

Under torch.compile, DDP's optimizer splits a graph where a bucket of gradients is full, and calls the backend with each
part. It has no hook, so this file patches a method of its class. In: such a graph, whole. Out: the result of DDP's
optimizer for the graph, split at the places of `forward_passes/buckets.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.fx import GraphModule

from liger_compile import compile as compiling
from liger_compile.failures import or_unchanged
from liger_compile.forward_passes import specialize
from liger_compile.forward_passes.buckets import (
    Places,
    make_masks_where_they_are_read,
    padding_in,
    places_to_cut,
)
from liger_compile.graphs.aliasing import forget_placement
from liger_compile.options import Options, parse
from liger_compile.torch_internals.ddp import Cut, before_cuts


def before_ddp_cuts(backend: Callable[..., Any]) -> None:
    """Makes DDP's optimizer call `split` with each whole graph of `backend` before it splits it. Call it once."""

    def split_as_chosen(gm: GraphModule, example_inputs: Sequence[Any], cut: Cut) -> Callable[..., Any]:
        chosen, _ = parse(*cut.settings)
        return split(gm, example_inputs, cut, chosen)

    before_cuts(backend, split_as_chosen)


def split(gm: GraphModule, example_inputs: Sequence[Any], cut: Cut, options: Options) -> Callable[..., Any]:
    """Prepares and splits a whole graph; the backend is called with each part.

    Only the whole graph shows the meaning of masks and the start of layers.
    """
    if options.policy == "never":
        return cut(gm, example_inputs)

    def prepared() -> _Whole:
        forget_placement(gm.graph)
        reads_masks, is_symbolic = not options.skips("attention.causal"), specialize.is_symbolic(gm)
        whole = _Whole(gm)
        if reads_masks and options.padding == "auto" and not is_symbolic:
            whole.assumptions = specialize.find_assumptions(gm, padding_in(gm.graph))
        if whole.assumptions:
            whole.generic, whole.special = (
                specialize.copied(gm),
                specialize.with_assumptions(gm, whole.assumptions),
            )
        for module in filter(None, (whole.generic, whole.special)):
            if reads_masks:
                make_masks_where_they_are_read(module.graph)
                module.recompile()
            whole.places[module] = Places() if is_symbolic else places_to_cut(module.graph, cut.bucket_bytes)
        return whole

    whole = or_unchanged(
        prepared, lambda _: None, subject="the graph that DDP cuts in buckets", strict=options.strict
    )
    if whole is None:
        return cut(gm, example_inputs)
    if whole.special is None:
        return cut(whole.generic, example_inputs, whole.places[whole.generic].may_begin)

    def compiled(
        module: GraphModule, variant: specialize.Variant, inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        return cut(
            module, inputs, whole.places[module].may_begin, partial(specialize.as_part, variant=variant)
        )

    return specialize.dispatch(
        gm,
        whole.assumptions,
        specialized=partial(compiled, whole.special, specialize.specialized_variant(whole.assumptions)),
        generic=partial(compiled, whole.generic, specialize.generic_variant(whole.assumptions)),
        example_inputs=example_inputs,
        later=compiling.when_called,
    )


@dataclass
class _Whole:
    """A graph before it is split, a copy of it for calls with the assumed inputs, and the places to split them."""

    generic: GraphModule
    special: GraphModule | None = None
    assumptions: Mapping[str, specialize.Assumption] = field(default_factory=dict)
    places: dict[GraphModule, Places] = field(default_factory=dict)
