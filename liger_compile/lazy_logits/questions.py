"""Questions that code asks of lazy logits, answered from the hidden state and the head.

A handler takes (function, args, kwargs) of a call, and returns its result, or NotImplemented if this call needs the
values: then the function runs on them. A result has the dtype of eager code; an answer is computed in float32 before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_compile.lazy_logits.source import Source
from liger_compile.lazy_logits.steps import Handler, divergence, entries_of, functions, indexed, source_of

_MOST_TOP = 128  # largest scores with gradients: backward compares the columns of a row by pairs


def _askable(lazy: Any, *kinds: str) -> Source | None:
    """Return the source of a tensor if it is of one of these kinds, and its head is as it was in forward."""
    source = source_of(lazy)
    if source is None or source.kind not in kinds:
        return None
    if lazy.requires_grad and (lazy.is_leaf or not source.head.requires_grad):
        return None  # a leaf of its own, or a tensor that was written into
    heads = [source.head] if source.teacher is None else [source.head, source.teacher.head]
    return source if all(head.is_unchanged() for head in heads) else None


def _is_autocast(lazy: Tensor) -> bool:
    """Return whether autocast may give the result of a reduction another dtype."""
    return torch.is_autocast_enabled(lazy.device.type) and lazy.dtype not in (torch.float32, torch.float64)


def _is_last(dim: Any, dims: int) -> bool:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return not isinstance(dim, bool) and isinstance(dim, int) and dim in (-1, dims - 1)


def _named(names: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments by name; None if there are others."""
    known = names.split()
    if len(args) > len(known) or not kwargs.keys() <= set(known):
        return None
    return {**dict(zip(known, args, strict=False)), **kwargs}


def _is_index(index: Any, lazy: Tensor, classes: int) -> bool:
    """Return whether a tensor has classes only; a GPU reports others at the next synchronization, as in eager code."""
    if type(index) is not Tensor or index.dtype is not torch.int64 or index.device != lazy.device:
        return False
    if index.device.type != "cpu" or index.numel() == 0:
        return True
    return bool(index.min() >= 0) and bool(index.max() < classes)


# Values at columns.


