"""Outputs that nobody uses have their zeros in one buffer, and nobody can tell."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import compiled_autograd
from torch.fx import Graph
from torch.profiler import ProfilerActivity, profile

import liger_compile
from liger_compile.runtime.shared_zeros import FEWEST, STRIDES, sharing_zeros, strides_of_outputs
from tests.helpers.gradients import gradients_of

SIZE = 4


def compiled_by(inner):
    """What compiles a function with `sharing_zeros` around the callable."""

    def backend(gm, example_inputs):
        strides = strides_of_outputs(gm.graph)
        return sharing_zeros(torch._dynamo.lookup_backend(inner)(gm, example_inputs), strides)

    return lambda function: torch.compile(function, backend=backend)


def by_backend(function, **options):
    """`function` under backend="liger", and the report of one forward."""
    torch.compiler.reset()
    liger_compile.clear_reports()
    options = {f"liger.{name}": value for name, value in {"inner": "aot_eager", **options}.items()}
    called = torch.compile(function, backend="liger", options=options)
    loss = called(*leaves((SIZE, SIZE), (SIZE, SIZE)))[0]
    (report,) = liger_compile.reports()
    return loss, report


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
    def taken(function):
        def only(*given):
            outputs = function(*given)
            return [output if at in used else output.detach() for at, output in enumerate(outputs)]

        return gradients_of(only, *leaves((SIZE, SIZE), (SIZE, SIZE)))

    torch.testing.assert_close(taken(compiled(several)), taken(several))


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
    """Backward returns the gradient of the second output unchanged, and that of the third."""
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


# What a caller can observe is what the compiled callable gives ------------------------------------------------


def whole_and_view(x):
    whole = x * 2
    return whole, whole.view(2, 2), x + 1, x + 2


def two_views(x):
    whole = x * 2
    return whole.view(2, 2), whole[1:], x + 1, x * x


def output_twice(x):
    whole = x.exp()
    return whole, whole, whole.sin(), x + 1


def parts_of_one(x):
    return *(x * 2).unbind(0), x + 1


def with_its_input(x):
    return x, x.view(2, 2), x + 1, x + 2, x * 3


def written_inside(x):
    whole = (x * 1).mul_(2)
    return whole, whole[:2], x + 1, x.tanh()


def with_what_has_no_gradient(x):
    whole = x * 2
    return whole, whole.detach(), x > 0, 3, x + 1, whole.bfloat16()


ALIASES = (
    *(whole_and_view, two_views, output_twice, parts_of_one),
    *(with_its_input, written_inside, with_what_has_no_gradient),
)


def described(output):
    if not isinstance(output, torch.Tensor):
        return output
    node = output.grad_fn
    parents = [] if node is None else [parent and type(parent).__name__ for parent, _ in node.next_functions]
    facts = (output.shape, output.stride(), output.dtype, output.requires_grad, output.is_leaf)
    history = (output._version, output._is_view(), output.output_nr, type(node).__name__, parents)
    return *facts, *history, output.detach().tolist()


def alike(outputs):
    """Which outputs are the same, views of one another, and share memory."""
    tensors = [each for each in outputs if isinstance(each, torch.Tensor)]
    return [
        (a is b, a._base is b, a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())
        for a in tensors
        for b in tensors
    ]


def seen(function, *given):
    """What it returns, or raises."""
    try:
        return function(*given)
    except (RuntimeError, NotImplementedError) as error:
        return type(error).__name__, str(error).split("0x")[0]


def both(function):
    """It as "aot_eager" compiles it, and with zeros that are shared."""
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager"), compiled_by("aot_eager")(function)


def input_of_four():
    return torch.arange(1.0, 5.0).requires_grad_()


def differentiable(outputs):
    return [each for each in outputs if isinstance(each, torch.Tensor) and each.requires_grad]


@pytest.mark.parametrize("function", ALIASES)
def test_writes_into_outputs_that_share_memory(function):
    """Each output is written into, and then each is used: values, gradients, versions, aliases and errors."""

    def written_and_used(compiled, written, used):
        x = input_of_four()
        outputs = compiled(x)
        before = [described(each) for each in outputs], alike(outputs)
        differentiable(outputs)[written].mul_(3)
        after = [described(each) for each in outputs], alike(outputs)
        differentiable(outputs)[used].float().square().sum().backward()
        return before, after, x.grad.tolist()

    stock, sharing = both(function)
    count = len(differentiable(stock(input_of_four())))
    for written in range(count):
        for used in range(count):
            expected = seen(written_and_used, stock, written, used)
            assert seen(written_and_used, sharing, written, used) == expected


def test_outputs_are_what_the_compiled_callable_returns():
    returned = []

    def backend(gm, example_inputs):
        compiled = torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

        def recorded(*inputs):
            returned[:] = compiled(*inputs)
            return tuple(returned)

        call = sharing_zeros(recorded, strides_of_outputs(gm.graph))
        return lambda *inputs: [check_same(call(*inputs))] and tuple(returned)

    def check_same(outputs):
        assert len(outputs) == len(returned) and all(a is b for a, b in zip(outputs, returned, strict=True))

    outputs = torch.compile(whole_and_view, backend=backend)(input_of_four())
    assert returned and type(outputs[0].grad_fn).__name__ == "CompiledFunctionBackward"


def listed(gradient):
    return None if gradient is None else gradient.tolist()


def on_nodes(compiled):
    """A user's hooks see no zeros that autograd would not show them, and gradients that they change are used."""
    x, calls = input_of_four(), []
    outputs = compiled(x)
    node = outputs[2].grad_fn
    tensors = differentiable(outputs)
    for at, each in enumerate(tensors):
        each.retain_grad()
        each.register_hook(lambda gradient, at=at: calls.append((at, listed(gradient))))
    node.register_prehook(lambda gradients: calls.append([g is None for g in gradients]))
    node.register_prehook(lambda gradients: tuple(g if g is None else g * 7 for g in gradients))
    node.register_hook(lambda *gradients: calls.append([[g is None for g in each] for each in gradients]))
    outputs[2].sum().backward()
    return calls, [each.grad is None for each in tensors], x.grad.tolist()


