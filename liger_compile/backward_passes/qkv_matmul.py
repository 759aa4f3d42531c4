"""qkv matmul fusion: one matmul where the gradients of q, k and v are packed.

In: a functional graph of aten operators, in which the backwards of rotary and norm_rotary are one node each. Out: the
same graph, where q, k and v are projections of one x, with an op of ops/packed.py instead of that node:

    grad_q @ Wq + grad_k @ Wk + grad_v @ Wv       packed @ [Wq; Wk; Wv]           the gradient of x
    grad_q^T @ x, grad_k^T @ x, grad_v^T @ x      packed^T @ x, in three parts    the gradients of the weights

The gradient of x is then rounded only once. The terms of the sum are no longer written and read. This saves, on an H100
(torch 2.11.0, bf16, 2026-11-26), 40 us per layer of Llama-3.2-1B, 4 x 2048 tokens, and 22 us of Qwen3-0.6B, 8 x 1024
(docs/benchmarks.md).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from liger_compile import ops  # noqa: F401 - registers what torch.ops.liger_compile has
from liger_compile.backward_passes.aten_graph import (
    RESHAPES,
    VIEWS,
    add,
    are_alike,
    before_widening,
    call,
    clone,
    erase_unused,
    is_sum,
    is_widening,
    mm,
    move_before,
    origin,
    result,
    slice_,
    tensor_of,
    terms_of,
)
from liger_compile.backward_passes.runner import Applied, Backward
from liger_compile.torch_internals.operators import schema_of
from liger_compile.torch_internals.tensors import storage_of

_aten, _ours = torch.ops.aten, torch.ops.liger_compile
# The backwards of q and k, and their versions with packed results. These take (dq, dk, matrix to pack beside them, axis
# of heads, and all other arguments), and return all other results too.
_PACKED = {
    _ours.rotary_backward_late.default: _ours.rotary_backward_packed.default,
    _ours.norm_rotary_backward_late.default: _ours.norm_rotary_backward_packed.default,
}
_READERS = (mm, _aten.sum.dim_IntList)  # accept a matrix with any row stride


class _Matrix(NamedTuple):
    """A gradient as its readers read it: (N, K), a row for each token."""

    # Its matmul with a weight: a term of the gradient of the weight's input.
    term: Node
    # By reader: the node that it reads, and whether that node is the transpose.
    reads: Mapping[Node, tuple[Node, bool]]

    @property
    def width(self) -> int:
        return tensor_of(self.term.args[0]).shape[1]

    @property
    def weight_gradient(self) -> Node | None:
        """The matmul of the transpose, if there is exactly one."""
        turned = [reader for reader, (_, is_turned) in self.reads.items() if is_turned]
        return turned[0] if len(turned) == 1 else None


def fuse_qkv_matmuls(backward: Backward) -> Iterator[Applied]:
    """Multiplies the gradients of q, k and v by their three weights in one matmul."""
    for target in _PACKED:
        for node in backward.graph.find_nodes(op="call_function", target=target):
            if applied := _fuse(backward.graph, node):
                yield applied


def _fuse(graph: Graph, backward: Node) -> Applied | None:
    heads_axis = _heads_axis(backward)
    found = [
        matrix
        for gradient in _gradients_of(backward)
        if heads_axis and (matrix := _matrix(gradient, *_laid_out(gradient, heads_axis)))
    ]
    if len(found) != 2:
        return None
    q, k = found
    summed = _summed_with(q.term)
    if k.term not in summed:
        return None
    first = min((*q.reads, *k.reads))  # Nodes compare by position
    others = [term for term in summed if term not in (q.term, k.term)]
    rest = next((matrix for matrix in map(_matrix_of, others) if _fits(matrix, q, first)), None)
    matrices = [q, k] if rest is None else [q, k, rest]
    if not _pays(matrices):
        return None

    text = f"the gradients of {len(matrices)} projections are one matmul"
    applied = Applied(backward, text, traffic=_elements_saved(matrices) * tensor_of(q.term).dtype.itemsize)
    beside = None if rest is None else rest.term.args[0]
    if rest is not None:
        reads = [reader for reader in rest.reads if reader > backward]
        first = min((first, *reads))
        move_before(first, beside)
    with graph.inserting_before(first):
        packed = _packed(graph, backward, beside, heads_axis)
    unused = [*backward.users, backward]
    bounds = [*itertools.pairwise((0, *itertools.accumulate(matrix.width for matrix in matrices)))]
    for matrix, bound in zip((q, k), bounds, strict=False):
        for reader, (read, is_turned) in matrix.reads.items():
            with graph.inserting_before(reader):
                part = call(graph, slice_, packed, 1, *bound)
                part = call(graph, _aten.permute.default, part, [1, 0]) if is_turned else part
            reader.replace_input_with(read, part)
            unused.append(read)
    unused += _fuse_terms(graph, packed, [matrix.term for matrix in matrices])
    gradients = [node for matrix in matrices if (node := matrix.weight_gradient)]
    is_one = all(node >= first and node.args[1] is gradients[0].args[1] for node in gradients)
    if len(gradients) == len(matrices) and is_one:
        _fuse_weight_gradients(graph, packed, gradients, bounds)
        unused += gradients
    erase_unused(graph, unused, backward.target)
    return applied


# Matching --------------------------------------------------------------------------------------------------


def _gradients_of(backward: Node) -> list[Node]:
    """Returns the gradients of q and k, if all sizes are known and their dtypes are equal; else an empty list."""
    dq, dk, *_ = backward.args
    of_q, of_k = result(backward, 0), result(backward, 1)
    if of_q is None or of_k is None or dq is None or dk is None:
        return []
    tensors = [tensor_of(node) for node in (dq, dk, of_q, of_k)]
    are_known = all(isinstance(size, int) for tensor in tensors for size in tensor.shape)
    is_one = tensor_of(of_q).dtype == tensor_of(of_k).dtype and all(tensor.dim() == 4 for tensor in tensors)
    return [of_q, of_k] if are_known and is_one else []


def _heads_axis(backward: Node) -> int:
    """Returns the axis that the cos and sin tables broadcast over: 1 or 2, or 0 if there is none."""
    target: Any = backward.target
    names = [argument.name for argument in schema_of(target).arguments]
    cos = tensor_of(backward.args[names.index("cos")])
    sizes = (*(1,) * (4 - cos.dim()), *cos.shape)
    return next((axis for axis in (1, 2) if sizes[axis] == 1), 0)


def _laid_out(gradient: Node, heads_axis: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Returns a tensor without data with the layout of a (tokens, channels) matrix, and the shape of that matrix."""
    value = torch.empty_like(tensor_of(gradient), device="meta")
    rows = value.transpose(1, 2).contiguous() if heads_axis == 1 else value.contiguous()
    batch, tokens, heads, channels = rows.shape
    return rows.transpose(1, 2) if heads_axis == 1 else rows, (batch * tokens, heads * channels)


