"""LazyTensor: a tensor that is computed on first read, and costs almost nothing until then.

A LazyTensor has a shape, strides, dtype and device, takes part in autograd, and behaves as a torch.Tensor. The first
operation that needs its values computes them, once. Casts, detach() and aliases of a LazyTensor stay lazy. After the
computation it has memory like any other tensor, and shares the memory with its aliases and views.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from liger_compile.runtime.fingerprint import fingerprint, has_fingerprint
from liger_compile.runtime.optimizer_steps import keep_before_steps
from liger_compile.runtime.promise import CHANGED_UNSEEN, FREED, Promise, Recipe, Values, is_freed
from liger_compile.runtime.sharding import keep_before_sharding
from liger_compile.torch_internals.operators import COPY, schema_of
from liger_compile.torch_internals.pytree import tree_leaves, tree_map_only
from liger_compile.torch_internals.tensors import DATA, no_torch_function, without_memory

# Operations that stay lazy, besides a copy in another dtype: aliases of the same memory.
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def lazy(recipe: Recipe, like: Tensor, *inputs: Any) -> Tensor:
    """Return a tensor whose values and gradients are those of recipe(*inputs), with the current inputs.

    The tensor has the shape, strides, dtype and device of `like`, which may be on the meta device.

    The tensor is computed at once where changes of the inputs would not be detected: while a CUDA graph is captured,
    whose replays write into the inputs, and for tensor subclasses.
    """
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if _is_recorded(tensors) or not all(map(has_fingerprint, tensors)):
        return recipe(*inputs)
    promise = Promise(recipe, like.numel() * like.element_size(), inputs)
    result: Tensor = _Deferred.apply(promise, like, tensors[0].device, *inputs)  # pyright: ignore[reportAssignmentType]
    keep_before_sharding(promise, tensors)
    keep_before_steps(promise)
    return result


def _is_recorded(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing()


class _Deferred(torch.autograd.Function):
    """Connects a LazyTensor to its inputs in autograd."""

    @staticmethod
    def forward(ctx: Any, promise: Promise, like: Tensor, device: torch.device, *inputs: Any) -> LazyTensor:
        ctx.recipe, ctx.fingerprints = promise.recipe, promise.fingerprints()
        ctx.positions = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.positions))
        ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        return LazyTensor(like, device, Values(promise))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of the inputs; with create_graph=True, they are differentiable."""
        inputs, wanted = list(ctx.inputs), []
        again = torch.is_grad_enabled()
        for i, saved in zip(ctx.positions, ctx.saved_tensors, strict=True):
            if is_freed(saved) or not ctx.fingerprints[i].is_same(fingerprint(saved)):
                happened = FREED if is_freed(saved) else CHANGED_UNSEEN
                raise ctx.recipe.refusal("gradients", saved.shape, happened)
            needs_gradient = ctx.needs_input_grad[3 + i]
            inputs[i] = saved if again else saved.detach().requires_grad_(needs_gradient)
            wanted += [i] if needs_gradient else []
        with torch.enable_grad():
            result = ctx.recipe(*inputs)
        found = torch.autograd.grad(result, [inputs[i] for i in wanted], gradient, create_graph=again)
        gradients: list[Any] = [None] * len(inputs)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return (None, None, None, *gradients)


