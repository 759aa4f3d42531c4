"""Values that are computed when somebody wants them, from inputs as they are now: those, or an error, whatever has
happened to the inputs in between.

    Recipe   how to compute a tensor of others
    Promise  recipe(*inputs), for inputs that others may write into before it is computed
    Values   the memory of tensors that are computed late, and the copies that were taken of it

What is about to change an input and can be seen (`optimizer_steps.py`, `sharding.py`) asks for it to be kept. What
cannot be seen is noticed when the values are wanted, by the input's version and by its fingerprint.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_compile.runtime.fingerprint import Fingerprint, fingerprint

_CAST = torch.ops.aten._to_copy.default


@dataclass(frozen=True)
class Recipe:
    """How to compute a tensor of others.

    Args:
        function: of plain tensors and numbers; gives one tensor.
        name: what the tensor is to the user, for messages: "logits".
        advice: what to do where it cannot be computed any more, a sentence.
        autocast: (device type, dtype) of the autocast that it runs under; None for none.
    """

    function: Callable[..., Tensor]
    name: str
    advice: str
    autocast: tuple[str, torch.dtype] | None = None

    def __call__(self, *inputs: Any) -> Tensor:
        """The tensor."""
        with contextlib.ExitStack() as stack:
            if self.autocast:
                stack.enter_context(torch.autocast(self.autocast[0], dtype=self.autocast[1]))
            else:
                for device in {each.device.type for each in inputs if isinstance(each, Tensor)}:
                    stack.enter_context(torch.autocast(device, enabled=False))
            return self.function(*inputs)

    def refusal(self, wanted: str, shape: Sequence[int], what: str) -> RuntimeError:
        """The error where an input of this shape is not what it was: "values", or "gradients" of them, are wanted."""
        subject = f"the {self.name}" if wanted == "values" else f"the {wanted} of the {self.name}"
        return RuntimeError(
            f"{subject} cannot be computed any more: a tensor of shape {tuple(shape)} that they depend on {what} "
            f"before they were needed; {self.advice}"
        )


CHANGED_IN_PLACE = "was changed in place (by an optimizer's step, say)"
CHANGED_UNSEEN = (
    "was changed (through another output that shares its memory, .data, NumPy, a raw pointer, or by an optimizer that "
    "has no step hooks)"
)
FREED = "was freed (as sharding frees gathered weights)"


def storage_of(tensor: Tensor) -> int | None:
    """What tensors that share their memory have in common while they live; None where there is no memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def is_freed(tensor: Tensor) -> bool:
    """Whether its storage has become too small for it."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + sum(steps) + 1) * tensor.element_size()
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() < end


class _Input:
    """A tensor that others may write into, and what it was."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.fingerprint = fingerprint(self.tensor)
        self._version = _version(self.tensor)
        self._lost: str | None = None  # what happened before there was a copy

    def what_happened(self) -> str | None:
        """Where it shows without a look at the values."""
        if self._lost:
            return self._lost
        if is_freed(self.tensor):
            return FREED
        return None if _version(self.tensor) == self._version else CHANGED_IN_PLACE

    def is_same(self) -> Tensor:
        """bool []: whether the values are what they were."""
        return self.fingerprint.is_same(fingerprint(self.tensor))

    def keep(self, copies: dict[Any, Tensor]) -> None:
        """Puts a copy in its place, one of `copies` if it is there."""
        self._lost = self.what_happened()
        if self._lost is None:
            mine = self.tensor
            key = (storage_of(mine), mine.storage_offset(), mine.shape, mine.stride(), mine.dtype)
            if key not in copies:
                copies[key] = mine.clone()
            self.tensor = copies[key]
            self._version = _version(self.tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Promise:
    """The values of recipe(*inputs), with the inputs as they are now.

    Args:
        recipe: what computes them.
        num_bytes: of the values.
        inputs: tensors that have fingerprints, and other values.
    """

    def __init__(self, recipe: Recipe, num_bytes: int, inputs: Sequence[Any]) -> None:
        self.lock = threading.RLock()
        self.recipe, self._num_bytes = recipe, num_bytes
        self._inputs = [_Input(each) if isinstance(each, Tensor) else each for each in inputs]
        self._stream = _stream(self._tensors())
        self._values: Tensor | None = None
        # The shape of each input, and bool []: whether it was what it had been when the values were computed.
        self._doubts: list[tuple[torch.Size, Tensor]] = []

    def __call__(self) -> Tensor:
        """The values, without a gradient, the same tensor each time.

        Raises:
            RuntimeError: an input had changed.
        """
        with self.lock, _on(self._stream):
            if self._values is None:
                for each in self._tensors():
                    if what := each.what_happened():
                        raise self.recipe.refusal("values", each.tensor.shape, what)
            values = self._computed()
            for shape, is_same in self._doubts:
                if not is_same:
                    raise self.recipe.refusal("values", shape, CHANGED_UNSEEN)
            self._doubts = []
            return values

    def keep(self, storages: Container[int | None], copies: dict[Any, Tensor]) -> None:
        """Makes the values independent of the inputs in these storages, which are about to change: by copies of these
        inputs, or by computing the values, whichever is smaller. Nothing waits for a GPU. Where there is no memory left
        for that, the change will be noticed.

        Args:
            storages: as storage_of() gives them.
            copies: those that there are already; new ones are added.
        """
        with self.lock, _on(self._stream), contextlib.suppress(torch.OutOfMemoryError):
            endangered = [each for each in self._tensors() if storage_of(each.tensor) in storages]
            is_lost = any(each.what_happened() for each in self._tensors())
            if not is_lost and self._num_bytes < sum(each.tensor.nbytes for each in endangered):
                self._computed()
            else:
                for each in endangered:
                    each.keep(copies)

    def storages(self) -> set[int | None]:
        """Those that the values are yet to be computed from, as storage_of() gives them."""
        return {storage_of(each.tensor) for each in self._tensors()}

    def fingerprints(self) -> list[Fingerprint | None]:
        """Of the inputs, as they were; None for what is no tensor."""
        return [each.fingerprint if isinstance(each, _Input) else None for each in self._inputs]

    def _tensors(self) -> list[_Input]:
        return [each for each in self._inputs if isinstance(each, _Input)]

    def _computed(self) -> Tensor:
        if self._values is None:
            with torch.inference_mode(False), torch.no_grad():
                self._values = self.recipe(
                    *(each.tensor if isinstance(each, _Input) else each for each in self._inputs)
                )
                self._doubts = [(each.tensor.shape, each.is_same()) for each in self._tensors()]
            self._inputs = []
        return self._values


class Values:
    """The memory of tensors that are computed late and are aliases of one another.

    Copies in another dtype are made when it is: nobody can write into it before, and a copy must not see what is
    written afterwards.
    """

    def __init__(self, source: Promise | Values, dtype: torch.dtype | None = None) -> None:
        self.lock = source.lock
        self._source: Promise | Values | None = source
        self._dtype = dtype  # of a copy
        self._made: Tensor | None = None
        self._copies: list[weakref.ref[Values]] = []  # those that may not have been made

    def __call__(self) -> Tensor:
        """A plain tensor, the same one each time.

        Raises:
            RuntimeError: the values cannot be computed any more.
        """
        with self.lock:
            if self._source is not None:
                made = self._source()
                if isinstance(self._source, Promise):
                    self._make(made)
            assert self._made is not None
            return self._made

    def copy(self, dtype: torch.dtype) -> Values:
        """The values in another dtype, in memory of their own."""
        with self.lock:
            copy = Values(self, dtype)
            if self._made is None:
                self._copies.append(weakref.ref(copy))
            else:
                copy._make(self._made)
            return copy

    def _make(self, source: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            made = source if self._dtype is None else _CAST(source, dtype=self._dtype)
        for reference in self._copies:
            if copy := reference():
                copy._make(made)
        self._made, self._source, self._copies = made, None, []


def _stream(inputs: Sequence[_Input]) -> torch.cuda.Stream | None:
    """What the inputs are computed on."""
    devices = [each.tensor.device for each in inputs if each.tensor.is_cuda]
    return torch.cuda.current_stream(devices[0]) if devices else None


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What is launched in it runs on a stream, and the current stream waits for it: code that synchronizes with the
    forward pass expects the values to be there."""
    if stream is None or stream == (current := torch.cuda.current_stream(stream.device)):
        yield
        return
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
