"""Spellings as data: calls that may replace a call without changing its meaning.

SPELLINGS has one identity per line: the name of the call, shared by operator, method and function; the call that may
replace it; and the condition. NEUTRAL has the calls that change no floating tensor. Both are plain PyTorch. An identity
may round within its compute dtype where its original does not (x * sigmoid(x) for silu(x)), but it never moves a cast.
"""

# A Value stands for a tensor wherever a tensor is used, which its class cannot express.
# pyright: reportArgumentType=false, reportReturnType=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from liger_compile.testing.conditions import (
    both_tensors,
    bounds,
    by_number,
    colons,
    ellipsis,
    exponent_is,
    floating,
    half,
    halved,
    has_bias,
    in_batches,
    is_common,
    last,
    last_two,
    made_by,
    nll,
    no_bias,
    of_pairs,
    of_tensor,
    on_rows,
    pairs,
    positional,
    to_floating,
    to_one_dim,
    to_rows,
    tokens,
    tokens_in_pairs,
    two_halves,
    unit_step,
    unsmoothed,
    unweighted,
)
from liger_compile.testing.graphs import Value


@dataclass(frozen=True)
class Identity:
    """`name(*args)` may be written as `spelled(*args)` if `when(*args)`."""

    name: str
    spelled: Callable[..., Any]
    when: Callable[..., bool] = lambda *args, **kwargs: True


C = math.sqrt(2 / math.pi)

