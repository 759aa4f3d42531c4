"""Lazy logits answer questions about their softmax without the logits; everything else computes them, and is right."""

import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

from liger_compile.lazy_logits.recipe import reading
from liger_compile.runtime.lazy import LazyTensor, lazy
from liger_compile.runtime.promise import Recipe
from tests.helpers.pairwise import parametrize

B, T, H, V = 2, 6, 8, 48


class Model:
    """A head whose result is lazy; it counts how often the logits are computed."""

    def __init__(self, steps=lambda logits: logits, autocast=None):
        graph, self.computed, self.said = Graph(), 0, []
        hidden, weight = graph.placeholder("hidden"), graph.placeholder("weight")
        node = graph.call_function(F.linear, (hidden, weight))
        for function, *args in steps if isinstance(steps, (list, tuple)) else ():
            node = graph.call_function(function, (node, *args))
        graph.output(node)
        self.function, self.autocast = GraphModule(torch.nn.Module(), graph), autocast
        self.reading = reading(graph, autocast, 0, self.said)

    def __call__(self, x, w):
        def counted(*args):
            self.computed += 1
            return self.function(*args)

        with (
            torch.autocast("cpu", self.autocast[1]) if self.autocast else torch.autocast("cpu", enabled=False)
        ):
            like = self.function(x.detach(), w.detach()).to("meta")
        recipe = Recipe(counted, "logits", "read them before", self.autocast)
        return lazy(recipe, like, x, w, meaning=self.reading.meaning(0, (x, w)))


def inputs(dtype=torch.float32):
    """Hidden state and head, of which bfloat16 represents each value, and ids."""
    torch.manual_seed(0)
    x, w = (torch.randn(shape).bfloat16().to(dtype).requires_grad_() for shape in ((B, T, H), (V, H)))
    return x, w, torch.randint(V, (B, T))


def wide(z):
    """As z.float(), for the exact run too."""
    return z if z.dtype is torch.float64 else z.float()


def chosen(values, ids):
    return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def by_logsumexp(logits, ids):
    """The logarithm's normalizer row by row, as TRL computes it in float32."""
    selected = torch.gather(logits, dim=-1, index=ids.unsqueeze(-1)).squeeze(-1)
    return selected - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


def by_rows(logits, ids):
    """One sequence after the other, as TRL computes it in half precision."""
    rows = [
        F.log_softmax(row, dim=-1).gather(dim=-1, index=chosen.unsqueeze(-1)).squeeze(-1)
        for row, chosen in zip(logits, ids, strict=True)
    ]
    return torch.stack(rows)


def entropy_in_chunks(logits):
    parts = []
    for part in logits.reshape(-1, logits.shape[-1]).split(5, dim=0):
        logp = F.log_softmax(part, dim=-1)
        parts.append(-(torch.exp(logp) * logp).sum(-1))
    return torch.cat(parts).reshape(logits.shape[:-1])


def entropy_by_softmax(logits):
    p = torch.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(p * logits, dim=-1)


def in_place(logits, ids):
    logits = logits[:, :-1, :]
    logits = logits[:, -3:]
    logits.div_(0.7)
    return by_rows(logits, ids[:, -3:]), entropy_in_chunks(logits)


def smoothed(logits, ids):
    """As transformers' LabelSmoother."""
    logits, labels = logits[..., :-1, :].contiguous(), ids[..., 1:].unsqueeze(-1)
    logp = -F.log_softmax(logits, dim=-1)
    ignored = labels.eq(3)
    chosen = logp.gather(dim=-1, index=torch.clamp(labels, min=0)).masked_fill(ignored, 0.0)
    return chosen, logp.sum(dim=-1, keepdim=True, dtype=torch.float32).masked_fill(ignored, 0.0)


def masked(logits, ids):
    mask = ids % 2 == 0
    logp = logits[mask].log_softmax(-1)
    return logp[torch.arange(len(logp)), ids[mask]]


