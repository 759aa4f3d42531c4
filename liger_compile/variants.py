"""One graph, compiled twice: for calls whose masks are what they mostly are, and for all.

Trainers hand a padding mask to every call, and in most it says nothing: all ones. A mask of attention that is causal
but for such an input is then just causal. Other masks are made elsewhere, before the graph was broken or in a buffer,
and are causal themselves. So a second graph has what an input is expected to be in its place, from which the steps
prove the mask as they prove any other, and each call looks at its real input to choose between the two, as Hugging
Face's eager code does. What is checked is what was put in, so either graph computes what the captured one does.

In: a Dynamo GraphModule as it came. Out: a copy of it that is specialized, and the callable that chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from liger_compile.graphs.aliasing import Mutations

Compile = Callable[[Sequence[Any]], Callable[..., Any]]  # example inputs -> the compiled graph
_PART_OF = "liger_compile_part_of"  # in the meta of a graph
WITHOUT, CAUSAL, GENERAL = "without padding", "with causal masks", "generic"


@dataclass(frozen=True)
class Expected:
    """What an input is in most calls. `steps`, each a function and what it takes beside a tensor, make it of any tensor
    of its shape and dtype; also of the last `rank` dimensions of one, along which alone it changes."""

    words: str
    rank: int
    steps: tuple[tuple[Any, ...], ...]

    def made_of(self, tensor: Tensor) -> Tensor:
        for function, *arguments in self.steps:
            tensor = function(tensor, *arguments)
        return tensor

    def is_it(self, tensor: Tensor) -> bool:
        """Whether the tensor is that."""
        if not tensor.numel():
            return True
        last = tensor[(0,) * (tensor.dim() - self.rank)]
        return bool((tensor == self.made_of(last)).all())


ONES = Expected("of all ones", 0, ((torch.ones_like,),))


def _causal_masks(dtype: torch.dtype) -> Iterable[Expected]:
    """The forms in which masks are causal."""
    yield Expected("that is causal", 2, ((torch.ones_like,), (torch.tril,)))
    yield Expected("that is causal", 2, ((torch.ones_like,), (torch.triu, 1)))  # of what it hides
    if dtype.is_floating_point:
        for lowest in (torch.finfo(dtype).min, float("-inf")):
            yield Expected("that is causal", 2, ((torch.full_like, lowest), (torch.triu, 1)))


class Variant(NamedTuple):
    """What a graph is compiled for where one graph is compiled more than once: a name, and a note for its report."""

    name: str
    note: str


def as_part(gm: GraphModule, variant: Variant) -> GraphModule:
    """`gm`, marked as a part of a graph that was specialized as a whole."""
    gm.meta[_PART_OF] = variant
    return gm


def of_part(gm: GraphModule) -> Variant | None:
    """The variant that `gm` is a part of."""
    return gm.meta.get(_PART_OF)


def specialized(expected: Mapping[str, Expected]) -> Variant:
    """Return the name of the graph that is specialized for these assumptions, and a note for its report."""
    syncs = "one device sync" if len(expected) == 1 else f"up to {len(expected)} device syncs"
    name = WITHOUT if set(expected.values()) == {ONES} else CAUSAL
    return Variant(
        name,
        f"specialized for {_said(expected)} (checked on every call, {syncs}); other calls use the {GENERAL} graph, "
        "which is compiled when a call first needs it and then has its own report",
    )


def general(expected: Mapping[str, Expected]) -> Variant:
    """Return the name of the graph for all calls, and a note for its report."""
    name, _ = specialized(expected)
    others = "padding" if name == WITHOUT else "other masks"
    return Variant(
        GENERAL, f"generic: used by calls with {others}; calls with {_said(expected)} use the graph {name!r}"
    )


def _said(expected: Mapping[str, Expected]) -> str:
    names: dict[str, list[str]] = {}
    for name, each in expected.items():
        names.setdefault(each.words, []).append(name)
    return " and ".join(f"{' and '.join(those)} {words}" for words, those in names.items())


def copied(gm: GraphModule) -> GraphModule:
    """The same module with graphs of its own, its bodies' too; tensors, and what nodes stand for, are shared."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    graph.output(result).meta.update(gm.graph.output_node().meta)
    for node, copy in copies.items():
        copy.meta.pop("grapharg", None)  # the example input
        if hasattr(node, "_dynamo_source"):  # which AOTAutograd asks for
            copy._dynamo_source = node._dynamo_source  # pyright: ignore[reportAttributeAccessIssue]
    # Every module has a class of its own; the base of Dynamo's writes its code only when somebody wants to run it.
    module = type(gm).__bases__[0](gm, graph)
    module.meta = dict(gm.meta)
    for name, value in vars(gm).items():  # as where Dynamo says what the inputs are called
        vars(module).setdefault(name, value)
    for name, child in module.named_children():
        if isinstance(child, GraphModule):
            setattr(module, name, copied(child))
    return module


