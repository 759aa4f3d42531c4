"""Legality, then check, then profit: each refusal is a sentence, and leaves the numbers alone."""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import liger_compile
from liger_compile.pattern import Pattern
from liger_compile.testing import graphs
from tests.helpers.gradients import gradients_of
from tests.helpers.versions import INFERENCE_MODE

torch.manual_seed(0)


def norm(x, w, eps=1e-6):
    x32 = x.float()
    return w * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def sites(reports):
    return [site for report in reports for site in report.sites]


def assert_left(run_liger, function, *args, reason, pattern=None, **options):
    """The function has a site that is left for `reason`; its result is that of eager."""
    copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    result, reports = run_liger(function, *args, **options)
    left = [site for site in sites(reports) if site.kind == "leave"]
    assert any(reason in site.reason for site in left), [site.reason for site in left]
    if pattern:
        assert all(site.pattern.startswith(pattern) for site in left)
    torch.testing.assert_close(result, function(*copies))
    return reports


PAIR = Pattern(
    name="pair.test",
    search=lambda x, y: (torch.tanh(x), torch.erf(y)),
    replace=lambda x, y: (torch.tanh(x), torch.erf(y)),
    examples={"x": torch.empty(3), "y": torch.empty(5)},
)
X, W = torch.randn(4, 8), torch.rand(8) + 0.5


def test_an_accepted_site_has_no_reason(run_liger):
    _, reports = run_liger(norm, X, W)
    assert [(site.pattern, site.kind, site.reason) for site in sites(reports)] == [
        ("rms_norm.llama", "replace", "")
    ]


def test_a_captured_tensor_written_in_place_is_left(run_liger):
    def f(x, w):
        x32 = x.float()
        x.add_(1)  # the replacement would read x after this
        return w * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    assert_left(run_liger, f, X.bfloat16(), W.bfloat16(), reason="is written in place while it is in use")


def test_values_from_before_and_after_a_write_are_not_the_same(run_liger):
    def f(x, w):
        variance = x.pow(2).mean(-1, keepdim=True)
        x.mul_(2)
        return w * (x * torch.rsqrt(variance + 1e-6))

    result, reports = run_liger(f, X.clone(), W)
    assert not sites(reports)
    torch.testing.assert_close(result, f(X.clone(), W))


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x.__iadd__(1),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: x[:2].zero_(),
        lambda x: F.relu(x, inplace=True),
        lambda x: torch.mul(x, 2, out=x),
        lambda x: x.view(-1).copy_(torch.ones(x.numel())),
    ],
    ids=["method", "operator", "setitem", "view", "inplace", "out", "copy"],
)
def test_every_kind_of_write_is_seen(run_liger, write):
    def f(x, w):
        y = x + 0.5
        variance = y.pow(2).mean(-1, keepdim=True)
        write(y)
        return w * (y * torch.rsqrt(variance + 1e-6))

    result, reports = run_liger(f, X.clone(), W)
    assert not [site for site in sites(reports) if site.kind == "replace"]
    torch.testing.assert_close(result, f(X.clone(), W))


Q, K, COS, SIN = (torch.randn(2, 6, 8) for _ in range(4))


def rotated(x, cos, sin):
    return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin


def filled(q, k, cos, sin):
    """As DeepSeek fills the keys of its heads."""
    keys = k.new_empty(k.shape)
    keys[..., :4] = k[..., :4]
    keys[..., 4:].copy_(torch.tanh(k[..., 4:]))
    return rotated(keys, cos, sin)


def filled_after_the_other(q, k, cos, sin):
    keys = torch.empty_like(k)
    first = rotated(q, cos, sin)
    keys.copy_(k * first.sum())
    return 2 * first + rotated(keys, cos, sin)


def before_and_after(q, k, cos, sin):
    keys = k * 1
    first = rotated(keys, cos, sin)
    keys.mul_(3)
    return first + rotated(keys, cos, sin)


def between_two_writes(q, k, cos, sin):
    keys = k * 1
    keys.mul_(2)
    first = rotated(keys, cos, sin)
    keys.mul_(3)
    return first + keys.sum()


def interleaved(x, cos, sin):
    a, b, cos, sin = x[..., ::2], x[..., 1::2], cos[..., :4], sin[..., :4]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1)


