"""The operator table: the term of each of torch's operators, however it is called.

`call` is the entry point. It finds the canonical name of the operator, binds the arguments by the signature of the
table function (binding.py), and falls back to an opaque leaf for calls that the table does not cover. To add an
operator, add a function here; an identity between operators belongs in identities.py.

A table function returns None, or raises UnsupportedError, for arguments that it does not support. Any other exception
is a fault of the function: `liger.strict` raises it, otherwise the value is opaque and the report has a note.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from liger_compile.graphs.effects import is_in_place
from liger_compile.terms import binding, normalize
from liger_compile.terms.attention import attention
from liger_compile.terms.call import (
    Call,
    Dims,
    Draw,
    Operand,
    UnsupportedError,
    Value,
    const_of,
    negative,
    opaque,
    scalar_of,
    term_of,
)
from liger_compile.terms.index_operators import INDEX_TABLE
from liger_compile.terms.layout_operators import LAYOUT_TABLE, halves
from liger_compile.terms.term import ConstVar, Scalar, Space, Term, sizes_of
from liger_compile.torch_internals.operators import OpOverload, OpOverloadPacket, qualified_name, schema_of


def call(space: Space, target: Any, args: Any, kwargs: Any, out: Any, name: str) -> Value:
    """Returns the value of target(*args, **kwargs), whose result is `out`; opaque if the table does not cover it."""
    name_in_torch = _name(target)
    operator = _canonical(name_in_torch)
    make = TABLE.get(operator) or _elementwise(target, operator)
    if make is None or not isinstance(out, (torch.Tensor, tuple, list)) or kwargs.get("out") is not None:
        return opaque(space, out, name, is_made=True)
    if is_in_place(name_in_torch) and any(_is_wider(arg, out) for arg in args):
        return opaque(space, out, name, is_made=True)  # computed in the wider dtype, and rounded by the write
    try:
        bound = binding.bound(make, Call(space, out), args, kwargs)
        value = make(*bound.args, **bound.kwargs)
    except UnsupportedError:
        value = None
    except Exception as error:
        space.findings.failures[space.fail(f"the rule of operator {operator!r}", error)] += 1
        value = None
    return opaque(space, out, name, is_made=True) if value is None else value


_MODULES = (
    "torch",
    "torch._C._nn",
    "torch._C._special",
    "torch.functional",
    "torch._C._linalg",
    "torch.nn.functional",
    "torch._C",
    "_operator",
    "math",
    "torch._tensor",
)
_ALIASES = {
    "true_divide": "truediv", "divide": "truediv", "div": "truediv", "multiply": "mul", "subtract": "sub",
    "negative": "neg", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv", "mm": "matmul",
    "bmm": "matmul", "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose",
    "type": "to", "moveaxis": "movedim", "__getitem__": "getitem", "__pow__": "pow", "__rsub__": "rsub",
    "__rtruediv__": "rtruediv", "__rpow__": "rpow", "__matmul__": "matmul", "t": "t", "_softmax": "softmax",
    "__rdiv__": "rtruediv", "__rmul__": "mul", "__radd__": "add", "__truediv__": "truediv", "__mul__": "mul",
    "__add__": "add", "__sub__": "sub", "__neg__": "neg", "__rmatmul__": "rmatmul", "unsafe_chunk": "chunk",
    "special_expit": "sigmoid", "expit": "sigmoid", "tensor_split": "split",
    "cross_entropy_loss": "cross_entropy", "nll_loss_nd": "nll_loss",
    "less_equal": "le", "less": "lt", "greater_equal": "ge", "greater": "gt", "not_equal": "ne",
    "bitwise_and": "and", "bitwise_or": "or", "bitwise_not": "invert", "logical_and": "and",
    "logical_or": "or", "logical_not": "invert", "iand": "and", "ior": "or",
    **{f"__{op}__": op for op in ("le", "lt", "ge", "gt", "eq", "ne", "and", "or", "invert")},
    "__rand__": "and", "__ror__": "or", "__iand__": "and", "__ior__": "or",
}  # fmt: skip


def _name(target: Any) -> str:
    """Returns torch's name for an operator, however it is called; empty for functions that are not torch's own."""
    if isinstance(target, OpOverload):
        name = schema_of(target).name.removeprefix("aten::") if target.namespace == "aten" else ""
    elif isinstance(target, OpOverloadPacket):  # from torch 2.14 on, Dynamo calls x.mT by its packet
        namespace, _, name = qualified_name(target).partition("::")
        name = name if namespace == "aten" else ""
    elif isinstance(target, str):
        name = target
    elif target is getattr or (getattr(target, "__module__", None) or "torch") in _MODULES:
        name = getattr(target, "__name__", None)
    else:
        name = ""
    return name or ""


def is_in_place_operation(node: Node) -> bool:
    """Returns whether a node writes the result of an operation into its first argument: x.mul_(y), operator.imul."""
    return node.op in ("call_function", "call_method") and bool(node.args) and is_in_place(_name(node.target))


def operator_name(node: Node) -> str:
    """Returns the table's name of the operator that a node calls: "gt" for x > 1, x.gt_(1) and torch.greater(x, 1)."""
    return _canonical(_name(node.target)) if node.op in ("call_function", "call_method") else ""


