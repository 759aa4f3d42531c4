"""The values that travel between the steps: Pattern, Capture, Match, Decision, NearMiss.

All are frozen, and none of them does anything: match.py makes matches of patterns, decide.py makes
decisions of matches, rewrite.py carries the decisions out, report.py tells a person about them.
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
    """What profit may say of a match: Inductor's own code is better here, but need not keep these values.

    They are marked as cheap, and computed again in backward.

    Args:
        reason: a sentence.
        keeps_outputs: only what lies between captures and outputs is cheap: what feeds a product, not the product.
    """

    reason: str
    keeps_outputs: bool = False


@dataclass(frozen=True, eq=False)
class Pattern:
    """Mathematics to recognise, and what to put in its place. Both are plain PyTorch.

    Args:
        name: `op.spelling`, unique among the patterns in use, for example `"rms_norm.llama"`.
        search: the mathematics. Its parameters are captures: a bare parameter binds a tensor;
            `eps: float`, `n: int` and `reduction: str` bind constants; `bias: torch.Tensor | None`
            binds a tensor or its absence. It returns one tensor or a tuple of tensors.
        replace: called with the captures by name, and with `loss_memory` and `inner`, the options of these names, if
            it has such parameters with a default; returns as many tensors as search, of the same shapes and dtypes.
            None leaves the computation to Inductor and marks it as cheap: its values are computed again in
            backward instead of kept.
        examples: one value per parameter of search, to trace it with: a small tensor (its sizes stand
            for sizes in general, equal numbers for equal sizes; torch.float32 stands for any floating
            dtype) or a number or string of the annotated type.
        check: says of a match why replacing it would be wrong, in a sentence; None accepts.
        profit: says of a match why replacing it would not pay, in a sentence, or in an `Annotate` where its
            values are cheap all the same; None accepts. Asked under `liger.policy="auto"` only.
        saves: bytes of activations that training no longer keeps if the match is replaced; None if unknown.
        is_cheap: the replacement is run again in backward, so that what it returns need not be kept.
        is_loss: a loss makes its gradients in forward, so it is replaced at top level only, never in a
            checkpoint body that would run it twice.
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

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of search: the names of the captures."""
        return inspect.signature(self.search).parameters

    def __repr__(self) -> str:
        return f"Pattern({self.name!r})"


@dataclass(frozen=True)
class Capture:
    """What a tensor parameter of search is bound to: a node, and what still has to be done to it.

    `steps` is empty nearly always. It is not where the captured value exists in no node of its own:
    a cast that autocast makes silently, or a slice of hidden states that the code takes of the logits.
    """

    node: Node
    steps: tuple[Callable[[Any], Any], ...] = ()
    value: Any = None  # the fake tensor, steps taken
    written_by: Node | None = (
        None  # what has made the node what is captured, if it was not from the beginning
    )

    def derive(self, tensor: Any) -> Any:
        """Takes the steps on `tensor`, the value of `node`."""
        for step in self.steps:
            tensor = step(tensor)
        return tensor


@dataclass(frozen=True, eq=False)
class Match:
    """A place in a graph that computes what a pattern's search computes.

    `match["x"]` is what parameter x is bound to: a fake tensor (shape, dtype, device, requires_grad),
    a number, a string, or None.
    """

    pattern: Pattern
    captures: Mapping[str, Capture | Number | str | Node | None]
    outputs: tuple[Node, ...]  # the nodes that the replacement stands in for, in the order of search
    nodes: tuple[Node, ...]  # what computes the outputs from the captures, outputs included, in graph order
    operands: tuple[Node, ...] = ()  # what these nodes read

    def __getitem__(self, name: str) -> Any:
        bound = self.captures[name]
        if isinstance(bound, Capture):
            return bound.value
        if isinstance(bound, Node):
            return bound.meta["example_value"]
        return bound

    def source(self, name: str) -> Node:
        """The node that a tensor capture is read from."""
        bound = self.captures[name]
        assert isinstance(bound, (Capture, Node)), f"{name} is no tensor capture"
        return bound.node if isinstance(bound, Capture) else bound

    @property
    def result(self) -> torch.Tensor:
        """The fake tensor of the first output."""
        return self.outputs[0].meta["example_value"]

    def escaping(self) -> tuple[Node, ...]:
        """Inner nodes that are used outside the match as well, and so stay alive if it is replaced."""
        inner, outputs = set(self.nodes), set(self.outputs)
        return tuple(
            node
            for node in self.nodes
            if node not in outputs and any(user not in inner for user in node.users)
        )


@dataclass(frozen=True, eq=False)
class Decision:
    """What happens to a match, and why. `reason` is empty where it is replaced, and nothing about that failed."""

    match: Match
    kind: Literal["replace", "annotate", "leave"]
    reason: str = ""
    before: Node | None = None  # of what is replaced: the replacement goes in before this node
    keeps_outputs: bool = False  # of what is annotated: see Annotate
    saved_bytes: int | None = None  # None: not known, as where a size is symbolic
    inserted: tuple[Node, ...] = ()  # by rewrite.py, of what is replaced
    covers: bool = False  # what is left leaves nothing to smaller patterns either
    failed: bool = False  # a function of the pattern did: see callbacks.py


@dataclass(frozen=True, eq=False)
class NearMiss:
    """A place that looks like a pattern and is not: how far matching came, and where it stopped."""

    pattern: Pattern
    root: Node  # the node at which matching began
    culprit: Node | None  # the node that differs
    reason: str  # what stands there and what is expected, for the author of the model
    score: float = field(default=0.0)  # share of the pattern that agrees, 0 to 1
    nodes: tuple[Node, ...] = ()  # what computes the root from what the captures would be, the root included
