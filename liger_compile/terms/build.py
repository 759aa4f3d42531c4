"""FX node -> Term, through one table from operator to canonical op with fully bound arguments.

In: a graph as Dynamo captured it (functions, methods, builtins and OpOverloads mixed), every node with
meta["example_value"]; or a pattern's search function, run on fake tensors under `trace`. Out: `Terms`, which
gives every node its term. An operator that the table does not know is an opaque leaf, never an error.

The table's functions bind arguments by their own signatures and call the constructors of normalize.py. A new
operator is a function here; a new identity between operators belongs in normalize.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from liger_compile.terms import normalize
from liger_compile.terms.mutation import Mutations
from liger_compile.terms.term import ConstVar, Scalar, Space, Term, size_of, sizes_of

Value = Any  # a Term, a tuple of Values, or a constant


Step = Callable[[Any], Any]


class Terms:
    """The terms of one graph: `of[node]`, and back again: `nodes[term]`, `derive(term)`."""

    def __init__(self, graph: Graph, mutations: Mutations) -> None:
        self.space = normalize.new_space()
        self.of: dict[Node, Value] = {}
        self.nodes: dict[Term, list[Node]] = {}  # in graph order
        self.passes_through: set[Node] = set()  # nodes that compute nothing: their value is an argument's
        self.mutations = mutations
        for node in graph.nodes:
            self._visit(node)

    def _visit(self, node: Node) -> None:
        example = node.meta.get("example_value")
        if node.op in ("call_function", "call_method") and not _moves_device(node):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda arg: self._read(arg, node))
            value = call(self.space, node.target, args, kwargs, example, node.name)
        else:
            value = opaque(self.space, example, node.name)
        self.of[node] = value
        if isinstance(value, Term):
            if any(value is self.of.get(arg) for arg in node.all_input_nodes):
                self.passes_through.add(node)
            self.nodes.setdefault(value, []).append(node)

    def _read(self, node: Node, reader: Node) -> Value:
        """The value of `node` at the time of `reader`: another one once somebody has written into it."""
        example = node.meta.get("example_value")
        if isinstance(example, (int, torch.SymInt, torch.Size, torch.dtype, torch.device)):
            return example
        if not self.mutations.is_clean(node):
            position = self.mutations.position
            epoch = self.mutations.epoch(node, position[reader])
            if epoch is None:
                return opaque(self.space, example, f"{node.name} as {reader.name} reads it")
            if epoch != self.mutations.epoch(node, position[node] + 1):
                return opaque(self.space, example, f"{node.name} after write {epoch}")
        return self.of[node]

    def derive(self, term: Term) -> tuple[Node, tuple[Step, ...]] | None:
        """A node that has the value of `term` once the steps are taken; None if there is none."""
        nodes = self.nodes.get(term)
        if nodes:
            return nodes[0], ()
        step = _step(term)
        base = self.derive(term.args[0]) if step else None
        return None if base is None or step is None else (base[0], (*base[1], step))


def _step(term: Term) -> Step | None:
    """How to compute a term that is one cheap operation on its argument."""
    if term.op == "cast":
        return operator.methodcaller("to", term.dtype)
    if term.op == "permute":
        rank, moved = len(term.shape), term.consts
        return operator.methodcaller("permute", *range(-rank, -len(moved)), *moved)
    if term.op == "mul" and len(term.args) == 1 and term.consts[1] == 1 and term.args[0].shape == term.shape:
        value = term.consts[0].value
        return lambda tensor: tensor * value
    if term.op == "slice" and all(isinstance(bound, int) for bound in term.consts):
        dim, start, stop, step = term.consts
        index = (Ellipsis, slice(start, stop, step), *[slice(None)] * (-1 - dim))
        return lambda tensor: tensor[index]
    if term.op == "view" and sum(not isinstance(size, int) for size in term.shape) <= 1:
        shape = tuple(size if isinstance(size, int) else -1 for size in term.shape)
        return operator.methodcaller("reshape", shape)
    return None


def _moves_device(node: Node) -> bool:
    """A copy to another device has the value of its argument, but cannot stand in for it."""
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor):
        return False
    inputs = (arg.meta.get("example_value") for arg in node.all_input_nodes)
    return any(isinstance(arg, torch.Tensor) and arg.dim() and arg.device != example.device for arg in inputs)


class NumberVar(float):
    """A float capture of a pattern, while its search is traced: remembers what was multiplied into it."""

    scalar: Scalar

    def __new__(cls, value: float, scalar: Scalar) -> NumberVar:
        self = super().__new__(cls, value)
        self.scalar = scalar
        return self

    def _times(self, other: Any, power: float = 1) -> Any:
        scalar = _scalar(other)
        if scalar is None:
            return NotImplemented
        return NumberVar(float(self) * float(other) ** power, self.scalar * scalar**power)

    def __mul__(self, other: Any) -> Any:
        return self._times(other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._times(other, -1)

    def __rtruediv__(self, other: Any) -> Any:
        scalar = _scalar(other)
        if scalar is None:
            return NotImplemented
        return NumberVar(float(other) / float(self), scalar * self.scalar**-1)

    def __neg__(self) -> NumberVar:
        return NumberVar(-float(self), self.scalar * Scalar(-1.0))


class IntVar(int):
    """An int capture of a pattern, while its search is traced."""

    var: ConstVar


class StrVar(str):
    """A str capture of a pattern, while its search is traced."""

    var: ConstVar


class _Recorder(TorchFunctionMode):
    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space
        self.values: dict[int, Value] = {}
        self.alive: list[Any] = []  # ids are only unique among living objects

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) or (isinstance(out, (tuple, list)) and not isinstance(out, torch.Size)):
            values = torch.utils._pytree.tree_map(self.value_of, (tuple(args), kwargs))
            self.remember(out, call(self.space, func, *values, out, f"op{len(self.alive)}"))
        return out

    def remember(self, out: Any, value: Value) -> None:
        self.alive.append(out)
        self.values[id(out)] = value
        if isinstance(out, (tuple, list)) and isinstance(value, tuple):
            for part, part_value in zip(out, value, strict=True):
                self.remember(part, part_value)

    def value_of(self, arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor):
            return arg
        if id(arg) not in self.values:
            self.remember(arg, opaque(self.space, arg, f"constant{len(self.alive)}"))
        return self.values[id(arg)]


def trace(search: Callable[..., Any], captures: Mapping[str, Any]) -> tuple[Term, ...]:
    """The terms that search returns, for captures that are fake tensors, example numbers, or None.

    A tensor capture becomes a `var` term, a float a Scalar with a power, an int or str a ConstVar.
    """
    space = normalize.new_space()
    recorder = _Recorder(space)
    arguments: dict[str, Any] = {}
    for name, example in captures.items():
        arguments[name] = example
        if isinstance(example, torch.Tensor):
            var = space.intern("var", (), (name,), example.dtype, sizes_of(example.shape))
            recorder.remember(example, var)
        elif isinstance(example, float):
            arguments[name] = NumberVar(example, Scalar(1.0, ((name, 1),)))
        elif isinstance(example, (int, str)) and not isinstance(example, bool):
            arguments[name] = (IntVar if isinstance(example, int) else StrVar)(example)
            arguments[name].var = ConstVar(name)
    with recorder:
        out = search(**arguments)
    outs = out if isinstance(out, (tuple, list)) else (out,)
    return tuple(recorder.values[id(tensor)] for tensor in outs)


def opaque(space: Space, example: Any, name: str) -> Value:
    """A value that is known by its name only. Sizes and other constants are themselves."""
    if isinstance(example, torch.Tensor):
        return space.intern("leaf", (), (name,), example.dtype, sizes_of(example.shape))
    if isinstance(example, (tuple, list)) and not isinstance(example, torch.Size):
        return tuple(opaque(space, part, f"{name}[{i}]") for i, part in enumerate(example))
    if isinstance(example, (torch.SymFloat, torch.SymInt)):
        return space.intern("leaf", (), (name,), None, ())
    return example


def call(space: Space, target: Any, args: Any, kwargs: Any, out: Any, name: str) -> Value:
    """The value of target(*args, **kwargs), whose result is `out`; opaque where the table does not know it."""
    make = TABLE.get(_canonical_name(target) or "")
    if make is None or not isinstance(out, (torch.Tensor, tuple, list)) or kwargs.get("out") is not None:
        return opaque(space, out, name)
    try:
        value = make(_Call(space, out), *args, **kwargs)
    except (TypeError, AttributeError, IndexError, ValueError):
        # Called in a way that the table does not know: with other arguments, or none of them a tensor.
        value = None
    return opaque(space, out, name) if value is None else value


_MODULES = ("torch", "torch._C._nn", "torch.nn.functional", "torch._C", "_operator", "math", "torch._tensor")
_ALIASES = {
    "true_divide": "truediv", "divide": "truediv", "div": "truediv", "multiply": "mul", "subtract": "sub",
    "negative": "neg", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv", "mm": "matmul",
    "bmm": "matmul", "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose",
    "type": "to", "moveaxis": "movedim", "__getitem__": "getitem", "__pow__": "pow", "__rsub__": "rsub",
    "__rtruediv__": "rtruediv", "__rpow__": "rpow", "__matmul__": "matmul", "t": "t", "_softmax": "softmax",
    "__rdiv__": "rtruediv", "__rmul__": "mul", "__radd__": "add", "__truediv__": "truediv", "__mul__": "mul",
    "__add__": "add", "__sub__": "sub", "__neg__": "neg", "__rmatmul__": "rmatmul", "unsafe_chunk": "chunk",
    "cross_entropy_loss": "cross_entropy", "nll_loss_nd": "nll_loss",
}  # fmt: skip


def _canonical_name(target: Any) -> str | None:
    """The table's name of an operator, however it was called; None for what is not torch's own."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.removeprefix("aten::") if target.namespace == "aten" else None
    elif isinstance(target, str):
        name = target
    elif (getattr(target, "__module__", None) or "torch") in _MODULES:
        name = getattr(target, "__name__", None)
    else:
        name = None
    if name and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]  # x.mul_(y) has the value of x * y; that x changes is decide.py's business
    return _ALIASES.get(name, name) if name else None


