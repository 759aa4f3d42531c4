"""Compiles a rewritten graph with Inductor, or with an eager backend for debugging.

In: a rewritten Dynamo GraphModule, its example inputs, and mode and options in the format of torch.compile. Out: the
callable that Dynamo calls. Only this file names Inductor, functorch, a cache key or a torch version; it neither reads
nor edits the mathematics of a graph.

The cache key. The caches on disk identify a custom op by its name only. After a change to this package, AOTAutograd's
cache would return an artifact whose traced backward is outdated (pytorch#144344, open in 2.14) or that was partitioned
by other recompute marks, and Inductor's cache would read memory in the layout of the outdated fake: wrong numbers and
no error. `cache_key` covers what the keys of torch leave out.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import importlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSet, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.callback import callback_handler
from torch._guards import CompileContext, TracingContext, compile_context, tracing
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

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
from liger_compile.torch_internals.modes import restored_if_raised

# transformers adds these methods to logging.Logger and calls them between logits and loss, where they would cause a
# graph break. They log a message once and return None: leaving them out of a trace changes no result.
_LOGGER_METHODS = ("warning_once", "info_once")


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
        chose: called with the name of each choice that had an effect.
    """

    passes: tuple[Pass, ...] = DEFAULT_PASSES
    choices: tuple[str, ...] = tuple(CHOICES)
    fuel: int | None = None
    strict: bool = False
    everywhere: bool = False
    made: Callable[[Sequence[tuple[Pass, Applied]]], None] = lambda _: None
    chose: Callable[[str], None] = lambda _: None


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
    patches = _inductor_patches(mode, inductor_options)
    # First way into the cache key: AOTAutograd pickles attributes of the top-level GraphModule into its key (meta is
    # not pickled). Inductor's cache, below AOTAutograd, does not see them.
    digest = cache_key(gm, patterns, key)
    gm._liger_compile_key = digest  # pyright: ignore[reportArgumentType]
    if inner != "inductor":
        # "aot_eager" partitions by min-cut, which honors recompute marks, and then runs the aten ops.
        return _on_their_device(torch._dynamo.lookup_backend(inner)(gm, list(example_inputs)), example_inputs)

    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    # Second way: Inductor's config is in the keys of both caches, and changing a value of this entry is the
    # documented way to change the keys. It must be a config patch, not `with config.patch(...)` around the call,
    # because the backward is compiled later.
    name = "unsafe_marked_cacheable_functions"
    patches[name] = {**patches.get(name, getattr(config, name)), "liger_compile": digest}
    decompositions, traced = None, contextlib.nullcontext()
    if backward and (backward.everywhere or _is_on_gpu(example_inputs)):
        if "backward.early_free" in backward.choices and "allow_buffer_reuse" not in patches:
            patches["allow_buffer_reuse"] = False
            backward.chose("backward.early_free")
        with config.patch(patches):
            decompositions = _with_embedding_backward(select_decomp_table(), backward)
            passes = with_backward_passes(config.post_grad_custom_post_pass, backward)
        if passes is None:  # AOTAutograd traces the bodies that `inline_late_ops` would trace
            decompositions.update(LATE_OPS)
        else:
            patches["post_grad_custom_post_pass"] = passes
            traced = inlining_late()
    with traced:
        compiled: Any = compile_fx(gm, example_inputs, config_patches=patches, decompositions=decompositions)
    return compiled


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
    from torch._inductor import custom_graph_pass
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.utils import get_donated_idxs

    class BackwardPasses(custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            if is_backward(graph):
                given = Backward(graph, get_donated_idxs() or ())
                backward.made(run_passes(given, backward.passes, fuel=backward.fuel, strict=backward.strict))
            inline_late_ops(graph, select_decomp_table(), backward.strict)

        def uuid(self) -> Any:
            """Returns the key for the caches. It has the donated inputs: the setting behind them is in no other key."""
            names = [one_pass.name for one_pass in backward.passes]
            return [package_hash(), names, backward.fuel, get_donated_idxs()]

    if theirs is None:
        return BackwardPasses()
    passes = getattr(custom_graph_pass, "get_custom_graph_passes", None)
    return (*passes(theirs), BackwardPasses()) if passes else None  # torch 2.11 takes one


def when_called(compile: Callable[[Sequence[Any]], Callable[..., Any]]) -> Callable[..., Any]:
    """Returns a callable that runs `compile` on the inputs of its first call; if that raises, on those of the next.

    Threads may call at once: one compiles, the others wait. For static sizes only, since Dynamo accepts no more guards
    at that time; its existing guards ensure that grad mode and autocast are in each call what they are now. Must be
    called in a trace. The compilation is logged as part of that trace and uses its torch settings, in any thread.
    """
    logged_as, settings = CompileContext.try_get(), contextvars.copy_context()
    waiting: list[Callable[[Sequence[Any]], Callable[..., Any]]] = [compile]
    compiled: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not compiled:
            with _as_dynamo_compiles():
                if not compiled:  # another thread may have compiled meanwhile
                    compiled.append(settings.copy().run(_traced_and_compiled, waiting[0], args, logged_as))
                    waiting.clear()
        return compiled[0](*args)

    return call


def _traced_and_compiled(
    compile: Callable[[Sequence[Any]], Callable[..., Any]],
    args: Sequence[Any],
    logged_as: CompileContext | None,
) -> Callable[..., Any]:
    """Returns the result of `compile` in a new trace, since Dynamo has freed the fake tensors of the first trace."""
    # A fake mode caches the fake of each tensor, so that AOTAutograd gets these fakes, which have no symbols for sizes.
    fake_mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv())
    tensors = (arg for arg in args if isinstance(arg, torch.Tensor))
    fakes = [fake_mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]
    with compile_context(logged_as), tracing(TracingContext(fake_mode)):
        result = compile(args)
    del fakes
    return result


