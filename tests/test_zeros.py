"""Outputs that nobody uses have their zeros in one buffer, and nobody can tell from the gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph
from torch.profiler import ProfilerActivity, profile

from liger_compile.zeros import FEWEST, sharing_zeros, strides_of_outputs

SIZE = 4


def compiled_by(inner):
    """What compiles a function with `sharing_zeros` around the callable."""

    def backend(gm, example_inputs):
        strides = strides_of_outputs(gm.graph)
        return sharing_zeros(torch._dynamo.lookup_backend(inner)(gm, example_inputs), strides)

    return lambda function: torch.compile(function, backend=backend)


@pytest.fixture(params=["aot_eager", "inductor"])
def compiled(request):
    return compiled_by(request.param)


def leaves(*shapes):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random, requires_grad=True) for shape in shapes]


def several(x, w):
    y = x @ w
    cached = torch.cat((y.new_empty(0), y.view(2, 2, -1).transpose(1, 2)))  # as transformers' cache begins
    return y.sum(), y.t() + 1, (y * x).view(2, -1), y.half(), y.detach(), cached


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (1, 3), (5,), (0, 1, 2, 3, 5)], ids=str)
def test_gradients_are_those_of_eager_code(compiled, used):
    def gradients(function):
        given = leaves((SIZE, SIZE), (SIZE, SIZE))
        outputs = function(*given)
        sum(outputs[position].float().square().sum() for position in used).backward()
        return [output.detach() for output in outputs], [each.grad for each in given]

    outputs, expected = gradients(compiled(several))
    eager_outputs, eager_expected = gradients(several)
    torch.testing.assert_close(outputs, eager_outputs)
    torch.testing.assert_close(expected, eager_expected)


def test_zeros_are_made_once(compiled):
    """Of each dtype; without, autograd makes as many as there are outputs."""
    x, w = leaves((SIZE, SIZE), (SIZE, SIZE))
    function = compiled(several)
    function(x, w)[0].backward()
    outputs = function(x, w)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        outputs[0].backward()
    made = {event.key: event.count for event in profiled.key_averages()}
    assert made["aten::zeros"] == 2  # float32 and float16


def test_zeros_are_not_copied():
    """AOTAutograd copies those that are in other strides than it has traced. Inductor's output has others."""

    def function(x, w):
        keys = (x @ w).view(2, SIZE, 2, -1).transpose(1, 2)
        cache = [torch.cat((x.new_empty(0), each), dim=-2) for each in (keys, keys * 2)]
        return (keys * keys).sum(), *cache

    x, w = leaves((2 * SIZE, SIZE), (SIZE, SIZE))
    compiled = compiled_by("inductor")(function)
    compiled(x, w)[0].backward()
    outputs = compiled(x, w)
    assert outputs[1].stride() != function(x, w)[1].stride()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.autograd.grad(outputs[0], [x, w])
    assert "aten::copy_" not in {event.key for event in profiled.key_averages()}


def test_parameters_do_not_share_a_gradient(compiled):
    """Backward returns the gradient of the second output as it came, and that of the third."""
    x, y, w = leaves((SIZE, SIZE), (SIZE, SIZE), SIZE)
    function = compiled(lambda x, y, w: ((w * 2).sum(), x + 1, y.view(-1) + 1))
    function(x, y, w)[0].backward()
    x.grad += 1
    assert torch.equal(y.grad, torch.zeros(SIZE, SIZE))
    assert torch.equal(w.grad, torch.full((SIZE,), 2.0))


def test_outputs_can_be_written_into(compiled):
    """As trainers do that divide the loss by a number of steps."""
    x, w = leaves((SIZE, SIZE), (SIZE, SIZE))
    loss, second, *_ = compiled(several)(x, w)
    loss /= 2
    second += 1
    loss.backward()
    whole = leaves((SIZE, SIZE), (SIZE, SIZE))
    several(*whole)[0].backward()
    torch.testing.assert_close(x.grad, whole[0].grad / 2)
    torch.testing.assert_close(second, several(*whole)[1] + 1)


def test_backward_twice(compiled):
    x, w = leaves((SIZE, SIZE), (SIZE, SIZE))
    outputs = compiled(several)(x, w)
    (first,) = torch.autograd.grad(outputs[0], x, retain_graph=True)
    (again,) = torch.autograd.grad(outputs[0], x)
    assert torch.equal(first, again)


def test_outputs_with_a_gradient_of_their_own_are_left_alone(compiled):
    """What is an input, or has another function for its gradient: these have no zeros to share."""

    def function(x, w):
        return w.sum(), x, x.view(-1), w * 2

    x, w = leaves((SIZE, SIZE), (SIZE, SIZE))
    outputs = compiled(function)(x, w)
    outputs[0].backward()
    assert outputs[1] is x and outputs[0].grad_fn is not None
    assert x.grad is None


def test_sparse_gradients():
    def function(ids, table):
        rows = F.embedding(ids, table, sparse=True)
        return rows.sum(), rows * 2, rows + 1

    ids, (table,) = torch.tensor([1, 3]), leaves((SIZE, SIZE))
    compiled_by("aot_eager")(function)(ids, table)[0].backward()
    (expected,) = leaves((SIZE, SIZE))
    function(ids, expected)[0].backward()
    torch.testing.assert_close(table.grad.to_dense(), expected.grad.to_dense())


@pytest.mark.parametrize(
    ("outputs", "expected"), [(tuple, [None] * 3), (list, [None] * 3), (lambda nodes: nodes[0], [])]
)
def test_graphs_that_dynamo_has_not_made(outputs, expected):
    """A list of outputs, or one; of what nobody has traced."""
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(outputs([x, graph.call_function(torch.neg, (x,)), 3]))
    assert strides_of_outputs(graph) == expected


def test_few_outputs_are_what_the_compiled_function_returned():
    given = leaves((SIZE, SIZE), (SIZE, SIZE))
    outputs = torch.compile(several, backend="aot_eager")(*given)[: FEWEST - 1]
    assert sharing_zeros(lambda: outputs, [None] * FEWEST)() is outputs
    with torch.no_grad():
        assert sharing_zeros(several, [None] * 6)(*given)[0].grad_fn is None
