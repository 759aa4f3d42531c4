"""Late computation of values from the inputs at the time of the promise.

The result is these values or an error, whatever happens to the inputs in between.

    Recipe   computes tensors from other values
    Promise  recipe(*inputs), for inputs that others may write into before the computation

Detectable writers (`optimizer_steps.py`, `sharding.py`) call keep() before they change an input. Other changes are
detected when the values are needed, by the input's version and by its fingerprint.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_compile.runtime.fingerprint import Fingerprint, fingerprint
from liger_compile.torch_internals.tensors import storage_of, version_of


@dataclass(frozen=True)
class Recipe:
    """A computation of tensors from other values.

    Args:
        function: takes plain tensors and numbers; returns one tensor, or a tuple of tensors.
        name: the user's name for the tensors, for messages: "logits".
        advice: the remedy if the tensors can no longer be computed, a sentence.
        autocast: (device type, dtype) of the autocast to run under; None for none.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    name: str
    advice: str
    autocast: tuple[str, torch.dtype] | None = None

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Return the tensors."""
        with contextlib.ExitStack() as stack:
            if self.autocast:
                stack.enter_context(torch.autocast(self.autocast[0], dtype=self.autocast[1]))
            else:
                for device in {value.device.type for value in inputs if isinstance(value, Tensor)}:
                    stack.enter_context(torch.autocast(device, enabled=False))
            made = self.function(*inputs)
        return made if isinstance(made, tuple) else (made,)

    def refusal(self, wanted: str, shape: Sequence[int], happened: str) -> RuntimeError:
        """Return the error for a changed input of this shape; `wanted` is "values" or "gradients"."""
        subject = f"the {self.name}" if wanted == "values" else f"the {wanted} of the {self.name}"
        return RuntimeError(
            f"{subject} cannot be computed any more: a tensor of shape {tuple(shape)} that they depend on {happened} "
            f"before they were needed; {self.advice}"
        )


CHANGED_IN_PLACE = "was changed in place (for example by an optimizer's step)"
CHANGED_UNSEEN = (
    "was changed (through another output that shares its memory, .data, NumPy, a raw pointer, or by an optimizer that "
    "has no step hooks)"
)
FREED = "was freed (as sharding frees gathered weights)"
OVERWRITTEN = "was overwritten by the next replay of a CUDA graph"


def is_freed(tensor: Tensor) -> bool:
    """Return whether the storage has become too small for the tensor."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + sum(steps) + 1) * tensor.element_size()
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() < end


def is_overwritten(tensor: Tensor) -> bool:
    """Return whether torch refuses access to the memory, as to results of a CUDA graph after the next replay."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


def lost(tensor: Tensor) -> str | None:
    """Return why the tensor has no values any more, if it has none."""
    if is_freed(tensor):
        return FREED
    return OVERWRITTEN if is_overwritten(tensor) else None


def changed(tensor: Tensor, before: Fingerprint | None) -> str | None:
    """Return the change of an input since its fingerprint was taken, if there is one."""
    if happened := lost(tensor):
        return happened
    return None if before is None or before.is_same(fingerprint(tensor)) else CHANGED_UNSEEN


def may_change(value: Any) -> bool:
    """Return whether others may write into an input."""
    return isinstance(value, Tensor) and not getattr(value, "is_private", False)


class _Input:
    """A tensor that others may write into, and its original state."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.fingerprint = fingerprint(self.tensor)
        self._version = version_of(self.tensor)
        self.is_copy = False
        self._lost: str | None = None  # the change, if one happened before a copy existed

    def what_happened(self) -> str | None:
        """Return the change, if it is detectable without reading the values."""
        if self._lost:
            return self._lost
        if happened := lost(self.tensor):
            return happened
        return None if version_of(self.tensor) == self._version else CHANGED_IN_PLACE

    def is_same(self) -> Tensor:
        """Return whether the values are unchanged, as bool []."""
        return self.fingerprint.is_same(fingerprint(self.tensor))

    def keep(self, copies: dict[Any, Tensor]) -> None:
        """Replace the tensor by a copy, taken from `copies` if present."""
        self._lost = self.what_happened()
        if self._lost is None:
            mine = self.tensor
            key = (storage_of(mine), mine.storage_offset(), mine.shape, mine.stride(), mine.dtype)
            if key not in copies:
                copies[key] = mine.clone()
            self.tensor, self.is_copy = copies[key], True
            self._version = version_of(self.tensor)