class _Call:
    """What a table function needs of the call beside its arguments."""

    def __init__(self, space: Space, out: Any) -> None:
        self.space, self.out = space, out

    @property
    def dtype(self) -> torch.dtype:
        return self.out.dtype

    @property
    def shape(self) -> tuple[Any, ...]:
        return sizes_of(self.out.shape)


def _scalar(value: Any) -> Scalar | None:
    if isinstance(value, NumberVar):
        return value.scalar
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Scalar(float(value))
    return None


def _term(call: _Call, value: Any) -> Term:
    """An operand: a tensor's term, or a number. Raises TypeError for anything else."""
    if isinstance(value, Term):
        return value
    if isinstance(value, torch.SymInt):
        return call.space.intern("leaf", (), (size_of(value),), None, ())
    scalar = _scalar(value)
    if scalar is None:
        raise TypeError(f"expected a tensor or a number, got {value!r}")
    return call.space.number(scalar)


def _const(value: Any) -> Any:
    """A constant as it stands in `consts`."""
    if isinstance(value, (IntVar, StrVar)):
        return value.var
    if isinstance(value, NumberVar):
        return ConstVar(value.scalar.powers[0][0])
    return value


def _dim(dim: int, rank: int) -> int:
    return dim - rank if dim >= 0 else dim