def is_symbolic(gm: GraphModule) -> bool:
    """Whether it is compiled for more than one size: Dynamo then takes guards, and after the backend no more."""
    values = [node.meta.get("example_value") for node in gm.graph.nodes]
    sizes = [size for v in values if isinstance(v, torch.Tensor) for size in (*v.shape, *v.stride())]
    return any(isinstance(each, (torch.SymInt, torch.SymFloat, torch.SymBool)) for each in (*values, *sizes))


def expected_inputs(
    gm: GraphModule, padding: Collection[str], masks: Collection[str] = (), example_inputs: Sequence[Any] = ()
) -> dict[str, Expected]:
    """What to expect of those of the named values that are inputs of the graph: ones of padding, and of masks what
    they are in the example."""
    mutations = Mutations(gm.graph)
    found: dict[str, Expected] = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if node.name not in (*padding, *masks) or not _only_read(node, gm.graph, mutations):
            continue
        if node.name in padding:
            found[node.name] = ONES
        elif form := _causal_form(example_inputs[position]):
            found[node.name] = form
    return found


def _only_read(node: Node, graph: Graph, mutations: Mutations) -> bool:
    """Whether it is a plain tensor that nobody writes, returns, or looks up rows with: token ids are no flags."""
    value, memory = node.meta.get("example_value"), mutations.memory(node)
    if not isinstance(value, Tensor) or is_traceable_wrapper_subclass(value) or value.requires_grad:
        return False
    return mutations.is_clean(node) and not any(
        memory & mutations.memory(arg)
        for reader in graph.nodes
        if reader.op == "output" or getattr(reader.target, "__name__", "") == "embedding"
        for arg in reader.all_input_nodes
    )


def _causal_form(mask: Tensor) -> Expected | None:
    """The form in which it is a causal mask, if it is one."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return None
    return next((form for form in _causal_masks(mask.dtype) if form.is_it(mask)), None)


def with_expected(gm: GraphModule, expected: Mapping[str, Expected]) -> GraphModule:
    """A copy of `gm` in which these inputs are what is expected, whatever is handed in."""
    module = copied(gm)
    inputs = module.graph.find_nodes(op="placeholder")
    for node in (node for node in inputs if node.name in expected):
        first, last = node, node
        with module.graph.inserting_before(inputs[-1].next):
            for function, *arguments in expected[node.name].steps:
                value = last.meta["example_value"]
                last = module.graph.call_function(function, (last, *arguments))
                with value.fake_mode:
                    last.meta["example_value"] = function(value, *arguments)
                first = last if first is node else first
        node.replace_all_uses_with(last, delete_user_cb=lambda user, first=first: user is not first)
    return module


def chosen_at_each_call(
    gm: GraphModule,
    expected: Mapping[str, Expected],
    special: Compile,
    general: Compile,
    example_inputs: Sequence[Any],
    later: Callable[[Compile], Callable[..., Any]],
) -> Callable[..., Any]:
    """What runs the graph of `special` where these inputs of `gm` are what is expected, and that of `general` if not.

    Each is compiled when it is first needed; where `gm` is symbolic, both now.

    Args:
        example_inputs: real ones.
        later: gives a callable that compiles for the inputs of its first call.
    """
    inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
    looked_at = [(position, expected[node.name]) for position, node in inputs if node.name in expected]

    def is_special(args: Sequence[Any]) -> bool:
        return all(_is(each, args[position]) for position, each in looked_at)

    needed = is_special(example_inputs)
    compiles = {True: special, False: general}
    callables = {needed: compiles[needed](example_inputs)}
    other = compiles[not needed]
    callables[not needed] = other(example_inputs) if is_symbolic(gm) else later(other)
    return lambda *args: callables[is_special(args)](*args)


def _is(expected: Expected, tensor: Tensor) -> bool:
    """Whether it is what is expected. False too where nobody can know: in a fake tensor, and while a CUDA graph is
    captured.

    The tensor is read in every call. No earlier answer can be kept: collectives, operators of torch.library, `.data`,
    NumPy, DLPack and copies into the storage all write without counting in `_version`.
    """
    if isinstance(tensor, FakeTensor) or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return expected.is_it(tensor)
