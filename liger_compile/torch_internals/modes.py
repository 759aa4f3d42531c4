"""The modes of a thread after a trace that raised.

A graph switches modes by calls in pairs: inference mode, autocast, gradients. Where a trace raises between the two, the
second call is not made. Dynamo restores some modes where it has called the backend, and nobody does where a graph is
compiled later.

Inference mode is the worst of them, with any backend (torch 2.11 to 2.13). What its first call returns writes the state
of the dispatcher back when it is freed, which is when the exception is dropped: the state in the midst of the trace.
From then on every operator raises "PythonDispatcherTLS was not set" in that thread.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.fx import Interpreter

_Settings = tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...]
_MODES = (torch._C._InferenceMode, torch.amp.autocast_mode.autocast)  # what the calls that begin one return


def _set_deterministic(state: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


# How each is read and written. Whether autocast is on is part of the state of the dispatcher; AOTAutograd switches its
# cache off while it traces.
_SETTINGS: _Settings = (
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (_deterministic, _set_deterministic),
)


@contextlib.contextmanager
def restored_if_raised() -> Iterator[None]:
    """Around a trace: if it raises, the modes are those from before, and stay so when the exception is dropped."""
    before = [(write, read()) for read, write in _SETTINGS]
    with torch._C._PreserveDispatchKeyGuard():
        try:
            yield
        except BaseException as error:
            for mode in reversed(list(_entered(error))):
                mode.__exit__(None, None, None)
            for write, value in before:
                write(value)
            raise


def _entered(error: BaseException) -> Iterator[Any]:
    """The modes that graphs had begun when they raised, first to last."""
    seen: set[int] = set()
    for each in _causes(error):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            for value in _values_of_nodes(frame):
                if isinstance(value, _MODES) and id(value) not in seen:
                    seen.add(id(value))
                    yield value


def _values_of_nodes(frame: FrameType) -> Iterable[Any]:
    """What a graph that runs in this frame has computed and still needs: modes that have ended are not among it."""
    if frame.f_code.co_filename.startswith("<eval_with_key>"):  # Python that torch.fx has written
        return frame.f_locals.values()
    interpreter = frame.f_locals.get("self")
    return interpreter.env.values() if isinstance(interpreter, Interpreter) else ()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [each.__cause__, each.__context__]
