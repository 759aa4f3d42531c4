"""Operators and custom ops: their classes, schemas, overloads, and the Python functions that define them.

part                                          torch           can go
torch._ops                                    2.11 to 2.13    no public name for the classes of torch.ops.*
OpOverload._schema, _overloadname             2.11 to 2.13    no public name
OpOverloadPacket._qualified_op_name           2.11 to 2.13    no public name
torch._C._dispatch_get_all_op_names           2.11 to 2.13    no public name
torch._C._jit_resolve_packet                  2.11 to 2.13    no public name
torch._library.custom_ops.CustomOpDef         2.11 to 2.13    no public name; torch.library has it outside `__all__`
torch._library.custom_ops.OPDEFS              2.11 to 2.13    no public name
CustomOpDef._opoverload                       2.11 to 2.13    no public name
CustomOpDef._init_fn, _abstract_fn            2.11 to 2.13    no public name
CustomOpDef._setup_context_fn, _backward_fn   2.11 to 2.13    no public name
torch._library.simple_registry                2.11 to 2.13    no public name
torch._library.triton                         2.11 to 2.13    no public name for the switch of wrap_triton
aten._to_copy, aten._unsafe_view              2.11 to 2.13    ATen's names of two operators in traced graphs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS, CustomOpDef
from torch._library.simple_registry import singleton
from torch._library.triton import is_wrap_triton_enabled, set_wrap_triton_enabled
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

__all__ = [
    "COPY",
    "CUSTOM_OPS",
    "UNSAFE_VIEW",
    "CustomOpDef",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "called_overload",
    "counterpart",
    "defining_functions",
    "definition_of",
    "dispatched_names",
    "is_wrap_triton_enabled",
    "name_of",
    "overload_of",
    "qualified_name",
    "schema_of",
    "set_wrap_triton_enabled",
]

COPY = torch.ops.aten._to_copy.default
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default

CUSTOM_OPS: Mapping[str, CustomOpDef] = OPDEFS  # the ops of torch.library.custom_op, by "namespace::name"


def schema_of(operator: Any) -> torch.FunctionSchema:
    """Returns the schema of an overload: the names, types and aliases of its arguments."""
    return operator._schema


def name_of(operator: OpOverload) -> str:
    """Returns "namespace.name.overload" of an overload, as it is found below torch.ops."""
    return f"{operator.namespace}.{operator.overloadpacket.__name__}.{operator._overloadname}"


def counterpart(operator: OpOverload, name: str) -> OpOverload | None:
    """Returns the overload of the same name of another operator of the same namespace; None if there is none."""
    packet = getattr(getattr(torch.ops, operator.namespace), name, None)
    return getattr(packet, operator._overloadname, None)


def qualified_name(operator: Any) -> str:
    """Returns "namespace::name" of an operator without its overload; empty for any other value."""
    return str(getattr(operator, "_qualified_op_name", ""))


def dispatched_names() -> frozenset[str]:
    """Returns the operators that torch dispatches on tensors; excludes TorchScript's for lists (aten::sort.Tensor)."""
    return frozenset(torch._C._dispatch_get_all_op_names())


def overload_of(op: CustomOpDef) -> OpOverload:
    """Returns the only overload of a custom op: the target of its calls in a graph."""
    return op._opoverload


def called_overload(packet: OpOverloadPacket, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns the overload that a packet calls for these values; the packet itself if that is unknown."""
    names = packet.overloads()
    if len(names) == 1:
        return getattr(packet, names[0])
    try:
        name = torch._C._jit_resolve_packet(qualified_name(packet), *args, **kwargs)
    except RuntimeError:
        return packet
    return getattr(packet, name or "default")


def definition_of(op: Any) -> tuple[Callable[..., Any] | None, ...]:
    """Returns forward, fake, context and backward of a custom op; None for what is absent, and for any other value."""
    return (
        getattr(op, "_init_fn", None),
        getattr(op, "_abstract_fn", None),
        getattr(op, "_setup_context_fn", None),
        getattr(op, "_backward_fn", None),
    )


def defining_functions(name: str) -> Iterator[Callable[..., Any] | None]:
    """Yields the Python functions that define a custom op, "namespace::name": forward, fake and backward.

    Nothing is known of autograd kernels that Library.impl registered, and of torch's own operators.
    """
    definition = CUSTOM_OPS.get(name)
    if definition is not None:
        yield from definition_of(definition)
    elif name.partition("::")[0] not in ("", "aten", "prims"):
        yield from _registered_functions(name)


def _registered_functions(name: str) -> Iterator[Callable[..., Any] | None]:
    """Yields fake and backward of an operator of torch.library.define, from torch's registries."""
    kernel = getattr(singleton.find(name).fake_impl, "kernel", None)
    yield getattr(kernel, "func", None)
    prefix = f"GeneratedBackwardFor_{name.replace('::', '_')}_"
    for function in torch.autograd.Function.__subclasses__():
        if function.__name__.startswith(prefix):
            for cell in getattr(function.backward, "__closure__", None) or ():
                yield from definition_of(cell.cell_contents)
