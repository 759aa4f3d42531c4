"""find_tail(): finds what follows the questions about a head up to a loss, and writes it as a program for the op.

In: the nodes that ask, their plan, and the values of the heads. Out: a tail, or the reason why there is none. The loss
is the first scalar through which all gradients reach the questions. What lies between is run once on fake tensors, with
its gradient, and every operator of ATen becomes a step of the program (ops/row_program.py). The program is a tail if
the gradient at a row depends on the answers of this row alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from liger_compile.graphs.guards import GuardError, no_guards
from liger_compile.ops import answer_plan, row_program, softmax_chunks
from liger_compile.steps.saved import run_node
from liger_compile.terms.build import Terms
from liger_compile.terms.term import Term, size_of
from liger_compile.torch_internals.dispatch import TorchDispatchMode, without_dispatch_modes
from liger_compile.torch_internals.operators import OpOverload, counterpart, name_of, schema_of
from liger_compile.torch_internals.pytree import tree_leaves
from liger_compile.torch_internals.tensors import storage_of

MOST_STEPS = 2000
LARGEST = 64  # numbers for each row that a value in a tail may have: the program runs once for each chunk
_KEPT = frozenset(
    ("layout", "pin_memory", "memory_format", "non_blocking")
)  # arguments without an effect on values


class NoTailError(Exception):
    """Why questions have no tail, in a sentence."""


@dataclass(frozen=True)
class FoundTail:
    """A tail, and its place in the graph.

    Args:
        root: the loss.
        nodes: the nodes between the questions and the loss, and the loss, in graph order.
        others: the nodes whose values are the other operands of the program.
    """

    tail: answer_plan.Tail
    root: Node
    nodes: tuple[Node, ...]
    others: tuple[Node, ...]


def find_tail(
    plan: answer_plan.Plan,
    outputs: Sequence[Node],
    head: answer_plan.Head,
    teacher_x: Tensor | None,
    terms: Terms,
) -> FoundTail:
    """Returns the tail of questions.

    Args:
        outputs: the nodes that ask, in the order of the plan's outputs.
        head: x, weight and bias as fake tensors.
        teacher_x: the input of the second head as a fake tensor, if there is one.

    Raises:
        NoTailError: there is none.
    """
    root = _root(outputs)
    x = head[0]
    between = _between(outputs, root)
    nodes = _with_late_operands(between, outputs, terms, LARGEST * _hint(x[..., 0].numel()))
    for node in between:
        _check(node, terms)
    fake_mode = getattr(x, "fake_mode", None) or contextlib.nullcontext()
    try:
        with fake_mode, no_guards(x), torch.enable_grad():
            writer = _Writer(plan, head, outputs, nodes, terms)
            return FoundTail(writer.tail(root, teacher_x), root, (*nodes,), tuple(writer.others))
    except GuardError as error:
        raise NoTailError(str(error)) from error


# The place of a tail in the graph


def _needs_gradient(node: Node) -> bool:
    leaves = tree_leaves(node.meta.get("example_value"))
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


def _root(outputs: Sequence[Node]) -> Node:
    """Returns the first scalar through which all gradients reach the questions."""
    asking = {node for node in outputs if _needs_gradient(node)}
    if not asking:
        raise NoTailError("no answer has a gradient")
    reached, last, position = {*asking}, {}, {}
    graph: Graph = outputs[0].graph
    for at, node in enumerate(graph.nodes):
        position[node] = at
        if _needs_gradient(node) and any(arg in reached for arg in node.all_input_nodes):
            reached.add(node)
    for node in reached:
        users = (position[user] for user in node.users if user in reached or _may_differentiate(user))
        last[node] = max(users, default=-1)
    begun, open_until = 0, -1
    for node in graph.nodes:
        if node not in reached:
            continue
        begun += node in asking
        if begun == len(asking) and open_until <= position[node] and _is_scalar(node):
            return node
        open_until = max(open_until, last[node])
    raise NoTailError("the gradients do not come from one loss, a scalar of the graph")


_FACTS = (
    Tensor,
    tuple,
    list,
    int,
    float,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
    torch.dtype,
    torch.device,
)


def _may_differentiate(user: Node) -> bool:
    """Returns whether a reader may see a gradient although it computes nothing: a result of the graph, or a hook."""
    return user.op == "output" or not isinstance(user.meta.get("example_value"), _FACTS)


def _is_scalar(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.dim() == 0


def _between(outputs: Sequence[Node], root: Node) -> list[Node]:
    """Returns the nodes that depend on questions and that the loss depends on, with the loss, in graph order.

    A loss that is a question, such as a sum, needs no more.
    """
    if root in outputs:
        return []
    needed, waiting = {root}, [root]
    while waiting:
        for arg in waiting.pop().all_input_nodes:
            if arg not in needed and arg not in outputs:
                needed.add(arg)
                waiting.append(arg)
    found: dict[Node, None] = {}
    for node in root.graph.nodes:
        if node in needed and any(arg in found or arg in outputs for arg in node.all_input_nodes):
            found[node] = None
        if node is root:
            break
    return [*found]


def _with_late_operands(
    nodes: Sequence[Node], outputs: Sequence[Node], terms: Terms, most: int
) -> list[Node]:
    """Returns nodes and the small operations that compute their operands after the first question, in graph order.

    The op runs before the first reader of an answer, such as a metric, and computes these again.
    """
    position = terms.mutations.position
    first = min(position[node] for node in outputs)
    inside, found = {*nodes, *outputs}, {*nodes}
    for operand in dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside):
        late, waiting = {operand}, [operand]
        while waiting and all(_is_small(node, terms, most) for node in waiting):
            args = {arg for node in waiting for arg in node.all_input_nodes} - late
            waiting = [arg for arg in args if position[arg] > first]
            late.update(waiting)
            if any(_is_large(arg, most) for arg in args):
                break
        else:
            if position[operand] > first and not waiting:
                found |= late
    return sorted(found, key=position.__getitem__)


def _is_large(node: Node, most: int) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and _hint(value.numel()) > most


def _is_small(node: Node, terms: Terms, most: int) -> bool:
    """Returns whether a node is an operation on some numbers for each row."""
    is_operation = node.op in ("call_function", "call_method") and not terms.regions.of[node].transforms
    value = terms.of.get(node)
    is_matmul = isinstance(value, Term) and value.op in ("linear", "matmul")
    return is_operation and not is_matmul and terms.mutations.is_clean(node) and not _is_large(node, most)


def _check(node: Node, terms: Terms) -> None:
    """Refuses what may not run inside of the op."""
    if node.op not in ("call_function", "call_method"):
        raise NoTailError(f"{node.name} is no operation of the graph")
    if not terms.mutations.is_clean(node):
        raise NoTailError(f"{node.name} is written in place")
    if terms.regions.of[node].transforms:
        raise NoTailError(f"{node.name} runs under a torch.func transform")


# The program


class _Writer:
    """Runs a tail, and writes it as a program."""

    def __init__(
        self,
        plan: answer_plan.Plan,
        head: answer_plan.Head,
        outputs: Sequence[Node],
        nodes: Sequence[Node],
        terms: Terms,
    ) -> None:
        self.plan, self.outputs, self.nodes, self.regions = plan, outputs, nodes, terms.regions
        x, self.weight, _ = plan.form.of(head)
        self.lead = x.shape[:-1]
        self.x = x.detach().reshape(-1, x.shape[-1])
        self.others: dict[Node, Tensor] = {}
        inside = {*nodes, *outputs}
        for node in (arg for each in nodes for arg in each.all_input_nodes if arg not in inside):
            value = node.meta.get("example_value")
            if isinstance(value, Tensor) and value.requires_grad and value.device != x.device:
                raise NoTailError(f"{node.name} gets a gradient on another device")
            if isinstance(value, Tensor) and node not in self.others:
                self.others[node] = value.detach().requires_grad_(value.requires_grad)

    def tail(self, root: Node, teacher_x: Tensor | None) -> answer_plan.Tail:
        plan, rows = self.plan, self.x.shape[0]
        index = self.x.new_empty((rows, plan.width), dtype=torch.int64) if plan.width else None
        made = softmax_chunks.empty_made(self.x, index, teacher_x, plan.questions, plan.top).answers
        names = [name for name in made._fields if name in plan.answered]
        answers = [getattr(made, name) for name in names]
        for answer in answers:
            answer.requires_grad_(answer.is_floating_point())
        entries = [self.x.new_empty((rows, one.width), dtype=torch.int64) for one in plan.columns]
        counted = [at for at, one in enumerate(plan.columns) if one.ignore_index is not None]
        others = [*self.others.values(), *(entries[at] for at in counted)]
        self._check_sizes(others)
        answering = answer_plan.Answering(plan, made, entries, self.weight.shape[0], self.lead)
        sizes = (*self.lead, self.weight.shape[0])
        program = program_of(
            lambda: self._loss(answering, root), dict(zip(names, answers, strict=True)), others, sizes
        )
        if why := _why_not_by_rows(program, answers, others, sizes):
            raise NoTailError(why)
        output = self.outputs.index(root) if root in self.outputs else None
        return answer_plan.Tail(program, tuple(counted), output)

    def _loss(self, answering: answer_plan.Answering, root: Node) -> Tensor:
        """Returns the loss, computed from the answers."""
        values: dict[Node, Any] = dict(self.others)
        for node, output in zip(self.outputs, self.plan.outputs, strict=True):
            values[node] = answering.value(output)
        for node in self.nodes:
            with self.regions.of[node].entered():
                values[node] = _run(node, values)
        loss, expected = values[root], root.meta["example_value"]
        if not isinstance(loss, Tensor) or not loss.requires_grad or loss.dtype != expected.dtype:
            raise NoTailError(f"{root.name} has another form if it is computed inside of the op")
        return loss

    def _check_sizes(self, others: Iterable[Tensor]) -> None:
        most = LARGEST * _hint(self.x.shape[0])
        values = [node.meta.get("example_value") for node in self.nodes]
        for value in (*others, *tree_leaves(values)):
            if isinstance(value, Tensor) and _hint(value.numel()) > most:
                raise NoTailError("the loss is computed from more than some numbers for each row")


def _run(node: Node, values: dict[Node, Any]) -> Any:
    try:
        return run_node(node, values)
    except (NoTailError, GuardError):
        raise
    except Exception as error:  # whatever a user's operation raises on fake tensors
        raise NoTailError(f"{node.name} does not run by itself: {error}") from error


def _gradients(loss: Tensor, seed: Tensor, learned: Sequence[Tensor]) -> dict[int, Tensor]:
    """Returns the gradients of the loss, by the id of what they are the gradients of. `seed`: that of the loss."""
    try:
        found = torch.autograd.grad(loss, learned, seed, allow_unused=True)
    except (NoTailError, GuardError):
        raise
    except Exception as error:  # some formulas of torch need sizes that are numbers
        raise NoTailError(f"the gradient of the loss does not run by itself: {error}") from error
    pairs = zip(learned, found, strict=True)
    return {id(value): gradient for value, gradient in pairs if gradient is not None}


def _hint(size: Any) -> int:
    """Returns a size in the first call."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    if not isinstance(hint, int):
        raise NoTailError("a size is known at run time only")
    return hint


