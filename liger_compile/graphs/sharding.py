"""Calls that pass on the value of a column-parallel result: it is divided along its last dimension, or gathered.

As one tensor of all ranks, a DTensor has the same value before and after `redistribute`, and the local tensor of a
replicated DTensor has that value too. So logits of a column-parallel head have one value, from the head to their local
tensor.
"""

from __future__ import annotations

from torch.fx import Node

from liger_compile.torch_internals.dtensor import Conversion, conversion_at, is_replicated, sharded_dim


def passes_on(node: Node) -> Node | None:
    """Returns the DTensor whose value a node passes on, if that is a column-parallel result; None otherwise."""
    conversion = conversion_at(node)
    if conversion is None:
        return None
    is_one = _divides_again(node, conversion) if conversion.kind == "redistribute" else _is_local(conversion)
    return conversion.source if is_one else None


def _divides_again(node: Node, conversion: Conversion) -> bool:
    """Returns whether a column-parallel result is gathered, or stays divided; with these values and gradients."""
    before, after = conversion.source.meta["example_value"], node.meta["example_value"]
    last = before.dim() - 1
    is_known = conversion.settings.keys() <= {"device_mesh", "placements", "async_op"}  # no dtypes
    return is_known and sharded_dim(before) == last and (is_replicated(after) or sharded_dim(after) == last)


def _is_local(conversion: Conversion) -> bool:
    """Returns whether the local tensor is that of a column-parallel result that was gathered."""
    gathered = conversion.source
    is_gathered = is_replicated(gathered.meta["example_value"]) and passes_on(gathered) is not None
    return is_gathered and not conversion.settings  # grad_placements would give it another gradient
