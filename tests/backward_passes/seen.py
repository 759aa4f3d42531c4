"""What the tests of rewrites of AOTAutograd's graphs share."""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import get_donated_idxs

from liger_compile.backward_passes import DEFAULT_PASSES, Backward, inline_late_ops, is_backward, run_passes


def is_ours(node):
    return getattr(node.target, "namespace", "") == "liger_compile"


def names_of_ours(graph):
    return [node.target._schema.name.split("::")[1] for node in graph.nodes if is_ours(node)]


def products_of(graph):
    return len(graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default))


class Seen(CustomGraphPass):
    """Passes over backward. Of each graph: which ops of ours are in it before they are inlined, how many fewer matrix
    products there are, and which passes changed it."""

    def __init__(self, passes=DEFAULT_PASSES):
        self.passes, self.graphs, self.fewer_products, self.applied = passes, [], [], []

    def __call__(self, graph):
        before = products_of(graph)
        if is_backward(graph):
            made = run_passes(Backward(graph, get_donated_idxs() or ()), self.passes, strict=True)
            self.applied.append([each.name for each, _ in made])
        self.graphs.append(names_of_ours(graph))
        self.fewer_products.append(before - products_of(graph))
        inline_late_ops(graph, select_decomp_table(), strict=True)
        assert not any(map(is_ours, graph.nodes))

    def uuid(self):
        return None  # never cached
