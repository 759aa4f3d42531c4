"""Runs a function on fake tensors and records what it calls, as nodes of a graph and as effects.

In: a graph, the node before which to record, the values that the function may use. Out: every torch function that it
calls as a node with meta["example_value"] (a node without it would switch AOTAutograd's cache off), and `faults`: what
the function does besides computing new tensors, each in a few words that complete "the function ...".

A replacement stands for a computation that writes nothing and returns memory of its own; what does more is no
replacement for it. `registry.py` asks for the examples of a pattern, and `rewrite.py` for each place.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from liger_compile.graphs.aliasing import storage_of, storages_of
from liger_compile.graphs.effects import written_arguments
from liger_compile.terms.term import size_of

_META = ("stack_trace", "nn_module_stack", "source_fn_stack")

# What a torch function may return besides tensors: what it says about one.
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

# What a function that returns nothing does, where its name does not say it.
_SWITCHES = {"_set_grad_enabled": "switches gradients on or off (detach() leaves one value without)"}


class Recorder(TorchFunctionMode):
    """Records the torch functions that run under it as nodes before `before`, with the meta of `like`."""

    def __init__(self, graph: Graph, before: Node, like: Node) -> None:
        super().__init__()
        self.graph, self.before = graph, before
        self.meta = {key: like.meta[key] for key in _META if key in like.meta}
        self.node_of: dict[int, Node] = {}
        self.inserted: list[Node] = []
        self.alive: list[Any] = []  # ids are only unique among living objects
        self.captures: dict[str, torch.Tensor] = {}
        self.faults: list[str] = []
        self.writers: list[str] = []  # the torch functions that write into anything
        self.random: list[str] = []  # and the operators that draw random numbers

    def knows(self, name: str, value: Any, node: Node) -> Any:
        """Remembers which node has `value`, which the function knows as `name`, and returns what to hand to it.

        That is the same memory in a tensor of its own: the same fake tensor may be the value of several nodes, and
        what the function does to a tensor's shape or version does not reach the graph's.
        """
        if isinstance(value, torch.Tensor):
            needs_grad = value.requires_grad
            value = value.data.requires_grad_(needs_grad)
            self.captures[name] = value
        self.node_of[id(value)] = node
        self.alive.append(value)
        return value

    def watching(self) -> TorchDispatchMode:
        """A mode to run the function in as well: writes into captures that no torch function shows become faults."""
        return _Writes(self)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_higher = isinstance(func, torch._ops.HigherOrderOperator)
        out = _without_gradients(func, args, kwargs) if is_higher else func(*args, **kwargs)
        parts = out if isinstance(out, (tuple, list)) else (out,)
        if any(isinstance(part, torch.Tensor) for part in parts):
            self._insert(func, args, kwargs, out)
        elif out is None:
            self._insert_effect(func, args, kwargs)
        elif not all(isinstance(part, (*_FACTS, tuple, list)) or part is None for part in parts):
            self.faults.append(f"calls {_name(func)}, which gives a {type(out).__name__} and no tensor")
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
        """Of a function that returns nothing: x[i] = y. It writes, or it is none that a graph can have."""
        has_known = any(id(leaf) in self.node_of for leaf in tree_leaves((args, kwargs)))
        node = self._insert(func, args, kwargs, None) if has_known else None
        if node is None or not list(written_arguments(node)):
            name = _name(func)
            self.faults.append(_SWITCHES.get(name, f"calls {name}, which gives no tensor"))

    def _look_for_writes(self, node: Node) -> None:
        for argument in written_arguments(node):
            self.writers.append(_name(node.target))
            for name in self.captures_in(storages_of(argument)):
                self.wrote(name, _name(node.target))

    def captures_in(self, storages: Iterable[Any]) -> list[str]:
        """The captures in these storages."""
        known = set(storages) - {None}
        return [name for name, value in self.captures.items() if storage_of(value) in known]

    def wrote(self, name: str, by: str) -> None:
        """The function writes into a capture."""
        self.faults.append(f"writes into its argument {name!r}, by {by}")

    def _made(self, func: Any, args: tuple, kwargs: dict, values: Any) -> Node:
        name = getattr(func, "__name__", "")
        if isinstance(func, torch._ops.OpOverloadPacket):
            func = _overload(func, *values)
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
                f"a replacement may use its captures and what torch functions make of them; it used {value!r}"
            )
        return value

    def _body(self, function: FunctionType) -> Node:
        """A function that a higher-order op is given: a submodule, as Dynamo has it."""
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
        """A node for a symbolic size: the size of a tensor that the replacement knows."""
        for tensor in [each for each in self.alive if isinstance(each, torch.Tensor)]:
            for dim, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt) and size_of(size) == size_of(value):
                    node = self.graph.call_method("size", (self.node_of[id(tensor)], dim))
                    node.meta.update(self.meta, example_value=value)
                    self.inserted.append(node)
                    return node
        raise ValueError(f"no input of the replacement has the symbolic size {value} that it uses")

    def undo(self) -> None:
        """Takes out what was inserted."""
        for node in reversed(self.inserted):
            self.graph.erase_node(node)
            if node.op == "get_attr":
                delattr(self.graph.owning_module, str(node.target))


class _Writes(TorchDispatchMode):
    """Sees each operator below the torch functions, where a schema says what it writes."""

    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_random(func, args, kwargs):
            self.recorder.random.append(_name(func))
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            written = tree_leaves(list(_written(func, args, kwargs)))
            storages = (storage_of(value) for value in written if isinstance(value, torch.Tensor))
            for name in self.recorder.captures_in(storages):
                self.recorder.wrote(name, _name(func))
        return func(*args, **kwargs)


def _written(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """What an operator is given to write into."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[position] if position < len(args) else kwargs.get(argument.name)


