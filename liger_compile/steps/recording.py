"""Runs a function on fake tensors and records its calls as nodes of a graph, and its effects as faults.

In: a graph, the node before which to record, and the values that the function may use. Out: every called torch function
as a node with meta["example_value"] (a node without it would disable AOTAutograd's cache), and `faults`: the effects of
the function besides computing new tensors, each in a few words that complete "the function ...".

A replacement stands for a computation that writes nothing and returns new memory, so it must have no other effects.
`registry.py` checks this for the examples of a pattern, and `steps/rewrite.py` for each place.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch.fx import Graph, Node, symbolic_trace
from torch.overrides import TorchFunctionMode

from liger_compile.graphs.aliasing import storages_of
from liger_compile.graphs.effects import written_arguments
from liger_compile.terms.term import size_of
from liger_compile.torch_internals.autograd import function_of
from liger_compile.torch_internals.dispatch import TorchDispatchMode
from liger_compile.torch_internals.operators import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    called_overload,
    schema_of,
)
from liger_compile.torch_internals.pytree import tree_leaves, tree_map, tree_map_only
from liger_compile.torch_internals.tensors import storage_of

_META = ("stack_trace", "nn_module_stack", "source_fn_stack")

# The non-tensor values that a torch function may return: facts about a tensor.
_FACTS = (
    bool,
    int,
    float,
    complex,
    str,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
    torch.dtype,
    torch.device,
)
_FACTS += (torch.layout, torch.memory_format, torch.Size)

# The effects of functions that return nothing, where the name does not state the effect.
_SWITCHES = {"_set_grad_enabled": "switches gradients on or off (detach() leaves one value without)"}


class Recorder(TorchFunctionMode):
    """Records the torch functions that run under it as nodes before `before`, with the meta of `like`."""

    def __init__(self, graph: Graph, before: Node, like: Node) -> None:
        super().__init__()
        self.graph, self.before = graph, before
        self.meta = {key: like.meta[key] for key in _META if key in like.meta}
        self.node_of: dict[int, Node] = {}
        self.inserted: list[Node] = []
        self.alive: list[Any] = []  # keeps objects alive, since ids are unique only among living objects
        self.captures: dict[str, torch.Tensor] = {}
        self.faults: list[str] = []
        self.writers: list[str] = []  # the torch functions that write in place
        self.random: list[str] = []  # the operators that draw random numbers
        self.saved: set[int | None] = set()  # the storages that are saved for backward

    def knows(self, name: str, value: Any, node: Node) -> Any:
        """Records that `node` has `value`, which the function calls `name`. Returns the value to pass to the function.

        The returned tensor is new and shares the memory: one fake tensor may be the value of several nodes, and the
        function's changes to a tensor's shape or version must not reach the graph's tensor.
        """
        if isinstance(value, torch.Tensor):
            needs_grad = value.requires_grad
            value = value.data.requires_grad_(needs_grad)
            self.captures[name] = value
        self.node_of[id(value)] = node
        self.alive.append(value)
        return value

    def watching(self) -> TorchDispatchMode:
        """Returns a second mode to run the function in: in-place writes below the torch functions become faults."""
        return _Writes(self)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_higher = isinstance(func, HigherOrderOperator)
        if is_higher:  # it runs without gradients here, and may save what it reads
            operands = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
            self.saved.update(map(storage_of, operands))
        out = _without_gradients(func, args, kwargs) if is_higher else func(*args, **kwargs)
        parts = out if isinstance(out, (tuple, list)) else (out,)
        if any(isinstance(part, torch.Tensor) for part in parts):
            self._insert(func, args, kwargs, out)
        elif out is None:
            self._insert_effect(func, args, kwargs)
        elif not all(isinstance(part, (*_FACTS, tuple, list)) or part is None for part in parts):
            self.faults.append(
                f"calls {_name(func)}, which returns a {type(out).__name__} instead of a tensor"
            )
        return out

    def _insert(self, func: Any, args: Any, kwargs: Any, out: Any) -> Node:
        with self.graph.inserting_before(self.before):
            arguments, keywords = tree_map(self._argument, (tuple(args), dict(kwargs)))
            node = self._made(func, arguments, keywords, (args, kwargs))
            self._remember(node, out)
            if isinstance(out, (tuple, list)):
                for index, part in enumerate(out):
                    if isinstance(part, torch.Tensor):
                        item = self.graph.call_function(operator.getitem, (node, index))
                        self._remember(item, part)
        self._look_for_writes(node)
        return node

    def _insert_effect(self, func: Any, args: Any, kwargs: Any) -> None:
        """Records a function that returns nothing, such as x[i] = y. A fault unless it writes in place."""
        has_known = any(id(leaf) in self.node_of for leaf in tree_leaves((args, kwargs)))
        node = self._insert(func, args, kwargs, None) if has_known else None
        if node is None or not list(written_arguments(node)):
            name = _name(func)
            self.faults.append(_SWITCHES.get(name, f"calls {name}, which returns no tensor"))

    def _look_for_writes(self, node: Node) -> None:
        for argument in written_arguments(node):
            self.writers.append(_name(node.target))
            for name in self.captures_in(storages_of(argument)):
                self.wrote(name, _name(node.target))

    def captures_in(self, storages: Iterable[Any]) -> list[str]:
        """Returns the captures in these storages."""
        known = set(storages) - {None}
        return [name for name, value in self.captures.items() if storage_of(value) in known]

    def wrote(self, name: str, by: str) -> None:
        """Records the fault that the function writes into a capture."""
        self.faults.append(f"writes into its argument {name!r}, by {by}")

    def _made(self, func: Any, args: tuple, kwargs: dict, values: Any) -> Node:
        name = getattr(func, "__name__", "")
        if isinstance(func, OpOverloadPacket):
            func = called_overload(func, *values)
        elif name == "__get__":  # a property: x.real
            return self.graph.call_function(getattr, (args[0], func.__self__.__name__))
        elif name == "__setitem__":
            return self.graph.call_function(operator.setitem, args, kwargs)
        elif getattr(torch.Tensor, name, None) is func or type(func).__name__ == "method_descriptor":
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(func, args, kwargs)

    def _remember(self, node: Node, value: Any) -> None:
        node.meta.update(self.meta, example_value=value)
        self.inserted.append(node)
        self.alive.append(value)
        self.node_of[id(value)] = node

    def _argument(self, value: Any) -> Any:
        if id(value) in self.node_of:
            return self.node_of[id(value)]
        if isinstance(value, FunctionType):
            return self._body(value)
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, (torch.Tensor, torch.SymFloat)):
            raise ValueError(
                f"a replacement may use its captures and results of torch functions on them; it used {value!r}"
            )
        return value

    def _body(self, function: FunctionType) -> Node:
        """Adds a function that is passed to a higher-order op as a submodule, as Dynamo does."""
        owner = self.graph.owning_module
        assert owner is not None
        name = next(
            f"liger_{function.__name__}_{n}"
            for n in itertools.count()
            if not hasattr(owner, f"liger_{function.__name__}_{n}")
        )
        setattr(owner, name, symbolic_trace(function))
        node = self.graph.get_attr(name)
        node.meta.update(self.meta)
        self.inserted.append(node)
        return node

    def _size(self, value: torch.SymInt) -> Node:
        """Returns a node for a symbolic size: the size of a tensor that the replacement has."""
        for tensor in [value for value in self.alive if isinstance(value, torch.Tensor)]:
            for dim, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt) and size_of(size) == size_of(value):
                    node = self.graph.call_method("size", (self.node_of[id(tensor)], dim))
                    node.meta.update(self.meta, example_value=value)
                    self.inserted.append(node)
                    return node
        raise ValueError(f"no input of the replacement has the symbolic size {value} that it uses")

    def undo(self) -> None:
        """Erases the inserted nodes."""
        for node in reversed(self.inserted):
            self.graph.erase_node(node)
            if node.op == "get_attr":
                delattr(self.graph.owning_module, str(node.target))


class _Writes(TorchDispatchMode):
    """Records the writes of each operator below the torch functions, from its schema."""

    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_random(func, args, kwargs):
            self.recorder.random.append(_name(func))
        if isinstance(func, OpOverload) and schema_of(func).is_mutable:
            written = tree_leaves(list(_written(func, args, kwargs)))
            storages = (storage_of(value) for value in written if isinstance(value, torch.Tensor))
            for name in self.recorder.captures_in(storages):
                self.recorder.wrote(name, _name(func))
        return func(*args, **kwargs)


def _written(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the arguments that an operator writes into."""
    for position, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[position] if position < len(args) else kwargs.get(argument.name)


