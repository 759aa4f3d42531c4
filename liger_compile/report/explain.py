"""explain(): runs a model once under the backend and returns a report of each graph."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liger_compile.report import SCHEMA, GraphReport, reports
from liger_compile.report.html import in_notebook, page
from liger_compile.torch_internals import typed
from liger_compile.torch_internals.dynamo import graph_breaks


@dataclass(frozen=True, eq=False)
class Explanation:
    """The reports of all graphs of one call, in order, and the graph breaks of the call with their reasons."""

    graphs: tuple[GraphReport, ...]
    graph_breaks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns values that json.dumps accepts; docs/report_schema.md lists the fields."""
        graphs = [graph.to_dict() for graph in self.graphs]
        return {"schema": SCHEMA, "graphs": graphs, "graph_breaks": list(self.graph_breaks)}

    def to_html(self) -> str:
        """Returns a page that needs no other file: the modules as a tree, with equal layers as one.

        It shows each site and near miss beside its line of source, and the bytes that each module keeps for backward,
        in eager mode and without what the sites no longer keep. Notebooks show this page.
        """
        return page(self.graphs, self.graph_breaks)

    def _repr_html_(self) -> str:
        return in_notebook(self.to_html())

    def __str__(self) -> str:
        if not self.graphs:
            return "liger_compile  no graph was compiled: nothing in this call computes with tensors"
        parts = [str(graph) for graph in self.graphs]
        parts += [f"Graph break: {reason}" for reason in self.graph_breaks]
        return "\n\n".join(parts)


def explain(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Runs `model(*args, **kwargs)` once with `backend="liger"` and returns the reports of its graphs.

    It only recognizes and rewrites; Inductor does not compile the graphs. So it takes seconds, and runs at the
    speed and with the memory of eager mode. Afterwards it restores buffers and the random state. It resets Dynamo:
    everything compiled in this process is compiled again at its next call.

    Args:
        model: a module or function, not compiled. Training mode and `requires_grad` stay as they are.

    Returns:
        An Explanation: a report of each graph, and the graph breaks.
    """
    earlier = reports()
    torch.compiler.reset()  # a graph that was compiled before would not be compiled and reported again
    with _state_restored(model):
        breaks_before = graph_breaks()
        typed.compile(model, backend="liger", options={"liger.inner": "report"})(*args, **kwargs)
        breaks = graph_breaks() - breaks_before
    torch.compiler.reset()  # the next torch.compile of this model must not reuse these graphs
    graphs = tuple(report for report in reports() if report not in earlier)
    return Explanation(graphs, tuple(_first_sentences(reason) for reason in breaks))


@contextlib.contextmanager
def _state_restored(model: Callable[..., Any]) -> Generator[None, None, None]:
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    saved = [buffer.clone() for buffer in buffers]
    with typed.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, saved, strict=True):
                    buffer.copy_(value)


def _first_sentences(reason: str) -> str:
    # "Data-dependent branching\n  Explanation: Detected ...\n\n      The branch ...\n  Hint: ...": the title
    # and the first line of the explanation describe the graph break; the rest is advice to users of Dynamo.
    title, _, rest = reason.partition("\n")
    explanation = re.search(r"Explanation: (.*)", rest)
    return f"{title}. {explanation[1]}" if explanation else title
