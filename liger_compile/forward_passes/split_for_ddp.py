"""Prepares a graph before DDP splits it: masks are computed in the parts that read them, and parts begin with layers.

Under torch.compile, DDP's optimizer splits a graph where a bucket of gradients is full, and calls the backend with each
part. It has no hook, so this file patches a method of its class. In: such a graph, whole. Out: the result of DDP's
optimizer for the graph, split at the places of `forward_passes/buckets.py`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from liger_compile import compile as compiling
from liger_compile.failures import or_as_it_came
from liger_compile.forward_passes import specialize
from liger_compile.forward_passes.buckets import (
    Places,
    make_masks_where_they_are_read,
    padding_in,
    places_to_cut,
)
from liger_compile.options import Options, parse


@dataclass(frozen=True)
class Cut:
    """Splits a whole graph and compiles it part by part, as DDP's optimizer does."""

    optimizer: Any
    method: Callable[..., Callable[..., Any]]
    arguments: Mapping[str, Any]

    @property
    def bucket_bytes(self) -> int:
        return self.optimizer.bucket_bytes_cap

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        may_begin: Callable[[Node, int], bool] = lambda *_: True,
        variant: specialize.Variant | None = None,
    ) -> Callable[..., Any]:
        """Splits and compiles `gm`.

        Args:
            may_begin: returns whether a part may begin with a node, given the bytes by which it exceeds its bucket.
            variant: the variant that the parts are compiled for; None means all calls.
        """
        from torch._dynamo.backends import distributed

        optimizer = copy.copy(self.optimizer)
        if variant is not None:
            compile_part = optimizer.backend_compile_fn

            def compile_of_variant(part: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
                return compile_part(specialize.as_part(part, variant), inputs)

            optimizer.backend_compile_fn = compile_of_variant

        # Called for a full bucket, to decide whether it may end. Without this function, torch splits at its own places.
        theirs: Any = getattr(distributed, "bucket_has_external_output", None)
        if theirs is None:
            return self.method(optimizer, gm, example_inputs, **self.arguments)

        def may_be_one(bucket: Any) -> bool:
            if not theirs(bucket):
                return False
            full = bucket.paramsize_before_opcount_increase or bucket.size
            if may_begin(bucket.nodes[-1], bucket.size - full):
                return True
            bucket.paramsize_before_opcount_increase = full
            # The optimizer adds one, and warns if the result is not zero.
            bucket.opcount_increased_to_capture_external_output = -1
            return False

        distributed.bucket_has_external_output = may_be_one
        try:
            return self.method(optimizer, gm, example_inputs, **self.arguments)
        finally:
            distributed.bucket_has_external_output = theirs


def before_ddp_cuts(backend: Callable[..., Any]) -> None:
    """Makes DDP's optimizer call `split` with each whole graph of `backend` before it splits it. Call it once."""
    if not torch.distributed.is_available():
        return
    from torch._dynamo.backends.distributed import DDPOptimizer

    method: Any = DDPOptimizer.compile_fn

    @functools.wraps(method)
    def compile_fn(self: Any, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        chain = list(_unwrapped(self.backend_compile_fn))
        if chain[-1] is not backend:
            return method(self, gm, example_inputs, **kwargs)
        given = next((function.kwargs for function in chain if hasattr(function, "kwargs")), {})
        chosen, _ = parse(given.get("mode"), given.get("options"))
        return split(gm, example_inputs, Cut(self, method, kwargs), chosen)

    DDPOptimizer.compile_fn = compile_fn


def split(gm: GraphModule, example_inputs: Sequence[Any], cut: Cut, options: Options) -> Callable[..., Any]:
    """Prepares and splits a whole graph; the backend is called with each part.

    Only the whole graph shows the meaning of masks and the start of layers.
    """
    if options.policy == "never":
        return cut(gm, example_inputs)

    def prepared() -> _Whole:
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

    whole = or_as_it_came(
        prepared, lambda _: None, what="the graph that DDP cuts in buckets", strict=options.strict
    )
    if whole is None:
        return cut(gm, example_inputs)
    if whole.special is None:
        return cut(whole.generic, example_inputs, whole.places[whole.generic].may_begin)

    def compiled(
        module: GraphModule, variant: specialize.Variant, inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        return cut(module, inputs, whole.places[module].may_begin, variant)

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


def _unwrapped(backend: Any) -> Iterator[Any]:
    """Yields the backend and the backends it wraps: Dynamo wraps it for mode and options, and for debugging."""
    while backend is not None:
        yield backend
        wrapped = getattr(backend, "_torchdynamo_orig_backend", None)
        backend = getattr(backend, "compiler_fn", None) if wrapped is None else wrapped
