"""A LazyTensor is a tensor to everybody, and computes nothing until its values are read."""

import copy
import ctypes
import gc
import io
import pickle
import threading
from multiprocessing.reduction import ForkingPickler

import numpy
import pytest
import torch
import torch.nn.functional as F

from liger_compile.runtime import optimizer_steps
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
def test_shape_and_dtype_need_no_values(leaves, name):
    function = Counted()
    assert METADATA[name](made(*leaves, function)) == METADATA[name](F.linear(*leaves))
    assert function.calls == 0


MADE_LIKE_IT = {
    "zeros_like": torch.zeros_like,
    "zeros_like in another dtype": lambda t: torch.zeros_like(t, dtype=torch.int64),
    "ones_like of a cut": lambda t: torch.ones_like(t.detach()),
    "full_like": lambda t: torch.full_like(t, 2.5),
    "empty_like on another device": lambda t: torch.empty_like(t, device="meta"),
    "randn_like": torch.randn_like,
    "rand_like": torch.rand_like,
    "randint_like": lambda t: torch.randint_like(t, 9),
    "randint_like from 3": lambda t: torch.randint_like(t, 3, 9),
    "new_zeros": lambda t: t.new_zeros(2, 3),
    "new_full": lambda t: t.new_full((2,), 3),
    "new_ones of whole numbers": lambda t: t.new_ones((2,), dtype=torch.int32),
    "new_tensor": lambda t: t.new_tensor([1.0, 2.0]),
    "new_empty_strided": lambda t: t.new_empty_strided((2, 3), (1, 2)).fill_(1),
}


@pytest.mark.parametrize("name", MADE_LIKE_IT)
def test_tensors_made_like_it_need_no_values(leaves, name):
    function, make = Counted(), MADE_LIKE_IT[name]
    torch.manual_seed(0)
    found = make(made(*leaves, function))
    torch.manual_seed(0)
    expected = make(F.linear(*leaves))
    assert function.calls == 0 and type(found) is torch.Tensor
    assert (found.device, found.stride(), found.requires_grad) == (expected.device, expected.stride(), False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


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
    "to dlpack": lambda t: torch.from_dlpack(torch.utils.dlpack.to_dlpack(t.detach())),
    "subclass": lambda t: t.as_subclass(torch.nn.Parameter) * 1,
    "queue": lambda t: pickle.loads(ForkingPickler.dumps(t.detach())),
    "storage": lambda t: torch.tensor(t.untyped_storage().tolist()),
    "collate": lambda t: torch.utils.data.default_collate([t, t]),
    "copy": lambda t: copy.copy(t.detach()),
    "vmap": lambda t: torch.vmap(lambda row: (row * t).sum())(torch.ones(2, 4, 16)),
    "grad": lambda t: torch.func.grad(lambda x: x.exp().sum())(t.detach()),
    "dual": lambda t: torch.func.jvp(torch.exp, (t.detach(),), (torch.ones(4, 16),))[1],
    "script": lambda t: torch.jit.script(_doubled)(t),
    "custom op": lambda t: torch.ops.liger_tests.through_numpy(t.detach()),
    "data": lambda t: t.data * 2,
    "cpu": lambda t: t.cpu() * 2,
    "where": lambda t: torch.where(t > 0, t, 0.0),
    "out": lambda t: torch.add(t, t, out=torch.empty(4, 16)) if not t.requires_grad else t + t,
    "nested": lambda t: torch.utils._pytree.tree_map(lambda x: x * 2, {"a": [t]})["a"][0],
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "deepcopy": lambda t: copy.deepcopy(t.detach()),
    "print": lambda t: torch.tensor(len(repr(t.detach()))),
}


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("liger_tests::through_numpy", mutates_args=())
def through_numpy(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy() * 2)


_library = torch.library.Library("liger_tests", "FRAGMENT")
_library.define("doubled_(Tensor(a!)[] xs, *, Tensor(b!) y) -> ()")


def _doubled_in_place(xs, *, y):
    for x in (*xs, y):
        x.data.mul_(2)


