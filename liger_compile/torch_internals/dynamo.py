"""Dynamo: the state in which it calls a backend, its backends, its counts, and the functions that it leaves out.

part                                            torch           can go
torch._guards                                   2.11 to 2.13    no public name for traces and their contexts
torch._guards._TLS                              2.11 to 2.13    no public name to replace the trace of a thread
torch._dynamo.lookup_backend                    2.11 to 2.13    no public name
torch._dynamo.OptimizedModule                   2.11 to 2.13    no public name
model._torchdynamo_orig_callable                2.11 to 2.13    no public name; on a compiled function
backend._torchdynamo_orig_backend               2.11 to 2.13    no public name; on a wrapped backend
torch._dynamo.utils.counters                    2.11 to 2.13    no public name
torch._dynamo.callback                          2.11 to 2.13    no public name
torch._dynamo.config                            2.11 to 2.13    no public name for ignore_logging_functions
torch._dynamo.convert_frame.compile_lock        2.11 to 2.13    no public name
torch.compiler._compile_session_context         2.13            no public name; in 2.11 there is nothing to set
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableSet, Sequence
from typing import Any

import torch
from torch import _guards
from torch._guards import CompileContext, TracingContext, compile_context, tracing

from liger_compile.torch_internals.dispatch import without_dispatch_modes
from liger_compile.torch_internals.fake_tensors import FakeTensor
from liger_compile.torch_internals.shapes import NewSymbols, Places

Compile = Callable[[Sequence[Any]], Callable[..., Any]]  # inputs -> the compiled graph
CompileLater = Callable[[Sequence[Any]], tuple[Callable[..., Any], NewSymbols]]


def lookup_backend(name: str) -> Callable[..., Any]:
    """Returns a backend of torch.compile: "eager", "aot_eager", ..."""
    from torch._dynamo import lookup_backend

    return lookup_backend(name)


def is_compiled(model: Callable[..., Any]) -> bool:
    """Returns whether a model is the result of torch.compile."""
    from torch._dynamo import OptimizedModule

    return isinstance(model, OptimizedModule) or hasattr(model, "_torchdynamo_orig_callable")


def unwrapped(backend: Any) -> Iterator[Any]:
    """Yields a backend and the backends that it wraps: Dynamo wraps it for mode and options, and for debugging."""
    while backend is not None:
        yield backend
        wrapped = getattr(backend, "_torchdynamo_orig_backend", None)
        backend = getattr(backend, "compiler_fn", None) if wrapped is None else wrapped


def graph_breaks() -> Counter[str]:
    """Returns the number of graph breaks in this process, by reason."""
    from torch._dynamo.utils import counters

    return counters["graph_break"] | counters["unimplemented"]  # Dynamo counts each break in one of them


def readable_path(path: str) -> str:
    """Returns the name of a module from the path in a node's `nn_module_stack`: "layers.0" of "L['self'].layers.0"."""
    # Dynamo writes a path as source: L['self'].layers.0, G['model'].head, getattr(L['fn'].blocks, 'w-x'), and
    # L['self'].__dict__['_modules']['base_model'] where a class defines __getattr__, as those of PEFT do.
    path = re.sub(r"\.__dict__\['_modules'\]\['([^']*)'\]", r".\1", path)
    path = re.sub(r"getattr\(|, '([^']*)'\)", lambda found: f".{found[1]}" if found[1] else "", path)
    # The model itself has no name: it is the self of a method, or the first of a wrapper's *args.
    path = re.sub(r"^[LG]\['(\w+)'\](\[0\])?", lambda f: "" if f[1] in ("self", "fn", "args") else f[1], path)
    return path.lstrip(".")


def is_tracing() -> bool:
    """Returns whether this thread compiles a function."""
    return TracingContext.try_get() is not None


# Compiling outside of Dynamo's own calls.


def resumed_later(compile: Compile, examples: Sequence[Any] = ()) -> CompileLater:
    """Returns a function that runs `compile` as part of the current trace, later and in any thread.

    It is logged as part of this trace and uses its torch settings.

    Args:
        examples: the inputs in this trace; their symbolic sizes are symbolic then too. Other sizes are constants.
    """
    logged_as, settings = CompileContext.try_get(), contextvars.copy_context()

    def resumed(inputs: Sequence[Any]) -> tuple[Callable[..., Any], NewSymbols]:
        return settings.copy().run(_in_new_trace, compile, inputs, examples, logged_as)

    return resumed


def _in_new_trace(
    compile: Compile, inputs: Sequence[Any], examples: Sequence[Any], logged_as: CompileContext | None
) -> tuple[Callable[..., Any], NewSymbols]:
    """Returns the result of `compile` in a new trace, since Dynamo has freed the fake tensors of the first trace."""
    symbols = NewSymbols(Places(examples).numbers(inputs))
    if examples:
        inputs = [symbols.input_like(example, value) for example, value in zip(examples, inputs, strict=True)]
    # A fake mode caches the fake of each tensor, so that AOTAutograd gets these fakes, whose sizes are constants.
    real = (each for each in inputs if isinstance(each, torch.Tensor) and not isinstance(each, FakeTensor))
    fakes = [symbols.fake_mode.from_tensor(tensor, static_shapes=True) for tensor in real]
    with compile_context(logged_as), tracing(TracingContext(symbols.fake_mode)):
        result = compile(inputs)
    del fakes
    return result, symbols


@contextlib.contextmanager
def own_trace() -> Iterator[None]:
    """Gives a compilation within a trace the facts that AOTAutograd records there, for itself.

    A trace has room for one graph. The backward of a graph is compiled later and reads there which of its inputs it may
    overwrite, which would be those of the graph that was compiled last. DDP's optimizer keeps these facts itself.
    """
    trace = TracingContext.try_get()
    if trace is None or trace.ddp_optimizer_ctx is not None:
        yield
        return
    mine = copy.copy(trace)
    mine.fw_metadata = mine.params_flat = mine.params_flat_unwrap_subclasses = None
    _guards._TLS.tracing_context = mine
    try:
        yield
    finally:
        _guards._TLS.tracing_context = trace


@contextlib.contextmanager
def as_dynamo_compiles() -> Iterator[None]:
    """Sets the state in which Dynamo calls a backend. Random numbers and modes stay those of the user.

    Tracing sets process-wide flags: only one thread compiles, and a flag of torch informs calls in other threads.
    """
    from torch._dynamo.convert_frame import compile_lock

    session = getattr(torch.compiler, "_compile_session_context", contextlib.nullcontext)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with compile_lock, session(), without_dispatch_modes():
        state = random.getstate()
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            random.setstate(state)


# Functions that traces leave out.


def when_traces_begin(call: Callable[[], None]) -> None:
    """Makes Dynamo call a function at the beginning of every trace. It has no effect a second time."""
    from torch._dynamo.callback import callback_handler

    if (callback := _callback(call)) not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(callback)


@functools.cache
def _callback(call: Callable[[], None]) -> Any:
    # Callbacks run while Dynamo holds a lock, even where a compiled function calls backward and a backward is compiled:
    # Dynamo would trace the callback, and wait for its own lock.
    @torch.compiler.disable
    def begin(_: object) -> None:
        call()

    return begin


def leave_out_of_traces(functions: Iterable[Callable[..., Any]]) -> None:
    """Makes Dynamo leave out calls of functions that return None, instead of breaking the graph."""
    from torch._dynamo import config

    functions = list(functions)
    if _METRICS_SORT_SETS and functions and type(config.ignore_logging_functions) is set:
        config.ignore_logging_functions = _FunctionSet(config.ignore_logging_functions)
    config.ignore_logging_functions.update(functions)


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
