"""Rules that prove an operation row-wise: row (b, t) of its result depends on row (b, t) of its operands alone.

A value has a `Layout`: which of its dimensions are the batch and the token. A rule takes a node that reads values with
layouts and returns the layout of its result, or raises `MixesRowsError`. Operations without a rule are refused: the
rules are a closed world.

Attention reads other rows: the keys that its mask lets it see. Padded keys have the weight zero, which terms prove, so
a row of its result depends on rows that are not padded, and on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import Tensor
from torch.fx import Node

from liger_compile.terms.attention import PADDED, PADDED_AND_MORE
from liger_compile.terms.term import Size, Term, sizes_of


class MixesRowsError(Exception):
    """Raised with a sentence that names the operation that may read other rows."""


@dataclass(frozen=True)
class Layout:
    """Where the rows of a value are.

    Args:
        dims: the dimensions of the batch and of the token, or the one dimension that both were flattened to.
        keys: for scores of attention, the dimension of the keys.
        cut: the numbers of tokens that a slice has left out at the front and at the back of each sequence.
    """

    dims: tuple[int, ...]
    keys: int | None = None
    cut: tuple[int, int] = (0, 0)

    def shifted(self, by: int) -> Layout:
        keys = None if self.keys is None else self.keys + by
        return replace(self, dims=tuple(dim + by for dim in self.dims), keys=keys)

    def sizes(self, size: tuple[Size, Size]) -> tuple[Size, ...]:
        """Returns the sizes of `dims` in a batch of (B, T)."""
        batch, length = size[0], size[1] - sum(self.cut)
        return expanded((batch, length) if len(self.dims) == 2 else (batch * length,))

    @property
    def is_packable(self) -> bool:
        """Whether the rows come first, so that they can be gathered."""
        return self.keys is None and self.dims in (BY_BATCH, FLAT)


def expanded(sizes: Iterable[Size]) -> tuple[Size, ...]:
    """Returns sizes in one form: torch writes one number of rows as `B*(T - 1)` and as `B*T - B`."""
    return tuple(size if isinstance(size, int) else sympy.expand(size) for size in sizes)


HIDING = frozenset((*PADDED.values(), *PADDED_AND_MORE.values()))  # masks that hide padded keys
BY_BATCH, FLAT = (0, 1), (0,)
OF_HEADS = Layout((0, 2))  # (B, H, T, D)


@dataclass(frozen=True)
class Batch:
    """What the rules know of the graph.

    Args:
        size: the number of rows in each dimension, B and T.
        of: the layouts so far; a tuple for a node that returns several tensors.
        terms: the term of each node.
        keys: the flags of keys that all masks have.
    """

    size: tuple[Size, Size]
    of: dict[Node, Layout | tuple[Layout, ...]]
    terms: Mapping[Node, Any]
    keys: Term

    def layout(self, node: Any) -> Layout | None:
        found = self.of.get(node) if isinstance(node, Node) else None
        return found if isinstance(found, Layout) else None


def name_of(node: Node) -> str:
    return (
        str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    )


def is_size(node: Node) -> bool:
    """Returns whether a node is a size of its operand, which no value of a row changes."""
    return name_of(node) in ("size", "numel")


def shape_of(node: Any) -> tuple[Size, ...]:
    """Returns the sizes of a tensor, which are compared without guards; none if it is no tensor."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return expanded(sizes_of(value.shape)) if isinstance(value, Tensor) else ()


def layout_of(node: Node, batch: Batch) -> Layout | tuple[Layout, ...] | None:
    """Returns the layout of a node that reads values with layouts; None for a loss, which has no rows.

    Raises:
        MixesRowsError: the node may read several rows for a row of its result.
    """
    name = name_of(node)
    rule = _RULES.get(name) or (_elementwise if name in ELEMENTWISE else None)
    if rule is None or (node.kwargs.get("out") is not None):
        raise MixesRowsError(f"{name} may read several rows at once")
    found = _with_cut(node, rule(node, batch), batch)
    for layout, shape in zip(_as_tuple(found), shapes_of(node), strict=False):
        _check_sizes(layout, shape, batch, name)
    return found