def _flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """x.view(2, 3) and x.view((2, 3))"""
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list, torch.Size)) else args


# The table. Each function takes a _Call and the arguments as torch's documentation names them.


def _mul(call, input, other):
    terms = _term(call, input), _term(call, other)
    return normalize.mul(call.space, ((term, 1) for term in terms), normalize.ONE, call.dtype, call.shape)


def _truediv(call, input, other, *, rounding_mode=None):
    if rounding_mode is not None:
        return None
    factors = (_term(call, input), 1), (_term(call, other), -1)
    return normalize.mul(call.space, factors, normalize.ONE, call.dtype, call.shape)


def _rtruediv(call, input, other):
    return _truediv(call, other, input)


def _power(call, input, exponent):
    power = _scalar(exponent)
    if power is None or power.powers or call.dtype.is_complex:
        return None
    return normalize.mul(call.space, ((_term(call, input), power.value),), normalize.ONE, call.dtype, call.shape)


def _fixed_power(power: float):
    return lambda call, input: _power(call, input, power)


def _neg(call, input):
    return _mul(call, input, -1)


def _sum_of(call, input, other, alpha, sign):
    factor = _scalar(alpha)
    if factor is None:
        return None
    factor = factor * Scalar(sign)
    second = _term(call, other)
    if factor != normalize.ONE:
        shape = second.shape
        second = normalize.mul(call.space, ((second, 1),), factor, call.dtype, shape)
    return normalize.add(call.space, (_term(call, input), second), Scalar(0.0), call.dtype, call.shape)


