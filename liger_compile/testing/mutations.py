"""Mutations that change the meaning of a graph, or its surroundings. A rewriter must refuse them or be right.

MUTATIONS apply to one call: most of them to any call, some to calls of one name. They receive the call as it was
recorded, and record something else instead. Some mutations do not change a result (x * 2 for x + x), so a test
compares numbers if something was replaced in a mutant. A mutation that does not apply to a call raises.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from liger_compile.testing.graphs import Recorder, Value, again, name_of


@dataclass(frozen=True)
class Call:
    """A call that is about to be recorded."""

    recorder: Recorder
    node: Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: Any = None  # its result, if it has been recorded already

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Records the call, with other arguments if given, and returns its result."""
        if self.made is not None:
            return self.made
        return again(self.recorder, self.node, args or self.args, {**self.kwargs, **kwargs})

    @property
    def tensors(self) -> list[Value]:
        return [arg for arg in self.args if isinstance(arg, Value)]


class NotApplicable(Exception):
    """This mutation does not apply to this call."""


Mutation = Callable[[Call, Random], Any]
ON_PURPOSE = "rounds on purpose"  # a key in a node's meta: the rounding is part of its meaning


def on_result(change: Callable[[Any], Any]) -> Mutation:
    """Applies a change to the result."""

    def mutation(call: Call, random: Random) -> Any:
        result = call()
        if not isinstance(result, Value) or not isinstance(result.fake, torch.Tensor):
            raise NotApplicable
        return change(result)

    return mutation


def rounding(change: Callable[[Any], Any]) -> Mutation:
    """Applies a change to the result that has an effect only through rounding or the range of the dtype.

    A reference in higher precision must compute it in the actual dtypes, or it has no effect there.
    """
    changed = on_result(change)

    def mutation(call: Call, random: Random) -> Any:
        call_alone = again(call.recorder, call.node, call.args, call.kwargs)
        before = len(call.recorder.graph.nodes)
        result = changed(replace(call, made=call_alone), random)
        for node in [*call.recorder.graph.nodes][before:]:
            node.meta[ON_PURPOSE] = True
        return result

    return mutation


def without_gradient(change: Callable[[Any], Any]) -> Mutation:
    """Like `rounding`, where the gradient would be infinite or missing."""
    return rounding(lambda x: change(x).detach())


def on_argument(change: Callable[[Any], Any]) -> Mutation:
    """Applies a change to one tensor argument."""

    def mutation(call: Call, random: Random) -> Any:
        at = [
            i
            for i, arg in enumerate(call.args)
            if isinstance(arg, Value) and isinstance(arg.fake, torch.Tensor)
        ]
        chosen = random.choice(at or [None])
        if chosen is None:
            raise NotApplicable
        return call(*call.args[:chosen], change(call.args[chosen]), *call.args[chosen + 1 :])

    return mutation


def instead(name: str, function: Callable[..., Any]) -> Mutation:
    """Calls another function than `name` with the same arguments."""

    def mutation(call: Call, random: Random) -> Any:
        if name_of(call.node) != name:
            raise NotApplicable
        return function(*call.args, **call.kwargs)

    return mutation


def dropped(call: Call, random: Random) -> Any:
    """Returns one of the arguments instead of the result."""
    return random.choice(call.tensors)


def swapped(call: Call, random: Random) -> Any:
    """Swaps two arguments."""
    args = [*call.args]
    if len(args) == 1 and isinstance(args[0], (list, tuple)):
        return call([*args[0]][::-1])
    if args and isinstance(args[0], (list, tuple)):
        return call([*args[0]][::-1], *args[1:])
    if len(args) < 2 or not isinstance(args[1], (Value, int, float)):
        raise NotApplicable
    first, second, *others = args
    if name_of(call.node) == "pow" and isinstance(second, (int, float)) and second < 0:
        raise NotApplicable  # torch.fx writes pow(-0.5, x) as -0.5 ** x, which has another meaning
    return call(second, first, *others)