def _with_cut(node: Node, found: Any, batch: Batch) -> Any:
    """Returns the layout of a node, whose operand may be cut: such rows go to a loss, with few steps between."""
    cut = next(
        (layout.cut for arg in node.all_input_nodes if (layout := batch.layout(arg)) and any(layout.cut)),
        None,
    )
    if cut is None or found is None:
        return found
    tensors = [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("example_value"), Tensor)]
    if name_of(node) in _OF_CUT and isinstance(found, Layout) and len(tensors) == 1:
        found = replace(found, cut=cut)
        if found.is_packable:
            return found
    raise MixesRowsError("an index chooses some of the rows")


def _as_tuple(found: Any) -> tuple[Layout, ...]:
    return found if isinstance(found, tuple) else () if found is None else (found,)


def shapes_of(node: Node) -> list[tuple[Size, ...]]:
    """Returns the sizes of the tensors that a node returns."""
    value = node.meta.get("example_value")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [expanded(sizes_of(v.shape)) for v in values if isinstance(v, Tensor)]


def _check_sizes(layout: Layout, shape: tuple[Size, ...], batch: Batch, name: str) -> None:
    if tuple(shape[dim] for dim in layout.dims if dim < len(shape)) != layout.sizes(batch.size):
        raise MixesRowsError(f"{name} changes the number of rows")
    others = [size for dim, size in enumerate(shape) if dim not in layout.dims]
    if layout.is_packable and not all(isinstance(size, int) for size in others):
        raise MixesRowsError(f"{name} has rows of a size that is symbolic")


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _only(node: Node, batch: Batch, *positions: int) -> tuple[Node, Layout]:
    """Returns the only operand with rows, at the first of these positions; raises if another has rows."""
    operand = node.args[positions[0]] if len(node.args) > positions[0] else None
    layout = batch.layout(operand)
    others = [arg for arg in node.all_input_nodes if arg is not operand and arg in batch.of]
    if layout is None or others or not isinstance(operand, Node):
        raise MixesRowsError(f"{name_of(node)} has rows in unusual operands")
    return operand, layout


def _kept_apart(node: Node, layout: Layout, dims: Any, rank: int) -> None:
    """Raises if an operation works along a dimension of rows."""
    dims = range(rank) if dims is None else (dims,) if isinstance(dims, int) else dims
    if not {dim % rank for dim in dims}.isdisjoint(layout.dims):
        raise MixesRowsError(f"{name_of(node)} works across rows")


def _elementwise(node: Node, batch: Batch) -> Layout:
    rank = len(shape_of(node))
    found = set()
    for arg in node.all_input_nodes:
        if arg in batch.of:
            layout = batch.layout(arg)
            if layout is None:
                raise MixesRowsError(f"{name_of(node)} reads several tensors as one")
            found.add(layout.shifted(rank - len(shape_of(arg))))
    if len(found) != 1:
        raise MixesRowsError(f"{name_of(node)} combines rows that are laid out differently")
    return found.pop()


def _dropout(node: Node, batch: Batch) -> Layout:
    p, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    if p != 0 and training:
        raise MixesRowsError("dropout draws numbers for every row")
    return _elementwise(node, batch)


def _reduction(node: Node, batch: Batch) -> Layout:
    operand, layout = _only(node, batch, 0)
    rank, dims = len(shape_of(operand)), argument(node, 1, "dim")
    _kept_apart(node, layout, dims, rank)
    if len(shape_of(node)) == rank:
        return layout
    gone = {dim % rank for dim in ((dims,) if isinstance(dims, int) else dims)}
    if layout.keys is not None:
        raise MixesRowsError(f"{name_of(node)} reads scores")
    return Layout(tuple(dim - sum(other < dim for other in gone) for dim in layout.dims))


