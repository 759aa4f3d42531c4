"""What a call writes into, which values share that memory, and when: what is not known to write nothing writes all."""

import builtins
import math
import operator
import time

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

import liger_compile
from liger_compile.graphs.aliasing import Mutations
from liger_compile.graphs.effects import EVERYTHING, effect_of, written_arguments
from liger_compile.testing import graphs

LIBRARY = torch.library.Library("liger_test_aliasing", "DEF")


def _operator(schema, implementation, fake):
    LIBRARY.define(schema)
    name = schema.split("(")[0]
    LIBRARY.impl(name, implementation, "CPU")
    LIBRARY.impl(name, fake, "Meta")


def _double(*tensors):
    for tensor in tensors:
        tensor.data.mul_(2)  # autograd counts no write


_operator("double(Tensor(a!) x) -> ()", lambda x: _double(x), lambda x: None)
_operator("double_all(Tensor(a!)[] xs) -> ()", lambda xs: _double(*xs), lambda xs: None)
_operator("double_out(Tensor x, *, Tensor(a!) out) -> ()", lambda x, out: _double(out), lambda x, out: None)
_operator("several(Tensor(a!) x) -> ()", lambda x: _double(x), lambda x: None)
_operator("several.pure(Tensor x, Tensor y) -> Tensor", torch.add, torch.add)
OURS = torch.ops.liger_test_aliasing


@torch.library.custom_op("liger_test_aliasing::custom", mutates_args="unknown")
def _custom(x: torch.Tensor) -> None:
    x.mul_(2)


@_custom.register_fake
def _(x):
    return None


@torch._dynamo.allow_in_graph
def _hidden(nested, *, other):
    nested["deep"][0].mul_(2)
    return other + 1


def call(target, *args, **kwargs):
    """The node of a call, "x", "y" and "z" among whose arguments stand for tensors."""
    graph = Graph()
    named = {name: graph.placeholder(name) for name in ("x", "y", "z")}

    def resolved(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(resolved, value))
        if isinstance(value, dict):
            return {key: resolved(each) for key, each in value.items()}
        return named.get(value, value) if isinstance(value, str) else value

    create = graph.call_method if isinstance(target, str) else graph.call_function
    return create(target, resolved(args), resolved(kwargs))


def written(node):
    return "".join(sorted({each.name for each in written_arguments(node)}))


ATEN = torch.ops.aten
HIGHER = torch.ops.higher_order


@pytest.mark.parametrize(
    ("expected", "target", "args", "kwargs"),
    [
        ("x", "add_", ("x", "y"), {}),
        ("x", "__setitem__", ("x", 0, "y"), {}),
        ("x", "some_method_", ("x", "y"), {}),
        ("xy", "some_method", ("x", "y"), {}),
        ("", "add", ("x", "y"), {}),
        ("", "float", ("x",), {}),
        ("", "sort", ("x",), {}),
        ("x", operator.iadd, ("x", "y"), {}),
        ("x", operator.setitem, ("x", 0, "y"), {}),
        ("", operator.and_, ("x", "y"), {}),
        ("", operator.getitem, ("x", 0), {}),
        ("", getattr, ("x", "data"), {}),
        ("xy", builtins.setattr, ("x", "data", "y"), {}),
        ("", math.sqrt, ("x",), {}),
        ("z", torch.add, ("x", "y"), {"out": "z"}),
        ("yz", torch.max, ("x", 1), {"out": ("y", "z")}),
        ("x", torch.Tensor.mul_, ("x", "y"), {}),
        ("", torch.Tensor.mul, ("x", "y"), {}),
        ("xy", torch._foreach_add_, (["x", "y"], "z"), {}),
        ("", torch._foreach_add, (["x", "y"], "z"), {}),
        ("x", F.relu, ("x", True), {}),
        ("x", F.relu, (), {"input": "x", "inplace": True}),
        ("x", F.dropout, ("x", 0.5, True, "y"), {}),  # whether it does, is known when it runs
        ("", F.relu, ("x", False), {}),
        ("", F.silu, ("x",), {}),
        ("x", torch.relu_, ("x",), {}),
        ("", F.embedding, ("x", "y"), {}),
        ("y", F.embedding, ("x", "y"), {"max_norm": 1.0}),
        ("yz", F.batch_norm, ("x", "y", "z"), {"training": True}),
        ("", F.batch_norm, ("x", "y", "z"), {}),
        ("yz", torch.batch_norm, ("x", None, None, "y", "z", True, 0.1, 1e-5, True), {}),
        ("yz", ATEN.native_batch_norm.default, ("x", None, None, "y", "z", True, 0.1, 1e-5), {}),
        ("", F.cross_entropy, ("x", "y"), {}),
        ("", torch._C._nn.scaled_dot_product_attention, ("x", "y", "z"), {}),
        ("", torch.tensor, ("x",), {}),
        ("x", ATEN.mul_, ("x", "y"), {}),
        ("x", ATEN.mul_.Tensor, ("x", "y"), {}),
        ("", ATEN.mul, ("x", "y"), {}),
        ("", ATEN.sort, (["x"],), {}),  # TorchScript sorts lists of tensors in place by this name
        ("z", ATEN.mul.out, ("x", "y"), {"out": "z"}),
        ("x", OURS.double, ("x",), {}),
        ("x", OURS.double.default, (), {"x": "x"}),
        ("xy", OURS.double_all, (["x", "y"],), {}),
        ("y", OURS.double_out, ("x",), {"out": "y"}),
        ("x", OURS.several, ("x", "y"), {}),  # some overload does
        ("", OURS.several.pure, ("x", "y"), {}),
        ("x", OURS.custom, ("x",), {}),
        ("xyz", _hidden, ({"deep": ["x", ("y",)]},), {"other": "z"}),
        ("xy", HIGHER.triton_kernel_wrapper_mutation, (), {"kernel_idx": 0, "kwargs": {"p": "x", "q": "y"}}),
        ("", HIGHER.triton_kernel_wrapper_functional, (), {"kwargs": {"p": "x"}, "tensors_to_clone": ["p"]}),
        ("xy", HIGHER.print, ("x", "y"), {}),
    ],
)
def test_what_a_call_writes_into(expected, target, args, kwargs):
    assert written(call(target, *args, **kwargs)) == expected


