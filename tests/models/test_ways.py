"""The same sites, the same numbers and no more graphs, in whichever way a model is compiled and run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from bench.zoo import KINDS, Runs, float64, fresh
from liger_compile.testing import precision
from tests.models.families import BY_NAME, Family, of_one_layer
from tests.models.harness import Step, assert_within, batch, step

EXACT = 1e-5
LENGTHS = (24, 40, 17)
Loss = Callable[..., Tensor]

# Norms, tensors that are turned, gated MLPs, losses, of two layers. The activations of `packed` are (tokens, width).
SITES = {
    "llama": (5, 4, 2, 1),
    "qwen3": (9, 4, 2, 1),
    "gemma2": (9, 4, 2, 1),
    "packed": (5, 4, 2, 1),
}


# In these, a graph break between head and loss is the model's: the loss is a graph of its own, and stays alone.
LOSS_ALONE = {
    ("packed", "broken_between_layers"),
    ("packed", "broken_within_layers"),
    ("packed", "layer_by_layer"),
}


def layers_of(model: Any) -> Sequence[Any]:
    return (model.model if hasattr(model, "model") else model).layers


def break_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


# Each compiles a model in one way, and gives the function of (model, ids, labels) that then is called.


def whole(family: Family, model: nn.Module, backend: Any, **kwargs: Any) -> Loss:
    return torch.compile(family.loss, backend=backend, **kwargs)


def layer_by_layer(family: Family, model: nn.Module, backend: Any) -> Loss:
    for layer in layers_of(model):
        layer.compile(backend=backend)
    return family.loss


def broken_between_layers(family: Family, model: nn.Module, backend: Any) -> Loss:
    break_before(layers_of(model)[1])
    return whole(family, model, backend)


def broken_within_layers(family: Family, model: nn.Module, backend: Any) -> Loss:
    for layer in layers_of(model):
        break_before(layer.mlp)
    return whole(family, model, backend)


def checkpointed(family: Family, model: Any, backend: Any) -> Loss:
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        for layer in layers_of(model):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return whole(family, model, backend)


def with_autocast_inside(family: Family, model: nn.Module, backend: Any) -> Loss:
    def loss(*args: Any) -> Tensor:
        with autocast():
            return family.loss(*args)

    return torch.compile(loss, backend=backend)


@dataclass(frozen=True)
class Way:
    """How a model is compiled, and run once for each of `lengths`.

    With `is_short`, the model has one layer. `outside` are the sites that are not compiled, or not marked
    because a checkpoint recomputes them. `eager` is around a step in eager mode, and `around` around ours too.
    """

    compiled: Callable[..., Loss]
    lengths: Sequence[int] = LENGTHS[:1]
    dtype: torch.dtype = torch.float32
    around: Callable[[], Any] = contextlib.nullcontext
    eager: Callable[[], Any] = contextlib.nullcontext
    outside: Mapping[str, int] = field(default_factory=dict)
    is_short: bool = False
    inner: str = "eager"  # AOTAutograd, where it may add guards or has a say in what is kept


WAYS = {
    "dynamic": Way(partial(whole, dynamic=True), LENGTHS, is_short=True, inner="aot_eager"),
    "automatic_dynamic": Way(whole, LENGTHS, is_short=True, inner="aot_eager"),
    "layer_by_layer": Way(layer_by_layer, outside={"norms": 1, "loss": 1}),
    "broken_between_layers": Way(broken_between_layers),
    "broken_within_layers": Way(broken_within_layers),
    "checkpointed": Way(checkpointed, outside={"mlps": 2}, inner="aot_eager"),
    "float16": Way(whole, dtype=torch.float16, is_short=True),
    "autocast_around": Way(whole, around=autocast, eager=autocast, is_short=True),
    "autocast_inside": Way(with_autocast_inside, eager=autocast, is_short=True),
}


# Every way, and every model in the ways that differ most from model to model; the other combinations are slow tests.
OFTEN = {
    "llama": ("layer_by_layer", "checkpointed", "autocast_around"),
    "qwen3": ("autocast_inside",),
    "gemma2": ("float16",),
    "packed": ("dynamic", "automatic_dynamic", "broken_between_layers", "broken_within_layers"),
}
CASES = [
    pytest.param(name, way, marks=() if way in OFTEN[name] else pytest.mark.slow)
    for name in SITES
    for way in WAYS
]


@pytest.mark.parametrize(("name", "way_name"), CASES)
def test_sites_numbers_and_graphs(name: str, way_name: str) -> None:
    family, way, sites = BY_NAME[name], WAYS[way_name], SITES[name]
    if way.is_short:
        family, sites = of_one_layer(family), [(count + 1) // 2 for count in sites]
    runs = Runs(way.inner)
    found, steps, compilations = trained(family, way, runs)
    sites = dict(zip(KINDS, sites, strict=True))
    outside = {**way.outside, **({"loss": 1} if (name, way_name) in LOSS_ALONE else {})}
    expected = {kind: count - outside.get(kind, 0) for kind, count in sites.items()}
    assert found == [expected] * len(way.lengths), "\n".join(map(str, runs.reports))

    model = family.build(way.dtype)
    for length, got in zip(way.lengths, steps, strict=True):
        inputs = batch(family, length)
        with way.eager():
            eager = step(family.loss, model, *inputs)
        if way.dtype is torch.float32 and way.eager is not autocast:
            assert_within(got, eager, EXACT)
        else:
            precision.assert_no_worse(got, eager, step(family.loss, float64(family, way.dtype), *inputs))

    assert compilations <= trained(family, way, "eager")[2]


def trained(family: Family, way: Way, backend: Any) -> tuple[list[dict[str, int]], list[Step], int]:
    """What was found in each step, the steps, and how often Dynamo compiled something for them."""
    fresh()
    counters.clear()
    found, steps, model = [], [], family.build(way.dtype)
    function = way.compiled(family, model, backend)
    for length in way.lengths:
        if isinstance(backend, Runs):
            backend.reports.clear()
        with way.around():
            steps.append(step(function, model, *batch(family, length)))
        if isinstance(backend, Runs):
            found.append(backend.found)
    return found, steps, counters["frames"]["ok"]
