"""DDP cuts graphs in buckets: masks that say something are made in the part that reads them."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import liger_compile
from liger_compile.backend import liger
from liger_compile.buckets import make_masks_where_they_are_read

BATCH, HEADS, LENGTH, SIZE = 2, 4, 12, 8
OPTIONS = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}


def positions(x):
    at = torch.arange(x.shape[-2], device=x.device)
    return at[None, :] <= at[:, None]


def attend(x, mask):
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def shared(x, padding):
    """One mask for all layers."""
    mask = positions(x)[None, None].expand(x.shape[0], 1, -1, -1)
    for _ in range(3):
        x = attend(x, mask)
    return x


def sliced(x, padding):
    """Each layer takes its part."""
    mask = positions(x)[None, None]
    for _ in range(3):
        x = attend(x, mask[:, :, :, : x.shape[-2]])
    return x


def windowed(x, padding):
    at = torch.arange(x.shape[-2], device=x.device)
    mask = positions(x) & (at[None, :] > at[:, None] - 4)
    return attend(attend(x, mask), mask)


def like_an_activation(x, padding):
    """What it is made like is computed once all the same."""
    scores = torch.exp(x @ x.mT)
    mask = torch.ones_like(scores, dtype=torch.bool).tril()
    return attend(attend(x, mask), mask)


def padded(x, padding):
    mask = positions(x) & padding[:, None, None, :]
    return attend(attend(x, mask), mask)


def written(x, padding):
    mask = positions(x)
    result = attend(attend(x, mask), mask)
    mask.fill_(True)
    return attend(result, mask)


def captured(function):
    graphs = []

    def backend(gm, example_inputs):
        graphs.append((gm, example_inputs))
        return gm

    x, padding = torch.randn(BATCH, HEADS, LENGTH, SIZE), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    padding[0, :3] = False
    result = torch.compile(function, backend=backend, fullgraph=True)(x, padding)
    ((gm, inputs),) = graphs
    return gm, inputs, result


def masks_of(gm):
    return [node.kwargs["attn_mask"] for node in gm.graph.nodes if "attn_mask" in node.kwargs]


@pytest.mark.parametrize("function", [shared, sliced, windowed, like_an_activation])
def test_each_reader_has_a_mask_of_its_own(function):
    gm, inputs, expected = captured(function)
    make_masks_where_they_are_read(gm.graph)
    gm.graph.lint()
    gm.recompile()
    masks = masks_of(gm)
    assert len({*masks}) == len(masks) > 1
    assert torch.equal(gm(*inputs)[0], expected)
    at = {node: position for position, node in enumerate(gm.graph.nodes)}
    for reader in [node for node in gm.graph.nodes if "attn_mask" in node.kwargs][1:]:
        before = [node for node in at if at[node] < at[reader]]
        assert before[-1] is reader.kwargs["attn_mask"]  # right before it
    assert len([node for node in gm.graph.nodes if node.target is torch.exp]) == (
        function is like_an_activation
    )
    assert all(node.users or node.op in ("output", "placeholder") for node in gm.graph.nodes)


@pytest.mark.parametrize("function", [padded, written])
def test_other_masks_stay(function):
    gm, _, _ = captured(function)
    before = [(node.name, node.target, node.args, node.kwargs) for node in gm.graph.nodes]
    make_masks_where_they_are_read(gm.graph)
    assert [(node.name, node.target, node.args, node.kwargs) for node in gm.graph.nodes] == before


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(512, 512)  # 1 MiB

    def forward(self, x, mask):
        return x + attend(self.inner(x).unflatten(-1, (HEADS, -1)).transpose(1, 2), mask).transpose(
            1, 2
        ).flatten(2)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        mask = positions(x)[None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return x.square().mean()


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("backend", ["liger", liger])
def test_attention_is_found_in_every_bucket(process_group, backend):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(BATCH, LENGTH, 512)
    expected = torch.autograd.grad(model(x), tuple(model.parameters()))
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)
    torch.compile(ddp, backend=backend, options=OPTIONS)(x).backward()
    torch.testing.assert_close(tuple(one.grad for one in model.parameters()), expected)
    reports = liger_compile.reports()
    assert len(reports) > 1  # it was cut
    assert sum(site.pattern == "attention.causal" for report in reports for site in report.sites) == 3
    assert not any("keeps its mask" in note for report in reports for note in report.notes)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_graphs_of_other_backends_are_cut_as_they_come(process_group, monkeypatch):
    monkeypatch.setattr("liger_compile.buckets.mask_meaning", operator.truediv)  # would fail
    ddp, x = DistributedDataParallel(Model(), bucket_cap_mb=1), torch.randn(BATCH, LENGTH, 512)
    torch.compile(ddp, backend="aot_eager")(x).backward()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_failure_is_a_warning(process_group, monkeypatch):
    monkeypatch.setattr("liger_compile.buckets.mask_meaning", operator.truediv)
    model, x = Model(), torch.randn(BATCH, LENGTH, 512)
    expected = torch.autograd.grad(model(x), tuple(model.parameters()))
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)
    with pytest.warns(UserWarning, match="DDP cuts a graph as it came, because of TypeError"):
        torch.compile(ddp, backend="liger", options=OPTIONS)(x).backward()
    torch.testing.assert_close(tuple(one.grad for one in model.parameters()), expected)