def test_every_write_that_a_schema_declares_is_found():
    missed, dispatched = [], set(torch._C._dispatch_get_all_op_names())
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        if (
            name == schema.name
            or ".".join(filter(None, (schema.name, schema.overload_name))) not in dispatched
        ):
            continue
        first = schema.arguments[0] if schema.arguments else None
        if first is None or first.alias_info is None or not first.alias_info.is_write:
            continue
        packet = getattr(ATEN, name)
        if "x" not in written(call(packet, "x")) or "x" not in written(call(name, "x")):
            missed.append(name)
    assert not missed


def mutations_of(function, *args):
    module, _ = graphs.capture(function, *args)
    return module.graph, Mutations(module.graph)


def named(graph, name):
    return next(node for node in graph.nodes if node.name == name)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: x.data.mul_(2),
        lambda x: x.detach()[1:].zero_(),
        lambda x: x.view(-1).as_strided((2,), (2,)).copy_(torch.zeros(2)),
        lambda x: [each.add_(1) for each in x.unbind(0)],
        lambda x: torch.view_as_complex(x).real.mul_(2),
        lambda x: torch.vmap(lambda row: row.mul_(2))(x),
        lambda x: OURS.double(x.T),
        lambda x: torch._foreach_mul_([x[0]], 2),
        lambda x: x.numpy().__setitem__(0, 3),
        lambda x: checkpoint(_writes_its_second, torch.ones(2), x, use_reentrant=False),
    ],
    ids=[
        *("method", "data", "slice", "strided", "unbind", "complex", "vmap", "operator", "foreach", "numpy"),
        "checkpoint",
    ],
)
def test_a_write_into_an_alias_is_a_write_into_all(write):
    def f(x):
        y = x + 1
        before = y * 3
        write(y)
        return before, y * 5, x * 7

    graph, mutations = mutations_of(f, torch.ones(2, 2))
    y = named(graph, "y")
    assert not mutations.is_clean(y)
    assert mutations.is_clean(graph.find_nodes(op="placeholder")[-1]) and mutations.is_clean(
        named(graph, "before")
    )
    reads = [node for node in y.users if node.target is operator.mul]
    between = mutations.write_between(y, mutations.position[reads[0]], mutations.position[reads[-1]])
    assert between is not None


def test_a_tensor_that_is_given_other_memory_is_not_known_at_any_time():
    def f(x):
        y = x + 1
        view = y[0]
        y.mul_(2)  # the view's memory, which is not that of the fake tensor in the end
        y.set_(torch.zeros(2, 2))
        return view * 3, y * 5

    graph, mutations = mutations_of(f, torch.ones(2, 2))
    assert not any(mutations.is_known(named(graph, name)) for name in ("y", "view"))


def _writes_its_second(x, y):
    y.mul_(2)
    return x.sin()


def test_a_checkpoint_writes_only_what_its_body_writes():
    def f(x, y, z):
        return checkpoint(_reads_and_writes, x, y, z, use_reentrant=False)

    def _reads_and_writes(x, y, z):
        y.add_(z)
        return x * y

    graph, mutations = mutations_of(f, torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2))
    states = {node.name: mutations.is_clean(node) for node in graph.find_nodes(op="placeholder")}
    assert states == {"l_x_": True, "l_y_": False, "l_z_": True}


def test_a_graph_without_an_owner_is_taken_to_write_all():
    body = Graph()
    body.output(body.call_method("sin", (body.placeholder("a"),)))
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2, device="meta")
    graph.call_module("somewhere", (x,))
    assert effect_of(list(graph.nodes)[-1]) is EVERYTHING
    owner = torch.nn.Module()
    owner.somewhere = GraphModule(torch.nn.Module(), body)
    module = GraphModule(owner, graph)
    assert Mutations(module.graph).is_clean(next(iter(module.graph.nodes)))


