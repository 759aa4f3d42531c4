"""Compiles a rewritten graph with Inductor, or with an eager backend for debugging.

In: a rewritten Dynamo GraphModule, its example inputs, and mode and options in the format of torch.compile. Out: the
callable that Dynamo calls. The private parts of Inductor and Dynamo that it needs are in `torch_internals/`.

The cache key. The caches on disk identify a custom op by its name only. After a change to this package, AOTAutograd's
cache would return an artifact whose traced backward is outdated (pytorch#144344, open in 2.14) or that was partitioned
by other recompute marks, and Inductor's cache would read memory in the layout of the outdated fake: wrong numbers and
no error. `cache_key` covers what the keys of torch leave out.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from liger_compile import sources
from liger_compile.backward_passes import (
    CHOICES,
    DEFAULT_PASSES,
    Applied,
    Backward,
    Pass,
    inline_late_ops,
    is_backward,
    run_passes,
)
from liger_compile.ops.embedding import PAYS_FROM
from liger_compile.ops.registration import LATE_OPS, inlining_late
from liger_compile.pattern import Pattern
from liger_compile.torch_internals import dtensor, inductor
from liger_compile.torch_internals.dynamo import (
    as_dynamo_compiles,
    leave_out_of_traces,
    lookup_backend,
    own_trace,
    resumed_later,
    when_traces_begin,
)
from liger_compile.torch_internals.modes import restored_if_raised
from liger_compile.torch_internals.operators import defining_functions, qualified_name
from liger_compile.torch_internals.shapes import NewSymbols, Places

# transformers adds these methods to logging.Logger and calls them between logits and loss, where they would cause a
# graph break. They log a message once and return None: leaving them out of a trace changes no result.
_LOGGER_METHODS = ("warning_once", "info_once")
MOST_COMPILED = 8  # of one graph, for sizes that need other guards: as Dynamo's recompile_limit


@dataclass(frozen=True)
class BackwardPlan:
    """The changes to the graph of backward, and the callbacks that receive them.

    Args:
        passes: the passes, run in this order before Inductor compiles the graph.
        choices: the names of `CHOICES` that are in effect.
        fuel: the largest number of changes that the passes may make; None means no limit.
        strict: reraise the exception of a pass.
        everywhere: run on a CPU too, where no pass pays.
        made: called once for each graph of backward, with the changes that the passes made to it.
        planned: called when the passes are handed to Inductor.
        chose: called with the name of each choice that had an effect, and the number that its text has.
    """

    passes: tuple[Pass, ...] = DEFAULT_PASSES
    choices: tuple[str, ...] = tuple(CHOICES)
    fuel: int | None = None
    strict: bool = False
    everywhere: bool = False
    made: Callable[[Sequence[tuple[Pass, Applied]]], None] = lambda _: None
    planned: Callable[[], None] = lambda: None
    chose: Callable[..., None] = lambda *_: None


@restored_if_raised()
def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    inductor_options: Mapping[str, Any] | None = None,
    inner: str = "inductor",
    patterns: Iterable[Pattern] = (),
    key: str = "",
    backward: BackwardPlan | None = None,
) -> Callable[..., Any]:
    """Compiles `gm`, and takes ownership of it.

    Args:
        patterns: the patterns in use; part of the cache key.
        key: all other settings that determined `gm`; part of the cache key.
        backward: the changes to the graph of backward where Inductor compiles for a GPU; None means no changes.

    Raises:
        RuntimeError: for a wrong mode or option, as torch.compile(backend="inductor") raises it, for every `inner`.
    """
    patches = inductor.patches_of(mode, inductor_options)
    # First way into the cache key: AOTAutograd pickles attributes of the top-level GraphModule into its key (meta is
    # not pickled). Inductor's cache, below AOTAutograd, does not see them.
    digest = cache_key(gm, patterns, key)
    gm.liger_compile_key = digest  # pyright: ignore[reportArgumentType]
    with own_trace():
        return _compiled(gm, example_inputs, patches, inner, digest, backward)


def _compiled(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    patches: inductor.Patches,
    inner: str,
    digest: str,
    backward: BackwardPlan | None,
) -> Callable[..., Any]:
    if inner != "inductor":
        # "aot_eager" partitions by min-cut, which honors recompute marks, and then runs the aten ops.
        return _on_their_device(lookup_backend(inner)(gm, list(example_inputs)), example_inputs)
    # Second way: Inductor's config is in the keys of both caches. It must be a patch of this compilation, not a context
    # around the call, because the backward is compiled later.
    patches = inductor.with_cache_key(patches, ("liger_compile", *dtensor.CALLED_NAMES), digest)
    decompositions, traced = None, contextlib.nullcontext()
    if backward and (backward.everywhere or _is_on_gpu(example_inputs)):
        if "backward.early_free" in backward.choices and "allow_buffer_reuse" not in patches:
            patches["allow_buffer_reuse"] = False
            backward.chose("backward.early_free")
        with inductor.in_effect(patches):
            decompositions = _with_embedding_backward(inductor.decompositions(), backward)
            passes = with_backward_passes(inductor.user_passes(), backward)
        if passes is None:  # AOTAutograd traces the bodies that `inline_late_ops` would trace
            decompositions.update(LATE_OPS)
        else:
            patches["post_grad_custom_post_pass"] = passes
            backward.planned()
            traced = inlining_late()
    with traced:
        return inductor.compile_fx(gm, example_inputs, patches, decompositions)


def _on_their_device(compiled: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
    """Sets the current device: Triton launches a traced graph's kernels there; Inductor's code names the device."""
    device = next(
        (value.device for value in inputs if isinstance(value, torch.Tensor) and value.is_cuda), None
    )
    if device is None:
        return compiled

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        with torch.cuda.device(device):
            return compiled(*args)

    return call


def _is_on_gpu(inputs: Sequence[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs)


class _Decompositions(dict[Any, Callable[..., Any]]):
    """A table with our sources as its key: from torch 2.13 it is in the cache key, which rejects unnamed functions."""

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (package_hash(),)


def _with_embedding_backward(
    decompositions: Mapping[Any, Callable[..., Any]], backward: BackwardPlan
) -> _Decompositions:
    """Adds our op for the gradient of a large embedding, where Inductor would accumulate it in a wider dtype."""
    if "backward.embedding" not in backward.choices:
        return _Decompositions(decompositions)
    whole = torch.ops.aten.embedding_dense_backward.default
    decomposed = decompositions[whole]

    def embedding_dense_backward(dy: torch.Tensor, indices: torch.Tensor, num_rows: int, *rest: Any) -> Any:
        size = num_rows * dy.shape[indices.dim() :].numel()
        pays = isinstance(size, int) and size >= PAYS_FROM
        is_half = dy.is_cuda and dy.dtype.itemsize < 4
        if not (pays and is_half):
            return decomposed(dy, indices, num_rows, *rest)
        backward.chose("backward.embedding")
        return torch.ops.liger_compile.embedding_backward.default(dy, indices, num_rows, *rest)

    return _Decompositions({**decompositions, whole: embedding_dense_backward})


def with_backward_passes(theirs: Any, backward: BackwardPlan) -> Any:
    """Returns the user's passes followed by one that runs ours; None if torch allows only one pass.

    Args:
        theirs: the user's passes over AOTAutograd's graphs.
    """

    def run(graph: Graph) -> None:
        if is_backward(graph):
            given = Backward(graph, inductor.donated_inputs() or ())
            backward.made(run_passes(given, backward.passes, fuel=backward.fuel, strict=backward.strict))
        else:
            passes = [one_pass for one_pass in backward.passes if one_pass.in_forward]
            run_passes(Backward(graph), passes, fuel=backward.fuel, strict=backward.strict)
        inline_late_ops(graph, inductor.decompositions(), backward.strict)

    def key() -> Any:
        """Returns the key for the caches. It has the donated inputs: the setting behind them is in no other key."""
        names = [one_pass.name for one_pass in backward.passes]
        return [package_hash(), names, backward.fuel, inductor.donated_inputs()]

    return inductor.in_sequence(theirs, inductor.graph_pass(run, key))


def when_called(
    compile: Callable[[Sequence[Any]], Callable[..., Any]],
    examples: Sequence[Any] = (),
    otherwise: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Returns a callable that runs `compile` on the inputs of its first call; if that raises, on those of the next.

    Threads may call at once: one compiles, the others wait. Dynamo accepts no more guards at that time; its existing
    guards ensure that grad mode and autocast are in each call what they are now. Must be called in a trace. The
    compilation is logged as part of that trace and uses its torch settings, in any thread.

    Args:
        examples: the inputs in the trace. Where their sizes are symbolic, the compiled graph takes other sizes too, as
            far as its guards hold; `compile` runs again if they do not.
        otherwise: called, after a warning, if the guards of `MOST_COMPILED` graphs do not hold. Needed if sizes are
            symbolic.
    """
    places, waiting = Places(examples), [resumed_later(compile, examples)]
    compiled: list[tuple[Callable[..., Any], NewSymbols]] = []

    def fitting(args: Sequence[Any]) -> Callable[..., Any] | None:
        numbers = places.numbers(args)
        return next((function for function, symbols in compiled if symbols.hold(numbers)), None)

    def call(*args: Any) -> Any:
        function = fitting(args)
        if function is None:
            with as_dynamo_compiles():
                function = fitting(args)  # another thread may have compiled meanwhile
                if function is None and len(compiled) < MOST_COMPILED:
                    function, symbols = waiting[0](args)
                    compiled.append((function, symbols))
                    if not places:
                        waiting.clear()
        if function is None:
            assert otherwise is not None, "symbolic sizes need another callable"
            warnings.warn(
                f"liger_compile: {MOST_COMPILED} graphs were compiled for other sizes, and none takes "
                f"{tuple(places.numbers(args))}; such calls run a slower graph, which takes all sizes. "
                "Pad batches to fewer sizes",
                stacklevel=2,
            )
            function = otherwise
        return function(*args)

    return call