def an_alias_is_written(q, k, cos, sin):
    pairs = interleaved(k, cos, sin)
    returned = pairs.view(2, 6, 8)
    pairs.copy_(pairs.flip(-1))
    return returned


def an_alias_is_read(q, k, cos, sin):
    pairs = interleaved(k, cos, sin)
    returned = pairs.view(2, 6, 8)
    returned.mul_(2)
    return returned + pairs.sum()


@pytest.mark.parametrize(
    ("function", "count"),
    [(filled, 1), (filled_after_the_other, 2), (before_and_after, 2), (between_two_writes, 0)],
)
def test_what_is_written_in_place_is_captured_after_its_last_write(run_liger, function, count):
    leaves = [each.clone().requires_grad_() for each in (Q, K)]
    result, reports = run_liger(function, *leaves, COS, SIN, inner="aot_eager")
    expected = function(*leaves, COS, SIN)
    torch.testing.assert_close(result, expected)
    gradients = (torch.autograd.grad(each.sum(), leaves, allow_unused=True) for each in (result, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert [site.kind for site in sites(reports)] == ["replace"] * count


@pytest.mark.parametrize("function", [an_alias_is_written, an_alias_is_read])
def test_a_result_that_shares_written_memory_stays(run_liger, function):
    result, reports = run_liger(function, Q, K, COS, SIN)
    torch.testing.assert_close(result, function(Q, K, COS, SIN))
    assert not [site for site in sites(reports) if site.kind == "replace"]


GATE, UP, DOWN = torch.randn(4, 12), torch.randn(4, 12), torch.randn(8, 12)


def gated_product(gate, up):
    return F.silu(gate) * up


def gated_mlp(gate, up, down):
    return F.linear(F.silu(gate) * up, down)


_EXAMPLES = {"gate": torch.empty(3, 12), "up": torch.empty(3, 12)}
GATED = (
    Pattern("gated.product", gated_product, gated_product, _EXAMPLES),
    Pattern("gated.mlp", gated_mlp, gated_mlp, {**_EXAMPLES, "down": torch.empty(8, 12)}),
)


@pytest.mark.parametrize(
    "gated",
    [
        lambda gate, up, down: F.linear(F.silu(gate).mul_(up), down),
        lambda gate, up, down: F.linear(F.silu(gate).mul_(up).view(-1, 12), down),
        lambda gate, up, down: F.silu(gate).mul_(up),
        lambda gate, up, down: F.silu(gate).mul_(up).add_(1),
    ],
    ids=["linear", "view", "product", "written again"],
)
def test_a_write_into_what_is_read_there_alone_is_a_step(run_liger, liger_is_as_right_as_eager, gated):
    _, reports = run_liger(gated, GATE, UP, DOWN, patterns=GATED)
    assert [site.kind for site in sites(reports)] == ["replace"]
    torch._dynamo.reset()
    liger_is_as_right_as_eager(gated, GATE, UP, DOWN, frozen=(2,), patterns=GATED)


def augmented(gate, up, down):
    h = F.silu(gate)
    h *= up
    return F.linear(h, down)


def read_before(gate, up, down):
    h = F.silu(gate)
    return h.sum() + F.linear(h.mul_(up), down)


def read_after(gate, up, down):
    h = F.silu(gate)
    return F.linear(h.mul_(up), down) + h.sum()


def view_read_after(gate, up, down):
    h = F.silu(gate)
    part = h[..., :8]
    return F.linear(h.mul_(up), down) + part


def written_twice(gate, up, down):
    h = F.silu(gate)
    y = h.mul_(up)
    h.add_(1)
    return F.linear(y, down)


def part_written_before(gate, up, down):
    h = F.silu(gate)
    h[..., 0] = 2.0
    return F.linear(h.mul_(up), down)


def activated_in_place(gate, up, down):
    return F.linear(F.silu(gate, inplace=True) * up, down) + gate.sum()


def test_an_augmented_assignment_is_a_step_too(run_liger):
    result, reports = run_liger(augmented, GATE, UP, DOWN, patterns=GATED)
    assert [site.kind for site in sites(reports)] == ["replace"]
    torch.testing.assert_close(result, augmented(GATE, UP, DOWN))


@pytest.mark.parametrize(
    "function",
    [read_before, read_after, view_read_after, written_twice, part_written_before, activated_in_place],
)
def test_a_write_into_what_others_read_is_none(run_liger, function):
    result, reports = run_liger(function, GATE.clone(), UP, DOWN, patterns=GATED)
    assert not [site for site in sites(reports) if site.kind == "replace"]
    torch.testing.assert_close(result, function(GATE.clone(), UP, DOWN))


def test_a_product_that_is_rounded_when_it_is_written_is_not_one_of_rounded_factors(run_liger):
    def f(gate, up):
        return F.silu(gate).mul_(up)

    result, reports = run_liger(f, GATE.bfloat16(), UP, patterns=GATED)
    assert not [site for site in sites(reports) if site.kind == "replace"]
    torch.testing.assert_close(result, f(GATE.bfloat16(), UP), rtol=0, atol=0)


def test_a_write_elsewhere_does_not_matter(run_liger):
    def f(x, w, buffer):
        buffer.add_(1)
        return norm(x, w) + buffer

    result, reports = run_liger(f, X, W, torch.zeros(8))
    assert [site.kind for site in sites(reports)] == ["replace"]
    torch.testing.assert_close(result, f(X, W, torch.zeros(8)))


def test_a_write_without_users_survives_the_rewrite(run_liger):
    buffer = torch.zeros(8)

    def f(x, w):
        y = norm(x, w)
        buffer.add_(1)
        return y

    run_liger(f, X, W)
    torch.testing.assert_close(buffer, torch.ones(8))


def test_a_change_of_grad_mode_within_is_left(run_liger):
    def f(x, w):
        with torch.no_grad():
            variance = x.pow(2).mean(-1, keepdim=True)
        return w * (x * torch.rsqrt(variance + 1e-6))

    x = X.clone().requires_grad_()
    result, reports = run_liger(f, x, W)
    assert not [site for site in sites(reports) if site.kind == "replace"]
    result.sum().backward()
    expected = X.clone().requires_grad_()
    f(expected, W).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)
    torch._dynamo.reset()
    assert_left(run_liger, f, X, W, reason="gradients are switched on between variance and add")


@pytest.mark.parametrize(
    "first, then, what",
    [
        (torch.no_grad, contextlib.nullcontext, "gradients are switched on"),
        (contextlib.nullcontext, torch.no_grad, "gradients are switched off"),
        (torch.inference_mode, contextlib.nullcontext, "inference mode ends"),
        (
            contextlib.nullcontext,
            partial(torch.autocast, "cpu", torch.bfloat16),
            "autocast to bfloat16 begins",
        ),
        (partial(torch.autocast, "cpu", torch.float16), contextlib.nullcontext, "autocast to float16 ends"),
        (
            partial(torch.autocast, "cpu", enabled=False),
            contextlib.nullcontext,
            "a region without autocast ends",
        ),
    ],
)
def test_which_mode_changes_and_where(run_liger, first, then, what):
    def f(x, w):
        # Where none is on around, a region without autocast is like any other.
        with torch.autocast("cpu", torch.bfloat16, enabled=what.startswith("a region without")):
            with first():
                variance = x.pow(2).mean(-1, keepdim=True)
            with then():
                return w * (x * torch.rsqrt(variance + 1e-6))

    reason = f"{what} between variance and add, and a replacement runs in one mode; compute the whole pattern on one"
    assert_left(run_liger, f, X, W, reason=reason)


def test_a_view_under_no_grad_cuts_the_gradient(run_liger):
    """Found by the fuzzer: it has the value of what it views, and not its gradient."""

    def f(x, w):
        h = x * 2
        with torch.no_grad():
            t = h[..., :]
        return norm(t, w) + h

    x = X.clone().requires_grad_()
    ours = gradients_of(lambda x, w: run_liger(f, x, w)[0], x, W)
    torch.testing.assert_close(ours, gradients_of(f, x, W))


def test_a_value_made_under_no_grad_does_not_stand_in_for_one_with_a_gradient(run_liger):
    """Found by the fuzzer."""

    def f(x, w):
        with torch.no_grad():
            largest = (x * 2).abs().max()
        return norm(x * 2, w) + largest

    x = X.clone().requires_grad_()
    ours = gradients_of(lambda x, w: run_liger(f, x, w)[0], x, W)
    torch.testing.assert_close(ours, gradients_of(f, x, W))


def test_a_copy_from_before_a_write_is_not_read_after_it(run_liger):
    """Found by the fuzzer."""

    def f(gate, up):
        h = gate.clone()
        gate.add_(1)
        return F.silu(h) * up

    result, _ = run_liger(f, X.clone(), X, patterns=GATED)
    torch.testing.assert_close(result, f(X.clone(), X))


def test_an_output_with_a_view_that_lives_on_is_computed_in_time(run_liger):
    """Found by the fuzzer."""

    def f(x, residual, w):
        s = x + residual
        t = s.view(s.shape)
        scale = w.float() * 2
        t32 = t.float()
        return t32 * torch.rsqrt(t32.pow(2).mean(-1, keepdim=True) + 1e-6) * scale, t

    result, _ = run_liger(f, X, X, W)
    torch.testing.assert_close(result, f(X, X, W))


def test_a_torch_func_transform_is_left(run_liger):
    def f(x, w):
        return torch.func.vmap(norm, in_dims=(0, None))(x, w)

    assert_left(run_liger, f, X, W, reason="runs under a torch.func transform")


def test_a_view_of_an_input_stays_one(run_liger):
    swap = Pattern(
        name="swap.test",
        search=lambda x: x.transpose(0, 1),
        replace=lambda x: x.transpose(0, 1).clone(memory_format=torch.preserve_format),
        examples={"x": torch.empty(3, 5)},
    )

    def f(x):
        return x.transpose(0, 1) * 2

    assert_left(run_liger, f, X, reason="is a view of an input, and must stay a view", patterns=(swap,))


def test_an_output_that_is_needed_before_the_last_input_is_left(run_liger):
    def f(x):
        return torch.erf(torch.tanh(x) * 2)

    assert_left(run_liger, f, X, reason="before all inputs of the replacement are computed", patterns=(PAIR,))


def test_a_loss_in_a_checkpoint_body_is_left(run_liger):
    def loss(x, w, target):
        return F.cross_entropy(F.linear(x, w), target)

    def f(x, w, target):
        return checkpoint(loss, x, w, target, use_reentrant=False)

    args = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8), torch.tensor([1, 2, 3, 4])
    assert_left(run_liger, f, *args, reason="a loss inside a checkpoint runs twice")


