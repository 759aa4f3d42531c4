"""One graph, compiled twice: for calls without padding, and for all.

Trainers hand a padding mask to every call, and in most it says nothing: all ones. A mask of attention that is causal
but for such an input is then just causal. So a second graph has ones in the input's place, from which the steps prove
the mask as they prove any other, and each call looks at its real input to choose between the two, as Hugging Face's
eager code does. What is checked is what was put in, so either graph computes what the captured one does.

After many calls without padding, the next is taken for one before it has been looked at (ahead.py).

In: a Dynamo GraphModule as it came. Out: a copy of it that is specialised, and the callable that chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from liger_compile import ahead
from liger_compile.terms.mutation import Mutations, storages_of

Compile = Callable[[Sequence[Any]], Callable[..., Any]]  # example inputs -> the compiled graph
WITHOUT, GENERAL = "without padding", "general"

# Calls without padding in a row, after which the next is expected to be one too. An expectation that fails costs a
# forward, a third of a step; one that holds saves up to 0.7 of 45 ms (Llama-3.2-1B cut to 4 layers, 4 x 2048 tokens,
# one H100, torch 2.11.0, 2026-11-26). Where one batch in twenty has padding, one in 13 comes after so many without.
EXPECTED_AFTER = 50


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
    may_run_ahead: Callable[[], bool] = lambda: True,
) -> Callable[..., Any]:
    """What runs the graph of `without` where these inputs of `gm` are all ones, and that of `general` where not.

    Each is compiled when it is first needed; where `gm` is symbolic, both now.

    Args:
        example_inputs: real ones.
        later: gives a callable that compiles for the inputs of its first call.
        may_run_ahead: of a call, whether nobody will miss results that are thrown away.
    """
    inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
    positions = [position for position, node in inputs if node.name in names]
    leaves_nothing = ahead.leaves_nothing(gm)
    in_a_row = 0

    def is_without(args: Sequence[Any]) -> bool:
        return all(_is_all_ones(args[position]) for position in positions)

    needed = is_without(example_inputs)
    compiles = {True: without, False: general}
    callables = {needed: compiles[needed](example_inputs)}
    other = compiles[not needed]
    callables[not needed] = other(example_inputs) if is_symbolic(gm) else later(other)

    def run_ahead(args: Sequence[Any], masks: Sequence[torch.Tensor]) -> Any:
        nonlocal in_a_row
        random, holds = ahead.Random(masks[0].device), ahead.are_all_ones(masks)
        results = callables[True](*args)
        if holds():
            return results
        in_a_row = 0
        del results  # and their memory, before the other graph needs it
        random.restore()
        return callables[False](*args)

    def call(*args: Any) -> Any:
        nonlocal in_a_row
        masks = [args[position] for position in positions]
        is_expected = leaves_nothing and in_a_row >= EXPECTED_AFTER
        if is_expected and ahead.is_on_gpu(masks) and _is_known(masks) and may_run_ahead():
            return run_ahead(args, masks)
        found = is_without(args)
        in_a_row = in_a_row + 1 if found else 0
        return callables[found](*args)

    return call


def _is_all_ones(tensor: torch.Tensor) -> bool:
    return _is_known([tensor]) and bool((tensor == 1).all())


def _is_known(tensors: Sequence[torch.Tensor]) -> bool:
    """Nobody can look into a fake tensor, nor into any while a CUDA graph is captured."""
    if any(isinstance(tensor, torch._subclasses.FakeTensor) for tensor in tensors):
        return False
    is_cuda = any(tensor.is_cuda for tensor in tensors)
    return not (is_cuda and torch.cuda.is_current_stream_capturing())
