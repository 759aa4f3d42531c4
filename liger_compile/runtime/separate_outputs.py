"""Keeps outputs in separate memory if they are separate tensors in eager mode.

AOTAutograd merges equal calls. It keeps equal calls apart if their results are outputs, but only for operators that
return one tensor: the results of two equal calls of an operator with several results (`F.layer_norm`, and the fused ops
of this package) become one tensor, which the caller gets twice. A write into one output then changes the other.

In: a compiled callable, and the storages of the graph's outputs. Out: a callable whose outputs share memory only where
those of the graph do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from liger_compile.torch_internals.tensors import storage_of

_log = logging.getLogger("liger_compile")


def storages_of_outputs(graph: Graph) -> list[int | None]:
    """Returns the storage of each output's example value, with None for an output that is not one tensor."""
    (outputs,) = graph.output_node().args
    values = [node.meta.get("example_value") if isinstance(node, Node) else None for node in outputs]  # pyright: ignore[reportOptionalIterable, reportGeneralTypeIssues]
    return [storage_of(value) if isinstance(value, Tensor) else None for value in values]


def separating(compiled: Callable[..., Any], storages: Sequence[int | None]) -> Callable[..., Any]:
    """Returns `compiled` with copies of outputs that share memory with an output of another storage."""
    if len({*storages} - {None}) < 2:
        return compiled
    copied: list[list[int]] | None = None  # the same ones in every call of a compiled graph

    def call(*inputs: Any) -> Any:
        nonlocal copied
        outputs = compiled(*inputs)
        if copied is None and all(not isinstance(output, Tensor) or output.numel() for output in outputs):
            copied = _to_copy(outputs, storages)
            for group in copied:
                _log.info(
                    "outputs %s are copied: the compiled graph gave them the memory of another output", group
                )
        if not copied:
            return outputs
        separate = list(outputs)
        for positions in copied:
            copies = _copies([outputs[at] for at in positions])
            for at, copy in zip(positions, copies, strict=True):
                separate[at] = copy
        return tuple(separate)

    return call


def _to_copy(outputs: Sequence[Any], storages: Sequence[int | None]) -> list[list[int]]:
    """Returns the positions of outputs that must leave the memory that they are in, in groups that stay together."""
    groups: dict[int, dict[int, list[int]]] = {}  # real storage -> storage in the graph -> positions
    for at, (output, storage) in enumerate(zip(outputs, storages, strict=True)):
        memory = storage_of(output) if isinstance(output, Tensor) and storage is not None else None
        if memory is not None and storage is not None:
            groups.setdefault(memory, {}).setdefault(storage, []).append(at)
    return [group for sharing in groups.values() for group in sorted(sharing.values(), key=len)[:-1]]


def _copies(group: Sequence[Tensor]) -> list[Tensor]:
    """Returns copies that share memory with each other, if one of them covers all of it; otherwise separate copies."""
    base = max(group, key=Tensor.numel)
    covers_all = base.numel() * base.itemsize == base.untyped_storage().nbytes()
    if len(group) == 1 or not covers_all or any(member.dtype != base.dtype for member in group):
        return [member.clone() for member in group]
    whole = base.as_strided((base.numel(),), (1,), 0).clone()
    return [whole.as_strided(one.shape, one.stride(), one.storage_offset()) for one in group]
