"""Nested regions: one body of equal layers, called for each. Gradients are eager's, and what is inside is found."""

import contextlib
import operator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import config as inductor_config
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

import liger_compile
from liger_compile import compile as compiling
from liger_compile.forward_passes.inline_subgraphs import inline_subgraphs
from liger_compile.graphs.aliasing import Mutations, storage_of
from tests.models.harness import step

region = torch.compiler.nested_compile_region
ROWS, SIZE, CLASSES = 8, 16, 20


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    liger_compile.clear_reports()
    yield
    torch._dynamo.reset()


def inputs():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=random, requires_grad=True) for shape in ((ROWS, SIZE), (SIZE,))]


def compiled(function, inner="aot_eager", policy="always"):
    options = {"liger.inner": inner, "liger.policy": policy, "liger.strict": True}
    return torch.compile(function, backend="liger", options=options)


def outcome(function):
    """Results, gradients, and the random number that comes next."""
    given = inputs()
    torch.manual_seed(0)
    results = function(*given)
    results = results if isinstance(results, tuple) else (results,)
    sum(each.float().sum() for each in results if each.requires_grad).backward()
    return [*(each.detach() for each in results), *(each.grad for each in given), torch.rand(1)]


def calls_in(gm):
    return [
        node
        for module in gm.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        if node.target is torch.ops.higher_order.invoke_subgraph
    ]


# Inductor ------------------------------------------------------------------------------------------------------


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


normed = region(norm)


def what_a_body_saves_is_given_to_another(x, w):
    return (normed(normed(x, w), w).exp() @ torch.ones(SIZE, SIZE)).sum()


def what_a_body_saves_is_written_in_place(x, w):
    y = normed(x, w)
    return (y.tanh() * normed(y, w) + 1).exp().sum()


def what_is_donated_is_asked_by_the_number_of_another_graph(x, w):
    x = x.exp()
    y = normed(x, w)
    return normed(y + x, w).square().sum()


@region
def adding(x):
    x.add_(1)
    return x.sin()


def what_a_body_writes(x, w):
    with torch.no_grad():
        x = x.exp()
        y = adding(x)
        z = adding(y)
        sums = x.sum(), y.sum(), z.sum()
    return (w * 1, *sums)


@pytest.mark.parametrize("policy", ["auto", "never"])
@pytest.mark.parametrize(
    "program",
    [
        *(what_a_body_saves_is_given_to_another, what_a_body_saves_is_written_in_place),
        *(what_is_donated_is_asked_by_the_number_of_another_graph, what_a_body_writes),
    ],
)
def test_what_inductor_computes_wrong(program, policy):
    expected = outcome(program)
    for mine, theirs in zip(outcome(compiled(program, "inductor", policy)), expected, strict=True):
        if theirs is not None and theirs.any():
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert any("2 calls of nested regions are inlined" in note for note in liger_compile.reports()[-1].notes)