def test_a_norm_in_a_checkpoint_body_is_replaced(run_liger):
    def f(x, w):
        return checkpoint(norm, x, w, use_reentrant=False).sum()

    x = X.clone().requires_grad_()
    result, reports = run_liger(f, x, W)
    assert [site.pattern for site in sites(reports) if site.kind == "replace"] == ["rms_norm.llama"]
    result.backward()
    expected = X.clone().requires_grad_()
    f(expected, W).backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_check_refuses_with_its_sentence(run_liger):
    def f(x, residual, w):
        s = x + residual
        return norm(s, w), s

    _, reports = run_liger(f, X, torch.randn(1, 8), W)
    assert [site.pattern for site in sites(reports)] == [
        "rms_norm.llama"
    ]  # the add broadcasts: the norm alone


def test_profit_refuses_with_its_sentence_unless_the_policy_is_always(run_liger):
    def f(x, w, target):
        logits = F.linear(x, w)
        return F.cross_entropy(logits, target), logits.exp()

    args = torch.randn(4, 8), torch.randn(11, 8), torch.tensor([1, 2, 3, 4])
    reason = "the logits are used elsewhere (exp reads them)"
    reports = assert_left(run_liger, f, *args, reason=reason, policy="auto")
    assert len(sites(reports)) == 1
    torch._dynamo.reset()
    result, reports = run_liger(f, *args, policy="always")
    assert [site.pattern for site in sites(reports)] == ["linear_cross_entropy.plain"]
    torch.testing.assert_close(result, f(*args))


