"""The kinds of op: all run without autocast, with first derivatives only; only a `mutating_op` mutates arguments.

An op is named after its function, in the namespace `liger_compile`. Differentiating an op raises an error until
`register_autograd` gives it a backward. For the ops that are the backward of another op, this error remains.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from liger_compile.torch_internals.dispatch import below_autograd
from liger_compile.torch_internals.operators import CustomOpDef, overload_of, set_wrap_triton_enabled

from .precision import outside_autocast


def traceable_op(fn: Callable[..., Any]) -> CustomOpDef:
    """Register an op that is one node in Dynamo and that AOTAutograd traces through, so that Inductor fuses its body.

    The body is its own fake implementation: it must consist of PyTorch operators and wrapped Triton kernels.
    """
    # triton_op works without Triton, but then it logs a warning for every op.
    log = logging.getLogger("torch._library.triton")
    disabled, log.disabled = log.disabled, True
    try:
        op: Any = torch.library.triton_op(
            f"liger_compile::{fn.__name__}", _without_views(outside_autocast(fn)), mutates_args=()
        )
    finally:
        log.disabled = disabled
    return _first_derivative_only(op, fn.__name__)


def opaque_op(fn: Callable[..., Any]) -> CustomOpDef:
    """Register an op that remains one call in the generated code, so that its body may loop. It needs a fake."""
    body = _without_views(_launching_directly(outside_autocast(fn)))
    op = torch.library.custom_op(f"liger_compile::{fn.__name__}", body, mutates_args=())
    return _first_derivative_only(op, fn.__name__)


LATE_OPS: dict[Any, Callable[..., Any]] = {}  # of the ops that are inlined late

_inlines_late = False


@contextlib.contextmanager
def inlining_late() -> Iterator[None]:
    """Call the opaque variants of `backward_op`s, while graphs are traced for `backward_passes/`."""
    global _inlines_late
    before, _inlines_late = (
        _inlines_late,
        True,
    )  # not a context variable: autograd may call from its own thread
    try:
        yield
    finally:
        _inlines_late = before


def late_op(fn: Callable[..., Any]) -> CustomOpDef:
    """Register an opaque op with a traceable body, which is also its fake. `backward_passes/` inlines the op late."""
    op = opaque_op(fn)
    op.register_fake(fn)
    LATE_OPS[overload_of(op)] = outside_autocast(fn)
    return op


class backward_op:
    """A traceable op, and its opaque variant NAME_late, which is called under `inlining_late`."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        @functools.wraps(fn)
        def late(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs)

        late.__name__ = f"{fn.__name__}_late"
        self.body = fn
        self._traceable, self._late = overload_of(traceable_op(fn)), overload_of(late_op(late))

    def __call__(self, *args: Any) -> Any:
        return (self._late if _inlines_late else self._traceable)(*args)


def mutating_op(*arguments: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register an opaque op that writes into these arguments and returns None.

    It is for complete graphs of backward: PyTorch does not differentiate such an op, and our patterns insert none into
    a model.
    """

    def register(fn: Callable[..., Any]) -> CustomOpDef:
        body = _launching_directly(outside_autocast(fn))
        return torch.library.custom_op(f"liger_compile::{fn.__name__}", body, mutates_args=arguments)

    return register


def _without_views(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `fn` so that autograd treats its results as non-views, which may then be written in place."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with below_autograd():
            return fn(*args, **kwargs)

    return wrapper


def _launching_directly(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `fn` to launch its kernels without the dispatcher: nothing traces the body of an opaque op."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with set_wrap_triton_enabled(False):
            return fn(*args, **kwargs)

    return wrapper


def padded(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs of an op: those of the first ones, and None for the others."""
    return *gradients, *(None,) * (len(ctx.needs_input_grad) - len(gradients))


def second_derivative_error(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: expected to be differentiated once, got a second derivative; "
        "run the code that needs second derivatives without liger_compile"
    )


def _first_derivative_only(op: CustomOpDef, name: str) -> CustomOpDef:
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise second_derivative_error(name.removesuffix("_backward"))

    op.register_autograd(backward)
    return op
