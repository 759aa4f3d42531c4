"""Logits that are returned beside their loss: fused all the same, and computed when they are read."""

import pytest
import torch
import torch.nn.functional as F

import liger_compile
from liger_compile.runtime.lazy import LazyTensor
from tests.helpers.versions import INFERENCE_MODE

V, H = 32, 8


def head_and_loss(x, w, labels):
    """As Hugging Face: upcasts for the loss, returns the logits as they are."""
    logits = F.linear(torch.tanh(x), w)
    return F.cross_entropy(logits.float().view(-1, V), labels.view(-1)), logits


def upcast_first(x, w, labels):
    logits = F.linear(torch.tanh(x), w).float()
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits


def softcap(x, w, labels):
    logits = 3 * torch.tanh(F.linear(torch.tanh(x), w) / 3)
    return F.cross_entropy(logits.float().view(-1, V), labels.view(-1)), logits


def scaled_for_the_caller_only(x, w, labels):
    logits = F.linear(torch.tanh(x), w)
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)), (logits * 2).float()


def sliced_states(x, w, labels):
    states = torch.tanh(x)
    logits = F.linear(states[:, 0:, :], w)
    return F.cross_entropy(logits.float().view(-1, V), labels.view(-1)), logits


def transposed_head(x, w, labels):
    logits = torch.tanh(x) @ w.t() + 0.5 * w.new_ones(V)
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits


def two_outputs(x, w, labels):
    logits = F.linear(torch.tanh(x), w)
    loss = F.cross_entropy(logits.float().view(-1, V), labels.view(-1))
    return (
        loss,
        logits,
        logits.view(-1, V).double(),
    )  # a copy: a view would have to share the memory of the logits


LAZY = (head_and_loss, upcast_first, softcap, scaled_for_the_caller_only, sliced_states, two_outputs)


def arguments(dtype=torch.float32, length=5):
    x = torch.randn(3, length, H, dtype=dtype, requires_grad=True)
    w = torch.nn.Parameter(
        torch.randn(V, H, dtype=dtype)
    )  # whose sizes stay static where those of inputs do not
    return x, w, torch.randint(V, (3, length))


def compiled(function, inner="aot_eager", **options):
    settings = {f"liger.{name}": value for name, value in options.items()}
    return torch.compile(
        function, backend="liger", options={"liger.inner": inner, "liger.strict": True, **settings}
    )


def fused():
    return [
        site.kind
        for report in liger_compile.reports()
        for site in report.sites
        if site.pattern.startswith(("linear_cross_entropy", "linear_softmax"))
    ]


@pytest.mark.parametrize("function", LAZY)
def test_logits_that_nobody_reads_are_not_computed(function):
    x, w, labels = arguments()
    loss, *logits = compiled(function)(x, w, labels)
    expected_loss, *expected = function(x, w, labels)
    assert fused() == ["replace"]
    assert all(isinstance(each, LazyTensor) for each in logits)
    for got, wanted in zip(logits, expected, strict=True):
        for of in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(got, of) == getattr(wanted, of)
        assert got.stride() == wanted.stride()
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected_loss, (x, w)))


@pytest.mark.parametrize("function", (*LAZY, transposed_head))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_read_logits_are_those_of_eager_and_so_are_their_gradients(function, dtype):
    x, w, labels = arguments(dtype)

    def total(results):
        loss, *logits = results
        return loss + sum(each.float().square().mean() for each in logits)

    got, expected = compiled(function)(x, w, labels), function(x, w, labels)
    for ours, plain in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours + 0, plain + 0)
    exact = function(x.double(), w.double(), labels)
    truth = torch.autograd.grad(total(exact), (x, w))
    ours = torch.autograd.grad(total(got), (x, w))
    eager = torch.autograd.grad(total(expected), (x, w))
    for a, b, wanted in zip(ours, eager, truth, strict=True):
        unit = torch.finfo(dtype).eps * wanted.double().norm()
        assert (a - wanted).double().norm() <= 2 * (b - wanted).double().norm() + unit


def test_with_inductor():
    x, w, labels = arguments()
    loss, logits = compiled(head_and_loss, "inductor")(x, w, labels)
    expected, expected_logits = head_and_loss(x, w, labels)
    torch.testing.assert_close((loss, logits + 0), (expected, expected_logits + 0))
    (loss + logits.mean()).backward()
    torch.testing.assert_close(w.grad, torch.autograd.grad(expected + expected_logits.mean(), w)[0])


