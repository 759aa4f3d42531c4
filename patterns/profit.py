"""Profit rules that several patterns share, and byte counts. Each rule cites its measurement."""

from collections.abc import Iterator

import torch
from torch.fx import Node

from liger_compile.ops.dispatch import has_kernel
from liger_compile.pattern import Annotate, Match
from liger_compile.torch_internals.dtensor import local_of

FEW_LOGITS = 128 * 2**20  # bytes


def bytes_of(value: torch.Tensor, parts: int = 1) -> int | None:
    """Return the bytes of one of `parts` equal parts of a value, for a DTensor of a rank's; None if one is symbolic."""
    value = local_of(value)
    bytes_ = value.numel() * value.dtype.itemsize // parts
    return bytes_ if isinstance(bytes_, int) else None


# Matmuls save each operand only for the gradient of the other operand.
_PRODUCTS = frozenset(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum"))
# Ops that pass their argument on in another form: the users of the result decide.
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
        *("to_local", "prim_to_local"),
    )
)


# Collectives write into other memory, and keep nothing.
_COLLECTIVES = frozenset(("redistribute", "prim_redistribute"))


def kept_bytes(node: Node) -> int | None:
    """Return the bytes of a value that eager training saves for backward, or 0 if no user needs the value there.

    A frozen linear layer needs its weight for backward, and not its input.
    """
    if any(_keeps(user, value) for user, value in _readers(node)):
        return bytes_of(node.meta["example_value"])
    return 0


def is_returned(node: Node) -> bool:
    """Return whether a value, or another form of it, is a result of the graph, which the caller may keep."""
    return any(user.op == "output" for user, _ in _readers(node))


def _readers(node: Node) -> Iterator[tuple[Node, Node]]:
    """Yield each node that reads a value, and the form of the value that it reads."""
    stack, seen = [node], {node}
    while stack:
        value = stack.pop()
        for user in value.users:
            if _name(user) in _FORMS:
                stack.extend({user} - seen)
                seen.add(user)
            else:
                yield user, value


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _keeps(user: Node, value: Node) -> bool:
    if _name(user) in _COLLECTIVES:
        return False
    needing = [arg for arg in (user, *user.all_input_nodes) if _requires_grad(arg)]
    if _name(user).strip("_") not in _PRODUCTS:
        return user in needing
    factors = (arg for arg in needing if arg not in (user, value))
    return any(arg.meta["example_value"].dim() > 1 for arg in factors)


def _requires_grad(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def recomputed_input(match: Match, reason: str) -> str | Annotate:
    """Mark the cheap input of a linear layer for recompute: it need not be saved, unless it has other users."""
    for node in match.escaping():
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            return f"{node.name} is used elsewhere too and has to be kept, so there is nothing to save"
    return Annotate(reason, keeps_outputs=True)


def needs_kernel(match: Match) -> str | None:
    """Reject an opaque op without a kernel, except on a CPU: its eager reference pays off only there.

    H200, torch 2.11.0, 2026-11-22, one training step, bf16, loss only: Llama of 4 layers, hidden 2048, vocabulary
    128256, 4 x 2048 tokens: 582 ms with the references of linear_cross_entropy and of an op for the gated MLP, 49 ms
    with Inductor's code (peak memory 3.7 GiB and 4.8 GiB); Qwen3 of 4 layers, hidden 1024, 8 x 1024 tokens: 538 ms
    and 26 ms.
    """
    device = match.result.device.type
    captured = [match[name] for name in match.captures]
    floating = [value for value in captured if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if device == "cpu" or has_kernel(*floating):
        return None
    dtypes = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in floating}))
    return f"the op has no kernel for {dtypes} on this {device}, and its reference would be slower than Inductor's code"


def few_logits(device: torch.device, bytes_: int | None) -> str | None:
    """Reject a loss on a GPU whose kernels take less time than a CPU needs to launch them; None bytes are unknown.

    H200, torch 2.11.0, bf16, 2026-11-30, forward and backward of linear + cross-entropy, ours / Inductor, tokens x
    hidden x vocabulary: 256 x 1024 x 32000 (15.6 MiB of logits) 0.94 / 0.14 ms, of which the GPU computes 0.12 ms in
    both; 1024 x 4096 x 32000 (62.5 MiB) 1.23 / 1.11 ms; 2048 x 2048 x 32000 (125 MiB) 1.13 / 1.20 ms; 512 x 2048 x
    128256 (125 MiB) 1.23 / 1.30 ms. But in steps of Llama with 4 layers, which the CPU launches, the last two took 1.16
    and 1.35 of the time of stock torch.compile (bench/results/families_nvidia_h200.csv).
    """
    if device.type == "cpu" or bytes_ is None or bytes_ > FEW_LOGITS:
        return None
    return f"the logits have only {bytes_ / 2**20:.1f} MiB: Inductor launches fewer kernels for them"
