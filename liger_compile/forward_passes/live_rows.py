"""Computes the live rows of a padded batch only: rows that are no padding, and rows with a label.

    graph of (B, T) rows -> plan: proof that its operations are row-wise -> for each size R: a graph of R rows
                                                                            (pack_live_rows.py)

Between the embedding and the loss, operations on tensors whose first dimensions are the batch and the token run on
gathered rows, (1, R, ...) in place of (B, T, ...). Attention runs on all rows, so queries, keys and values are put back
before it, and its result is gathered after it. The rows that are left out are padding without a label: no label reads
them, and attention gives their keys the weight zero. `row_rules.py` has the proof for each operation.

A call counts its live rows by one read on the host. The first number, rounded up, has a graph of its own, and one graph
with a symbolic number of rows serves all other numbers, so that an epoch compiles few graphs. If B or T are symbolic,
all calls run the symbolic graph. The slots behind the live rows repeat a live row, have no label, and give no gradient.
Rows with a label come first: head and loss run on as many rows as have labels, which the same read counts.

In: a captured Dynamo graph. Out: a plan, or a sentence why not; the callable that dispatches on inputs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from liger_compile.forward_passes import specialize
from liger_compile.forward_passes.flatten import checkpoints, flattened
from liger_compile.forward_passes.late_rows import (
    Found,
    Returned,
    ancestors,
    examples_of,
    returned_rows,
)
from liger_compile.forward_passes.logits import Logits
from liger_compile.forward_passes.row_rules import (
    BY_BATCH,
    ELEMENTWISE,
    HIDING,
    Batch,
    Layout,
    MixesRowsError,
    argument,
    is_size,
    layout_of,
    name_of,
    shape_of,
)
from liger_compile.graphs.aliasing import SUBGRAPH_OPS, Mutations
from liger_compile.graphs.regions import Regions
from liger_compile.terms.attention import MEAN, OTHER, PADDED, PADDED_AND_MORE, ZEROS
from liger_compile.terms.build import Terms
from liger_compile.terms.term import MADE_HERE, Size, Term
from liger_compile.torch_internals.dispatch import is_traceable_wrapper_subclass
from liger_compile.torch_internals.fake_tensors import FakeTensor, mode_of
from liger_compile.torch_internals.shapes import Places, new_size, number_of, symbols_of

SIZES = 8  # an eighth of the rows is the unit of a graph's number of rows; fewer rows than that to leave out do not pay
FINE_SIZES = 64  # the unit of a symbolic number of rows: on average a 128th too many rows
MULTIPLE = 8  # of a unit
IGNORED = -100
# Operations without terms that draw no numbers.
REPEATABLE = ("embedding", "full_like", "ones_like", "pad", "roll", "tensor")


class _RefusedError(Exception):
    """Raised with a sentence that explains why padded rows are computed."""


@dataclass(frozen=True, eq=False)
class Live:
    """The live rows of a call.

    Args:
        size: R, the number of slots, for a graph in which it is symbolic; None: a constant of the graph.
        index: (R,) the row in each slot.
        slots: (B, T) the slot of each row; -1 for a row that is left out.
        labeled: () on the CPU: the number of first slots that may have labels; None if that is not counted.
    """

    size: int | None
    index: Tensor
    slots: Tensor
    labeled: Tensor | None = None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The further inputs of the graph."""
        return tuple(x for x in (self.size, self.index, self.slots, self.labeled) if x is not None)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a call, of which nothing has been read on the host.

    Args:
        counts: (3,) the numbers of live rows, of rows that need the graph of all rows, and of rows with labels.
        index: (B * T,) the row in each slot; the slots behind the live rows repeat a row.
        slots: as in `Live`.
    """

    counts: Tensor
    index: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Labels:
    """Where the labels of a loss are.

    Args:
        ignored: the label that the loss ignores.
        cut: the tokens without a label at the front and at the back of each sequence.
    """

    ignored: int
    cut: tuple[int, int]

    def of_rows(self, labels: Tensor, batch: int, length: int) -> Tensor:
        """Returns the labels (B, T) of all rows; the loss ignores those of tokens that were cut."""
        by_batch = labels.reshape(batch, length - sum(self.cut))
        return torch.nn.functional.pad(by_batch, self.cut, value=self.ignored) if any(self.cut) else by_batch


@dataclass(frozen=True)
class Plan:
    """A graph whose padded rows need not be computed.

    Args:
        gm: the captured graph.
        layouts: the layouts of the nodes that have rows, of the graph and of its checkpointed layers.
        size: B and T.
        ids: (B, T) in the trace of the graph.
        num_rows: B * T in the first call.
        flags: computes token ids, the flags of keys, and the labels of each loss, from the inputs of the graph.
        from_flags: computes (B, T) or (1, T) flags of keys from the second output of `flags`.
        losses: where the labels of each loss are.
        hides_strays: whether a row that is padding, has a label, and sees no key, is zero as in eager code.
        returned: the outputs that have rows, and how they are filled.
        counts_labels: head and loss run on the rows with labels only. Needs one loss.
        takes_any_number: one graph may have a symbolic number of slots.
    """

    gm: GraphModule
    layouts: dict[Node, Layout | tuple[Layout, ...]]
    size: tuple[Size, Size]
    ids: Tensor
    num_rows: int
    flags: GraphModule
    from_flags: Callable[[Tensor], Tensor]
    losses: tuple[Labels, ...]
    hides_strays: bool
    returned: Found
    counts_labels: bool
    takes_any_number: bool

    @property
    def examples(self) -> list[Any]:
        """The inputs of the captured graph in its trace."""
        return examples_of(self.gm)

    @property
    def is_symbolic(self) -> bool:
        """Whether B or T is symbolic."""
        return not all(isinstance(size, int) for size in self.size)

    def rows(self, args: Sequence[Any]) -> Rows | None:
        """Returns the rows of a call; None if the call needs another graph."""
        if self.returned.is_unwanted() or any(isinstance(arg, FakeTensor) for arg in args):
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        with torch.no_grad():
            return self._rows(*self.flags(*args))

    def _rows(self, ids: Tensor, flags: Tensor, *labels: Tensor) -> Rows | None:
        batch, length = ids.shape
        if any(length <= sum(loss.cut) for loss in self.losses):
            return None
        present = self.from_flags(flags).expand(batch, length)
        labeled = torch.zeros_like(present)
        for label, loss in zip(labels, self.losses, strict=True):
            labeled = labeled | (loss.of_rows(label, batch, length) != loss.ignored)
        live, stray = present | labeled, labeled & ~present
        if self.hides_strays:  # before the first key of its row, such a row sees no key
            stray = stray & (present.cumsum(1) > 0)
        counts = torch.stack((live.sum(), stray.sum(), labeled.sum()))
        later = live.logical_not().to(torch.int8) * 2
        if self.counts_labels:
            later += labeled.logical_not()
        order = torch.argsort(later.view(-1), stable=True)
        numbers = torch.arange(order.numel(), device=order.device)
        index = torch.where(numbers < counts[0], order, order[:1])
        slots = torch.empty_like(order).scatter_(0, order, numbers).view(batch, length)
        return Rows(counts, index, torch.where(live, slots, -1))

    @property
    def num_static(self) -> int:
        """How many graphs have a constant number of slots: all, if a CUDA graph is recorded for each number."""
        return 0 if self.is_symbolic else 1 if self.takes_any_number else SIZES

    def live(self, rows: Rows, slots: Slots, num_labeled: int) -> Live:
        """Returns the live rows of a call in these slots."""
        labeled = torch.tensor(num_labeled, device="cpu") if self.counts_labels else None
        return Live(
            slots.number if slots.is_symbolic else None, rows.index[: slots.number], rows.slots, labeled
        )

    def example(self, size: int | None) -> Live:
        """Returns live rows in the trace of the graph, in so many slots; None: their number is symbolic."""
        mode: Any = mode_of(self.ids)
        number: Any = size or new_size(mode.shape_env, self.num_rows // 2 + 2, "live_rows")
        empty = partial(torch.empty, dtype=torch.int64)
        with mode:
            index, slots = (empty(shape, device=self.ids.device) for shape in ((number,), self.ids.shape))
            labeled = empty((), device="cpu") if self.counts_labels else None
        return Live(None if size else number, index, slots, labeled)


class Slots(NamedTuple):
    """The number of slots of a call, and whether it is symbolic in the graph."""

    number: int
    is_symbolic: bool


def num_slots(count: int, num_rows: int, sizes: int) -> int | None:
    """Returns the number of slots for so many live rows; None if it does not pay to leave the others out.

    Args:
        sizes: SIZES or FINE_SIZES.
    """
    unit, coarse = (math.ceil(num_rows / each / MULTIPLE) * MULTIPLE for each in (sizes, SIZES))
    found = max(math.ceil(count / unit), 1) * unit
    return found if found <= num_rows - coarse else None


def variant(plan: Plan, size: int | None) -> specialize.Variant:
    """Returns the name and the note of the graph of a number of slots; None: of any number."""
    if size is None:
        return specialize.Variant(
            "live rows",
            "padding is not computed; one graph for all numbers of live rows (counted on every call, one device sync)",
        )
    rows = plan.num_rows
    left_out = 100 * (rows - size) // rows
    return specialize.Variant(
        f"{size} of {rows} rows",
        f"{left_out}% of the rows are padding: not computed (checked on every call, one device sync); calls with other "
        "numbers of live rows use another graph, which is compiled when a call first needs it",
    )


# The proof


def plan(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    logits_of: Callable[[Graph, Terms], Sequence[Logits]],
    returned: Returned,
    *,
    has_cudagraphs: bool,
    strict: bool,
) -> Plan | str | None:
    """Returns the plan of a graph, or why its padded rows are computed, in a sentence; None if it has no padding mask.

    Args:
        logits_of: returns the outputs of a graph that are logits.
        returned: how outputs that have rows are returned.
        has_cudagraphs: CUDA graphs are recorded, which have one number of slots and no inputs on the CPU.
    """
    try:
        return _plan(gm, example_inputs, logits_of, returned, has_cudagraphs, strict)
    except (_RefusedError, MixesRowsError) as why:
        return str(why)


def _plan(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    logits_of: Callable[[Graph, Terms], Sequence[Logits]],
    returned: Returned,
    has_cudagraphs: bool,
    strict: bool,
) -> Plan | None:
    flat, origin = _flattened(gm)
    graph, mutations, regions = flat.graph, Mutations(flat.graph), Regions(flat.graph)
    _check_graph(flat, regions)
    if specialize.is_symbolic(flat):
        _check_symbolic_inputs(flat, mutations, has_cudagraphs)
    terms = Terms(graph, mutations, (), regions, strict=strict)
    found = _masks(terms)
    if found is None:
        return None
    masks, size = found
    keys = masks[0].args[0]
    batch = Batch(size, {}, terms.of, keys)
    aside = _lay_out(graph, batch, mutations, regions)
    losses = [node for node in graph.nodes if is_loss(node, batch.of)]
    if not batch.of:
        raise _RefusedError("its token ids are not embedded in this graph")
    if not losses:
        raise _RefusedError("the graph has no loss with a label for each row")
    if any(node in origin and origin[node].graph is not gm.graph for node in aside):
        raise _RefusedError(next(iter(aside.values())))
    num_rows, outputs = _returned(
        flat, example_inputs, batch, aside, logits_of(graph, terms), terms, returned
    )
    flags, steps = _derived(keys, terms)
    targets = [argument(loss, 1, "target") for loss in losses]
    ids = next(argument(node, 0, "input") for node in batch.of if _is_embedding(node, batch))
    return Plan(
        gm,
        {origin[node]: layout for node, layout in batch.of.items()},
        size,
        ids.meta["example_value"],
        num_rows,
        _computing((ids, flags, *targets), terms),
        steps,
        tuple(_labels(loss, batch) for loss in losses),
        all(mask.op == PADDED[ZEROS] and mask.consts[0] in ("causal", "window") for mask in masks),
        outputs,
        not has_cudagraphs and len(losses) == 1,
        not has_cudagraphs,
    )


def _flattened(gm: GraphModule) -> tuple[GraphModule, Mapping[Node, Node]]:
    """Returns the graph without checkpointed layers, and the node of `gm` or of a layer that each node copies."""
    if not any(checkpoints(gm)):
        return gm, {node: node for node in gm.graph.nodes}
    try:
        return flattened(gm)
    except ValueError as why:
        raise _RefusedError(str(why)) from why


def _check_graph(gm: GraphModule, regions: Regions) -> None:
    if any(name_of(node) in SUBGRAPH_OPS for node in gm.graph.nodes):
        raise _RefusedError("the graph calls subgraphs")
    if regions.why_uncertain:
        raise _RefusedError(regions.why_uncertain)


def _check_symbolic_inputs(gm: GraphModule, mutations: Mutations, has_cudagraphs: bool) -> None:
    """Raises unless the inputs can be made again, with symbols of another trace."""
    places = Places(examples_of(gm))
    for node in gm.graph.nodes:
        if not places.have(node.meta.get("example_value")) and not all(map(_reads_no_number, node.users)):
            raise _RefusedError(f"{node.name} is a number of a call and no size of an input")
    if has_cudagraphs:
        raise _RefusedError("its sizes are symbolic, and a CUDA graph has one number of rows")
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), examples_of(gm), strict=True):
        if not symbols_of(value) or isinstance(value, torch.SymInt):
            continue
        if is_traceable_wrapper_subclass(value) or not mutations.is_clean(node):
            raise _RefusedError(f"{node.name} has symbolic sizes and is written, or a tensor subclass")


def _reads_no_number(node: Node) -> bool:
    """Returns whether a node has a number as an argument and does not read it, as the kind of a norm without a norm."""
    return name_of(node) == "embedding" and argument(node, 3, "max_norm") is None


def _masks(terms: Terms) -> tuple[list[Term], tuple[Size, Size]] | None:
    """Returns the masks of padding of the graph's attention, and B and T; None if no attention has such a mask."""
    found = list(dict.fromkeys(filter(_is_attention, terms.of.values())))
    masks = [term.args[0] for term in found if term.args[0].op in HIDING]
    if not masks:
        return None
    for mask in masks:
        _check_rows_without_keys(mask)
    q = next(term.args[1] for term in found if term.args[0] is masks[0])
    batch, length = q.shape[0], q.shape[2]
    if length == 1:
        raise _RefusedError("its rows have one token")
    return masks, (batch, length)