def _add(call, input, other, *, alpha=1):
    return _sum_of(call, input, other, alpha, 1.0)


def _sub(call, input, other, *, alpha=1):
    return _sum_of(call, input, other, alpha, -1.0)


def _rsub(call, input, other, *, alpha=1):
    return _sum_of(call, other, input, alpha, -1.0)


def _addcmul(call, input, tensor1, tensor2, *, value=1):
    product = normalize.broadcast((tensor1.shape, tensor2.shape))
    scalar = _scalar(value)
    if product is None or scalar is None:
        return None
    factors = ((tensor1, 1), (tensor2, 1))
    term = normalize.mul(call.space, factors, scalar, call.dtype, product)
    return normalize.add(call.space, (_term(call, input), term), Scalar(0.0), call.dtype, call.shape)


def _unary(op: str):
    def make(call, input, inplace=False):
        term = normalize.cast(call.space, _term(call, input), call.dtype)
        return normalize.apply(call.space, op, (term,), (), call.dtype, call.shape)

    return make


def _gelu(call, input, approximate="none"):
    term = normalize.cast(call.space, _term(call, input), call.dtype)
    return normalize.apply(call.space, "gelu", (term,), (_const(approximate),), call.dtype, call.shape)


def _glu(call, input, dim=-1):
    first, second = _chunk(call, input, 2, dim)
    gate = normalize.apply(call.space, "sigmoid", (second,), (), call.dtype, call.shape)
    return normalize.mul(call.space, ((first, 1), (gate, 1)), normalize.ONE, call.dtype, call.shape)


def _dropout(call, input, p=0.5, training=True, inplace=False):
    return input if isinstance(p, (int, float)) and (p == 0 or training is False) else None


def _same(call, input, *args, **kwargs):
    return input


def _to(call, input, *args, **kwargs):
    return normalize.cast(call.space, input, call.dtype)


def _reduce(op: str):
    def make(call, input, dim=None, keepdim=False, *, dtype=None):
        rank = len(input.shape)
        dims = range(rank) if dim is None or dim == () else (dim if isinstance(dim, (tuple, list)) else (dim,))
        dims = tuple(sorted(_dim(d, rank) for d in dims))
        kept = list(input.shape)
        for d in dims:
            kept[d] = 1
        term = normalize.cast(call.space, input, call.dtype)
        term = normalize.apply(call.space, op, (term,), dims, call.dtype, tuple(kept))
        return normalize.view(call.space, term, *call.shape)

    return make


def _norm(call, input, p="fro", dim=None, keepdim=False, dtype=None):
    if p not in (2, 2.0, "fro"):
        return None
    square = normalize.mul(call.space, ((input, 2),), normalize.ONE, call.dtype, input.shape)
    total = _reduce("sum")(call, square, dim, keepdim)
    return normalize.mul(call.space, ((total, 0.5),), normalize.ONE, call.dtype, call.shape)


def _vector_norm(call, x, ord=2, dim=None, keepdim=False, *, dtype=None):
    return _norm(call, x, ord, dim, keepdim, dtype)


def _softmax(op: str):
    def make(call, input, dim=None, _stacklevel=3, dtype=None):
        if dim is None:
            return None
        term = normalize.cast(call.space, input, call.dtype)
        return normalize.apply(call.space, op, (term,), (_dim(dim, len(call.shape)),), call.dtype, call.shape)

    return make


def _rms_norm(call, input, normalized_shape, weight=None, eps=None):
    """Written out as its formula, in float32 at least, as torch computes it."""
    space, shape, dims = call.space, call.shape, tuple(range(-len(normalized_shape), 0))
    wide = torch.promote_types(call.dtype, torch.float32)
    x = normalize.cast(space, input, wide)
    square = normalize.mul(space, ((x, 2),), normalize.ONE, wide, shape)
    rows = shape[: len(shape) - len(dims)] + (1,) * len(dims)
    mean = normalize.apply(space, "mean", (square,), dims, wide, rows)
    # torch takes the machine epsilon of the dtype that it computes in where eps is not given
    constant = _scalar(torch.finfo(wide).eps if eps is None else eps)
    if constant is None:
        return None
    shifted = normalize.add(space, (mean,), constant, wide, rows)
    factors = [(x, 1), (shifted, -0.5)]
    if isinstance(weight, Term):
        factors.append((weight, 1))
    return normalize.cast(space, normalize.mul(space, factors, normalize.ONE, wide, shape), call.dtype)


