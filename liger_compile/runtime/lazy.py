"""LazyTensor: a tensor that is computed on first read, and costs almost nothing until then.

A LazyTensor has a shape, strides, dtype and device, takes part in autograd, and behaves as a torch.Tensor. The first
operation that needs its values computes them, once. Casts, detach() and aliases of a LazyTensor stay lazy. After the
computation it has memory like any other tensor, and shares the memory with its aliases and views.

A LazyTensor may have a Meaning (`meaning`): it answers function calls without the values, and decides which other
operations stay lazy. Function calls arrive at __torch_function__, above autograd; operators at __torch_dispatch__,
below autograd.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from liger_compile.runtime.fingerprint import has_fingerprint
from liger_compile.runtime.memory import Late, Memory, late_result, promised
from liger_compile.runtime.optimizer_steps import keep_before_steps
from liger_compile.runtime.promise import Promise, Recipe, changed, may_change
from liger_compile.runtime.sharding import keep_before_sharding
from liger_compile.torch_internals.dynamo import is_tracing
from liger_compile.torch_internals.operators import COPY, schema_of
from liger_compile.torch_internals.pytree import tree_leaves, tree_map_only
from liger_compile.torch_internals.tensors import DATA, without_memory, without_torch_functions

# Operations that stay lazy, besides a copy in another dtype: aliases of the same memory.
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)

# Operators that make a tensor like their first argument, and read its shape, strides, dtype and device only.
_FACTORIES = frozenset(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        *(
            (f"{kind}_like", "default")
            for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")
        ),
        *((f"new_{kind}", "default") for kind in ("zeros", "ones", "empty", "full", "empty_strided")),
        ("randint_like", "low_dtype"),
    )
)


class Gradient:
    """Whether somebody may read the gradient of a LazyTensor, which no answer of its meaning adds to otherwise."""

    is_read = False


class Meaning(Protocol):
    """What the values of a LazyTensor are, for operations that need no values."""

    @property
    def gradients(self) -> tuple[Gradient, ...]: ...

    def call(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of a function call of which the tensor is an argument, or NotImplemented.

        The call may use staying_lazy().
        """
        ...

    @property
    def report(self) -> Callable[[Any], None]:
        """Takes note of a function that needed the values. It keeps no tensors alive."""
        ...


def lazy(
    recipe: Recipe, like: Tensor, *inputs: Any, meaning: Callable[[Promise], Meaning | None] | None = None
) -> Tensor:
    """Return a tensor whose values and gradients are those of recipe(*inputs), with the current inputs.

    The tensor has the shape, strides, dtype and device of `like`, which may be on the meta device; `meaning` returns
    its meaning.

    The tensor is computed at once where changes of the inputs would not be detected: while a CUDA graph is captured,
    whose replays write into the inputs, and for tensor subclasses.
    """
    num_bytes = like.numel() * like.element_size()
    (result,), promise = _lazies(recipe, (like,), inputs, num_bytes)
    if promise is not None and meaning is not None and isinstance(result, LazyTensor):
        result.meaning = found = meaning(promise)
        if found is not None:
            result.gradients, result.report = found.gradients, found.report
    return result


def lazies(recipe: Recipe, likes: Sequence[Tensor], *inputs: Any, num_bytes: int) -> tuple[Tensor, ...]:
    """Return tensors whose values and gradients are those of recipe(*inputs): the first read computes all of them.

    Args:
        recipe: returns a tuple, of new tensors that share no memory.
        likes: one for each tensor, as in lazy(); a tensor has gradients if its `like` has `requires_grad`.
        num_bytes: the memory that copies of changing inputs may take. Beyond that, the tensors are computed instead.
    """
    return _lazies(recipe, likes, inputs, num_bytes, may_differ=True)[0]


def _lazies(
    recipe: Recipe,
    likes: Sequence[Tensor],
    inputs: Sequence[Any],
    num_bytes: int,
    *,
    may_differ: bool = False,
) -> tuple[tuple[Tensor, ...], Promise | None]:
    """Return the tensors, and their promise if they are late."""
    tensors = [value for value in inputs if may_change(value)]
    if _is_recorded(tensors) or not all(map(has_fingerprint, tensors)):
        return recipe(*inputs), None
    promise = Promise(recipe, num_bytes, inputs)
    without = [may_differ and not like.requires_grad for like in likes]
    device = next(value for value in inputs if isinstance(value, Tensor)).device
    results: Any = _Deferred.apply(promise, likes, without, device, *inputs)
    keep_before_sharding(promise, tensors)
    keep_before_steps(promise)
    return results, promise