def _matrix(
    node: Node, laid_out: torch.Tensor, shape: tuple[int, ...], is_whole: bool = True
) -> _Matrix | None:
    """Returns `node` as a matrix of that shape, as if its memory had the layout of `laid_out`.

    Readers in other layouts are not allowed if `is_whole`, else they are ignored.
    """
    reads: dict[Node, tuple[Node, bool]] = {}
    views = [(node, laid_out)]
    for view, value in views:
        is_plain = value.shape == shape and value.is_contiguous()
        is_turned = value.shape == shape[::-1] and value.t().is_contiguous()
        for reader in view.users:
            if (seen := _viewed(reader, value)) is not None:
                views.append((reader, seen))
            elif reader not in reads and (
                (is_plain and reader.target in _READERS)
                or (is_turned and reader.target is mm and reader.args[0] is view)
            ):
                reads[reader] = view, not is_plain
            elif is_whole:
                return None
    terms = [
        reader
        for reader, (read, is_turned) in reads.items()
        if not is_turned and reader.target is mm and reader.args[0] is read
    ]
    return _Matrix(terms[0], reads) if len(terms) == 1 else None


def _viewed(reader: Node, value: torch.Tensor) -> torch.Tensor | None:
    """Returns the result of a view, or of a copy that changes nothing, for the value; None for other operators."""
    if reader.target is clone:
        return value if value.is_contiguous() else None
    if reader.target not in VIEWS:
        return None
    seen = _aten.reshape.default if reader.target in RESHAPES else reader.target
    seen = seen(value, *reader.args[1:])
    return seen if storage_of(seen) == storage_of(value) else None


