"""The gate of a gated MLP, alone or with the down projection that follows it.

    h = act(gate) * up              gated_activation: h
    y = h @ weight^T + bias         gated_mlp: y; h is not saved

    gate, up (..., I), or gate (..., 2I) packed with the gate in its first half and up None
    weight (O, I), bias (O) or None -> h (..., I), y (..., O)

`activation` is "silu" (SwiGLU), "gelu" (exact) or "gelu_tanh" (GeGLU).

Dtypes: h is rounded as PyTorch rounds the expression: act, computed in float32 (float64 for float64), to the dtype of
gate, and the product to the dtype that gate and up promote to. weight and bias must have that dtype. Saved for
backward: gate, up, weight. Backward recomputes h, which costs less than saving it; an eager MLP saves gate, up and h.

    dh = dy @ weight,  dgate = dh * up * act'(gate),  dup = dh * act(gate),  dweight = dy^T @ h,  dbias = sum(dy)

dh is rounded to its dtype, as the matmul returns it. A packed gate gets one packed gradient.

Source: Shazeer, GLU Variants Improve Transformer, 2020 (arXiv 2002.05202).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import row_blocks
from .dispatch import has_kernel
from .precision import accumulation_dtype
from .registration import opaque_op, traceable_op


def split_packed(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (gate, up), as views of the packed gate if up is None."""
    if up is not None:
        return gate, up
    half = gate.shape[-1] // 2
    return gate[..., :half], gate[..., half:]


