"""Graphs of any number of nodes, recorded without Dynamo: one function a kind, of the inputs and that number.

The kinds are those in which a walk over nodes, terms, writes or outputs becomes quadratic, or a recursion as deep as
the graph, if it is not written with care. Most are no model; all may be part of one.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule

from liger_compile.testing.graphs import Recorder, Value
from liger_compile.torch_internals.fake_tensors import FakeTensorMode
from liger_compile.torch_internals.modes import SET_GRAD_ENABLED

Kind = Callable[["Inputs", int], Any]

HALVES = (torch.float16, torch.bfloat16)  # a cast from one to the other always rounds


class Inputs:
    """The inputs of a graph that is being recorded, and what is called beside its values."""

    def __init__(self, recorder: Recorder, mode: Any) -> None:
        self.recorder, self.real = recorder, []
        made = {
            "x": torch.zeros(2, 4, 8),
            "flags": torch.zeros(2, 4, 8, dtype=torch.bool),
            "q": torch.zeros(2, 2, 4, 8),
            "labels": torch.zeros(8, dtype=torch.long),
            "scale": torch.zeros(8, requires_grad=True),
            "weight": torch.zeros(8, 8, requires_grad=True),
            "head": torch.zeros(16, 8, requires_grad=True),
        }
        for name, tensor in made.items():
            setattr(self, name, recorder.placeholder(name, mode.from_tensor(tensor)))
            self.real.append(tensor)

    x: Value
    flags: Value
    q: Value
    labels: Value
    scale: Value
    weight: Value
    head: Value

    def call(self, function: Callable[..., Any], *args: Any) -> Value:
        return self.recorder.create_proxy("call_function", function, args, {})  # pyright: ignore[reportReturnType]


def recorded(kind: Kind, nodes: int) -> tuple[GraphModule, Sequence[Any]]:
    """The graph of a kind with about so many nodes, and its inputs."""
    mode, recorder = FakeTensorMode(static_shapes=True), Recorder()
    with mode:
        inputs = Inputs(recorder, mode)
        outputs = kind(inputs, nodes)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        node = recorder.graph.output(tuple(each.node for each in outputs))
        node.meta["example_value"] = tuple(each.fake for each in outputs)
    return GraphModule(torch.nn.Module(), recorder.graph), inputs.real


def _again(step: Callable[[Any, Inputs, int], Any], cost: int) -> Kind:
    """x, and then so many times `step` of it, which takes `cost` nodes."""

    def kind(inputs: Inputs, nodes: int) -> Any:
        x = inputs.x
        for at in range(nodes // cost):
            x = step(x, inputs, at)
        return x

    return kind


def norm(x: Any, weight: Any, mean: Callable[..., Any] = torch.mean) -> Any:
    return weight * (x * torch.rsqrt(mean(x.pow(2), -1, keepdim=True) + 1e-6))


def _layer(x: Any, i: Inputs, _: int) -> Any:
    return x + torch.relu(norm(x, i.scale) @ i.weight)


def _written_norm(x: Any, i: Inputs, _: int) -> Any:
    y = norm(x, i.scale) @ i.weight
    return y.add_(1.0)


def _gated(x: Any, i: Inputs, _: int) -> Any:
    gate = F.silu(F.linear(x, i.weight))
    return x + F.linear(gate * F.linear(x, i.weight), i.weight)


def _nearly_norm(x: Any, i: Inputs, _: int) -> Any:
    return x + torch.tanh(norm(x, i.scale, torch.sum) @ i.weight)


def _toggled(x: Any, i: Inputs, at: int) -> Any:
    i.call(SET_GRAD_ENABLED, at % 2 == 1)
    return x + i.scale


def _toggled_norm(x: Any, i: Inputs, at: int) -> Any:
    i.call(SET_GRAD_ENABLED, True)
    return torch.relu(norm(x, i.scale) @ i.weight)


def _reshaped(x: Any, at: int) -> Any:
    return x.view(8, 8) if at % 2 else x.view(2, 4, 8)


def _rotated(x: Any, i: Inputs, _: int) -> Any:
    cos, sin = i.q[0, 0], i.q[1, 1]
    return torch.tanh(x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin)


def _mixed(x: Any, i: Inputs, at: int) -> Any:
    """One of many operations that read a value more than once: paths double at each."""
    steps = (
        lambda: x + torch.tanh(x),
        lambda: x * torch.sigmoid(x),
        lambda: torch.where(x > 0, x, -x),
        lambda: torch.cat((x[..., 4:], x[..., :4]), -1),
        lambda: x - x.mean(-1, keepdim=True),
        lambda: x / (1 + x.abs()),
        lambda: torch.maximum(x, -x),
        lambda: x.view(8, 8).view(2, 4, 8) + x.half().float(),
        lambda: x @ (x.transpose(-1, -2) @ x),
        lambda: F.layer_norm(x, (8,)) + x,
        lambda: torch.stack((x, x), -2).flatten(-2)[..., ::2],
        lambda: x + F.linear(x, i.weight),
        lambda: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0] + x,
        lambda: x.softmax(-1) * x,
        lambda: x * i.scale + x * i.scale * 2,
        lambda: torch.relu(x) ** 2 + x,
    )
    return steps[at % len(steps)]()


CHAINS: dict[str, Kind] = {
    "sums": _again(lambda x, i, _: x + i.scale, 1),
    "sums_of_itself": _again(lambda x, i, _: x + x, 1),
    "products": _again(lambda x, i, _: x * i.scale, 1),
    "squares": _again(lambda x, i, _: x * x, 1),
    "residual_tanh": _again(lambda x, i, _: x + 0.1 * torch.tanh(x), 3),
    "gates": _again(lambda x, i, _: x + x * torch.sigmoid(x), 3),
    "wheres": _again(lambda x, i, at: torch.where(i.flags, x, float(at)), 1),
    "casts": _again(lambda x, i, at: x.to(HALVES[at % 2]), 1),
    "casts_and_views": _again(lambda x, i, at: _reshaped(x.to(HALVES[at % 2]), at), 2),
    # A chain of views alone takes torch's own fake tensors quadratic time.
    "views": _again(lambda x, i, at: _reshaped(x, at) if at % 40 else x.view(2, 4, 8) * 1.5, 1),
    "unary_and_views": _again(lambda x, i, at: _reshaped(torch.tanh(x), at), 2),
    "transposed_views": _again(lambda x, i, _: x.transpose(1, 2).reshape(2, 4, 8), 2),
    "slices": _again(lambda x, i, _: torch.cat((x[..., 1:], x[..., :1]), -1), 3),
    "nested_cats": _again(lambda x, i, _: torch.cat((x, i.x), -2)[:, -4:], 2),
    "half_rotations": _again(lambda x, i, _: torch.cat((-x[..., 4:], x[..., :4]), -1), 4),
    "linears": _again(lambda x, i, _: F.linear(x, i.weight), 1),
    "matmuls": _again(lambda x, i, _: (x @ x.transpose(-1, -2)).softmax(-1) @ x, 4),
    "writes": _again(lambda x, i, at: x.add_(i.x) if at else x * 2.0, 1),
    "written_norms": _again(_written_norm, 8),
    "no_grads": _again(_toggled, 2),
    "norms_between_no_grads": _again(_toggled_norm, 9),
    "norms": _again(_layer, 9),
    "gated_mlps": _again(_gated, 6),
    "rotations": _again(_rotated, 11),
    "near_misses": _again(_nearly_norm, 9),
    "mixed": _again(_mixed, 4),
}


def kind(function: Kind) -> Kind:
    """Registers a kind that is more than a chain."""
    OTHERS[function.__name__] = function
    return function


OTHERS: dict[str, Kind] = {}


def _then(chain: str) -> Kind:
    """A chain, and what moves inward past its operations: views, signs, casts, slices."""

    def ended(i: Inputs, nodes: int) -> Any:
        x = CHAINS[chain](i, nodes)
        parts = (
            x.view(8, 8),
            -x,
            x.transpose(0, 1),
            x[..., 1:3],
            torch.cat((x, x), -1),
            x.half(),
            x * i.scale,
        )
        return (*parts, x.softmax(-1) @ x.transpose(-1, -2))

    return ended


OTHERS.update(
    {f"{name}_then_moves": _then(name) for name in ("casts", "linears", "half_rotations", "matmuls")}
)
OTHERS["unary_then_moves"] = lambda i, nodes: _again(lambda x, i, _: torch.relu(x), 1)(i, nodes).view(8, 8)


@kind
def growing_cat(i: Inputs, nodes: int) -> Any:
    return functools.reduce(lambda x, _: torch.cat((x, i.x), -2), range(nodes), i.x).flatten(-2)


@kind
def doubled_cat(i: Inputs, nodes: int) -> Any:
    return functools.reduce(lambda x, _: torch.cat((x, x), -2), range(min(nodes, 40)), i.x).flatten(-2)


@kind
def writes_and_reads(i: Inputs, nodes: int) -> Any:
    x = i.x * 2.0
    return [torch.tanh(x.add_(i.x)) for _ in range(nodes // 2)]


@kind
def long_cat(i: Inputs, nodes: int) -> Any:
    parts = torch.cat([i.x * float(at) for at in range(2, nodes // 2)], -1)
    return [parts[..., 8 * at : 8 * at + 8] for at in range(nodes // 2 - 2)]


@kind
def long_split_written(i: Inputs, nodes: int) -> Any:
    parts = list((torch.cat([i.x] * (nodes // 6), -1) * 1.5).split(4, -1))
    for part in parts:
        part.mul_(2.0)
    return [part + 1.0 for part in parts]


@kind
def wide_reader(i: Inputs, nodes: int) -> Any:
    stacked = torch.stack([torch.tanh(i.x * float(at)) for at in range(2, nodes // 4)])
    return [F.silu(stacked.amax(0)) * stacked.amin(0) for _ in range(nodes // 8)]


@kind
def wide_sum(i: Inputs, nodes: int) -> Any:
    return sum((torch.tanh(i.x * float(at)) for at in range(2, nodes // 3)), i.x)


@kind
def masks(i: Inputs, nodes: int) -> Any:
    at = i.call(torch.arange, 4)
    mask, outputs = at[None] <= at[:, None], []
    for further in range(nodes // 5):
        mask = mask & (at[None] < at[:, None] + (further + 2))
        outputs.append(F.scaled_dot_product_attention(i.q, i.q, i.q, attn_mask=mask))
    return outputs


@kind
def doubled_masks(i: Inputs, nodes: int) -> Any:
    at = i.call(torch.arange, 4)
    mask = causal = at[None] <= at[:, None]
    for _ in range(nodes // 2):
        mask = (mask & causal) | mask
    return F.scaled_dot_product_attention(i.q, i.q, i.q, attn_mask=mask)


@kind
def outputs(i: Inputs, nodes: int) -> Any:
    return [torch.tanh(i.x * float(at)) for at in range(2, nodes // 2)]


@kind
def outputs_of_a_chain(i: Inputs, nodes: int) -> Any:
    found = [i.x]
    for _ in range(nodes):
        found.append(torch.tanh(found[-1]))
    return found


def _loss(i: Inputs, logits: Any) -> Any:
    return F.cross_entropy(logits.view(-1, 16), i.labels)


@kind
def logits_of_a_chain(i: Inputs, nodes: int) -> Any:
    found = [F.linear(torch.tanh(i.x), i.head)]
    for _ in range(nodes):
        found.append(torch.tanh(found[-1]))
    return [_loss(i, found[0]), *found]


@kind
def many_logits(i: Inputs, nodes: int) -> Any:
    logits = F.linear(torch.tanh(i.x), i.head)
    return [_loss(i, logits), *(logits * float(at) for at in range(2, nodes))]


@kind
def losses(i: Inputs, nodes: int) -> Any:
    logits = F.linear(torch.tanh(i.x), i.head)
    return sum(_loss(i, logits * float(at)) for at in range(2, nodes // 3))


@kind
def norms_of_one_weight(i: Inputs, nodes: int) -> Any:
    weight = 1 + i.scale.float()
    return functools.reduce(lambda x, _: torch.tanh(norm(x, weight)), range(nodes // 7), i.x)


@kind
def near_misses_of_one_value(i: Inputs, nodes: int) -> Any:
    return [norm(i.x, i.scale, torch.sum) * float(at) for at in range(2, nodes // 7)]


@kind
def near_misses_apart(i: Inputs, nodes: int) -> Any:
    return [norm(torch.relu(i.x * float(at)), i.scale, torch.sum) for at in range(2, nodes // 8)]


KINDS: dict[str, Kind] = {**CHAINS, **OTHERS}


def calls_of_one_body(calls: int, size: int) -> tuple[GraphModule, Sequence[Any]]:
    """A graph that calls one checkpoint, of so many sums, so many times."""
    mode, recorder, within, root = (
        FakeTensorMode(static_shapes=True),
        Recorder(),
        Recorder(),
        torch.nn.Module(),
    )
    with mode:
        x = recorder.placeholder("x", mode.from_tensor(torch.zeros(2, 8)))
        y = within.placeholder("y", x.fake)
        total = functools.reduce(lambda total, _: total + y, range(size), y)
        within.graph.output((total.node,)).meta["example_value"] = (total.fake,)
        root.body = GraphModule(torch.nn.Module(), within.graph)
        state = x.node
        for _ in range(calls):  # not by the recorder, which would compute them
            body = Graph.create_node(recorder.graph, "get_attr", "body")
            checkpoint = torch.ops.higher_order.tag_activation_checkpoint
            call = Graph.create_node(recorder.graph, "call_function", checkpoint, (body, state))
            call.meta["example_value"] = (total.fake,)
            state = Graph.create_node(recorder.graph, "call_function", operator.getitem, (call, 0))
            state.meta["example_value"] = total.fake
        recorder.graph.output((state,)).meta["example_value"] = (total.fake,)
    return GraphModule(root, recorder.graph), [torch.zeros(2, 8)]