def _why_not_by_rows(
    program: str, answers: Sequence[Tensor], others: Sequence[Tensor], sizes: Sequence[Any]
) -> str | None:
    """Returns the answer of the op for the sizes of the first call. The op asks again for others."""

    def forms(tensors: Sequence[Tensor]) -> row_program.Forms:
        return tuple((tensor.dtype, tuple(map(_hint, tensor.shape))) for tensor in tensors)

    of_answers, of_others = forms(answers), forms(others)
    with without_dispatch_modes(), torch.no_grad():
        return row_program.why_not_by_rows(program, of_answers, of_others, tuple(map(_hint, sizes)))


def program_of(
    compute: Callable[[], Tensor],
    answers: Mapping[str, Tensor],
    others: Sequence[Tensor],
    sizes: Sequence[Any],
) -> str:
    """Returns a function of answers and other operands, and its gradient, as a program.

    Args:
        compute: returns the loss, computed from these fake tensors.
        answers, others: those that require a gradient get one.
        sizes: the first of the sizes that the program may refer to; those of `others` follow.
    """
    dims = _Dims([*sizes, *(size for other in others for size in other.shape)])
    operands = [*answers.values(), *others]
    steps = _Steps(operands, dims)
    with steps:
        loss = compute()
        seed = torch.ones_like(loss)
        gradients = _gradients(loss, seed, [value for value in operands if value.requires_grad])
    return steps.program(answers, others, (loss, seed), gradients)