def test_policy_never_leaves_everything(run_liger):
    assert_left(run_liger, norm, X, W, reason="liger.policy is 'never'", policy="never")


def test_fuel_stops_after_so_many_rewrites(run_liger):
    def f(x, w):
        return norm(torch.tanh(norm(torch.tanh(norm(x, w)), w)), w)

    reports = assert_left(run_liger, f, X, W, reason="liger.fuel=2 is used up", fuel=2)
    assert [site.kind for site in sites(reports)].count("replace") == 2


def test_skip_leaves_a_pattern_out(run_liger):
    _, reports = run_liger(norm, X, W, skip=("rms_norm",))
    assert not sites(reports)


class _Wrapped(torch.Tensor):
    """Stands for DTensor, Float8Tensor and their like."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return _Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(
            _Wrapped, lambda each: each.inner, (args, kwargs or {})
        )
        out = func(*args, **kwargs)
        return _Wrapped(out) if isinstance(out, torch.Tensor) else out


def test_a_tensor_subclass_is_left(run_liger):
    result, reports = run_liger(norm, _Wrapped(X), W)
    assert any("is a _Wrapped, and only plain tensors are replaced" in site.reason for site in sites(reports))
    torch.testing.assert_close(result.inner, norm(X, W))


def test_tensors_on_several_devices_are_left(run_liger):
    def f(x, y):
        return torch.tanh(x), torch.erf(y)

    _, reports = run_liger(f, X, torch.empty(5, device="meta"), patterns=(PAIR,))
    reasons = [site.reason for site in sites(reports)]
    assert "its tensors are on several devices: cpu, meta" in reasons


SQUARED_RELU = Pattern(
    name="squared_relu.recompute",
    search=lambda x: torch.relu(x).square(),
    replace=None,
    examples={"x": torch.empty(3, 5)},
    saves=lambda match: match.result.numel() * match.result.dtype.itemsize,
)


def squared_relu_mlp(x, w, down):
    return F.linear(torch.relu(F.linear(x, w)).square(), down)


def test_a_pattern_without_a_replacement_marks_what_is_cheap_to_recompute(kept_for_backward):
    args = torch.randn(64, 8), torch.randn(32, 8), torch.randn(8, 32)
    options = {"liger.inner": "aot_eager", "liger.strict": True}
    plain = torch.compile(squared_relu_mlp, backend="liger", options={**options, "liger.recompute": "off"})
    before, expected = kept_for_backward(plain, *args)
    torch._dynamo.reset()
    marked = torch.compile(
        squared_relu_mlp, backend="liger", options={**options, "liger.patterns": (SQUARED_RELU,)}
    )
    after, gradients = kept_for_backward(marked, *args)
    (site,) = liger_compile.reports()[-1].sites
    assert (site.kind, site.saved_bytes) == ("annotate", 64 * 32 * 4)
    assert before - after == site.saved_bytes
    torch.testing.assert_close(gradients, expected)


def test_marks_are_left_to_the_user_in_a_checkpoint_body(run_liger):
    def f(x, w, down):
        return checkpoint(squared_relu_mlp, x, w, down, use_reentrant=False)

    args = torch.randn(4, 8, requires_grad=True), torch.randn(32, 8), torch.randn(8, 32)
    assert_left(
        run_liger,
        f,
        *args,
        reason="the checkpoint already determines what is recomputed",
        patterns=(SQUARED_RELU,),
    )


# Writes that the schema of one overload does not tell


WRITER = torch.library.Library("liger_test_decide", "DEF")
WRITER.define("double(Tensor(a!) x) -> ()")
WRITER.impl("double", lambda x: (x.data.mul_(2), None)[1], "CPU")  # autograd counts no write
WRITER.impl("double", lambda x: None, "Meta")


@torch._dynamo.allow_in_graph
def _doubles(nested):
    nested["deep"][0].data.mul_(2)
    return torch.ones(1)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: torch.ops.liger_test_decide.double(x),
        lambda x: torch.ops.liger_test_decide.double(x.view(-1)[4:]),
        lambda x: torch._foreach_mul_([x], 2),
        lambda x: _doubles({"deep": [x]}),
        lambda x: x.numpy().__setitem__(0, 3),
        lambda x: checkpoint(lambda a, b: (b.mul_(2), a.sin())[1], torch.ones(2), x, use_reentrant=False),
        lambda x: F.batch_norm(torch.arange(64.0).view(4, 8, 2), x[0], x[1].abs(), training=True),
        lambda x: torch.vmap(lambda row: row.mul_(2))(x),
    ],
    ids=["packet", "of a view", "foreach", "hidden", "numpy", "checkpoint", "statistics", "vmap"],
)
def test_a_write_that_no_schema_declares_is_found(run_liger, write):
    def f(x, w):
        y = x * 1
        before = norm(y, w)
        write(y)
        return before, norm(y, w), y

    result, reports = run_liger(f, X.clone(), W, inner="aot_eager")
    torch.testing.assert_close(result, f(X.clone(), W))
    assert [site.kind for site in sites(reports)] == ["replace", "replace"]

    def between(x, w):
        y = x * 1
        variance = y.pow(2).mean(-1, keepdim=True)
        write(y)
        return w * (y * torch.rsqrt(variance + 1e-6))

    torch._dynamo.reset()
    result, reports = run_liger(between, X.clone(), W, inner="aot_eager")
    torch.testing.assert_close(result, between(X.clone(), W))
    assert "replace" not in [site.kind for site in sites(reports)]


def with_a_triton_kernel(f, *args):
    """The graph of f, in which the operator that writes is a Triton kernel of the user's."""
    module, _ = graphs.capture(f, *args)
    for node in module.graph.nodes:
        if node.target is torch.ops.liger_test_decide.double:
            node.target = torch.ops.higher_order.triton_kernel_wrapper_mutation
            node.kwargs = {"kernel_idx": 0, "grid": [(1, 1, 1)], "kwargs": {"p": node.args[0]}}
            node.args = ()
    return module