def _norm(node: Node, batch: Batch) -> Layout:
    operand, layout = _only(node, batch, 0)
    rank, normalized = len(shape_of(operand)), argument(node, 1, "normalized_shape")
    count = 1 if isinstance(normalized, int) else len(normalized)
    _kept_apart(node, layout, tuple(range(rank - count, rank)), rank)
    return layout


def _linear(node: Node, batch: Batch) -> Layout:
    operand, layout = _only(node, batch, 0)
    rank = len(shape_of(operand))
    _kept_apart(node, layout, -1, rank)
    return layout


def _addmm(node: Node, batch: Batch) -> Layout:
    _, layout = _only(node, batch, 1)
    _kept_apart(node, layout, -1, 2)
    return layout


def _matmul(node: Node, batch: Batch) -> Layout:
    first, second = node.args[:2]
    a, b = batch.layout(first), batch.layout(second)
    if a == OF_HEADS and b == Layout((0, 3)):
        return Layout((0, 2), keys=3)
    if a == Layout((0, 2), keys=3) and b == OF_HEADS:
        _check_mask(node, batch)
        return OF_HEADS
    if b is None and len(shape_of(second)) == 2:
        return _linear(node, batch)
    raise MixesRowsError("a matmul reads several rows, and is no attention that hides padding")


def _attention(node: Node, batch: Batch) -> Layout:
    q, k, v = (argument(node, at, name) for at, name in enumerate(("query", "key", "value")))
    others = [arg for arg in node.all_input_nodes if arg not in (q, k, v) and arg in batch.of]
    if {batch.layout(q), batch.layout(k), batch.layout(v)} != {OF_HEADS} or others:
        raise MixesRowsError("an attention has other operands than rows of queries, keys and values")
    _check_mask(node, batch)
    return OF_HEADS


def _check_mask(node: Node, batch: Batch) -> None:
    term = batch.terms.get(node)
    while isinstance(term, Term) and term.op in ("cast", "better"):
        (term,) = term.args
    if not isinstance(term, Term) or term.op != "attention":
        raise MixesRowsError("an attention is not recognized")
    mask, dropout = term.args[0], term.consts[1]
    if mask.op not in HIDING or mask.args[0] is not batch.keys:
        raise MixesRowsError("an attention sees padded keys, or hides others than the other attention does")
    if dropout != 0:
        raise MixesRowsError("dropout draws numbers for every row")


def _view(node: Node, batch: Batch) -> Layout:
    operand, layout = _only(node, batch, 0)
    if layout.keys is not None:
        raise MixesRowsError(f"{name_of(node)} reads scores")
    if node.meta["example_value"].dtype != operand.meta["example_value"].dtype:
        raise MixesRowsError("a view has another dtype")
    before, after = shape_of(operand), shape_of(node)
    rows = math.prod(
        before[: layout.dims[0]]
    )  # elements of the dimensions in front count alike in both shapes
    if len(layout.dims) == 2 and layout.dims[1] != layout.dims[0] + 1:
        return _view_apart(node, batch, before, after, layout)
    for at in range(len(after)):
        if math.prod(after[:at]) != rows:
            continue
        for found in (replace(layout, dims=(at, at + 1)), replace(layout, dims=(at,))):
            sizes = found.sizes(batch.size)
            if after[at : at + len(sizes)] == sizes and (len(sizes) == 2 or sizes != (1,)):
                return found
    raise MixesRowsError(f"{name_of(node)} does not keep rows apart")


def _view_apart(
    node: Node, batch: Batch, before: tuple[Size, ...], after: tuple[Size, ...], layout: Layout
) -> Layout:
    """Returns where two dimensions of rows that are not adjacent are: each keeps its size and what is before it."""
    found = []
    for dim in layout.dims:
        places = [
            at
            for at, size in enumerate(after)
            if size == before[dim] and math.prod(after[:at]) == math.prod(before[:dim])
        ]
        if not places:
            raise MixesRowsError(f"{name_of(node)} does not keep rows apart")
        found.append(places[0])
    return Layout(tuple(found))