class _Dims:
    """The sizes that a program may refer to, and polynomials of them."""

    def __init__(self, sizes: Sequence[Any]) -> None:
        self.sizes = sizes
        self.of: dict[Any, tuple[int, int]] = {}  # a symbol is dims[k] - c
        for at, size in enumerate(sizes):
            expr = size_of(size)
            symbols: list[Any] = [] if isinstance(expr, int) else [*expr.free_symbols]
            if len(symbols) == 1 and (rest := expr - symbols[0]).is_Integer:
                self.of.setdefault(symbols[0], (at, int(rest)))

    def polynomial(self, size: torch.SymInt) -> Any:
        expr = size_of(size)
        if isinstance(expr, int):
            return expr
        symbols: list[Any] = sorted(expr.free_symbols, key=str)
        try:
            terms = sympy.Poly(expr, *symbols).terms()
        except sympy.PolynomialError:
            terms = None
        if terms is None or not all(symbol in self.of for symbol in symbols):
            raise NoTailError(f"a size, {expr}, does not follow from the sizes of inputs")
        if not all(factor.is_Integer for _, factor in terms):
            raise NoTailError(f"a size, {expr}, does not follow from the sizes of inputs")
        polynomial = [
            [
                int(factor),
                *([*self.of[symbol], power] for symbol, power in zip(symbols, powers, strict=True) if power),
            ]
            for powers, factor in terms
        ]
        return {"size": polynomial}