def act(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return h, by the reference."""
    return act(gate, activation) * up


def gate_gradient(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    wide = accumulation_dtype(dh.dtype)
    grad, gate_wide = dh.to(wide) * up.to(wide), gate.to(wide)
    if activation == "silu":
        return torch.ops.aten.silu_backward.default(grad, gate_wide).to(gate.dtype)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward.default(grad, gate_wide, approximate=approximate).to(gate.dtype)


def up_gradient(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (dh * act(gate, activation)).to(up.dtype)


def is_gated_by_kernel(gate: Tensor, *others: Tensor | None) -> bool:
    """Return whether the kernels accept the inputs. The kernels are compiled for a fixed width."""
    width = gate.shape[-1]
    return has_kernel(gate, *others) and isinstance(width, int) and width > 0


@traceable_op
def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    if is_gated_by_kernel(gate, up):
        from ..kernels import gated_mlp as kernels

        return kernels.forward(*split_packed(gate, up), activation)
    return activate(*split_packed(gate, up), activation)


@traceable_op
def gated_activation_backward(
    dh: Tensor, gate: Tensor, up: Tensor | None, activation: str, needs_dgate: bool, needs_dup: bool
) -> tuple[Tensor, Tensor]:
    """Return (dgate, dup), each empty where not needed; dup is also empty if dgate is packed."""
    gate_half, up_half = split_packed(gate, up)
    if is_gated_by_kernel(gate, up, dh):
        from ..kernels import gated_mlp as kernels

        needs_dup = needs_dup and up is not None
        dgate = gate.new_empty(gate.shape if needs_dgate else 0)
        dup = up_half.new_empty(up_half.shape if needs_dup else 0)
        wanted = dgate if needs_dgate else None, dup if needs_dup else None
        kernels.backward(dh, gate_half, up_half, *wanted, h=None, activation=activation)
        return dgate, dup
    dgate = gate_gradient(dh, gate_half, up_half, activation) if needs_dgate else gate.new_empty(0)
    dup = gate.new_empty(0)
    if needs_dup or (up is None and needs_dgate):
        dup = up_gradient(dh, gate_half, up_half, activation)
    if up is None and needs_dgate:
        return torch.cat((dgate, dup), -1), gate.new_empty(0)
    return dgate, dup


def _activation_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate, up)
    ctx.activation = activation


def _activation_backward(ctx: Any, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    if dh is None:
        return None, None, None
    gate, up = ctx.saved_tensors
    needs_dgate, needs_dup, _ = ctx.needs_input_grad
    dgate, dup = torch.ops.liger_compile.gated_activation_backward.default(
        dh, gate, up, ctx.activation, needs_dgate, needs_dup
    )
    return dgate if needs_dgate else None, dup if needs_dup else None, None


gated_activation.register_autograd(_activation_backward, setup_context=_activation_setup_context)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


@opaque_op
def gated_mlp(
    gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    gate_half, up_half = (_rows(x) for x in split_packed(gate, up))
    if is_gated_by_kernel(gate, up):
        from ..kernels import gated_mlp as kernels

        h = kernels.forward(gate_half, up_half, activation)
    else:
        h = torch.empty_like(gate_half, dtype=weight.dtype, memory_format=torch.contiguous_format)
        for block in row_blocks(*h.shape):
            h[block] = activate(gate_half[block], up_half[block], activation)
    return F.linear(h, weight, bias).view(*gate.shape[:-1], weight.shape[0])


@gated_mlp.register_fake
def _(gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return weight.new_empty((*gate.shape[:-1], weight.shape[0]))


@opaque_op
def gated_mlp_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    activation: str,
    needs_dgate: bool,
    needs_dup: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dgate, dup, dweight, dbias), each empty where not needed; dup is also empty if dgate is packed."""
    needs = needs_dgate, needs_dup, needs_dweight, needs_dbias
    dgate, dup, dweight, dbias = _empty_gradients(gate, up, weight, *needs)
    dy = _rows(dy)
    gate_half, up_half = (_rows(x) for x in split_packed(gate, up))
    # One N x I buffer: it first contains dh; h then overwrites the parts of dh that have been used.
    h = dy @ weight if needs_dgate or needs_dup else dy.new_empty(gate_half.shape)
    if is_gated_by_kernel(gate, up, dy):
        from ..kernels import gated_mlp as kernels

        kernels.backward(
            h,
            gate_half,
            up_half,
            dgate if needs_dgate else None,
            dup if needs_dup and up is not None else None,
            h if needs_dweight else None,
            activation,
        )
    else:
        dgate_half, dup_half = _rows(dgate), _rows(dup)
        if up is None:
            dgate_half, dup_half = split_packed(dgate_half, None)
        for block in row_blocks(*h.shape):
            gate_block, up_block = gate_half[block], up_half[block]
            if needs_dgate:
                dgate_half[block] = gate_gradient(h[block], gate_block, up_block, activation)
            if needs_dup or (up is None and needs_dgate):
                dup_half[block] = up_gradient(h[block], gate_block, up_block, activation)
            if needs_dweight:
                h[block] = activate(gate_block, up_block, activation)
    if needs_dweight:
        torch.mm(dy.t(), h, out=dweight)
    if needs_dbias:
        torch.sum(dy, 0, out=dbias)
    return dgate, dup, dweight, dbias


def _empty_gradients(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    needs_dgate: bool,
    needs_dup: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = (0,)
    return (
        gate.new_empty(gate.shape if needs_dgate else nothing),
        gate.new_empty(nothing) if up is None or not needs_dup else up.new_empty(up.shape),
        weight.new_empty(weight.shape if needs_dweight else nothing),
        weight.new_empty(weight.shape[:1] if needs_dbias else nothing),
    )


@gated_mlp_backward.register_fake
def _(
    dy: Tensor, gate: Tensor, up: Tensor | None, weight: Tensor, activation: str, *needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(gate, up, weight, *needs)


def _mlp_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, weight, _, activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate, up, weight)
    ctx.activation = activation


def _mlp_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    gate, up, weight = ctx.saved_tensors
    needs_dgate, needs_dup, needs_dweight, needs_dbias, _ = ctx.needs_input_grad
    dgate, dup, dweight, dbias = torch.ops.liger_compile.gated_mlp_backward.default(
        dy, gate, up, weight, ctx.activation, needs_dgate, needs_dup, needs_dweight, needs_dbias
    )
    return (
        dgate if needs_dgate else None,
        dup if needs_dup else None,
        dweight if needs_dweight else None,
        dbias if needs_dbias else None,
        None,
    )


gated_mlp.register_autograd(_mlp_backward, setup_context=_mlp_setup_context)