class _Absent:
    """Hides an inherited attribute of a class."""

    def __get__(self, _: object, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no such attribute")


class LazyTensor(Tensor):
    """The tensor that lazy() returns. `dense()` is the same tensor with its values in memory."""

    _promised: Values | None  # until dense() is called
    _dense_alias: Tensor | None  # after dense(): a plain tensor with the same metadata and memory

    # All operations arrive at __torch_dispatch__, below autograd. Their results are plain tensors.
    __torch_function__ = no_torch_function

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, values: Values) -> LazyTensor:
        made = without_memory(cls, like, device)
        made._promised, made._dense_alias = values, None
        return made

    def dense(self) -> Tensor:
        """Return the values as a plain tensor without a gradient; the same tensor on each call.

        Raises:
            RuntimeError: one of the inputs changed before the values were first read.
        """
        if (values := self._promised) is not None:
            with values.lock, torch.inference_mode(False):
                if self._promised is not None:  # check again under the lock
                    self._put(values().detach())
        assert self._dense_alias is not None
        return self._dense_alias

    def _put(self, dense: Tensor) -> None:
        """Take over the memory and the metadata of a plain tensor. Autograd, hooks and the version are preserved."""
        DATA.__set__(self, dense)
        self._promised, self._dense_alias = None, dense

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _ALIASES and (values := args[0]._promised) is not None:
            # An alias of a tensor with a version also has a version, even in inference mode.
            with torch.inference_mode(args[0].is_inference()):
                return LazyTensor(_like(args[0]), args[0].device, values)
        if func is COPY and kwargs.keys() == {"dtype"} and (values := args[0]._promised) is not None:
            like = COPY(_like(args[0]), **kwargs)
            return LazyTensor(like, args[0].device, values.copy(like.dtype))
        lazies = {
            id(leaf.dense()): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyTensor)
        }
        dense_args, dense_kwargs = tree_map_only(LazyTensor, LazyTensor.dense, (args, kwargs))
        result = func(*dense_args, **dense_kwargs)
        if schema_of(func).is_mutable:
            for lazy_tensor in lazies.values():  # its shape or storage may have changed
                DATA.__set__(lazy_tensor, lazy_tensor.dense())
        # In-place operations return the tensor that they wrote into.
        return tree_map_only(Tensor, lambda tensor: lazies.get(id(tensor), tensor), result)

    # Another compiled function takes the values as its input.

    @property
    def _dense(self) -> Tensor:
        return self.dense()

    def __tensor_flatten__(self):
        return ["_dense"], None

    @staticmethod
    def __tensor_unflatten__(inner_tensors, meta, outer_size, outer_stride):
        return inner_tensors["_dense"]

    # These functions read memory and do not go through torch's dispatcher.

    def _leaf(self) -> Tensor:
        return self.dense().detach().requires_grad_(self.requires_grad)

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return DATA.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        plain = value.dense() if isinstance(value, LazyTensor) else value
        self._put(plain.detach())

    def __repr__(self, *, tensor_contents=None) -> str:
        """Return the values as torch prints them, or the error if they cannot be computed.

        Never raises, because a debugger calls it.
        """
        try:
            values = repr(self.dense()).removesuffix(")")
        except Exception as error:
            values = f"tensor(<{error}>, size={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}'"
        grad = f", grad_fn=<{type(self.grad_fn).__name__}>" if self.grad_fn is not None else ""
        return f"{values}{grad})"

    def tolist(self):
        return self.dense().tolist()

    def numpy(self, *, force: bool = False):
        return self._leaf().numpy(force=force)

    def __array__(self, dtype=None):
        return self._leaf().__array__(dtype)

    def __dlpack__(self, *args, **kwargs):
        return self._leaf().__dlpack__(*args, **kwargs)

    __dlpack_c_exchange_api__ = _Absent()  # readers then fall back to __dlpack__

    def data_ptr(self) -> int:
        return self.dense().data_ptr()

    def const_data_ptr(self) -> int:
        return self.dense().data_ptr()

    def untyped_storage(self):
        return self.dense().untyped_storage()

    def __reduce_ex__(self, protocol):
        return self._leaf().__reduce_ex__(protocol)

    def as_subclass(self, cls):
        return self.view_as(self).as_subclass(cls)

    def __deepcopy__(self, memo):
        if self.requires_grad:  # torch raises its error for any tensor that is not a leaf
            return super().__deepcopy__(memo)
        return copy.deepcopy(self.dense(), memo)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


# Reductions by type: used by the queues of torch.multiprocessing.
ForkingPickler.register(LazyTensor, lambda tensor: reduce_tensor(tensor.view_as(tensor)))


def _with_memory(to_dlpack: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that reads pointers, so that lazy arguments have memory before the call."""

    @functools.wraps(to_dlpack)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, LazyTensor):
                argument.dense()
        return to_dlpack(*args, **kwargs)

    return wrapped


# The only function in torch that reads a tensor's memory without asking the class or the dispatcher.
_dlpack: Any = torch.utils.dlpack
_dlpack.to_dlpack = torch.to_dlpack = _with_memory(_dlpack.to_dlpack)