class Promise:
    """The values of recipe(*inputs), with the inputs as they are now.

    Args:
        recipe: the computation.
        num_bytes: the memory that the values may take, in place of copies of inputs that are about to change.
        inputs: tensors that have fingerprints, and other values. A tensor that has `is_private` is no input that others
            may write into.
    """

    def __init__(self, recipe: Recipe, num_bytes: int, inputs: Sequence[Any]) -> None:
        self.lock = threading.RLock()
        self.recipe, self._num_bytes = recipe, num_bytes
        self._inputs = [_Input(value) if may_change(value) else value for value in inputs]
        self._stream = _stream(self._tensors())
        self._values: tuple[Tensor, ...] | None = None
        # The shape of each input, and whether its values were unchanged when the result was computed, as bool [].
        self._doubts: list[tuple[torch.Size, Tensor]] = []

    def __call__(self, at: int = 0) -> Tensor:
        """Return one of the values without a gradient; the same tensor on each call.

        Raises:
            RuntimeError: an input had changed.
        """
        with self.lock, _on(self._stream):
            if self._values is None:
                for tensor in self._tensors():
                    if happened := tensor.what_happened():
                        raise self.recipe.refusal("values", tensor.tensor.shape, happened)
            values = self._computed()
            for shape, is_same in self._doubts:
                if not is_same:
                    raise self.recipe.refusal("values", shape, CHANGED_UNSEEN)
            self._doubts = []
            return values[at]

    def keep(self, storages: Container[int | None], copies: dict[Any, Tensor]) -> None:
        """Make the values independent of the inputs in these storages, which are about to change.

        This copies these inputs or computes the values, whichever needs less memory. Nothing waits for a GPU. If there
        is not enough memory for either, the change is detected later.

        Args:
            storages: as storage_of() returns them.
            copies: existing copies; new copies are added.
        """
        with self.lock, _on(self._stream), contextlib.suppress(torch.OutOfMemoryError):
            endangered = [source for source in self._tensors() if storage_of(source.tensor) in storages]
            is_lost = any(source.what_happened() for source in self._tensors())
            if not is_lost and self._num_bytes < sum(source.tensor.nbytes for source in endangered):
                self._computed()
            else:
                for source in endangered:
                    source.keep(copies)

    def is_as_promised(self) -> bool:
        """Return whether no values have been computed, and all inputs are those of the promise, unchanged."""
        with self.lock, _on(self._stream):
            inputs = self._tensors()
            is_original = bool(inputs) and not any(
                source.is_copy or source.what_happened() for source in inputs
            )
            return is_original and all(source.is_same() for source in inputs)

    def on_its_stream(self) -> contextlib.AbstractContextManager[None]:
        """Launch the block's work on the stream on which the inputs are computed; the current stream waits for it."""
        return _on(self._stream)

    def storages(self) -> set[int | None]:
        """Return the storages that the values are still to be computed from, as storage_of() returns them."""
        return {storage_of(source.tensor) for source in self._tensors()}

    def fingerprints(self) -> list[Fingerprint | None]:
        """Return the original fingerprints of the inputs; None for inputs that are not tensors."""
        return [source.fingerprint if isinstance(source, _Input) else None for source in self._inputs]

    def _tensors(self) -> list[_Input]:
        return [source for source in self._inputs if isinstance(source, _Input)]

    def _computed(self) -> tuple[Tensor, ...]:
        if self._values is None:
            with torch.inference_mode(False), torch.no_grad():
                self._values = self.recipe(
                    *(source.tensor if isinstance(source, _Input) else source for source in self._inputs)
                )
                self._doubts = [(source.tensor.shape, source.is_same()) for source in self._tensors()]
            self._inputs = []
        return self._values


def _stream(inputs: Sequence[_Input]) -> torch.cuda.Stream | None:
    """Return the stream on which the inputs are computed."""
    devices = [source.tensor.device for source in inputs if source.tensor.is_cuda]
    return torch.cuda.current_stream(devices[0]) if devices else None


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Launch the block's work on `stream`, and make the current stream wait for it.

    Code that synchronizes with the forward pass expects the values to be complete.
    """
    if stream is None or stream == (current := torch.cuda.current_stream(stream.device)):
        yield
        return
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
