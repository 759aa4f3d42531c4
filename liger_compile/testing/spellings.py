"""Spellings of one thing, as data: what a call may be replaced by without changing what it means.

SPELLINGS holds one identity a line: the call that it is about, by the name that operator, method and function
share; what may be written instead; and when. NEUTRAL holds what may be done to any floating tensor for nothing.
Both are plain PyTorch. An identity may round within the dtype that it computes in where its original does not
(x * sigmoid(x) for silu(x)), but it never moves a cast.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from liger_compile.testing.graphs import Value


@dataclass(frozen=True)
class Identity:
    """`name(*args)` may be written as `spelled(*args)` where `when(*args)`."""

    name: str
    spelled: Callable[..., Any]
    when: Callable[..., bool] = lambda *args, **kwargs: True


def _is(number: float) -> Callable[..., bool]:
    return lambda x, n: n == number


def _both_tensors(a: Any, b: Any, **_: Any) -> bool:
    return isinstance(a, Value) and isinstance(b, Value)


def _by_number(a: Any, b: Any, **_: Any) -> bool:
    return isinstance(a, Value) and isinstance(b, (int, float)) and b != 0


def _of_tensor(a: Any, b: Any, **_: Any) -> bool:
    return isinstance(a, Value)


def _made_by(name: str) -> Callable[..., bool]:
    return lambda a, b: _both_tensors(a, b) and b.made_by(name) is not None


def _floating(x: Any, *_: Any, **__: Any) -> bool:
    return x.dtype.is_floating_point


def _to_floating(x: Value, dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and x.dtype.is_floating_point


def _is_common(x: Value, dtype: Any) -> bool:
    """There is a tensor of this dtype to name it by."""
    return _to_floating(x, dtype) and x.like(dtype) is not None


def _last(x: Value, dim: Any = None, keepdim: bool = False) -> bool:
    return dim in (-1, [-1], (-1,)) and keepdim is True


def _halved(x: Value, chunks: int, dim: int = 0) -> bool:
    return chunks == 2 and dim == -1 and x.shape[-1] % 2 == 0


def _half(x: Value) -> int:
    return x.shape[-1] // 2


def _ellipsis(x: Any, index: Any) -> bool:
    """x[..., one slice], of a tensor."""
    return (
        isinstance(x, Value)
        and isinstance(index, tuple)
        and len(index) == 2
        and (index[0] is Ellipsis and isinstance(index[1], slice))
    )


def _colons(x: Value) -> list[slice]:
    return [slice(None)] * (x.dim() - 1)


def _bounds(x: Value, index: Any) -> tuple[int, int]:
    start, stop, _ = index[1].indices(x.shape[-1])
    return start, stop - start


def _unit_step(x: Any, index: Any) -> bool:
    return _ellipsis(x, index) and index[1].step in (None, 1)


def _of_pairs(x: Any, index: Any) -> bool:
    return (
        _ellipsis(x, index) and index[1].step == 2 and index[1].start in (None, 0, 1) and x.shape[-1] % 2 == 0
    )


def _pairs(x: Value) -> Value:
    return x.reshape(*x.shape[:-1], -1, 2)


def _two_halves(tensors: Any, dim: int = 0) -> bool:
    return dim == -1 and len(tensors) == 2 and tensors[0].shape == tensors[1].shape


def _last_two(x: Value, start_dim: int = 0, end_dim: int = -1) -> bool:
    return start_dim == -2 and end_dim == -1


def _to_rows(x: Value, *shape: Any) -> bool:
    return len(shape) == 2 and shape[0] == -1 and shape[1] == x.shape[-1] and x.dim() > 1


def _to_one_dim(x: Value, *shape: Any) -> bool:
    return shape == (-1,)


def _no_bias(x: Value, w: Value, b: Value | None = None) -> bool:
    return b is None


def _has_bias(x: Value, w: Value, b: Value | None = None) -> bool:
    return b is not None


def _rows(x: Value) -> Value:
    return x.reshape(-1, x.shape[-1])


def _on_rows(x: Value, w: Value, product: Callable[[Value], Value]) -> Value:
    return product(_rows(x)).view(*x.shape[:-1], w.shape[0])


def _tokens(x: Value, y: Value, n: Value | None = None, **_: Any) -> bool:
    return x.dim() == 2 and y.dim() == 1


def _tokens_in_pairs(x: Value, y: Value, weight: Value | None = None, **options: Any) -> bool:
    return _tokens(x, y) and x.shape[0] % 2 == 0 and options.get("reduction") != "none"


def _unsmoothed(x: Value, y: Value, weight: Value | None = None, **options: Any) -> bool:
    return _tokens(x, y) and not options.get("label_smoothing")


def _unweighted(x: Value, y: Value, weight: Value | None = None, **options: Any) -> bool:
    return weight is None


def _nll(scores: Value, y: Value, weight: Any, options: dict[str, Any]) -> Value:
    return F.nll_loss(scores, y, weight, **{k: v for k, v in options.items() if k != "label_smoothing"})


def _positional(x, y, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    return F.cross_entropy(x, y, weight, None, ignore_index, None, reduction, label_smoothing)


def _in_batches(x: Value, y: Value) -> tuple[Value, Value]:
    return x.view(2, -1, x.shape[-1]), y.view(2, -1)


C = math.sqrt(2 / math.pi)

SPELLINGS: tuple[Identity, ...] = (
    # Products, sums and powers
    Identity("mul", lambda a, b: operator.mul(a, b)),
    Identity("mul", lambda a, b: operator.mul(b, a)),
    Identity("mul", lambda a, b: torch.mul(a, b), _of_tensor),
    Identity("mul", lambda a, b: a.mul(b), _of_tensor),
    Identity("mul", lambda a, b: b.mul(a), _both_tensors),
    Identity("mul", lambda a, b: torch.multiply(b, a), _both_tensors),
    Identity("mul", lambda a, b: a / (1 / b), _by_number),
    Identity("mul", lambda a, b: a / b.made_by("rsqrt")[0].sqrt(), _made_by("rsqrt")),
    Identity("mul", lambda a, b: torch.div(a, torch.sqrt(b.made_by("rsqrt")[0])), _made_by("rsqrt")),
    Identity("add", lambda a, b: operator.add(a, b)),
    Identity("add", lambda a, b: operator.add(b, a)),
    Identity("add", lambda a, b: torch.add(a, b), _of_tensor),
    Identity("add", lambda a, b: torch.add(b, a), _both_tensors),
    Identity("add", lambda a, b: a.add(b), _of_tensor),
    Identity("add", lambda a, b: a.add(b, alpha=1), _of_tensor),
    Identity("add", lambda a, b: a - (-b)),
    Identity("add", lambda a, b: torch.addcmul(a, *b.made_by("mul")), lambda a, b: _made_by("mul")(a, b)
             and all(isinstance(each, Value) for each in b.made_by("mul"))),
    Identity("sub", lambda a, b: operator.sub(a, b)),
    Identity("sub", lambda a, b: a + (-b)),
    Identity("sub", lambda a, b: a + b * -1),
    Identity("sub", lambda a, b: torch.sub(a, b), _of_tensor),
    Identity("sub", lambda a, b: a.add(b, alpha=-1), _both_tensors),
    Identity("sub", lambda a, b: -b + a),
    Identity("neg", lambda x: operator.neg(x)),
    Identity("neg", lambda x: x.neg()),
    Identity("neg", lambda x: torch.neg(x)),
    Identity("neg", lambda x: torch.negative(x)),
    Identity("neg", lambda x: x * -1),
    Identity("neg", lambda x: -1.0 * x),
    Identity("neg", lambda x: x / -1),
    Identity("neg", lambda x: 0 - x),
    Identity("div", lambda a, b: operator.truediv(a, b)),
    Identity("div", lambda a, b: torch.div(a, b), _of_tensor),
    Identity("div", lambda a, b: torch.true_divide(a, b), _of_tensor),
    Identity("div", lambda a, b: a.div(b), _of_tensor),
    Identity("div", lambda a, b: a * (1 / b)),
    Identity("div", lambda a, b: a * torch.reciprocal(b), _both_tensors),
    Identity("div", lambda a, b: a * b**-1, _both_tensors),
    Identity("pow", lambda x, n: operator.pow(x, n)),
    Identity("pow", lambda x, n: torch.pow(x, n)),
    Identity("pow", lambda x, n: x.pow(float(n))),
    Identity("pow", lambda x, n: torch.pow(x, exponent=n)),
    Identity("pow", lambda x, n: x * x, _is(2)),
    Identity("pow", lambda x, n: x.mul(x), _is(2)),
    Identity("pow", lambda x, n: x.square(), _is(2)),
    Identity("pow", lambda x, n: torch.square(x), _is(2)),
    Identity("pow", lambda x, n: x * x * x, _is(3)),
    Identity("pow", lambda x, n: x * x.pow(2), _is(3)),
    Identity("pow", lambda x, n: x.rsqrt(), _is(-0.5)),
    Identity("square", lambda x: x**2),
    Identity("square", lambda x: x * x),
    Identity("rsqrt", lambda x: x.rsqrt()),
    Identity("rsqrt", lambda x: 1 / torch.sqrt(x)),
    Identity("rsqrt", lambda x: 1.0 / x.sqrt()),
    Identity("rsqrt", lambda x: 1.0 / x**0.5),
    Identity("rsqrt", lambda x: x**-0.5),
    Identity("rsqrt", lambda x: torch.pow(x, -0.5)),
    Identity("rsqrt", lambda x: x.pow(-1 / 2)),
    Identity("rsqrt", lambda x: torch.reciprocal(torch.sqrt(x))),
    Identity("rsqrt", lambda x: x.sqrt().reciprocal()),
    Identity("rsqrt", lambda x: torch.sqrt(1 / x)),
    Identity("sqrt", lambda x: x**0.5),
    Identity("sqrt", lambda x: torch.sqrt(x)),
    Identity("reciprocal", lambda x: 1 / x),
    Identity("reciprocal", lambda x: x.pow(-1)),
    # Reductions
    Identity("mean", lambda x, dim, keepdim: x.mean(-1, True), _last),
    Identity("mean", lambda x, dim, keepdim: x.mean(dim=-1, keepdim=True), _last),
    Identity("mean", lambda x, dim, keepdim: x.mean([-1], keepdim=True), _last),
    Identity("mean", lambda x, dim, keepdim: torch.mean(x, dim=(-1,), keepdim=True), _last),
    Identity("mean", lambda x, dim, keepdim: x.mean(x.dim() - 1, keepdim=True), _last),
    Identity("mean", lambda x, dim, keepdim: x.mean(-1).unsqueeze(-1), _last),
    Identity("mean", lambda x, dim, keepdim: x.mean(-1)[..., None], _last),
    Identity("mean", lambda x, dim, keepdim: torch.mean(x, -1).view(*x.shape[:-1], 1), _last),
    Identity("mean", lambda x, dim, keepdim: x.sum(-1, keepdim=True) / x.size(-1), _last),
    Identity("mean", lambda x, dim, keepdim: torch.sum(x, dim=-1, keepdim=True) / x.shape[-1], _last),
    Identity("mean", lambda x, dim, keepdim: x.sum(-1, keepdim=True) * (1.0 / x.shape[-1]), _last),
    Identity("mean", lambda x, dim, keepdim: (1 / x.shape[-1]) * x.sum(-1, True), _last),
    Identity("mean", lambda x, dim, keepdim: (x.sum(-1) / x.shape[-1]).unsqueeze(-1), _last),
    # Casts
    Identity("float", lambda x: x.to(torch.float32), _floating),
    Identity("to", lambda x, dtype: x.to(dtype=dtype), _to_floating),
    Identity("to", lambda x, dtype: x.type(dtype), _to_floating),
    Identity("to", lambda x, dtype: x.to(x.fake.device, dtype), _to_floating),
    Identity("to", lambda x, dtype: x.to(device=x.fake.device, dtype=dtype), _to_floating),
    Identity("to", lambda x, dtype: x.float(), lambda x, dtype: _to_floating(x, dtype) and dtype == torch.float32),
    Identity("to", lambda x, dtype: x.bfloat16(), lambda x, dtype: _to_floating(x, dtype) and dtype == torch.bfloat16),
    Identity("to", lambda x, dtype: x.type_as(x.like(dtype)), _is_common),
    Identity("to", lambda x, dtype: x.to(x.like(dtype)), _is_common),
    Identity("to", lambda x, dtype: x, lambda x, dtype: x.dtype == dtype),
    # Pieces
    Identity("chunk", lambda x, n, dim=0: torch.chunk(x, n, dim=dim)),
    Identity("chunk", lambda x, n, dim=0: x.chunk(n, dim=x.dim() - 1), _halved),
    Identity("chunk", lambda x, n, dim=0: x.split(_half(x), dim=-1), _halved),
    Identity("chunk", lambda x, n, dim=0: torch.split(x, [_half(x), _half(x)], -1), _halved),
    Identity("chunk", lambda x, n, dim=0: (x[..., : _half(x)], x[..., _half(x) :]), _halved),
    Identity("chunk", lambda x, n, dim=0: (x[..., : -_half(x)], x[..., -_half(x) :]), _halved),
    Identity("chunk", lambda x, n, dim=0: (x.narrow(-1, 0, _half(x)), x.narrow(-1, _half(x), _half(x))), _halved),
    Identity("chunk", lambda x, n, dim=0: x.unflatten(-1, (2, -1)).unbind(-2), _halved),
    Identity("chunk", lambda x, n, dim=0: x.reshape(*x.shape[:-1], 2, _half(x)).unbind(dim=-2), _halved),
    Identity("chunk", lambda x, n, dim=0: torch.tensor_split(x, 2, -1), _halved),
    Identity("getitem", lambda x, i: x[(*_colons(x), i[1])], _ellipsis),
    Identity("getitem", lambda x, i: x.narrow(-1, *_bounds(x, i)), _unit_step),
    Identity("getitem", lambda x, i: torch.narrow(x, x.dim() - 1, *_bounds(x, i)), _unit_step),
    Identity("getitem", lambda x, i: x[..., slice(i[1].start or 0, x.shape[-1], 2)], _of_pairs),
    Identity("getitem", lambda x, i: _pairs(x)[..., i[1].start or 0], _of_pairs),
    Identity("getitem", lambda x, i: _pairs(x).unbind(-1)[i[1].start or 0], _of_pairs),
    Identity("getitem", lambda x, i: _pairs(x).select(-1, i[1].start or 0), _of_pairs),
    Identity("getitem", lambda x, i: x.unflatten(-1, (-1, 2))[..., i[1].start or 0], _of_pairs),
    Identity("cat", lambda tensors, dim=0: torch.cat(tuple(tensors), dim=dim)),
    Identity("cat", lambda tensors, dim=0: torch.cat(list(tensors), dim=tensors[0].dim() + dim), lambda _, dim=0: dim < 0),
    Identity("cat", lambda tensors, dim=0: torch.concat(list(tensors), dim)),
    Identity("cat", lambda tensors, dim=0: torch.stack(list(tensors), -2).flatten(-2), _two_halves),
    Identity("stack", lambda tensors, dim=0: torch.stack(list(tensors), dim=dim)),
    Identity("stack", lambda tensors, dim=0: torch.cat([x.unsqueeze(dim) for x in tensors], dim=dim)),
    Identity("stack", lambda tensors, dim=0: torch.cat([x[..., None] for x in tensors], -1), lambda _, dim=0: dim == -1),
    Identity("flatten", lambda x, *_: x.flatten(start_dim=-2), _last_two),
    Identity("flatten", lambda x, *_: torch.flatten(x, -2, -1), _last_two),
    Identity("flatten", lambda x, *_: x.reshape(*x.shape[:-2], -1), _last_two),
    Identity("flatten", lambda x, *_: x.contiguous().view(*x.shape[:-2], x.shape[-2] * x.shape[-1]), _last_two),
    Identity("reshape", lambda x, *shape: x.reshape(shape)),
    Identity("reshape", lambda x, *shape: torch.reshape(x, shape)),
    Identity("reshape", lambda x, *shape: x.contiguous().view(*shape)),
    Identity("reshape", lambda x, *shape: x.flatten(0, -2), _to_rows),
    Identity("reshape", lambda x, *shape: x.flatten(), _to_one_dim),
    Identity("view_as_complex", lambda x: torch.view_as_complex(x.contiguous())),
    Identity("view_as_complex", lambda x: torch.complex(x[..., 0], x[..., 1]), lambda x: x.dtype == torch.float32),
    Identity("view_as_real", lambda x: torch.stack((x.real, x.imag), -1)),
    # Activations
    Identity("silu", lambda x, inplace=False: F.silu(x)),
    Identity("silu", lambda x, inplace=False: nn.SiLU()(x)),
    Identity("silu", lambda x, inplace=False: x * torch.sigmoid(x)),
    Identity("silu", lambda x, inplace=False: F.sigmoid(x) * x),
    Identity("silu", lambda x, inplace=False: x.sigmoid().mul(x)),
    Identity("silu", lambda x, inplace=False: x / (1 + torch.exp(-x))),
    Identity("silu", lambda x, inplace=False: x * (1.0 / (1.0 + (-x).exp()))),
    Identity("sigmoid", lambda x: x.sigmoid()),
    Identity("sigmoid", lambda x: F.sigmoid(x)),
    Identity("sigmoid", lambda x: torch.special.expit(x)),
    Identity("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
    Identity("sigmoid", lambda x: (1 + torch.exp(-x)).reciprocal()),
    Identity("gelu", lambda x, approximate="none": F.gelu(x, approximate=approximate)),
    Identity("gelu", lambda x, approximate="none": nn.GELU(approximate)(x)),
    Identity("gelu", lambda x, **_: F.gelu(x), lambda x, approximate="none": approximate == "none"),
    *(
        Identity("gelu", spelled, lambda x, approximate="none": approximate == "none")
        for spelled in (
            lambda x, **_: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
            lambda x, **_: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
            lambda x, **_: x * (torch.erf(x * 0.7071067811865476) + 1) / 2,
            lambda x, **_: x * (0.5 * (1 + (x * 2**-0.5).erf())),
        )
    ),
    *(
        Identity("gelu", spelled, lambda x, approximate="none": approximate == "tanh")
        for spelled in (
            lambda x, **_: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**3))),
            lambda x, **_: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))),
            lambda x, **_: x * 0.5 * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x))),
            lambda x, **_: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x))),
            lambda x, **_: x * (1 + F.tanh((x + (x * x * x) * 0.044715) * C)) * 0.5,
        )
    ),
    Identity("tanh", lambda x: x.tanh()),
    Identity("tanh", lambda x: torch.tanh(x)),
    Identity("tanh", lambda x: F.tanh(x)),
    Identity("relu", lambda x, inplace=False: F.relu(x)),
    Identity("relu", lambda x, inplace=False: torch.relu(x)),
    Identity("relu", lambda x, inplace=False: x.relu()),
    Identity("relu", lambda x, inplace=False: nn.ReLU()(x)),
    Identity("relu", lambda x, inplace=False: x.clamp(min=0)),
    Identity("relu", lambda x, inplace=False: torch.clamp_min(x, 0)),
    # Projections
    Identity("linear", lambda x, w, b=None: F.linear(x, w, b)),
    Identity("linear", lambda x, w, b=None: F.linear(x, w, bias=b)),
    Identity("linear", lambda x, w, b=None: F.linear(input=x, weight=w, bias=b)),
    Identity("linear", lambda x, w, b=None: F.linear(x, w), _no_bias),
    Identity("linear", lambda x, w, b=None: F.linear(x, w) + b, _has_bias),
    Identity("linear", lambda x, w, b=None: x @ w.t(), _no_bias),
    Identity("linear", lambda x, w, b=None: x @ w.T, _no_bias),
    Identity("linear", lambda x, w, b=None: x @ w.mT, _no_bias),
    Identity("linear", lambda x, w, b=None: x.matmul(w.transpose(0, 1)), _no_bias),
    Identity("linear", lambda x, w, b=None: torch.matmul(x, w.transpose(-1, -2)), _no_bias),
    Identity("linear", lambda x, w, b=None: torch.matmul(x, w.permute(1, 0)), _no_bias),
    Identity("linear", lambda x, w, b=None: torch.einsum("...i,oi->...o", x, w), _no_bias),
    Identity("linear", lambda x, w, b=None: torch.matmul(x, w.t()) + b, _has_bias),
    Identity("linear", lambda x, w, b=None: b + x @ w.t(), _has_bias),
    Identity("linear", lambda x, w, b=None: _on_rows(x, w, lambda rows: torch.addmm(b, rows, w.t())), _has_bias),
    Identity("linear", lambda x, w, b=None: _on_rows(x, w, lambda rows: torch.mm(rows, w.t())), _no_bias),
    Identity("linear", lambda x, w, b=None: _on_rows(x, w, lambda rows: F.linear(rows, w, b))),
    # Losses
    Identity("cross_entropy", _positional),
    Identity("cross_entropy", lambda x, y, weight=None, **k: F.cross_entropy(x, y, weight=weight, **k)),
    Identity("cross_entropy", lambda x, y, weight=None, **k: F.cross_entropy(input=x, target=y, weight=weight, **k)),
    Identity("cross_entropy", lambda x, y, weight=None, **k: nn.CrossEntropyLoss(**k)(x, y), _unweighted),
    Identity("cross_entropy", lambda x, y, weight=None, **k: _nll(F.log_softmax(x, -1), y, weight, k), _unsmoothed),
    Identity("cross_entropy", lambda x, y, weight=None, **k: _nll(F.log_softmax(x, dim=1), y, weight, k), _unsmoothed),
    Identity("cross_entropy", lambda x, y, weight=None, **k: _nll(x.log_softmax(-1), y, weight, k), _unsmoothed),
    Identity("cross_entropy", lambda x, y, weight=None, **k: _nll(torch.log_softmax(x, dim=-1), y, weight, k), _unsmoothed),
    Identity("cross_entropy", lambda x, y, weight=None, **k: F.cross_entropy(
        _in_batches(x, y)[0].transpose(1, 2), y.view(2, -1), weight, **k), _tokens_in_pairs),
    Identity("cross_entropy", lambda x, y, weight=None, **k: F.cross_entropy(
        _in_batches(x, y)[0].permute(0, 2, 1), y.view(2, -1), weight, **k), _tokens_in_pairs),
    Identity("cross_entropy", lambda x, y, weight=None, **k: F.cross_entropy(
        x.contiguous().view(-1, x.size(-1)), y.contiguous().view(-1), weight, **k), _tokens),
)  # fmt: skip

NEUTRAL: tuple[Identity, ...] = (
    Identity("contiguous", lambda x: x.contiguous()),
    Identity("clone", lambda x: x.clone()),
    Identity("times one", lambda x: x * 1.0),
    Identity("one times", lambda x: 1 * x),
    Identity("by one", lambda x: x / 1),
    Identity("plus nothing", lambda x: x + 0),
    Identity("nothing plus", lambda x: 0.0 + x),
    Identity("less nothing", lambda x: x - 0.0),
    Identity("negated twice", lambda x: -(-x)),
    Identity("all of it", lambda x: x[...]),
    Identity("all rows", lambda x: x[:], lambda x: x.dim() > 0),
    Identity("all rows from the first", lambda x: x[0:], lambda x: x.dim() > 0),
    Identity("all columns", lambda x: x[..., :], lambda x: x.dim() > 0),
    Identity("all columns by number", lambda x: x[..., : x.shape[-1]], lambda x: x.dim() > 0),
    Identity("same view", lambda x: x.view(x.shape)),
    Identity("same view by sizes", lambda x: x.view(*x.size()), lambda x: x.dim() > 0),
    Identity("same shape", lambda x: x.reshape(x.shape)),
    Identity("same expanse", lambda x: x.expand(x.shape), lambda x: x.dim() > 0),
    Identity("flat and back", lambda x: x.flatten().view(x.shape)),
    Identity("rows and back", lambda x: x.reshape(-1, x.shape[-1]).view(x.shape), lambda x: x.dim() > 1),
    Identity("batched and back", lambda x: x.unsqueeze(0).squeeze(0)),
    Identity("batched by None and back", lambda x: x[None][0]),
    Identity("a dimension more and back", lambda x: x.unsqueeze(-1).squeeze(-1)),
    Identity("swapped twice", lambda x: x.transpose(-1, -2).transpose(-2, -1), lambda x: x.dim() > 1),
    Identity("dropout of nothing", lambda x: F.dropout(x, 0.0)),
    Identity("dropout in eval", lambda x: F.dropout(x, p=0.1, training=False)),
    Identity("dropout module", lambda x: nn.Dropout(0.0)(x)),
    Identity("identity module", lambda x: nn.Identity()(x)),
    Identity("same dtype", lambda x: x.to(x.dtype)),
    Identity("same type", lambda x: x.type(x.dtype)),
    Identity("type of itself", lambda x: x.type_as(x)),
    Identity("same device", lambda x: x.to(x.fake.device)),
    Identity("float of float", lambda x: x.float(), lambda x: x.dtype == torch.float32),
    Identity("wider and back", lambda x: x.float().to(x.dtype), lambda x: x.dtype == torch.bfloat16),
)


def spellings_of(name: str, args: tuple, kwargs: dict) -> list[Identity]:
    """The identities that hold for this call."""
    return [identity for identity in SPELLINGS if identity.name == name and _holds(identity, args, kwargs)]


def _holds(identity: Identity, args: tuple, kwargs: dict) -> bool:
    try:
        return bool(identity.when(*args, **kwargs))
    except (TypeError, AttributeError, ValueError):  # called in another way than the identity is about
        return False


def neutral_to(value: Value) -> list[Identity]:
    """What may be done to this value for nothing."""
    if not value.dtype.is_floating_point:
        return []
    return [identity for identity in NEUTRAL if _holds(identity, (value,), {})]
