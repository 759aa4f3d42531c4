"""The way into DDP's optimizer, which has no hook: its class gets another method.

Under torch.compile it cuts a graph where a bucket of gradients is full, and calls the backend with each part. In: such
a graph, whole. Out: what it gives for it, cut where somebody else would have it (`buckets.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Cut:
    """Cuts a whole graph and compiles part by part, as DDP's optimizer does."""

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
    ) -> Callable[..., Any]:
        """`may_begin` says whether a part may begin with a node, given by how many bytes it exceeds its bucket."""
        from torch._dynamo.backends import distributed

        # Asked whether a full bucket may be one. Where a torch has no such function, it cuts as it would.
        theirs: Any = getattr(distributed, "bucket_has_external_output", None)
        if theirs is None:
            return self.method(self.optimizer, gm, example_inputs, **self.arguments)

        def may_be_one(bucket: Any) -> bool:
            if not theirs(bucket):
                return False
            full = bucket.paramsize_before_opcount_increase or bucket.size
            if may_begin(bucket.nodes[-1], bucket.size - full):
                return True
            bucket.paramsize_before_opcount_increase = full
            # The optimizer adds one, and warns of what is not zero then.
            bucket.opcount_increased_to_capture_external_output = -1
            return False

        distributed.bucket_has_external_output = may_be_one
        try:
            return self.method(self.optimizer, gm, example_inputs, **self.arguments)
        finally:
            distributed.bucket_has_external_output = theirs


def before_ddp_cuts(
    backend: Callable[..., Any], instead: Callable[[GraphModule, Sequence[Any], Cut, Any, Any], Any]
) -> None:
    """Has `instead` called with each whole graph of `backend` that is about to be cut in buckets. Call it once.

    Args:
        instead: takes a graph, its example inputs, what cuts and compiles one, and the mode and options of the backend.
    """
    if not torch.distributed.is_available():
        return
    from torch._dynamo.backends.distributed import DDPOptimizer

    method: Any = DDPOptimizer.compile_fn

    @functools.wraps(method)
    def compile_fn(self: Any, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        chain = list(_unwrapped(self.backend_compile_fn))
        if chain[-1] is not backend:
            return method(self, gm, example_inputs, **kwargs)
        given = next((each.kwargs for each in chain if hasattr(each, "kwargs")), {})
        cut = Cut(self, method, kwargs)
        return instead(gm, example_inputs, cut, given.get("mode"), given.get("options"))

    DDPOptimizer.compile_fn = compile_fn


def _unwrapped(backend: Any) -> Iterator[Any]:
    """Dynamo has it inside of objects of its own: one that holds mode and options, and one for debugging."""
    while backend is not None:
        yield backend
        wrapped = getattr(backend, "_torchdynamo_orig_backend", None)
        backend = getattr(backend, "compiler_fn", None) if wrapped is None else wrapped