def _check_rows_without_keys(mask: Term) -> None:
    """Raises unless rows that see no key are zero, or are padding that is finite: their values spread to all rows."""
    if mask.op in (PADDED[OTHER], PADDED_AND_MORE[OTHER]):
        raise _RefusedError("its padding mask adds -inf to scores that are written out, which gives NaN")
    sees_itself = mask.op != PADDED_AND_MORE[MEAN] and (
        mask.consts[1:] in ((), (None,)) or mask.consts[1] >= 1
    )
    if mask.op not in (PADDED[ZEROS], PADDED_AND_MORE[ZEROS]) and not sees_itself:
        raise _RefusedError(
            "its mask may hide all keys of a token that is no padding, which gives a mean of all values"
        )


def _is_attention(term: Any) -> bool:
    return isinstance(term, Term) and term.op == "attention"


def _lay_out(graph: Graph, batch: Batch, mutations: Mutations, regions: Regions) -> dict[Node, str]:
    """Finds the layout of every node that depends on the rows of an embedding.

    Returns:
        The nodes that no loss depends on and that may mix rows, each with a sentence why.
    """
    needed = ancestors([node for node in graph.nodes if name_of(node) == "cross_entropy"])
    aside: dict[Node, str] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        has_rows = any(arg in batch.of or arg in aside for arg in node.all_input_nodes)
        of_aside = any(arg in aside for arg in node.all_input_nodes)
        if (is_size(node) and not of_aside) or not (has_rows or _is_embedding(node, batch)):
            continue
        if not mutations.is_clean(node):
            raise _RefusedError(f"{node.name} is written in place")
        if is_traceable_wrapper_subclass(node.meta["example_value"]):
            raise _RefusedError(f"{node.name} is a tensor subclass")
        try:
            _lay_out_node(node, batch, aside, has_rows)
        except MixesRowsError as why:
            if node in needed:
                raise
            aside[node] = str(why)
    # A value is gathered in the modes in which it was computed.
    found_in = (regions.of[node] for node in batch.of)
    modes = {(region.grad_mode, region.inference_mode, region.transforms) for region in found_in}
    if len(modes) > 1:
        raise _RefusedError("some rows are computed without gradients, or under a transform")
    return aside