def of_a_batch(compiled):
    x = input_of_four()
    (gradients,) = torch.autograd.grad(compiled(x)[2], x, torch.eye(4), is_grads_batched=True)
    return gradients.tolist()


def with_a_graph(compiled):
    x = input_of_four()
    (gradient,) = torch.autograd.grad(compiled(x)[3].square().sum(), x, create_graph=True)
    return type(gradient.grad_fn).__name__, seen(gradient.sum().backward)


def several_times(compiled):
    x = input_of_four()
    outputs = compiled(x)
    for each in (outputs[3], outputs[2], outputs[3]):
        each.sum().backward(retain_graph=True)
    outputs[2].sum().backward()
    return x.grad.tolist(), seen(outputs[3].sum().backward)


def of_an_output(compiled):
    outputs = compiled(input_of_four())
    gradients = torch.autograd.grad(outputs[2].sum() * 2, [outputs[2], outputs[3]], allow_unused=True)
    return [*map(listed, gradients)]


def without_gradients(compiled):
    with torch.no_grad():
        outputs = compiled(input_of_four())
    with torch.inference_mode():
        return [described(each) for each in outputs], [
            each.is_inference() for each in compiled(input_of_four())
        ]


def transformed(compiled):
    return torch.func.grad(lambda x: compiled(x)[2].sum())(input_of_four().detach()).tolist()