QUESTIONS = {
    "gather": lambda z, ids: chosen(z.log_softmax(-1), ids),
    "gather of scores": lambda z, ids: chosen(z, ids),
    "by keywords": lambda z, ids: (
        torch.logsumexp(input=torch.div(input=z, other=2), dim=-1)
        - torch.gather(input=torch.log_softmax(input=z, dim=-1), dim=-1, index=ids[..., None])[..., 0]
    ),
    "several columns": lambda z, ids: z.log_softmax(-1).gather(-1, torch.stack([ids, ids.flip(0), ids], -1)),
    "part of the rows": lambda z, ids: z.log_softmax(-1).gather(-1, ids[:1, 1:4, None]),
    "take_along_dim": lambda z, ids: torch.take_along_dim(wide(z).log_softmax(-1), ids[..., None], -1)[
        ..., 0
    ],
    "logsumexp": lambda z, ids: (z * 0.5).logsumexp(-1, keepdim=True),
    "by logsumexp": lambda z, ids: by_logsumexp(z[:, :-1] / 0.9, ids[:, 1:]),
    "by rows": lambda z, ids: by_rows(z[:, :-1] / 0.9, ids[:, 1:]),
    "entropy in chunks": lambda z, ids: entropy_in_chunks(z),
    "entropy by softmax": lambda z, ids: entropy_by_softmax(wide(z)),
    "log-probability and entropy": lambda z, ids: (by_logsumexp(z, ids), entropy_in_chunks(z[:, 2:])),
    "in place": in_place,
    "smoothed": smoothed,
    "mask": masked,
    "index": lambda z, ids: z[1].log_softmax(-1)[torch.arange(T), -ids[0] - 1],
    "list of rows": lambda z, ids: z[[1, 0, 1], 2:].log_softmax(-1)[:, ids[0] % 4].sum(-1),
    "repeated rows": lambda z, ids: chosen(z[:, [0, 0, 3, 0]].log_softmax(-1), ids[:, :4]),
    "transposed": lambda z, ids: chosen(z.transpose(0, 1).log_softmax(-1), ids.t()),
    "cross_entropy": lambda z, ids: F.cross_entropy(wide(z).view(-1, V), ids.view(-1)),
    "cross_entropy, shifted": lambda z, ids: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, V),
        F.pad(ids, (0, 1), value=-100)[:, 1:-1].reshape(-1),
        reduction="sum",
    ),
    "cross_entropy, smoothed": lambda z, ids: F.cross_entropy(
        z.flatten(0, 1), ids.flatten(), ignore_index=int(ids[0, 0]), label_smoothing=0.1, reduction="none"
    ),
    "one row": lambda z, ids: F.cross_entropy(z[0, 1], ids[0, 1]),
    "nll_loss": lambda z, ids: F.nll_loss(F.log_softmax(z.view(-1, V), -1), ids.view(-1)),
    "classes": lambda z, ids: F.cross_entropy(z[..., : V - 8].flatten(0, 1), ids.flatten() % (V - 8)),
    "cap": lambda z, ids: chosen((torch.tanh(z / 2) * 2).log_softmax(-1), ids),
    "cap, then a temperature": lambda z, ids: chosen(
        (2 * torch.tanh(wide(z) / 2) / 0.7).log_softmax(-1), ids
    ),
    "topk": lambda z, ids: z.topk(3).values,
    "collision": lambda z, ids: (p := z.softmax(-1), (p * p).sum(-1))[1],
    "z-loss": lambda z, ids: F.cross_entropy(z.view(-1, V), ids.view(-1)) + z.logsumexp(-1).square().mean(),
    "detached weights": lambda z, ids: (lp := chosen(z.log_softmax(-1), ids), lp.detach().exp() * lp)[1],
    "sum": lambda z, ids: F.log_softmax(z, -1).sum(),
}


def total(results):
    return sum(
        (each.double() * torch.linspace(-1, 2, each.numel()).view(each.shape)).sum() for each in results
    )


