"""Outputs that have all rows, beside a graph that computes the live rows of a padded batch only.

    returned_rows()  finds the outputs of a captured graph that have rows: logits, hidden states, keys and values
    LateRows         fills them after each call with tensors that are computed on the first read
    Budget           counts the late computations: calls that need too many of them compute all rows

A late read runs the captured graph, without its loss, on the inputs of the call: eager code, so the values are those of
eager code. The weights must be those of the call, as for late logits (runtime/promise.py): before an optimizer's step,
outputs that are still alive keep copies of the weights that the step changes, or are computed, and every other change
of a weight is an error when the outputs are read. Small inputs that are no parameters, such as token ids, are copied.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from liger_compile.forward_passes.logits import (
    LateOutput,
    Logits,
    late_outputs_of,
    positions_of_outputs,
)
from liger_compile.graphs.aliasing import storages_of
from liger_compile.graphs.regions import around, is_switch
from liger_compile.runtime.fingerprint import has_fingerprint
from liger_compile.runtime.lazy import LazyTensor, lazies
from liger_compile.runtime.promise import Recipe
from liger_compile.terms.build import Terms
from liger_compile.torch_internals.autograd import saved_tensors_have_hooks
from liger_compile.torch_internals.modes import SET_GRAD_ENABLED
from liger_compile.torch_internals.shapes import Places, number_of

_ADVICE = (
    'read them before the weights change, or compile with options={"liger.rows": "all"} to compute all rows in the '
    "compiled graph"
)
# A late computation takes about as long as two thirds of a step. A call saves at least an eighth of a step.
CALLS_PER_READ = 16
COPIED_BYTES = 64  # by row: a change of larger inputs is an error when the outputs are read


class Budget:
    """Counts the calls that leave rows out, and the late computations of these rows.

    `said` has a sentence once the late computations may take more time than the calls save.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self.calls = self.reads = 0
        self.is_spent = False
        self._lock = threading.Lock()

    def called(self) -> None:
        self.calls += 1

    def read(self) -> None:
        with self._lock:
            self.reads += 1
            if self.is_spent or self.reads * CALLS_PER_READ <= self.calls + CALLS_PER_READ:
                return
            self.is_spent = True
            self.said.append(
                f"all rows are computed from call {self.calls + 1} on: outputs that have all rows were computed late, "
                f"{self.reads} times in {self.calls} calls, because they were read, or alive at an optimizer's step"
            )


class _Likes:
    """Meta tensors like late values, and the memory of the outputs in eager code, for the sizes of a call."""

    def __init__(self, values: Sequence[Tensor], outputs: Sequence[Tensor], places: Places) -> None:
        """Takes late values and outputs in the trace of the graph, and where its inputs have the sizes."""
        self._layouts = [(v.shape, v.stride(), v.dtype, v.requires_grad) for v in values]
        self._sizes = [(output.shape, output.itemsize) for output in outputs]
        self._places = places
        self._made: tuple[Any, tuple[tuple[Tensor, ...], int]] | None = None  # of the last numbers

    def of(self, inputs: Sequence[Any]) -> tuple[tuple[Tensor, ...], int]:
        """Returns meta tensors with `requires_grad` as in eager code, and a number of bytes."""
        numbers, last = self._places.numbers(inputs), self._made
        if last is not None and last[0] == numbers:
            return last[1]

        def ints(sizes: Sequence[Any]) -> list[int]:
            return [number_of(size, numbers) for size in sizes]

        likes = tuple(
            torch.empty_strided(
                ints(shape), ints(strides), dtype=dtype, device="meta", requires_grad=requires_grad
            )
            for shape, strides, dtype, requires_grad in self._layouts
        )
        made = likes, sum(math.prod(ints(shape)) * itemsize for shape, itemsize in self._sizes)
        self._made = numbers, made
        return made


