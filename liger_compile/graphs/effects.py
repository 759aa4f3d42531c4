"""Finds the arguments that a call writes into: a closed-world table of torch's operators, functions and methods.

A call is known to write nothing, is known to write into certain arguments, or is assumed to write into every tensor
argument. The known effects come from the schemas of operators, from the functions and methods that torch lists as
overridable, and from the entries below for the rest.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.overrides import get_testing_overrides

from liger_compile.torch_internals import dtensor
from liger_compile.torch_internals.operators import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    dispatched_names,
    schema_of,
)


@dataclass(frozen=True)
class Writes:
    """The arguments that a call writes into.

    Args:
        positions: indices of positional arguments.
        names: names of keyword arguments.
        when: position and name of a parameter; if it is absent or false, the call writes nothing.
        everything: every tensor among the arguments, including nested ones and keywords.
        moves_memory: the call changes the shape, strides or storage of the argument (`resize_`, `set_`).
    """

    positions: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()
    when: tuple[int, str] | None = None
    everything: bool = False
    moves_memory: bool = False

    @property
    def is_nothing(self) -> bool:
        """Whether a call without `out` writes nothing, regardless of its other arguments."""
        return not self.everything and not self.positions


def _into(*arguments: int | str, when: tuple[int, str] | None = None) -> Writes:
    positions = frozenset(argument for argument in arguments if isinstance(argument, int))
    return Writes(positions, frozenset(argument for argument in arguments if isinstance(argument, str)), when)


NOTHING = Writes()
OUT = _into("out")
EVERYTHING = Writes(everything=True)

# Python's in-place operators, as functions and as methods.
_IN_PLACE = frozenset(
    f"i{name}"
    for name in (
        "add",
        "and",
        "concat",
        "floordiv",
        "lshift",
        "matmul",
        "mod",
        "mul",
        "or",
        "pow",
        "rshift",
        "sub",
    )
) | {"itruediv", "ixor", "idiv", "setitem", "delitem"}

# Statistics that these operators update although their schemas declare no write.
_RUNNING = _into(3, 4, "running_mean", "running_var")
_UNSAID: Mapping[str, Writes] = {
    "batch_norm": _into(3, 4, "running_mean", "running_var", when=(5, "training")),
    "batch_norm_update_stats": _into(1, 2, "running_mean", "running_var"),
    **dict.fromkeys(
        (
            *("instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"),
            *("_batch_norm_impl_index", "batch_norm_gather_stats", "batch_norm_gather_stats_with_counts"),
        ),
        _RUNNING,
    ),
}

# Python functions of torch.nn.functional that write without a parameter named `inplace`.
_FUNCTIONS: Mapping[Callable[..., Any], Writes] = {
    F.batch_norm: _into(1, 2, "running_mean", "running_var", when=(5, "training")),
    F.instance_norm: _into(1, 2, "running_mean", "running_var"),
    F.embedding: _into(1, "weight", when=(3, "max_norm")),
    F.embedding_bag: _into(1, "weight", when=(3, "max_norm")),
}

# Functions of torch that write nothing, and that torch does not list as overridable.
_PURE_IN_TORCH = frozenset(
    (
        # torch.func transforms and forward-mode differentiation: from a tensor, an alias of it or a new tensor
        *("_add_batch_dim", "_remove_batch_dim", "_unwrap_batched", "_wrap_for_grad", "_unwrap_for_grad"),
        *("_autograd_grad", "_set_tensor_requires_grad", "_make_dual", "_unpack_dual", "_get_data_attr"),
        # checks, conversions
        *(
            "_assert",
            "_check",
            "_check_index",
            "_check_is_size",
            "_check_tensor_all",
            "_check_type",
            "_check_value",
        ),
        *(
            "_check_with",
            "_constrain_as_size",
            "as_tensor",
            "asarray",
            "from_numpy",
            "is_tensor",
            "tensor",
            "typename",
        ),
        *("_parse_to", "sym_sqrt", "sym_fresh_size"),
        *(f"prim_{name}" for name in dtensor.CONVERSIONS),
    )
)
_PURE_METHODS = frozenset(
    ("new", "new_tensor", "as_subclass", "unsafe_chunk", "unsafe_split", *dtensor.CONVERSIONS)
)
# Methods that write although torch lists them as overridable; names with a trailing underscore are not repeated.
_IMPURE_METHODS = frozenset(("__setstate__", "backward", "module_load"))
_PURE_MODULES = ("_operator", "builtins", "einops", "math")
_IMPURE_IN_THESE = frozenset(("setattr", "delattr", "exec", "eval", "call", "methodcaller"))

# Higher-order ops that call subgraphs and otherwise write nothing. The writes of the subgraphs count.
_CALLS_BODIES = frozenset(
    (
        *(
            "tag_activation_checkpoint",
            "wrap_activation_checkpoint",
            "invoke_subgraph",
            "wrap",
            "strict_mode",
        ),
        *("cond", "while_loop", "while_loop_stack_output", "map", "map_impl", "scan", "associative_scan"),
        *(
            "flex_attention",
            "flex_attention_backward",
            "autograd_function_apply",
            "hints_wrapper",
            "foreach_map",
        ),
        *("wrap_with_autocast", "wrap_with_set_grad_enabled", "invoke_quant", "invoke_quant_packed"),
    )
)
_FUNCTIONAL = frozenset(
    (
        *("auto_functionalized", "auto_functionalized_v2", "triton_kernel_wrapper_functional"),
        *("out_dtype", "inline_asm_elementwise"),
    )
)


def is_in_place(name: str) -> bool:
    """Returns whether an operator of this name writes into its first argument: x.mul_(y), x *= y, x[i] = y."""
    plain = name.removeprefix("__").removesuffix("__") if name.startswith("__") else name
    return plain in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def calls_bodies(node: Node) -> bool:
    """Returns whether a node calls subgraphs, by a higher-order op that itself writes nothing."""
    is_higher = isinstance(node.target, HigherOrderOperator)
    return is_higher and getattr(node.target, "__name__", "") in _CALLS_BODIES


def written_arguments(node: Node) -> Iterator[Node]:
    """Yields the nodes that a call writes into; for a call of subgraphs, only those that it writes itself."""
    effect = effect_of(node)
    if effect.everything:
        yield from node.all_input_nodes
        return
    if effect.when and not _given(node, *effect.when):
        return
    for position in sorted(effect.positions):
        yield from _nodes(node.args[position : position + 1])
    for name in sorted(effect.names):
        yield from _nodes(node.kwargs.get(name))


def effect_of(node: Node) -> Writes:
    """Returns what the call at a node writes into; EVERYTHING if that is not known."""
    if node.op == "call_function":
        return _of_function(node.target)
    if node.op == "call_method":
        return _of_method(str(node.target))
    return _of_module(node) if node.op == "call_module" else NOTHING


def _given(node: Node, position: int, name: str) -> bool:
    """Returns whether an argument is present and true, or known at run time only."""
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return isinstance(value, Node) or bool(value)


def _nodes(value: Any) -> list[Node]:
    """Returns the nodes in an argument, including nested ones."""
    found: list[Node] = []
    map_arg(value, lambda node: found.append(node))
    return found


@functools.cache
def _of_function(target: Any) -> Writes:
    name = getattr(target, "__name__", None) or ""
    if target in dtensor.CALLS:
        return NOTHING
    if isinstance(target, OpOverload):
        return _of_overloads((target,))
    if isinstance(target, OpOverloadPacket):
        is_of_aten = target is getattr(torch.ops.aten, name, None)
        return _of_overloads(_overloads(name) if is_of_aten else _of_packet(target))
    if isinstance(target, HigherOrderOperator):
        return NOTHING if name in _CALLS_BODIES | _FUNCTIONAL else EVERYTHING
    if isinstance(target, MethodWrapperType):
        return NOTHING if name == "__get__" else EVERYTHING
    root = (getattr(target, "__module__", None) or "").partition(".")[0]
    if root in _PURE_MODULES:
        return _of_python(root, name)
    if _is_method(target, name):
        return _of_method(name)
    if root == "torch" and isinstance(target, type):
        return NOTHING  # a constructor: torch.Size, torch.device
    return _of_torch(target, name) if root == "torch" else EVERYTHING


def _of_python(module: str, name: str) -> Writes:
    """Returns the effect of a Python operator or builtin."""
    if name in _IMPURE_IN_THESE:
        return EVERYTHING
    return _into(0) if module == "_operator" and name in _IN_PLACE else NOTHING


def _is_method(target: Any, name: str) -> bool:
    """Returns whether a function is a method of tensors: torch.Tensor.add_."""
    return (
        bool(name)
        and inspect.getattr_static(torch.Tensor, name, None) is not None
        and (getattr(torch.Tensor, name) is target)
    )


def _of_torch(target: Any, name: str) -> Writes:
    """Returns the effect of a torch function that is no operator object: torch.mul, F.silu."""
    if target in _FUNCTIONS:
        return _FUNCTIONS[target]
    if isinstance(target, BuiltinFunctionType) and (overloads := _overloads(name)):
        return _of_overloads(overloads)
    if name in _PURE_IN_TORCH:
        return NOTHING
    if name.endswith("from_local"):  # DTensor's; it broadcasts into its argument if it checks
        return NOTHING if dtensor.never_checks(target) else _into(0, "local_tensor", when=(3, "run_check"))
    if not _is_listed(target) and getattr(F, name, None) is not target:
        return EVERYTHING
    if is_in_place(name):
        return _into(0, "input", "tensor")
    return _of_flag(target)


def _of_flag(function: Callable[..., Any]) -> Writes:
    """Returns the effect of a Python function: it writes its first argument if `inplace` is set, and `out` if given."""
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        parameters = []
    if "inplace" not in parameters:
        return OUT
    return _into(0, parameters[0], when=(parameters.index("inplace"), "inplace"))


def _is_listed(target: Any) -> bool:
    """Returns whether torch lists a function or method as overridable; excludes collectives, which write."""
    module = getattr(target, "__module__", None) or "torch"
    return target in get_testing_overrides() and not module.startswith("torch.distributed")


@functools.cache
def _of_method(name: str) -> Writes:
    """Returns the effect of a method of tensors, by its name."""
    if overloads := _overloads(name):
        return _of_overloads(overloads)
    if is_in_place(name):
        return _into(0)
    if name in _IMPURE_METHODS:
        return EVERYTHING
    plain = name.removeprefix("__").removesuffix("__")
    is_operator = plain != name and (hasattr(operator, plain) or hasattr(operator, plain.removeprefix("r")))
    is_pure = is_operator or name in _PURE_METHODS or _is_listed(getattr(torch.Tensor, name, None))
    return NOTHING if is_pure else EVERYTHING


_dispatched = functools.cache(dispatched_names)


def _overloads(name: str) -> tuple[OpOverload, ...]:
    """Returns aten's operators of a name."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, OpOverloadPacket):
        return ()
    return tuple(overload for overload in _of_packet(packet) if overload.name() in _dispatched())