def test_a_triton_kernel_is_taken_to_write_what_it_is_handed():
    def f(x, buffer, w):
        before = norm(x * buffer, w)
        torch.ops.liger_test_decide.double(buffer)
        return before, norm(x * buffer, w)

    def between(x, buffer, w):
        variance = buffer.pow(2).mean(-1, keepdim=True)
        torch.ops.liger_test_decide.double(buffer)
        return w * (buffer * torch.rsqrt(variance + 1e-6))

    module = with_a_triton_kernel(f, X, X.clone(), W)
    assert graphs.rewrite(module).replaced == ["rms_norm.llama", "rms_norm.llama"]
    order = [node.op if node.op == "output" else graphs.name_of(node) for node in module.graph.nodes]
    kernel = order.index("triton_kernel_wrapper_mutation")
    assert [name for name in order if name == "mul"] == ["mul", "mul"]  # x * buffer, before and after
    assert order[:kernel].count("mul") == order[kernel:].count("mul") == 1
    assert not graphs.rewrite(with_a_triton_kernel(between, X, X.clone(), W)).replaced


# Modes


GRAD, HEAD, LABELS = torch.randn(4, 8), torch.randn(11, 8), torch.tensor([1, 2, 3, 4])


def loss_and_scale(context):
    def f(x, w):
        with context():
            scale = (x * 2).abs().mean()
        return F.cross_entropy(F.linear(x * 2, w), LABELS), scale

    return f