def _is_random(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    arguments = [argument.name for argument in func._schema.arguments]
    values = {**dict.fromkeys(arguments, 0), **dict(zip(arguments, args, strict=False)), **kwargs}
    return values.get("dropout_p") != 0  # attention, which draws none without dropout, has the tag as well


def _overload(packet: torch._ops.OpOverloadPacket, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The overload that a packet calls for these values; the packet itself where that cannot be told."""
    names = packet.overloads()
    if len(names) == 1:
        return getattr(packet, names[0])
    try:
        name = torch._C._jit_resolve_packet(packet._qualified_op_name, *args, **kwargs)
    except RuntimeError:
        return packet
    return getattr(packet, name or "default")


def _name(func: Any) -> str:
    """What a person calls a torch function: "relu_", "Tensor.data"."""
    if isinstance(func, torch._ops.OpOverload):
        return func.overloadpacket.__name__
    if isinstance(func, str):
        return func
    name = getattr(func, "__name__", type(func).__name__)
    return f"Tensor.{func.__self__.__name__}" if name in ("__get__", "__set__") else name


def _without_gradients(func: Any, args: tuple, kwargs: dict) -> Any:
    """The result of a higher-order op, which would trace the gradient of its body where only shapes are wanted."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.no_grad():
        out = func(*args, **kwargs)
        return tree_map_only(
            torch.Tensor, lambda part: part.requires_grad_(needs_grad and part.is_floating_point()), out
        )


# What comes out --------------------------------------------------------------------------------------------


def faults_of(
    results: Sequence[torch.Tensor], recorder: Recorder, originals: Sequence[torch.Tensor]
) -> Iterator[str]:
    """What a function did besides computing its results, each in words that complete "the function ..."."""
    yield from dict.fromkeys(recorder.faults)
    for result in results:
        if aliased := recorder.captures_in([storage_of(result)]):
            yield f"returns its argument {aliased[0]!r}, or a view of it"
    for (i, a), (j, b) in itertools.combinations(enumerate(results), 2):
        if _share(a, b) and not _share(originals[i], originals[j]):
            yield f"returns results {i} and {j} in the same memory"
        if not _share(a, b) and _share(originals[i], originals[j]):
            yield f"returns results {i} and {j} in different memory, which share it where they are searched for"
    if name := autograd_function(results):
        yield f"calls {name}, an autograd.Function, whose backward a graph cannot have"


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    return storage_of(a) is not None and storage_of(a) == storage_of(b)


def autograd_function(results: Iterable[torch.Tensor]) -> str | None:
    """The autograd.Function in what results were computed by: of a graph only its forward would be recorded.

    Custom ops have functions of torch's own making, and stay one node.
    """
    stack, seen = [result.grad_fn for result in results], set()
    while stack:
        made_by = stack.pop()
        if made_by is None or made_by in seen:
            continue
        seen.add(made_by)
        function = getattr(made_by, "_forward_cls", None)
        if function is not None and not function.__module__.startswith("torch."):
            return function.__name__
        stack.extend(node for node, _ in made_by.next_functions)
    return None