def _of_packet(packet: OpOverloadPacket) -> tuple[OpOverload, ...]:
    return tuple(getattr(packet, overload) for overload in packet.overloads())


def _of_overloads(overloads: Iterable[OpOverload]) -> Writes:
    """Returns the arguments that any of these operators writes into."""
    overloads = tuple(overloads)
    if (name := schema_of(overloads[0]).name.removeprefix("aten::")) in _UNSAID:
        return _UNSAID[name]
    written = [
        (at, argument)
        for at, argument in itertools.chain.from_iterable(
            enumerate(schema_of(o).arguments) for o in overloads
        )
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    names = {argument.name for _, argument in written}
    return Writes(
        frozenset(at for at, argument in written if not argument.kwarg_only),
        frozenset(names | {"out", "input"} if "self" in names else names | {"out"}),
        moves_memory=any(torch.Tag.inplace_view in overload.tags for overload in overloads),
    )


def _of_module(node: Node) -> Writes:
    """Returns the effect of a call_module: torch's own modules write no argument unless `inplace` is set.

    For a graph, the calls in it count.
    """
    owner: Any = node.graph.owning_module
    try:
        module = owner.get_submodule(str(node.target))
    except AttributeError:
        return EVERYTHING
    if isinstance(module, GraphModule):
        return NOTHING
    is_torchs = type(module).__module__.startswith("torch.nn.modules.")
    return NOTHING if is_torchs and not getattr(module, "inplace", False) else EVERYTHING
