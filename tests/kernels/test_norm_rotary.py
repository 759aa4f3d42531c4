"""The kernels of norm_rotary, against eager and float64."""

from __future__ import annotations

import pytest
import torch

from liger_compile import functional as L
from liger_compile.ops.rotary import MAX_CHANNELS
from liger_compile.testing import precision
from tests.helpers.pairwise import parametrize
from tests.ops.cases import EPS, gemma, llama, norm_rotary

pytest.importorskip("triton")
from liger_compile.kernels import norm_rotary as kernels
from tests.helpers.kernels import (
    DTYPES,
    assert_alike,
    assert_compiled_alike,
    assert_no_worse_than_eager,
    assert_reference,
    leaf,
    randn,
)

SPELLINGS = {"llama": (llama, {"casting": "llama"}), "gemma": (gemma, {"offset": 1.0, "casting": "gemma"})}
by_spelling = pytest.mark.parametrize("spelling", SPELLINGS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_right(spelling, q, k, q_weight, k_weight, cos, sin):
    norm, options = SPELLINGS[spelling]
    eager = norm_rotary(norm)
    inputs = [leaf(t) for t in (q, k, q_weight, k_weight) if t is not None]

    def placed(tensors):
        """With None for the weights that are not there."""
        given = iter(tensors)
        return [None if t is None else next(given) for t in (q, k, q_weight, k_weight, cos, sin)]

    assert_no_worse_than_eager(
        kernels,
        lambda *tensors: L.norm_rotary(*placed(tensors), EPS, **options),
        lambda *tensors: eager(*placed(tensors)),
        [*inputs, cos, sin],
    )


def projected(batch, tokens, heads, channels, device, dtype=torch.float32):
    """(B, h, T, D) as a projection leaves it: the heads of a token side by side."""
    return randn(batch, tokens, heads, channels, device=device, dtype=dtype).transpose(1, 2)


def pair(*shape, device, dtype=torch.float32):
    return [randn(*shape, device=device, dtype=dtype) for _ in range(2)]


@parametrize(spelling=[*SPELLINGS], dtype=DTYPES, channels=[2, 6, 16, 48, 80, 256])
def test_no_worse_than_eager(device, channels, dtype, spelling):
    q, k = (projected(1, 5, heads, channels, device, dtype) for heads in (9, 3))
    weights = pair(channels, device=device, dtype=dtype)
    assert_right(spelling, q, k, *weights, *pair(5, channels, device=device, dtype=dtype))


@by_dtype
@pytest.mark.parametrize("absent", [(0,), (1,), (0, 1)])
def test_without_weights(device, dtype, absent):
    q, k = (projected(1, 5, heads, 16, device, dtype) for heads in (4, 2))
    weights = pair(16, device=device, dtype=dtype)
    for at in absent:
        weights[at] = None
    assert_right("llama", q, k, *weights, *pair(5, 16, device=device, dtype=dtype))


@pytest.mark.parametrize(
    "q_shape, k_shape, table_shape",
    [
        ((1, 1, 1, 2), (1, 1, 1, 2), (1, 2)),
        ((2, 5, 70, 16), (2, 1, 70, 16), (2, 1, 70, 16)),  # tables for every sequence
        ((2, 2, 5, 16), (2, 8, 5, 16), (1, 1, 5, 16)),  # more heads of k
        ((2, 5, 4, 16), (2, 5, 2, 16), (5, 1, 16)),  # tokens before heads
        ((2, 5, 4, 16), (2, 5, 2, 16), (2, 5, 1, 16)),
        ((2, 4, 5, 16), (2, 2, 5, 16), (1, 1, 1, 16)),  # the same angle for all tokens
        ((2, 4, 1, 16), (2, 2, 1, 16), (2, 1, 1, 16)),  # one token
        ((4, 5, 16), (2, 5, 16), (5, 16)),
        ((5, 4, 16), (5, 2, 16), (5, 1, 16)),
        ((5, 16), (5, 16), (5, 16)),
        ((16,), (16,), (16,)),
        ((2, 4, 0, 16), (2, 2, 0, 16), (0, 16)),
        ((0, 4, 5, 16), (0, 2, 5, 16), (5, 16)),
    ],
    ids=str,
)
def test_shapes(device, q_shape, k_shape, table_shape):
    q, k = randn(*q_shape, device=device), randn(*k_shape, device=device)
    width = q_shape[-1]
    assert_right("gemma", q, k, *pair(width, device=device), *pair(*table_shape, device=device))


def test_inputs_of_any_strides(device):
    packed = randn(2, 5, 8, 32, device=device).transpose(1, 2)
    cos, sin = pair(2, 5, 64, device=device)
    weights = [weight[::2] for weight in pair(64, device=device)]
    for view in (
        lambda t: t[:, :, :, :16],
        lambda t: t[..., ::2],
        lambda t: t[:, :, ::2, 8:24].expand(2, -1, -1, -1),
        lambda t: t[:, :1].expand(-1, 3, -1, -1),
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    ):
        q, k = view(packed[:, :4]), view(packed[:, 4:6])
        count, width = q.shape[-2:]
        tables = (table[:, None, :count, : 2 * width : 2] for table in (cos, sin))
        assert_right("llama", q, k, *(weight[:width] for weight in weights), *tables)


def test_inputs_that_overlap_themselves(device):
    windows = randn(20, device=device).unfold(0, 16, 1)  # strides 1 and 1
    for q in (windows[:, None], windows[:, None].expand(-1, 3, -1)):
        weights, tables = pair(16, device=device), pair(5, 1, 16, device=device)
        assert_right("llama", q, q.flip(0), *weights, *tables)


def test_incoming_gradients_of_any_strides(device):
    q, k = (leaf(projected(2, 5, heads, 16, device)) for heads in (4, 2))
    weights = [leaf(weight) for weight in pair(16, device=device)]
    cos, sin = pair(5, 16, device=device)

    def turned(op):
        def function(*inputs):
            q, k = op(*inputs)
            return q.transpose(1, 3).contiguous(), k.sum(1).expand(3, 2, 5, 16)

        return function

    ours = lambda *inputs: L.norm_rotary(*inputs, EPS)  # noqa: E731
    assert_no_worse_than_eager(kernels, turned(ours), turned(norm_rotary(llama)), [q, k, *weights, cos, sin])


def test_results_have_the_order_of_dimensions_of_the_inputs(device):
    packed = leaf(randn(2, 5, 6 * 16, device=device))
    q, k = packed.view(2, 5, 6, 16).transpose(1, 2).split((4, 2), 1)
    weights, tables = pair(16, device=device), pair(5, 16, device=device)
    rotated_q, rotated_k = L.norm_rotary(q, k, *weights, *tables)
    assert rotated_q.stride() == (320, 16, 64, 1) and rotated_k.stride() == (160, 16, 32, 1)
    dq, dk = torch.autograd.grad((rotated_q, rotated_k), (q, k), (rotated_q, rotated_k))
    assert dq.stride() == (320, 16, 64, 1) and dk.stride() == (160, 16, 32, 1)


@pytest.mark.parametrize(
    "q_dtype, k_dtype, weight_dtype, table_dtype",
    [
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16, torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@by_spelling
def test_dtypes_that_differ(device, spelling, q_dtype, k_dtype, weight_dtype, table_dtype):
    q, k = projected(1, 13, 4, 16, device, q_dtype), projected(1, 13, 2, 16, device, k_dtype)
    weights, tables = (
        pair(16, device=device, dtype=weight_dtype),
        pair(13, 16, device=device, dtype=table_dtype),
    )
    assert_right(spelling, q, k, *weights, *tables)
    assert_right(spelling, q, k, weights[0], weights[1].float(), *tables)


@by_spelling
def test_it_rounds_where_a_norm_and_a_rotation_do(device, spelling):
    options = SPELLINGS[spelling][1]
    for dtype, weight_dtype in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        q, k = (projected(2, 40, heads, 16, device, dtype) for heads in (4, 2))
        weights = pair(16, device=device, dtype=weight_dtype)
        tables = pair(40, 16, device=device, dtype=dtype)
        normed = (L.rms_norm(x, weight, EPS, **options) for x, weight in zip((q, k), weights, strict=True))
        expected = L.rotary(*normed, *tables)
        for found, one in zip(L.norm_rotary(q, k, *weights, *tables, EPS, **options), expected, strict=True):
            if found.dtype == torch.float32:  # not rounded after the rotation, which may have been contracted
                torch.testing.assert_close(found, one)
            else:  # The mean of squares is a sum in another order: what is rounded otherwise for that is rare.
                assert (found != one).float().mean() < 0.01


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1), (2, 3)], ids=str)
def test_only_what_is_needed_is_made(device, needed):
    q, k = (projected(1, 5, heads, 16, device) for heads in (4, 2))
    inputs = [q, k, *pair(16, device=device)]
    tables = pair(5, 16, device=device)
    upstream = [randn(*x.shape, device=device) for x in (q, k)]

    def gradients(positions):
        given = [x.detach().requires_grad_(at in positions) for at, x in enumerate(inputs)]
        results = L.norm_rotary(*given, *tables)
        of = [at for at in range(2) if results[at].requires_grad]
        live = [given[at] for at in positions]
        return torch.autograd.grad([results[at] for at in of], live, [upstream[at] for at in of])

    both = gradients(range(4))
    for found, at in zip(gradients(needed), needed, strict=True):
        torch.testing.assert_close(found, both[at])


