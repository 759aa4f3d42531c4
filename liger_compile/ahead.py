"""Running a graph before it is known whether it is the right one, so that a GPU need not wait for the CPU.

To read one scalar, the CPU waits until a GPU has finished all that it was given before; then the GPU waits until the
CPU has launched the first kernels of what comes next. Where the answer has been the same for long, the graph for that
is launched first, and the answer read after: by then it is mostly there. If it is the other one, what was launched is
thrown away, and the other graph runs as if nothing had been.

In: a Dynamo graph; tensors. Out: whether all that the graph does can be thrown away; an answer to be waited for later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from liger_compile.terms.mutation import Mutations, tensors_of

Answer = Callable[[], bool]


def leaves_nothing(gm: GraphModule) -> bool:
    """Whether a call writes into nothing that it is given, and talks to no other process, which would have to listen.

    What a call takes from random number generators is given back by `Random`.
    """
    mutations = Mutations(gm.graph)
    given = [node for node in gm.graph.nodes if node.op in ("placeholder", "get_attr")]
    is_plain = not any(is_traceable_wrapper_subclass(tensor) for node in given for tensor in tensors_of(node))
    return is_plain and all(map(mutations.is_clean, given)) and not any(map(_is_collective, _targets(gm)))


def _targets(gm: GraphModule) -> list[object]:
    modules = [module for module in gm.modules() if isinstance(module, GraphModule)]
    return [node.target for module in modules for node in module.graph.nodes if node.op == "call_function"]


def _is_collective(target: object) -> bool:
    where = getattr(target, "__module__", None) or "", getattr(target, "namespace", "")
    return where[0].startswith("torch.distributed") or "c10d" in where[1]


def is_on_gpu(tensors: Sequence[torch.Tensor]) -> bool:
    """On that which work goes to now; so that to ask without waiting is something else than to ask."""
    return all(tensor.is_cuda and tensor.device.index == torch.cuda.current_device() for tensor in tensors)


def are_all_ones(tensors: Sequence[torch.Tensor]) -> Answer:
    """Asks now; the answer waits for what the GPU was given up to now, not for what it is given meanwhile."""
    found = torch.stack([(tensor == 1).all() for tensor in tensors]).all()
    if not found.is_cuda:
        return lambda: bool(found)
    answer = torch.empty((), dtype=torch.bool, pin_memory=True)
    answer.copy_(found, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> bool:
        event.synchronize()
        return bool(answer)

    return wait


class Random:
    """The state of the random number generators of the CPU and of a GPU, to go back to."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = torch.get_rng_state()
        self._on_gpu = None
        if device.type == "cuda":
            generator = torch.cuda.default_generators[device.index]
            self._on_gpu = generator, generator.get_offset()

    def restore(self) -> None:
        torch.set_rng_state(self._on_cpu)
        if self._on_gpu is not None:
            generator, offset = self._on_gpu
            generator.set_offset(offset)
