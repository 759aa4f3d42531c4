"""Operations on lazy logits that stay lazy: each result has a source made of the sources of the arguments.

A handler takes (function, args, kwargs) of a call, and returns its result, or NotImplemented. The result is always a
lazy tensor that can be computed; if its source is not known, the next operation computes it.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_compile.lazy_logits.source import PRODUCTS, Source, one_number
from liger_compile.ops.precision import accumulation_dtype
from liger_compile.runtime.lazy import LazyTensor, staying_lazy

Handler = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]


def functions(*names: str) -> Iterator[Any]:
    """Yield the functions of these names in torch, as methods of a tensor, and in torch.nn.functional."""
    for name in names:
        for place in (torch, Tensor, F):
            if (found := getattr(place, name, None)) is not None:
                yield found


def source_of(value: Any) -> Source | None:
    """Return the source of a lazy tensor; None for anything else."""
    meaning = value.meaning if isinstance(value, LazyTensor) else None
    return meaning if isinstance(meaning, Source) else None


def _lazily(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with staying_lazy():
        return function(*args, **kwargs)


def _meant(result: Any, source: Source | None) -> Any:
    """Return the result of a call with its source.

    A view that is made without gradients claims to require them, and is a leaf.
    """
    if isinstance(result, LazyTensor):
        has_gradients = result.requires_grad and not result.is_leaf
        result.meaning = source if source is None or has_gradients else source.without_gradients()
    return result


# Rows.


def in_order(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Another shape of the same rows in the same order: view, reshape, contiguous, ..."""
    if (source := source_of(args[0])) is None:
        return NotImplemented
    classes, dtype = args[0].shape[-1], args[0].dtype
    result = _lazily(function, args, kwargs)
    is_same = (
        result.dim() > 0
        and result.shape[-1] == classes > 1
        and result.numel() == source.rows.numel() * classes
    )
    if result.dtype is not dtype or not is_same:
        return _meant(result, None)
    return _meant(result, source.in_shape(result.shape[:-1]))