def _canonical(name: str) -> str:
    """Returns the table's name: x.mul_(y) has the value of x * y, and steps/decide.py handles the in-place write."""
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _ALIASES.get(name, name)


def _is_wider(arg: Value, out: Any) -> bool:
    """Returns whether an operand does not fit the result's dtype; numbers and zero-dimensional tensors always fit."""
    if not isinstance(arg, Term) or not isinstance(out, torch.Tensor) or not arg.shape or arg.dtype is None:
        return False
    return torch.promote_types(arg.dtype, out.dtype) != out.dtype


@functools.cache
def _elementwise(target: Any, name: str) -> Callable[..., Any] | None:
    """Returns a table function for any other deterministic elementwise operator: its own term, without algebra."""
    packet = getattr(torch.ops.aten, name, None) if name and not name.startswith("_") else None
    tags = [getattr(packet, overload).tags for overload in packet.overloads()] if packet else []
    is_random = any(torch.Tag.nondeterministic_seeded in tag for tag in tags)
    if is_random or not any(torch.Tag.pointwise in tag for tag in tags):
        return None
    # The name includes the module: functions of one name may differ in the meaning of their arguments.
    op = f"{getattr(target, '__module__', None) or type(target).__name__}.{name}"

    def make(call, *args, **kwargs):
        kwargs.pop("inplace", None)
        values = [*args, *(value for _, value in sorted(kwargs.items()))]
        consts = [_ARGUMENT if isinstance(value, Term) else const_of(value) for value in values]
        if not all(
            const is _ARGUMENT or isinstance(const, (bool, int, float, str, ConstVar, type(None)))
            for const in consts
        ):
            return None
        terms = tuple(value for value in values if isinstance(value, Term))
        return normalize.apply(call.space, op, terms, (*consts, *sorted(kwargs)), call.dtype, call.shape)

    return make


_ARGUMENT = "a tensor"  # marks a tensor argument among the constants


# Each function takes a Call, and the arguments by their names in torch's documentation. An annotation states the kind
# that the function relies on; a call with another kind of argument is opaque.


def _mul(call, input: Operand, other: Operand):
    terms = term_of(call, input), term_of(call, other)
    return normalize.mul(call.space, ((term, 1) for term in terms), normalize.ONE, call.dtype, call.shape)


def _truediv(call, input: Operand, other: Operand, *, rounding_mode=None):
    if rounding_mode is not None:
        return None
    factors = (term_of(call, input), 1), (term_of(call, other), -1)
    return normalize.mul(call.space, factors, normalize.ONE, call.dtype, call.shape)


def _rtruediv(call, input: Operand, other: Operand):
    return _truediv(call, other, input)


def _power(call, input: Operand, exponent):
    power = scalar_of(exponent)
    if power is None or power.powers or not math.isfinite(power.value) or call.dtype.is_complex:
        return None
    return normalize.mul(
        call.space, ((term_of(call, input), power.value),), normalize.ONE, call.dtype, call.shape
    )


