"""Makes the graph of the live rows of a padded batch, for a number of rows.

Each node with rows computes packed rows, (1, R, ...), if batch and token are the first dimensions of its operands and
of its result. Other nodes, between the projections and attention, compute all rows. The ops of `ops/live_rows.py` pack
and unpack in between. Outputs with all rows are None: `late_rows.py` fills them.

In: a plan, with the captured graph and the layout of each node that has rows. Out: a graph with the inputs of the
captured graph, and those of `Live.inputs`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from liger_compile.forward_passes import specialize
from liger_compile.forward_passes.flatten import checkpoints, paired
from liger_compile.forward_passes.late_rows import ancestors
from liger_compile.forward_passes.live_rows import Labels, Live, Plan, is_loss
from liger_compile.forward_passes.row_rules import (
    BY_BATCH,
    FLAT,
    VIEWS,
    Layout,
    argument,
    is_size,
    name_of,
    shape_of,
    shapes_of,
)
from liger_compile.graphs.aliasing import handed_to
from liger_compile.graphs.guards import no_guards
from liger_compile.graphs.regions import Region, Regions
from liger_compile.ops import live_rows as ops
from liger_compile.ops.linear_cross_entropy import linear_cross_entropy
from liger_compile.terms.term import Size, size_of
from liger_compile.torch_internals.dispatch import enable_python_dispatcher
from liger_compile.torch_internals.fake_tensors import mode_of
from liger_compile.torch_internals.fx import without_source
from liger_compile.torch_internals.operators import overload_of

SIZE, INDEX, SLOTS, LABELED = (
    "live_size",
    "live_index",
    "live_slots",
    "live_labeled",
)  # the fields of Live, as inputs
_PACK, _UNPACK, _LABELS = map(overload_of, (ops.pack_rows, ops.unpack_rows, ops.pack_labels))
_LOSS = overload_of(linear_cross_entropy)


def packed(plan: Plan, live: Live) -> GraphModule:
    """Returns a copy of the graph that computes live rows, with more inputs: those of `live`, values in its trace."""
    module = specialize.copied(plan.gm)
    copies = dict(paired(plan.gm, module))
    layouts = {copies[node]: layout for node, layout in plan.layouts.items()}
    _leave_out(module.graph, plan.returned.positions)
    with no_guards(plan.ids):
        _Packer(module, layouts, plan, live).run()
    return module


def _leave_out(graph: Graph, positions: Collection[int]) -> None:
    """Returns None at these positions, and erases what only these outputs depend on, which writes nothing."""
    output = graph.output_node()
    values: Any = output.args[0]
    output.args = (tuple(None if at in positions else value for at, value in enumerate(values)),)
    for node in sorted(ancestors([values[at] for at in positions]), reverse=True):
        if not node.users and node.op in ("call_function", "call_method"):
            graph.erase_node(node)


class _Packer:
    """Rewrites a graph in place. Each node with rows computes packed rows if its rows come first, else all rows."""

    def __init__(
        self,
        module: GraphModule,
        layouts: dict[Node, Layout | tuple[Layout, ...]],
        plan: Plan,
        live: Live,
        calls: Sequence[Region] = (),
    ) -> None:
        """Takes the layouts of all graphs. `calls`: for a checkpointed layer, the region of its call."""
        self.module, self.graph, self.layouts, self.plan = module, module.graph, layouts, plan
        self.batch, self.live = plan.size, live
        self.size = size_of(live.index.shape[0])
        self.regions = Regions(module.graph, calls)
        self.losses, self.is_layer = iter(plan.losses), bool(calls)
        self.packed: dict[Node, Node] = {}  # the nodes with packed rows, by node of the graph
        self.whole: dict[Node, Node] = {}  # the nodes with all rows
        self._flat_slots: Node | None = None

    def run(self) -> None:
        nodes = list(self.graph.nodes)
        bodies = dict(checkpoints(self.module))
        self.index, self.slots = self._inputs()
        for node in nodes:
            if node in bodies:
                self._rewrite_checkpoint(node, bodies[node])
            elif node in self.packed or node in self.whole:
                continue
            elif node in self.layouts:
                self._rewrite(node)
            elif is_loss(node, self.layouts):
                self._rewrite_loss(node)
            elif is_size(node):  # of all rows, which are not computed for it
                node.args, node.kwargs = map_arg((node.args, node.kwargs), self.all_rows)
        for node in reversed(nodes):
            if node in self.layouts and not node.users and self.packed.get(node, node) is not node:
                self.graph.erase_node(node)  # a slice that packed rows need not take
        self.graph.lint()
        self.module.recompile()

    def _inputs(self) -> tuple[Node, Node]:
        last = self.graph.find_nodes(op="placeholder")[-1]
        of_layer = ((INDEX, self.live.index), (SLOTS, self.live.slots))
        given = ((SIZE, self.live.size), *of_layer, (LABELED, self.live.labeled))
        made = {}
        for name, example in of_layer if self.is_layer else given:
            if example is None:
                continue
            with self.graph.inserting_after(last):
                made[name] = self.graph.placeholder(name)
            self.regions.of[made[name]] = self.regions.of[last]
            last = made[name]
            without_source(last)
            last.meta["example_value"] = example
        return made[INDEX], made[SLOTS]

    def _rewrite_checkpoint(self, call: Node, body: GraphModule) -> None:
        """Makes a checkpointed layer take and return packed rows where they come first."""
        layer = _Packer(body, self.layouts, self.plan, self.live, [self.regions.of[call]])
        placeholders = body.graph.find_nodes(op="placeholder")
        operands: list[Any] = list(handed_to(call, len(placeholders)) or ())
        if self.layouts.keys().isdisjoint((*operands, *body.graph.nodes)):
            return
        for at, (placeholder, operand) in enumerate(zip(placeholders, operands, strict=True)):
            if operand in self.layouts:
                operands[at] = layer.take(placeholder, self, operand)
        given = call.args[: len(call.args) - len(operands)]
        layer.run()
        results = layer.give()
        call.args = (*given, *operands, self.index, self.slots)
        call.meta["example_value"] = tuple(result.meta["example_value"] for result, _ in results)
        for user in call.users:
            result, layout = results[user.args[1]]  # pyright: ignore[reportArgumentType, reportCallIssue]
            user.meta["example_value"] = result.meta["example_value"]
            if layout is not None:
                self.layouts[user] = layout
                self._own(layout)[user] = user

    def _own(self, layout: Layout) -> dict[Node, Node]:
        """Returns where a node that comes from another graph is: with packed rows, or with all rows."""
        return self.packed if layout.is_packable else self.whole

    def take(self, placeholder: Node, caller: _Packer, operand: Node) -> Node:
        """Declares the rows of a placeholder, and returns the operand that the caller passes to it."""
        layout = caller.layouts[operand]
        assert isinstance(layout, Layout), "an operand of a layer is one tensor"
        self.layouts[placeholder] = layout
        self._own(layout)[placeholder] = placeholder
        given = caller.packed_rows(operand) or caller.all_rows(operand)
        placeholder.meta["example_value"] = given.meta["example_value"]
        return given

    def give(self) -> list[tuple[Node, Layout | None]]:
        """Returns packed rows where they come first, and returns all results with their layouts."""
        output = self.graph.output_node()
        results: Any = output.args[0]
        found, layouts = list(results), [self.layouts.get(node) for node in results]
        for at, layout in enumerate(layouts):
            if layout is not None:
                found[at] = self.packed_rows(results[at]) or self.all_rows(results[at])
        output.args = (tuple(found),)
        self.module.recompile()
        return [
            (node, layout if isinstance(layout, Layout) else None)
            for node, layout in zip(found, layouts, strict=True)
        ]

    def _rewrite(self, node: Node) -> None:
        layout = self.layouts[node]
        if self._is_cut_here(node):  # in packed rows, the labels of the tokens that were cut are ignored
            (source,) = node.all_input_nodes
            rows = self.packed_rows(source)
            assert rows is not None, "rows that are cut come first"
            self.packed[node] = rows
            return
        is_packable = all(one.is_packable for one in (layout if isinstance(layout, tuple) else (layout,)))
        rows = [arg for arg in node.all_input_nodes if arg in self.layouts]
        if is_packable and all(self._is_packed(arg) for arg in rows):
            self._pack_operation(node, layout)
            return
        node.args, node.kwargs = map_arg((node.args, node.kwargs), self.all_rows)
        self.whole[node] = node

    def _is_cut_here(self, node: Node) -> bool:
        layout = self.layouts[node]
        sources = [self.layouts[arg] for arg in node.all_input_nodes if arg in self.layouts]
        is_cut = [isinstance(one, Layout) and any(one.cut) for one in (layout, *sources)]
        return is_cut[0] and not any(is_cut[1:])

    def _is_packed(self, node: Node) -> bool:
        return self.packed_rows(node) is not None

    def packed_rows(self, node: Node) -> Node | None:
        """Returns the node with the packed rows of a node; None if its rows do not come first."""
        layout = self.layouts[node]
        if node not in self.packed and isinstance(layout, Layout) and layout.is_packable:
            self.packed[node] = self._gathered(node, layout)
        return self.packed.get(node)

    def all_rows(self, node: Node) -> Node:
        """Returns the node with all rows of a node, whether it has rows or not."""
        if node not in self.layouts or node in self.whole:
            return self.whole.get(node, node)
        packed, by_batch = self.packed[node], self.layouts[node] == Layout(BY_BATCH)
        rows = self._call(torch.flatten, packed, 0, 1, after=packed) if by_batch else packed
        self.whole[node] = self._call(_UNPACK, rows, self.index, self._slots_of(by_batch), after=rows)
        return self.whole[node]

    def _gathered(self, node: Node, layout: Layout) -> Node:
        """Returns the packed rows of a node that has all rows."""
        by_batch = layout == Layout(BY_BATCH)
        rows = self._call(_PACK, node, self.index, self._slots_of(by_batch), after=node)
        return self._call(torch.unsqueeze, rows, 0, after=rows) if by_batch else rows

    def _slots_of(self, by_batch: bool) -> Node:
        """Returns the slots of rows that are laid out by batch and token, or of flat rows."""
        if by_batch:
            return self.slots
        if self._flat_slots is None:
            self._flat_slots = self._call(torch.flatten, self.slots, after=self.slots)
        return self._flat_slots

    def _number(self, dim: int) -> int | Node:
        """Returns the size of the batch (0) or of a sequence (1), as an argument of a node."""
        size = self.batch[dim]
        return size if isinstance(size, int) else self._call("size", self.slots, dim, after=self.slots)

    def _pack_operation(self, node: Node, layout: Layout | tuple[Layout, ...]) -> None:
        """Makes a node compute packed rows from packed rows."""
        first = layout[0] if isinstance(layout, tuple) else layout
        expected: list[tuple[Any, ...]] = [self._small(shape, first) for shape in shapes_of(node)]
        rank = len(expected[0])

        def operand(arg: Node) -> Node:
            return (
                self.packed_rows(arg) or arg if arg in self.layouts else self._aligned(arg, node, rank, first)
            )

        source = node.args[0] if node.args else None
        if name_of(node) in (*VIEWS, "expand") and isinstance(source, Node):
            node.op, node.kwargs = "call_method", {}
            node.target = "expand" if name_of(node) == "expand" else "reshape"
            tokens = first.dims[-1]  # their number, which may be symbolic, is inferred
            node.args = (
                operand(source),
                *(-1 if dim == tokens else size for dim, size in enumerate(expected[0])),
            )
        else:
            node.args, node.kwargs = map_arg((node.args, node.kwargs), operand)
        was = node.meta["example_value"]
        node.meta["example_value"] = self._run(node)
        if shapes_of(node) != expected or _dtypes(node.meta["example_value"]) != _dtypes(was):
            raise AssertionError(f"{node.name}: expected rows of {expected}, got {shapes_of(node)}")
        self.packed[node] = node

    def _aligned(self, arg: Node, reader: Node, rank: int, layout: Layout) -> Node:
        """Returns a value without rows as an operand of packed rows: where it differs by row, it is gathered too."""
        if name_of(reader) == "embedding":
            return self._gathered_once(arg) if arg is argument(reader, 0, "input") else arg
        shape = shape_of(arg)
        offset = rank - len(shape)
        own = [dim - offset for dim in layout.dims]
        varies = any(dim >= 0 and shape[dim] != 1 for dim in own)
        if not varies or offset < 0 or not _is_broadcast(reader):
            return arg
        if layout == Layout(BY_BATCH):
            rest = (-1,) * (len(shape) - max(own[1] + 1, 0))
            whole = (self._number(0), self._number(1), *rest)
            return self._gathered_once(self._call("expand", arg, whole, after=arg))
        return self._gathered_once(arg)

    def _gathered_once(self, node: Node) -> Node:
        if node not in self.packed:
            layout = Layout(BY_BATCH if shape_of(node)[:2] == self.batch else FLAT)
            self.packed[node] = self._gathered(node, layout)
        return self.packed[node]

    def _later(self, node: Node) -> Node:
        """Returns the node after which a use of `node` may be inserted: inputs come first."""
        return self.graph.find_nodes(op="placeholder")[-1] if node.op == "placeholder" else node

    def _rewrite_loss(self, node: Node) -> None:
        logits, labels, loss = argument(node, 0, "input"), argument(node, 1, "target"), next(self.losses)
        is_cut = any(loss.cut)
        whole = self._labels_of_rows(labels, loss) if is_cut else labels
        slots = self._slots_of(by_batch=is_cut)
        small = self._call(_LABELS, whole, self.index, slots, loss.ignored, after=whole)
        rows = self.packed_rows(logits)
        node.args, node.kwargs = map_arg(
            (node.args, node.kwargs), lambda arg: rows if arg is logits else small if arg is labels else arg
        )
        node.meta["example_value"] = self._run(node)

    def _labels_of_rows(self, labels: Node, loss: Labels) -> Node:
        """Computes `Labels.of_rows` in the graph."""
        batch, length, left_out = self._number(0), self._number(1), sum(loss.cut)
        left = (
            length - left_out
            if isinstance(length, int)
            else self._call(operator.sub, length, left_out, after=length)
        )
        by_batch = self._call(torch.reshape, labels, (batch, left), after=labels)
        pad = torch.nn.functional.pad
        return self._call(pad, by_batch, loss.cut, "constant", loss.ignored, after=by_batch)

    def _small(self, shape: tuple[Size, ...], layout: Layout) -> tuple[Size, ...]:
        """Returns the shape of packed rows in place of all rows."""
        sizes = (1, self.size) if len(layout.dims) == 2 else (self.size,)
        found = list(shape)
        for dim, size in zip(layout.dims, sizes, strict=True):
            found[dim] = size
        return tuple(found)

    def _call(self, target: Callable[..., Any] | str, *args: Any, after: Node) -> Node:
        """Inserts a call of a function or method after its operand, in the modes of that."""
        with self.graph.inserting_after(self._later(after)):
            kind = "call_method" if isinstance(target, str) else "call_function"
            node = self.graph.create_node(kind, target, args)
        self.regions.of[node] = self.regions.of[after]
        node.meta["example_value"] = self._run(node)
        return node

    def _run(self, node: Node) -> Any:
        """Runs a node on fake tensors, in its modes."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda arg: arg.meta["example_value"])
        mode = mode_of(self.live.index)
        with (
            self.regions.of[node].entered(),
            mode,
            enable_python_dispatcher(),
        ):  # as Dynamo, for symbolic sizes
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def compute_labeled_rows(graph: Graph) -> str | None:
    """Makes head and loss compute the logits of rows with labels only, after head and loss were fused.

    Returns:
        A note for the report; None if nothing changed.
    """
    (labeled,) = [node for node in graph.find_nodes(op="placeholder") if node.name == LABELED] or (None,)
    losses = [node for node in graph.nodes if node.target is _LOSS and _reads_labels(node.args[2])]
    if labeled is None or not losses:
        return None
    for loss in losses:
        loss.kwargs = {**loss.kwargs, "labeled": labeled}
    return "head and loss compute the rows with labels only (counted on every call, in the same device sync)"


def _reads_labels(node: Any) -> bool:
    """Returns whether a value is the labels of packed rows, in any shape."""
    while isinstance(node, Node) and name_of(node) in (*VIEWS, "to"):
        (node, *_) = node.all_input_nodes
    return isinstance(node, Node) and node.target is _LABELS


def _is_broadcast(node: Node) -> bool:
    """Returns whether operands of a node are broadcast to its result."""
    return name_of(node) not in ("linear", "matmul", "addmm", "layer_norm", "rms_norm", "type_as", "to")


def _dtypes(value: Any) -> list[torch.dtype]:
    return [v.dtype for v in (value if isinstance(value, (tuple, list)) else (value,))]
