"""Passes the ids of documents, and the flags of padding, into checkpointed layers that receive a mask of them.

A checkpointed layer is a subgraph. It receives the mask of packed or padded rows, and attention that reads ids or flags
needs these instead. They become one more argument of the subgraph; nothing reads the mask there if attention is
replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.fx import GraphModule, Node

from liger_compile.diagnose.sentences import input_name
from liger_compile.terms.build import Terms
from liger_compile.terms.indices import mask_meaning
from liger_compile.terms.term import Term

_MADE_OF = "liger_compile_made_of"  # a key in the meta of a placeholder: the inputs of the outer graph


def inputs_of(ids: Node) -> str:
    """Returns the names of the inputs that ids are computed from, for people."""
    waiting, seen = [ids], {ids}
    while waiting:
        new = [arg for arg in waiting.pop().all_input_nodes if arg not in seen]
        seen.update(new)
        waiting.extend(new)
    tensors = [
        n for n in seen if n.op == "placeholder" and isinstance(n.meta.get("example_value"), torch.Tensor)
    ]
    return " and ".join(sorted({n.meta.get(_MADE_OF) or input_name(n.name) for n in tensors})) or "positions"


def hand_in_documents(calls: Iterable[tuple[Node, GraphModule]], terms: Terms) -> None:
    """Adds ids of documents, or flags of padding, to the arguments of checkpoints that receive a mask of them."""
    calls = list(calls)
    for call, body in calls:
        is_only_call = [module for _, module in calls].count(body) == 1
        if is_only_call and getattr(call.target, "__name__", "") == "tag_activation_checkpoint":
            for ids in dict.fromkeys(_ids_of_masks(call, terms)):
                if ids not in call.args:
                    _hand_in(call, body, ids)


def _ids_of_masks(call: Node, terms: Terms) -> Iterator[Node]:
    """Yields the nodes that hold the ids, or the flags, of the masks that a call receives."""
    for argument in call.all_input_nodes:
        mask = terms.of[argument]
        if not isinstance(mask, Term) or len(mask.shape) != 4 or not terms.is_of_positions(mask):
            continue
        meaning = mask_meaning(terms.space, mask, *mask.shape[-2:])
        read = meaning.documents or meaning.keys
        found = None if read is None else terms.derive(read)
        if found is not None and _is_kept(found[0], call, terms):
            yield found[0]


def _is_kept(ids: Node, call: Node, terms: Terms) -> bool:
    """Returns whether ids are computed before a call and never written."""
    position = terms.mutations.position
    return position[ids] < position[call] and terms.mutations.is_clean(ids)


def _hand_in(call: Node, body: GraphModule, ids: Node) -> None:
    last = body.graph.find_nodes(op="placeholder")[-1]
    with body.graph.inserting_after(last):
        placeholder = body.graph.placeholder(
            "present" if ids.meta["example_value"].dtype is torch.bool else "documents"
        )
    placeholder.meta["example_value"] = ids.meta["example_value"]
    placeholder.meta[_MADE_OF] = inputs_of(ids)
    call.args = (*call.args, ids)
    body.recompile()