def _fixed_power(power: float):
    return lambda call, input: _power(call, input, power)


def _neg(call, input: Operand):
    return _mul(call, input, -1)


def _sum_of(call, input, other, alpha, sign):
    factor = scalar_of(alpha)
    if factor is None:
        return None
    factor = factor * Scalar(sign)
    second = term_of(call, other)
    if factor != normalize.ONE:
        shape = second.shape
        second = normalize.mul(call.space, ((second, 1),), factor, call.dtype, shape)
    return normalize.add(call.space, (term_of(call, input), second), Scalar(0.0), call.dtype, call.shape)


def _add(call, input: Operand, other: Operand, *, alpha=1):
    return _sum_of(call, input, other, alpha, 1.0)


def _sub(call, input: Operand, other: Operand, *, alpha=1):
    return _sum_of(call, input, other, alpha, -1.0)


def _rsub(call, input: Operand, other: Operand, *, alpha=1):
    return _sum_of(call, other, input, alpha, -1.0)


def _addcmul(call, input: Operand, tensor1: Term, tensor2: Term, *, value=1):
    product = normalize.broadcast((tensor1.shape, tensor2.shape))
    scalar = scalar_of(value)
    if product is None or scalar is None:
        return None
    factors = ((tensor1, 1), (tensor2, 1))
    term = normalize.mul(call.space, factors, scalar, call.dtype, product)
    return normalize.add(call.space, (term_of(call, input), term), Scalar(0.0), call.dtype, call.shape)


def _unary(op: str):
    def make(call, input: Operand, inplace=False):
        term = normalize.cast(call.space, term_of(call, input), call.dtype)
        return normalize.apply(call.space, op, (term,), (), call.dtype, call.shape)

    return make


def _reinterpreted(op: str):
    """Returns a table function that reinterprets the same numbers without a cast."""

    def make(call, input: Term):
        return normalize.apply(call.space, op, (input,), (), call.dtype, call.shape)

    return make


def _gelu(call, input: Operand, approximate="none"):
    term = normalize.cast(call.space, term_of(call, input), call.dtype)
    return normalize.apply(call.space, "gelu", (term,), (const_of(approximate),), call.dtype, call.shape)


def _glu(call, input: Term, dim: int = -1):
    first, second = halves(call, input, dim)
    gate = normalize.apply(call.space, "sigmoid", (second,), (), call.dtype, call.shape)
    return normalize.mul(call.space, ((first, 1), (gate, 1)), normalize.ONE, call.dtype, call.shape)


def _dropout(call, input: Term, p=0.5, training=True, inplace=False):
    if isinstance(p, (int, float)) and (p == 0 or training is False):
        return input
    if training is not True or inplace:
        return None
    p = Draw(p if isinstance(p, (int, float)) else math.nan)  # known at run time only
    return normalize.apply(call.space, "dropout", (input,), (p,), call.dtype, call.shape)


def _same(call, input: Term, *args, **kwargs):
    return input


def _to(call, input: Term, *args, **kwargs):
    return normalize.cast(call.space, input, call.dtype)


def _reduce(op: str):
    def make(call, input: Term, dim: Dims = None, keepdim=False, *, dtype=None):
        return _reduced(call, op, input, dim, call.dtype)

    return make


def _reduced(call: Call, op: str, input: Term, dim: Any, dtype: torch.dtype, *, is_cast: bool = True) -> Term:
    rank = len(input.shape)
    dims = range(rank) if dim is None or dim == () else (dim if isinstance(dim, (tuple, list)) else (dim,))
    dims = tuple(sorted(negative(d, rank) for d in dims))
    kept = list(input.shape)
    for d in dims:
        kept[d] = 1
    term = normalize.cast(call.space, input, dtype) if is_cast else input
    term = normalize.apply(call.space, op, (term,), dims, dtype, tuple(kept))
    return normalize.view(call.space, term, *call.shape)


