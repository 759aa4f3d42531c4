"""Compiles one graph twice: specialized for calls whose masks have their typical values, and generic for all calls.

Trainers pass a padding mask to every call, and in most calls it is all ones. An attention mask that is causal except
for such an input is then just causal. Other masks are made outside the graph (before a graph break, or in a buffer) and
are causal themselves. So in a second graph the assumed value replaces the input. The steps prove the mask from it as
they prove any other mask, and each call checks its real input to choose between the two graphs, as Hugging Face's eager
code does. Each call checks the same value that was put in, so either graph computes the result of the captured graph.

In: a captured Dynamo GraphModule. Out: a specialized copy of it, and the callable that dispatches on inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from liger_compile.graphs.aliasing import Mutations
from liger_compile.torch_internals.dispatch import is_traceable_wrapper_subclass
from liger_compile.torch_internals.fake_tensors import FakeTensor
from liger_compile.torch_internals.fx import copy_source

Compile = Callable[[Sequence[Any]], Callable[..., Any]]  # example inputs -> the compiled graph
_PART_OF = "liger_compile_part_of"  # a key in the meta of a graph
WITHOUT, CAUSAL, GENERIC = "without padding", "with causal masks", "generic"


@dataclass(frozen=True)
class Assumption:
    """An assumption about an input: its value in most calls.

    Args:
        description: the value in words.
        rank: the number of last dimensions along which the value varies.
        steps: make the value from any tensor of its shape and dtype, or from the last `rank` dimensions of one; each
            step is a function with its further arguments.
    """

    description: str
    rank: int
    steps: tuple[tuple[Any, ...], ...]

    def made_of(self, tensor: Tensor) -> Tensor:
        for function, *arguments in self.steps:
            tensor = function(tensor, *arguments)
        return tensor

    def compared(self, tensor: Tensor) -> Tensor:
        """Returns whether the tensor has the assumed value: () booleans, on its device."""
        if not tensor.numel():
            return torch.ones((), dtype=torch.bool, device=tensor.device)
        last = tensor[(0,) * (tensor.dim() - self.rank)]
        return (tensor == self.made_of(last)).all()


ONES = Assumption("of all ones", 0, ((torch.ones_like,),))

# Scores of attention, over batch, heads, queries and keys, from which a check pays on a GPU. Attention saves 2.2 ps a
# score (4 layers of Llama, 4 x 2048 tokens, with the mask in memory 50.4 ms, without 45.7), and the check costs a step
# 0.7 ms, because the CPU waits for the GPU (H100, torch 2.11.0, 2026-11-25 and 26: bench/NOTES.md).
FEWEST_SCORES = 2**28


def _causal_masks(dtype: torch.dtype) -> Iterable[Assumption]:
    """Yields the forms that a causal mask may have."""
    yield Assumption("that is causal", 2, ((torch.ones_like,), (torch.tril,)))
    yield Assumption(
        "that is causal", 2, ((torch.ones_like,), (torch.triu, 1))
    )  # ones at the masked-out positions
    if dtype.is_floating_point:
        for lowest in (torch.finfo(dtype).min, float("-inf")):
            yield Assumption("that is causal", 2, ((torch.full_like, lowest), (torch.triu, 1)))


class Variant(NamedTuple):
    """The version of a graph that is compiled more than once: a name, and a note for its report."""

    name: str
    note: str


def as_part(gm: GraphModule, variant: Variant) -> GraphModule:
    """Marks `gm` as a part of a graph that was specialized as a whole, and returns it."""
    gm.meta[_PART_OF] = variant
    return gm


def of_part(gm: GraphModule) -> Variant | None:
    """Returns the variant that `gm` is a part of."""
    return gm.meta.get(_PART_OF)


def specialized_variant(assumptions: Mapping[str, Assumption]) -> Variant:
    """Returns the name and the note of the graph specialized for these assumptions."""
    name = WITHOUT if set(assumptions.values()) == {ONES} else CAUSAL
    return Variant(
        name,
        f"specialized for {_text(assumptions)} (checked on every call, one device sync); other calls use the "
        f"{GENERIC} graph, which is compiled when a call first needs it and then has its own report",
    )


def generic_variant(assumptions: Mapping[str, Assumption]) -> Variant:
    """Returns the name and the note of the generic graph."""
    name, _ = specialized_variant(assumptions)
    others = "padding" if name == WITHOUT else "other masks"
    return Variant(
        GENERIC,
        f"generic: used by calls with {others}; calls with {_text(assumptions)} use the graph {name!r}",
    )


def why_not_checked(
    assumptions: Mapping[str, Assumption], scores: int, devices: Collection[str]
) -> str | None:
    """Returns why a check of the assumptions takes longer than it saves, in a sentence, or None.

    Args:
        scores: the number of scores of the attention that needs no mask if the assumptions hold.
        devices: the types of the devices that hold the assumed tensors.
    """
    if scores >= FEWEST_SCORES or "cuda" not in devices:
        return None
    few, enough = (f"{number / 2**20:.0f} Mi scores" for number in (scores, FEWEST_SCORES))
    return (
        f"no call is specialized for {_text(assumptions)}: the check waits for the GPU, which takes longer than "
        f"attention with {few} saves (it pays from {enough}); liger.policy='always' checks"
    )


def _text(assumptions: Mapping[str, Assumption]) -> str:
    names: dict[str, list[str]] = {}
    for name, assumption in assumptions.items():
        names.setdefault(assumption.description, []).append(name)
    return " and ".join(f"{' and '.join(inputs)} {words}" for words, inputs in names.items())


def copied(gm: GraphModule) -> GraphModule:
    """Returns a copy of the module and of its subgraphs with new graphs; tensors and values of nodes are shared."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    graph.output(result).meta.update(gm.graph.output_node().meta)
    for node, copy in copies.items():
        copy.meta.pop("grapharg", None)  # the example input
        copy_source(node, copy)
    # Every module has its own class; the base of Dynamo's class generates its code lazily.
    module = type(gm).__bases__[0](gm, graph)
    module.meta = dict(gm.meta)
    for name, value in vars(gm).items():  # for example Dynamo's names of the inputs
        vars(module).setdefault(name, value)
    for name, child in module.named_children():
        if isinstance(child, GraphModule):
            setattr(module, name, copied(child))
    return module