def _lay_out_node(node: Node, batch: Batch, aside: Mapping[Node, str], has_rows: bool) -> None:
    for arg in node.all_input_nodes:
        if arg in aside:
            raise MixesRowsError(aside[arg])
    found = layout_of(node, batch) if has_rows else Layout(BY_BATCH)
    if found is not None:
        batch.of[node] = found


def _returned(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    batch: Batch,
    aside: Mapping[Node, str],
    logits: Sequence[Logits],
    terms: Terms,
    returned: Returned,
) -> tuple[int, Found]:
    """Returns the number of rows in this call, and how the outputs are filled that depend on rows."""
    examples = examples_of(gm)
    numbers = Places(examples).numbers(examples)
    num_rows = number_of(math.prod(batch.size), numbers)
    outputs = [node for node in gm.graph.output_node().all_input_nodes if node in batch.of or node in aside]
    for node in outputs:
        if (
            node in aside and number_of(math.prod(shape_of(node)), numbers) < num_rows
        ):  # such as a loss of all rows, which is read
            raise _RefusedError(aside[node])
    found = returned_rows(gm, example_inputs, outputs, logits, terms, returned, num_rows)
    if isinstance(found, str):
        raise _RefusedError(found)
    for node in ancestors(outputs if found.late else ()) - batch.of.keys():
        _check_repeatable(node, terms)
    return num_rows, found


