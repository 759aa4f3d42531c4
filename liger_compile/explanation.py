"""explain(): runs a model once under the backend and returns what the backend did with it."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liger_compile.report import GraphReport, reports


@dataclass(frozen=True, eq=False)
class Explanation:
    """The reports of every graph of one call, in order, and where and why Dynamo broke the call in graphs."""

    graphs: tuple[GraphReport, ...]
    graph_breaks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Lists, dictionaries, strings and numbers only."""
        return {"graphs": [graph.to_dict() for graph in self.graphs], "graph_breaks": list(self.graph_breaks)}

    def __str__(self) -> str:
        if not self.graphs:
            return "liger_compile  no graph was compiled: nothing in this call computes with tensors"
        parts = [str(graph) for graph in self.graphs]
        parts += [f"Graph break: {reason}" for reason in self.graph_breaks]
        return "\n\n".join(parts)


def explain(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Runs `model(*args, **kwargs)` once with `backend="liger"` and says what was done with each graph.

    Only the recognising and rewriting is done; nothing goes to Inductor, so this takes seconds, and runs
    at the speed and with the memory of eager. Buffers and the random state are put back afterwards.
    Whatever was compiled in this process before is compiled anew at its next call.

    Args:
        model: a module or function, uncompiled. Training mode and `requires_grad` are taken as they are.
    """
    earlier = reports()
    torch._dynamo.reset()  # a graph compiled before would not be compiled, and so not reported, again
    with _state_restored(model):
        breaks_before = _graph_breaks()
        torch.compile(model, backend="liger", options={"liger.inner": "report"})(*args, **kwargs)
        breaks = _graph_breaks() - breaks_before
    torch._dynamo.reset()  # nor may the next torch.compile of this model find what was compiled here
    graphs = tuple(report for report in reports() if report not in earlier)
    return Explanation(graphs, tuple(_first_sentences(reason) for reason in breaks))


def _graph_breaks() -> Counter[str]:
    from torch._dynamo.utils import counters  # not at the top: Dynamo takes a second to import

    return counters["graph_break"] | counters["unimplemented"]  # Dynamo counts each break in one of them


@contextlib.contextmanager
def _state_restored(model: Callable[..., Any]) -> Iterator[None]:
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    saved = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, saved, strict=True):
                    buffer.copy_(value)


def _first_sentences(reason: str) -> str:
    # "Data-dependent branching\n  Explanation: Detected ...\n\n      The branch ...\n  Hint: ...": the title
    # and the first line of the explanation say what happened; the rest is advice to Dynamo's own users.
    title, _, rest = reason.partition("\n")
    explanation = re.search(r"Explanation: (.*)", rest)
    return f"{title}. {explanation[1]}" if explanation else title