def with_gradients(make, question, dtype):
    x, w, ids = inputs(dtype)
    results = question(make(x, w), ids)
    results = results if isinstance(results, tuple) else (results,)
    return *results, *torch.autograd.grad(total(results), (x, w))


@parametrize(
    name=QUESTIONS,
    dtype=(torch.float32, torch.bfloat16),
)
def test_questions_are_answered_without_the_logits(name, dtype):
    model = Model()
    got = with_gradients(model, QUESTIONS[name], dtype)
    assert model.computed == 0 and not model.said
    assert_as_exact(
        got, *(with_gradients(F.linear, QUESTIONS[name], each) for each in (dtype, torch.float64))
    )


def assert_as_exact(results, eager, exact):
    """The error is at most twice that of eager code, in values and gradients."""
    for got, plain, true in zip(results, eager, exact, strict=True):
        dtype = plain.dtype
        assert (got.shape, got.dtype, got.requires_grad) == (plain.shape, plain.dtype, plain.requires_grad)
        unit = torch.finfo(dtype).eps * true.norm()
        assert (got - true).norm() <= 2 * (plain - true).norm() + unit


# What is no question, and what stays lazy --------------------------------------------------------------------

STEPS = {
    "slice": lambda z: z[:, :-1],
    "last": lambda z: z[:, -2:],
    "mask": lambda z: z[torch.arange(T * B).view(B, T) % 3 == 0],
    "indices": lambda z: z[torch.tensor([1, 0, 1])],
    "new dimension": lambda z: z[None, ..., 1:5],
    "classes": lambda z: z[..., :-3],
    "view": lambda z: z.view(-1, V),
    "reshape": lambda z: z[:, 1:].reshape(-1, V),
    "flatten": lambda z: z.flatten(0, 1),
    "squeeze": lambda z: z.unsqueeze(0).squeeze(0),
    "split": lambda z: z.split(4, dim=1)[1],
    "chunk": lambda z: z.chunk(2)[0],
    "unbind": lambda z: z.unbind(1)[2],
    "transpose": lambda z: z.transpose(0, 1),
    "permute": lambda z: z.permute(1, 0, 2),
    "row": lambda z: next(iter(z)),
    "scaled": lambda z: -z / 0.7 * 2,
    "scaled from the left": lambda z: 2 * z,
    "scaled in place": lambda z: z.div_(0.7).mul_(3),
    "augmented": lambda z: _augmented(z),
    "cast": lambda z: z.to(torch.bfloat16).float(),
    "detach": lambda z: z.detach(),
    "contiguous": lambda z: z[:, 1:].contiguous(),
    "cap": lambda z: 3 * torch.tanh(z / 3),
    "log_softmax": lambda z: F.log_softmax(z, dim=-1),
    "softmax": lambda z: torch.softmax(z.bfloat16(), -1, dtype=torch.float32),
    "product": lambda z: (lp := z.log_softmax(-1), lp.exp() * lp)[1],
}


def _augmented(z):
    z = z[:, 1:]
    z /= 0.5
    z *= 3
    return z


@pytest.mark.parametrize("name", STEPS)
def test_operations_stay_lazy_and_have_the_values_and_gradients_of_eager(name):
    model, (x, w, _) = Model(), inputs()
    result, expected = STEPS[name](model(x, w)), STEPS[name](F.linear(x, w))
    assert isinstance(result, LazyTensor) and model.computed == 0
    for of in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
        assert getattr(result, of) == getattr(expected, of)
    assert result.stride() == expected.stride() and result.is_contiguous() == expected.is_contiguous()
    assert (result._version, result._is_view()) == (expected._version, expected._is_view())
    torch.testing.assert_close(result.detach() + 0, expected.detach(), rtol=0, atol=0)
    assert model.computed == 1
    if expected.requires_grad:
        got = torch.autograd.grad(result.square().sum(), (x, w))
        torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), (x, w)))