def _is_random(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    arguments = [argument.name for argument in schema_of(func).arguments]
    values = {**dict.fromkeys(arguments, 0), **dict(zip(arguments, args, strict=False)), **kwargs}
    return values.get("dropout_p") != 0  # attention has the tag too, but draws no numbers without dropout


def _name(func: Any) -> str:
    """Returns the name of a torch function for people: "relu_", "Tensor.data"."""
    if isinstance(func, OpOverload):
        return func.overloadpacket.__name__
    if isinstance(func, str):
        return func
    name = getattr(func, "__name__", type(func).__name__)
    return f"Tensor.{func.__self__.__name__}" if name in ("__get__", "__set__") else name


def _without_gradients(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs a higher-order op without gradients: only shapes are needed, and it would trace the gradient too."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.no_grad():
        out = func(*args, **kwargs)
        return tree_map_only(
            torch.Tensor, lambda part: part.requires_grad_(needs_grad and part.is_floating_point()), out
        )


# Results ---------------------------------------------------------------------------------------------------


def faults_of(
    results: Sequence[torch.Tensor], recorder: Recorder, originals: Sequence[torch.Tensor]
) -> Iterator[str]:
    """Yields the effects of a function besides its results, each in words that complete "the function ..."."""
    yield from dict.fromkeys(recorder.faults)
    for result in results:
        if aliased := recorder.captures_in([storage_of(result)]):
            yield f"returns its argument {aliased[0]!r}, or a view of it"
    for (i, a), (j, b) in itertools.combinations(enumerate(results), 2):
        if _share(a, b) and not _share(originals[i], originals[j]):
            yield f"returns results {i} and {j} in the same memory"
        if not _share(a, b) and _share(originals[i], originals[j]):
            yield f"returns results {i} and {j} in different memory, and the results of search share memory"
    if name := autograd_function(results):
        yield f"calls {name}, an autograd.Function, whose backward cannot be part of a graph"


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    return storage_of(a) is not None and storage_of(a) == storage_of(b)


def autograd_function(results: Iterable[torch.Tensor]) -> str | None:
    """Returns the name of an autograd.Function that computed results: a graph would record its forward only.

    The autograd functions of custom ops belong to torch, and such an op stays one node.
    """
    stack, seen = [result.grad_fn for result in results], set()
    while stack:
        made_by = stack.pop()
        if made_by is None or made_by in seen:
            continue
        seen.add(made_by)
        function = function_of(made_by)
        if function is not None and not function.__module__.startswith("torch."):
            return function.__name__
        stack.extend(node for node, _ in made_by.next_functions)
    return None