@pytest.fixture
def llama(monkeypatch):
    """A function that marks the layers, and loss and gradients of a model."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model, ids = transformers.LlamaForCausalLM(config), torch.arange(16).view(2, 8)

    def mark(how):
        if how == "nested_compile_region":
            monkeypatch.setattr(LlamaDecoderLayer, "forward", region(LlamaDecoderLayer.forward))
        else:
            settings.enter_context(torch._dynamo.config.patch(use_graph_deduplication=True))

    def gradients(function):
        return step(lambda _, ids: function(input_ids=ids, labels=ids, use_cache=False).loss, model, ids)

    with contextlib.ExitStack() as settings:
        yield model, mark, gradients


@pytest.mark.parametrize(
    ("how", "inner"),
    [
        ("nested_compile_region", "inductor"),
        ("use_graph_deduplication", "aot_eager"),
        # Both halves are above.
        pytest.param("nested_compile_region", "aot_eager", marks=pytest.mark.slow),
        pytest.param("use_graph_deduplication", "inductor", marks=pytest.mark.slow),
    ],
)
def test_llama(llama, how, inner):
    model, mark, gradients = llama
    expected = gradients(model)
    mark(how)
    loss, found = gradients(compiled(model, inner, "auto"))
    torch.testing.assert_close(loss, expected.loss)
    for name, gradient in found.items():
        assert (gradient - expected.gradients[name]).norm() <= 1e-5 * expected.gradients[name].norm(), name
    assert found.keys() == expected.gradients.keys()
    (report,) = liger_compile.reports()
    patterns = [site.pattern for site in report.sites if site.kind != "leave"]
    copies = 2 if inner == "inductor" else 1  # of a body that stays, its sites are there once
    for pattern in ("attention.causal", "rotary.half_pair", "gated_mlp.swiglu"):
        assert patterns.count(pattern) == copies, report
    assert patterns.count("rms_norm.llama") == 2 * copies + 1
    assert {site.kind for site in report.sites} == {"replace", "annotate"}
    if copies == 2:  # places are those of the calls
        modules = {site.place.module for site in report.sites}
        assert {"model.layers.0.mlp", "model.layers.1.mlp"} <= modules


# A body that stays is a layer ----------------------------------------------------------------------------------


@region
def loss_of(x, w, labels):
    return F.cross_entropy(F.linear(x, w), labels)


def losses(x, w):
    weight, labels = torch.eye(CLASSES, SIZE) * w, torch.arange(ROWS)
    return loss_of(x, weight, labels) + loss_of(x * 2, weight, labels)


@pytest.mark.parametrize("policy", ["auto", "always"])
def test_losses_and_marks_hold_inside(policy):
    def both(x, w):
        return losses(normed(normed(x, w), w), w)

    torch.testing.assert_close(outcome(compiled(both, policy=policy)), outcome(both), rtol=1e-4, atol=1e-5)
    (report,) = liger_compile.reports()
    kinds = {site.pattern.partition(".")[0]: site.kind for site in report.sites}
    assert kinds["linear_cross_entropy"] == "replace"
    assert kinds["rms_norm"] == ("annotate" if policy == "auto" else "replace")
    assert not any("inlined" in note for note in report.notes)


def test_a_region_in_a_checkpoint_runs_twice():
    def layer(x, w):
        return losses(x, w)

    def model(x, w):
        return checkpoint(layer, x, w, use_reentrant=False)

    torch.testing.assert_close(outcome(compiled(model)), outcome(model))
    (report,) = liger_compile.reports()
    assert {site.kind for site in report.sites if "cross_entropy" in site.pattern} == {"leave"}


@region
def checkpointed_losses(x, w):
    return checkpoint(losses, x, w, use_reentrant=False).tanh() + x.sum()


def test_a_checkpoint_in_a_region_runs_twice():
    def model(x, w):
        return checkpointed_losses(x, w) + checkpointed_losses(x * 2, w)

    torch.testing.assert_close(outcome(compiled(model)), outcome(model))
    assert not liger_compile.reports()[-1].count("replace")


# The pass ------------------------------------------------------------------------------------------------------


def inlined(function, *given):
    """The graph of `function`, after the pass."""
    graphs = []

    def backend(gm, _):
        assert calls_in(gm)
        inline_subgraphs(gm)
        assert not calls_in(gm)
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*(given or inputs()))
    return graphs[0]


@region
def several(x, w, scale=2.0):
    return x * w * scale, {"parts": [x.sin(), x > 0]}, 3, None


def nested_results(x, w):
    y, first, count, _ = several(x, w)
    z, second, *_ = several(y, w)
    return (z * first["parts"][1] + second["parts"][0]) * count


@region
def inner(x, w):
    return norm(x, w).sin()


@region
def outer(x, w):
    return inner(inner(x, w), w) + x


def regions_in_regions(x, w):
    return outer(outer(x, w), w)


def regions_in_checkpoints(x, w):
    def layer(x, w):
        return inner(inner(x, w), w)

    return checkpoint(layer, checkpoint(layer, x, w, use_reentrant=False), w, use_reentrant=False)


@region
def checkpointed(x, w):
    return checkpoint(norm, x, w, use_reentrant=False).tanh()


def checkpoints_in_regions(x, w):
    return checkpointed(checkpointed(x, w), w)


@region
def dropping(x, w):
    return F.dropout(x * w, 0.3)


def dropouts(x, w):
    return dropping(dropping(x, w), w) * torch.rand(ROWS, SIZE)


@region
def in_other_modes(x, w):
    with torch.no_grad():
        scale = x.abs().mean()
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ torch.eye(SIZE)
    return y.float() * w * scale


def modes(x, w):
    return in_other_modes(in_other_modes(x, w), w)


@region
def writing_inside(x, w):
    y = x * 2
    y.view(-1).add_(1)
    return y.mul_(w).sin()


def writes(x, w):
    return writing_inside(writing_inside(x, w), w)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * gradient * x.cos()


@region
def doubled(x, w):
    return Doubled.apply(x) * w


def functions(x, w):
    return doubled(doubled(x, w), w)


def results_that_are_returned(x, w):
    y = normed(x * 1, w)
    return y, y.view(-1), normed(y, w)


PROGRAMS = (
    *(nested_results, regions_in_regions, regions_in_checkpoints, checkpoints_in_regions, dropouts, modes),
    *(writes, functions, results_that_are_returned),
)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("is_inlined", [True, False])
def test_programs(program, is_inlined, monkeypatch):
    monkeypatch.setattr(compiling, "is_right_for_subgraphs", lambda inner: not is_inlined)
    torch.testing.assert_close(outcome(compiled(program)), outcome(program), rtol=1e-4, atol=1e-5)


def test_sizes_may_be_symbolic():
    """The copies stand for tensors of the same symbols, and take no guards of their own."""
    fast = compiled(regions_in_regions, "inductor")
    for rows in (4, 5, 6, 7):
        x, w = torch.randn(rows, SIZE), torch.ones(SIZE)
        torch.testing.assert_close(fast(x, w), regions_in_regions(x, w), rtol=1e-4, atol=1e-5)
    assert len(liger_compile.reports()) == 2


@region
def attending(x, mask):
    at = torch.arange(x.shape[-2])
    own = F.scaled_dot_product_attention(x, x, x, attn_mask=at[None] <= at[:, None])
    return own + F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def test_a_mask_holds_inside():
    """Proven of positions that the body makes, or is handed."""

    def model(x):
        at = torch.arange(x.shape[-2])
        mask = at[None] <= at[:, None]
        return attending(attending(x, mask), mask)

    x = torch.randn(1, 2, ROWS, SIZE)
    for inner, copies in (("aot_eager", 1), ("inductor", 2)):
        torch.testing.assert_close(compiled(model, inner)(x), model(x), rtol=1e-4, atol=1e-5)
        assert liger_compile.reports()[-1].count("replace") == 2 * copies


@region
def viewing(x):
    y = x.cos()
    return y.t().contiguous(), y[1:].sum() + x.view(-1)[1:].sum()


def test_what_shares_memory_in_every_copy():
    def model(x):
        y, first = viewing(x * 2)
        z, second = viewing(y.t().contiguous())
        return z.view(-1), first + second

    graph = inlined(model, torch.randn(ROWS, SIZE)).graph

    def storages(target):
        nodes = [node for node in graph.nodes if getattr(node.target, "__name__", node.target) == target]
        return [storage_of(node.meta["example_value"]) for node in nodes]

    def operands():
        return [
            storage_of(node.args[0].meta["example_value"])
            for node in graph.find_nodes(op="call_method", target="cos")
        ]

    cosines, made = storages("cos"), operands()
    assert len({*cosines, *made}) == 4  # every call has memory of its own
    sliced = storages("getitem")
    assert [each for each in sliced if each in cosines] == cosines  # y[1:]
    assert [each for each in sliced if each in made] == made  # x.view(-1)[1:]
    returned = graph.output_node().args[0][0]  # z.view(-1)
    assert storages("contiguous")[-1] == storage_of(returned.meta["example_value"])


def test_writes_are_known_in_every_copy():
    """Of a body's own memory, of an operand, and of a result, later."""

    def model(x, w):
        with torch.no_grad():
            x = x * 1
            y = adding(x)
            z = adding(y)
            z.view(-1).mul_(2)
            return x.clone(), y.clone(), z.clone()

    graph = inlined(model).graph
    mutations = Mutations(graph)
    cloned = [node.args[0] for node in graph.find_nodes(op="call_method", target="clone")]
    assert len(cloned) == 3 and not any(map(mutations.is_clean, cloned))
    assert all(map(mutations.is_known, cloned))
    last = [mutations.position[mutations.last_write(node)] for node in cloned]
    assert all(a < b for a, b in pairwise(last))