def _matrix_of(term: Node) -> _Matrix | None:
    node: Any = term.args[0]
    laid_out = torch.empty_like(tensor_of(node), device="meta")
    return _matrix(node, laid_out, (*laid_out.shape,), is_whole=False) if laid_out.is_contiguous() else None


def _fits(rest: _Matrix | None, q: _Matrix, first: Node) -> bool:
    """Returns whether `rest`, usually the gradient of v, can be packed: it is computed in time and is not large."""
    if rest is None or rest.width > q.width or tensor_of(rest.term).dtype != tensor_of(q.term).dtype:
        return False
    return all(node < first for node in origin(rest.term.args[0])[-1:])


def _summed_with(term: Node) -> list[Node]:
    """Returns the matmuls that are summed with this one, with it included; each is read by the sum alone."""
    root = node = term
    while len(node.users) == 1:
        (user,) = node.users
        if is_sum(user):
            root = user
        elif user.target not in RESHAPES and not is_widening(user):
            break
        node = user
    summands = root.args if is_sum(root) else ()
    products = (_only_read_here(node) for summand in summands for node in terms_of(summand))
    return [node for node in products if node and node.target is mm and are_alike(node, term)]


def _only_read_here(node: Node) -> Node | None:
    """Returns the node that this one is a view of, if neither it nor a view has another reader."""
    chain = before_widening(node)
    return chain[-1] if all(len(node.users) == 1 for node in chain) else None


def _pays(matrices: Sequence[_Matrix]) -> bool:
    """Returns whether the fusion moves fewer elements."""
    return _elements_saved(matrices) > 0


def _elements_saved(matrices: Sequence[_Matrix]) -> int:
    """Returns the elements of terms no longer written and read, less those of the weights and the matrix copied."""
    rows, hidden = tensor_of(matrices[0].term).shape
    terms = 2 * (len(matrices) - 1) * rows * hidden
    weights = 2 * hidden * sum(matrix.width for matrix in matrices)
    _, _, *beside = matrices
    copied = sum(2 * rows * matrix.width for matrix in beside)
    return terms - weights - copied


# Rewriting -------------------------------------------------------------------------------------------------


def _packed(graph: Graph, backward: Any, rest: Any, heads_axis: int) -> Node:
    dq, dk, *others = backward.args
    made = call(graph, _PACKED[backward.target], dq, dk, rest, heads_axis, *others)
    if isinstance(tensor_of(made), torch.Tensor):
        return made
    packed, *more = (call(graph, operator.getitem, made, which) for which in range(len(tensor_of(made))))
    for which, new in enumerate(more, start=2):
        for old in [user for user in backward.users if user.args[1] == which]:
            old.replace_all_uses_with(new)
    return packed


def _fuse_terms(graph: Graph, packed: Node, terms: Sequence[Node]) -> list[Node]:
    """Replaces the sum of the terms by one matmul, and returns the nodes that become unused."""
    last = max(terms)
    unused = [last]
    with graph.inserting_before(last):
        weight = call(graph, _aten.cat.default, [term.args[1] for term in terms])
        product = call(graph, mm, packed, weight)
    last.replace_all_uses_with(product)
    for term in terms:
        if term is not last:
            summand, (reader,) = term, term.users
            while reader.target is not add:
                summand, (reader,) = reader, reader.users
            (other,) = (addend for addend in reader.all_input_nodes if addend is not summand)
            reader.replace_all_uses_with(other)
            graph.erase_node(reader)
            unused.append(summand)
    return unused


def _fuse_weight_gradients(
    graph: Graph,
    packed: Node,
    gradients: Sequence[Node],
    bounds: Sequence[tuple[int, int]],
) -> None:
    with graph.inserting_before(min(gradients)):
        turned = call(graph, _aten.permute.default, packed, [1, 0])
        whole = call(graph, mm, turned, gradients[0].args[1])
        for gradient, bound in zip(gradients, bounds, strict=True):
            gradient.replace_all_uses_with(call(graph, slice_, whole, 0, *bound))