@pytest.mark.parametrize("name", STEPS)
def test_an_alias_sees_what_is_written_and_a_copy_does_not(name):
    outcomes = []
    for make in (Model(), F.linear):
        x, w, _ = inputs()
        logits = make(x, w).detach()
        before, alias = logits.float().double(), logits.view(-1, V)
        derived = STEPS[name](logits)
        logits.mul_(2)
        after = logits.double()
        logits.view(-1)[::7] = 5.0
        outcomes.append([each + 0 for each in (before, alias, derived, after, logits)])
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


READS = {
    "square": lambda z, ids: z.square().mean(),
    "softmax over rows": lambda z, ids: z.softmax(0).square().sum(),
    "one class": lambda z, ids: z[..., 3].sum(),
    "comparison": lambda z, ids: torch.where(z > 0, z, 0.0).sum(),
    "in place with gradients": lambda z, ids: z.clamp_(min=0).sum(),
    "class weights": lambda z, ids: F.cross_entropy(
        z.view(-1, V), ids.view(-1), weight=torch.linspace(0, 1, V)
    ),
    "soft targets": lambda z, ids: F.cross_entropy(z.view(-1, V), torch.full((B * T, V), 1 / V)),
    "given divergence": lambda z, ids: F.kl_div(
        z.log_softmax(-1), torch.full((B, T, V), 1 / V), reduction="sum"
    ),
    "detached probabilities": lambda z, ids: (z * z.softmax(-1).detach()).sum(),
    "detached scores": lambda z, ids: (z.softmax(-1) * z.detach()).sum(),
    "detached factor": lambda z, ids: (p := z.softmax(-1), (p.detach() * p).sum())[1],
    "matmul": lambda z, ids: (z @ torch.ones(V, 2)).sum(),
    "logarithm of softmax": lambda z, ids: z.softmax(-1).log().gather(-1, ids[..., None]).sum(),
    "vmap": lambda z, ids: torch.vmap(lambda row: row.logsumexp(-1))(z).sum(),
    "dual numbers": lambda z, ids: _dual(z) + z.square().sum(),
    "property": lambda z, ids: z.flatten(0, 1).T.logsumexp(0).sum(),
    "classes in another place": lambda z, ids: z.transpose(1, 2).logsumexp(1).sum(),
}


def _dual(z):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones(z.shape))
        return torch.autograd.forward_ad.unpack_dual(dual.sum(-1)).tangent.sum()


@pytest.mark.parametrize("name", READS)
def test_what_is_no_question_is_computed_and_said_once(name):
    model, read = Model(), READS[name]
    for _ in range(2):
        x, w, ids = inputs()
        got, expected = read(model(x, w), ids), read(F.linear(x, w), ids)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, (x, w)), torch.autograd.grad(expected, (x, w)))
    assert model.computed == 4  # in forward and in backward
    (note,) = model.said
    assert "test_lazy_logits.py:" in note and "needs their values" in note and "__get__" not in note


def test_a_detached_distribution_gets_no_gradient():
    """The gradient of sum(p * log(p)) at fixed p is zero."""
    model, (x, w, _) = Model(), inputs()
    logp = model(x, w).log_softmax(-1)
    p = logp.exp().detach()
    got = torch.autograd.grad((logp * p).sum() + 2 * (p * logp).sum(), (x, w))
    torch.testing.assert_close(got, (torch.zeros_like(x), torch.zeros_like(w)), rtol=0, atol=1e-4)
    assert model.computed == 0


@pytest.mark.parametrize("name", ["argmax", "topk", "max"])
def test_without_gradients(name):
    reads = {
        "argmax": lambda z: (z.argmax(-1), z.log_softmax(-1).argmax(dim=-1, keepdim=True)),
        "topk": lambda z: tuple(torch.topk(z[:, 1:], 4)),
        "max": lambda z: (z.max(-1).values, z.max(-1).indices),
    }
    for context in (torch.no_grad, torch.inference_mode):
        model, (x, w, _) = Model(), inputs()
        with context():
            got, expected = reads[name](model(x, w)), reads[name](F.linear(x, w))
        torch.testing.assert_close(got, expected)
        assert model.computed == (name == "max") and not any(each.requires_grad for each in got)