def test_bodies_do_not_stay_behind():
    gm = inlined(regions_in_regions)
    assert not [name for name, _ in gm.named_children()]


def made(take):
    """A graph that calls a body, and what `take` makes of the call is returned."""
    body = Graph()
    x = body.placeholder("x")
    body.output((x, 3, body.call_function(torch.sin, (x,))))
    graph = Graph()
    x = graph.placeholder("x")
    call = graph.call_function(torch.ops.higher_order.invoke_subgraph, (graph.get_attr("body"), "body", x))
    graph.output(take(graph, call))
    return GraphModule({"body": GraphModule({}, body)}, graph)


def test_results_that_are_operands_or_constants():
    def take(graph, call):
        parts = [graph.call_function(operator.getitem, (call, at)) for at in range(3)]
        return graph.call_function(torch.add, (parts[0], parts[2]), {"alpha": parts[1]}), parts[0], parts[1]

    gm, x = made(take), torch.ones(2)
    assert inline_subgraphs(gm) == 1
    total, same, three = gm(x)
    assert torch.equal(total, x + 3 * x.sin()) and same is x and three == 3


def test_what_dynamo_does_not_write_is_refused():
    with pytest.raises(ValueError, match="takes all results of invoke_subgraph; one of them was expected"):
        inline_subgraphs(made(lambda graph, call: graph.call_function(len, (call,))))
    gm = made(lambda graph, call: graph.call_function(operator.getitem, (call, 0)))
    gm.body = None
    with pytest.raises(ValueError, match="calls a graph that its module does not have"):
        inline_subgraphs(gm)


def test_tensors_and_modules_of_a_body_get_names_of_their_own():
    def body_with(value):
        graph = Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(torch.add, (x, graph.get_attr("constant"))),))
        return GraphModule({"constant": value}, graph)

    graph = Graph()
    value = graph.placeholder("x")
    for name in ("first", "second", "first"):
        call = graph.call_function(
            torch.ops.higher_order.invoke_subgraph, (graph.get_attr(name), name, value)
        )
        value = graph.call_function(operator.getitem, (call, 0))
    graph.output(value)
    bodies = {"first": body_with(torch.ones(2)), "second": body_with(torch.full((2,), 10.0))}
    gm = GraphModule(bodies, graph)
    assert inline_subgraphs(gm) == 3
    assert torch.equal(gm(torch.zeros(2)), torch.full((2,), 12.0))


def test_random_numbers_are_drawn_in_the_same_order_by_inductor():
    with inductor_config.patch(fallback_random=True):
        torch.testing.assert_close(
            outcome(compiled(dropouts, "inductor")), outcome(dropouts), rtol=1e-4, atol=1e-5
        )