def is_symbolic(gm: GraphModule) -> bool:
    """Returns whether it has dynamic shapes: Dynamo then adds guards, and adds none after the backend has run."""
    values = [node.meta.get("example_value") for node in gm.graph.nodes]
    sizes = [size for v in values if isinstance(v, torch.Tensor) for size in (*v.shape, *v.stride())]
    return any(
        isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) for value in (*values, *sizes)
    )


def find_assumptions(
    gm: GraphModule, padding: Collection[str], masks: Collection[str] = (), example_inputs: Sequence[Any] = ()
) -> dict[str, Assumption]:
    """Returns the assumptions about the named values that are inputs of the graph.

    Padding masks are assumed to be all ones, other masks to have the causal form of the example.
    """
    mutations = Mutations(gm.graph)
    found: dict[str, Assumption] = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if node.name not in (*padding, *masks) or not _only_read(node, gm.graph, mutations):
            continue
        if node.name in padding:
            found[node.name] = ONES
        elif form := _causal_form(example_inputs[position]):
            found[node.name] = form
    return found


def _only_read(node: Node, graph: Graph, mutations: Mutations) -> bool:
    """Returns whether it is a plain tensor that is not written, returned, or used as token ids of an embedding."""
    value, memory = node.meta.get("example_value"), mutations.memory(node)
    if not isinstance(value, Tensor) or is_traceable_wrapper_subclass(value) or value.requires_grad:
        return False
    return mutations.is_clean(node) and not any(
        memory & mutations.memory(arg)
        for reader in graph.nodes
        if reader.op == "output" or getattr(reader.target, "__name__", "") == "embedding"
        for arg in reader.all_input_nodes
    )