def of_rows(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A view of some rows, or of all rows in another order: narrow, split, transpose, ..."""
    if (source := source_of(args[0])) is None or source.teacher is not None:
        return NotImplemented
    rows = _like_rows(source, lambda stand_in: function(stand_in, *args[1:], **kwargs))
    result = _lazily(function, args, kwargs)
    if isinstance(result, Tensor):
        return _meant(result, None if rows is None else replace(source, rows=rows))
    for at, each in enumerate(result):
        _meant(each, None if rows is None else replace(source, rows=rows[at]))
    return result


def _like_rows(source: Source, view: Callable[[Tensor], Any]) -> Any:
    """Return the rows of a view, or of a list of views; None if it does not leave the classes whole, and last."""
    classes = source.classes
    if classes < 2:
        return None
    found = view(source.rows.unsqueeze(-1).expand(*source.rows.shape, classes))
    parts = [found] if isinstance(found, Tensor) else list(found)
    if not all(part.dim() and part.shape[-1] == classes and part.stride(-1) == 0 for part in parts):
        return None
    return parts[0][..., 0] if isinstance(found, Tensor) else [part[..., 0] for part in parts]


def iterated(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The rows of the first dimension, one after the other."""
    if args[0].dim() == 0:
        return NotImplemented
    found = of_rows(Tensor.unbind, (args[0], 0), {})
    return found if found is NotImplemented else iter(found)


def indexed(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Rows by integers, slices, tensors of indices or a mask; and a range of classes."""
    lazy, index = args
    if (
        (source := source_of(lazy)) is None
        or source.teacher is not None
        or (entries := entries_of(index, lazy.dim())) is None
    ):
        return NotImplemented
    *of_lead, of_classes = entries
    if not isinstance(of_classes, slice):
        return NotImplemented
    start, stop, step = of_classes.indices(lazy.shape[-1])
    if step != 1 or stop - start < 2:
        return NotImplemented
    is_part = (start, stop) != (0, lazy.shape[-1])
    if is_part and source.kind != "scores":
        return NotImplemented
    rows = source.rows[tuple(each.cpu() if isinstance(each, Tensor) else each for each in of_lead)]
    result = _lazily(function, (lazy, (*of_lead, of_classes)), {})
    classes = {"start": source.start + start, "stop": source.start + stop}
    return _meant(result, replace(source, rows=rows, **classes))


def entries_of(index: Any, dims: int) -> list[Any] | None:
    """Return one entry for each dimension, and None for new ones; a mask becomes indices. None if that fails."""
    given: list[Any] = []
    for entry in index if isinstance(index, tuple) else (index,):
        entry = torch.tensor(entry) if isinstance(entry, list) else entry
        if isinstance(entry, (slice, type(None), type(...))) or type(entry) is int:
            given.append(entry)
        elif type(entry) is not Tensor or not (
            entry.dim() and entry.dtype in (torch.bool, torch.int64, torch.int32)
        ):
            return None
        else:
            given.extend(entry.nonzero(as_tuple=True) if entry.dtype is torch.bool else (entry,))
    taken = sum(entry is not None and entry is not ... for entry in given)
    if taken > dims or sum(entry is ... for entry in given) > 1:
        return None
    whole = [slice(None)] * (dims - taken)
    at = next((i for i, entry in enumerate(given) if entry is ...), None)
    return [*given, *whole] if at is None else [*given[:at], *whole, *given[at + 1 :]]


# Values.


def cast(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Another dtype."""
    if (source := source_of(args[0])) is None:
        return NotImplemented
    before = args[0].dtype
    result = function(*args, **kwargs)  # a cast stays lazy by itself
    if result is args[0] or source_of(result) is source:
        return result
    if not isinstance(result, LazyTensor) or not result.is_waiting:
        return result
    after = result.dtype
    if not after.is_floating_point or accumulation_dtype(after) is not accumulation_dtype(source.head.dtype):
        return result  # more precise than the answers, or less than a number
    is_exact = source.is_exact and torch.promote_types(before, after) is after
    return _meant(result, replace(source, is_exact=is_exact))


def scaled(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A multiple, by a number; or a product of two tensors about the same scores. In place too."""
    if len(args) == 1 and kwargs.keys() == {"other"}:
        args, kwargs = (*args, kwargs["other"]), {}
    if len(args) != 2 or kwargs:
        return NotImplemented
    lazy, other = args if isinstance(args[0], LazyTensor) else args[::-1]
    divides = function in _DIVISIONS
    if isinstance(other, Tensor):
        return NotImplemented if divides else _product(function, args)
    is_number = isinstance(other, numbers.Real) and not isinstance(other, bool)
    if (
        not is_number
        or (source := source_of(lazy)) is None
        or float(other) in (0.0, float("inf"), -float("inf"))
    ):
        return NotImplemented
    if other != other or (divides and lazy is not args[0]):
        return NotImplemented
    if function in _IN_PLACE and any(step == 0 for step in lazy.stride()):
        return NotImplemented  # torch refuses to write into repeated elements
    result = _lazily(function, args, {})
    # A write without gradients changes the values, and not the gradients.
    is_whole = function not in _IN_PLACE or torch.is_grad_enabled() or not lazy.requires_grad
    if is_whole and isinstance(result, LazyTensor) and result.is_waiting:
        return _meant(result, source.times(1 / float(other) if divides else float(other), lazy.dtype))
    return result


def _product(function: Any, args: Sequence[Any]) -> Any:
    one, two = map(source_of, args)
    if function in _IN_PLACE or one is None or two is None:
        return NotImplemented
    # The answers to questions about a product have the gradients of both factors.
    if not one.is_alike(two) or args[0].requires_grad is not args[1].requires_grad:
        pair = args if one.kind == "log_softmax" else args[::-1]
        return _elements(function, args, {}, pair, ("log_softmax", "softmax"), "cross")
    kind = PRODUCTS.get(frozenset((one.kind, two.kind)))
    if kind is None or args[0].dtype is not args[1].dtype or (one.kind == two.kind != "softmax"):
        return NotImplemented
    # The scale of scores is in their form, which both share.
    factor = one_number(one.factor, two.factor, args[0].dtype)
    made = None if factor is None else replace(one, kind=kind, factor=factor)
    return _meant(_lazily(function, args, {}), made)


def divergence(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """F.kl_div without a reduction, of two distributions over the classes; one of them has no gradient."""
    if (
        len(args) != 2
        or kwargs.get("reduction") != "none"
        or not kwargs.keys() <= {"reduction", "log_target"}
    ):
        return NotImplemented
    kinds = "log_softmax", "log_softmax" if kwargs.get("log_target", False) else "softmax"
    if args[1].requires_grad:
        return _elements(function, args, kwargs, args[::-1], kinds[::-1], "reverse")
    return _elements(function, args, kwargs, args, kinds, "forward")


def _elements(
    function: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    pair: Sequence[Any],
    kinds: Sequence[str],
    which: str,
) -> Any:
    """Return the elements of a divergence of `pair`, student and teacher."""
    student, teacher = map(source_of, pair)
    if student is None or teacher is None or (student.kind, teacher.kind) != tuple(kinds):
        return NotImplemented
    is_alike = student.classes == teacher.classes and pair[0].shape == pair[1].shape
    is_alike = is_alike and pair[0].device == pair[1].device and pair[0].dtype is pair[1].dtype
    factor = one_number(student.factor, teacher.factor, pair[0].dtype)
    if (
        factor is None
        or not is_alike
        or pair[1].requires_grad
        or (which != "cross" and (student.factor, teacher.factor) != (1, 1))
    ):
        return NotImplemented
    made = replace(student, kind="divergence", divergence=which, teacher=teacher, factor=factor)
    return _meant(_lazily(function, args, kwargs), made)


def negated(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if (source := source_of(args[0])) is None:
        return NotImplemented
    return _meant(_lazily(function, args, kwargs), source.times(-1.0, torch.float32))


def capped(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """tanh, of scores that are not capped yet."""
    source = source_of(args[0])
    if source is None or source.kind != "scores" or source.is_capped:
        return NotImplemented
    is_exact = source.is_exact and accumulation_dtype(args[0].dtype) is args[0].dtype
    made = replace(source, inner=source.inner * source.outer, outer=1.0, is_capped=True, is_exact=is_exact)
    return _meant(_lazily(function, args, kwargs), made)


def normalized(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """log_softmax or softmax over the classes."""
    source, dims = source_of(args[0]), args[0].dim()
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if source is None or source.kind != "scores" or dim not in (-1, dims - 1):
        return NotImplemented
    kind = "log_softmax" if function in _LOG_SOFTMAX else "softmax"
    result = _lazily(function, args, kwargs)
    if accumulation_dtype(result.dtype) is not accumulation_dtype(source.head.dtype):
        return _meant(result, None)
    is_exact = source.is_exact and accumulation_dtype(result.dtype) is result.dtype
    return _meant(result, replace(source, kind=kind, is_exact=is_exact))


def exponential(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """exp(log_softmax) is softmax."""
    source = source_of(args[0])
    if source is None or source.kind != "log_softmax" or source.factor != 1:
        return NotImplemented
    return _meant(_lazily(function, args, kwargs), replace(source, kind="softmax"))


_LOG_SOFTMAX = frozenset(functions("log_softmax"))
_IN_PLACE = frozenset((*functions("div_", "mul_"), Tensor.__itruediv__, Tensor.__imul__))
_DIVISIONS = frozenset(
    (*functions("div", "true_divide", "div_"), Tensor.__truediv__, Tensor.__itruediv__, operator.truediv)
)

_TABLE: Mapping[Handler, Sequence[Any]] = {
    in_order: [
        *functions(
            "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"
        ),
        *functions("contiguous", "detach"),  # clone() is computed: people keep values by it
    ],
    of_rows: [
        *functions("narrow", "select", "split", "chunk", "unbind", "transpose", "permute", "movedim"),
        *functions("swapaxes", "swapdims", "expand", "tensor_split"),
    ],
    iterated: [Tensor.__iter__],
    indexed: [Tensor.__getitem__],
    cast: [*functions("to", "float", "half", "bfloat16", "type", "type_as")],
    scaled: [
        *functions("mul", "multiply", "div", "true_divide", "mul_", "div_"),
        *(Tensor.__mul__, Tensor.__rmul__, Tensor.__truediv__, Tensor.__imul__, Tensor.__itruediv__),
    ],
    negated: [*functions("neg", "negative"), Tensor.__neg__],
    capped: [*functions("tanh")],
    normalized: [*functions("log_softmax", "softmax")],
    exponential: [*functions("exp")],
    divergence: [F.kl_div],
}
HANDLERS: Mapping[Any, Handler] = {
    function: handler for handler, found in _TABLE.items() for function in found
}
