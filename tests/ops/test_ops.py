"""What holds for every op: numbers, gradients, registration, compilation."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from liger_compile import functional as L
from liger_compile.testing import precision
from tests.ops.cases import CASES, ONE_OF_EACH_OP, outputs_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
by_name = pytest.mark.parametrize("case", CASES, ids=str)
one_of_each = pytest.mark.parametrize("case", ONE_OF_EACH_OP, ids=str)


def leaves(inputs):
    return [t for t in inputs if t.requires_grad]


def assert_no_worse_than_eager(case, *draws):
    """Outputs and gradients, against float64: at most twice the error of eager in the same dtype.

    Over all draws of inputs together: of few numbers, eager gets some right by luck.
    """
    results = []
    for inputs in draws:
        doubles = precision.as_double(inputs)
        with precision.in_double():
            exact = case.eager(*doubles)
        ours, eager = case.ours(*inputs), case.eager(*inputs)
        # Together, for a loss in float32 that comes of logits in half precision has the error of those.
        results.append(
            [
                (out, precision.gradients(out, leaves(of)))
                for out, of in ((ours, inputs), (eager, inputs), (exact, doubles))
            ]
        )
    precision.assert_no_worse(
        *(tree_map(lambda *each: torch.stack(each), *of) for of in zip(*results, strict=True))
    )


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_no_worse_than_eager(case, dtype):
    assert_no_worse_than_eager(case, case.made(dtype, 3, 40))


@by_name
def test_gradients_are_those_of_the_function(case):
    inputs = case.made(torch.float64, 2, 3)
    inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    # In one random direction of inputs and results: entry by entry, a head takes a thousand calls and more.
    assert torch.autograd.gradcheck(case.ours, inputs, fast_mode=True)


@one_of_each
@pytest.mark.parametrize("batch, tokens", [(1, 1), (1, 7), (2, 0)])
def test_one_row_and_none(case, batch, tokens):
    assert_no_worse_than_eager(case, *(case.made(torch.float32, batch, tokens, seed) for seed in range(8)))


def scattered(tensor):
    """The same numbers with gaps between them, in memory of the opposite order of dimensions."""
    order = list(reversed(range(tensor.dim())))
    spread = torch.empty([2 * size for size in tensor.permute(order).shape], dtype=tensor.dtype).permute(
        order
    )
    spread = spread[tuple(slice(None, None, 2) for _ in order)]
    return spread.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


@one_of_each
def test_inputs_of_any_strides(case):
    inputs = [scattered(t) for t in case.made(torch.bfloat16)]
    assert not inputs[0].is_contiguous()
    assert_no_worse_than_eager(case, inputs)


@one_of_each
def test_incoming_gradients_of_stride_zero_and_absent_ones(case):
    for only in range(len(outputs_of(case.ours(*case.made(torch.float32))))):
        inputs = case.made(torch.float32)
        found = torch.autograd.grad(
            outputs_of(case.ours(*inputs))[only].sum(), leaves(inputs), allow_unused=True
        )
        expected = torch.autograd.grad(
            outputs_of(case.eager(*inputs))[only].sum(), leaves(inputs), allow_unused=True
        )
        for ours, eager in zip(found, expected, strict=True):
            assert (ours is None) == (eager is None)
            if eager is not None:
                torch.testing.assert_close(ours, eager)


@one_of_each
def test_every_subset_of_inputs_can_be_frozen(case):
    inputs = case.made(torch.float32)
    wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
    full = dict(zip(wanted, precision.gradients(case.ours(*inputs), leaves(inputs)), strict=True))
    for subset in range(1, 2 ** len(wanted)):
        live = [i for at, i in enumerate(wanted) if subset >> at & 1]
        some = [t.detach().requires_grad_(i in live) for i, t in enumerate(inputs)]
        grads = precision.gradients(case.ours(*some), leaves(some))
        for i, grad in zip(live, grads, strict=True):
            torch.testing.assert_close(grad, full[i])


@one_of_each
def test_a_retained_graph_gives_the_same_gradients_again(case):
    inputs = case.made(torch.bfloat16)
    roots = [out.float().square().sum() for out in outputs_of(case.ours(*inputs))]
    runs = [torch.autograd.grad(roots, leaves(inputs), retain_graph=True) for _ in range(2)]
    runs.append(torch.autograd.grad(roots, leaves(inputs)))
    kept = [g.clone() for g in runs[0]]
    for again in runs[1:]:
        for first, other in zip(kept, again, strict=True):
            assert torch.equal(first, other)
    assert all(torch.equal(a, b) for a, b in zip(kept, runs[0], strict=True))  # not written to since


@by_name
def test_results_may_be_written_in_place(case):
    """To autograd they are tensors of their own, also where they are made as views."""
    inputs = case.made(torch.float32)
    *_, last = outputs_of(case.ours(*inputs))
    expected = torch.autograd.grad(3 * last.square().sum(), leaves(inputs), allow_unused=True)
    *_, last = outputs_of(case.ours(*inputs))
    found = torch.autograd.grad(last.mul_(2).square().sum() * 0.75, leaves(inputs), allow_unused=True)
    torch.testing.assert_close(found, expected)


@one_of_each
def test_accumulating_over_a_retained_graph(case):
    inputs = case.made(torch.float32)
    root = sum(out.square().sum() for out in outputs_of(case.ours(*inputs)))
    expected = [3 * g for g in torch.autograd.grad(root, leaves(inputs), retain_graph=True)]
    root.backward(retain_graph=True)
    root.backward(retain_graph=True)
    root.backward()
    for leaf, grad in zip(leaves(inputs), expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


@one_of_each
def test_without_gradients_the_values_are_the_same(case):
    inputs = case.made(torch.bfloat16)
    expected = outputs_of(case.ours(*inputs))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for ours, value in zip(outputs_of(case.ours(*inputs)), expected, strict=True):
                assert torch.equal(ours, value) and not ours.requires_grad


@one_of_each
def test_autocast_changes_nothing(case):
    inputs = case.made(torch.float32)
    expected = outputs_of(case.ours(*inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = outputs_of(case.ours(*inputs))
        grads = precision.gradients(result, leaves(inputs))
    assert all(torch.equal(ours, value) for ours, value in zip(result, expected, strict=True))
    for ours, value in zip(grads, precision.gradients(expected, leaves(inputs)), strict=True):
        assert torch.equal(ours, value)


@one_of_each
def test_a_second_derivative_is_refused(case):
    inputs = case.made(torch.float32)
    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        roots = [out.square().sum() for out in outputs_of(case.ours(*inputs))]
        grads = torch.autograd.grad(sum(roots), leaves(inputs), create_graph=True)
        sum(g.sum() for g in grads).backward()


class Recorder(TorchDispatchMode):
    """The calls of our ops, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "liger_compile":
            self.calls[func] = tree_map(
                lambda t: (
                    t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
                ),
                args,
            )
        return func(*args, **(kwargs or {}))


