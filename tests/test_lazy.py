"""A LazyTensor is a tensor to everybody, and computes nothing until its values are read."""

import copy
import io
import pickle

import numpy
import pytest
import torch
import torch.nn.functional as F

from liger_compile.runtime.lazy import LazyTensor, lazy
from liger_compile.runtime.promise import Recipe

X, W = torch.randn(4, 8), torch.randn(16, 8)


class Counted:
    """A linear layer that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, w):
        self.calls += 1
        return F.linear(x, w)


@pytest.fixture
def leaves():
    return X.clone().requires_grad_(), W.clone().requires_grad_()


def made(x, w, function=F.linear):
    recipe = Recipe(function, "logits", 'compile with options={"liger.logits": "eager"}')
    return lazy(recipe, torch.empty(4, 16, dtype=x.dtype, device="meta"), x, w)


METADATA = {
    "shape": lambda t: t.shape,
    "size": lambda t: t.size(-1),
    "stride": lambda t: t.stride(),
    "dtype": lambda t: t.dtype,
    "device": lambda t: t.device,
    "numel": lambda t: t.numel(),
    "requires_grad": lambda t: t.requires_grad,
    "is_leaf": lambda t: t.is_leaf,
    "is_floating_point": lambda t: t.is_floating_point(),
    "is_contiguous": lambda t: t.is_contiguous(),
    "len": len,
    "is a tensor": lambda t: isinstance(t, torch.Tensor),
    "has a grad_fn": lambda t: t.grad_fn is not None,
}


@pytest.mark.parametrize("name", METADATA)
def test_what_it_looks_like_costs_nothing(leaves, name):
    function = Counted()
    assert METADATA[name](made(*leaves, function)) == METADATA[name](F.linear(*leaves))
    assert function.calls == 0


def test_casts_and_detach_stay_lazy(leaves):
    function = Counted()
    t = made(*leaves, function)
    wide, cut, both = t.double(), t.detach(), t.to(torch.bfloat16).detach().float()
    assert all(isinstance(each, LazyTensor) for each in (wide, cut, both))
    assert (wide.dtype, both.dtype, cut.requires_grad, wide.requires_grad) == (
        torch.float64,
        torch.float32,
        False,
        True,
    )
    assert function.calls == 0
    expected = F.linear(*leaves)
    torch.testing.assert_close(wide + 0, expected.double(), rtol=0, atol=0)
    torch.testing.assert_close(both + 0, expected.detach().bfloat16().float(), rtol=0, atol=0)
    assert function.calls == 1


READS = {
    "function": lambda t: torch.softmax(t, -1),
    "method": lambda t: t.argmax(-1),
    "operator": lambda t: 1 - t,
    "index": lambda t: t[1:, ..., -1],
    "mask": lambda t: t[t > 0],
    "view": lambda t: t.view(-1),
    "clone": lambda t: t.clone(),
    "stack": lambda t: torch.stack([t, t]),
    "compare": lambda t: t == t,
    "list": lambda t: torch.tensor(t.tolist()),
    "item": lambda t: torch.tensor(t.sum().item()),
    "iteration": lambda t: torch.stack([row.sum() for row in t]),
    "numpy": lambda t: torch.from_numpy(t.detach().numpy()),
    "asarray": lambda t: torch.from_numpy(numpy.asarray(t.detach())),
    "from dlpack": lambda t: torch.from_dlpack(t.detach()),
    "data": lambda t: t.data * 2,
    "cpu": lambda t: t.cpu() * 2,
    "where": lambda t: torch.where(t > 0, t, 0.0),
    "out": lambda t: torch.add(t, t, out=torch.empty(4, 16)) if not t.requires_grad else t + t,
    "nested": lambda t: torch.utils._pytree.tree_map(lambda x: x * 2, {"a": [t]})["a"][0],
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "deepcopy": lambda t: copy.deepcopy(t.detach()),
    "print": lambda t: torch.tensor(len(repr(t.detach()))),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("has_gradient", (True, False))
def test_reading_gives_the_values_of_eager(leaves, name, has_gradient):
    with torch.set_grad_enabled(has_gradient):
        function = Counted()
        got, expected = READS[name](made(*leaves, function)), READS[name](F.linear(*leaves))
    assert type(got) is type(expected)
    assert got.requires_grad == expected.requires_grad
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert function.calls == 1


def test_it_is_computed_once(leaves):
    function = Counted()
    t = made(*leaves, function)
    assert torch.equal(t + 1, t + 1) and torch.equal(t.detach().exp(), t.exp())
    assert function.calls == 1


def test_saving_and_loading_gives_a_plain_tensor(leaves):
    file = io.BytesIO()
    torch.save({"logits": made(*leaves)}, file)
    file.seek(0)
    loaded = torch.load(file)["logits"]  # weights only: no class of ours is in the file
    assert type(loaded) is torch.Tensor and loaded.requires_grad
    torch.testing.assert_close(loaded, F.linear(*leaves), rtol=0, atol=0)


@pytest.mark.parametrize("read", (lambda t: t.numpy(), copy.deepcopy))
def test_what_eager_refuses_is_refused_with_its_words(leaves, read):
    with pytest.raises(RuntimeError) as expected:
        read(F.linear(*leaves))
    with pytest.raises(RuntimeError) as got:
        read(made(*leaves))
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize(
    "second", (lambda t: t.float().logsumexp(-1).square().mean(), lambda t: t[:, 3].sum())
)
def test_gradients_are_those_of_eager(leaves, second):
    got = torch.autograd.grad(second(made(*leaves)), leaves)
    expected = torch.autograd.grad(second(F.linear(*leaves)), leaves)
    torch.testing.assert_close(got, expected)


def test_a_frozen_input_gets_no_gradient(leaves):
    x, w = leaves[0].detach(), leaves[1]
    made(x, w).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(w.grad, X.sum(0).expand(16, 8))


def test_without_inputs_that_need_gradients_it_needs_none():
    assert not made(X, W).requires_grad


def test_writing_into_it(leaves):
    results = []
    for t in (made(*leaves), F.linear(*leaves)):
        before = t.double()
        written = t.mul_(2)
        assert written is t
        alias = t.detach()
        with torch.no_grad():
            alias[0] = 7.0
        results.append(
            (
                before + 0,
                t + 0,
                alias + 0,
                torch.autograd.grad((t * t).sum(), leaves[0], retain_graph=True)[0],
            )
        )
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_weight_that_changed_in_between_is_an_error_that_says_what_to_do(leaves):
    t = made(*leaves)
    with torch.no_grad():
        leaves[1].add_(1)
    with pytest.raises(RuntimeError, match=r"\(16, 8\).* was changed in place .*liger.logits.: .eager"):
        t.argmax()


def test_a_weight_that_was_freed_in_between_is_an_error_that_says_what_to_do(leaves):
    t = made(*leaves)
    leaves[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"\(16, 8\).* was freed .*liger.logits.: .eager"):
        t.argmax()


def test_values_that_were_read_before_stay(leaves):
    t, expected = made(*leaves), F.linear(*leaves).detach()
    t.max()
    with torch.no_grad():
        leaves[1].zero_()
    torch.testing.assert_close(t.detach() + 0, expected, rtol=0, atol=0)


@pytest.mark.parametrize("fullgraph", (False, True))
def test_another_compiled_function_takes_it(leaves, fullgraph):
    function = torch.compile(lambda t: (t * 2).exp().sum(), backend="aot_eager", fullgraph=fullgraph)
    got = torch.autograd.grad(function(made(*leaves)), leaves)
    expected = torch.autograd.grad((F.linear(*leaves) * 2).exp().sum(), leaves)
    torch.testing.assert_close(got, expected)


def test_it_is_computed_under_the_autocast_of_its_recipe(leaves):
    recipe = Recipe(F.linear, "logits", "", ("cpu", torch.bfloat16))
    like = torch.empty(4, 16, dtype=torch.bfloat16, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(*leaves)
    got = lazy(recipe, like, *leaves)
    torch.testing.assert_close(got + 0, expected, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got.float().square().sum(), leaves),
        torch.autograd.grad(expected.float().square().sum(), leaves),
    )
    plain = Recipe(F.linear, "logits", "")
    with torch.autocast("cpu", torch.bfloat16):
        t = lazy(plain, torch.empty(4, 16, device="meta"), *leaves)
        assert t.clone().dtype == torch.float32