def test_a_result_that_nobody_reads(device):
    q, k = (projected(2, 5, heads, 16, device) for heads in (4, 2))
    inputs, tables = [q, k, *pair(16, device=device)], pair(5, 16, device=device)
    for read in range(2):
        given = [leaf(x) for x in inputs]
        rotated = L.norm_rotary(*given, *tables)[read]
        found = torch.autograd.grad(rotated.square().sum(), given, allow_unused=True)
        expected = norm_rotary(llama)(*given, *tables)[read]
        expected = torch.autograd.grad(expected.square().sum(), given, allow_unused=True)
        assert [each is None for each in found] == [each is None for each in expected]
        assert [each is None for each in found] == [at % 2 != read for at in range(4)]


def test_the_same_numbers_every_time(device):
    q, k = (projected(2, 90, heads, 16, device, torch.bfloat16) for heads in (4, 2))
    tensors = [q, k, *pair(16, device=device), *pair(90, 16, device=device)]
    first, second = (
        kernels.backward(q, k, *tensors, EPS, 0.0, True, True, torch.float32, 1) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_the_kernels_do_not_take(device):
    q, k = (leaf(randn(2, heads, 5, 16, device=device)) for heads in (4, 2))
    weights = pair(16, device=device)

    def ours(*tables):
        return lambda q, k: L.norm_rotary(q, k, *weights, *tables)

    assert_reference(kernels, ours(*pair(5, 16, device=device, dtype=torch.float64)), [q, k])
    per_head = leaf(randn(2, 4, 5, 16, device=device))
    assert_reference(kernels, ours(*pair(4, 5, 16, device=device)), [q, per_head])
    one_sequence = leaf(randn(1, 2, 5, 16, device=device))
    assert_reference(kernels, ours(*pair(5, 16, device=device)), [q, one_sequence])
    five = [leaf(randn(2, 2, heads, 5, 16, device=device)) for heads in (4, 2)]
    assert_reference(kernels, ours(*pair(5, 16, device=device)), five)


@pytest.mark.parametrize("is_backward", [False, True])
def test_every_width_is_covered_and_fits(is_backward):
    for width in range(2, MAX_CHANNELS + 1, 2):
        for itemsize in (2, 4):
            tile = kernels.config(width, itemsize, is_backward)
            assert tile.pairs // 2 < width // 2 <= tile.pairs and 1 <= tile.ahead <= tile.heads
            assert tile.tokens * tile.pairs <= 16 * 32 * tile.num_warps  # 16 pairs a thread stay in registers


@pytest.mark.parametrize("tokens, heads, ahead", [(1, 1, 1), (4, 4, 1), (2, 4, 3), (8, 8, 8)])
def test_any_tile(device, monkeypatch, tokens, heads, ahead):
    """Whatever `config` chooses: tokens and heads that a tile has and the tensors have not, and the other way round."""
    monkeypatch.setattr(kernels, "config", lambda *_, **__: kernels.Config(tokens, heads, ahead, 16, 4))
    q, k = (projected(1, 3, count, 24, device) for count in (5, 1))
    assert_right("llama", q, k, *pair(24, device=device), *pair(3, 24, device=device))


@pytest.mark.gpu
@by_spelling
@by_dtype
@pytest.mark.parametrize("channels", [64, 80, 128, 256])
@pytest.mark.parametrize("num_heads", [(32, 8), (14, 2)], ids=str)
def test_heads_of_models(device, num_heads, channels, dtype, spelling):
    q, k = (projected(2, 500, heads, channels, device, dtype) for heads in num_heads)
    weights = pair(channels, device=device, dtype=dtype)
    assert_right(spelling, q, k, *weights, *pair(1, 1, 500, channels, device=device, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("is_token_first", [False, True])
def test_more_elements_than_32_bits_count(device, is_token_first):
    tokens = 2**31 // (32 * 128) + 300
    q, k = (torch.zeros(1, tokens, heads, 128, dtype=torch.bfloat16, device=device) for heads in (32, 1))
    q[:, -300:], k[:, -300:] = randn(1, 300, 32, 128, device=device), randn(1, 300, 1, 128, device=device)
    weights = pair(128, device=device, dtype=torch.bfloat16)
    cos, sin = pair(tokens, 1, 128, device=device, dtype=torch.bfloat16)
    last = [x[:, -300:].clone() for x in (q, k)]
    tables = [cos[-300:], sin[-300:]]
    expected = kernels.forward(*last, *weights, *tables, EPS, 0.0, "llama", [torch.bfloat16] * 2, 2)
    *expected_grads, _ = kernels.backward(
        *last, *last, *weights, *tables, EPS, 0.0, True, True, torch.float32, 2
    )
    heads_axis = 2
    if not is_token_first:
        q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
        cos, sin, heads_axis = cos.transpose(0, 1), sin.transpose(0, 1), 1
    found = kernels.forward(q, k, *weights, cos, sin, EPS, 0.0, "llama", [torch.bfloat16] * 2, heads_axis)
    for one, other in zip(found, expected, strict=True):
        assert_alike((one if is_token_first else one.transpose(1, 2))[:, -300:], other)
    del found
    *found, _ = kernels.backward(
        q, k, q, k, *weights, cos, sin, EPS, 0.0, True, True, torch.float32, heads_axis
    )
    for one, other in zip(found, expected_grads, strict=True):
        assert_alike((one if is_token_first else one.transpose(1, 2))[:, -300:], other)


@pytest.mark.gpu
def test_opcheck(device):
    q, k = (projected(2, 30, heads, 64, device, torch.bfloat16) for heads in (8, 2))
    weights, tables = pair(64, device=device), pair(30, 64, device=device, dtype=torch.bfloat16)
    ops = torch.ops.liger_compile
    torch.library.opcheck(ops.norm_rotary.default, (*map(leaf, (q, k, *weights)), *tables, EPS, 0.0, "llama"))
    torch.library.opcheck(
        ops.norm_rotary_backward.default, (q, k, q, k, *weights, *tables, EPS, 0.0, True, True, True)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_compiled_it_gives_the_same_numbers(device, is_transposed, mode):
    def rotated(packed, q_weight, k_weight, cos, sin):
        q, k = packed.view(2, 300, 10, 64).split((8, 2), 2)
        if is_transposed:
            q, k, cos, sin = q.transpose(1, 2), k.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2)
        return L.norm_rotary(q, k, q_weight, k_weight, cos, sin, EPS)

    packed = leaf(randn(2, 300, 640, device=device, dtype=torch.bfloat16))
    weights = [leaf(weight) for weight in pair(64, device=device, dtype=torch.bfloat16)]
    tables = pair(1, 300, 1, 64, device=device, dtype=torch.bfloat16)
    assert_compiled_alike(rotated, [packed, *weights, *tables], mode)


@pytest.mark.gpu
def test_compiled_for_any_number_of_tokens(device):
    compiled = torch.compile(L.norm_rotary, fullgraph=True, dynamic=True)
    eager = norm_rotary(llama)
    weights = pair(64, device=device, dtype=torch.bfloat16)
    for batch, tokens in ((2, 300), (3, 77), (1, 1)):
        q, k = (projected(batch, tokens, heads, 64, device, torch.bfloat16) for heads in (8, 2))
        tables = pair(tokens, 64, device=device, dtype=torch.bfloat16)
        inputs = [q, k, *weights, *tables]
        with precision.in_double():
            exact = eager(*precision.as_double(inputs))
        # Against the kernel, Inductor may have left out a rounding.
        precision.assert_no_worse(compiled(*inputs, EPS), eager(*inputs), exact)