def by_threads(compiled):
    """Backwards of one graph at once."""
    x, barrier, gradients = input_of_four(), threading.Barrier(4), []
    outputs = compiled(x)

    def backward():
        barrier.wait(timeout=30)
        gradients.append(torch.autograd.grad(outputs[3].sum(), x, retain_graph=True)[0].tolist())

    threads = [threading.Thread(target=backward) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(timeout=60)
    return gradients


@pytest.mark.parametrize(
    "use",
    [
        *(on_nodes, of_a_batch, with_a_graph, several_times),
        *(of_an_output, without_gradients, transformed, by_threads),
    ],
)
def test_every_way_to_take_gradients(use):
    stock, sharing = both(whole_and_view)
    assert use(sharing) == use(stock)


def test_gradients_returned_as_they_came_have_strides_of_their_own():
    """Where backward hands on zeros, expanded or not, they are in the strides that AOTAutograd would give."""

    def function(x, y):
        return (x * 2).sum(), y.t() + 1, y + 2

    def gradients(compiled):
        x, y = leaves((SIZE,), (SIZE, SIZE))
        return torch.autograd.grad(compiled(x, y)[0], [x, y])

    for one, other in zip(*map(gradients, both(function)), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


@pytest.mark.parametrize("is_first_eager", [True, False])
def test_compiled_autograd(is_first_eager):
    """It runs the graph of backward without its method, and is not compiled more often."""

    def gradients(compiled):
        x, compiles = input_of_four(), []

        def compiler(gm):
            compiles.append(gm)
            return torch.compile(gm, backend="aot_eager", fullgraph=True)

        outputs = compiled(x)
        if is_first_eager:
            outputs[3].sum().backward(retain_graph=True)
        for _ in range(3):
            with compiled_autograd._enable(compiler):
                outputs[3].sum().backward(retain_graph=True)
        outputs[3].sum().backward()
        return x.grad.tolist(), len(compiles)

    stock, sharing = both(whole_and_view)
    assert gradients(sharing) == gradients(stock)
    torch._dynamo.utils.counters["compiled_autograd"].clear()  # others count what they have captured


def test_an_inputs_backward_is_left_alone():
    """It belongs to the graph that has computed the input, whoever has compiled that."""
    stock = torch.compile(whole_and_view, backend="aot_eager")
    first = stock(input_of_four())
    method = first[2].grad_fn._forward_cls.backward
    compiled_by("aot_eager")(lambda *given: (*given, given[0] + 1))(*first)
    assert first[2].grad_fn._forward_cls.backward is method


def test_dynamic_sizes():
    compiled = compiled_by("aot_eager")(lambda x: (x.sum(), x.t() + 1, x * 2))
    for rows in (3, 4, 5):
        (x,) = leaves((rows, SIZE))
        loss, *_ = compiled(x)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            loss.backward()
        assert torch.equal(x.grad, torch.ones(rows, SIZE))
    assert {event.key: event.count for event in profiled.key_averages()}["aten::zeros"] == 1


# The report.

NAME = "backward.shared_zeros"


def test_the_report_names_outputs_that_share_their_zeros():
    loss, report = by_backend(several)
    assert hasattr(loss.grad_fn, STRIDES)
    text = report.to_dict()["backward"]["choices"][NAME]
    assert text.startswith("of 5 outputs with a gradient, the unused ones share a buffer of zeros")
    assert "In backward" in str(report) and NAME in str(report)
    assert "did not run" not in str(report)  # on a CPU no pass is expected


@pytest.mark.parametrize(
    "options", [{"skip": (NAME,)}, {"skip": ("backward",)}, {"policy": "never"}, {"backward_passes": "never"}]
)
def test_zeros_are_autograds_where_the_choice_is_left_out(options):
    loss, report = by_backend(several, **options)
    assert not hasattr(loss.grad_fn, STRIDES)
    assert not report.backward.choices and "In backward" not in str(report)
    assert not any("liger.skip" in note for note in report.notes)


def test_no_report_names_outputs_that_share_nothing():
    for function in (lambda x, w: (x @ w, x * w), lambda x, w: ((x @ w).detach(), x.detach(), w.detach())):
        _, report = by_backend(function)
        assert not report.backward.choices
    with torch.no_grad():
        _, report = by_backend(several)
    assert not report.backward.choices