@dataclass(frozen=True)
class LateRows:
    """Fills the outputs that have rows.

    Args:
        recipe: computes a tuple from inputs of the graph.
        inputs: the positions of these inputs.
        copied: which of these positions are copied in each call.
        likes: makes tensors like the values of the recipe.
        positions: the outputs that are each value, or logits of it.
        hidden: the number of values at the end that only logits are computed from.
        logits: the outputs that are computed from hidden states.
    """

    recipe: Recipe
    inputs: tuple[int, ...]
    copied: frozenset[int]
    likes: _Likes
    positions: tuple[tuple[int, ...], ...]
    hidden: int
    logits: tuple[LateOutput, ...]
    has_gradients: bool

    def __str__(self) -> str:
        which = ", ".join(map(str, sorted(at for positions in self.positions for at in positions)))
        return (
            f"graph outputs {which} have all rows: the first read computes them, in eager code; with "
            f"more than one such read in {CALLS_PER_READ} calls, later calls compute all rows"
        )

    def fill(self, outputs: list[Any], inputs: Sequence[Any]) -> None:
        """Puts lazy tensors in place of None."""
        given = [inputs[at].detach().clone() if at in self.copied else inputs[at] for at in self.inputs]
        likes, num_bytes = self.likes.of(inputs)
        with torch.set_grad_enabled(self.has_gradients):
            made = lazies(self.recipe, likes, *given, num_bytes=num_bytes)
        for value in made[len(made) - self.hidden :]:
            if isinstance(value, LazyTensor):
                value.is_private = True
        for value, positions in zip(made, self.positions, strict=True):
            for at in positions:
                outputs[at] = value
        for late in self.logits:
            late.fill(outputs, inputs)


@dataclass(frozen=True)
class Returned:
    """How outputs that have rows are returned.

    Args:
        why_kept: why they stay outputs of the graph, a sentence; None if they may be computed late.
        is_dropped: logits are None.
        is_read: they are likely to be read where gradients are off.
        memory: bytes for a chunk of logits in answers to questions; None for the default.
    """

    why_kept: str | None = None
    is_dropped: bool = False
    is_read: bool = True
    memory: int | None = None


@dataclass(frozen=True)
class Found:
    """The positions of outputs that have rows, and how they are filled; `late` is None if all of them are None."""

    positions: frozenset[int]
    late: LateRows | None
    budget: Budget

    def notes(self) -> Iterator[str]:
        """Yields sentences for the report on how the outputs are filled."""
        filled = set().union(*self.late.positions) if self.late else set()
        if dropped := ", ".join(map(str, sorted(self.positions - filled))):
            yield f"the logits (graph output {dropped}) are None: liger.logits is 'none'"
        if self.late:
            yield str(self.late)

    def is_unwanted(self) -> bool:
        """Returns whether a call is to compute all rows, whatever its inputs are.

        Late outputs save all weights for backward, which hooks would get: a checkpoint in eager code counts them, and
        save_on_cpu copies them.
        """
        return self.late is not None and (self.budget.is_spent or saved_tensors_have_hooks())


def returned_rows(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    outputs: Sequence[Node],
    logits: Sequence[Logits],
    terms: Terms,
    returned: Returned,
    num_rows: int,
) -> Found | str:
    """Returns how to fill the outputs of a graph that have rows, or why all rows are computed, in a sentence.

    Args:
        outputs: the outputs that depend on rows.
        logits: outputs that are logits.
        num_rows: B * T.
    """
    budget = Budget()
    late_logits = [one for one in logits if one.output in outputs]
    of_hidden = {one.output for one in late_logits}
    whole = [node for node in outputs if node not in of_hidden]
    late = outputs if not returned.is_dropped else whole
    positions = frozenset(at for node in outputs for at in positions_of_outputs(gm.graph)[node])
    if not late:
        return Found(positions, None, budget)
    if why := _why_not_late(late, example_inputs, terms, returned):
        return f"the graph returns every row of {late[0].name}, and {why}"
    kept = [] if returned.is_dropped else late_logits
    made = _late_rows(gm, example_inputs, whole, kept, terms, budget, returned.memory, num_rows)
    return Found(positions, made, budget)