def gathered(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """gather over the classes, of scores or of their logarithm."""
    given = _named(
        "input dim index sparse_grad", args, {k.replace("self", "input"): v for k, v in kwargs.items()}
    )
    if given is None or given.get("sparse_grad") or not {"input", "dim", "index"} <= given.keys():
        return NotImplemented
    return _at_columns(given["input"], given["dim"], given["index"])


def taken_along(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """take_along_dim over the classes."""
    given = _named("input indices dim", args, kwargs)
    if given is None or given.keys() != {"input", "indices", "dim"}:
        return NotImplemented
    return _at_columns(given["input"], given["dim"], given["indices"])


def _at_columns(lazy: Any, dim: Any, index: Any) -> Any:
    source = _askable(lazy, "scores", "log_softmax")
    if source is None or not _is_last(dim, lazy.dim()) or not _is_index(index, lazy, source.classes):
        return NotImplemented
    lead = index.shape[:-1]
    if index.dim() != lazy.dim() or any(part > whole for part, whole in zip(lead, lazy.shape, strict=False)):
        return NotImplemented
    positions = None
    if lead != lazy.shape[:-1]:
        every = torch.arange(math.prod(lazy.shape[:-1])).reshape(lazy.shape[:-1])
        positions = every[tuple(slice(size) for size in lead)].reshape(-1)
    return _chosen(source, lazy, positions, index.reshape(-1, index.shape[-1])).reshape(index.shape)


def _chosen(source: Source, lazy: Tensor, positions: Tensor | None, index: Tensor) -> Tensor:
    question = "scores" if source.kind == "scores" else "log_probabilities"
    (found,) = source.ask(lazy, [question], positions=positions, index=index)
    return (found * source.factor).to(lazy.dtype)


def at_index(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """logp[rows, labels]: one tensor of indices for each dimension."""
    found = indexed(function, args, kwargs)
    if found is not NotImplemented:
        return found
    lazy, index = args
    source = _askable(lazy, "scores", "log_softmax")
    entries = entries_of(index, lazy.dim())
    if source is None or entries is None or len(entries) != lazy.dim():
        return NotImplemented
    if not all(isinstance(entry, (int, Tensor)) for entry in entries) or not isinstance(entries[-1], Tensor):
        return NotImplemented
    *of_lead, columns = entries
    columns = columns.to(lazy.device, torch.int64)
    columns = torch.where(columns < 0, columns + source.classes, columns)
    if not _is_index(columns, lazy, source.classes):
        return NotImplemented
    every = torch.arange(math.prod(lazy.shape[:-1])).reshape(lazy.shape[:-1])
    rows = every[tuple(each.cpu() if isinstance(each, Tensor) else each for each in of_lead)]
    shape = torch.broadcast_shapes(rows.shape, columns.shape)
    chosen = columns.expand(shape).reshape(-1, 1)
    return _chosen(source, lazy, rows.expand(shape).reshape(-1), chosen).reshape(shape)


# Reductions over the classes.


def _of_rows(lazy: Tensor, value: Tensor, keepdim: bool, dtype: torch.dtype | None = None) -> Tensor:
    value = value.reshape(lazy.shape[:-1]).to(dtype or lazy.dtype)
    return value.unsqueeze(-1) if keepdim else value


def logsumexp(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    given = _named("input dim keepdim", args, kwargs)
    if given is None or not _is_last(given.get("dim"), given["input"].dim()) or _is_autocast(given["input"]):
        return NotImplemented
    lazy = given["input"]
    if (source := _askable(lazy, "scores")) is None:
        return NotImplemented
    return _of_rows(lazy, source.ask(lazy, ["logsumexp"])[0], given.get("keepdim", False))


# The sum over the classes of values of a kind is a question, times a number.
_SUMS: Mapping[str, tuple[str, float]] = {
    "scores": ("score_sum", 1.0),
    "log_softmax": ("log_probability_sum", 1.0),
    "softmax * log_softmax": ("entropy", -1.0),
    "softmax * scores": ("mean_score", 1.0),
    "softmax * softmax": ("collision", 1.0),
}


def summed(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """sum or mean over the classes, or over everything."""
    given = _named("input dim keepdim dtype", args, kwargs)
    if given is None or _is_autocast(lazy := given["input"]):
        return NotImplemented
    dim, keepdim, dtype = given.get("dim"), given.get("keepdim", False), given.get("dtype")
    is_last = _is_last(dim, lazy.dim())
    if not (is_last or (dim is None and not keepdim)) or not (dtype is None or dtype.is_floating_point):
        return NotImplemented
    if dtype is torch.float64 or (source := _askable(lazy, *_SUMS, "divergence")) is None:
        return NotImplemented
    question, factor = _SUMS.get(source.kind, ("", 1.0))
    found = source.ask(lazy, [question])[0] if question else source.ask_divergence(lazy)
    is_mean = function in _MEANS
    found = found * (factor * source.factor / (source.classes if is_mean else 1))
    if is_last:
        return _of_rows(lazy, found, keepdim, dtype)
    return (found.mean() if is_mean else found.sum()).to(dtype or lazy.dtype)


def largest(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """argmax over the classes."""
    given = _named("input dim keepdim", args, kwargs)
    if given is None or not _is_last(given.get("dim"), given["input"].dim()):
        return NotImplemented
    lazy = given["input"]
    source = _askable(lazy, "scores", "log_softmax")
    if source is None or not source.is_exact or source.factor < 0:
        return NotImplemented
    (found,) = source.ask(lazy, ["argmax"])
    found = found.reshape(lazy.shape[:-1])
    return found.unsqueeze(-1) if given.get("keepdim", False) else found


def top(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """topk over the classes."""
    given = _named("input k dim largest sorted", args, kwargs)
    if (
        given is None
        or not _is_last(given.get("dim", -1), given["input"].dim())
        or not given.get("largest", True)
    ):
        return NotImplemented
    lazy, count = given["input"], given.get("k")
    source = _askable(lazy, "scores")
    if source is None or not isinstance(count, int) or not 0 < count <= min(_MOST_TOP, source.classes):
        return NotImplemented
    if not source.is_exact or source.form.scale <= 0 or source.is_capped:
        return NotImplemented
    values, indices = source.ask(lazy, ["top"], top=count)
    shape = (*lazy.shape[:-1], count)
    return torch.return_types.topk((values.to(lazy.dtype).reshape(shape), indices.reshape(shape)))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


# Losses.


def cross_entropy(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """F.cross_entropy with classes as targets, without weights of classes."""
    names = "input target weight size_average ignore_index reduce reduction label_smoothing"
    given = _named(names, args, kwargs)
    return NotImplemented if given is None else _loss(given, "scores", given.get("label_smoothing", 0.0))


def nll_loss(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """F.nll_loss of log_softmax, without weights of classes."""
    given = _named("input target weight size_average ignore_index reduce reduction", args, kwargs)
    return NotImplemented if given is None else _loss(given, "log_softmax", 0.0)


def kl_div(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """F.kl_div, reduced: the sum of its elements, which stay lazy."""
    given = _named("input target size_average reduce reduction log_target", args, kwargs)
    if given is None or given.get("size_average") is not None or given.get("reduce") is not None:
        return NotImplemented
    reduction, log_target = given.get("reduction", "mean"), given.get("log_target", False)
    pair = given["input"], given["target"]
    elements = divergence(function, pair, {"reduction": "none", "log_target": log_target})
    if elements is NotImplemented or reduction == "none":
        return elements
    total = (
        summed(torch.sum, (elements,), {}) if reduction in ("sum", "batchmean", "mean") else NotImplemented
    )
    if total is NotImplemented or reduction == "sum":
        return total
    return total / (len(pair[0]) if reduction == "batchmean" else pair[0].numel())


def _loss(given: Mapping[str, Any], kind: str, smoothing: float) -> Any:
    lazy, target, ignore_index = given["input"], given.get("target"), given.get("ignore_index", -100)
    reduction = given.get("reduction", "mean")
    if any(given.get(name) is not None for name in ("weight", "size_average", "reduce")) or _is_autocast(
        lazy
    ):
        return NotImplemented
    if type(target) is not Tensor or lazy.dim() > 2 or target.shape != lazy.shape[:-1]:
        return NotImplemented
    source = _askable(lazy, kind)
    if (
        source is None
        or source.factor != 1
        or reduction not in ("mean", "sum", "none")
        or not 0 <= smoothing <= 1
    ):
        return NotImplemented
    is_counted = target != ignore_index
    index = target.masked_fill(~is_counted, 0)
    if not _is_index(index, lazy, source.classes):
        return NotImplemented
    questions = ["log_probabilities", "log_probability_sum"] if smoothing else ["log_probabilities"]
    chosen, *rest = source.ask(lazy, questions, index=index.reshape(-1, 1))
    losses = -chosen.reshape(target.shape)
    if rest:
        even = -rest[0].reshape(target.shape) / source.classes
        losses = (1 - smoothing) * losses + smoothing * even
    losses = losses.masked_fill(~is_counted, 0)
    if reduction == "none":
        return losses.to(lazy.dtype)
    total = losses.sum()
    return (total / is_counted.sum() if reduction == "mean" else total).to(lazy.dtype)


_MEANS = frozenset(functions("mean"))
_TABLE: Mapping[Handler, Sequence[Any]] = {
    gathered: [*functions("gather")],
    taken_along: [*functions("take_along_dim")],
    at_index: [Tensor.__getitem__],
    logsumexp: [*functions("logsumexp"), torch.special.logsumexp],
    summed: [*functions("sum", "mean")],
    largest: [*functions("argmax")],
    top: [*functions("topk")],
    cross_entropy: [F.cross_entropy],
    nll_loss: [F.nll_loss],
    kl_div: [F.kl_div],
}
HANDLERS: Mapping[Any, Handler] = {
    function: handler for handler, found in _TABLE.items() for function in found
}
