"""One graph, compiled twice: for calls without padding, and for all.

Trainers hand a padding mask to every call, and in most it says nothing: all ones. A mask of attention that is causal
but for such an input is then just causal. So a second graph has ones in the input's place, from which the steps prove
the mask as they prove any other, and each call looks at its real input to choose between the two, as Hugging Face's
eager code does. What is checked is what was put in, so either graph computes what the captured one does.

In: a Dynamo GraphModule as it came. Out: a copy of it that is specialised, and the callable that chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from liger_compile.terms.mutation import Mutations, storages_of

Compile = Callable[[Sequence[Any]], Callable[..., Any]]  # example inputs -> the compiled graph
WITHOUT, GENERAL = "without padding", "general"


def specialised(names: Sequence[str]) -> tuple[str, str]:
    """The name of the graph for calls without padding in these inputs, and a report's note on it."""
    scalars = "a scalar" if len(names) == 1 else f"up to {len(names)} scalars"
    return WITHOUT, (
        f"this graph runs in calls where {_all_ones(names)}; each call looks, and reads {scalars} for it. In others "
        f"the {GENERAL} graph runs, which is compiled when it is needed and then has a report of its own"
    )


def general(names: Sequence[str]) -> tuple[str, str]:
    """The name of the graph for all calls, and a report's note on it."""
    return GENERAL, f"this graph runs in calls with padding; where {_all_ones(names)}, the one {WITHOUT} runs"


def _all_ones(names: Sequence[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} all ones"


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


def padding_inputs(gm: GraphModule, names: Collection[str]) -> tuple[str, ...]:
    """Those of the named values that are inputs of the graph for which ones may stand in."""
    mutations = Mutations(gm.graph)
    inputs = (node for node in gm.graph.find_nodes(op="placeholder") if node.name in names)
    return tuple(node.name for node in inputs if _only_read(node, gm.graph, mutations))


def _only_read(node: Node, graph: Graph, mutations: Mutations) -> bool:
    """Whether it is a plain tensor that nobody writes, returns, or looks up rows with: token ids are no flags."""
    value, storages = node.meta.get("example_value"), storages_of(node)
    if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
        return False
    return mutations.is_clean(node) and not any(
        storages & storages_of(arg)
        for reader in graph.nodes
        if reader.op == "output" or getattr(reader.target, "__name__", "") == "embedding"
        for arg in reader.all_input_nodes
    )


def without_padding(gm: GraphModule, names: Collection[str]) -> GraphModule:
    """A copy of `gm` in which these inputs are all ones, whatever is handed in."""
    module = copied(gm)
    inputs = module.graph.find_nodes(op="placeholder")
    for node in (node for node in inputs if node.name in names):
        value = node.meta["example_value"]
        with module.graph.inserting_after(inputs[-1]):
            ones = module.graph.call_function(torch.ones_like, (node,))
        with value.fake_mode:
            ones.meta["example_value"] = torch.ones_like(value)
        node.replace_all_uses_with(ones, delete_user_cb=lambda user, ones=ones: user is not ones)
    return module


def chosen_at_each_call(
    gm: GraphModule,
    names: Collection[str],
    without: Compile,
    general: Compile,
    example_inputs: Sequence[Any],
    later: Callable[[Compile], Callable[..., Any]],
) -> Callable[..., Any]:
    """What runs the graph of `without` where these inputs of `gm` are all ones, and that of `general` where not.

    Each is compiled when it is first needed; where `gm` is symbolic, both now.

    Args:
        example_inputs: real ones.
        later: gives a callable that compiles for the inputs of its first call.
    """
    inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
    positions = [position for position, node in inputs if node.name in names]

    def is_without(args: Sequence[Any]) -> bool:
        return all(_is_all_ones(args[position]) for position in positions)

    needed = is_without(example_inputs)
    compiles = {True: without, False: general}
    callables = {needed: compiles[needed](example_inputs)}
    other = compiles[not needed]
    callables[not needed] = other(example_inputs) if is_symbolic(gm) else later(other)
    return lambda *args: callables[is_without(args)](*args)


def _is_all_ones(tensor: torch.Tensor) -> bool:
    """False too where nobody can know: in a fake tensor, and while a CUDA graph is captured."""
    if isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return bool((tensor == 1).all())