def _norm(call, input: Term, p: Any = "fro", dim: Dims = None, keepdim=False, dtype=None):
    """Returns the L2 norm, with the squares summed in at least float32, as in torch; float16 would overflow."""
    if p not in (2, 2.0, "fro"):
        return None
    wide = torch.promote_types(call.dtype, torch.float32)
    square = normalize.mul(call.space, ((input, 2),), normalize.ONE, wide, input.shape)
    total = _reduced(call, "sum", square, dim, wide)
    root = normalize.mul(call.space, ((total, 0.5),), normalize.ONE, wide, call.shape)
    return normalize.cast(call.space, root, call.dtype)


def _vector_norm(call, x: Term, ord=2, dim: Dims = None, keepdim=False, *, dtype=None):
    return _norm(call, x, ord, dim, keepdim, dtype)


def _normalized(call, input: Term, p=2.0, dim=1, eps=1e-12, out=None):
    """Returns x / max(norm(x), eps), torch's own formula, with the rounding of `_norm`."""
    if p not in (2, 2.0) or not isinstance(dim, int) or call.dtype != input.dtype:
        return None
    space, dim = call.space, negative(dim, len(input.shape))
    wide = torch.promote_types(call.dtype, torch.float32)
    rows = (*input.shape[:dim], 1, *input.shape[dim:][1:])
    square = normalize.mul(space, ((input, 2),), normalize.ONE, wide, input.shape)
    total = normalize.apply(space, "sum", (square,), (dim,), wide, rows)
    root = normalize.mul(space, ((total, 0.5),), normalize.ONE, wide, rows)
    length = normalize.cast(space, root, call.dtype)
    bounded = normalize.apply(space, "str.clamp_min", (length,), (_ARGUMENT, const_of(eps)), call.dtype, rows)
    return normalize.mul(space, ((input, 1), (bounded, -1)), normalize.ONE, call.dtype, call.shape)


def _softmax(op: str):
    def make(call, input: Term, dim: int | None = None, _stacklevel=3, dtype=None):
        if dim is None:
            return None
        term = normalize.cast(call.space, input, call.dtype)
        return normalize.apply(
            call.space, op, (term,), (negative(dim, len(call.shape)),), call.dtype, call.shape
        )

    return make


def _logsumexp(call, input: Term, dim: Dims, keepdim=False):
    if dim is None or (isinstance(dim, Sequence) and len(dim) != 1):
        return None
    return _reduced(call, "logsumexp", input, dim, call.dtype)


def _argmax(call, input: Term, dim: int | None = None, keepdim=False):
    return None if dim is None else _reduced(call, "argmax", input, dim, call.dtype, is_cast=False)


def _max(call, input: Term, dim: int, keepdim=False):
    """Returns the terms of the largest values in a dimension, and of their columns."""
    if type(dim) is not int or not isinstance(call.out, tuple) or negative(dim, len(input.shape)) != -1:
        return None
    values, columns = call.out
    kept = (*input.shape[:-1], 1)
    top = normalize.view(
        call.space,
        call.space.intern("top_values", (input,), (-1, 1), values.dtype, kept),
        *sizes_of(values.shape),
    )
    return top, _reduced(Call(call.space, columns), "argmax", input, dim, columns.dtype, is_cast=False)


def _topk(call, input: Term, k: int, dim: int = -1, largest=True, sorted=True):
    """Returns the terms of the values and of the columns; None for an order that is not descending."""
    if negative(dim, len(input.shape)) != -1 or not (largest and sorted) or type(k) is not int:
        return None
    return tuple(
        call.space.intern(op, (input,), (-1, k), part.dtype, sizes_of(part.shape))
        for op, part in zip(("top_values", "top_columns"), call.out, strict=True)
    )