def trained(function, *args):
    """Which results require gradients, the results, and the gradients of all arguments."""
    needs = []

    def noted(*leaves):
        results = function(*leaves)
        needs.extend(each.requires_grad for each in results)
        return results

    return needs, gradients_of(noted, *(arg.clone().requires_grad_() for arg in args))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.enable_grad])
def test_values_computed_without_gradients_replace_no_others(run_liger, context, around):
    def f(x, w):
        with around():
            return loss_and_scale(context)(x, w)

    ours = trained(lambda *args: run_liger(f, *args, inner="aot_eager")[0], GRAD, HEAD)
    torch.testing.assert_close(ours, trained(f, GRAD, HEAD))
    assert "linear_cross_entropy.plain" in [site.pattern for site in sites(liger_compile.reports())]


def test_what_is_made_with_gradients_inside_of_a_call_without(run_liger):
    """The other way round: gradients are off around the function, and on in a part of it."""

    def f(x, w):
        scale = (x * 2).abs().mean()
        with torch.enable_grad():
            loss = F.cross_entropy(F.linear(x * 2, w), LABELS)
        return loss, scale

    @torch.no_grad()
    def ours(*args):
        return run_liger(f, *args, inner="aot_eager")[0]

    torch.testing.assert_close(trained(ours, GRAD, HEAD), trained(torch.no_grad()(f), GRAD, HEAD))


