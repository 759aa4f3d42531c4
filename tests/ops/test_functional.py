"""Functions of liger_compile.functional that are plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from liger_compile import functional as L


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
