"""The kinds of op, and what they have in common: no autocast, first derivatives only, and no mutation but for one kind.

An op is named after its function, in the namespace `liger_compile`. Until `register_autograd` gives it a
backward, differentiating it is an error: so it stays for the ops that are the backward of another.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._library.triton import set_wrap_triton_enabled

from .precision import outside_autocast


def traceable_op(fn: Callable[..., Any]) -> CustomOpDef:
    """An op that is one node to Dynamo and that AOTAutograd traces through, so that Inductor fuses its body.

    The body is its own fake implementation: it must consist of PyTorch operators and wrapped Triton kernels.
    """
    # triton_op works without Triton, but where Triton is not installed it logs a warning for every op.
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
    """An op that stays one call down to the generated code, so that its body may loop. It needs a fake."""
    body = _without_views(_launching_directly(outside_autocast(fn)))
    op = torch.library.custom_op(f"liger_compile::{fn.__name__}", body, mutates_args=())
    return _first_derivative_only(op, fn.__name__)


BODIES: dict[Any, Callable[..., Any]] = {}  # of the ops that are kept whole

_keeps_whole = False


@contextlib.contextmanager
def keeping_backwards_whole() -> Iterator[None]:
    """While graphs are traced for `backward_passes/`, which sees a `backward_op` as one node and traces it later."""
    global _keeps_whole
    before, _keeps_whole = (
        _keeps_whole,
        True,
    )  # no context variable: autograd may call from a thread of its own
    try:
        yield
    finally:
        _keeps_whole = before


def whole_op(fn: Callable[..., Any]) -> CustomOpDef:
    """An opaque op with the body of a traceable one, which is its own fake. `backward_passes/` inlines it late."""
    op = opaque_op(fn)
    op.register_fake(fn)
    BODIES[op._opoverload] = outside_autocast(fn)
    return op


class backward_op:
    """A traceable op, and a second one of the same arguments, NAME_whole, that is called `keeping_backwards_whole`."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        @functools.wraps(fn)
        def whole(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs)

        whole.__name__ = f"{fn.__name__}_whole"
        self.body = fn
        self._traceable, self._whole = traceable_op(fn), whole_op(whole)

    def __call__(self, *args: Any) -> Any:
        return (self._whole if _keeps_whole else self._traceable)._opoverload(*args)


def mutating_op(*arguments: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """An opaque op that writes into these arguments and returns None. For graphs of backward that are whole already:
    PyTorch differentiates no such op, and our patterns put none into a model."""

    def register(fn: Callable[..., Any]) -> CustomOpDef:
        body = _launching_directly(outside_autocast(fn))
        return torch.library.custom_op(f"liger_compile::{fn.__name__}", body, mutates_args=arguments)

    return register


def _without_views(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Its results are no views to autograd, however they were made, so that they may be written in place."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return fn(*args, **kwargs)

    return wrapper


def _launching_directly(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Nothing traces the body of an opaque op, so its kernels need not pass through the dispatcher."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with set_wrap_triton_enabled(False):
            return fn(*args, **kwargs)

    return wrapper


def second_derivative_error(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: expected to be differentiated once, got a second derivative; "
        "run what needs second derivatives without liger_compile"
    )


def _first_derivative_only(op: CustomOpDef, name: str) -> CustomOpDef:
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise second_derivative_error(name.removesuffix("_backward"))

    op.register_autograd(backward)
    return op


def graph_is_retained() -> bool:
    """Whether the backward that is running may be run again, so that what was saved for it must stay as it is."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
