"""What the tests of rewrites of AOTAutograd's graphs share."""

from __future__ import annotations

import pytest
import torch

from liger_compile.compile import _with_rewritten_backward


def is_ours(node):
    return getattr(node.target, "namespace", "") == "liger_compile"


def names_of_ours(graph):
    return [node.target._schema.name.split("::")[1] for node in graph.nodes if is_ours(node)]


def products_of(graph):
    return len(graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default))


class Seen(type(_with_rewritten_backward(None))):
    """The pass of compile.py, and of each graph: what of ours is in it before ops are traced through, and how many
    products fewer there are."""

    def __init__(self):
        self.graphs, self.fewer_products = [], []

    def __call__(self, graph):
        before = products_of(graph)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("liger_compile.gradients.BODIES", {})
            super().__call__(graph)
        self.graphs.append(names_of_ours(graph))
        self.fewer_products.append(before - products_of(graph))
        super().__call__(graph)
        assert not any(map(is_ours, graph.nodes))
