"""The kernel of rotary, against eager and float64."""

from __future__ import annotations

import pytest
import torch

from liger_compile import functional as L
from tests.helpers.pairwise import parametrize
from tests.ops.cases import complex_, half, interleaved, interleaved_to_half

pytest.importorskip("triton")
from liger_compile.kernels import rotary as kernels
from tests.helpers.kernels import (
    DTYPES,
    assert_compiled_alike,
    assert_no_worse_than_eager,
    assert_reference,
    leaf,
    randn,
)

ROTATIONS = {rotation.__name__: rotation for rotation in (half, interleaved, interleaved_to_half)}
by_layout = pytest.mark.parametrize("layout", ROTATIONS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_right(layout, q, k, cos, sin, half_tables=False):
    def widened(table):
        if not half_tables:
            return table
        return table.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat((table, table), -1)

    def eager(*inputs):
        *heads, cos, sin = inputs
        cos, sin = widened(cos), widened(sin)
        turned = cos.shape[-1]
        rotated = tuple(
            torch.cat((ROTATIONS[layout](x[..., :turned], cos, sin), x[..., turned:]), -1) for x in heads
        )
        return rotated if k is not None else rotated[0]

    def ours(*inputs):
        *heads, cos, sin = inputs
        q, k = heads if len(heads) == 2 else (*heads, None)
        return L.rotary(q, k, cos, sin, layout=layout, half_tables=half_tables)

    inputs = [leaf(q), *([] if k is None else [leaf(k)]), cos, sin]
    assert_no_worse_than_eager(kernels, ours, eager, inputs)


def projected(batch, tokens, heads, channels, device, dtype=torch.float32):
    """(B, h, T, D) as a projection leaves it: the heads of a token side by side."""
    return randn(batch, tokens, heads, channels, device=device, dtype=dtype).transpose(1, 2)


def tables(*shape, device, dtype=torch.float32):
    return [randn(*shape, device=device, dtype=dtype) for _ in range(2)]


@parametrize(
    layout=[*ROTATIONS],
    dtype=DTYPES,
    half_tables=[False, True],
    sizes=[(2, 2), (16, 16), (48, 48), (80, 32), (40, 10)],
)
def test_no_worse_than_eager(device, sizes, half_tables, dtype, layout):
    channels, turned = sizes
    q, k = (projected(1, 5, heads, channels, device, dtype) for heads in (3, 1))
    width = turned // 2 if half_tables else turned
    assert_right(layout, q, k, *tables(5, width, device=device, dtype=dtype), half_tables)


@pytest.mark.parametrize(
    "q_shape, k_shape, table_shape",
    [
        ((1, 1, 1, 2), None, (1, 2)),
        ((2, 3, 150, 16), (2, 1, 150, 16), (2, 1, 150, 16)),  # tables for every sequence
        ((2, 4, 5, 16), (2, 4, 5, 16), (1, 1, 5, 16)),
        ((2, 5, 4, 16), (2, 5, 2, 16), (5, 1, 16)),  # tokens before heads
        ((2, 5, 4, 16), (2, 5, 2, 16), (2, 5, 1, 16)),
        ((2, 4, 5, 16), (2, 4, 1, 16), (1, 1, 1, 16)),  # different tokens, the same angle
        ((2, 4, 5, 16), (1, 2, 5, 16), (5, 16)),  # different batches
        ((2, 4, 1, 16), (2, 2, 1, 16), (2, 1, 1, 16)),  # one token
        ((4, 5, 16), (2, 5, 16), (5, 16)),
        ((5, 4, 16), (5, 2, 16), (5, 1, 16)),
        ((5, 16), None, (5, 16)),
        ((16,), None, (16,)),
        ((2, 4, 0, 16), (2, 2, 0, 16), (0, 16)),
        ((0, 4, 5, 16), (0, 2, 5, 16), (5, 16)),
    ],
    ids=str,
)
def test_shapes(device, q_shape, k_shape, table_shape):
    q, k = randn(*q_shape, device=device), None if k_shape is None else randn(*k_shape, device=device)
    assert_right("half", q, k, *tables(*table_shape, device=device))


@by_layout
def test_inputs_of_any_strides(device, layout):
    packed = randn(2, 5, 8, 32, device=device).transpose(1, 2)
    cos, sin = tables(2, 5, 64, device=device)
    for view in (
        lambda t: t[:, :, :, :16],
        lambda t: t[..., ::2],
        lambda t: t[:, :, ::2, 8:24].expand(2, -1, -1, -1),
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    ):
        q, k = view(packed[:, :4]), view(packed[:, 4:6])
        count, turned = q.shape[-2:]
        narrow = (table[:, None, :count, : 4 * turned : 4][..., :turned] for table in (cos, sin))
        assert_right(layout, q, k, *narrow)


def test_results_have_the_order_of_dimensions_of_the_inputs(device):
    q, k = randn(2, 5, 6 * 16, device=device).view(2, 5, 6, 16).transpose(1, 2).split((4, 2), 1)
    cos, sin = tables(5, 16, device=device)
    rotated_q, rotated_k = L.rotary(q, k, cos, sin)
    assert rotated_q.stride() == (320, 16, 64, 1) and rotated_k.stride() == (160, 16, 32, 1)


@by_dtype
def test_complex_tables(device, dtype):
    q, k = (randn(2, 5, heads, 16, device=device, dtype=dtype) for heads in (4, 2))
    freqs = torch.polar(randn(5, 8, device=device), randn(5, 8, device=device))[:, None]
    assert_no_worse_than_eager(
        kernels,
        L.rotary_complex,
        lambda q, k, freqs: (complex_(q, freqs), complex_(k, freqs)),
        [leaf(q), leaf(k), freqs],
    )


@by_dtype
def test_tables_of_another_dtype(device, dtype):
    q = projected(1, 5, 2, 16, device, dtype)
    for table_dtype in DTYPES:
        cos, sin = tables(5, 16, device=device, dtype=table_dtype)
        assert_right("half", q, None, cos, sin)
        assert_right("half", q, projected(1, 5, 1, 16, device), cos, sin)  # of float32
        for out_dtype in DTYPES:
            assert_no_worse_than_eager(
                kernels,
                lambda q, cos, sin, to=out_dtype: L.rotary(q, None, cos, sin, out_dtype=to),
                lambda q, cos, sin, to=out_dtype: half(q.float(), cos.float(), sin.float()).to(to),
                [leaf(q), cos, sin],
            )


def test_only_what_is_needed_is_made(device):
    cos, sin = tables(5, 16, device=device)
    q, k = (projected(2, 5, heads, 16, device) for heads in (4, 2))
    for only in (0, 1):
        inputs = [leaf(q), leaf(k)]
        inputs[1 - only].requires_grad_(False)
        upstream = [randn(*x.shape, device=device) for x in inputs]
        (found,) = torch.autograd.grad(L.rotary(*inputs, cos, sin), [inputs[only]], upstream)
        both = [leaf(q), leaf(k)]
        expected = torch.autograd.grad(L.rotary(*both, cos, sin), both, upstream)[only]
        torch.testing.assert_close(found, expected)


def test_what_the_kernel_does_not_take(device):
    q = leaf(randn(2, 4, 5, 16, device=device))
    per_head = tables(4, 5, 16, device=device)
    assert_reference(kernels, lambda q: L.rotary(q, None, *per_head), [q])
    five = leaf(randn(2, 2, 4, 5, 16, device=device))
    assert_reference(kernels, lambda q: L.rotary(q, None, *tables(5, 16, device=device)), [five])
    double = tables(5, 16, device=device, dtype=torch.float64)
    assert_reference(kernels, lambda q: L.rotary(q, None, *double), [q])


@pytest.mark.gpu
@by_layout
@by_dtype
@pytest.mark.parametrize(
    "channels, turned", [(64, 64), (96, 96), (128, 128), (128, 32), (80, 32), (256, 256)]
)
@pytest.mark.parametrize("num_heads", [(32, 8), (14, 2), (8, 1)])
def test_heads_of_models(device, num_heads, channels, turned, dtype, layout):
    q, k = (projected(2, 500, heads, channels, device, dtype) for heads in num_heads)
    assert_right(layout, q, k, *tables(1, 1, 500, turned, device=device, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("is_token_first", [False, True])
def test_more_elements_than_32_bits_count(device, is_token_first):
    tokens = 2**31 // (32 * 128) + 300
    q = torch.zeros(1, tokens, 32, 128, dtype=torch.bfloat16, device=device)
    q[:, -300:] = randn(1, 300, 32, 128, device=device)
    q = q.transpose(1, 2)
    cos, sin = tables(tokens, 128, device=device, dtype=torch.bfloat16)
    if is_token_first:
        q, cos, sin = q.transpose(1, 2), cos[:, None], sin[:, None]
        last = [q[:, -300:], cos[-300:], sin[-300:]]
    else:
        q = q.contiguous()
        last = [q[:, :, -300:], cos[-300:], sin[-300:]]
    rotated = L.rotary(q, None, cos, sin)
    expected = L.rotary(last[0], None, *last[1:])
    assert torch.equal(rotated[:, -300:] if is_token_first else rotated[:, :, -300:], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_it_gives_the_same_numbers(device, mode):
    def rotated(packed, cos, sin):
        q, k = packed.view(2, 300, 10, 64).transpose(1, 2).split((8, 2), 1)
        return L.rotary(q, k, cos, sin)

    packed = leaf(randn(2, 300, 640, device=device, dtype=torch.bfloat16))
    cos, sin = tables(1, 1, 300, 64, device=device, dtype=torch.bfloat16)
    assert_compiled_alike(rotated, [packed, cos, sin], mode)


def test_inputs_that_overlap_themselves(device):
    windows = randn(20, device=device).unfold(0, 16, 1)  # strides 1 and 1
    for q in (windows[:, None], windows[:, None].expand(-1, 3, -1)):
        assert_right("half", q, q.flip(0), *tables(5, 1, 16, device=device))


@by_layout
@pytest.mark.parametrize("tokens, heads, ahead", [(1, 1, 1), (4, 4, 1), (2, 4, 3), (8, 8, 8)])
def test_any_tile(device, monkeypatch, layout, tokens, heads, ahead):
    """Whatever `config` chooses: tokens and heads that a tile has and the tensors have not, and the other way round."""
    q, k = (projected(1, 3, count, 40, device) for count in (5, 1))
    monkeypatch.setattr(kernels, "config", lambda *_: kernels.Config(tokens, heads, ahead, 8, 32, 4))
    assert_right(layout, q, k, *tables(3, 10, device=device))