def other_number(call: Call, random: Random) -> Any:
    """Replaces one number in the arguments by another."""
    at = [i for i, arg in enumerate(call.args) if isinstance(arg, (int, float)) and not isinstance(arg, bool)]
    named = [
        key for key, arg in call.kwargs.items() if isinstance(arg, (int, float)) and not isinstance(arg, bool)
    ]
    chosen = random.choice([*at, *named] or [None])
    if chosen is None:
        raise NotApplicable
    change = random.choice(NUMBERS)
    if isinstance(chosen, str):
        return call(**{chosen: change(call.kwargs[chosen])})
    return call(*call.args[:chosen], change(call.args[chosen]), *call.args[chosen + 1 :])


NUMBERS: tuple[Callable[[Any], Any], ...] = (
    lambda n: n + 1,
    lambda n: n - 1,
    lambda n: -n,
    lambda n: 2 * n,
    lambda n: n * 1.01,
    lambda n: type(n)(0),
)


def other_flag(call: Call, random: Random) -> Any:
    """Inverts flags: keepdim=False for keepdim=True."""
    flags = [key for key, arg in call.kwargs.items() if isinstance(arg, bool)]
    if not flags:
        raise NotApplicable
    return call(**{key: not call.kwargs[key] for key in flags})


def other_word(call: Call, random: Random) -> Any:
    """Replaces words: reduction="sum" for "mean"."""
    others = {"mean": "sum", "sum": "mean", "none": "tanh", "tanh": "none"}
    words = [key for key, arg in call.kwargs.items() if arg in others]
    if not words:
        raise NotApplicable
    return call(**{key: others[call.kwargs[key]] for key in words})


def other_tensor(call: Call, random: Random) -> Any:
    """Replaces an argument by another tensor of the graph."""
    values = [Value(node, call.recorder) for node in call.recorder.graph.nodes]
    at = [i for i, arg in enumerate(call.args) if isinstance(arg, Value)]
    chosen = random.choice(at or [None])
    if chosen is None:
        raise NotApplicable
    alike = [value for value in values if _alike(value, call.args[chosen])]
    if not alike:
        raise NotApplicable
    return call(*call.args[:chosen], random.choice(alike), *call.args[chosen + 1 :])


def _alike(a: Value, b: Value) -> bool:
    """Returns whether two tensors are different and have equal shape and dtype."""
    if not isinstance(a.fake, torch.Tensor) or not isinstance(b.fake, torch.Tensor) or a.node is b.node:
        return False
    return a.shape == b.shape and a.dtype == b.dtype