def _kl_div(
    call,
    input: Term,
    target: Term,
    size_average=None,
    reduce=None,
    reduction="mean",
    log_target=False,
):
    """Returns the term of each element, reduced; None for broadcast or differently rounded operands."""
    is_alike = input.shape == target.shape and input.dtype == target.dtype == call.dtype
    if size_average is not None or reduce is not None or not is_alike or type(log_target) is not bool:
        return None
    args, dims = (input, target), tuple(range(-len(input.shape), 0))
    each = normalize.apply(call.space, "kl_div", args, (log_target,), call.dtype, input.shape)
    if reduction == "none":
        return each
    if reduction == "batchmean":  # of the sums of the first dimension, whose size may be symbolic
        space, kept = call.space, (input.shape[0], *(1,) * (len(dims) - 1))
        sums = normalize.apply(space, "sum", (each,), dims[1:], call.dtype, kept) if dims[1:] else each
        return _reduced(call, "mean", sums, dims[0], call.dtype)
    return _reduced(call, reduction, each, dims, call.dtype) if reduction in ("sum", "mean") else None


def _detach(call, input: Term):
    return call.space.intern("detached", (input,), (), input.dtype, input.shape)


def _gather(call, input: Term, dim: int, index: Term, *, sparse_grad=False):
    consts = (negative(dim, len(input.shape)),)
    return normalize.apply(call.space, "gather", (input, index), consts, call.dtype, call.shape)


def _take_along_dim(call, input: Term, indices: Term, dim: int | None = None):
    """Returns a gather if nothing is broadcast, since gather does not broadcast; otherwise None."""
    if dim is None or len(indices.shape) != len(input.shape):
        return None
    dim = negative(dim, len(input.shape))
    others = [
        [size for at, size in enumerate(operand.shape, -len(operand.shape)) if at != dim]
        for operand in (input, indices)
    ]
    return _gather(call, input, dim, indices) if others[0] == others[1] else None


def _rms_norm(call, input: Term, normalized_shape: Sequence[Any], weight=None, eps=None):
    """Returns the formula of rms_norm in at least float32, as torch computes it."""
    space, shape, dims = call.space, call.shape, tuple(range(-len(normalized_shape), 0))
    wide = torch.promote_types(call.dtype, torch.float32)
    x = normalize.cast(space, input, wide)
    square = normalize.mul(space, ((x, 2),), normalize.ONE, wide, shape)
    rows = shape[: len(shape) - len(dims)] + (1,) * len(dims)
    mean = normalize.apply(space, "mean", (square,), dims, wide, rows)
    # Without eps, torch uses the machine epsilon of the dtype that it computes in.
    constant = scalar_of(torch.finfo(wide).eps if eps is None else eps)
    if constant is None:
        return None
    shifted = normalize.add(space, (mean,), constant, wide, rows)
    factors = [(x, 1), (shifted, -0.5)]
    if isinstance(weight, Term):
        factors.append((weight, 1))
    return normalize.cast(space, normalize.mul(space, factors, normalize.ONE, wide, shape), call.dtype)


def _layer_norm(call, input: Term, normalized_shape: Sequence[Any], weight=None, bias=None, eps=1e-5):
    args = (input, *(operand if isinstance(operand, Term) else call.space.none for operand in (weight, bias)))
    consts = (len(normalized_shape), const_of(eps))
    return normalize.apply(call.space, "layer_norm", args, consts, call.dtype, call.shape)


def _linear(call, input: Term, weight: Term, bias: Term | None = None):
    space, dtype = call.space, call.dtype  # autocast casts the operands without a node
    bias = normalize.cast(space, bias, dtype) if isinstance(bias, Term) else space.none
    args = (normalize.cast(space, input, dtype), normalize.cast(space, weight, dtype), bias)
    return normalize.apply(space, "linear", args, (), dtype, call.shape)


def _addmm(call, input: Term, mat1: Term, mat2: Term, *, beta=1, alpha=1):
    if beta != 1 or alpha != 1:
        return None
    return _linear(call, mat1, normalize.permute(call.space, mat2, -1, -2), input)


def _complex(call, real: Term, imag: Term):
    return normalize.apply(call.space, "complex", (real, imag), (), call.dtype, call.shape)


def _matmul(call, input: Term, other: Term):
    args = tuple(normalize.cast(call.space, arg, call.dtype) for arg in (input, other))
    return normalize.apply(call.space, "matmul", args, (), call.dtype, call.shape)