def _is_embedding(node: Node, batch: Batch) -> bool:
    """Returns whether a node looks up a row for each token; its gradient must not count the tokens."""
    if name_of(node) != "embedding" or argument(node, 3, "max_norm") is not None:
        return False
    if argument(node, 5, "scale_grad_by_freq", False) or argument(node, 6, "sparse", False):
        return False
    ids = argument(node, 0, "input")
    return shape_of(ids) == batch.size and not ids.meta["example_value"].dtype.is_floating_point


def is_loss(node: Node, layouts: Mapping[Node, Any]) -> bool:
    """Returns whether a node is a cross-entropy of rows."""
    return name_of(node) == "cross_entropy" and argument(node, 0, "input") in layouts


def _labels(loss: Node, batch: Batch) -> Labels:
    layout = batch.layout(argument(loss, 0, "input"))
    assert layout is not None, "a loss reads rows"
    return Labels(argument(loss, 4, "ignore_index", IGNORED), layout.cut)


def _derived(keys: Term, terms: Terms) -> tuple[Node, Callable[[Tensor], Tensor]]:
    found = terms.derive(keys)
    if found is None:
        raise _RefusedError("the flags of its padding are no value of the graph")
    node, steps = found

    def derive(tensor: Tensor) -> Tensor:
        for step in steps:
            tensor = step(tensor)
        return tensor

    return node, derive


