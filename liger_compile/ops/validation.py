"""Argument checks for liger_compile.functional. Each message states the expectation, the given value and the remedy.

Sizes and numbers may be symbolic. Only statically known comparisons are made, because any other comparison would add a
guard.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from liger_compile.torch_internals import dtensor

from .rotary import LAYOUTS


def check_norm(name: str, x: Tensor, weight: Tensor | None, offset: float, casting: str) -> None:
    check_floating(name, "x", x)
    check_vector(name, "weight", weight, x.shape[-1])
    if casting not in ("llama", "gemma"):
        raise ValueError(f"{name}: expected casting 'llama' or 'gemma', got {casting!r}; pass one of the two")
    if statically_known_true(offset != 0) and (casting != "gemma" or weight is None):
        given = "no weight" if weight is None else f"casting {casting!r}"
        raise ValueError(
            f"{name}: expected offset 0 with {given}, got {offset}; "
            "an offset goes with a weight and casting 'gemma'"
        )


def check_whole_rows(name: str, x: Tensor, weight: Tensor | None) -> None:
    """Reject DTensors, except whole rows of x on each rank, with a replicated weight."""
    operands = () if weight is None else (weight,)
    if not dtensor.have_whole_rows(x, operands, ()):
        placed = ", ".join(
            f"{label} {_placed(t)}" for label, t in (("x", x), ("weight", weight)) if t is not None
        )
        raise ValueError(
            f"{name}: expected x that one mesh divides along other dimensions than the last, and a replicated weight, "
            f"got {placed}; redistribute them"
        )


def check_rotary(
    name: str,
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    layout: str,
    half_tables: bool,
) -> None:
    check_floating(name, "q", q)
    if layout not in LAYOUTS:
        raise ValueError(
            f"{name}: expected layout to be one of {', '.join(LAYOUTS)}, got {layout!r}; pass one of them"
        )
    if cos is None or sin is None or not cos.is_floating_point() or not sin.is_floating_point():
        raise TypeError(
            f"{name}: expected real tables cos and sin, got {_kind(cos)} and {_kind(sin)}; "
            "pass both, or complex ones to rotary_complex"
        )
    if differ(cos.shape, sin.shape):
        raise ValueError(
            f"{name}: expected cos and sin of one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}; "
            "pass the tables of the same positions"
        )
    width = 2 * cos.shape[-1] if half_tables else cos.shape[-1]
    for label, x in (("q", q), ("k", k)):
        if x is None:
            continue
        if statically_known_true(width > x.shape[-1]) or statically_known_true(width % 2 != 0):
            raise ValueError(
                f"{name}: expected tables for an even number of channels, {x.shape[-1]} at most, got tables "
                f"for {width}; slice them, or set half_tables if they hold one number for each pair"
            )
        if _enlarges(cos.shape[:-1], x.shape[:-1]):
            raise ValueError(
                f"{name}: expected tables that broadcast against {label} of shape {tuple(x.shape)}, got "
                f"{tuple(cos.shape)}; unsqueeze them at the heads"
            )


def check_norm_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_rotary("norm_rotary", q, k, cos, sin, "half", half_tables=False)
    for label, x in (("q", q), ("k", k)):
        if differ(cos.shape[-1:], x.shape[-1:]):
            raise ValueError(
                f"norm_rotary: expected tables for all {x.shape[-1]} channels of {label}, got tables for "
                f"{cos.shape[-1]}; call rms_norm and rotary, which rotates some"
            )


def check_rotary_complex(q: Tensor, k: Tensor | None, freqs: Tensor | None) -> None:
    if freqs is None or not freqs.is_complex():
        raise TypeError(
            f"rotary_complex: expected complex freqs, got {_kind(freqs)}; "
            "pass real tables to rotary as cos and sin"
        )
    if k is not None and k.dtype != q.dtype:
        raise TypeError(
            f"rotary_complex: expected q and k of one dtype, got {q.dtype} and {k.dtype}; rotate them one by one"
        )


def check_one_dtype(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"{name}: expected x, weight and bias of one dtype, got {_dtypes(x, weight, bias)}; cast them to one"
        )


def check_linear(name: str, label: str, weight: Tensor, width: int) -> None:
    if weight.dim() != 2 or differ(weight.shape[1:], (width,)):
        raise ValueError(
            f"{name}: expected a {label} of shape (outputs, {width}), got {tuple(weight.shape)}; "
            "pass it as F.linear takes it"
        )


def check_target(name: str, label: str, rows: Tensor, target: Tensor) -> None:
    check_floating(name, label, rows)
    if target.dtype != torch.int64:
        raise TypeError(
            f"{name}: expected class indices in int64 as target, got {target.dtype}; cast them with .long()"
        )
    is_flat = 1 in (target.dim(), rows.dim() - 1)  # then only the number of targets matters
    # Not by Size.numel(), which converts a symbolic number to a plain one and adds a guard.
    is_flat = is_flat and not differ((math.prod(target.shape),), (math.prod(rows.shape[:-1]),))
    if not is_flat and differ(target.shape, rows.shape[:-1]):
        raise ValueError(
            f"{name}: expected one target for each row of {label}, shape {tuple(rows.shape[:-1])}, got "
            f"{tuple(target.shape)}; drop or pad the surplus"
        )


def check_loss(name: str, reduction: str, label_smoothing: float, softcap: float | None) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"{name}: expected reduction 'mean', 'sum' or 'none', got {reduction!r}; pass one of the three"
        )
    if statically_known_true(label_smoothing < 0) or statically_known_true(label_smoothing > 1):
        raise ValueError(f"{name}: expected label_smoothing from 0 to 1, got {label_smoothing}; pass a share")
    if softcap is not None and statically_known_true(softcap <= 0):
        raise ValueError(f"{name}: expected softcap above 0, got {softcap}; pass None for no cap")


def check_class_weight(name: str, class_weight: Tensor | None, classes: int) -> None:
    check_vector(name, "class weight", class_weight, classes)
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError(
            f"{name}: expected class weights that need no gradient, got some that require it; detach them"
        )


def check_divergence(name: str, kind: str, beta: float) -> None:
    kinds = ("forward", "reverse", "jensen_shannon", "cross")
    if kind not in kinds:
        raise ValueError(
            f"{name}: expected kind to be one of {', '.join(kinds)}, got {kind!r}; pass one of them"
        )
    if not 0 < beta < 1:
        raise ValueError(
            f"{name}: expected beta above 0 and below 1, got {beta}; for its limits pass kind 'forward' or 'reverse'"
        )


def check_teacher(
    name: str,
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
) -> None:
    check_floating(name, "x", x)
    check_floating(name, "teacher_x", teacher_x)
    if differ(x.shape[:-1], teacher_x.shape[:-1]):
        raise ValueError(
            f"{name}: expected teacher_x with the leading dimensions of x, {tuple(x.shape[:-1])}, got "
            f"{tuple(teacher_x.shape[:-1])}; pass the same tokens to both"
        )
    if differ(weight.shape[:1], teacher_weight.shape[:1]):
        raise ValueError(
            f"{name}: expected heads of one vocabulary, got {weight.shape[0]} and {teacher_weight.shape[0]} classes; "
            "slice the padding off the larger one"
        )
    given = (teacher_x, teacher_weight, teacher_bias)
    if any(tensor is not None and tensor.requires_grad for tensor in given) and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a teacher that needs no gradient, got one that requires it; detach its inputs and weight"
        )


def check_memory(name: str, memory: int | None) -> None:
    if memory is not None and (type(memory) is not int or memory < 1):
        raise ValueError(
            f"{name}: expected memory as a whole number of bytes above 0, got {memory!r}; pass None for a default"
        )


def check_floating(name: str, label: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected {label} in a floating dtype, got {x.dtype}; cast it")


def check_vector(name: str, label: str, vector: Tensor | None, length: int) -> None:
    if vector is not None and (vector.dim() != 1 or differ(vector.shape, (length,))):
        raise ValueError(
            f"{name}: expected a {label} of shape ({length},), got {tuple(vector.shape)}; "
            f"pass one number for each of the {length}"
        )


def differ(left: Any, right: Any) -> bool:
    """Return whether two shapes are known to differ."""
    if len(left) != len(right):
        return True
    return any(statically_known_true(a != b) for a, b in zip(left, right, strict=True))


def _enlarges(shape: Any, other: Any) -> bool:
    """Return whether broadcasting against `shape` is known to change the shape `other`, or to be impossible."""
    if len(shape) > len(other):
        return True
    pairs = zip(reversed(shape), reversed(other), strict=False)
    return any(statically_known_true(a != 1) and statically_known_true(a != b) for a, b in pairs)


def _kind(x: Tensor | None) -> str:
    return "None" if x is None else str(x.dtype)


def _dtypes(*tensors: Tensor | None) -> str:
    return " and ".join(str(t.dtype) for t in tensors if t is not None)


def check_sharded_loss(
    name: str,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    has_others: bool,
) -> None:
    """Reject DTensors, except a head that is divided by classes, with its input and labels on all ranks.

    Args:
        has_others: label smoothing or z-loss are given.
    """
    if not _is_divided_by_classes(weight):
        raise ValueError(
            f"{name}: expected a weight that a one-dimensional mesh divides by classes, Shard(0), got "
            f"{_placed(weight)}; parallelize the head by ColwiseParallel"
        )
    if bias is not None and not _is_divided_by_classes(bias):
        raise ValueError(
            f"{name}: expected a bias with the placement of weight, Shard(0), got {_placed(bias)}; divide both"
        )
    if not (dtensor.is_dtensor(x) and dtensor.is_replicated(x)):
        raise ValueError(
            f"{name}: expected x as a DTensor that each rank has, got {_placed(x)}; redistribute it to Replicate()"
        )
    for label, value in (("a target", target), ("class weights", class_weight)):
        if dtensor.is_dtensor(value) and not dtensor.is_replicated(value):
            raise ValueError(
                f"{name}: expected {label} that each rank has, got {_placed(value)}; redistribute to Replicate()"
            )
    if reduction == "none":
        raise ValueError(
            f'{name}: expected reduction "mean" or "sum" for a divided vocabulary, got "none"; reduce the losses'
        )
    if has_others:
        raise ValueError(
            f"{name}: expected no label smoothing or z-loss for a divided vocabulary; gather the logits"
        )


def _is_divided_by_classes(tensor: Tensor) -> bool:
    return dtensor.is_dtensor(tensor) and dtensor.sharded_dim(tensor) == 0


def _placed(tensor: Any) -> str:
    return str(tensor.placements) if dtensor.is_dtensor(tensor) else "a plain tensor"
