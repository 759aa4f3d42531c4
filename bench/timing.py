"""How a bench measures: interleaved rounds, CUDA graphs or events or a clock, and memory at its highest.

A `Contender` is one way of doing something, in stages that run one after the other ("forward", then "backward").
`interleave` runs a round of all contenders again and again, so that whatever changes on the machine meanwhile
changes for all of them, and returns milliseconds a call. How a stage is timed:

    graph     replays of a CUDA graph that holds a call for each set of buffers: GPU time, no launch overhead
    events    between two CUDA events: for what takes so long that launches do not show
    wall      a clock on the CPU
"""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Stages = Mapping[str, Callable[[], Any]]
Samples = dict[str, dict[str, list[float]]]

# Enough for the buffers of a graph to be in no cache (the L2 of an H200 holds 60 MB), and for a replay to last long
# beside the microseconds that starting it takes.
ROTATED_BYTES, MAX_SETS = 2 * 2**30, 64
_HEAD_START = 2_000_000  # cycles, about a millisecond


@dataclass(frozen=True)
class Contender:
    """Something to be timed.

    calls: how often a stage does its work.
    prepare: runs before each round, untimed.
    keeps: what a graph reads and writes and does not own, and has to live as long.
    """

    name: str
    stages: Stages
    timed_by: str
    calls: int = 1
    prepare: Callable[[], Any] = lambda: None
    keeps: Any = None


def interleave(contenders: Sequence[Contender], rounds: int, seconds: float) -> Samples:
    """Milliseconds a call: of each contender, of each stage, one for each round.

    Stops after `rounds`, or earlier when `seconds` have passed, but not before the third round.
    """
    found: Samples = {contender.name: {stage: [] for stage in contender.stages} for contender in contenders}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
        first = done % len(contenders)  # each comes after each other one
        for contender in itertools.chain(contenders[first:], contenders[:first]):
            contender.prepare()
            for stage, milliseconds in _TIMERS[contender.timed_by](contender.stages).items():
                found[contender.name][stage].append(milliseconds / contender.calls)
    return found


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles: (median, low, high)."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return median, low, high


def captured(
    name: str, function: Callable[..., Any], sets: Sequence[Sequence[Any]], refill: Callable[[], Any]
) -> Contender:
    """Forward and backward of `function` as CUDA graphs; by events where it waits for the GPU.

    `sets` are the arguments of each call of a graph. Everything that requires a gradient gets one. `refill` writes
    new values into arguments that a contender may have overwritten.
    """
    # Capture needs a stream aside, and autograd runs backward on that of forward.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = [_tuple(function(*args)) for args in sets]
        upstream = [upstream_of(out) for out in outputs]
        wanted = [differentiated(args) for args in sets]

        def forward() -> list[tuple[Tensor, ...]]:
            return [_tuple(function(*args)) for args in sets]

        def backward(outputs: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
            return [
                torch.autograd.grad(_floats(out), inputs, up)
                for out, inputs, up in zip(outputs, wanted, upstream, strict=True)
            ]

        def prepare() -> None:
            with torch.no_grad():
                refill()
                for gradient in itertools.chain.from_iterable(upstream):
                    if gradient.dim():
                        randomize(gradient)

        backward(outputs)  # compiles what is compiled
        del outputs
        is_waiting = _waits(lambda: backward(forward()))
    torch.cuda.synchronize()
    if is_waiting:
        kept: list[Any] = []

        def forward_kept() -> None:
            kept[:] = forward()

        def backward_of_kept() -> None:
            backward(kept)
            kept.clear()  # what it holds of the arguments' graph would tie later captures to this stream

        stages = {"forward": forward_kept, "backward": backward_of_kept}
        return Contender(name, stages, "events", len(sets), prepare)

    graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graphs[0], stream=stream):
        outputs = forward()
    # In the pool of the first, where the tensors saved for backward are: one is to be replayed after the other.
    with torch.cuda.graph(graphs[1], pool=graphs[0].pool(), stream=stream):
        gradients = backward(outputs)
    del outputs, gradients  # their memory stays with the graphs
    stages = {"forward": graphs[0].replay, "backward": graphs[1].replay}
    return Contender(name, stages, "graph", len(sets), prepare, keeps=(sets, upstream))


def replayed(name: str, stages: Stages, pool: Any = None) -> Contender:
    """Work without gradients as CUDA graphs, one for each stage.

    Graphs of one `pool` have their results in the same memory: each is overwritten by the next replay of any.
    """
    graphs = {}
    for stage, run in stages.items():
        run()
        torch.cuda.synchronize()
        graphs[stage] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[stage], pool=pool):
            run()
    return Contender(name, {stage: graph.replay for stage, graph in graphs.items()}, "graph", keeps=stages)


def randomize(tensor: Tensor) -> None:
    """Writes normal numbers into it. A capture that broke off leaves torch's own generator unusable."""
    tensor.normal_(generator=_generator(tensor.device))


@functools.cache
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def differentiated(args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The arguments that get a gradient."""
    return tuple(arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad)


def step(
    function: Callable[..., Any], args: Sequence[Any], upstream: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Results and gradients of one forward and backward, by default for the upstream gradients of `upstream_of`."""
    out = _tuple(function(*args))
    upstream = upstream_of(out) if upstream is None else upstream
    return (*out, *torch.autograd.grad(_floats(out), differentiated(args), upstream))


def upstream_of(out: Any) -> list[Tensor]:
    """A gradient for each result that has one, laid out as it is: random, the same in each call; 1 for a loss."""
    out = _tuple(out)
    generator = torch.Generator(out[0].device).manual_seed(1)

    def random(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    with torch.no_grad():
        return [
            torch.empty_like(tensor).copy_(random(tensor.shape)) if tensor.dim() else torch.ones_like(tensor)
            for tensor in _floats(out)
        ]


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most CUDA memory that is allocated while `run` runs and was not before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _by_events(stages: Stages) -> dict[str, float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
    torch.cuda._sleep(_HEAD_START)  # so that the CPU launches ahead, as it does in training
    marks[0].record()
    for mark, run in zip(marks[1:], stages.values(), strict=True):
        run()
        mark.record()
    marks[-1].synchronize()
    return {stage: a.elapsed_time(b) for stage, (a, b) in zip(stages, itertools.pairwise(marks), strict=True)}


def _by_wall(stages: Stages) -> dict[str, float]:
    found = {}
    for stage, run in stages.items():
        begin = time.perf_counter()
        run()
        found[stage] = 1000 * (time.perf_counter() - begin)
    return found


_TIMERS: Mapping[str, Callable[[Stages], dict[str, float]]] = {
    "graph": _by_events,
    "events": _by_events,
    "wall": _by_wall,
}


def _waits(run: Callable[[], Any]) -> bool:
    """Whether the CPU waits for the GPU in there, as `.item()` does; a capture that meets that is lost."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _floats(out: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in out if tensor.requires_grad]


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)