def _computing(nodes: Sequence[Node], terms: Terms) -> GraphModule:
    """Returns a module that computes these nodes from the inputs of the graph."""
    graph, copies = Graph(), {}
    source = nodes[0].graph
    needed = ancestors(nodes)
    for node in source.nodes:
        if node.op == "placeholder" or node in needed:
            _check_repeatable(node, terms)
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta.clear()
    graph.output(tuple(copies[node] for node in nodes))
    return GraphModule(source.owning_module or torch.nn.Module(), graph)


def _check_repeatable(node: Node, terms: Terms) -> None:
    """Raises unless a node gives the same values when it runs again before the graph."""
    term = terms.of[node]
    is_opaque = isinstance(term, Term) and term.op == "leaf" and MADE_HERE in term.consts
    is_opaque = is_opaque and name_of(node) not in (*ELEMENTWISE, *REPEATABLE)
    if not terms.mutations.is_clean(node) or (node.op != "placeholder" and is_opaque):
        raise _RefusedError(
            f"its padding, its labels or an output depend on {name_of(node)}, which is not known to repeat"
        )


# The dispatch


class Graphs:
    """The graphs of live rows, by their number of slots."""

    def __init__(self, unused: Sequence[Callable[..., Any]], other: Callable[..., Any] | None) -> None:
        """Takes graphs that are compiled for the number of slots of their first call, and one for all numbers."""
        self._of: dict[int, Callable[..., Any]] = {}
        self._unused, self._other = list(unused), other
        self._lock = threading.Lock()

    def chosen(self, count: int, num_rows: int) -> tuple[Callable[..., Any], Slots] | None:
        """Returns the graph for so many live rows, and its slots; None if it does not pay to leave other rows out."""
        coarse, fine = (num_slots(count, num_rows, sizes) for sizes in (SIZES, FINE_SIZES))
        if coarse is not None:
            with self._lock:
                if coarse not in self._of and self._unused:
                    self._of[coarse] = self._unused.pop()
            if coarse in self._of:
                return self._of[coarse], Slots(coarse, is_symbolic=False)
        if fine is None or self._other is None:
            return None
        return self._other, Slots(fine, is_symbolic=True)


def _read_counts(rows: Rows, answer: Tensor | None) -> list[int]:
    """Returns the counts of rows and the answer about masks, in the only read on the host of a call."""
    if answer is None:
        return [*rows.counts.tolist(), False]
    return torch.cat((rows.counts, answer.to(rows.counts)[None])).tolist()


def dispatch(plan: Plan, graphs: Graphs, others: specialize.Dispatch) -> Callable[..., Any]:
    """Returns a callable that runs the graph for the live rows of a call, or the graphs of all rows: `others`."""

    def call(*args: Any) -> Any:
        rows = plan.rows(args)
        if rows is None:
            return others(*args)
        count, num_strays, num_labeled, is_special = _read_counts(rows, others.answer(args))
        chosen = None if num_strays else graphs.chosen(count, rows.slots.numel())
        if chosen is None:
            return others.run(args, is_special=bool(is_special))
        plan.returned.budget.called()
        graph, slots = chosen
        return graph(*args, *plan.live(rows, slots, num_labeled).inputs)

    return call
