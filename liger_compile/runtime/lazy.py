"""LazyTensor: a tensor that is computed when somebody reads it, and costs next to nothing as long as nobody does.

It knows its shape, strides, dtype and device, takes part in autograd, and is a torch.Tensor to everybody: it computes
its values on the first operation that needs them, once. Casts, detach() and aliases of it stay lazy. From then on it
has memory like any other tensor, which it shares with its aliases and views.
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
from torch.utils._pytree import tree_leaves, tree_map_only

from liger_compile.runtime.fingerprint import fingerprint, has_fingerprint
from liger_compile.runtime.optimizer_steps import keep_before_steps
from liger_compile.runtime.promise import CHANGED_UNSEEN, FREED, Promise, Recipe, Values, is_freed
from liger_compile.runtime.sharding import keep_before_sharding

# What stays lazy: the same memory, and a copy of it in another dtype.
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_COPY = torch.ops.aten._to_copy.default

_DATA: Any = torch._C.TensorBase.data  # pyright: ignore[reportAttributeAccessIssue]


def lazy(recipe: Recipe, like: Tensor, *inputs: Any) -> Tensor:
    """A tensor with the shape, strides, dtype and device of `like`, which may be on the meta device, whose values and
    gradients are those of recipe(*inputs), with the inputs as they are now.

    It is computed at once where the inputs could change and nothing would tell: while a CUDA graph is recorded, whose
    replays write into them, and of tensor subclasses.
    """
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    if _is_recorded(tensors) or not all(map(has_fingerprint, tensors)):
        return recipe(*inputs)
    promise = Promise(recipe, like.numel() * like.element_size(), inputs)
    result: Tensor = _Deferred.apply(promise, like, tensors[0].device, *inputs)  # pyright: ignore[reportAssignmentType]
    keep_before_sharding(promise, tensors)
    keep_before_steps(promise)
    return result


def _is_recorded(tensors: Sequence[Tensor]) -> bool:
    return any(each.is_cuda for each in tensors) and torch.cuda.is_current_stream_capturing()


class _Deferred(torch.autograd.Function):
    """Connects a LazyTensor to what it is computed from."""

    @staticmethod
    def forward(ctx: Any, promise: Promise, like: Tensor, device: torch.device, *inputs: Any) -> LazyTensor:
        ctx.recipe, ctx.fingerprints = promise.recipe, promise.fingerprints()
        ctx.positions = [i for i, each in enumerate(inputs) if isinstance(each, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.positions))
        ctx.inputs = [None if isinstance(each, Tensor) else each for each in inputs]
        return LazyTensor(like, device, Values(promise))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """With create_graph=True differentiable once more."""
        inputs, wanted = list(ctx.inputs), []
        again = torch.is_grad_enabled()
        for i, saved in zip(ctx.positions, ctx.saved_tensors, strict=True):
            if is_freed(saved) or not ctx.fingerprints[i].is_same(fingerprint(saved)):
                what = FREED if is_freed(saved) else CHANGED_UNSEEN
                raise ctx.recipe.refusal("gradients", saved.shape, what)
            needs_gradient = ctx.needs_input_grad[3 + i]
            inputs[i] = saved if again else saved.detach().requires_grad_(needs_gradient)
            wanted += [i] if needs_gradient else []
        with torch.enable_grad():
            result = ctx.recipe(*inputs)
        found = torch.autograd.grad(result, [inputs[i] for i in wanted], gradient, create_graph=again)
        gradients: list[Any] = [None] * len(inputs)
        for i, each in zip(wanted, found, strict=True):
            gradients[i] = each
        return (None, None, None, *gradients)


class _Absent:
    """Hides an attribute that a class would inherit."""

    def __get__(self, _: object, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no such attribute")


class LazyTensor(Tensor):
    """Made by lazy(). `dense()` is the same tensor with its values in memory."""

    _promised: Values | None  # until dense() is called
    _dense_alias: (
        Tensor | None
    )  # from then on; a plain tensor with the metadata of this one, in the same memory

    # Everything arrives at __torch_dispatch__, below autograd; results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, values: Values) -> LazyTensor:
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)  # in C++; a null pointer would not tell
        made._promised, made._dense_alias = values, None
        return made

    def dense(self) -> Tensor:
        """The values, without a gradient, as a plain tensor; the same one each time.

        Raises:
            RuntimeError: they had not been read before something changed that they are computed from.
        """
        if (values := self._promised) is not None:
            with values.lock, torch.inference_mode(False):
                if self._promised is not None:  # still, now that no other thread is at it
                    self._put(values().detach())
        assert self._dense_alias is not None
        return self._dense_alias

    def _put(self, dense: Tensor) -> None:
        """Takes over the memory and the metadata of a plain tensor; autograd, hooks and the version stay."""
        _DATA.__set__(self, dense)
        self._promised, self._dense_alias = None, dense

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _ALIASES and (values := args[0]._promised) is not None:
            # An alias of a tensor with a version has one as well, in inference mode too.
            with torch.inference_mode(args[0].is_inference()):
                return LazyTensor(_like(args[0]), args[0].device, values)
        if func is _COPY and kwargs.keys() == {"dtype"} and (values := args[0]._promised) is not None:
            like = _COPY(_like(args[0]), **kwargs)
            return LazyTensor(like, args[0].device, values.copy(like.dtype))
        lazies = {
            id(each.dense()): each for each in tree_leaves((args, kwargs)) if isinstance(each, LazyTensor)
        }
        dense_args, dense_kwargs = tree_map_only(LazyTensor, LazyTensor.dense, (args, kwargs))
        result = func(*dense_args, **dense_kwargs)
        if func._schema.is_mutable:
            for each in lazies.values():  # it may have another shape or storage now
                _DATA.__set__(each, each.dense())
        # Operations in place give back what they wrote into.
        return tree_map_only(Tensor, lambda each: lazies.get(id(each), each), result)

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

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _DATA.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        plain = value.dense() if isinstance(value, LazyTensor) else value
        self._put(plain.detach())

    def __repr__(self, *, tensor_contents=None) -> str:
        """The values as torch prints them; where they cannot be computed, why. Never raises: a debugger calls it."""
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

    __dlpack_c_exchange_api__ = _Absent()  # whose readers call __dlpack__ then

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
        if self.requires_grad:  # as of any tensor that is no leaf: torch has the words for it
            return super().__deepcopy__(memo)
        return copy.deepcopy(self.dense(), memo)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


# By type: the queues of torch.multiprocessing.
ForkingPickler.register(LazyTensor, lambda tensor: reduce_tensor(tensor.view_as(tensor)))


def _with_memory(to_dlpack: Callable[..., Any]) -> Callable[..., Any]:
    """A function that reads pointers, to be called with tensors that have some."""

    @functools.wraps(to_dlpack)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for each in (*args, *kwargs.values()):
            if isinstance(each, LazyTensor):
                each.dense()
        return to_dlpack(*args, **kwargs)

    return wrapped


# The one function of torch's that asks neither the class nor the dispatcher before it reads a tensor's memory.
_dlpack: Any = torch.utils.dlpack
_dlpack.to_dlpack = torch.to_dlpack = _with_memory(_dlpack.to_dlpack)
