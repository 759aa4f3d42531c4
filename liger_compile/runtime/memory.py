"""Memory that is computed late, and the operations on it that wait for the computation.

    Memory   the values of a tensor that owns its memory: those of a promise, or an operation on other memories
    Late     all of a memory, or a view of it
    Family   memories that wait for one another, and the operations on them in the order of the program

Nobody can write into a memory before it exists, except by a write that waits too. Memories of a family are computed
together, in the order of the program: so a copy does not include later writes, and a view includes them.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from liger_compile.runtime.promise import Promise
from liger_compile.torch_internals.pytree import tree_map_only

# One lock for all families: families merge, and a computation may read memories of several.
_lock = threading.RLock()


class Family:
    """Memories that are computed together, and the waiting operations."""

    def __init__(self) -> None:
        self._waiting: deque[_Computation | _Write] = deque()

    def add(self, operation: _Computation | _Write) -> None:
        """Append an operation that waits; drop those whose memory is gone."""
        if self._waiting and len(self._waiting) % 64 == 0:
            self._waiting = deque(each for each in self._waiting if each.memory() is not None)
        self._waiting.append(operation)

    def absorb(self, other: Family) -> None:
        """Take over all memories of another family."""
        if other is self:
            return
        for each in other._waiting:
            if (memory := each.memory()) is not None:
                memory.family = self
        self._waiting.extend(other._waiting)
        other._waiting = deque()

    def compute(self) -> None:
        """Run all waiting operations.

        Raises:
            RuntimeError: the values cannot be computed any more. The operations wait on.
        """
        while self._waiting:
            self._waiting[0].run()
            self._waiting.popleft()


class Memory:
    """The values of a tensor that owns its memory.

    Args:
        function: returns a new tensor; it takes the plain tensors of `sources`.
        sources: what it is computed from, none of which has been computed.
    """

    def __init__(self, function: Callable[..., Tensor], sources: Sequence[Late] = ()) -> None:
        self.writes = 0  # that have been recorded
        self.made: Tensor | None = None
        # In the memory and not in the family, so that the sources live no longer than the memory.
        self.recipe: tuple[Callable[..., Tensor], tuple[Late, ...]] | None = (function, tuple(sources))
        with _lock:
            self.family = sources[0].memory.family if sources else Family()
            for source in sources[1:]:
                self.family.absorb(source.memory.family)
            self.family.add(_Computation(self))

    def __call__(self) -> Tensor:
        """Return a plain tensor; the same tensor on each call.

        Raises:
            RuntimeError: the values cannot be computed any more.
        """
        with _lock:
            if self.made is None:
                self.family.compute()
            assert self.made is not None, "a memory has a computation"
            return self.made


class _Computation:
    def __init__(self, memory: Memory) -> None:
        self.memory = weakref.ref(memory)

    def run(self) -> None:
        if (memory := self.memory()) is not None and memory.recipe is not None:
            function, sources = memory.recipe
            memory.made = function(*(source() for source in sources))
            memory.recipe = None


class _Write:
    def __init__(self, late: Late, function: Callable[[Tensor], Any]) -> None:
        self.memory, self._steps, self._function = weakref.ref(late.memory), late.steps, function

    def run(self) -> None:
        if (memory := self.memory()) is not None:
            self._function(Late(memory, self._steps)())


class Late:
    """All of a memory, or the view that `steps` make of it."""

    def __init__(self, memory: Memory, steps: tuple[Callable[[Tensor], Tensor], ...] = ()) -> None:
        self.memory, self.steps = memory, steps

    def __call__(self) -> Tensor:
        """Return a plain tensor without a gradient.

        Raises:
            RuntimeError: the values cannot be computed any more.
        """
        with torch.inference_mode(False), torch.no_grad():
            made = self.memory()
            for step in self.steps:
                made = step(made)
            return made

    def viewed(self, step: Callable[[Tensor], Tensor]) -> Late:
        return Late(self.memory, (*self.steps, step))

    def write(self, function: Callable[[Tensor], Any]) -> bool:
        """Record a write by `function`; return False if the memory exists, so that the caller has to write."""
        with _lock:
            if self.memory.made is not None:
                return False
            self.memory.writes += 1
            self.memory.family.add(_Write(self, function))
            return True


def late_result(function: Callable[..., Any], arguments: Any) -> Late | None:
    """Return the result of an operation as new memory, or None if one of its lazy arguments has been computed.

    Args:
        function: takes `arguments` with plain tensors in place of Late, and returns a new tensor.
    """
    found: list[Late] = []

    def numbered(late: Late) -> _Place:
        found.append(late)
        return _Place(len(found) - 1)

    shape = tree_map_only(Late, numbered, arguments)

    def computed(*plain: Tensor) -> Tensor:
        with _without_autocast(plain):
            return function(tree_map_only(_Place, lambda place: plain[place.at], shape))

    with _lock:
        if any(late.memory.made is not None for late in found):
            return None
        return Late(Memory(computed, found))


class _Place:
    def __init__(self, at: int) -> None:
        self.at = at


def promised(promise: Promise, at: int = 0) -> Late:
    """Return one of the values of a promise, as new memory."""
    return Late(Memory(lambda: promise(at).detach()))


@contextlib.contextmanager
def _without_autocast(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Switch autocast off on the devices of these tensors: it was applied when the operation was recorded."""
    with contextlib.ExitStack() as stack:
        for device in {tensor.device.type for tensor in tensors}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
