"""Runs passes over a graph of backward: in order, with fuel, and with one policy for exceptions.

In: a graph of aten operators that AOTAutograd's partitioner made and Inductor compiles next. Out: the same graph,
changed, and a record of each change. A pass is a generator: it yields once after each change, so that the runner can
stop it between two changes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

_log = logging.getLogger("liger_compile")


@dataclass(frozen=True)
class Applied:
    """One change that a pass made.

    Args:
        node: the node that the pass began at; it may be erased by now, and locates the change in the program.
        change: the change, in a sentence without a period.
        memory: bytes that backward no longer allocates; 0 where it allocates the same.
        traffic: bytes that backward no longer reads or writes; an estimate.
    """

    node: Node
    change: str
    memory: int = 0
    traffic: int = 0


@dataclass(frozen=True)
class Backward:
    """A graph of backward, as input of a pass.

    Args:
        graph: the graph; passes change it.
        donated: positions of the placeholders that no one reads after the graph has run; a pass may write into them.
    """

    graph: Graph
    donated: Collection[int] = ()


def is_backward(graph: Graph) -> bool:
    """Returns whether a graph of AOTAutograd is a graph of backward."""
    # AOTAutograd gives this name to the incoming gradients of a backward; graphs of forward have none.
    return any(node.name.startswith("tangents") for node in graph.find_nodes(op="placeholder"))


@dataclass(frozen=True)
class Pass:
    """A named change of graphs of backward.

    Args:
        name: the name in reports, `liger.skip` and the cache key.
        run: changes the graph; yields after each change. At each yield the graph computes the same as before.
        in_forward: the pass changes graphs of forward too. Their changes are not in the report, which has the ops.
    """

    name: str
    run: Callable[[Backward], Iterator[Applied]]
    in_forward: bool = False


def run_passes(
    backward: Backward, passes: Sequence[Pass], *, fuel: int | None = None, strict: bool = False
) -> list[tuple[Pass, Applied]]:
    """Runs the passes in order. Returns every change that was made.

    Args:
        fuel: the largest number of changes; None means no limit.
        strict: reraise the exception of a pass. Otherwise a warning names the pass, and its earlier changes stay.
    """
    made: list[tuple[Pass, Applied]] = []
    for current in passes:
        before = len(made)
        text = str(backward.graph) if _log.isEnabledFor(logging.DEBUG) else ""
        try:
            changes = current.run(backward)
            while fuel is None or len(made) < fuel:
                made.append((current, next(changes)))
        except StopIteration:
            pass
        except Exception as error:
            if strict:
                raise
            warn_of_failure(current.name, error)
        if text and len(made) > before:
            _log.debug(
                "%s changed the graph of backward. Before:\n%s\nAfter:\n%s",
                current.name,
                text,
                str(backward.graph),
            )
    return made


def warn_of_failure(name: str, error: Exception) -> None:
    """Warns that a pass failed and that the rest of the pass is left out."""
    warnings.warn(
        f"liger_compile: pass {name!r} failed and is left out: {type(error).__name__}: {error}; "
        "liger.strict=True raises instead",
        stacklevel=3,
    )