def _permuted(node: Node, batch: Batch) -> Layout:
    operand, layout = _only(node, batch, 0)
    rank = len(shape_of(operand))
    if name_of(node) == "permute":
        dims = node.args[1:] if len(node.args) > 2 else argument(node, 1, "dims")
        order = [int(dim) % rank for dim in dims]  # pyright: ignore[reportArgumentType]
    else:
        first, second = (argument(node, at, f"dim{at - 1}") % rank for at in (1, 2))
        order = list(range(rank))
        order[first], order[second] = second, first
    if layout.keys is not None:
        raise MixesRowsError(f"{name_of(node)} reads scores")
    return Layout(tuple(order.index(dim) for dim in layout.dims))


def _unsqueezed(node: Node, batch: Batch) -> Layout:
    operand, layout = _only(node, batch, 0)
    at = argument(node, 1, "dim") % (len(shape_of(operand)) + 1)
    if layout.keys is not None:
        raise MixesRowsError(f"{name_of(node)} reads scores")
    return Layout(tuple(dim + (dim >= at) for dim in layout.dims))


def _item(node: Node, batch: Batch) -> Layout:
    source, index = node.args
    found = batch.of.get(source)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if isinstance(found, tuple) and isinstance(index, int):
        return found[index]
    if (
        not isinstance(found, Layout)
        or found.keys is not None
        or any(arg is not source for arg in node.all_input_nodes)
    ):
        raise MixesRowsError("an index may choose rows")
    rank = len(shape_of(source))
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        given = sum(part is not None and part is not Ellipsis for part in parts)
        parts[at : at + 1] = [slice(None)] * (rank - given)
    if (cut := _cut(parts, found, batch)) is not None:
        return replace(found, cut=cut)
    return _indexed(parts + [slice(None)] * rank, found, rank)


def _cut(parts: list[Any], layout: Layout, batch: Batch) -> tuple[int, int] | None:
    """Returns how many tokens an index leaves out at the front and at the back; None if it does anything else."""
    if layout != Layout(BY_BATCH) or len(parts) < 2 or not all(isinstance(part, slice) for part in parts):
        return None
    token, others = parts[1], [parts[0], *parts[2:]]
    is_whole = all(other.start in (None, 0) and (other.stop, other.step) in _WHOLE for other in others)
    bounds = (token.start, token.stop, token.step)
    if not is_whole or not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    return _left_out(token, batch.size[1])


def _left_out(token: slice, length: Size) -> tuple[int, int] | None:
    """Returns how many tokens a slice leaves out at the front and at the back; None if it is of another form."""
    if isinstance(length, int):
        start, stop, step = token.indices(length)
        return (start, length - stop) if step == 1 and start < stop else None
    # Of a symbolic length, which a call compares with what is left out.
    front, back = token.start or 0, token.stop or 0
    is_known = token.step in (None, 1) and token.stop != 0 and front >= 0 and back <= 0
    return (front, -back) if is_known else None


def _indexed(parts: list[Any], layout: Layout, rank: int) -> Layout:
    dims, dim, out = [], 0, 0
    for part in parts:
        if dim == rank and part is not None:
            break
        if part is None:
            out += 1
            continue
        if dim in layout.dims:
            if (
                not isinstance(part, slice)
                or part.start not in (None, 0)
                or (part.stop, part.step) not in _WHOLE
            ):
                raise MixesRowsError("an index chooses some of the rows")
            dims.append(out)
        elif not isinstance(part, (slice, int)):
            raise MixesRowsError("an index may choose rows")
        out += not isinstance(part, int)
        dim += 1
    return Layout(tuple(dims))


_WHOLE = ((None, None), (None, 1))


def _parts(node: Node, batch: Batch) -> tuple[Layout, ...]:
    operand, layout = _only(node, batch, 0)
    is_unbind, rank = name_of(node) == "unbind", len(shape_of(operand))
    dim = (argument(node, 1, "dim", 0) if is_unbind else argument(node, 2, "dim", 0)) % rank
    _kept_apart(node, layout, dim, rank)
    if layout.keys is not None:
        raise MixesRowsError(f"{name_of(node)} reads scores")
    if is_unbind:
        layout = Layout(tuple(d - (d > dim) for d in layout.dims))
    return (layout,) * len(node.meta["example_value"])