def test_it_is_linear_in_the_graph():
    def seconds(length):
        graph = Graph()
        x = graph.placeholder("x")
        x.meta["example_value"] = torch.empty(2, device="meta")
        for _ in range(length):
            graph.call_method("add_", (x, 1)).meta["example_value"] = x.meta["example_value"]
        start = time.process_time()
        mutations = Mutations(graph)
        for node in graph.nodes:
            mutations.epoch(x, mutations.position[node])
            mutations.write_between(x, mutations.position[node], length)
        return time.process_time() - start

    seconds(100)
    assert min(seconds(4000) for _ in range(3)) < 25 * min(seconds(400) for _ in range(3))


def _normed(h, weight):
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def _adds_to_what_was_copied(x, weight):
    x = x * 1.5
    x += _normed(x.clone(), weight)
    return x.sin()


def _writes_after_a_copy(x, weight):
    x = x * 1.5
    copy = x.clone()
    normed = _normed(copy, weight)
    x.mul_(2)
    return normed + copy


def _writes_unseen_by_autograd(x, weight):
    x = x * 1.5
    normed = _normed(x.clone(), weight)
    x.detach().mul_(2)
    return normed


@pytest.mark.parametrize(
    "function", [_adds_to_what_was_copied, _writes_after_a_copy, _writes_unseen_by_autograd]
)
def test_a_copy_of_what_is_written_later_is_read_and_not_the_original(function):
    """An op saves what it reads, and the original has other values in backward."""
    options = {"liger.policy": "always", "liger.inner": "aot_eager", "liger.strict": True}
    found = []
    for each in (torch.compile(function, backend="liger", options=options), function):
        torch.manual_seed(0)
        leaves = torch.randn(4, 8, requires_grad=True), torch.rand(8, requires_grad=True)
        result = each(*leaves)
        found.append((result, torch.autograd.grad(result.square().sum(), leaves)))
    torch.testing.assert_close(*found)
    assert liger_compile.reports()[0].count("replace") == 1


def _normed_then_written(x, weight):
    x = x.detach() * 1.5
    normed = _normed(x, weight)
    x.mul_(2)
    return normed


def _normed_then_written_unseen(x, weight):
    x = x.detach() * 1.5
    normed = _normed(x, weight)
    x.data.mul_(2)
    return normed


def _attended_then_written(x, weight):
    """A fused attention saves the values, and softmax @ values does not if the scores have no gradient."""
    q, values = x.detach().view(1, 1, 4, 8), (x * weight).view(1, 1, 4, 8)
    attended = (q @ q.mT * 0.5).softmax(-1) @ values
    values.mul_(2)
    return attended


def _input_then_written(x, weight):
    normed = _normed(x, weight)
    x.mul_(2)
    return normed


_SAVED_AND_WRITTEN = [
    _normed_then_written,
    _normed_then_written_unseen,
    _attended_then_written,
]


def _step(function, x_requires_grad=True):
    torch.manual_seed(0)
    leaves = torch.randn(4, 8, requires_grad=x_requires_grad), torch.rand(8, requires_grad=True)
    result = function(*leaves)
    result.square().sum().backward()
    return result, [leaf.grad for leaf in leaves]


def _compiled(function, inner="aot_eager"):
    options = {"liger.policy": "always", "liger.inner": inner, "liger.strict": True}
    return torch.compile(function, backend="liger", options=options)


@pytest.mark.parametrize("function", _SAVED_AND_WRITTEN)
def test_an_operand_that_only_the_op_saves_is_copied_if_it_is_written_later(function):
    torch.testing.assert_close(_step(_compiled(function)), _step(function))
    (report,) = liger_compile.reports()
    assert report.count("replace") == 1
    assert any("1 operand of a fused op is copied" in note for note in report.notes)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_an_input_that_only_the_op_saves_is_copied_if_it_is_written_later(inner):
    """Inductor removes clones of inputs that are written later."""
    found = _step(_compiled(_input_then_written, inner), False)
    torch.testing.assert_close(found, _step(_input_then_written, False))
    assert liger_compile.reports()[0].count("replace") == 1


def test_memory_that_two_inputs_share_is_copied_if_it_is_written_later():
    def function(x, y, weight):
        normed = _normed(x, weight) + y
        y.add_(1)
        return normed

    found = []
    for each in (_compiled(function), function):
        torch.manual_seed(0)
        whole, weight = torch.randn(6, 8), torch.rand(8, requires_grad=True)
        result = each(whole[:4], whole[2:], weight)
        found.append((result, whole, torch.autograd.grad(result.square().sum(), weight)))
    torch.testing.assert_close(*found)
    assert liger_compile.reports()[0].count("replace") == 1


def test_an_operand_that_the_code_saves_too_is_not_copied():
    """Eager mode raises here, and a copy would hide the error."""

    def function(x, weight):
        x = x * 1.5
        normed = _normed(x, weight)
        x.mul_(2)
        return normed

    for each in (function, _compiled(function)):
        with pytest.raises(Exception, match="modified by an inplace operation"):
            _step(each)
    assert not any("copied" in note for report in liger_compile.reports() for note in report.notes)
