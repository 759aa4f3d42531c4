"""Writing gradients in place: the same numbers, and only what nobody else reads is written."""

from __future__ import annotations

import operator
from functools import partial

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx

from liger_compile.backward_passes import DEFAULT_PASSES, Backward, run_passes
from liger_compile.compile import BackwardPlan, with_backward_passes
from tests.backward_passes.seen import names_of_ours

PLAN = BackwardPlan(strict=True)
_ours = torch.ops.liger_compile
ROWS, WIDTH = 50, 8


class MadeInForward(torch.autograd.Function):
    """linear_cross_entropy of class 5, with the backward that it has on a GPU."""

    @staticmethod
    def forward(ctx, x, weight):
        target = torch.full((len(x),), 5)
        terms = None, None, -100, "mean", 0.0, 1.0, None, 0.0
        loss, dx, dweight, *_ = _ours.linear_cross_entropy.default(
            x, weight, target, *terms, True, True, False
        )
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        return dx * dloss, _ours.scale.default(dweight, dloss)


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, table):
        ctx.save_for_backward(indices)
        ctx.rows = table.shape[0]
        return table[indices]

    @staticmethod
    def backward(ctx, dy):
        return None, _ours.embedding_backward.default(dy, *ctx.saved_tensors, ctx.rows, 3, False)


def head_made_in_forward(x, table):
    return MadeInForward.apply(x, table)


def head_of_products(x, table):
    return F.linear(x, table).square().sum()


HEADS = {
    # what each graph of backward writes in place, where what is saved is donated and where it is not
    head_made_in_forward: (["add_embedding_backward", "scale_in_place"], ["add_embedding_backward"]),
    head_of_products: (["add_embedding_backward"],) * 2,
}


def loss_of(head, indices, table):
    return 2.5 * head(Embedding.apply(indices, table).sin().flatten(0, -2), table)


def compiled_with_pass(function, seen):
    writes = with_backward_passes(None, PLAN)

    class Seen(CustomGraphPass):
        def __call__(self, graph):
            writes(graph)
            seen.append(sorted_names(graph))

        def uuid(self):
            return writes.uuid()

    options = {"post_grad_custom_post_pass": Seen()}
    return torch.compile(function, fullgraph=True, options=options)


def sorted_names(graph):
    return sorted(names_of_ours(graph))


@pytest.fixture
def inputs():
    torch._dynamo.reset()
    torch.manual_seed(0)
    indices = torch.tensor([[1, 4, 4, 49], [4, 3, 0, 3]])
    yield indices, torch.randn(ROWS, WIDTH, requires_grad=True)
    torch._dynamo.reset()


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(
    ("head", "donates"),
    [(head_made_in_forward, True), (head_made_in_forward, False), (head_of_products, True)],
)
def test_what_nobody_else_reads_is_written(head, donates, inputs):
    indices, table = inputs
    function, seen = partial(loss_of, head), []
    with functorch_config.patch(donated_buffer=donates):
        compiled = compiled_with_pass(function, seen)
        (expected,) = torch.autograd.grad(function(indices, table), table)
        for _ in range(2):
            (found,) = torch.autograd.grad(compiled(indices, table), table)
            torch.testing.assert_close(found, expected)
    expected_ops = HEADS[head][not donates]
    forward, backward = seen
    writing = {"add_embedding_backward", "scale_in_place"}
    assert [op for op in backward if op in writing] == expected_ops
    assert "embedding_backward" not in backward and not writing & {*forward}


