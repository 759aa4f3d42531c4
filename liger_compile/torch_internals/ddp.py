"""DDP's optimizer, which splits a graph under torch.compile where a bucket of gradients is full.

part                                    torch           can go
torch._dynamo.backends.distributed      2.11 to 2.13    no public name

The optimizer has no hook. So its method `compile_fn` is replaced, and while it splits, the function
`bucket_has_external_output`, which it calls with each full bucket.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from liger_compile.torch_internals.dynamo import unwrapped

MayBegin = Callable[[Node, int], bool]


@dataclass(frozen=True)
class Cut:
    """Splits a whole graph and compiles it part by part, as DDP's optimizer does."""

    optimizer: Any
    method: Callable[..., Callable[..., Any]]
    arguments: Mapping[str, Any]

    @property
    def bucket_bytes(self) -> int:
        """The bytes of gradients at which a bucket is full."""
        return self.optimizer.bucket_bytes_cap

    @property
    def settings(self) -> tuple[str | None, Mapping[str, Any] | None]:
        """Mode and options of the torch.compile that the graph is compiled for."""
        wrapped = unwrapped(self.optimizer.backend_compile_fn)
        given = next((each.kwargs for each in wrapped if hasattr(each, "kwargs")), {})
        return given.get("mode"), given.get("options")

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        may_begin: MayBegin = lambda *_: True,
        marked: Callable[[GraphModule], GraphModule] | None = None,
    ) -> Callable[..., Any]:
        """Splits and compiles `gm`.

        Args:
            may_begin: returns whether a part may begin with a node, given the bytes by which it exceeds its bucket.
            marked: called with each part before it is compiled; returns the part to compile. None changes no part.
        """
        optimizer = copy.copy(self.optimizer)
        if marked is not None:
            compile_part = optimizer.backend_compile_fn
            optimizer.backend_compile_fn = lambda part, inputs: compile_part(marked(part), inputs)
        with _cutting_where(may_begin):
            return self.method(optimizer, gm, example_inputs, **self.arguments)


def before_cuts(
    backend: Callable[..., Any], split: Callable[[GraphModule, Sequence[Any], Cut], Callable[..., Any]]
) -> None:
    """Makes DDP's optimizer call `split` with each whole graph of `backend`, instead of splitting it. Call it once."""
    if not torch.distributed.is_available():
        return
    from torch._dynamo.backends.distributed import DDPOptimizer

    method: Any = DDPOptimizer.compile_fn

    @functools.wraps(method)
    def compile_fn(self: Any, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        *_, innermost = unwrapped(self.backend_compile_fn)
        if innermost is not backend:
            return method(self, gm, example_inputs, **kwargs)
        return split(gm, example_inputs, Cut(self, method, kwargs))

    DDPOptimizer.compile_fn = compile_fn


@contextlib.contextmanager
def _cutting_where(may_begin: MayBegin) -> Iterator[None]:
    """Lets DDP's optimizer split a graph at these places; without the function that it asks, at its own places."""
    from torch._dynamo.backends import distributed

    theirs: Any = getattr(distributed, "bucket_has_external_output", None)
    if theirs is None:
        yield
        return

    def may_end(bucket: Any) -> bool:
        if not theirs(bucket):
            return False
        full = bucket.paramsize_before_opcount_increase or bucket.size
        if may_begin(bucket.nodes[-1], bucket.size - full):
            return True
        bucket.paramsize_before_opcount_increase = full
        # The optimizer adds one, and warns if the result is not zero.
        bucket.opcount_increased_to_capture_external_output = -1
        return False

    distributed.bucket_has_external_output = may_end
    try:
        yield
    finally:
        distributed.bucket_has_external_output = theirs