@pytest.mark.parametrize(
    "dtype, numbers",
    [
        (torch.float32, (1e38, 100, 1e-40)),
        (torch.float32, (1e-30, 1e-30, 1e30, 1e30)),
        (torch.float16, (1e5,)),
        (torch.float16, (6e4, 1 / 6e4)),
    ],
    ids=str,
)
def test_numbers_that_overflow_or_underflow_on_the_way_do_not_merge(dtype, numbers):
    def question(z):
        for number in numbers:
            z = z * number
        logp = z.log_softmax(-1)
        for number in numbers:
            logp = logp * number
        return z.logsumexp(-1), logp.sum(-1)

    x, w, _ = inputs(dtype)
    torch.testing.assert_close(question(Model()(x, w)), question(F.linear(x, w)), equal_nan=True)


# Autograd ----------------------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """Multiplies the gradient by 3; the result of forward is a view, a multiple, part of its input, or its input."""

    @staticmethod
    def forward(ctx, z, made):
        ctx.shape = z.shape
        return made(z)

    @staticmethod
    def backward(ctx, gradient):
        missing = ctx.shape[1] - gradient.shape[1]
        return F.pad(gradient * 3, (0, 0, 0, missing)), None


MADE = {
    "view": lambda z: z.view_as(z),
    "multiple": lambda z: z * 2,
    "part": lambda z: z[:, :-1],
    "log_softmax": lambda z: z.log_softmax(-1),
    "itself": lambda z: z,
}


@pytest.mark.parametrize("name", MADE)
def test_a_custom_function_has_its_own_backward(name):
    outcomes = []
    for make in (Model(), F.linear):
        x, w, ids = inputs()
        z = Scaled.apply(make(x, w), MADE[name])
        outcomes.append(torch.autograd.grad(chosen(z, ids[:, : z.shape[1]]).sum() + z.sum(-1).mean(), (x, w)))
    torch.testing.assert_close(*outcomes)


def test_a_hook_of_a_module_gets_the_gradient_of_lazy_logits():
    outcomes = []
    for make in (Model(), F.linear):
        x, w, ids = inputs()
        module, seen = torch.nn.Identity(), []
        module.register_full_backward_hook(lambda module, given, got, seen=seen: seen.append(got[0].clone()))
        chosen(module(make(x, w)).log_softmax(-1), ids).sum().backward()
        outcomes.append([*seen, x.grad, w.grad])
    torch.testing.assert_close(*outcomes)


def test_a_view_that_is_made_without_gradients_has_none():
    for make in (Model(), F.linear):
        x, w, _ = inputs()
        logits = make(x, w)
        with torch.no_grad():
            part = logits[:, 1:]
        total = (part * 2).logsumexp(-1).sum() + part.log_softmax(-1).sum()
        assert torch.autograd.grad(total, (x, w), allow_unused=True) == (None, None)


BATCHES = {
    "scores": lambda z, ids: chosen(z / 2, ids),
    "log_softmax": lambda z, ids: chosen(z.log_softmax(-1), ids),
    "part of the rows": lambda z, ids: chosen(z[:, 1:].log_softmax(-1), ids[:, 1:]),
    "row by row": lambda z, ids: by_rows(z, ids) + by_rows(z, ids.flip(1)),
    "topk": lambda z, ids: z.topk(3).values[..., 1],
    "divergence": lambda z, ids: -((z / 2).softmax(-1).detach() * z.log_softmax(-1)).sum(-1),
}


@pytest.mark.parametrize("name", BATCHES)
def test_gradients_in_batches(name):
    def gradients(make):
        x, w, ids = inputs()
        answers = BATCHES[name](make(x, w), ids).flatten()

        def one(gradient, batched=False):
            return torch.autograd.grad(answers, (x, w), gradient, retain_graph=True, is_grads_batched=batched)

        basis = torch.eye(len(answers))
        return *one(basis, batched=True), *torch.vmap(one)(basis), *one(basis.sum(0))

    torch.testing.assert_close(gradients(Model()), gradients(F.linear))