@pytest.mark.parametrize("context", [torch.no_grad, INFERENCE_MODE])
def test_a_reference_without_gradients_beside_a_policy_with(run_liger, context):
    """As preference losses have it: the same formula twice, once as a number."""

    def f(x, w):
        with context():
            reference = F.cross_entropy(F.linear(norm(x, W), w), LABELS)
        policy = F.cross_entropy(F.linear(norm(x, W), w), LABELS)
        return policy * 3, reference

    ours = trained(lambda *args: run_liger(f, *args, inner="aot_eager")[0], GRAD, HEAD)
    torch.testing.assert_close(ours, trained(f, GRAD, HEAD))
    assert [site.kind for site in sites(liger_compile.reports())].count("replace") == 4


DETOURS = {
    "vmap": lambda x: torch.vmap(lambda row: row.cumsum(0))(x).sum(),
    "grad": lambda x: torch.func.grad(lambda t: t.square().sum())(x).sum(),
    "no_grad": lambda x: _within(torch.no_grad, x),
    "inference_mode": lambda x: _within(torch.inference_mode, x),
    "autocast": lambda x: _within(partial(torch.autocast, "cpu", torch.bfloat16), x),
    "no autocast": lambda x: _within(partial(torch.autocast, "cpu", enabled=False), x),
}


def _within(context, x):
    with context():
        return x.cumsum(0).sum()


@pytest.mark.parametrize("detour", DETOURS)
def test_modes_that_are_over_do_not_matter(run_liger, detour):
    def f(gate, up):
        activated = F.silu(gate)
        beside = DETOURS[detour](gate)
        return activated * up, beside.detach()

    result, reports = run_liger(f, GATE, UP, inner="aot_eager", patterns=GATED)
    torch.testing.assert_close(result, f(GATE, UP))
    kinds = [site.kind for site in sites(reports)]
    if detour == "grad":  # torch leaves a setting behind
        assert kinds in (["replace"], ["leave"])
    else:
        assert kinds == ["replace"]


def test_a_replacement_that_would_stand_in_another_mode_is_left(run_liger):
    def f(gate, up):
        with torch.no_grad():
            return F.silu(gate) * up

    def late(x, y):
        first = torch.tanh(x)
        with torch.no_grad():
            scaled = y * 2
            return first, torch.erf(scaled)

    result, reports = run_liger(f, GATE, UP, patterns=GATED)
    assert [site.kind for site in sites(reports)] == ["replace"] and not result.requires_grad
    torch._dynamo.reset()
    assert_left(run_liger, late, GATE, UP, reason="gradients are switched off between", patterns=(PAIR,))


def test_a_body_runs_in_the_modes_of_its_call(run_liger):
    def body(x, w):
        return norm(x, w) * 2

    def f(x, w):
        with torch.no_grad():
            first = checkpoint(body, x, w, use_reentrant=False)
        with torch.autocast("cpu", torch.bfloat16):
            second = checkpoint(body, x, w, use_reentrant=False)
        return first, second.float()

    ours = trained(lambda *args: run_liger(f, *args, inner="aot_eager")[0], GRAD, W)
    torch.testing.assert_close(ours, trained(f, GRAD, W))
    assert [site.kind for site in sites(liger_compile.reports())] == ["replace", "replace"]


CALLS = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


@pytest.mark.parametrize("policy", ["auto", "always"])
@pytest.mark.parametrize(
    "order", [("no_grad", "plain"), ("plain", "inference_mode", "plain"), ("autocast", "plain", "autocast")]
)
def test_modes_around_the_calls_may_change(policy, order):
    def f(x, w):
        with torch.no_grad():
            scale = norm(x, W).abs().mean()
        return F.cross_entropy(F.linear(norm(x, W), w).float(), LABELS), scale

    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": policy}
    compiled = torch.compile(f, backend="liger", options=options)

    def called(run, context):
        x, w = GRAD.clone().requires_grad_(), HEAD.clone().requires_grad_()
        with context():
            loss, scale = run(x, w)
        gradients = torch.autograd.grad(loss, (x, w)) if loss.requires_grad else ()
        return loss.requires_grad, scale.requires_grad, loss.detach() * 1, scale.detach() * 1, gradients

    for name in order:
        tolerance = 3e-2 if name == "autocast" else 1e-4
        ours, eager = (called(run, CALLS[name]) for run in (compiled, f))
        torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)
