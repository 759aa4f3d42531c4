"""DDP's optimizer, which splits a graph under torch.compile where a bucket of gradients is full.

part                                    torch           can go
torch._dynamo.backends.distributed      2.11 to 2.13    no public name
torch._guards.TracingContext            2.11 to 2.13    the optimizer holds its guard in a `with`

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
from torch._guards import TracingContext
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
        compile_part = optimizer.backend_compile_fn

        def compiled(part: GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
            is_whole = part is gm  # in one bucket; its first call is the user's
            part = part if marked is None else marked(part)
            with contextlib.nullcontext() if is_whole else _first_call_returns_fakes():
                return compile_part(part, inputs, **settings)

        optimizer.backend_compile_fn = compiled
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


class _FirstCallReturnsFakes(TracingContext):
    """A trace whose flag cannot be reset."""

    @property
    def fakify_first_call(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True

    @fakify_first_call.setter
    def fakify_first_call(self, value: bool) -> None:
        pass


@contextlib.contextmanager
def _first_call_returns_fakes() -> Iterator[None]:
    """Compiles one part so that its first call returns fake tensors, as DDP's optimizer expects.

    The optimizer sets a flag of the trace for each part, with an object whose `__del__` resets the flag. Where a
    reference cycle holds the object of an earlier part, Python may collect it while a later part is compiled. Without
    the flag, the first call of that part would run real kernels on fake tensors.
    """
    trace = TracingContext.try_get()
    if trace is None:
        yield
        return
    theirs = type(trace)
    trace.__class__ = _FirstCallReturnsFakes
    try:
        yield
    finally:
        trace.__class__ = theirs


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
