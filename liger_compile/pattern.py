"""The values that the steps exchange: Pattern, Capture, Match, Decision, NearMiss.

All are frozen and only hold data: steps/match.py makes matches from patterns, steps/decide.py makes decisions from
matches, steps/rewrite.py carries out the decisions, report/ reports them to the user.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Node

Number = int | float


@dataclass(frozen=True)
class Annotate:
    """A profit verdict: Inductor's own code is better here, but need not keep these values for backward.

    The values are marked as cheap, and backward recomputes them.

    Args:
        reason: a sentence.
        keeps_outputs: only the nodes between captures and outputs are cheap: the operands of a matmul, not its result.
    """

    reason: str
    keeps_outputs: bool = False


@dataclass(frozen=True, eq=False)
class Pattern:
    """A computation to recognize, and its replacement. Both are plain PyTorch.

    Args:
        name: `op.spelling`, unique among the patterns in use, for example `"rms_norm.llama"`.
        search: the computation. Its parameters are captures: a bare parameter binds a tensor;
            `eps: float`, `n: int` and `reduction: str` bind constants; `bias: torch.Tensor | None`
            binds a tensor or its absence. It returns one tensor or a tuple of tensors.
        replace: called with the captures by name, and with the options `loss_memory` and `inner` and the flag
            `returns_dtensor` (the first result is a DTensor) if it has parameters of these names with a default;
            returns as many tensors as search, of the same shapes and dtypes. None leaves the computation to Inductor
            and marks its values as cheap: backward recomputes them instead of keeping them.
        examples: one value per parameter of search, to trace it with: a small tensor (its sizes represent
            sizes in general, equal numbers for equal sizes; torch.float32 represents any floating
            dtype) or a number or string of the annotated type.
        check: returns why replacing a match would be wrong, in a sentence; None accepts.
        profit: returns why replacing a match would not pay, in a sentence, or in an `Annotate` if its values are
            cheap nevertheless; None accepts. Called under `liger.policy="auto"` only.
        saves: returns the bytes of activations that training no longer keeps if a match is replaced; None if unknown.
        is_cheap: backward runs the replacement again, so that its results need not be kept.
        is_loss: the replacement is a loss that computes its gradients in forward, so it is used at top level only,
            never in the subgraph of a checkpoint, which would run it twice.
        saves_result: the replacement saves its result for backward, and the computation does not. A result that the
            graph writes, or returns to a caller who may write into it, is then copied.
        finds: finds the places of the pattern in a graph, instead of search, whose computation is then an example. It
            is called with the pattern, the graph and its terms, and returns matches and near misses.
        detaches: the replacement may run with gradients where some of the matched nodes run without: it detaches their
            results.
        takes_dtensors: captures and results may be DTensors; `check` has to refuse the placements that the replacement
            does not take.
        has_near_misses: whether the report names places that resemble the computation and differ from it. None: if
            there is a replacement.
    """

    name: str
    search: Callable[..., Any]
    replace: Callable[..., Any] | None
    examples: Mapping[str, Any]
    check: Callable[[Match], str | None] | None = None
    profit: Callable[[Match], str | Annotate | None] | None = None
    saves: Callable[[Match], int | None] | None = None
    is_cheap: bool = False
    is_loss: bool = False
    saves_result: bool = False
    has_near_misses: bool | None = None
    finds: Callable[[Pattern, Any, Any], tuple[list[Match], list[NearMiss]]] | None = None
    detaches: bool = False
    takes_dtensors: bool = False

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of search by name; the names are those of the captures."""
        return inspect.signature(self.search).parameters

    def __repr__(self) -> str:
        return f"Pattern({self.name!r})"


@dataclass(frozen=True)
class Capture:
    """The value that a tensor parameter of search is bound to: a node, and steps to apply to it.

    `steps` is empty in most captures. It is not empty if no node has the captured value: a cast that autocast
    inserts implicitly, or a slice of hidden states where the code slices the logits.
    """

    node: Node
    steps: tuple[Callable[[Any], Any], ...] = ()
    value: Any = None  # the fake tensor, after the steps
    written_by: Node | None = (
        None  # the node whose in-place write gave `node` the captured value, if there is such a write
    )

    def derive(self, tensor: Any) -> Any:
        """Applies the steps to `tensor`, the value of `node`, and returns the result."""
        for step in self.steps:
            tensor = step(tensor)
        return tensor


@dataclass(frozen=True, eq=False)
class Match:
    """A place in a graph that computes what a pattern's search computes.

    `match["x"]` is the value that parameter x is bound to: a fake tensor (shape, dtype, device, requires_grad),
    a number, a string, or None.
    """

    pattern: Pattern
    captures: Mapping[str, Capture | Number | str | Node | None]
    outputs: tuple[Node, ...]  # the nodes that the replacement's results replace, in the order of search
    nodes: tuple[Node, ...]  # compute the outputs from the captures; with the outputs, in graph order
    operands: tuple[Node, ...] = ()  # the nodes that these nodes read
    movable: frozenset[Node] = (
        frozenset()
    )  # inner nodes that may be computed after the replacement, if they stay

    def __getitem__(self, name: str) -> Any:
        bound = self.captures[name]
        if isinstance(bound, Capture):
            return bound.value
        if isinstance(bound, Node):
            return bound.meta["example_value"]
        return bound

    def source(self, name: str) -> Node:
        """Returns the node that a tensor capture is read from."""
        bound = self.captures[name]
        assert isinstance(bound, (Capture, Node)), f"{name} is no tensor capture"
        return bound.node if isinstance(bound, Capture) else bound

    @property
    def result(self) -> torch.Tensor:
        """The fake tensor of the first output."""
        return self.outputs[0].meta["example_value"]

    def escaping(self) -> tuple[Node, ...]:
        """Returns the inner nodes with users outside the match, which stay in the graph if it is replaced."""
        inner, outputs = set(self.nodes), set(self.outputs)
        return tuple(
            node
            for node in self.nodes
            if node not in outputs and any(user not in inner for user in node.users)
        )


@dataclass(frozen=True, eq=False)
class Decision:
    """The decision about a match. `reason` is empty if the match is replaced and no function of the pattern failed."""

    match: Match
    kind: Literal["replace", "annotate", "leave"]
    reason: str = ""
    before: Node | None = None  # if replaced: the replacement is inserted before this node
    keeps_outputs: bool = False  # if annotated: see Annotate
    saved_bytes: int | None = None  # None: not known, for example where a size is symbolic
    inserted: tuple[Node, ...] = ()  # if replaced: the nodes that steps/rewrite.py inserted
    copied: int = 0  # if replaced: the number of results that are copied: see Pattern.saves_result
    copied_operands: int = 0  # if replaced: the number of operands that are copied: the op saves them
    covers: bool = False  # if left: smaller patterns are not used here either
    failed: bool = False  # a function of the pattern failed: see steps/callbacks.py
    instead_of: str = ""  # if replaced: why a larger pattern was left at this place


@dataclass(frozen=True, eq=False)
class NearMiss:
    """A place that resembles a pattern but does not match it: how much agrees, and where it differs."""

    pattern: Pattern
    root: Node  # the node at which matching began
    culprit: Node | None  # the node that differs
    reason: str  # the actual and the expected computation, for the author of the model
    score: float = field(default=0.0)  # share of the pattern that agrees, 0 to 1
    nodes: tuple[Node, ...] = ()  # the nodes that compute the root from the would-be captures, with the root