def _linear(call, input, weight, bias=None):
    space, dtype = call.space, call.dtype  # under autocast the operands are cast without a node
    bias = normalize.cast(space, bias, dtype) if isinstance(bias, Term) else space.none
    args = (normalize.cast(space, input, dtype), normalize.cast(space, weight, dtype), bias)
    return normalize.apply(space, "linear", args, (), dtype, call.shape)


def _addmm(call, input, mat1, mat2, *, beta=1, alpha=1):
    if beta != 1 or alpha != 1:
        return None
    return _linear(call, mat1, normalize.permute(call.space, mat2, -1, -2), input)


def _matmul(call, input, other):
    args = tuple(normalize.cast(call.space, arg, call.dtype) for arg in (input, other))
    return normalize.apply(call.space, "matmul", args, (), call.dtype, call.shape)


def _cross_entropy(
    call,
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    if size_average is not None or reduce is not None or target.dtype.is_floating_point:
        return None
    logits = _classes_last(call, input)
    consts = (_const(ignore_index), _const(reduction), _const(label_smoothing))
    weight = weight if isinstance(weight, Term) else call.space.none
    return normalize.apply(call.space, "cross_entropy", (logits, target, weight), consts, call.dtype, call.shape)


def _nll_loss(
    call, input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"
):
    if size_average is not None or reduce is not None:
        return None
    scores = _classes_last(call, input)
    weight = weight if isinstance(weight, Term) else call.space.none
    args, consts = (scores, target, weight), (_const(ignore_index), _const(reduction))
    return normalize.apply(call.space, "nll_loss", args, consts, call.dtype, call.shape)


def _classes_last(call: _Call, scores: Term) -> Term:
    """torch has the classes in dimension 1; terms have them last."""
    rank = len(scores.shape)
    return scores if rank < 3 else normalize.permute(call.space, scores, -rank, *range(2 - rank, 0), 1 - rank)


def _view(call, input, *shape, **kwargs):
    if any(isinstance(size, torch.dtype) for size in shape) or "dtype" in kwargs:
        return None
    return normalize.view(call.space, input, *call.shape)


def _expand(call, input, *sizes, **kwargs):
    rank = len(call.shape) - len(input.shape)
    term = normalize.view(call.space, input, *(1,) * rank, *input.shape)
    return normalize.expand(call.space, term, *call.shape)


def _permute(call, input, *dims):
    rank = len(input.shape)
    return normalize.permute(call.space, input, *(_dim(d, rank) for d in _flat(dims)))


def _transpose(call, input, dim0, dim1):
    rank = len(input.shape)
    dims = [*range(-rank, 0)]
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return normalize.permute(call.space, input, *dims)


def _t(call, input):
    return _transpose(call, input, -1, -2) if len(input.shape) == 2 else input


def _bounded(index: Any, size: Any, default: Any) -> Any:
    """A slice bound as Python reads it."""
    if index is None:
        return default
    index = size_of(index)
    if isinstance(index, int) and isinstance(size, int):
        return max(index + size, 0) if index < 0 else min(index, size)
    return index + size if isinstance(index, int) and index < 0 else index


def _narrowed(call: _Call, term: Term, dim: int, index: slice) -> Term | None:
    step = 1 if index.step is None else index.step
    if not isinstance(step, int) or step < 1:
        return None
    size = term.shape[dim]
    start, stop = _bounded(index.start, size, 0), _bounded(index.stop, size, size)
    return normalize.slice_(call.space, term, dim, start, stop, step)


def _getitem(call, input, index):
    if isinstance(input, (tuple, list)):
        return input[index]
    indices = index if isinstance(index, (tuple, list)) else (index,)
    if not isinstance(input, Term) or any(isinstance(i, (Term, list, tuple)) for i in indices):
        return None
    taken = sum(i is not None and i is not Ellipsis for i in indices)
    rest = [slice(None)] * (len(input.shape) - taken)
    at = next((n for n, i in enumerate(indices) if i is Ellipsis), len(indices))
    term, dim = input, -len(input.shape)
    for i in [*indices[:at], *rest, *indices[at + 1 :]]:
        if i is None:
            continue
        if isinstance(i, bool):
            return None
        if isinstance(i, int):
            i = slice(i, i + 1 if i != -1 else None)
        narrowed = _narrowed(call, term, dim, i) if isinstance(i, slice) else None
        if narrowed is None:
            return None
        term, dim = narrowed, dim + 1
    return normalize.view(call.space, term, *call.shape)


def _select(call, input, dim, index):
    dim = _dim(dim, len(input.shape))
    term = _narrowed(call, input, dim, slice(index, index + 1 if index != -1 else None))
    return None if term is None else normalize.view(call.space, term, *call.shape)


def _narrow(call, input, dim, start, length):
    return _narrowed(call, input, _dim(dim, len(input.shape)), slice(start, start + length))


def _pieces(call, input, dim):
    """The parts of a chunk or split, by their own sizes."""
    dim, start, parts = _dim(dim, len(input.shape)), 0, []
    for part in call.out:
        stop = start + size_of(part.shape[dim])
        parts.append(normalize.slice_(call.space, input, dim, start, stop, 1))
        start = stop
    return tuple(parts)


def _chunk(call, input, chunks, dim=0):
    if isinstance(call.out, (tuple, list)):
        return _pieces(call, input, dim)
    half = call.shape[dim]  # for glu, whose result has the size of a chunk
    dim = _dim(dim, len(input.shape))
    return tuple(normalize.slice_(call.space, input, dim, i * half, (i + 1) * half, 1) for i in range(chunks))


def _split(call, input, split_size_or_sections, dim=0):
    return _pieces(call, input, dim)


def _unbind(call, input, dim=0):
    return tuple(
        _select(_Call(call.space, part), input, dim, index) for index, part in enumerate(call.out)
    )


def _cat(call, tensors, dim=0, axis=None):
    dim = _dim(dim if axis is None else axis, len(call.shape))
    parts = [normalize.cast(call.space, part, call.dtype) for part in tensors]
    return normalize.cat(call.space, *parts, dim, shape=call.shape)


def _stack(call, tensors, dim=0):
    dim = _dim(dim, len(call.shape))
    size = [*call.shape]
    size[dim] = 1
    return _cat(call, [normalize.view(call.space, part, *size) for part in tensors], dim)


TABLE: Mapping[str, Callable[..., Any]] = {
    "add": _add, "sub": _sub, "rsub": _rsub, "mul": _mul, "truediv": _truediv, "rtruediv": _rtruediv,
    "neg": _neg, "pow": _power, "square": _fixed_power(2), "sqrt": _fixed_power(0.5),
    "rsqrt": _fixed_power(-0.5), "reciprocal": _fixed_power(-1), "addcmul": _addcmul,
    **{op: _unary(op) for op in ("silu", "sigmoid", "tanh", "relu", "exp", "log", "erf", "cos", "sin")},
    "gelu": _gelu, "glu": _glu, "dropout": _dropout,
    "to": _to, "float": _to, "half": _to, "bfloat16": _to, "double": _to, "type_as": _to,
    "contiguous": _same, "alias": _same, "identity": _same,
    "mean": _reduce("mean"), "sum": _reduce("sum"), "norm": _norm, "linalg_vector_norm": _vector_norm,
    "vector_norm": _vector_norm, "softmax": _softmax("softmax"), "log_softmax": _softmax("log_softmax"),
    "rms_norm": _rms_norm, "linear": _linear, "addmm": _addmm, "matmul": _matmul,
    "cross_entropy": _cross_entropy, "nll_loss": _nll_loss,
    **{op: _view for op in ("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as",
                            "reshape_as", "_unsafe_view")},
    "expand": _expand, "expand_as": _expand, "broadcast_to": _expand,
    "permute": _permute, "transpose": _transpose, "t": _t,
    "getitem": _getitem, "select": _select, "narrow": _narrow, "chunk": _chunk, "split": _split,
    "split_with_sizes": _split, "unbind": _unbind, "cat": _cat, "stack": _stack,
    "view_as_complex": _unary("view_as_complex"), "view_as_real": _unary("view_as_real"),
}  # fmt: skip
