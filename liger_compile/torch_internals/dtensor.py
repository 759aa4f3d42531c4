"""DTensor: tensors that are divided over the ranks of a mesh, and the calls that Dynamo records for them.

torch 2.13 records the methods `to_local` and `redistribute`, and the function `from_local`. torch 2.11 records
functions prim_to_local, prim_redistribute and "prim from_local" of the modules of Dynamo's variables, whose closures
hold all arguments but the tensor as args_as_value and kwargs_as_value.

part                                        torch           can go
DTensor._op_dispatcher                      2.11 to 2.13    no public name for the state of loss_parallel()
OpDispatcher._custom_op_handlers            2.11 to 2.13    no public name for the state of loss_parallel()
DTensor._local_tensor                       2.11 to 2.13    to_local() records a call, and returns a view
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.overrides import handle_torch_function, has_torch_function

CONVERSIONS = ("redistribute", "to_local")


class Conversion(NamedTuple):
    """A call that changes how a DTensor is divided, or takes the local tensor of this rank."""

    kind: str  # one of CONVERSIONS
    source: Node
    settings: Mapping[str, Any]  # the keywords that are given; positional arguments are among them


def is_dtensor(value: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_replicated(tensor: Any) -> bool:
    """Returns whether each rank has all of a DTensor."""
    return all(placement.is_replicate() for placement in tensor.placements)


def sharded_dim(tensor: Any) -> int | None:
    """Returns the dimension along which the ranks of a one-dimensional mesh divide a DTensor evenly, or None."""
    from torch.distributed.tensor import Shard

    (placement,) = tensor.placements if len(tensor.placements) == 1 else (None,)
    if type(placement) is not Shard:  # a strided shard has another order
        return None
    return placement.dim % tensor.dim()


def have_whole_rows(x: Any, replicated: Iterable[Any], computed: Iterable[Any]) -> bool:
    """Returns whether each rank computes whole rows of x (..., D), alone, with operands that all ranks have.

    Args:
        replicated: the other operands.
        computed: the values that are computed from x; those that are no DTensors are not divided, or not known to be.
    """
    from torch.distributed.tensor import Shard

    last = x.dim() - 1
    by_rows = (p.is_replicate() or (type(p) is Shard and p.dim % x.dim() != last) for p in x.placements)
    same = (is_dtensor(value) and value.device_mesh == x.device_mesh for value in (*replicated, *computed))
    return (
        all(by_rows)
        and all(same)
        and all(map(is_replicated, replicated))
        and all(value.placements == x.placements for value in computed)
    )


def local_of(tensor: Any) -> Tensor:
    """Returns the local tensor of a DTensor itself, outside of autograd; other tensors as they are."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def group_of(tensor: Any) -> tuple[str, int]:
    """Returns the name of the process group of a DTensor on a one-dimensional mesh, and its number of ranks."""
    return tensor.device_mesh.get_group().group_name, tensor.device_mesh.size()


def in_loss_parallel() -> bool:
    """Returns whether F.cross_entropy leaves logits divided by classes, as in the context of loss_parallel()."""
    from torch.distributed.tensor import DTensor

    return torch.ops.aten.nll_loss_forward.default in DTensor._op_dispatcher._custom_op_handlers


def conversion_at(node: Node) -> Conversion | None:
    """Returns the conversion of a DTensor that a node of Dynamo's graph calls, or None."""
    if node.op == "call_method":
        kind, positional, keywords = str(node.target), node.args[1:], dict(node.kwargs)
    elif node.op == "call_function":
        kind = getattr(node.target, "__name__", "").removeprefix("prim_")
        positional, keywords = _closure(node.target) if kind in CONVERSIONS else ((), {})
    else:
        return None
    source = node.args[0] if node.args else None
    if kind not in CONVERSIONS or not isinstance(source, Node):
        return None
    if not is_dtensor(source.meta.get("example_value")):
        return None
    names = ("device_mesh", "placements") if kind == "redistribute" else ("grad_placements",)
    given = {**dict(zip(names, positional, strict=False)), **keywords}
    return Conversion(kind, source, {name: value for name, value in given.items() if value is not None})


def never_checks(from_local: Any) -> bool:
    """Returns whether no call of this function, which makes a DTensor, sets run_check."""
    positional, keywords = _closure(from_local)
    given = {**dict(zip(("device_mesh", "placements", "run_check"), positional, strict=False)), **keywords}
    return "placements" in given and not given.get("run_check")


def _closure(function: Any) -> tuple[Any, dict[str, Any]]:
    values = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    return values.get("args_as_value", ()), dict(values.get("kwargs_as_value", {}))


# Functions that a graph calls ------------------------------------------------------------------------------


def _recordable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that function modes see as one call, as they see torch's own functions."""

    def called(*tensors: Tensor) -> Any:
        if has_torch_function(tensors):
            return handle_torch_function(called, tensors, *tensors)
        return function(*tensors)

    called.__name__ = called.__qualname__ = function.__name__
    called.__module__, called.__doc__ = function.__module__, function.__doc__
    return called


@_recordable
def local_part(tensor: Any) -> Tensor:
    """Returns the local tensor of this rank; the gradient of the DTensor is divided as the DTensor is."""
    return tensor.to_local()


@_recordable
def local_copy(tensor: Any) -> Tensor:
    """Returns the local tensor of a replicated DTensor whose users on each rank compute one summand of its gradient."""
    from torch.distributed.tensor import Partial

    return tensor.to_local(grad_placements=[Partial()])


@_recordable
def replicated(value: Tensor, like: Any) -> Tensor:
    """Returns a DTensor on the mesh of `like`, of a tensor that is equal on all ranks."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(value, like.device_mesh, [Replicate()], run_check=False)


@_recordable
def shared_by_rows(weight: Any, x: Any) -> Tensor:
    """Returns the local tensor of a replicated DTensor that each rank applies to its rows of x.

    Its gradient is a sum over the ranks that divide x.
    """
    from torch.distributed.tensor import Partial, Replicate

    return weight.to_local(
        grad_placements=[Partial() if placement.is_shard() else Replicate() for placement in x.placements]
    )


@_recordable
def divided_like(value: Tensor, like: Any) -> Tensor:
    """Returns a contiguous DTensor of the shape and the placements of `like`, of which each rank has its part."""
    from torch.distributed.tensor import DTensor

    shape = like.shape
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        value.contiguous(), like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


CALLS: frozenset[Any] = frozenset(
    (local_part, local_copy, replicated, shared_by_rows, divided_like)
)  # none writes into an argument
# In the order of every process, because they are part of the keys of caches.
CALLED_NAMES = tuple(sorted(f"{function.__module__}.{function.__name__}" for function in CALLS))
