"""LazyTensor: a tensor that is computed when somebody reads it, and costs nothing as long as nobody does.

It knows its shape, strides, dtype and device, takes part in autograd, and is a torch.Tensor to everybody: it computes
its values on the first operation that needs them, once. Casts, detach() and aliases of it stay lazy.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map_only

# What stays lazy: the same memory, and a copy of it in another dtype.
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_COPY = torch.ops.aten._to_copy.default


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


def lazy(recipe: Recipe, like: Tensor, *inputs: Any) -> Tensor:
    """A tensor with the shape, strides, dtype and device of `like`, which may be on the meta device, whose values and
    gradients are those of recipe(*inputs)."""
    device = next(each.device for each in inputs if isinstance(each, Tensor))
    result: Tensor = _Deferred.apply(recipe, like, device, *inputs)  # pyright: ignore[reportAssignmentType]
    return result


class _Deferred(torch.autograd.Function):
    """Connects a LazyTensor to what it is computed from."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, like: Tensor, device: torch.device, *inputs: Any) -> LazyTensor:
        ctx.recipe, ctx.positions = recipe, [i for i, each in enumerate(inputs) if isinstance(each, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.positions))
        ctx.inputs = [None if isinstance(each, Tensor) else each for each in inputs]
        return LazyTensor(like, device, _Promise(recipe, inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, wanted = list(ctx.inputs), []
        for i, saved in zip(ctx.positions, ctx.saved_tensors, strict=True):
            inputs[i] = saved.detach().requires_grad_(ctx.needs_input_grad[3 + i])
            wanted += [i] if ctx.needs_input_grad[3 + i] else []
        with torch.enable_grad():
            result = ctx.recipe(*inputs)
        gradients: list[Any] = [None] * len(inputs)
        for i, each in zip(
            wanted, torch.autograd.grad(result, [inputs[i] for i in wanted], gradient), strict=True
        ):
            gradients[i] = each
        return (None, None, None, *gradients)


class _Promise:
    """The values of recipe(*inputs), computed on the first call."""

    def __init__(self, recipe: Recipe, inputs: Sequence[Any]) -> None:
        self._recipe = recipe
        self._inputs: list[Any] = tree_map_only(Tensor, torch.Tensor.detach, list(inputs))
        self._versions = [_version(each) for each in inputs]
        self._values: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._values is None:
            self._refuse_changes()
            with torch.no_grad():
                self._values = self._recipe(*self._inputs)
            self._inputs = []
        return self._values

    def _refuse_changes(self) -> None:
        for each, version in zip(self._inputs, self._versions, strict=True):
            if not isinstance(each, Tensor):
                continue
            what = None
            if _version(each) != version:
                what = "was changed in place (by an optimizer's step, say)"
            elif each.numel() and not each.untyped_storage().nbytes():
                what = "was freed (as sharding frees gathered weights)"
            if what:
                raise RuntimeError(
                    f"the {self._recipe.name} had not been computed when they were first read, and a tensor of shape "
                    f"{tuple(each.shape)} that they are computed from {what} in between; {self._recipe.advice}"
                )


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


class LazyTensor(Tensor):
    """Made by lazy(). `dense()` is the same tensor with its values in memory."""

    _promise: Callable[[], Tensor]
    _copies: list[weakref.ref[_Copy]]  # not made yet, perhaps; those of aliases too

    # Everything arrives at __torch_dispatch__, below autograd; results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, promise: Callable[[], Tensor]) -> LazyTensor:
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        made._promise, made._copies = promise, []
        return made

    def dense(self) -> Tensor:
        """The values, without a gradient, as a plain tensor; the same one each time."""
        return self._promise()

    def _make_copies(self) -> None:
        for reference in self._copies:
            if values := reference():
                values()
        self._copies.clear()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _ALIASES:
            (source,) = args
            alias = LazyTensor(_like(source), source.device, source._promise)
            alias._copies = source._copies
            return alias
        if func is _COPY and kwargs.keys() <= {"dtype"}:
            (source,) = args
            values = _Copy(source._promise, kwargs)
            source._copies.append(weakref.ref(values))
            return LazyTensor(_COPY(_like(source), **kwargs), source.device, values)
        if func._schema.is_mutable:  # a copy from before the write has the values from before it
            for source in tree_leaves(args):
                if isinstance(source, LazyTensor):
                    source._make_copies()
        dense_args, dense_kwargs = tree_map_only(LazyTensor, LazyTensor.dense, (args, kwargs))
        result = func(*dense_args, **dense_kwargs)
        # Operations in place give back what they wrote into.
        written = [
            a for a, d in zip(args, dense_args, strict=True) if isinstance(a, LazyTensor) and d is result
        ]
        return written[0] if written else result

    # Another compiled function takes the values as its input.

    @property
    def _dense(self) -> Tensor:
        return self.dense()

    def __tensor_flatten__(self):
        return ["_dense"], None

    @staticmethod
    def __tensor_unflatten__(inner_tensors, meta, outer_size, outer_stride):
        return inner_tensors["_dense"]

    # What torch does not dispatch, because it reads memory.

    def _leaf(self) -> Tensor:
        return self.dense().detach().requires_grad_(self.requires_grad)

    def __repr__(self, *, tensor_contents=None) -> str:
        return repr(self.dense())

    def tolist(self):
        return self.dense().tolist()

    def numpy(self, *, force: bool = False):
        return self._leaf().numpy(force=force)

    def __array__(self, dtype=None):
        return self._leaf().__array__(dtype)

    def __dlpack__(self, *args, **kwargs):
        return self._leaf().__dlpack__(*args, **kwargs)

    def data_ptr(self) -> int:
        return self.dense().data_ptr()

    def untyped_storage(self):
        return self.dense().untyped_storage()

    def __reduce_ex__(self, protocol):
        return self._leaf().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if self.requires_grad:  # as of any tensor that is no leaf: torch has the words for it
            return super().__deepcopy__(memo)
        return copy.deepcopy(self.dense(), memo)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Copy:
    """The values of `source` in another dtype, when they are needed."""

    def __init__(self, source: Callable[[], Tensor], kwargs: dict[str, Any]) -> None:
        self._source: Callable[[], Tensor] | None = source
        self._kwargs = kwargs
        self._values: Any = None

    def __call__(self) -> Tensor:
        if self._source is not None:
            self._values = _COPY(self._source(), **self._kwargs)
            self._source = None
        return self._values
