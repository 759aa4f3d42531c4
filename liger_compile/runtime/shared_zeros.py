"""Materializes the zero gradients of unused outputs in one shared buffer.

AOTAutograd traces backward with a gradient for every differentiable output. If an output has no gradient, autograd
materializes zeros: for all outputs at once, before backward begins, when the memory of a step is at its peak. A model
that returns its key/value cache returns two such outputs per layer.

In: a compiled callable, and the traced strides of its outputs. Out: a callable that returns the same tensor objects, so
that aliases, versions, hooks and errors stay those of the compiled callable. The change is inside its backward, where
no hook sees it: autograd passes None if there is no gradient, and the backward materializes the zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, MutableSequence, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from liger_compile.torch_internals.aot_autograd import before_compiled_autograd, is_backward
from liger_compile.torch_internals.autograd import expected_gradients, function_of
from liger_compile.torch_internals.tensors import storage_of

FEWEST = 3  # outputs of one backward: with two, one used and one unused, there is nothing to share

Strides = tuple[int, ...]
# Attributes set on AOTAutograd's objects: on a function, that it makes zeros; on a context, strides by output number.
_MAKES_ZEROS, STRIDES = "_liger_compile_makes_zeros", "_liger_compile_strides"


def strides_of_outputs(graph: Graph) -> list[Strides | None]:
    """Returns the traced strides of the outputs, with None for absent or symbolic strides.

    AOTAutograd expects the gradients in these strides, not in the final strides of the outputs, and copies others.
    """
    (outputs,) = graph.output_node().args
    return [_strides(output) for output in outputs] if isinstance(outputs, (tuple, list)) else []


def _strides(output: Any) -> Strides | None:
    value = output.meta.get("example_value") if isinstance(output, Node) else None
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return value.stride() if all(isinstance(stride, int) for stride in value.stride()) else None


def sharing_zeros(
    compiled: Callable[..., Any],
    strides: Sequence[Strides | None],
    shared: Callable[[int], None] = lambda _: None,
) -> Callable[..., Any]:
    """Returns `compiled` with zeros for its unused outputs materialized in its backward, in these strides.

    Args:
        shared: called after each forward whose backward is changed, with the number of outputs that have a gradient.
    """
    if len(strides) < FEWEST:
        return compiled

    def call(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        for backward, strides_by_number in _backwards(inputs, outputs, strides).items():
            if _share_zeros(backward, strides_by_number):
                shared(len(strides_by_number))
        return outputs

    return call


def _backwards(
    inputs: Sequence[Any], outputs: Sequence[Any], strides: Sequence[Strides | None]
) -> dict[Any, dict[int, Strides | None]]:
    """Returns the backward nodes of this graph that have enough outputs, with the strides of these outputs.

    Returns nothing if gradients may be other than plain tensors.
    """
    found: dict[Any, dict[int, Strides | None]] = {}
    if not all(_is_plain(output) for output in outputs if isinstance(output, Tensor)):
        return found
    given = set(map(id, inputs))  # returned inputs have the backward of another graph
    for output, traced in zip(outputs, strides, strict=False):
        if isinstance(output, Tensor) and is_backward(output.grad_fn) and id(output) not in given:
            found.setdefault(output.grad_fn, {})[output.output_nr] = traced
    return {backward: positions for backward, positions in found.items() if len(positions) >= FEWEST}


def _is_plain(tensor: Tensor) -> bool:
    is_of_torch = type(tensor) in (Tensor, torch.nn.Parameter)
    return is_of_torch and tensor.layout is torch.strided and not tensor.is_nested


def _share_zeros(backward: Any, strides: Mapping[int, Strides | None]) -> bool:
    """Makes a backward materialize its zeros, and returns whether it did.

    The class of a backward belongs to one compiled graph, and is patched once.
    """
    if hasattr(backward, STRIDES) or expected_gradients(backward) is None:
        return False
    function = function_of(backward)
    if not hasattr(function, _MAKES_ZEROS):
        # It calls the graph instead of `backward`, with autograd's zeros.
        before_compiled_autograd(function, lambda ctx: ctx.set_materialize_grads(True))
        function.backward = staticmethod(_making_zeros(function.backward))
        setattr(function, _MAKES_ZEROS, True)  # last: patching twice is harmless, a mark set too early is not
    setattr(backward, STRIDES, strides)
    backward.set_materialize_grads(False)
    return True


def _making_zeros(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the `backward` of AOTAutograd's autograd.Function for contexts that get None for missing gradients."""

    @torch.compiler.disable  # in a function that calls backward, Dynamo traces every frame
    @functools.wraps(method)
    def backward(ctx: Any, *given: Any) -> Any:
        strides = getattr(ctx, STRIDES, None)
        if strides is None:
            return method(ctx, *given)
        # From torch 2.13 gradients come in a list, which backward empties as it runs.
        in_a_list = len(given) == 1 and isinstance(given[0], list)
        gradients = given[0] if in_a_list else list(given)
        buffers = _fill(gradients, expected_gradients(ctx) or (), strides)
        results = method(ctx, gradients) if in_a_list else method(ctx, *gradients)
        return _with_memory_of_their_own(results, buffers) if buffers else results

    return backward