def _joined(node: Node, batch: Batch) -> Layout:
    # A cache of keys begins as an empty tensor of one dimension, which adds nothing.
    tensors = [tensor for tensor in node.args[0] if shape_of(tensor) != (0,)]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
    found = {batch.layout(tensor) for tensor in tensors}
    if len(found) != 1 or (layout := found.pop()) is None or layout.keys is not None:
        raise MixesRowsError("cat joins rows with other values")
    if len(tensors) > 1:
        _kept_apart(node, layout, argument(node, 1, "dim", 0), len(shape_of(node)))
    return layout


def _expanded(node: Node, batch: Batch) -> Layout:
    operand, layout = _only(node, batch, 0)
    return layout.shifted(len(shape_of(node)) - len(shape_of(operand)))


def _repeated(node: Node, batch: Batch) -> Layout:
    operand, layout = _only(node, batch, 0)
    if not isinstance(argument(node, 1, "repeats"), int) or argument(node, 2, "dim") is None:
        raise MixesRowsError("repeat_interleave repeats rows")
    _kept_apart(node, layout, argument(node, 2, "dim"), len(shape_of(operand)))
    return layout


def _loss(node: Node, batch: Batch) -> None:
    logits, target = argument(node, 0, "input"), argument(node, 1, "target")
    layout = batch.layout(logits)
    is_flat = layout is not None and layout.dims == FLAT and len(shape_of(logits)) == 2
    is_plain = (
        layout is not None
        and isinstance(target, Node)
        and target not in batch.of
        and shape_of(target) == layout.sizes(batch.size)
    )
    if not (is_flat and is_plain) or argument(node, 6, "reduction", "mean") not in ("mean", "sum"):
        raise MixesRowsError("a loss has no label for each row, or no sum or mean")
    if argument(node, 3, "size_average") is not None or argument(node, 5, "reduce") is not None:
        raise MixesRowsError("a loss has the deprecated arguments size_average or reduce")


# Functions, operators and methods, by name. An operation in place is refused where it writes, by the caller.
ELEMENTWISE = frozenset(
    [
        "abs",
        "add",
        "addcmul",
        "and_",
        "bfloat16",
        "bool",
        "clamp",
        "clamp_min",
        "clone",
        "contiguous",
        "cos",
        "detach",
        "div",
        "double",
        "eq",
        "erf",
        "exp",
        "float",
        "ge",
        "gelu",
        "gt",
        "half",
        "hardtanh",
        "le",
        "leaky_relu",
        "logical_not",
        "lt",
        "maximum",
        "mask",
        "masked_fill",
        "minimum",
        "mish",
        "mul",
        "multiply",
        "ne",
        "neg",
        "not_",
        "or_",
        "pow",
        "quick_gelu",
        "reciprocal",
        "relu",
        "rsqrt",
        "rsub",
        "sigmoid",
        "silu",
        "sin",
        "softplus",
        "sqrt",
        "square",
        "sub",
        "subtract",
        "tanh",
        "to",
        "true_divide",
        "truediv",
        "type_as",
        "where",
        "zeros_like",
    ]
)
VIEWS = ("view", "reshape", "flatten", "unflatten")
_OF_CUT = frozenset(
    (*VIEWS, "bfloat16", "clone", "contiguous", "double", "float", "half", "to", "cross_entropy")
)
_RULES: Mapping[str, Callable[[Node, Batch], Any]] = {
    "dropout": _dropout,
    **dict.fromkeys(("mean", "sum", "var", "amax", "softmax", "log_softmax"), _reduction),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(("transpose", "swapaxes", "permute"), _permuted),
    "unsqueeze": _unsqueezed,
    "getitem": _item,
    **dict.fromkeys(("chunk", "split", "unbind"), _parts),
    **dict.fromkeys(("cat", "concat"), _joined),
    "expand": _expanded,
    "repeat_interleave": _repeated,
    "cross_entropy": _loss,
}