def _is_recorded(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing()


class _Deferred(torch.autograd.Function):
    """Connects LazyTensors to the inputs of their promise in autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        promise: Promise,
        likes: Sequence[Tensor],
        without: Sequence[bool],
        device: torch.device,
        *inputs: Any,
    ) -> tuple[LazyTensor, ...]:
        ctx.recipe, ctx.fingerprints = promise.recipe, promise.fingerprints()
        ctx.positions = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.positions))
        ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.set_materialize_grads(False)
        made = tuple(LazyTensor(like, device, promised(promise, at)) for at, like in enumerate(likes))
        ctx.mark_non_differentiable(
            *(one for one, is_without in zip(made, without, strict=True) if is_without)
        )
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of the inputs; with create_graph=True, they are differentiable."""
        if all(gradient is None for gradient in gradients):  # all questions were answered without the values
            return (None,) * (_BEFORE_INPUTS + len(ctx.inputs))
        inputs, wanted = list(ctx.inputs), []
        again = torch.is_grad_enabled()
        for i, saved in zip(ctx.positions, ctx.saved_tensors, strict=True):
            if happened := changed(saved, ctx.fingerprints[i]):
                raise ctx.recipe.refusal("gradients", saved.shape, happened)
            needs_gradient = ctx.needs_input_grad[_BEFORE_INPUTS + i]
            inputs[i] = saved if again else saved.detach().requires_grad_(needs_gradient)
            wanted += [i] if needs_gradient else []
        with torch.enable_grad():
            results = ctx.recipe(*inputs)
        pairs = [pair for pair in zip(results, gradients, strict=True) if pair[1] is not None]
        results, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            results, [inputs[i] for i in wanted], given, create_graph=again, allow_unused=True
        )
        of_inputs: list[Any] = [None] * len(inputs)
        for i, gradient in zip(wanted, found, strict=True):
            of_inputs[i] = gradient
        return (*(None,) * _BEFORE_INPUTS, *of_inputs)


_BEFORE_INPUTS = 4  # arguments of _Deferred before the inputs