def _causal_form(mask: Tensor) -> Assumption | None:
    """Returns the form in which the mask is causal, or None."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return None
    return next((form for form in _causal_masks(mask.dtype) if form.compared(mask)), None)


def with_assumptions(gm: GraphModule, assumptions: Mapping[str, Assumption]) -> GraphModule:
    """Returns a copy of `gm` in which the assumed values replace these inputs, whatever the caller passes."""
    module = copied(gm)
    inputs = module.graph.find_nodes(op="placeholder")
    for node in (node for node in inputs if node.name in assumptions):
        first, last = node, node
        with module.graph.inserting_before(inputs[-1].next):
            for function, *arguments in assumptions[node.name].steps:
                value = last.meta["example_value"]
                last = module.graph.call_function(function, (last, *arguments))
                with value.fake_mode:
                    last.meta["example_value"] = function(value, *arguments)
                first = last if first is node else first
        node.replace_all_uses_with(last, delete_user_cb=lambda user, first=first: user is not first)
    return module


class Dispatch:
    """Runs the graph that the inputs of a call allow: specialized if they are as assumed, or generic."""

    def __init__(
        self, looked_at: Sequence[tuple[int, Assumption]], callables: Mapping[bool, Callable[..., Any]]
    ) -> None:
        """Takes the assumptions with the positions of their inputs, and the two graphs; without assumptions, one."""
        self._looked_at, self._callables = looked_at, callables

    def answer(self, args: Sequence[Any]) -> Tensor | None:
        """Returns whether the inputs are as assumed: () booleans, which have not been read on the host.

        None if it is not a question: there are no assumptions, an input is a fake tensor, or a CUDA graph is captured.

        Every call asks. An earlier answer cannot be cached: collectives, operators of torch.library, `.data`, NumPy,
        DLPack and copies into the storage all write without incrementing `_version`.
        """
        tensors = [args[position] for position, _ in self._looked_at]
        if not tensors or any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return None
        if any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing():
            return None
        answers = [assumed.compared(t) for t, (_, assumed) in zip(tensors, self._looked_at, strict=True)]
        device = max((answer.device for answer in answers), key=lambda device: device.type != "cpu")
        return functools.reduce(torch.logical_and, [answer.to(device) for answer in answers])

    def run(self, args: Sequence[Any], *, is_special: bool) -> Any:
        return self._callables[is_special](*args)

    def __call__(self, *args: Any) -> Any:
        answer = self.answer(args)
        return self.run(args, is_special=answer is not None and bool(answer))


# Many parameters because it chooses between two graphs, and when each is compiled.
def dispatch(
    gm: GraphModule,
    assumptions: Mapping[str, Assumption],
    specialized: Compile,
    generic: Compile,
    example_inputs: Sequence[Any] | None,
    later: Callable[[Compile], Callable[..., Any]],
) -> Dispatch:
    """Returns a callable that runs `specialized` if these inputs of `gm` are as assumed, else `generic`.

    Each graph is compiled when it is first needed. If `gm` has dynamic shapes, and `example_inputs` are given, both are
    compiled now.

    Args:
        example_inputs: real inputs; None if no graph is needed now.
        later: returns a callable that compiles for the inputs of its first call.
    """
    inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
    looked_at = [(position, assumptions[node.name]) for position, node in inputs if node.name in assumptions]
    compiles = {True: specialized, False: generic}
    if example_inputs is None:
        return Dispatch(looked_at, {key: later(compile) for key, compile in compiles.items()})
    callables: dict[bool, Callable[..., Any]] = {}
    made = Dispatch(looked_at, callables)
    answer = made.answer(example_inputs)
    needed = answer is not None and bool(answer)
    callables[needed] = compiles[needed](example_inputs)
    other = compiles[not needed]
    callables[not needed] = other(example_inputs) if is_symbolic(gm) else later(other)
    return made