def _hook(logits, loss):
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
    loss.backward()
    return seen


def _retained(logits, loss):
    logits.retain_grad()
    loss.backward()
    return logits.grad


def _of_the_logits(logits, loss):
    return torch.autograd.grad(loss, [logits])


def _node(logits, loss):
    seen = []
    logits.grad_fn.register_prehook(lambda gradients: seen.append(gradients[0].clone()))
    loss.backward()
    return seen


def _twice(logits, loss):
    loss.backward(retain_graph=True)
    loss.backward()


def _once_too_often(logits, loss):
    loss.backward()
    loss.backward()


def _through_graph_task(logits, loss):
    torch.autograd.backward([loss, logits.mean()], [torch.ones(()), torch.ones(())])


@pytest.mark.parametrize(
    "read", (_hook, _retained, _of_the_logits, _node, _twice, _once_too_often, _through_graph_task)
)
@pytest.mark.parametrize("loss", ("gather", "in chunks", "divergence", "read too"))
def test_backward_is_that_of_eager(read, loss):
    losses = {
        "gather": lambda z, ids: chosen((z[:, 1:] / 2).log_softmax(-1), ids[:, 1:]).square().sum(),
        "in chunks": lambda z, ids: entropy_in_chunks(z).square().sum() + by_rows(z, ids).sum(),
        "divergence": lambda z, ids: F.kl_div(
            z.log_softmax(-1),
            z.detach().flip(0).log_softmax(-1)
            if type(z) is torch.Tensor
            else z.detach()[[1, 0]].log_softmax(-1),
            reduction="sum",
            log_target=True,
        ),
        "read too": lambda z, ids: (lp := chosen(z.log_softmax(-1), ids), z.square().sum() + lp.sum())[1],
    }
    outcomes = []
    for make in (Model(), F.linear):
        x, w, ids = inputs()
        logits = make(x, w)
        try:
            outcomes.append((read(logits, losses[loss](logits, ids)), x.grad, w.grad))
        except RuntimeError as error:
            outcomes.append(str(error)[:60])
    if isinstance(outcomes[1], str):
        assert outcomes[0] == outcomes[1]
    else:
        torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)


def test_a_hook_of_fsdp_waits_for_backward_without_the_gradient():
    def hook(gradient):
        seen.append(gradient)
        return gradient

    hook.__module__ = "torch.distributed.fsdp"
    model, (x, w, ids), seen = Model(), inputs(), []
    logits = model(x, w)
    logits.register_hook(hook)
    by_rows(logits, ids).sum().backward()
    assert seen == [None] and model.computed == 0
    torch.testing.assert_close(x.grad, torch.autograd.grad(by_rows(F.linear(x, w), ids).sum(), x)[0])


def test_a_gradient_of_the_gradient():
    found = []
    for make in (Model(), F.linear):
        x, w, ids = inputs()
        loss = by_rows(make(x, w) / 2, ids).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
        found.append((gradient.detach(), x.grad, w.grad))
    torch.testing.assert_close(*found)


def test_a_write_without_gradients_changes_the_values_and_not_the_gradients():
    found = []
    for make in (Model(), F.linear):
        x, w, ids = inputs()
        logits = make(x, w)
        with torch.no_grad():
            logits.mul_(3)
        scores = chosen(logits, ids)
        found.append((scores.detach(), *torch.autograd.grad(scores.sum(), (x, w))))
    torch.testing.assert_close(*found)


def test_a_leaf_of_its_own_has_its_gradient():
    found = []
    for make in (Model(), F.linear):
        x, w, ids = inputs()
        leaf = make(x, w).detach().requires_grad_()
        chosen(leaf.log_softmax(-1), ids).square().sum().backward()
        found.append((leaf.grad, x.grad, w.grad))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("frozen", ("x", "w"))