class _Steps(TorchDispatchMode):
    """Records the operators that run under it as steps of a program of these inputs."""

    def __init__(self, inputs: Sequence[Tensor], dims: _Dims) -> None:
        super().__init__()
        self.dims, self.device = dims, inputs[0].device
        self.places: dict[int, list[int]] = {id(value): [at] for at, value in enumerate(inputs)}
        self.alive: list[Any] = [*inputs]  # ids are unique among live objects
        self.first = len(inputs)
        self.sharing: dict[Any, set[int]] = {}  # by storage: the ids of the values in it
        for value in inputs:
            self.sharing.setdefault(storage_of(value), set()).add(id(value))
        self.steps: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "namespace", "") == "prim":  # facts about a tensor
            return func(*args, **kwargs)
        self._refuse(func)
        called = self._not_in_place(func, args) if schema_of(func).is_mutable else func
        described = {name: self.argument(value) for name, value in kwargs.items() if name not in _KEPT}
        step = [name_of(called), [self.argument(arg) for arg in args], described]
        out = func(*args, **kwargs)
        if called is not func:
            result = called(*args, **kwargs)
            if result.shape != out.shape or result.dtype != out.dtype:
                raise NoTailError(f"{func} writes in place")
        self._remember(out, step)
        return out

    def _refuse(self, func: Any) -> None:
        if not isinstance(func, OpOverload) or func.namespace != "aten":
            raise NoTailError(f"{func} is no operator of ATen")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NoTailError(f"{func} draws random numbers")
        if len(self.steps) >= MOST_STEPS:
            raise NoTailError(f"the loss is computed in more than {MOST_STEPS} steps")

    def _not_in_place(self, func: OpOverload, args: Sequence[Any]) -> OpOverload:
        """Returns the operator whose result an operator in place writes into memory that no other value has."""
        name = func.overloadpacket.__name__
        found = counterpart(func, name.removesuffix("_")) if name.endswith("_") else None
        is_own = args and self.places.get(id(args[0]), [0])[0] >= self.first
        sharing = self.sharing.get(storage_of(args[0]), set[int]()) if is_own else set[int]()
        if found is None or sharing != {id(args[0])}:
            raise NoTailError(f"{func} writes in place")
        return found

    def _remember(self, out: Any, step: Any) -> None:
        at = self.first + len(self.steps)
        self.steps.append(step)
        self.alive.append(out)
        parts = (
            [(out, [at])]
            if isinstance(out, Tensor)
            else [(value, [at, part]) for part, value in enumerate(out)]
        )
        for value, place in parts:
            self.places[id(value)] = place
            self.sharing.setdefault(storage_of(value), set()).add(id(value))

    def argument(self, value: Any) -> Any:
        """Returns an argument as a program has it."""
        if isinstance(value, Tensor):
            if id(value) not in self.places:
                raise NoTailError("a tensor is used that no operation of the graph computes")
            return {"value": self.places[id(value)]}
        if isinstance(value, (list, tuple)):
            return [self.argument(part) for part in value]
        if isinstance(value, torch.SymInt):
            return self.dims.polynomial(value)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device) and value.type == self.device.type:
            return {"device": 0}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise NoTailError(f"an operation has an argument that is no number: {value!r}")

    def program(
        self,
        answers: Mapping[str, Tensor],
        others: Sequence[Tensor],
        loss_and_seed: tuple[Tensor, Tensor],
        gradients: Mapping[int, Tensor],
    ) -> str:
        """Returns the recorded steps as a program with these results."""
        loss, seed = loss_and_seed
        of_answers = [(name, gradients.get(id(answer))) for name, answer in answers.items()]
        of_others = [(at, gradients.get(id(other))) for at, other in enumerate(others)]
        return json.dumps(
            {
                "answers": [*answers],
                "others": len(others),
                "steps": self.steps,
                "dtype": str(loss.dtype).removeprefix("torch."),
                "loss": self.places[id(loss)],
                "seed": self.places[id(seed)],
                "gradients": {
                    name: self.places[id(value)] for name, value in of_answers if value is not None
                },
                "of_others": {at: self.places[id(value)] for at, value in of_others if value is not None},
            },
            separators=(",", ":"),
        )