@pytest.mark.parametrize("inside", (True, False))
def test_autocast(inside):
    x, w, labels = arguments()

    def under_autocast(x, w, labels):
        with torch.autocast("cpu", torch.bfloat16):
            loss, logits = head_and_loss(x, w, labels)
        return loss, logits.float()

    function = under_autocast if inside else head_and_loss
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        _, expected = function(x, w, labels)
        _, logits = compiled(function)(x, w, labels)
    assert fused() == ["replace"] and isinstance(logits, LazyTensor) and logits.dtype == expected.dtype
    torch.testing.assert_close(logits + 0, expected + 0)
    torch.testing.assert_close(
        torch.autograd.grad(logits.float().square().sum(), (x, w)),
        torch.autograd.grad(expected.float().square().sum(), (x, w)),
        rtol=2e-2,
        atol=2e-2,
    )


def test_one_compilation_serves_all_lengths():
    function = compiled(head_and_loss)
    dynamic = torch.compile(
        head_and_loss,
        backend="liger",
        dynamic=True,
        options={"liger.inner": "aot_eager", "liger.strict": True},
    )
    for each in (dynamic, function):
        liger_compile.clear_reports()
        for length in (5, 7, 9):
            x, w, labels = arguments(length=length)
            _, logits = each(x, w, labels)
            assert isinstance(logits, LazyTensor) and logits.shape == (3, length, V)
            torch.testing.assert_close(logits + 0, head_and_loss(x, w, labels)[1] + 0)
        assert len(liger_compile.reports()) == (1 if each is dynamic else 2)


def test_none_drops_them():
    x, w, labels = arguments()
    loss, logits = compiled(head_and_loss, logits="none")(x, w, labels)
    assert logits is None
    torch.testing.assert_close(loss, head_and_loss(x, w, labels)[0])


@pytest.mark.parametrize("case", ("option", "no_grad"))
def test_logits_in_the_graph_prevent_fusion_with_a_reason(case):
    function = compiled(head_and_loss, **({"logits": "eager"} if case == "option" else {}))
    x, w, labels = arguments()
    with torch.set_grad_enabled(case == "option"):
        loss, logits = function(x, w, labels)
    assert type(logits) is torch.Tensor
    torch.testing.assert_close((loss, logits), head_and_loss(x, w, labels))
    (report,) = liger_compile.reports()
    reason = "liger.logits is 'eager'" if case == "option" else "gradients are off"
    (note,) = report.notes
    assert reason in note and "computed in the graph" in note


def test_gradients_may_be_on_inside_only():
    """The logits need a gradient as the loss does, whatever mode the caller is in."""

    def function(x, w, labels):
        with torch.enable_grad():
            return head_and_loss(x, w, labels)

    x, w, labels = arguments()
    with torch.no_grad():
        loss, logits = compiled(function)(x, w, labels)
    assert loss.requires_grad and logits.requires_grad and isinstance(logits, LazyTensor)
    expected = torch.autograd.grad(head_and_loss(x, w, labels)[1].square().sum(), (x, w))
    torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), (x, w)), expected)


def accuracy_beside(x, w, labels):
    logits = F.linear(torch.tanh(x), w)
    hits = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits, hits


def penalty_beside(x, w, labels):
    logits = F.linear(torch.tanh(x), w)
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits, logits.relu().mean()


def test_logits_that_the_graph_reads_itself_come_back():
    x, w, labels = arguments()
    results = compiled(penalty_beside)(x, w, labels)
    assert type(results[1]) is torch.Tensor and fused() == ["leave"]
    torch.testing.assert_close(results, penalty_beside(x, w, labels))


def test_logits_stay_away_if_the_graph_asks_them_what_the_op_answers():
    x, w, labels = arguments()
    results = compiled(accuracy_beside)(x, w, labels)
    assert isinstance(results[1], LazyTensor) and fused() == ["replace"]
    torch.testing.assert_close(results, accuracy_beside(x, w, labels))


