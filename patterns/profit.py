"""Profit rules that several patterns share, and bytes. Each rule names the measurement that it rests on."""

import torch
from torch.fx import Node

from liger_compile.ops.dispatch import has_kernel
from liger_compile.pattern import Annotate, Match


def bytes_of(value: torch.Tensor, parts: int = 1) -> int | None:
    """The bytes of one of so many equal parts of a value; None where a size is symbolic."""
    bytes_ = value.numel() * value.dtype.itemsize // parts
    return bytes_ if isinstance(bytes_, int) else None


# Of products with a matrix, each factor is kept for the gradient of the other alone.
_PRODUCTS = frozenset(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum"))
# What gives its argument on in another form: what reads the result decides.
_FORMS = frozenset(
    (
        *(
            "view",
            "reshape",
            "view_as",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "expand",
            "contiguous",
        ),
        *("transpose", "permute", "t", "getitem", "chunk", "split"),
        *("to", "float", "bfloat16", "half", "type", "type_as"),
    )
)


def kept_bytes(node: Node) -> int | None:
    """The bytes of a value that eager training keeps for backward: 0 if none of its readers needs it there.

    A frozen linear layer needs its weight for backward, and not its input.
    """
    stack, seen = [node], {node}
    while stack:
        value = stack.pop()
        for user in value.users:
            name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
            if name in _FORMS:
                stack.extend({user} - seen)
                seen.add(user)
            elif _keeps(user, name.strip("_"), value):
                return bytes_of(node.meta["example_value"])
    return 0


def _keeps(user: Node, name: str, value: Node) -> bool:
    needing = [arg for arg in (user, *user.all_input_nodes) if _requires_grad(arg)]
    if name not in _PRODUCTS:
        return user in needing
    factors = (arg for arg in needing if arg not in (user, value))
    return any(arg.meta["example_value"].dim() > 1 for arg in factors)


def _requires_grad(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def recomputed_input(match: Match, reason: str) -> str | Annotate:
    """Of a linear layer whose input is cheap to compute: the input need not be kept, unless somebody else needs it."""
    for node in match.escaping():
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            return f"{node.name} is used elsewhere too and has to be kept, so there is nothing to save"
    return Annotate(reason, keeps_outputs=True)


def needs_kernel(match: Match) -> str | None:
    """An opaque op runs its reference, in eager PyTorch, wherever it has no kernel; that pays on a CPU only.

    H200, torch 2.11.0, 2026-11-22, one training step, bf16, loss only: Llama of 4 layers, hidden 2048, vocabulary
    128256, 4 x 2048 tokens: 582 ms with the references of linear_cross_entropy and gated_mlp, 49 ms with Inductor's
    code (peak memory 3.7 GiB and 4.8 GiB); Qwen3 of 4 layers, hidden 1024, 8 x 1024 tokens: 538 ms and 26 ms.
    """
    device = match.result.device.type
    captured = [match[name] for name in match.captures]
    floating = [value for value in captured if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if device == "cpu" or has_kernel(*floating):
        return None
    dtypes = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in floating}))
    return f"the op has no kernel for {dtypes} on this {device}, and its reference would be slower than Inductor's code"