def _baddbmm(call, input: Term, batch1: Term, batch2: Term, *, beta=1, alpha=1):
    beta, alpha = scalar_of(beta), scalar_of(alpha)
    if beta is None or alpha is None:
        return None
    product = normalize.mul(call.space, ((_matmul(call, batch1, batch2), 1),), alpha, call.dtype, call.shape)
    if not beta.value:  # torch then does not read the input
        return product
    scaled = normalize.mul(call.space, ((input, 1),), beta, call.dtype, input.shape)
    return normalize.add(call.space, (scaled, product), Scalar(0.0), call.dtype, call.shape)


def _einsum(call, equation: str, *operands: Term | Sequence[Term]):
    """Returns the term of an einsum of two operands, or None.

    Supported are a linear layer, "...i,oi->...o"; a sum of products, "btd,btd->bt"; and a batched matmul,
    "bthd,bshd->bhts".
    """
    terms = [term for given in operands for term in ((given,) if isinstance(given, Term) else given)]
    names, arrow, out = equation.replace(" ", "").replace("...", "*").partition("->")
    first, *others = names.split(",")
    if not (first and arrow) or len(others) != 1 or len(terms) != 2:
        return None
    (x, y), (second,) = terms, others
    if len(first) == len(x.shape) and len(second) == len(y.shape) and "*" not in first + second:
        product = _batched(call, x, y, first, second, out)
        if product is not None:
            return product
    if "*" in first[1:] or len(set(first)) != len(first):
        return None
    if first == second and x.shape == y.shape:
        summed = [name for name in first if name not in out]
        if "*" in summed or out != "".join(name for name in first if name in out):
            return None
        product = normalize.mul(call.space, ((x, 1), (y, 1)), normalize.ONE, call.dtype, x.shape)
        return _reduce("sum")(call, product, [first.index(name) - len(first) for name in summed])
    rows, channel = first[:-1], first[-1]
    features = second.replace(channel, "")
    if (
        len(second) != 2
        or len(y.shape) != 2
        or len(features) != 1
        or out != rows + features
        or features in rows
    ):
        return None
    weight = y if second[1] == channel else normalize.permute(call.space, y, -1, -2)
    return _linear(call, x, weight)


def _batched(call: Call, x: Term, y: Term, first: str, second: str, out: str) -> Term | None:
    """Returns the matmul of an einsum with at least one batch dimension, or None if the einsum is no matmul."""
    batch = [name for name in out if name in first and name in second]
    row, column, summed = (
        [name for name in names if (name in first, name in second, name in out) == where]
        for names, where in (
            (first, (True, False, True)),
            (second, (False, True, True)),
            (first, (True, True, False)),
        )
    )
    shape = dict(zip(first + second, (*x.shape, *y.shape), strict=True))
    is_whole = sorted(first + second) == sorted(2 * batch + 2 * summed + row + column)
    is_whole = is_whole and all(shape[name] == size for name, size in zip(first, x.shape, strict=True))
    if not (batch and len(row) == len(column) == len(summed) == 1 and is_whole):
        return None
    if sorted(out) != sorted(batch + row + column):
        return None
    x = normalize.permute(call.space, x, *(first.index(n) - len(first) for n in (*batch, *row, *summed)))
    y = normalize.permute(call.space, y, *(second.index(n) - len(second) for n in (*batch, *summed, *column)))
    args = tuple(normalize.cast(call.space, arg, call.dtype) for arg in (x, y))
    made = (*batch, *row, *column)
    sizes = tuple(shape[name] for name in made)
    product = normalize.apply(call.space, "matmul", args, (), call.dtype, sizes)
    return normalize.permute(call.space, product, *(made.index(name) - len(made) for name in out))