class _Absent:
    """Hides an inherited attribute of a class."""

    def __get__(self, _: object, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no such attribute")


class LazyTensor(Tensor):
    """The tensor that lazy() returns. `dense()` is the same tensor with its values in memory."""

    _late: Late | None  # until dense() is called
    _dense_alias: Tensor | None  # after dense(): a plain tensor with the same metadata and memory
    _meaning: Meaning | None
    _writes: int  # in its memory, for which the meaning holds
    _node: Any  # of autograd, for which the meaning holds: a custom function gives its result another one
    gradients: tuple[Gradient, ...]  # also after the values are in memory
    report: Callable[[Any], None] | None
    is_private: bool  # no other code has it, so that nobody writes into it

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, late: Late) -> LazyTensor:
        made = without_memory(cls, like, device)
        made._late, made._dense_alias = late, None
        made._meaning, made._writes, made._node = None, 0, None
        made.gradients, made.report = (), None
        made.is_private = False
        return made

    @property
    def is_waiting(self) -> bool:
        """Whether the values have not been computed."""
        return self._late is not None and self._late.memory.made is None

    @property
    def late(self) -> Late:
        assert self._late is not None, "values that exist are not late"
        return self._late

    @property
    def meaning(self) -> Meaning | None:
        """What the values are; None if that is not known, or if they are in memory."""
        late = self._late
        is_known = late is not None and late.memory.made is None and late.memory.writes == self._writes
        return self._meaning if is_known and self._node is self._current_node() else None

    @meaning.setter
    def meaning(self, value: Meaning | None) -> None:
        if (late := self._late) is not None:
            self._meaning, self._writes = value, late.memory.writes
            self._node = None if value is None else self._current_node()

    def _current_node(self) -> Any:
        with without_torch_functions():  # no reader of the gradient
            return self.grad_fn

    def dense(self) -> Tensor:
        """Return the values as a plain tensor without a gradient; the same tensor on each call.

        Raises:
            RuntimeError: one of the inputs changed before the values were first read.
        """
        if (late := self._late) is not None:
            if self.report is not None and late.memory.made is None:
                self.report(_state.function)
            values = late()
            with _put_lock:
                if self._late is not None:  # another thread may have been here
                    self._put(values.detach())
        assert self._dense_alias is not None
        return self._dense_alias

    def _put(self, dense: Tensor) -> None:
        """Take over the memory and the metadata of a plain tensor. Autograd, hooks and the version are preserved."""
        with without_torch_functions(), torch.inference_mode(False):
            DATA.__set__(self, dense)
        self._dense_alias, self._late, self._meaning, self._node = dense, None, None, None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with without_torch_functions():
            lazies = _lazies_in(args, kwargs)
            if func in _GRADIENT_READERS:
                _note_reader(func, args, kwargs)
            if not any(lazy_tensor.is_waiting for lazy_tensor in lazies):
                return func(*args, **kwargs)
            meanings = (meaning for lazy_tensor in lazies if (meaning := lazy_tensor.meaning) is not None)
            return _called(next(meanings, None), func, args, kwargs)  # pyright: ignore[reportCallIssue]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with without_torch_functions():
            if func in _ALIASES or (func is COPY and kwargs.keys() == {"dtype"}) or _state.stays_lazy:
                result = _deferred(func, args, kwargs)
                if result is not NotImplemented:
                    return result
            if func in _FACTORIES:
                like, *others = args
                return func(_like(like), *others, **{**kwargs, "device": kwargs.get("device") or like.device})
            return _computed(func, args, kwargs)

    # Another compiled function takes the values as its input. It traces a view as a tensor of its own, because the
    # base is no tensor of this class in the trace; a write in the compiled function is a write to the view at its end.

    def _is_view(self) -> bool:
        with without_torch_functions():
            return not is_tracing() and _PLAIN._is_view(self)  # pyright: ignore[reportCallIssue]

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
        with without_torch_functions():
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
        self.dense()
        return self.view_as(self).as_subclass(cls)

    def __deepcopy__(self, memo):
        if self.requires_grad:  # torch raises its error for any tensor that is not a leaf
            return super().__deepcopy__(memo)
        return copy.deepcopy(self.dense(), memo)


class _State(threading.local):
    """What happens in this thread."""

    stays_lazy = False
    function: Any = None  # that was called, for messages


_state = _State()
_put_lock = threading.Lock()


@contextmanager
def staying_lazy() -> Iterator[None]:
    """Operators on lazy tensors stay lazy: each result is a lazy tensor, and a write waits."""
    before, _state.stays_lazy = _state.stays_lazy, True
    try:
        yield
    finally:
        _state.stays_lazy = before


_PLAIN: Any = Tensor  # a type checker takes attributes of the class for their values
_MAKES_LEAF = (_PLAIN.requires_grad_, _PLAIN.requires_grad.__set__)
_GRADIENT_READERS = frozenset(
    (_PLAIN.register_hook, _PLAIN.retain_grad, _PLAIN.grad_fn.__get__, torch.autograd.grad, *_MAKES_LEAF)
)


