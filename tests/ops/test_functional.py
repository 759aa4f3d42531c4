"""Functions of liger_compile.functional that are plain PyTorch, and log-probabilities."""

import pytest
import torch
import torch.nn.functional as F

from liger_compile import functional as L
from liger_compile.testing import precision
from tests.helpers.gradients import gradients_of


@pytest.mark.parametrize(
    ("ours", "activation"),
    [
        (L.swiglu, F.silu),
        (L.geglu, F.gelu),
        (lambda *x: L.geglu(*x, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_gates_are_the_plain_expression(ours, activation):
    gate, up = torch.randn(3, 4, 6).bfloat16(), torch.randn(3, 4, 6)
    expected = activation(gate) * up
    assert torch.equal(ours(gate, up), expected) and expected.dtype == torch.float32
    torch.testing.assert_close(ours(torch.cat((up, up + 1), -1)), activation(up) * (up + 1))


def test_a_packed_gate_of_odd_size_is_refused():
    with pytest.raises(
        ValueError, match="swiglu: expected an even last dimension of gate without up, got 5; pass up"
    ):
        L.swiglu(torch.randn(2, 5))


def log_probabilities(x, weight, target, bias, scale=1.0, softcap=None):
    """linear_log_probability in plain PyTorch, with the entropies."""
    z = F.linear(x, weight, bias).float() * scale
    logp = (softcap * torch.tanh(z / softcap) if softcap else z).log_softmax(-1)
    is_ignored = target == -100
    picked = logp.gather(-1, target.masked_fill(is_ignored, 0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(is_ignored, 0), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", [{}, {"logit_scale": 0.7, "softcap": 3.0}], ids=str)
def test_log_probabilities_and_entropies(dtype, form):
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 5, 8), (33, 8), (33,))]
    target = torch.randint(33, (2, 5))
    target[0, 1] = -100

    def ours(x, weight, bias):
        return L.linear_log_probability(x, weight, target, bias, with_entropy=True, memory=1, **form)

    def eager(x, weight, bias):
        found = log_probabilities(x, weight, target, bias, form.get("logit_scale", 1.0), form.get("softcap"))
        return tuple(value.to(torch.promote_types(dtype, torch.float32)) for value in found)

    with precision.in_double():
        exact = gradients_of(eager, *precision.as_double(leaves))
    precision.assert_no_worse(gradients_of(ours, *leaves), gradients_of(eager, *leaves), exact)
    alone = L.linear_log_probability(leaves[0], leaves[1], target, leaves[2], **form)
    torch.testing.assert_close(alone, ours(*leaves)[0])
    assert alone.dtype == torch.promote_types(dtype, torch.float32) and alone[0, 1] == 0


def test_a_log_probability_of_flattened_rows():
    x, weight, target = torch.randn(6, 8), torch.randn(33, 8), torch.randint(33, (2, 3))
    found = L.linear_log_probability(x, weight, target)
    torch.testing.assert_close(found, log_probabilities(x.view(2, 3, 8), weight, target, None)[0])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"weight": torch.zeros(33, 7)},
            ValueError,
            r"expected a weight of shape \(outputs, 8\), got \(33, 7\)",
        ),
        ({"weight": torch.zeros(33, 8).half()}, TypeError, "expected x, weight and bias of one dtype"),
        ({"target": torch.zeros(2, 3)}, TypeError, "expected class indices in int64 as target"),
        ({"target": torch.zeros(2, 4).long()}, ValueError, "expected one target for each row of x"),
        ({"target": torch.full((2, 3), 33)}, RuntimeError, "out of bounds"),
        ({"softcap": -1.0}, ValueError, "expected softcap above 0, got -1.0"),
        ({"memory": 0}, ValueError, "expected memory as a whole number of bytes above 0, got 0"),
    ],
)
def test_what_linear_log_probability_refuses(change, error, message):
    arguments = {"x": torch.randn(2, 3, 8), "weight": torch.randn(33, 8), "target": torch.zeros(2, 3).long()}
    with pytest.raises(error, match=message):
        L.linear_log_probability(**{**arguments, **change})
