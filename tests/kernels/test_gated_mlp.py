"""The kernels of gated_activation and gated_mlp, against eager and float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from liger_compile import functional as L
from liger_compile.ops.gated_mlp import gated_activation_backward, gated_mlp_backward

pytest.importorskip("triton")
from liger_compile.kernels import gated_mlp as kernels
from tests.helpers.kernels import (
    DTYPES,
    assert_alike,
    assert_compiled_alike,
    assert_no_worse_than_eager,
    assert_reference,
    leaf,
    randn,
)

ACTIVATIONS = {
    "silu": (F.silu, L.swiglu),
    "gelu": (F.gelu, L.geglu),
    "gelu_tanh": (
        lambda gate: F.gelu(gate, approximate="tanh"),
        lambda *inputs: L.geglu(*inputs, approximate="tanh"),
    ),
}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def assert_right(activation, gate, up, *down):
    """With the down projection if there is one. The gate is packed if up is None."""
    act, ours = ACTIVATIONS[activation]

    def product(gate, up):
        gate, up = gate.chunk(2, -1) if up is None else (gate, up)
        return act(gate) * up

    def eager(gate, *rest):
        up, *down = (None, *rest) if up_is_packed else rest
        return F.linear(product(gate, up), *down) if down else product(gate, up)

    def called(gate, *rest):
        return ours(gate, None, *rest) if up_is_packed else ours(gate, *rest)

    up_is_packed = up is None
    inputs = [leaf(t) for t in (gate, up, *down) if t is not None]
    assert_no_worse_than_eager(kernels, called, eager, inputs)


@by_activation
@by_dtype
@pytest.mark.parametrize("width", [1, 3, 40, 96, 1500])
def test_no_worse_than_eager(device, width, dtype, activation):
    gate, up = (randn(2, 3, width, device=device, dtype=dtype) for _ in range(2))
    weight, bias = randn(7, width, device=device, dtype=dtype), randn(7, device=device, dtype=dtype)
    assert_right(activation, gate, up)
    assert_right(activation, torch.cat((gate, up), -1), None)
    assert_right(activation, gate, up, weight, bias)
    assert_right(activation, torch.cat((gate, up), -1), None, weight)


@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (2, 0, 8), (70, 33), (3, 2, 5, 16), (64,)], ids=str)
def test_shapes(device, shape):
    gate, up = (randn(*shape, device=device) for _ in range(2))
    assert_right("silu", gate, up)
    assert_right("gelu", gate, up, randn(5, shape[-1], device=device))


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_that_differ(device, other):
    gate, up = randn(9, 96, device=device, dtype=torch.bfloat16), randn(9, 96, device=device)
    for inputs in ((gate, up.to(other)), (up.to(other), gate), (gate, up), (up, gate)):
        weight = randn(5, 96, device=device, dtype=torch.promote_types(*(t.dtype for t in inputs)))
        assert_right("silu", *inputs)
        assert_right("silu", *inputs, weight)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, :, :48],
        lambda t: t.transpose(0, 1)[..., :48],
        lambda t: t[..., ::2],
        lambda t: t[:, 1:3, 8:56],
        lambda t: t[:1, :, :48].expand(4, -1, -1),
    ],
    ids=["packed", "transposed", "gaps", "offset", "expanded"],
)
def test_inputs_of_any_strides(device, view):
    gate, up = (view(randn(4, 5, 96, device=device)) for _ in range(2))
    assert_right("silu", gate, up)
    assert_right("gelu_tanh", gate, up, randn(5, 48, device=device))
    assert_right("gelu", gate, None)


@by_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_of_any_size(device, dtype, activation):
    sizes = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 5.0, 10.0, 20.0, 80.0, 100.0, 1e4, 1e8, 1e12])
    gate = torch.cat((sizes, -sizes))[None].to(device, dtype)
    assert_right(activation, gate, torch.full_like(gate, 1.5))


@pytest.mark.parametrize("is_packed", [False, True])
def test_only_what_is_needed_is_made(device, is_packed):
    gate, up, dh = (randn(9, 40, device=device) for _ in range(3))
    weight, dy = randn(5, 40, device=device), randn(9, 5, device=device)
    inputs = (torch.cat((gate, up), -1), None) if is_packed else (gate, up)
    for backward, arguments, count in (
        (gated_activation_backward, (dh, *inputs, "silu"), 2),
        (gated_mlp_backward, (dy, *inputs, weight, "silu"), 4),
    ):
        full = backward(*arguments, *[True] * count)
        assert full[1].numel() == (0 if is_packed else 9 * 40)
        for needs in itertools.product((False, True), repeat=count):
            for is_needed, expected, found in zip(needs, full, backward(*arguments, *needs), strict=True):
                if is_needed:
                    assert_alike(found, expected)  # of other code, if not all is needed
                assert is_needed or found.numel() == 0


def test_h_takes_the_place_of_dh(device):
    gate, up, dh = (randn(9, 1500, device=device, dtype=torch.bfloat16) for _ in range(3))
    apart, together = ([torch.empty_like(gate) for _ in range(2)] for _ in range(2))
    h = torch.empty_like(gate)
    kernels.backward(dh, gate, up, *apart, h, "silu")
    kernels.backward(dh, gate, up, *together, dh, "silu")
    for expected, found in zip((*apart, h), (*together, dh), strict=True):
        assert torch.equal(found, expected)
    assert_alike(h, kernels.forward(gate, up, "silu"))


def test_what_the_kernels_do_not_take(device):
    inputs = [leaf(randn(2, 8, device=device, dtype=torch.float64)) for _ in range(2)]
    assert_reference(kernels, lambda gate, up: L.swiglu(gate, up), inputs)


@pytest.mark.gpu
@by_activation
@by_dtype
@pytest.mark.parametrize("width", [768, 1536, 3072, 8192, 11008, 14336, 27648])
def test_widths_of_models(device, width, dtype, activation):
    gate, up = (randn(300, width, device=device, dtype=dtype) for _ in range(2))
    weight = randn(64, width, device=device, dtype=dtype) * width**-0.5
    assert_right(activation, gate, up)
    assert_right(activation, torch.cat((gate, up), -1), None, weight)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(device):
    rows = 2**31 // 16384 + 300
    gate = torch.zeros(rows, 16384, dtype=torch.bfloat16, device=device)
    gate[-300:] = randn(300, 16384, device=device)
    dgate = torch.empty_like(gate)
    kernels.backward(gate, gate, gate, dgate, None, None, "silu")
    last = gate[-300:].clone()
    expected = torch.empty_like(last)
    kernels.backward(last, last, last, expected, None, None, "silu")
    assert torch.equal(dgate[-300:], expected)
    assert torch.equal(kernels.forward(gate, gate, "silu")[-300:], kernels.forward(last, last, "silu"))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_it_gives_the_same_numbers(device, mode):
    def both(packed, gate, up, weight):
        return L.geglu(packed, None, weight), L.swiglu(gate, up), L.swiglu(packed)

    packed, *halves = (
        leaf(randn(300, width, device=device, dtype=torch.bfloat16)) for width in (3000, 1500, 1500)
    )
    weight = leaf(randn(64, 1500, device=device, dtype=torch.bfloat16) * 0.03)
    assert_compiled_alike(both, [packed, *halves, weight], mode)
