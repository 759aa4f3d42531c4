"""mark_for_recompute(): carries out the decisions that leave a match to Inductor and only say that it is cheap.

AOTAutograd takes these marks from Dynamo's nodes to what it traces of them, and its partitioner then computes the
values again in backward instead of keeping them. The marks are in none of torch's cache keys; compile.py puts them
there.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.utils.checkpoint import CheckpointPolicy

from liger_compile.pattern import Decision


def mark_for_recompute(decisions: Iterable[Decision]) -> None:
    """Marks the nodes of the matches that are annotated."""
    for decision in decisions:
        if decision.kind != "annotate":
            continue
        kept = decision.match.outputs if decision.keeps_outputs else ()
        for node in decision.match.nodes:
            if node not in kept:
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                # The partitioner wants one; no user's checkpoint has it at this level.
                node.meta["ac_graph_id"] = 0