@one_of_each
def test_opcheck(case):
    inputs = case.made(torch.float32)
    recorder = Recorder()
    with recorder:
        precision.gradients(case.ours(*inputs), leaves(inputs))
    # Forward and backward; gradients that forward has made; statistics that are an op of their own.
    assert len(recorder.calls) == {
        "linear_cross_entropy.all_weighted": 1,
        "pre_norm.gemma": 3,
        "adapter": 4,
    }.get(case.name, 2)
    for op, args in recorder.calls.items():
        if op._opname.endswith("_backward"):  # it is not to be differentiated
            args = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, args)
        torch.library.opcheck(op, args)


def everything(x, weight, q, k, cos, sin, head, target):
    y = L.rms_norm(L.pre_norm(x, weight), weight, 1e-5, offset=1.0, casting="gemma")
    q, k = L.rotary(q, k, cos, sin)
    loss = L.linear_cross_entropy(y, head, target) + L.cross_entropy(
        x @ head.t(), target, label_smoothing=0.1
    )
    tokens = L.linear_cross_entropy(x, head, target.flatten(), reduction="none")
    return loss + tokens.mean(), q.sum() + k.square().sum()


def everything_inputs(tokens):
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    target = torch.randint(0, 50, (2, tokens), generator=generator)
    target[:, 0] = -100
    tables = [randn(tokens, 8).detach(), randn(tokens, 8).detach()]
    heads = [randn(2, 4, tokens, 8), randn(2, 2, tokens, 8)]
    return [randn(2, tokens, 16), randn(16), *heads, *tables, randn(50, 16), target]


def test_compiled_in_one_graph_for_any_size():
    """By Inductor, which takes every step that the other backends take."""
    torch._dynamo.reset()
    graphs = []
    compiler = torch._dynamo.lookup_backend("inductor")

    def counting(gm, example_inputs):
        graphs.append(gm)
        return compiler(gm, example_inputs)

    compiled = torch.compile(everything, backend=counting, fullgraph=True, dynamic=True)
    counts = []
    for tokens in (5, 7):
        inputs = everything_inputs(tokens)
        result, expected = compiled(*inputs), everything(*inputs)
        torch.testing.assert_close(result, expected)
        grads = [torch.autograd.grad(sum(out), leaves(inputs)) for out in (result, expected)]
        torch.testing.assert_close(*grads)
        counts.append(len(graphs))
    assert counts[0] == counts[1]
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), expected)


def test_compiled_backward_of_a_retained_graph():
    """AOTAutograd allows it where it donates no buffers; it is no different for code without our ops."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        inputs = everything_inputs(5)
        root = sum(torch.compile(everything, backend="aot_eager")(*inputs))
        first, second = (torch.autograd.grad(root, leaves(inputs), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-5

    def forward(self, x):
        return L.rms_norm(x, None, self.eps)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_number_that_dynamo_makes_symbolic(backend):
    torch._dynamo.reset()
    norm, x = Norm(), torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(norm, backend=backend, fullgraph=True, dynamic=True)
    for eps in (1e-5, 1e-1):
        norm.eps = eps
        torch.testing.assert_close(compiled(x), norm(x))
        compiled(x).sum().backward()


SAVED = {
    "rms_norm.llama": ["x", "weight", "rstd"],
    "pre_norm.gemma": ["x", "rstd", "weight"],
    "rotary.interleaved_partial": ["cos", "sin"],
    "norm_rotary.llama": ["q", "k", "q_weight", "k_weight", "cos", "sin"],
    "cross_entropy.all_weighted": ["logits", "target", "class_weight", "row_max", "log_sum"],
}


@pytest.mark.parametrize("case", [case for case in ONE_OF_EACH_OP if case.name in SAVED], ids=str)
def test_only_inputs_and_statistics_are_saved(case):
    inputs = case.made(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.ours(*inputs)
    for name, tensor in zip(SAVED[case.name], saved, strict=True):
        if name in ("rstd", "row_max", "log_sum"):
            assert tensor.dtype == torch.float32 and tensor.numel() == 15
        elif name not in ("target", "class_weight"):
            assert any(tensor.data_ptr() == t.data_ptr() and tensor.shape[-1] == t.shape[-1] for t in inputs)