def _note_reader(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Take note that a call gives access to the gradient of its lazy arguments."""
    if function in _MAKES_LEAF:
        if not args[0].requires_grad:  # it is no function of the hidden state any more
            args[0].meaning = None
        return
    if function is torch.autograd.grad:
        args, kwargs = args[1:], {"inputs": kwargs.get("inputs")}
    elif function is Tensor.register_hook:
        hook = args[1] if len(args) > 1 else kwargs.get("hook")
        if str(getattr(hook, "__module__", "")).startswith("torch.distributed"):
            return  # FSDP2 waits for backward, and reads no gradient here
    for lazy_tensor in _lazies_in(args, kwargs):
        for gradient in lazy_tensor.gradients:
            gradient.is_read = True


@torch.compiler.disable  # where a compiled function breaks its graph, Dynamo would compile this one
def _called(meaning: Meaning | None, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the result of a function call, without the values if the meaning of an argument suffices."""
    before, _state.function = _state.function, function
    try:
        result = NotImplemented if meaning is None else meaning.call(function, args, kwargs)
        return function(*args, **kwargs) if result is NotImplemented else result
    finally:
        _state.function = before


def _computed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the results of an operator on the values of its lazy arguments."""
    lazies = {id(leaf.dense()): leaf for leaf in _lazies_in(args, kwargs)}
    dense_args, dense_kwargs = tree_map_only(LazyTensor, LazyTensor.dense, (args, kwargs))
    result = func(*dense_args, **dense_kwargs)
    if schema_of(func).is_mutable:
        for lazy_tensor in lazies.values():  # its shape or storage may have changed
            DATA.__set__(lazy_tensor, lazy_tensor.dense())
    # In-place operations return the tensor that they wrote into.
    return tree_map_only(Tensor, lambda tensor: lazies.get(id(tensor), tensor), result)


def _deferred(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the results of an operator as lazy tensors, or NotImplemented if a lazy argument has been computed."""
    lazies = _lazies_in(args, kwargs)
    if not all(lazy_tensor.is_waiting for lazy_tensor in lazies):
        return NotImplemented
    waiting = tree_map_only(Tensor, _as_now, (args, kwargs))
    schema = schema_of(func)
    if schema.is_mutable:
        func(_like(args[0]), *args[1:], **kwargs)  # raises the errors of torch
        is_written = args[0].late.write(lambda dense: func(dense, *waiting[0][1:], **waiting[1]))
        return args[0] if is_written and len(lazies) == 1 else NotImplemented
    like = _like_result(func, args, kwargs, lazies[0].device)
    if like is None:
        return NotImplemented
    if any(result.alias_info is not None for result in schema.returns):
        return _views(func, waiting, lazies[0], like)
    late = late_result(lambda plain: func(*plain[0], **plain[1]), waiting)
    return NotImplemented if late is None else _derived(like, lazies, late)


def _like_result(func: Any, args: Any, kwargs: Mapping[str, Any], device: torch.device) -> Any:
    """Return meta tensors like the results of an operator on this device; None if that is not known."""
    like_args, like_kwargs = tree_map_only(Tensor, _like, (args, dict(kwargs)))
    if like_kwargs.get("device") is not None:
        if like_kwargs["device"] != device:
            return None
        like_kwargs["device"] = torch.device("meta")
    try:
        return func(*like_args, **like_kwargs)
    except NotImplementedError:
        return None


def _views(func: Any, waiting: Any, base: LazyTensor, like: Any) -> Any:
    """Return the views that an operator makes of its first argument."""
    (_, *others), kwargs = waiting

    def view(dense: Tensor, at: int | None = None) -> Tensor:
        made = func(dense, *others, **kwargs)
        return made if at is None else made[at]

    # A view of a tensor with a version also has a version, even in inference mode.
    with torch.inference_mode(base.is_inference()):
        if isinstance(like, Tensor):
            return _derived(like, [base], base.late.viewed(view))
        return [
            _derived(each, [base], base.late.viewed(functools.partial(view, at=at)))
            for at, each in enumerate(like)
        ]


def _derived(like: Tensor, sources: Sequence[LazyTensor], late: Late) -> LazyTensor:
    result = LazyTensor(like, sources[0].device, late)
    result.gradients = tuple(dict.fromkeys(each for source in sources for each in source.gradients))
    result.report = next((source.report for source in sources if source.report is not None), None)
    return result


def _lazies_in(*values: Any) -> list[LazyTensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, LazyTensor)]


def _as_now(tensor: Tensor) -> Late | Tensor:
    """Return an argument for later: others may write into a plain tensor before."""
    return tensor.late if isinstance(tensor, LazyTensor) else tensor.detach().clone()


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class NoValuesError(RuntimeError):
    """An operation needed the values of a lazy tensor that only serves to follow operations."""


def never_computed() -> Late:
    """Return the values of a lazy tensor that only serves to follow operations.

    Raises:
        NoValuesError: when an operation needs them.
    """

    def refused() -> Tensor:
        raise NoValuesError("this lazy tensor has no values")

    return Late(Memory(refused))


# Reductions by type: used by the queues of torch.multiprocessing.
def _reduced(tensor: LazyTensor) -> Any:
    tensor.dense()
    return reduce_tensor(tensor.view_as(tensor))


ForkingPickler.register(LazyTensor, _reduced)


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