def test_a_skipped_loss_gives_them_back_as_they_were():
    x, w, labels = arguments()
    for function in (scaled_for_the_caller_only, two_outputs):
        results = compiled(function, skip=("linear_cross_entropy",))(x, w, labels)
        assert all(type(each) is torch.Tensor for each in results)
        torch.testing.assert_close(results, function(x, w, labels))
        torch._dynamo.reset()


def test_a_failure_afterwards_gives_them_back(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("liger_compile.pipeline.find_matches", fail)
    x, w, labels = arguments()
    with pytest.warns(UserWarning, match="a mistake of ours"):
        results = torch.compile(head_and_loss, backend="liger", options={"liger.inner": "aot_eager"})(
            x, w, labels
        )
    assert type(results[1]) is torch.Tensor
    torch.testing.assert_close(results, head_and_loss(x, w, labels))


def test_the_weight_may_change_after_the_logits_were_read_and_not_before():
    x, w, labels = arguments()
    function = compiled(head_and_loss)
    expected = head_and_loss(x, w, labels)[1].detach()
    first, second = function(x, w, labels)[1], function(x, w, labels)[1]
    first.max()
    with torch.no_grad():
        w.add_(1)
    torch.testing.assert_close(first.detach() + 0, expected)
    with pytest.raises(RuntimeError, match=r"liger.logits"):
        second.max()


STEPS = {
    "plain": lambda w: torch.optim.SGD([w], lr=0.5, foreach=False).step(),
    "fused": lambda w: torch.optim.AdamW([w], lr=0.5, fused=True).step(),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("inner", ("aot_eager", "inductor"))
def test_after_an_optimizers_step_logits_are_those_from_before(step, inner):
    x, w, labels = arguments()
    loss, logits = compiled(head_and_loss, inner)(x, w, labels)
    expected = head_and_loss(x, w, labels)[1].detach()
    copy = logits.double()
    loss.backward()
    STEPS[step](w)
    torch.testing.assert_close(logits.detach() + 0, expected)
    torch.testing.assert_close(copy + 0, logits.double(), rtol=0, atol=0)
    assert "grad_fn" in repr(logits) and "cannot be computed" not in repr(logits)


def test_an_undeclared_write_to_a_weight_raises_and_is_printed():
    x, w, labels = arguments()
    _, logits = compiled(head_and_loss)(x, w, labels)
    w.data.mul_(0.5)
    assert "liger.logits" in repr(logits)
    for read in (torch.Tensor.argmax, lambda t: t.tolist(), torch.compile(torch.sin, backend="aot_eager")):
        with pytest.raises(RuntimeError, match=r"was changed .*liger.logits"):
            read(logits)


def last_positions(x, w, labels, count):
    logits = F.linear(torch.tanh(x), w)
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits[:, -count:]


@pytest.mark.parametrize("dynamic", (True, None))
def test_a_number_that_changes_decides_the_shape(dynamic):
    function = torch.compile(
        last_positions,
        backend="liger",
        dynamic=dynamic,
        options={"liger.inner": "aot_eager", "liger.strict": True},
    )
    x, w, labels = arguments()
    for count in (4, 2, 3, 2):
        logits = function(x, w, labels, count)[1]
        assert isinstance(logits, LazyTensor) and logits.shape == (3, count, V)
        torch.testing.assert_close(logits + 0, last_positions(x, w, labels, count)[1] + 0)


def test_nothing_large_is_kept_for_backward():
    """The hidden state is what autograd keeps between forward and backward, not the logits."""
    x, w, labels = arguments()
    known, kept = {x.untyped_storage().data_ptr(), w.untyped_storage().data_ptr()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, logits = compiled(head_and_loss)(x, w, labels)
    largest = max(size for storage, size in kept.items() if storage not in known)
    assert largest < logits.numel()
    loss.backward()


def biased(x, w, labels, bias):
    logits = F.linear(torch.tanh(x), w) + bias
    loss = F.cross_entropy(logits.float().view(-1, V), labels.view(-1))
    torch._foreach_mul_([bias], 3)  # of this the fake tensor counts no write
    return loss, logits


def hidden_is_written(x, w, labels, bias):
    states = torch.tanh(x).detach()
    logits = F.linear(states, w.detach())
    loss = F.cross_entropy(logits.float().view(-1, V), labels.view(-1)) + bias.sum()
    torch._foreach_mul_([states], 3)
    return loss, logits


@pytest.mark.parametrize("function", (biased, hidden_is_written))
def test_logits_of_what_is_written_later_are_computed_in_the_graph(function):
    x, w, labels = arguments()
    results = [
        run(x, w, labels, torch.ones(V, requires_grad=False)) for run in (compiled(function), function)
    ]
    assert not isinstance(results[0][1], LazyTensor)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("context", (torch.no_grad, INFERENCE_MODE))
def test_logits_that_are_made_without_gradients_have_none_later(context):
    def beside(x, w, labels):
        states = torch.tanh(x)
        with context():
            logits = F.linear(states, w)
        return F.cross_entropy(F.linear(states, w).view(-1, V), labels.view(-1)), logits

    def evaluated(x, w, labels):
        flat = labels.view(-1)
        with context():
            logits = F.linear(torch.tanh(x), w)
            loss = F.cross_entropy(logits.view(-1, V), flat)
        return loss, logits, torch.sin(x)

    x, w, labels = arguments()
    for function in (beside, evaluated):
        torch._dynamo.reset()
        ours, eager = compiled(function)(x, w, labels), function(x, w, labels)
        assert [each.requires_grad for each in ours] == [each.requires_grad for each in eager]
        torch.testing.assert_close(ours[1] + 0, eager[1] + 0)
    assert any("gradients are off" in note for report in liger_compile.reports() for note in report.notes)


def test_what_is_put_back_runs_in_the_modes_of_its_head():
    def f(x, w, labels):
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.linear(torch.tanh(x), w)
            loss = F.cross_entropy(logits.view(-1, V), labels.view(-1))
            return loss, (logits * 2).float().view(-1, V), logits.exp()

    x, w, labels = arguments()
    torch.testing.assert_close(compiled(f)(x, w, labels), f(x, w, labels))


def with_a_view(x, w, labels):
    logits = F.linear(torch.tanh(x), w)
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits, logits.view(-1, V)


def with_a_part(x, w, labels):
    logits = F.linear(torch.tanh(x), w)
    return F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits[:, 1:], logits.transpose(0, 1)


@pytest.mark.parametrize("function", [with_a_view, with_a_part])
@pytest.mark.parametrize("policy", ["auto", "always"])
def test_outputs_that_share_memory_go_on_sharing_it(run_liger, function, policy):
    outcomes = []
    for run in (function, lambda *args: run_liger(function, *args, policy=policy, inner="aot_eager")[0]):
        torch.manual_seed(0)
        x, w, labels = arguments()
        loss, first, second = run(x, w, labels)
        with torch.no_grad():
            first.mul_(2)
        loss.backward()
        outcomes.append((loss, first, second, x.grad, w.grad))
    torch.testing.assert_close(*outcomes[::-1])


def steps_after_the_loss(x, w, labels):
    logits = F.linear(torch.tanh(x), w)
    shifted = (logits + 1.0) - 1.0  # which keeps the loss from being fused with the head
    return F.cross_entropy(shifted.view(-1, V), labels.view(-1)), shifted * 2.0, (shifted * 3.0).float()


def test_outputs_that_come_back_stand_after_what_they_read(run_liger):
    args = arguments()
    (loss, *outputs), _ = run_liger(steps_after_the_loss, *args, policy="auto", inner="aot_eager")
    torch.testing.assert_close((loss, *outputs), steps_after_the_loss(*args))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "given", [lambda hidden: hidden, lambda hidden: hidden.view(-1), lambda hidden: hidden[0]]
)
def test_logits_are_right_after_a_write_into_the_hidden_state_that_is_returned_too(inner, given):
    def model(x, w, labels):
        hidden = x * 2  # whose backward needs no result
        logits = F.linear(hidden, w)
        return F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits, given(hidden)

    x, w, labels = arguments()
    _, logits, hidden = compiled(model, inner)(x, w, labels)
    expected = model(x, w, labels)
    assert isinstance(logits, LazyTensor) and fused() == ["replace"]
    assert any("the hidden state is copied" in note for note in liger_compile.reports()[0].notes)
    for written in (hidden, expected[2]):
        with torch.no_grad():
            written.zero_()
    torch.testing.assert_close(logits.detach() + 0, expected[1].detach())
    found = torch.autograd.grad(logits.square().sum(), x)
    x2 = x.detach().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(model(x2, w, labels)[1].square().sum(), x2))