SPELLINGS: tuple[Identity, ...] = (
    # Multiplications, sums and powers
    Identity("mul", lambda a, b: operator.mul(a, b)),
    Identity("mul", lambda a, b: operator.mul(b, a)),
    Identity("mul", lambda a, b: torch.mul(a, b), of_tensor),
    Identity("mul", lambda a, b: a.mul(b), of_tensor),
    Identity("mul", lambda a, b: b.mul(a), both_tensors),
    Identity("mul", lambda a, b: torch.multiply(b, a), both_tensors),
    Identity("mul", lambda a, b: a / (1 / b), by_number),
    Identity("mul", lambda a, b: a / b.made_by("rsqrt")[0].sqrt(), made_by("rsqrt")),
    Identity("mul", lambda a, b: torch.div(a, torch.sqrt(b.made_by("rsqrt")[0])), made_by("rsqrt")),
    Identity("add", lambda a, b: operator.add(a, b)),
    Identity("add", lambda a, b: operator.add(b, a)),
    Identity("add", lambda a, b: torch.add(a, b), of_tensor),
    Identity("add", lambda a, b: torch.add(b, a), both_tensors),
    Identity("add", lambda a, b: a.add(b), of_tensor),
    Identity("add", lambda a, b: a.add(b, alpha=1), of_tensor),
    Identity("add", lambda a, b: a - (-b)),
    Identity("add", lambda a, b: torch.addcmul(a, *b.made_by("mul")), lambda a, b: made_by("mul")(a, b)
             and all(isinstance(factor, Value) for factor in b.made_by("mul"))),
    Identity("sub", lambda a, b: operator.sub(a, b)),
    Identity("sub", lambda a, b: a + (-b)),
    Identity("sub", lambda a, b: a + b * -1),
    Identity("sub", lambda a, b: torch.sub(a, b), of_tensor),
    Identity("sub", lambda a, b: a.add(b, alpha=-1), both_tensors),
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
    Identity("div", lambda a, b: torch.div(a, b), of_tensor),
    Identity("div", lambda a, b: torch.true_divide(a, b), of_tensor),
    Identity("div", lambda a, b: a.div(b), of_tensor),
    Identity("div", lambda a, b: a * (1 / b)),
    Identity("div", lambda a, b: a * torch.reciprocal(b), both_tensors),
    Identity("div", lambda a, b: a * b**-1, both_tensors),
    Identity("pow", lambda x, n: operator.pow(x, n)),
    Identity("pow", lambda x, n: torch.pow(x, n)),
    Identity("pow", lambda x, n: x.pow(float(n))),
    Identity("pow", lambda x, n: torch.pow(x, exponent=n)),
    Identity("pow", lambda x, n: x * x, exponent_is(2)),
    Identity("pow", lambda x, n: x.mul(x), exponent_is(2)),
    Identity("pow", lambda x, n: x.square(), exponent_is(2)),
    Identity("pow", lambda x, n: torch.square(x), exponent_is(2)),
    Identity("pow", lambda x, n: x * x * x, exponent_is(3)),
    Identity("pow", lambda x, n: x * x.pow(2), exponent_is(3)),
    Identity("pow", lambda x, n: x.rsqrt(), exponent_is(-0.5)),
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
    Identity("mean", lambda x, dim, keepdim: x.mean(-1, True), last),
    Identity("mean", lambda x, dim, keepdim: x.mean(dim=-1, keepdim=True), last),
    Identity("mean", lambda x, dim, keepdim: x.mean([-1], keepdim=True), last),
    Identity("mean", lambda x, dim, keepdim: torch.mean(x, dim=(-1,), keepdim=True), last),
    Identity("mean", lambda x, dim, keepdim: x.mean(x.dim() - 1, keepdim=True), last),
    Identity("mean", lambda x, dim, keepdim: x.mean(-1).unsqueeze(-1), last),
    Identity("mean", lambda x, dim, keepdim: x.mean(-1)[..., None], last),
    Identity("mean", lambda x, dim, keepdim: torch.mean(x, -1).view(*x.shape[:-1], 1), last),
    Identity("mean", lambda x, dim, keepdim: x.sum(-1, keepdim=True) / x.size(-1), last),
    Identity("mean", lambda x, dim, keepdim: torch.sum(x, dim=-1, keepdim=True) / x.shape[-1], last),
    Identity("mean", lambda x, dim, keepdim: x.sum(-1, keepdim=True) * (1.0 / x.shape[-1]), last),
    Identity("mean", lambda x, dim, keepdim: (1 / x.shape[-1]) * x.sum(-1, True), last),
    Identity("mean", lambda x, dim, keepdim: (x.sum(-1) / x.shape[-1]).unsqueeze(-1), last),
    # Casts
    Identity("float", lambda x: x.to(torch.float32), floating),
    Identity("to", lambda x, dtype: x.to(dtype=dtype), to_floating),
    Identity("to", lambda x, dtype: x.type(dtype), to_floating),
    Identity("to", lambda x, dtype: x.to(x.fake.device, dtype), to_floating),
    Identity("to", lambda x, dtype: x.to(device=x.fake.device, dtype=dtype), to_floating),
    Identity("to", lambda x, dtype: x.float(), lambda x, dtype: to_floating(x, dtype) and dtype == torch.float32),
    Identity("to", lambda x, dtype: x.bfloat16(), lambda x, dtype: to_floating(x, dtype) and dtype == torch.bfloat16),
    Identity("to", lambda x, dtype: x.type_as(x.like(dtype)), is_common),
    Identity("to", lambda x, dtype: x.to(x.like(dtype)), is_common),
    Identity("to", lambda x, dtype: x, lambda x, dtype: x.dtype == dtype),
    # Pieces
    Identity("chunk", lambda x, n, dim=0: torch.chunk(x, n, dim=dim)),
    Identity("chunk", lambda x, n, dim=0: x.chunk(n, dim=x.dim() - 1), halved),
    Identity("chunk", lambda x, n, dim=0: x.split(half(x), dim=-1), halved),
    Identity("chunk", lambda x, n, dim=0: torch.split(x, [half(x), half(x)], -1), halved),
    Identity("chunk", lambda x, n, dim=0: (x[..., : half(x)], x[..., half(x) :]), halved),
    Identity("chunk", lambda x, n, dim=0: (x[..., : -half(x)], x[..., -half(x) :]), halved),
    Identity("chunk", lambda x, n, dim=0: (x.narrow(-1, 0, half(x)), x.narrow(-1, half(x), half(x))), halved),
    Identity("chunk", lambda x, n, dim=0: x.unflatten(-1, (2, -1)).unbind(-2), halved),
    Identity("chunk", lambda x, n, dim=0: x.reshape(*x.shape[:-1], 2, half(x)).unbind(dim=-2), halved),
    Identity("chunk", lambda x, n, dim=0: torch.tensor_split(x, 2, -1), halved),
    Identity("getitem", lambda x, i: x[(*colons(x), i[1])], ellipsis),
    Identity("getitem", lambda x, i: x.narrow(-1, *bounds(x, i)), unit_step),
    Identity("getitem", lambda x, i: torch.narrow(x, x.dim() - 1, *bounds(x, i)), unit_step),
    Identity("getitem", lambda x, i: x[..., slice(i[1].start or 0, x.shape[-1], 2)], of_pairs),
    Identity("getitem", lambda x, i: pairs(x)[..., i[1].start or 0], of_pairs),
    Identity("getitem", lambda x, i: pairs(x).unbind(-1)[i[1].start or 0], of_pairs),
    Identity("getitem", lambda x, i: pairs(x).select(-1, i[1].start or 0), of_pairs),
    Identity("getitem", lambda x, i: x.unflatten(-1, (-1, 2))[..., i[1].start or 0], of_pairs),
    Identity("cat", lambda tensors, dim=0: torch.cat(tuple(tensors), dim=dim)),
    Identity(
        "cat", lambda tensors, dim=0: torch.cat(list(tensors), dim=tensors[0].dim() + dim), lambda _, dim=0: dim < 0
    ),
    Identity("cat", lambda tensors, dim=0: torch.concat(list(tensors), dim)),
    Identity("cat", lambda tensors, dim=0: torch.stack(list(tensors), -2).flatten(-2), two_halves),
    Identity("stack", lambda tensors, dim=0: torch.stack(list(tensors), dim=dim)),
    Identity("stack", lambda tensors, dim=0: torch.cat([x.unsqueeze(dim) for x in tensors], dim=dim)),
    Identity(
        "stack", lambda tensors, dim=0: torch.cat([x[..., None] for x in tensors], -1), lambda _, dim=0: dim == -1
    ),
    Identity("flatten", lambda x, *_: x.flatten(start_dim=-2), last_two),
    Identity("flatten", lambda x, *_: torch.flatten(x, -2, -1), last_two),
    Identity("flatten", lambda x, *_: x.reshape(*x.shape[:-2], -1), last_two),
    Identity("flatten", lambda x, *_: x.contiguous().view(*x.shape[:-2], x.shape[-2] * x.shape[-1]), last_two),
    Identity("reshape", lambda x, *shape: x.reshape(shape)),
    Identity("reshape", lambda x, *shape: torch.reshape(x, shape)),
    Identity("reshape", lambda x, *shape: x.contiguous().view(*shape)),
    Identity("reshape", lambda x, *shape: x.flatten(0, -2), to_rows),
    Identity("reshape", lambda x, *shape: x.flatten(), to_one_dim),
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
    # Projections
    Identity("linear", lambda x, w, b=None: F.linear(x, w, b)),
    Identity("linear", lambda x, w, b=None: F.linear(x, w, bias=b)),
    Identity("linear", lambda x, w, b=None: F.linear(input=x, weight=w, bias=b)),
    Identity("linear", lambda x, w, b=None: F.linear(x, w), no_bias),
    Identity("linear", lambda x, w, b=None: F.linear(x, w) + b, has_bias),
    Identity("linear", lambda x, w, b=None: x @ w.t(), no_bias),
    Identity("linear", lambda x, w, b=None: x @ w.T, no_bias),
    Identity("linear", lambda x, w, b=None: x @ w.mT, no_bias),
    Identity("linear", lambda x, w, b=None: x.matmul(w.transpose(0, 1)), no_bias),
    Identity("linear", lambda x, w, b=None: torch.matmul(x, w.transpose(-1, -2)), no_bias),
    Identity("linear", lambda x, w, b=None: torch.matmul(x, w.permute(1, 0)), no_bias),
    Identity("linear", lambda x, w, b=None: torch.einsum("...i,oi->...o", x, w), no_bias),
    Identity("linear", lambda x, w, b=None: torch.matmul(x, w.t()) + b, has_bias),
    Identity("linear", lambda x, w, b=None: b + x @ w.t(), has_bias),
    Identity("linear", lambda x, w, b=None: on_rows(x, w, lambda rows: torch.addmm(b, rows, w.t())), has_bias),
    Identity("linear", lambda x, w, b=None: on_rows(x, w, lambda rows: torch.mm(rows, w.t())), no_bias),
    Identity("linear", lambda x, w, b=None: on_rows(x, w, lambda rows: F.linear(rows, w, b))),
    # Losses
    Identity("cross_entropy", positional),
    Identity("cross_entropy", lambda x, y, weight=None, **k: F.cross_entropy(x, y, weight=weight, **k)),
    Identity("cross_entropy", lambda x, y, weight=None, **k: F.cross_entropy(input=x, target=y, weight=weight, **k)),
    Identity("cross_entropy", lambda x, y, weight=None, **k: nn.CrossEntropyLoss(**k)(x, y), unweighted),
    Identity("cross_entropy", lambda x, y, weight=None, **k: nll(F.log_softmax(x, -1), y, weight, k), unsmoothed),
    Identity("cross_entropy", lambda x, y, weight=None, **k: nll(F.log_softmax(x, dim=1), y, weight, k), unsmoothed),
    Identity("cross_entropy", lambda x, y, weight=None, **k: nll(x.log_softmax(-1), y, weight, k), unsmoothed),
    Identity("cross_entropy", lambda x, y, weight=None, **k: nll(torch.log_softmax(x, -1), y, weight, k), unsmoothed),
    Identity("cross_entropy", lambda x, y, weight=None, **k: F.cross_entropy(
        in_batches(x, y)[0].transpose(1, 2), y.view(2, -1), weight, **k), tokens_in_pairs),
    Identity("cross_entropy", lambda x, y, weight=None, **k: F.cross_entropy(
        in_batches(x, y)[0].permute(0, 2, 1), y.view(2, -1), weight, **k), tokens_in_pairs),
    Identity("cross_entropy", lambda x, y, weight=None, **k: F.cross_entropy(
        x.contiguous().view(-1, x.size(-1)), y.contiguous().view(-1), weight, **k), tokens),
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
    Identity("negated twice", lambda x: (-x).neg()),
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


def spellings_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Identity]:
    """Returns the identities that hold for this call."""
    return [identity for identity in SPELLINGS if identity.name == name and _holds(identity, args, kwargs)]


def _holds(identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        return bool(identity.when(*args, **kwargs))
    except (TypeError, AttributeError, ValueError):  # the call has another form than that of the identity
        return False


def neutral_to(value: Value) -> list[Identity]:
    """Returns the identities that do not change this value."""
    if not value.dtype.is_floating_point:
        return []
    return [identity for identity in NEUTRAL if _holds(identity, (value,), {})]