def test_frozen_operands_get_no_gradient(frozen):
    found = []
    for make in (Model(), F.linear):
        x, w, ids = inputs()
        {"x": x, "w": w}[frozen].requires_grad_(False)
        by_rows(make(x, w), ids).square().sum().backward()
        found.append((x.grad, w.grad))
    torch.testing.assert_close(*found)


def test_a_backward_that_failed_leaves_nothing_for_the_next():
    x, w, ids = inputs()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError

    logits = Model()(x, w)
    lp, z = by_rows(logits, ids), logits.logsumexp(-1)
    for _ in range(3):
        with pytest.raises(ArithmeticError):
            (lp.sum() + Fails.apply(z).sum()).backward(retain_graph=True)
    lp.sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(by_rows(F.linear(x, w), ids).sum(), x)[0])


def test_within_a_checkpoint():
    found = []
    for make in (Model(), F.linear):
        x, w, ids = inputs()
        logits = make(x, w)
        entropy = checkpoint(entropy_in_chunks, logits, use_reentrant=False)
        lp = checkpoint(by_logsumexp, logits, ids, use_reentrant=False)
        (entropy.square().sum() + lp.exp().sum()).backward()
        found.append((x.grad, w.grad))
        assert make is F.linear or make.computed == 0
    torch.testing.assert_close(*found)


# Weights that change -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_gradient", (True, False))
def test_after_an_optimizers_step_the_answers_are_those_from_before(has_gradient):
    x, w, ids = inputs()
    logits = Model()(x, w) if has_gradient else Model()(x.detach(), w.detach())
    expected = by_rows(F.linear(x, w), ids).detach()
    w.grad = torch.ones_like(w)
    torch.optim.AdamW([w], lr=0.5, fused=True).step()
    torch.testing.assert_close(by_rows(logits, ids).detach(), expected)


@pytest.mark.parametrize("write", (lambda w: w.data.mul_(2), lambda w: w.detach().mul_(2)))
@pytest.mark.parametrize("when", ("before a question", "before backward"))
def test_a_change_raises_an_error_with_advice(write, when):
    x, w, ids = inputs()
    logits = Model()(x, w)
    with pytest.raises(RuntimeError, match=r"logits .*\(48, 8\).* was changed .*; read them before"):
        if when == "before a question":
            write(w)
        loss = by_logsumexp(logits[:, 1:], ids[:, 1:]).sum()
        write(w)
        loss.backward()


def test_a_loss_that_lives_on_keeps_no_weights():
    x, w, ids = inputs()
    loss = by_rows(Model()(x, w), ids).sum()
    loss.backward()
    from liger_compile.runtime import optimizer_steps

    storage = w.untyped_storage()._cdata
    assert not any(storage in promise.storages() for promise in optimizer_steps.waiting())


def test_logits_without_gradients_keep_no_graph():
    x, w, ids = inputs()
    kept = Model()(hidden := x * 2, w).detach()[:, 1:]
    reference = weakref.ref(hidden)
    del hidden
    assert reference() is None
    torch.testing.assert_close(
        by_rows(kept, ids[:, 1:]), by_rows(F.linear(x * 2, w)[:, 1:], ids[:, 1:]).detach()
    )


# Around it ---------------------------------------------------------------------------------------------------


def test_another_compiled_function_takes_the_values():
    function = torch.compile(lambda z, ids: by_logsumexp(z, ids).sum(), backend="aot_eager")
    x, w, ids = inputs()
    logits = Model()(x, w)[:, 1:]
    got = torch.autograd.grad(function(logits, ids[:, 1:]), (x, w))
    torch.testing.assert_close(
        got, torch.autograd.grad(by_logsumexp(F.linear(x, w)[:, 1:], ids[:, 1:]).sum(), (x, w))
    )