_library.impl("doubled_", _doubled_in_place, "CPU")


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


@pytest.mark.parametrize(
    "read", (lambda t: t.numpy(), copy.deepcopy, ForkingPickler.dumps, bool, torch.Tensor.item)
)
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


WRITES = {
    "index": lambda t: t.__setitem__((..., 3), -1e4),
    "view": lambda t: t.view(-1).zero_(),
    "alias": lambda t: t.detach().zero_(),
    "data": lambda t: t.data.mul_(3),
    "iteration": lambda t: [row.zero_() for row in t],
    "bits": lambda t: t.view(torch.int32).zero_(),
    "out": lambda t: torch.add(torch.ones(4, 16), 1, out=t.detach()),
    "copy_": lambda t: t.copy_(torch.ones(4, 16)),
    "foreach": lambda t: torch._foreach_add_([torch.ones(2), t], 1.0),
    "numpy": lambda t: t.detach().numpy().fill(4),
    "dlpack": lambda t: torch.from_dlpack(t.detach()).zero_(),
    "pointer": lambda t: ctypes.memset(t.data_ptr(), 0, 32),
    "storage": lambda t: t.untyped_storage().fill_(0),
    "operator": lambda t: torch.ops.liger_tests.doubled_([t.detach()], y=torch.ones(1)),
    "operator's keyword": lambda t: torch.ops.liger_tests.doubled_([], y=t.detach()),
    "packet": lambda t: torch.ops.aten.zero_(t),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_copy_has_the_values_from_before_a_write(leaves, name):
    results = []
    for t in (made(*leaves), F.linear(*leaves)):
        alias, copies = t.detach(), [t.double(), t.bfloat16().float(), t.detach().half()]
        with torch.no_grad():
            WRITES[name](t)
        results.append([each.detach() + 0 for each in (t, alias, *copies)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def _versions(t, x, w):
    tensors = (t, t.detach(), t.view(-1), t.data)
    found = []
    for each in tensors:
        with torch.no_grad():
            each.mul_(2)
        found.extend(other._version for other in tensors)
    return found


def _views(t, x, w):
    view, part, cut = t.view(-1), t[..., :-1], t.detach()
    bases = (view._base is t, part._base is t, t._base is None, cut._base is None)
    return *bases, view.is_leaf, cut.is_leaf, t.is_leaf, view.grad_fn is None


def _shared_memory(t, x, w):
    part, alias, data = t[..., :-1], t.detach(), t.data
    with torch.no_grad():
        part[0], alias[1], data[2] = 1.0, 2.0, 3.0
        t[3] = 4.0
    return [each.detach().clone() for each in (t, part, alias, data)]


def _metadata_in_place(t, x, w):
    cut, alias = t.detach(), t.detach()
    cut.unsqueeze_(0).squeeze_(0).t_()
    other = t.detach().set_(torch.arange(6.0))
    less = t.detach().resize_(2, 4)
    return [(each + 0, each.shape, each.stride()) for each in (cut, alias, other, less)]


def _metadata_in_place_with_gradient(t, x, w):
    t.t_()
    t.unsqueeze_(-1)
    (t * torch.arange(64.0).view(16, 4, 1)).sum().backward()
    return t.shape, x.grad, w.grad


def _other_data(t, x, w):
    alias, swapped, plain = t.detach(), t.detach(), torch.ones(3)
    alias.data = torch.arange(6.0)
    torch.utils.swap_tensors(swapped, plain)
    return alias + 0, alias.shape, swapped + 0, plain + 0, t.detach() + 0


def _hooks(t, x, w):
    seen = []
    t.retain_grad()
    t.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
    t.square().sum().backward()
    return t.grad, seen, x.grad, w.grad


def _leaf(t, x, w):
    leaf, seen = t.detach().requires_grad_(), []
    leaf.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    leaf.square().sum().backward()
    leaf.square().sum().backward()
    return leaf.is_leaf, leaf.grad, seen


def _trained(t, x, w):
    parameter = torch.nn.Parameter(t.detach())
    parameter.square().sum().backward()
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()
    return parameter.detach() + 0, t.detach() + 0


def _written_with_gradient(t, x, w):
    t[..., 3] = -1e4
    t.mul_(2)
    t.view(-1)[2:5].exp_()
    t.clamp(-5, 5).sum().backward()
    return t.detach() + 0, x.grad, w.grad


def _written_after_it_was_saved(t, x, w):
    total = (t * t).sum()
    t.add_(1)
    total.backward()


def _backward_twice(t, x, w):
    total = t.square().sum()
    total.backward(retain_graph=True)
    total.backward()
    return x.grad, w.grad


def _backward_once_too_often(t, x, w):
    total = t.square().sum()
    total.backward()
    total.backward()


def _gradient_of_gradient(t, x, w):
    (gradient,) = torch.autograd.grad(t.square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    return gradient.detach(), x.grad, w.grad


class _Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def _function_in_place(t, x, w):
    result = _Dirty.apply(t)
    result.sum().backward()
    return result is t, t.detach() + 0, x.grad


def _read_in_inference_mode(t, x, w):
    with torch.inference_mode():
        best, wide = t.argmax(-1) + 0, t.double()
        found = wide + 0
    (t * t).sum().backward()
    return best.clone(), found.clone(), wide.is_inference(), t.is_inference(), x.grad


def _compiled_in_place(t, x, w):
    alias = t.detach()
    torch.compile(lambda x: x.mul_(2), backend="aot_eager")(alias)
    return alias + 0, t.detach() + 0


def _pickled_together(t, x, w):
    cut = t.detach()
    one, two, row = copy.deepcopy([cut, cut, cut[1]])
    one.zero_()
    return one is two, row, cut + 0, cut.share_memory_().is_shared(), t.is_shared()


def _checkpointed(t, x, w):
    torch.utils.checkpoint.checkpoint(lambda t: t.exp().sum(), t, use_reentrant=False).backward()
    return x.grad


PROGRAMS = (
    *(_versions, _views, _shared_memory, _metadata_in_place, _metadata_in_place_with_gradient, _other_data),
    *(_hooks, _leaf, _trained, _written_with_gradient, _written_after_it_was_saved, _backward_twice),
    *(_backward_once_too_often, _gradient_of_gradient, _function_in_place, _read_in_inference_mode),
    *(_compiled_in_place, _pickled_together, _checkpointed),
)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("is_read", (False, True))
def test_programs_see_what_eager_code_sees(program, is_read):
    results = []
    for make in (made, F.linear):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        t = make(x, w)
        if is_read:
            t.sum()
        try:
            results.append((program(t, x, w), None))
        except RuntimeError as error:
            results.append((None, str(error)[:60]))
    (got, got_error), (expected, expected_error) = results
    assert got_error == expected_error
    if got_error is None:
        torch.testing.assert_close(got, expected)


def test_collectives_take_it(process_group):
    t, expected = made(X, W), F.linear(X, W)
    gathered, whole = [torch.empty(4, 16)], torch.empty(4, 16)
    torch.distributed.all_gather(gathered, t)
    torch.distributed.all_gather_into_tensor(whole, t.detach())
    torch.distributed.broadcast(t, 0)
    torch.testing.assert_close([*gathered, whole, t + 0], [expected] * 3, rtol=0, atol=0)


def test_a_pointer_that_is_read_behind_everybodys_back_is_an_error():
    t = made(X, W)
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch._C._to_dlpack(t)
    t.sum()
    torch.testing.assert_close(torch.from_dlpack(torch._C._to_dlpack(t)), F.linear(X, W), rtol=0, atol=0)


def test_threads_that_read_at_once_compute_it_once():
    expected, wrong = F.linear(X, W).double(), []

    def slow(x, w):
        gate.wait(0.05)  # another thread gets its turn
        return function(x, w)

    def read(t):
        if not torch.equal(t.double(), expected):
            wrong.append(t)

    for _ in range(5):
        function, gate = Counted(), threading.Event()
        t = made(X, W, slow)
        tensors = (t, t, t.detach(), t.double(), t.double())
        threads = [threading.Thread(target=read, args=(each,)) for each in tensors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert function.calls == 1
    assert not wrong


def test_printing_shows_the_values_or_the_reason_for_none(leaves):
    assert str(made(X, W)) == str(F.linear(X, W))
    assert repr(made(*leaves)).startswith(repr(F.linear(*leaves).detach()).removesuffix(")"))
    t = made(*leaves)
    leaves[1].data.zero_()
    assert all("size=(4, 16)" in text and "was changed" in text for text in (repr(t), str(t), f"{t}"))


# What an optimizer changes ---------------------------------------------------------------------------------


class _Own(torch.optim.Optimizer):
    """Writes where no version is counted."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for each in group["params"]:
                each.data.sub_(each.grad)


OPTIMIZERS = {
    "plain": lambda ps: torch.optim.SGD(ps, lr=0.5, foreach=False).step(),
    "foreach": lambda ps: torch.optim.AdamW(ps, lr=0.5, foreach=True).step(),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=0.5, fused=True).step(),
    "own": lambda ps: _Own(ps).step(),
    "scaled": lambda ps: _scaled(torch.optim.AdamW(ps, lr=0.5, fused=True)),
    "LBFGS": lambda ps: torch.optim.LBFGS(ps).step(lambda: sum(p.square().sum() for p in ps)),
    "one for each": lambda ps: [torch.optim.SGD([p], lr=0.5, fused=True).step() for p in ps],
}


def _scaled(optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("is_head_smaller", (True, False))
def test_after_an_optimizers_step_the_values_are_those_from_before(name, is_head_smaller):
    x = torch.randn(64 if is_head_smaller else 2, 8)
    w, b = torch.nn.Parameter(W.clone()), torch.nn.Parameter(torch.randn(16))
    function, expected = Counted(), F.linear(x, w, b).detach()
    recipe = Recipe(lambda x, w, b: function(x, w) + b, "logits", "")
    t, twice = (lazy(recipe, torch.empty(len(x), 16, device="meta"), x, w, b) for _ in range(2))
    wide = t.double()
    w.grad, b.grad = torch.ones_like(w), torch.ones_like(b)
    OPTIMIZERS[name]([w, b])
    if name != "one for each":
        assert function.calls == (0 if is_head_smaller else 2)
    for each in (t, twice, wide):
        torch.testing.assert_close(each.detach() + 0, expected.to(each.dtype))


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}])
def test_the_closure_of_a_step_makes_it(leaves, settings):
    """L-BFGS and others call forward within a step, when it is too late to be told of the step."""
    x, w = leaves
    optimizer, seen = torch.optim.SGD([w], lr=0.5, **settings), []

    def closure():
        optimizer.zero_grad()
        t = made(x, w)
        seen.append((t, F.linear(x, w).detach()))
        loss = F.linear(x, w).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step()
    ((t, expected),) = seen
    torch.testing.assert_close(t.detach() + 0, expected)
    later = made(x, w)  # no step is running any more: nothing is kept
    with torch.no_grad():
        w.data.mul_(2)
    with pytest.raises(RuntimeError, match="cannot be computed any more"):
        later.sum()


class _Sharpness(torch.optim.Optimizer):
    """Calls forward twice in a step, around a step of another optimizer, and writes where no version counts it."""

    def __init__(self, parameters, inner):
        super().__init__(parameters, {})
        self.inner = inner

    def step(self, closure=None):
        closure()
        self.inner.step()
        loss = closure()
        for each in self.param_groups[0]["params"]:
            each.data.sub_(each.grad)
        return loss


def test_the_closure_of_a_step_around_other_steps_makes_it(leaves):
    x, w = leaves
    seen = []

    def closure():
        seen.append((made(x, w), F.linear(x, w).detach()))
        w.grad = torch.ones_like(w)

    _Sharpness([w], torch.optim.SGD([w], lr=0.5, fused=True)).step(closure)
    for t, expected in seen:
        torch.testing.assert_close(t.detach() + 0, expected)


def test_an_alias_in_inference_mode_has_a_version(leaves):
    x, w = leaves
    t = made(x, w)
    with torch.inference_mode():
        alias = t.detach()
        torch.testing.assert_close(alias[:, :-1] + 0, F.linear(x, w)[:, :-1])
    assert not alias.is_inference()


def test_two_that_wait_share_the_copy_and_those_that_died_have_none(leaves):
    x, w = leaves[0].detach().repeat(8, 1), leaves[1]
    w.grad = torch.ones_like(w)
    one, two, read, dead = (
        lazy(Recipe(F.linear, "", ""), torch.empty(32, 16, device="meta"), x, w) for _ in range(4)
    )
    read.sum()
    del dead
    gc.collect()
    waiting = [each for each in optimizer_steps.waiting() if w.untyped_storage()._cdata in each.storages()]
    assert len(waiting) == 2
    torch.optim.SGD([w], lr=1.0).step()
    kept = [each.storages() - {x.untyped_storage()._cdata} for each in waiting]
    assert kept[0] == kept[1] and w.untyped_storage()._cdata not in kept[0]
    torch.testing.assert_close(one + 0, two + 0, rtol=0, atol=0)


def test_an_optimizer_of_other_weights_or_of_frozen_ones_keeps_nothing(leaves):
    x, w = leaves[0], leaves[1].detach()
    t = made(x, w)
    other = torch.nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    (waiting,) = (each for each in optimizer_steps.waiting() if w.untyped_storage()._cdata in each.storages())
    torch.optim.SGD([other, w], lr=1.0).step()
    assert w.untyped_storage()._cdata in waiting.storages()
    torch.testing.assert_close(t + 0, F.linear(x, w))


def test_nothing_waits_for_the_device_until_it_is_read(leaves):
    waits = []

    class Waits(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
                waits.append(func)
            return func(*args, **(kwargs or {}))

    leaves[1].grad = torch.ones_like(leaves[1])
    for x in (leaves[0], leaves[0].repeat(8, 1)):
        with Waits():
            t = lazy(Recipe(F.linear, "", ""), torch.empty(len(x), 16, device="meta"), x, leaves[1])
            torch.optim.SGD([leaves[1]], lr=1.0, fused=True).step()
        assert not waits
        with Waits():
            t.tolist()
        assert waits
        waits.clear()


def test_a_compiled_step_runs_no_hooks_and_is_noticed(leaves):
    t = made(*leaves)
    leaves[1].grad = torch.ones_like(leaves[1])
    optimizer = torch.optim.AdamW([leaves[1]], lr=0.5, fused=True)
    torch.compile(lambda: optimizer.step(), backend="eager")()
    with pytest.raises(RuntimeError, match="was changed"):
        t.argmax()


# What changes without a word -------------------------------------------------------------------------------

UNSEEN = {
    "data": lambda w: w.data.mul_(0.5),
    "one element": lambda w: w.data[7, 3].add_(1e-3),
    "one row": lambda w: w.data[9].zero_(),
    "numpy": lambda w: w.detach().numpy().fill(0),
    "pointer": lambda w: ctypes.memset(w.data_ptr(), 1, 4),
    "foreach": lambda w: torch._foreach_mul_([w.data], 2.0),
    "storage": lambda w: w.untyped_storage().fill_(0),
    "freed and filled again": lambda w: (
        w.untyped_storage().resize_(0),
        w.untyped_storage().resize_(512),
        w.data.zero_(),
    ),
    "sparse": lambda w: w.data.add_(torch.sparse_coo_tensor([[3]], torch.ones(1, 8), (16, 8))),
    "fused": lambda w: torch._fused_sgd_(
        [w.detach()],
        [torch.ones(16, 8)],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.1,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("which", ("head", "hidden state"))
def test_a_change_without_a_version_raises_an_error_with_advice(leaves, name, which):
    given = (leaves[0], leaves[1]) if which == "head" else (leaves[1], leaves[0])
    t = lazy(
        Recipe(F.linear, "logits", "read them before"),
        torch.empty(len(given[0]), len(given[1]), device="meta"),
        *given,
    )
    wide = t.double()
    UNSEEN[name](leaves[1])
    for each in (t, wide, t):
        with pytest.raises(RuntimeError, match=r"the logits .*\(16, 8\).* was changed .*; read them before"):
            each.argmax()
    with pytest.raises(RuntimeError, match=r"the gradients of the logits .* was changed"):
        t.backward(torch.ones(t.shape))


HARMLESS = {
    "another tensor in its place": lambda w: setattr(w, "data", torch.zeros(16, 8)),
    "shared memory": lambda w: w.data.share_memory_(),
    "written and restored": lambda w: (old := w.data.clone(), w.data.zero_(), w.data.copy_(old)),
    "read": lambda w: w.detach().numpy().sum(),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_leaves_the_values_as_they_were_is_none(leaves, name):
    t, expected = made(*leaves), F.linear(*leaves).detach()
    HARMLESS[name](leaves[1])
    torch.testing.assert_close(t.detach() + 0, expected, rtol=0, atol=0)


def test_gradients_of_a_weight_that_changed_unseen_are_an_error(leaves):
    t = made(*leaves)
    t.sum()
    leaves[1].data.mul_(2)
    with pytest.raises(RuntimeError, match=r"gradients of the logits .* was changed"):
        t.sum().backward()


@pytest.mark.parametrize("num_bytes", (0, 16))
def test_gradients_of_a_weight_that_was_freed_are_an_error(leaves, num_bytes):
    total = made(*leaves).sum()
    leaves[1].untyped_storage().resize_(num_bytes)
    with pytest.raises(RuntimeError, match=r"gradients of the logits .* was freed"):
        total.backward()


def test_what_has_no_fingerprint_is_computed_at_once():
    w = torch.eye(16, 8).to_sparse()
    t = lazy(Recipe(lambda x, w: x @ w.t(), "", ""), torch.empty(4, 16, device="meta"), X, w)
    assert type(t) is torch.Tensor
    torch.testing.assert_close(t, X @ torch.eye(8, 16))


def test_in_a_cuda_graph_that_is_recorded_it_is_computed_at_once(monkeypatch):
    # Private: there is no CUDA graph without a GPU.
    monkeypatch.setattr("liger_compile.runtime.lazy._is_recorded", lambda tensors: True)
    assert type(made(X, W)) is torch.Tensor


def test_a_weight_changed_before_the_read_raises_an_error_with_advice(leaves):
    t = made(*leaves)
    with torch.no_grad():
        leaves[1].add_(1)
    with pytest.raises(RuntimeError, match=r"\(16, 8\).* was changed in place .*liger.logits.: .eager"):
        t.argmax()


def test_a_weight_freed_before_the_read_raises_an_error_with_advice(leaves):
    t = made(*leaves)
    leaves[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"\(16, 8\).* was freed .*liger.logits.: .eager"):
        t.argmax()


def overwritten_by_a_replay(tensor):
    """Refuses access to the memory, as torch does for results of a CUDA graph after the next replay."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def test_a_result_of_a_cuda_graph_that_was_overwritten_raises_an_error_with_advice(leaves):
    t = made(*leaves)
    overwritten_by_a_replay(leaves[0])
    with pytest.raises(
        RuntimeError, match=r"\(4, 8\).* was overwritten by .* a CUDA graph .*liger.logits.: .eager"
    ):
        t.argmax()


def test_a_step_takes_no_notice_of_a_result_that_was_overwritten(leaves):
    t, optimizer = made(*leaves), torch.optim.SGD([leaves[1]], lr=0.5)
    overwritten_by_a_replay(leaves[0])
    leaves[1].grad = torch.ones_like(W)
    optimizer.step()
    torch.testing.assert_close(leaves[1].detach(), W - 0.5)
    with pytest.raises(RuntimeError, match="CUDA graph"):
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