@pytest.mark.usefixtures("uncached")
def test_a_graph_that_is_kept_gives_the_same_twice(inputs):
    indices, table = inputs
    function = partial(loss_of, head_made_in_forward)
    with functorch_config.patch(donated_buffer=False):
        loss = compiled_with_pass(function, [])(indices, table)
        first, second = (torch.autograd.grad(loss, table, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_the_caches_know_what_was_donated(inputs):
    """Else a graph that is kept would get the code that writes into what it keeps."""
    from torch._inductor.utils import fresh_cache

    indices, table = inputs
    function = partial(loss_of, head_made_in_forward)
    (expected,) = torch.autograd.grad(function(indices, table), table)
    options = {"post_grad_custom_post_pass": with_backward_passes(None, PLAN)}
    with fresh_cache():
        for donates in (True, False):
            torch._dynamo.reset()
            counters.clear()
            with functorch_config.patch(donated_buffer=donates):
                loss = torch.compile(function, fullgraph=True, options=options)(indices, table)
                for _ in range(1 if donates else 2):
                    (found,) = torch.autograd.grad(loss, table, retain_graph=not donates)
                    torch.testing.assert_close(found, expected)
        assert counters["inductor"]["fxgraph_cache_miss"] > 0
        torch._dynamo.reset()
        counters.clear()
        with functorch_config.patch(donated_buffer=False):
            loss = torch.compile(function, fullgraph=True, options=options)(indices, table)
            (found,) = torch.autograd.grad(loss, table, retain_graph=True)  # which is in their keys
        torch.testing.assert_close(found, expected)
        assert counters["inductor"]["fxgraph_cache_hit"] == 2, "with a pass of ours, graphs are still kept"


def write_in_place(graph, donated):
    run_passes(Backward(graph, donated), DEFAULT_PASSES[2:], strict=True)


def graph_of(function, *inputs):
    """`function` as a graph of aten operators and ours."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake")(*inputs)


def rows(table, dy, indices, padding_idx=-1, scales_by_frequency=False):
    return _ours.embedding_backward.default(dy, indices, table.shape[0], padding_idx, scales_by_frequency)


def total_returned_as_well(table, dy, indices):
    total = _ours.scale.default(table, dy[0, 0])
    return total + rows(table, dy, indices), total


def a_view_of_what_is_returned(table, dy, indices):
    total = _ours.scale.default(table, dy[0, 0])
    return total.view(ROWS, WIDTH) + rows(table, dy, indices), total


def total_is_an_input(table, dy, indices):
    return table + rows(table, dy, indices)


def total_is_broadcast(table, dy, indices):
    return _ours.scale.default(table[:1], dy[0, 0]) + rows(table, dy, indices)


def total_of_other_strides(table, dy, indices):
    return torch.mm(table.t(), torch.eye(ROWS)).t() + rows(table, dy, indices)


def a_multiple_is_added(table, dy, indices):
    return torch.add(_ours.scale.default(table, dy[0, 0]), rows(table, dy, indices), alpha=2)


def rows_returned_as_well(table, dy, indices):
    found = rows(table, dy, indices)
    return _ours.scale.default(table, dy[0, 0]) + found, found


def rows_twice(table, dy, indices):
    found = rows(table, dy, indices)
    return found + found


def by_frequency(table, dy, indices):
    return _ours.scale.default(table, dy[0, 0]) + rows(table, dy, indices, -1, True)


REFUSED = [
    total_returned_as_well,
    a_view_of_what_is_returned,
    total_is_an_input,
    total_is_broadcast,
    total_of_other_strides,
    a_multiple_is_added,
    rows_returned_as_well,
    rows_twice,
    by_frequency,
]


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_what_is_read_or_laid_out_otherwise_is_left(function):
    arguments = torch.randn(ROWS, WIDTH), torch.randn(6, WIDTH), torch.tensor([1, 1, 2, 5, 49, 2])
    gm = graph_of(function, *arguments)
    before = sorted_names(gm.graph)
    write_in_place(gm.graph, donated=())
    assert sorted_names(gm.graph) == before


def test_what_is_donated_and_read_again_is_left():
    def function(saved, factor):
        return _ours.scale.default(saved, factor), saved.sin()

    gm = graph_of(function, torch.randn(3, 4), torch.tensor(2.0))
    write_in_place(gm.graph, donated={0})
    assert sorted_names(gm.graph) == ["scale"]


def test_what_is_donated_and_has_a_view_that_is_saved_too_is_left():
    """Of views of one tensor, AOTAutograd donates all."""

    def function(saved, view, factor):
        return _ours.scale.default(saved, factor), view.sin()

    saved = torch.randn(3, 4)
    gm = graph_of(function, saved, saved.view(4, 3), torch.tensor(2.0))
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert len(names) == 3
    write_in_place(gm.graph, donated={0, 1})
    assert sorted_names(gm.graph) == ["scale"]


def test_a_result_that_is_picked_twice_is_left():
    def function(x, weight, target, dy, indices):
        terms = None, None, -100, "mean", 0.0, 1.0, None, 0.0
        made = _ours.linear_cross_entropy.default(x, weight, target, *terms, True, True, False)
        return made[2] + rows(weight, dy, indices)

    arguments = torch.randn(6, WIDTH), torch.randn(ROWS, WIDTH), torch.tensor([1, 1, 2, 5, 49, 2])
    arguments = (*arguments, torch.randn(6, WIDTH), arguments[2])
    for picks, expected in ((1, "add_embedding_backward"), (2, "embedding_backward")):
        gm = graph_of(function, *arguments)
        (total,) = (node for node in gm.graph.nodes if node.target is operator.getitem and node.args[1] == 2)
        if picks == 2:
            output = gm.graph.output_node()
            with gm.graph.inserting_after(total):
                again = gm.graph.call_function(operator.getitem, total.args)
            again.meta["val"] = total.meta["val"]
            output.args = ((output.args[0], again),)
        write_in_place(gm.graph, donated=())
        assert sorted_names(gm.graph) == [expected, "linear_cross_entropy"]


@pytest.mark.parametrize("scale_first", [True, False])
def test_the_numbers_of_the_changed_graph(scale_first):
    def function(saved, factor, dy, indices):
        total, found = _ours.scale.default(saved, factor), rows(saved, dy, indices, 2)
        return total + found if scale_first else found + total

    arguments = (
        torch.randn(ROWS, WIDTH),
        torch.tensor(3.0),
        torch.randn(6, WIDTH),
        torch.tensor([1, 1, 2, 5, 49, 2]),
    )
    expected = function(*arguments)
    gm = graph_of(function, *arguments)
    write_in_place(gm.graph, donated={0})
    gm.recompile()
    assert sorted_names(gm.graph) == ["add_embedding_backward", "scale_in_place"]
    found = gm(*arguments)
    torch.testing.assert_close(found, expected)
    assert found is arguments[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_that_write(dtype):
    table, dy = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(2, 3, WIDTH).to(dtype)
    indices = torch.tensor([[1, 1, 0], [4, 1, 3]])
    torch.library.opcheck(_ours.add_embedding_backward.default, (table, dy, indices, 3))
    torch.library.opcheck(_ours.scale_in_place.default, (table, torch.tensor(0.5)))
    torch.library.opcheck(_ours.scale.default, (table, torch.tensor(0.5)))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_tied_head_on_a_gpu_has_one_table_of_gradients(mode, factor):
    torch._dynamo.reset()
    torch.manual_seed(0)
    table = torch.randn(70000, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    ids = torch.randint(70000, (8, 128), device="cuda")  # too few would be left to Inductor

    def loss_of(ids):
        return factor * F.cross_entropy(
            F.linear(F.embedding(ids, table).sin(), table).view(1024, -1), ids.view(-1)
        )

    compiled = torch.compile(loss_of, backend="liger", mode=mode)
    (expected,) = torch.autograd.grad(loss_of(ids), table)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(ids)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        (found,) = torch.autograd.grad(loss, table)
        taken = torch.cuda.max_memory_allocated() - before
        assert (found.float() - expected.float()).norm() <= 0.01 * expected.float().norm()
    if mode is None:  # forward has made it already
        assert taken < 0.1 * table.nbytes


# Adapters ----------------------------------------------------------------------------------------------------


def adapted(base, a, b):
    return _ours.add_product.default(base, a, b, 0.5)


def of_a_linear_layer(x, weight, a, b):
    return adapted((x @ weight).view(-1, 6), a, b)


def of_a_layer_that_is_read_elsewhere(x, weight, a, b):
    base = x @ weight
    return adapted(base, a, b), base.sum()


def of_a_view_that_is_read_elsewhere(x, weight, a, b):
    base = (x @ weight).view(2, 2, 6)
    return adapted(base.view(-1, 6), a, b), base.sum()


def of_an_input(x, weight, a, b):
    return adapted(x @ weight + 0, a, b), adapted(weight, a, b)


def of_one_layer_twice(x, weight, a, b):
    base = x @ weight
    return adapted(base, a, b), adapted(base, a, b * 2)


@pytest.mark.parametrize(
    ("function", "writes"),
    [
        (of_a_linear_layer, 1),
        (of_a_layer_that_is_read_elsewhere, 0),
        (of_a_view_that_is_read_elsewhere, 0),
        (of_an_input, 0),
        (of_one_layer_twice, 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_adapter_is_added_in_place_where_nothing_else_reads_the_layer(function, writes):
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator) for shape in ((4, 4), (4, 6), (4, 2), (2, 6))]
    gm = make_fx(function)(*given)
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta.setdefault("val", None)
    (one_pass,) = (one for one in DEFAULT_PASSES if one.in_forward)
    assert len(run_passes(Backward(gm.graph), [one_pass], strict=True)) == writes
    gm.recompile()
    before = [tensor.clone() for tensor in given]
    torch.testing.assert_close(gm(*given), function(*before))
    torch.testing.assert_close(given, before)