# Many parameters because they are those of F.cross_entropy.
def _cross_entropy(
    call,
    input: Term,
    target: Term,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    has_classes = target.dtype is not None and not target.dtype.is_floating_point
    if size_average is not None or reduce is not None:
        return None
    if not has_classes:
        is_plain = not isinstance(weight, Term) and label_smoothing == 0.0
        return _soft_cross_entropy(call, input, target, reduction) if is_plain else None
    logits = normalize.cast(call.space, _classes_last(call, input), call.dtype)  # autocast upcasts losses
    consts = (const_of(ignore_index), const_of(reduction), const_of(label_smoothing))
    weight = weight if isinstance(weight, Term) else call.space.none
    return normalize.apply(
        call.space, "cross_entropy", (logits, target, weight), consts, call.dtype, call.shape
    )


def _soft_cross_entropy(call: Call, input: Term, target: Term, reduction: Any) -> Term | None:
    """Returns -sum(target * log_softmax(input)) for a target of probabilities; a mean divides by the rows."""
    space, dtype = call.space, call.dtype
    logits = normalize.cast(space, _classes_last(call, input), dtype)
    if target.shape != input.shape or logits.shape != input.shape or target.dtype != dtype:
        return None
    logp = normalize.apply(space, "log_softmax", (logits,), (-1,), dtype, logits.shape)
    product = normalize.mul(space, ((target, 1), (logp, 1)), normalize.MINUS_ONE, dtype, logits.shape)
    rows = normalize.apply(space, "sum", (product,), (-1,), dtype, (*logits.shape[:-1], 1))
    if reduction == "none":
        return normalize.view(space, rows, *call.shape)
    dims = tuple(range(-len(rows.shape), 0))
    return _reduced(call, reduction, rows, dims, dtype) if reduction in ("sum", "mean") else None


def _nll_loss(
    call,
    input: Term,
    target: Term,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
):
    if size_average is not None or reduce is not None:
        return None
    scores = normalize.cast(call.space, _classes_last(call, input), call.dtype)
    weight = weight if isinstance(weight, Term) else call.space.none
    args, consts = (scores, target, weight), (const_of(ignore_index), const_of(reduction))
    return normalize.apply(call.space, "nll_loss", args, consts, call.dtype, call.shape)


def _classes_last(call: Call, scores: Term) -> Term:
    """Moves the classes from dimension 1, where torch has them, to the last dimension, where terms have them."""
    rank = len(scores.shape)
    return scores if rank < 3 else normalize.permute(call.space, scores, -rank, *range(2 - rank, 0), 1 - rank)


TABLE: Mapping[str, Callable[..., Any]] = {
    "add": _add, "sub": _sub, "rsub": _rsub, "mul": _mul, "truediv": _truediv, "rtruediv": _rtruediv,
    "neg": _neg, "pow": _power, "square": _fixed_power(2), "sqrt": _fixed_power(0.5),
    "rsqrt": _fixed_power(-0.5), "reciprocal": _fixed_power(-1), "addcmul": _addcmul,
    **{op: _unary(op) for op in ("silu", "sigmoid", "tanh", "relu", "exp", "log", "erf", "cos", "sin")},
    "gelu": _gelu, "glu": _glu, "dropout": _dropout,
    **dict.fromkeys(("to", "float", "half", "bfloat16", "double", "type_as", "bool", "int", "long"), _to),
    "contiguous": _same, "clone": _same, "alias": _same, "identity": _same,
    "mean": _reduce("mean"), "sum": _reduce("sum"), "norm": _norm, "linalg_vector_norm": _vector_norm,
    "vector_norm": _vector_norm, "softmax": _softmax("softmax"), "log_softmax": _softmax("log_softmax"),
    "rms_norm": _rms_norm, "layer_norm": _layer_norm, "linear": _linear, "addmm": _addmm, "matmul": _matmul,
    "baddbmm": _baddbmm, "einsum": _einsum, "complex": _complex, "logsumexp": _logsumexp, "gather": _gather,
    "argmax": _argmax, "max": _max, "topk": _topk, "kl_div": _kl_div, "detach": _detach,
    "take_along_dim": _take_along_dim, "normalize": _normalized,
    "cross_entropy": _cross_entropy, "nll_loss": _nll_loss, "scaled_dot_product_attention": attention,
    **LAYOUT_TABLE, **INDEX_TABLE,
    "view_as_complex": _reinterpreted("view_as_complex"), "view_as_real": _reinterpreted("view_as_real"),
}  # fmt: skip