def _why_not_late(
    outputs: Sequence[Node], example_inputs: Sequence[Any], terms: Terms, returned: Returned
) -> str | None:
    if returned.why_kept:
        return returned.why_kept
    if returned.is_read and not all(terms.regions.of[node].has_gradients for node in outputs):
        return "gradients are off, as in an evaluation, which is likely to read it"
    if any(
        not storages_of(first).isdisjoint(storages_of(second))
        for at, first in enumerate(outputs)
        for second in outputs[at + 1 :]
    ):
        return "another output shares its memory"
    if not all(isinstance(node.meta["example_value"], Tensor) for node in outputs):
        return "it is several tensors"
    tensors = (value for value in example_inputs if isinstance(value, Tensor))
    if not all(map(has_fingerprint, tensors)):
        return "an input is a tensor whose changes are not detected"
    return None


def _late_rows(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    whole: Sequence[Node],
    logits: Sequence[Logits],
    terms: Terms,
    budget: Budget,
    memory: int | None,
    num_rows: int,
) -> LateRows:
    nodes = [*whole, *(one.hidden for one in logits)]
    inputs, runs = _graph_of(gm, nodes, len(logits))
    (*_, first) = nodes
    device = first.meta["example_value"].device.type
    positions = positions_of_outputs(gm.graph)
    outputs = [*whole, *(one.output for one in logits)]
    late = tuple(late_outputs_of(logits, terms, memory=memory, said=budget.said))
    return LateRows(
        Recipe(
            _counted(runs, budget), "logits" if logits else "outputs", _ADVICE, around().autocast_on(device)
        ),
        inputs,
        frozenset(at for at in inputs if _is_small(example_inputs[at], num_rows)),
        _Likes(
            [node.meta["example_value"] for node in nodes],
            [node.meta["example_value"] for node in outputs],
            Places(examples_of(gm)),
        ),
        tuple(tuple(positions[node]) for node in outputs),
        len(logits),
        late,
        terms.regions.of[first].has_gradients,
    )


def examples_of(gm: GraphModule) -> list[Any]:
    """Returns the inputs of a graph in its trace: fake tensors and sizes."""
    return [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]


def _counted(runs: Mapping[bool, GraphModule], budget: Budget) -> Callable[..., tuple[Tensor, ...]]:
    def run(*inputs: Any) -> tuple[Tensor, ...]:
        budget.read()
        return runs[torch.is_grad_enabled()](*inputs)

    return run


def _is_small(value: Any, num_rows: int) -> bool:
    is_data = isinstance(value, Tensor) and not isinstance(value, Parameter) and not value.requires_grad
    return is_data and value.nbytes <= COPIED_BYTES * num_rows


def _graph_of(
    gm: GraphModule, nodes: Sequence[Node], private: int
) -> tuple[tuple[int, ...], Mapping[bool, GraphModule]]:
    """Returns the positions of the inputs that nodes depend on, and modules that compute the nodes from these inputs.

    The modules are by grad mode: without gradients, no switch in the graph turns them on.

    Args:
        private: the number of nodes at the end that are copied, so that nothing shares their memory.
    """
    needed = ancestors(nodes)
    inputs = tuple(at for at, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in needed)
    modules = {}
    for has_gradients in (True, False):
        graph, copies = Graph(), {}
        for node in gm.graph.nodes:
            is_kept = is_switch(node) and (has_gradients or node.target is not SET_GRAD_ENABLED)
            if node in needed or is_kept:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta.clear()
        values = [copies[node] for node in nodes]
        at = len(values) - private
        graph.output((*values[:at], *(graph.call_function(torch.clone, (value,)) for value in values[at:])))
        modules[has_gradients] = GraphModule(gm, graph)
    return inputs, modules


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """Returns nodes and all nodes that they depend on."""
    found, waiting = set(nodes), list(nodes)
    while waiting:
        new = [arg for arg in waiting.pop().all_input_nodes if arg not in found]
        found.update(new)
        waiting.extend(new)
    return found