def test_a_compiled_function_that_breaks_asks_too():
    def function(x, w, ids):
        logits = torch.compiler.disable(model)(x, w)
        torch._dynamo.graph_break()
        return by_logsumexp(logits, ids).sum()

    model, (x, w, ids) = Model(), inputs()
    got = torch.compile(function, backend="aot_eager")(x, w, ids)
    torch.testing.assert_close(got, by_logsumexp(F.linear(x, w), ids).sum())


def test_under_the_autocast_of_its_recipe():
    found = []
    for make in (Model(autocast=("cpu", torch.bfloat16)), F.linear):
        x, w, ids = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            logits = make(x, w)
        assert logits.dtype is torch.bfloat16
        loss = chosen(logits.float().log_softmax(-1), ids).square().sum()
        found.append((loss, *torch.autograd.grad(loss, (x, w))))
        assert make is F.linear or make.computed == 0
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


def test_steps_of_the_recipe_belong_to_the_scores():
    import operator

    model = Model([(operator.truediv, 2.0), (torch.tanh,), (operator.mul, 2.0), (wide,)])

    def question(z, ids):
        return chosen(z[:, 1:].log_softmax(-1), ids[:, 1:])

    def eager(x, w):
        return wide(2 * torch.tanh(F.linear(x, w) / 2))

    got = with_gradients(model, question, torch.bfloat16)
    assert model.computed == 0
    assert_as_exact(
        got, *(with_gradients(eager, question, dtype) for dtype in (torch.bfloat16, torch.float64))
    )


def test_logits_after_a_step_without_an_answer_are_computed():
    import operator

    def shifted(x, w):
        return F.linear(x, w) + 1.0

    model = Model([(operator.add, 1.0)])
    question = QUESTIONS["gather"]
    got = with_gradients(model, question, torch.float32)
    torch.testing.assert_close(got, with_gradients(shifted, question, torch.float32))
    assert model.computed > 0


def test_a_clone_is_computed():
    """People keep values by it, also from changes of the weights that nobody notices."""
    model, (x, w, _) = Model(), inputs()
    kept, expected = model(x, w).detach().clone(), F.linear(x, w).detach()
    w.data.mul_(2)
    torch.testing.assert_close(kept, expected)
    assert not isinstance(kept, LazyTensor) or not kept.is_waiting


def test_threads_ask_at_once():
    model, (x, w, ids) = Model(), inputs()
    logits, expected, wrong = model(x, w), by_rows(F.linear(x, w), ids), []

    def asks():
        for _ in range(5):
            got = by_rows(logits, ids)
            gradients = torch.autograd.grad(got.sum(), (x, w), retain_graph=True)
            if not torch.allclose(got, expected, atol=1e-5) or not torch.allclose(
                gradients[0], truth[0], atol=1e-4
            ):
                wrong.append(got)

    truth = torch.autograd.grad(expected.sum(), (x, w), retain_graph=True)
    threads = [threading.Thread(target=asks) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and model.computed == 0


ERRORS = {
    "target": lambda z, ids: F.cross_entropy(z.view(-1, V), ids.view(-1) + V),
    "index": lambda z, ids: z.log_softmax(-1).gather(-1, ids[..., None] - V),
    "sizes": lambda z, ids: F.cross_entropy(z.view(-1, V), ids.view(-1)[1:]),
    "dimensions": lambda z, ids: z.gather(-1, ids),
    "view": lambda z, ids: z.view(5, -1),
    "overlap": lambda z, ids: z[:1].detach().expand(3, T, V).div_(2),
    "dtype": lambda z, ids: z.log_softmax(-1).gather(-1, ids[..., None].float()),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_those_of_eager(name):
    x, w, ids = inputs()
    with pytest.raises((RuntimeError, IndexError, ValueError)) as expected:
        ERRORS[name](F.linear(x, w), ids)
    with pytest.raises(expected.type) as got:
        ERRORS[name](Model()(x, w), ids)
    assert str(got.value)[:40] == str(expected.value)[:40]