@contextlib.contextmanager
def _as_dynamo_compiles() -> Iterator[None]:
    """Sets the state in which Dynamo calls a backend. Random numbers and modes stay those of the user.

    Tracing sets process-wide flags: only one thread compiles, and a flag of torch informs calls in other threads.
    """
    from torch._dynamo.convert_frame import compile_lock

    session = getattr(
        torch.compiler, "_compile_session_context", contextlib.nullcontext
    )  # absent in some torch versions
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with compile_lock, session(), _disable_current_modes():
        state = random.getstate()
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            random.setstate(state)


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


def reset() -> None:
    """Frees recorded CUDA graphs, as the stock backend does. For torch._dynamo.reset()."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


def uses_cudagraphs(mode: str | None, inductor_options: Mapping[str, Any] | None) -> bool:
    """Returns whether outputs may live in the memory pool of a CUDA graph, where the next call overwrites them."""
    from torch._inductor import config

    return _inductor_patches(mode, inductor_options).get("triton.cudagraphs", config.triton.cudagraphs)


def _inductor_patches(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    # The stock wrapper (private; the same in 2.11 to 2.14) turns mode and options into patches, validates them, and
    # sets the environment that CUDA graphs need. It never reads `dynamic`.
    return dict(torch._TorchCompileInductorWrapper(mode, dict(options or {}), None).config)


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


def why_not_cached(gm: GraphModule) -> str | None:
    """Returns AOTAutograd's reason for not caching the artifact of `gm`, in its own words; None if there is none."""
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache, check_cacheable

    try:
        check_cacheable(gm)
    except BypassAOTAutogradCache as refusal:
        return str(refusal)
    return None


def cache_counts() -> dict[str, int]:
    """Returns the number of lookups in AOTAutograd's cache in this process, by outcome: "hit", "miss", "bypass"."""
    counts = torch._dynamo.utils.counters["aot_autograd"]
    return {outcome: counts[f"autograd_cache_{outcome}"] for outcome in ("hit", "miss", "bypass")}


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
    from torch._library.custom_ops import OPDEFS

    targets = {
        node.target
        for module in gm.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
    }
    for target in targets:
        packet = getattr(target, "overloadpacket", target)
        name = str(getattr(packet, "_qualified_op_name", ""))
        definition = OPDEFS.get(name)
        if definition is not None:
            yield from (definition._init_fn, definition._abstract_fn)
            yield from (definition._setup_context_fn, definition._backward_fn)
        elif name.partition("::")[0] not in ("", "aten", "prims"):
            yield from _registered_functions(name)


def _registered_functions(name: str) -> Iterator[Callable[..., Any] | None]:
    """Yields fake and backward of an operator of torch.library.define, from torch's registries."""
    from torch._library.simple_registry import singleton

    kernel = getattr(singleton.find(name).fake_impl, "kernel", None)
    yield getattr(kernel, "func", None)
    prefix = f"GeneratedBackwardFor_{name.replace('::', '_')}_"
    for function in torch.autograd.Function.__subclasses__():
        if function.__name__.startswith(prefix):
            for cell in getattr(function.backward, "__closure__", None) or ():
                yield getattr(cell.cell_contents, "_backward_fn", None)
                yield getattr(cell.cell_contents, "_setup_context_fn", None)


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# Dynamo ----------------------------------------------------------------------------------------------------


def set_up_dynamo() -> None:
    """Keeps logging calls from causing graph breaks. Call it when the backend is loaded, before Dynamo traces."""
    _ignore_logger_methods()
    # transformers may be imported after this package, so repeat this whenever a trace begins.
    if _when_a_trace_begins not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_when_a_trace_begins)


def _ignore_logger_methods(_: object = None) -> None:
    methods = [getattr(logging.Logger, name) for name in _LOGGER_METHODS if hasattr(logging.Logger, name)]
    config = torch._dynamo.config
    if _METRICS_SORT_SETS and type(config.ignore_logging_functions) is set and methods:
        config.ignore_logging_functions = _FunctionSet(config.ignore_logging_functions)
    config.ignore_logging_functions.update(methods)


# Callbacks run while Dynamo holds a lock, even where a compiled function calls backward and a backward is compiled:
# Dynamo would trace the callback, and wait for its own lock.
_when_a_trace_begins: Any = torch._dynamo.disable(_ignore_logger_methods)


# torch 2.11 and 2.12 write Dynamo's config into their metrics at every compile: every set sorted, as JSON. With a
# function in this set, that fails and logs an error. From 2.13 they leave the set out.
_METRICS_SORT_SETS = torch.__version__ < "2.13"


class _FunctionSet(MutableSet[Any], dict[Any, Any]):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A set of functions that JSON serializes as an empty dictionary."""

    def __init__(self, functions: Iterable[Any] = ()) -> None:
        self._functions = set(functions)

    def __contains__(self, function: object) -> bool:
        return function in self._functions

    def __iter__(self) -> Iterator[Any]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def __deepcopy__(self, memo: object) -> _FunctionSet:
        return _FunctionSet(self._functions)

    def add(self, function: Any) -> None:
        self._functions.add(function)

    def discard(self, function: Any) -> None:
        self._functions.discard(function)

    def update(self, functions: Iterable[Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._functions.update(functions)