def is_right_for_subgraphs(inner: str) -> bool:
    """Returns whether the code that `inner` compiles is right where a graph calls subgraphs by `invoke_subgraph`.

    Inductor's code is not: gradients are wrong, by factors of thousands or by a little (seen on a CPU in torch 2.13 and
    2.14.1; nothing in the code in question depends on the device). Three faults of torch:

    - `InvokeSubgraph.create` in ir.py makes a new buffer of every result of a subgraph. An input that the subgraph
      saves for backward is also a result, and no alias is declared: the memory of the input is reused while needed.
    - When graph.py lowers a subgraph, it takes the indices of the inputs that may be overwritten (`bw_donated_idxs`)
      from the enclosing graph, and lets other inputs be overwritten.
    - In-place writes of a subgraph into its inputs may be lost where no gradients are computed.
    """
    return inner != "inductor"


def uses_cudagraphs(mode: str | None, inductor_options: Mapping[str, Any] | None) -> bool:
    """Returns whether outputs may live in the memory pool of a CUDA graph, where the next call overwrites them."""
    return inductor.uses_cudagraphs(inductor.patches_of(mode, inductor_options))


def uses_freezing(mode: str | None, inductor_options: Mapping[str, Any] | None) -> bool:
    """Returns whether Inductor makes constants of the parameters where no gradients are computed."""
    return inductor.uses_freezing(inductor.patches_of(mode, inductor_options))