def _fill(
    gradients: MutableSequence[Tensor | None],
    outputs: Sequence[Any],
    strides: Mapping[int, Strides | None],
) -> list[Tensor]:
    """Replaces missing gradients by zeros, which share the returned buffers: one for each dtype and device."""
    missing = {number: outputs[number] for number, gradient in enumerate(gradients) if gradient is None}
    may_share = not torch.is_grad_enabled() and all(
        gradient is None or _storage(gradient) is not None for gradient in gradients
    )
    zeros, buffers = (_sharing if may_share else _apart)(missing, strides)
    for number, zero in zeros.items():
        gradients[number] = zero
    return buffers


def _apart(missing: Mapping[int, Any], _: object) -> tuple[dict[int, Tensor], list[Tensor]]:
    """Makes separate zeros, as autograd does: for gradients recorded in a graph, or a batch of gradients."""
    return {
        number: torch.zeros(of.shape, dtype=of.dtype, device=of.device) for number, of in missing.items()
    }, []


def _sharing(
    missing: Mapping[int, Any], strides: Mapping[int, Strides | None]
) -> tuple[dict[int, Tensor], list[Tensor]]:
    """Returns zeros that share buffers, and the buffers. AOTAutograd's backward never writes into its gradients."""
    steps = {number: _strides_of_gradient(of.shape, strides.get(number)) for number, of in missing.items()}
    spans: dict[tuple[torch.dtype, torch.device], int] = {}
    for number, of in missing.items():
        kind = of.dtype, of.device
        spans[kind] = max(spans.get(kind, 0), _span(of.shape, steps[number]))
    buffers = {kind: torch.zeros(span, dtype=kind[0], device=kind[1]) for kind, span in spans.items()}
    zeros = {
        number: buffers[of.dtype, of.device].as_strided(of.shape, steps[number])
        for number, of in missing.items()
    }
    return zeros, list(buffers.values())


def _strides_of_gradient(shape: Sequence[int], traced: Strides | None) -> Strides:
    """Returns the traced strides; if unknown, contiguous strides, as autograd uses."""
    if traced is not None and len(traced) == len(shape):
        return traced
    return torch.empty(tuple(shape), device="meta").stride()


def _span(shape: Sequence[int], strides: Strides) -> int:
    """Returns the number of elements from the first to the last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _with_memory_of_their_own(results: Iterable[Any], buffers: Sequence[Tensor]) -> tuple[Any, ...]:
    """Copies the results of backward that alias the zeros.

    Otherwise a parameter would use the shared zeros as its gradient, and accumulate into them.
    """
    mine = {_storage(buffer) for buffer in buffers}
    return tuple(_copied(result) if _storage(result) in mine else result for result in results)


def _copied(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
        tensor
    )


def _storage(value: Any) -> int | None:
    """Returns the storage of a plain tensor; None for any other value, and for part of a batch of gradients (vmap)."""
    return storage_of(value) if type(value) is Tensor else None