def other_slice(call: Call, random: Random) -> Any:
    """Takes a slice that begins elsewhere, or another element of a tuple."""
    if name_of(call.node) != "getitem":
        raise NotApplicable
    x, index = call.args
    if isinstance(index, int):
        return x[(index + 1) % len(x)]
    *first, last = index if isinstance(index, tuple) else (index,)
    if not isinstance(last, slice):
        raise NotApplicable
    size = x.shape[-1]
    start, stop, step = last.indices(size)
    shift = random.choice((size // 2 if step == 1 else 1, 1))
    moved = slice(
        (start + shift) % size, None if (start + shift) % size + stop - start >= size else stop + shift, step
    )
    return x[(*first, moved)]


# Changes that equal x in real numbers but not in floating point; and changes with zero, infinity and NaN.
ROUNDINGS: tuple[Mutation, ...] = (
    rounding(lambda x: (x + 12582912.0) - 12582912.0),
    rounding(lambda x: (x - 3e4) + 3e4),
    rounding(lambda x: ((x + 1e8) + 1.0) - 1e8),
    rounding(lambda x: torch.sub(x.add(4096.0), 2048, alpha=2)),
    without_gradient(lambda x: x * 1e-30 * 1e-15 * 1e30 * 1e15),
    without_gradient(lambda x: x / 1e30 / 1e-20 * 1e-20 * 1e30),
    without_gradient(lambda x: (x * 1e30) * 1e30),
    without_gradient(lambda x: x.half().mul(1e-8).mul(1e8).to(x.dtype)),
    rounding(lambda x: x.half().div(300).square().to(x.dtype)),
    rounding(lambda x: x.sqrt() ** 2),
    rounding(lambda x: x.sqrt() * x.sqrt()),
    rounding(lambda x: x.rsqrt().square().reciprocal()),
    rounding(lambda x: x.square().sqrt()),
    rounding(lambda x: x * x.relu() / x.relu()),
    rounding(lambda x: x / x * x),
    without_gradient(lambda x: 1 / (1 / (x * 1e-30 * 1e-12))),
    without_gradient(lambda x: x + (x - x) * math.inf),
    rounding(lambda x: x.exp().exp().log().log()),
    rounding(lambda x: x.half().to(x.dtype)),
    rounding(lambda x: x.bfloat16().half().to(x.dtype)),
    rounding(lambda x: x.to(torch.float8_e4m3fn).to(x.dtype)),
    rounding(lambda x: (x * 4).to(torch.int32).to(x.dtype)),
    rounding(lambda x: x.bool().to(x.dtype)),
    rounding(lambda x: x * 0),
    without_gradient(lambda x: x * math.inf),
    without_gradient(lambda x: x / 0.0),
    without_gradient(lambda x: x * math.nan),
    without_gradient(lambda x: x + math.inf),
)

MUTATIONS: tuple[Mutation, ...] = (
    *ROUNDINGS,
    dropped,
    swapped,
    other_number,
    other_flag,
    other_word,
    other_tensor,
    other_slice,
    on_result(lambda x: -x),
    on_result(lambda x: x * 2),
    on_result(lambda x: x + 1),
    on_result(lambda x: x + 1e-3),
    on_result(lambda x: x.abs()),
    on_result(lambda x: x.detach()),
    on_result(lambda x: x.round(decimals=2)),
    on_result(lambda x: x.bfloat16().to(x.dtype)),
    on_result(lambda x: x.float()),
    on_result(lambda x: x.roll(1, -1)),
    on_result(lambda x: x.roll(1, 0)),
    on_result(lambda x: x.flip(-1)),
    on_result(lambda x: x.transpose(-1, -2)),
    on_result(lambda x: x.transpose(-1, -2).reshape(x.shape)),
    on_result(lambda x: x.transpose(0, 1).contiguous().view(x.shape)),
    on_result(lambda x: x.cumsum(-1)),
    on_result(lambda x: x.clamp(max=0.5)),
    on_result(lambda x: F.dropout(x, 0.5, training=True)),
    on_argument(lambda x: -x),
    on_argument(lambda x: x * 2),
    on_argument(lambda x: x + 1),
    on_argument(lambda x: x.detach()),
    on_argument(lambda x: x.bfloat16()),
    on_argument(lambda x: x.float()),
    on_argument(lambda x: x.double()),
    on_argument(lambda x: x[:1]),
    on_argument(lambda x: x[..., :1]),
    on_argument(lambda x: x.roll(1, -1)),
    on_argument(lambda x: x.mean(-1, keepdim=True)),
    instead("add", operator.mul),
    instead("add", operator.sub),
    instead("sub", operator.add),
    instead("mul", operator.add),
    instead("mul", operator.truediv),
    instead("div", operator.mul),
    instead("neg", torch.abs),
    instead("pow", lambda x, n: x.abs()),
    instead("rsqrt", torch.sqrt),
    instead("rsqrt", torch.reciprocal),
    instead("rsqrt", lambda x: torch.rsqrt(x).detach()),
    instead("sqrt", torch.rsqrt),
    instead("mean", lambda x, *args, **kwargs: x.sum(*args, **kwargs)),
    instead("mean", lambda x, *args, **kwargs: x.amax(-1, keepdim=True)),
    instead("mean", lambda x, *args, **kwargs: x.var(-1, keepdim=True)),
    instead("mean", lambda x, *args, **kwargs: x.mean(-2, keepdim=True)),
    instead("mean", lambda x, *args, **kwargs: x.mean()),
    instead("mean", lambda x, *args, **kwargs: x[..., : x.shape[-1] // 2].mean(-1, keepdim=True)),
    instead("sum", lambda x, *args, **kwargs: x.mean(-1, keepdim=True)),
    instead("to", lambda x, *_, **__: x),
    instead("float", lambda x: x),
    instead("float", lambda x: x.to(torch.int32).float()),
    instead("chunk", lambda x, *_, **__: x.chunk(2, -1)[::-1]),
    instead("chunk", lambda x, *_, **__: (x[..., ::2], x[..., 1::2])),
    instead("cat", lambda tensors, *_, **__: torch.stack(list(tensors), -1).flatten(-2)),
    instead("stack", lambda tensors, *_, **__: torch.stack(list(tensors), -2)),
    instead("silu", F.gelu),
    instead("silu", F.relu),
    instead("silu", torch.sigmoid),
    instead("silu", lambda x, **_: x * torch.sigmoid(1.702 * x)),
    instead("silu", lambda x, **_: F.silu(x.clamp(max=1.0))),
    instead("gelu", lambda x, **_: F.silu(x)),
    instead("gelu", lambda x, **_: x * torch.sigmoid(1.702 * x)),
    instead("gelu", lambda x, **_: 0.5 * x * (1 + torch.tanh(0.79 * (x + 0.044715 * x**3)))),
    instead("gelu", lambda x, **_: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.0447 * x**3)))),
    instead("gelu", lambda x, **_: 0.5 * x * (1 + torch.erf(x / 2))),
    instead("relu", F.silu),
    instead("tanh", torch.sigmoid),
    instead("tanh", torch.sin),
    instead("linear", lambda x, w, b=None: F.linear(x, w)),
    instead("linear", lambda x, w, b=None: F.linear(x, w * w, b)),
    instead("linear", lambda x, w, b=None: F.linear(x, w, b) + x.mean()),
    instead("linear", lambda x, w, b=None: F.linear(x, w.flip(0), b)),
    instead("cross_entropy", lambda x, y, *_, **k: F.cross_entropy(x, y.roll(1), **k)),
    instead("cross_entropy", lambda x, y, *_, **k: F.cross_entropy(x[1:], y[:-1], **k)),
    instead("cross_entropy", lambda x, y, *_, **k: F.cross_entropy(-x, y, **k)),
    instead("cross_entropy", lambda x, y, *_, **k: F.multi_margin_loss(x, y.clamp(min=0))),
    instead("cross_entropy", lambda x, y, *_, **k: F.cross_entropy(x.log_softmax(0), y, **k)),
    instead("cross_entropy", lambda x, y, *_, **k: F.cross_entropy(x * x.mean(-1, keepdim=True), y, **k)),
    instead("log_softmax", lambda x, *_, **__: F.log_softmax(x, 0)),
    instead("log_softmax", lambda x, *_, **__: F.softmax(x, -1)),
    instead("nll_loss", lambda x, y, *_, **k: F.nll_loss(x, y.roll(1), **k)),
    instead("view_as_complex", lambda x: torch.view_as_complex(x).conj()),
    instead("view_as_real", lambda x: torch.view_as_real(x.conj())),
)

# In-place writes before or after a call, which change values that are read later.
WRITES: tuple[Callable[[Any], Any], ...] = (
    lambda x: x.add_(1),
    lambda x: x.mul_(2),
    lambda x: x.neg_(),
    lambda x: operator.setitem(x, 0, 1),
    lambda x: operator.setitem(x, (Ellipsis, slice(0, 2)), 0.5),
    lambda x: operator.imul(x, 0.5),
    lambda x: operator.iadd(x, x),
    lambda x: x[..., :1].mul_(3),
    lambda x: x.transpose(0, -1).add_(0.5),
    lambda x: x.detach().mul_(2),
    lambda x: x.view(-1).sub_(1),
    lambda x: x.copy_(x.flip(-1)),
    lambda x: F.relu(x, inplace=True),
    lambda x: torch.ops.aten.mul_.Tensor(x, x),
    lambda x: torch.add(x, 1, out=x.detach()),
)