# The cache key ---------------------------------------------------------------------------------------------


def cache_key(gm: GraphModule, patterns: Iterable[Pattern] = (), key: str = "") -> str:
    """Returns a digest of the dependencies of the artifact of `gm` that torch's own keys leave out.

    Torch's keys cover the versions of torch and Triton, by content. The digest is stable between processes.
    """
    functions = [
        function
        for pattern in patterns
        for function in (pattern.search, pattern.replace, pattern.check, pattern.profit, pattern.saves)
    ]
    functions.extend(_op_definitions(gm))
    return _digest([package_hash(), key, *sources.digests(functions), "marks", *_recompute_marks(gm)])


@functools.cache
def package_hash() -> str:
    """Returns a digest of all our source files, by content: an editable install changes without a new version."""
    packages = map(importlib.import_module, ("liger_compile", "liger_compile.patterns"))
    files = sorted(
        {file for package in packages for root in package.__path__ for file in Path(root).rglob("*.py")}
    )
    return _digest(f"{file.name} {_file_hash(file)}" for file in files)


def _recompute_marks(gm: GraphModule) -> Iterator[str]:
    for name, module in gm.named_modules():
        if not isinstance(module, GraphModule):
            continue
        for position, node in enumerate(module.graph.nodes):
            if "recompute" in node.meta:
                yield f"{name} {position} {node.meta['recompute']} {node.meta.get('ac_graph_id')}"


def _op_definitions(gm: GraphModule) -> Iterator[Callable[..., Any] | None]:
    """Yields the Python functions that define the custom ops in `gm`: forward, fake and backward.

    They serve a user's ops: these functions and all code that they reach are digested (sources.py). `package_hash`
    covers our ops with all the code that they call. Autograd kernels registered by Library.impl are not visible here.
    """
    targets = {
        node.target
        for module in gm.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
    }
    for target in targets:
        packet = getattr(target, "overloadpacket", target)
        yield from defining_functions(qualified_name(packet))


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# Dynamo ----------------------------------------------------------------------------------------------------


def set_up_dynamo() -> None:
    """Keeps logging calls from causing graph breaks. Call it when the backend is loaded, before Dynamo traces."""
    _leave_out_logger_methods()
    when_traces_begin(_leave_out_logger_methods)  # transformers may be imported after this package


def _leave_out_logger_methods() -> None:
    leave_out_of_traces(
        getattr(logging.Logger, name) for name in _LOGGER_METHODS if hasattr(logging.Logger, name)
    )
