"""The kernels of rms_norm and of the backward of pre_norm, against eager and float64."""

from __future__ import annotations

import pytest
import torch

from liger_compile import functional as L
from liger_compile.ops.rms_norm import MAX_WIDTH
from tests.ops.cases import EPS, gemma, llama

pytest.importorskip("triton")
from liger_compile.kernels import rms_norm as kernels
from tests.helpers.kernels import (
    DTYPES,
    assert_alike,
    assert_compiled_alike,
    assert_no_worse_than_eager,
    assert_reference,
    leaf,
    randn,
)
from tests.helpers.pairwise import parametrize

SPELLINGS = {"llama": (llama, {"casting": "llama"}), "gemma": (gemma, {"offset": 1.0, "casting": "gemma"})}
ops = torch.ops.liger_compile
WIDTHS = [1, 3, 40, 96, 128, 1000, 1500]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_spelling = pytest.mark.parametrize("spelling", SPELLINGS)


def assert_right(spelling, x, weight=None):
    eager, options = SPELLINGS[spelling]
    inputs = [leaf(t) for t in (x, weight) if t is not None]
    plain = eager if weight is not None else lambda x: llama(x, None)
    assert_no_worse_than_eager(
        kernels, lambda x, weight=None: L.rms_norm(x, weight, EPS, **options), plain, inputs
    )


@by_spelling
@by_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_no_worse_than_eager(device, width, dtype, spelling):
    x = randn(2, 4 if width > 1000 else 19, width, device=device, dtype=dtype)
    assert_right(spelling, x, randn(width, device=device, dtype=dtype))


@by_dtype
def test_without_a_weight(device, dtype):
    assert_right("llama", randn(5, 96, device=device, dtype=dtype))


class Joined(torch.autograd.Function):
    """A residual stream and its norm, read `count` times, with the backward that takes it all in one pass."""

    @staticmethod
    def forward(ctx, count, options, x, weight):
        ctx.mode = options.get("offset", 0.0), options.get("casting", "llama")
        rstd = ops.pre_norm_statistics(x, EPS)
        y = ops.pre_norm(x, rstd, weight, *ctx.mode)
        ctx.save_for_backward(x, rstd, weight, y)
        return *(y.clone() for _ in range(count)), x.clone()

    @staticmethod
    def backward(ctx, *dys):
        x, rstd, weight, y = ctx.saved_tensors
        *dys, ds = dys
        needs = weight is not None, y.dtype
        dx, dweight, again = ops.pre_norm_backward_fused(dys, ds, x, rstd, weight, *ctx.mode, *needs)
        assert again.dtype == y.dtype
        torch.testing.assert_close(again, y, rtol=torch.finfo(y.dtype).eps, atol=1e-6)
        return None, None, dx, None if weight is None else dweight


@parametrize(spelling=[*SPELLINGS], dtype=DTYPES, count=[1, 2, 3], width=[3, 96, 1000, 1500])
def test_backward_with_the_sums_around_it(device, width, count, dtype, spelling):
    eager, options = SPELLINGS[spelling]
    x, weight = randn(2, 7, width, device=device, dtype=dtype), randn(width, device=device, dtype=dtype)

    def plain(x, weight):
        y = eager(x, weight)
        return *(y.clone() for _ in range(count)), x.clone()

    def ours(x, weight):
        return Joined.apply(count, options, x, weight)

    assert_no_worse_than_eager(kernels, ours, plain, [leaf(x), leaf(weight)])


@by_dtype
def test_backward_with_the_sums_around_it_without_a_weight(device, dtype):
    def plain(x):
        return llama(x, None), x.clone()

    def ours(x):
        return Joined.apply(1, {}, x, None)

    assert_no_worse_than_eager(kernels, ours, plain, [leaf(randn(5, 96, device=device, dtype=dtype))])


@by_spelling
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 1500), (7, 1), (0, 64), (2, 0, 64), (3, 2, 5, 64), (64,)], ids=str
)
def test_shapes(device, shape, spelling):
    # As small as eps: in rows of one column the gradient of x is nothing but what eps does.
    assert_right(spelling, EPS**0.5 * randn(*shape, device=device), randn(shape[-1], device=device))


@by_spelling
@pytest.mark.parametrize(
    "x_dtype, weight_dtype",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes_that_differ(device, spelling, x_dtype, weight_dtype):
    x, weight = randn(9, 96, device=device, dtype=x_dtype), randn(96, device=device, dtype=weight_dtype)
    assert_right(spelling, x, weight)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, :, :48],  # rows evenly spaced, as in a slice of a projection
        lambda t: t.transpose(0, 1)[..., :48],
        lambda t: t[..., ::2],
        lambda t: t[:, 1:3, 8:56],
        lambda t: t[:1, :, :48].expand(4, -1, -1),
    ],
    ids=["packed", "transposed", "gaps", "offset", "expanded"],
)
def test_inputs_of_any_strides(device, view):
    x, weight = view(randn(4, 5, 96, device=device)), randn(96, device=device)[::2]
    assert_right("llama", x, weight)
    assert_right("gemma", x, weight)


def test_rows_whose_offset_needs_more_than_32_bits(device):
    """The memory between the rows is never touched, so that it takes address space alone."""
    stride, rows = 2**29 + 8, 5
    x, weight = randn(rows, 40, device=device, dtype=torch.float16), randn(40, device=device)
    apart = torch.empty(rows * stride, dtype=torch.float16, device=device).view(rows, stride)[:, :40]
    apart.copy_(x)
    assert (rows - 1) * stride > 2**31
    found, expected = (kernels.forward(each, weight, EPS, 0.0, "llama")[0] for each in (apart, x))
    assert_alike(found, expected)


@pytest.mark.parametrize("form", [lambda t: t.t().contiguous().t(), lambda t: t[:1].expand(9, -1)])
def test_incoming_gradients_of_any_strides(device, form):
    """Of the norm alone, and of the norm with the sums around it: dys and ds."""
    x, weight = leaf(randn(9, 96, device=device)), leaf(randn(96, device=device))

    def read(outputs):
        return sum(form(output).square().sum(0) for output in outputs)

    for ours, plain in (
        (lambda *inputs: [L.rms_norm(*inputs, EPS, casting="llama")], lambda *inputs: [llama(*inputs)]),
        (
            lambda *inputs: Joined.apply(2, {}, *inputs),
            lambda *inputs: [*(llama(*inputs).clone() for _ in range(2)), inputs[0].clone()],
        ),
    ):
        assert_no_worse_than_eager(
            kernels,
            lambda *inputs, ours=ours: read(ours(*inputs)),
            lambda *inputs, plain=plain: read(plain(*inputs)),
            [x, weight],
        )


def test_without_a_gradient_that_bypasses_the_norm(device):
    dy, x = (randn(9, 96, device=device) for _ in range(2))
    weight, rstd = randn(96, device=device), torch.rsqrt(x.square().mean(-1) + EPS)
    dx, dweight = kernels.backward(dy, x, weight, rstd, 0.0, True, True)
    for ds in (None, torch.zeros_like(x)):
        fused = kernels.backward_fused([dy], ds, x, rstd, weight, 0.0, "llama", True, None)
        assert_alike(fused[0], dx)
        assert_alike(fused[1], dweight)
        assert fused[2].numel() == 0


@pytest.mark.parametrize("width", [40, 1500])
def test_only_what_is_needed_is_made(device, width):
    dy, x = (randn(9, width, device=device) for _ in range(2))
    weight = randn(width, device=device)
    rstd = torch.rsqrt(x.square().mean(-1) + EPS)
    # What is not needed is not compiled: other code, which may round otherwise.
    dx, dweight = kernels.backward(dy, x, weight, rstd, 1.0, True, True)
    for needs_dx, needs_dweight in ((True, False), (False, True), (False, False)):
        some = kernels.backward(dy, x, weight, rstd, 1.0, needs_dx, needs_dweight)
        for needed, full, found in zip((needs_dx, needs_dweight), (dx, dweight), some, strict=True):
            if needed:
                assert_alike(found, full)
            assert needed or found.numel() == 0
    assert kernels.backward(dy, x, None, rstd, 0.0, True, True)[1].numel() == 0


def test_the_same_numbers_every_time(device):
    dy, x = (randn(300, 96, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight, rstd = randn(96, device=device, dtype=torch.bfloat16), torch.rand(300, device=device)
    first, second = (kernels.backward(dy, x, weight, rstd, 0.0, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_the_kernels_do_not_take(device):
    wide = [leaf(randn(2, MAX_WIDTH + 1, device=device)), leaf(randn(MAX_WIDTH + 1, device=device))]
    assert_reference(kernels, lambda x, weight: L.rms_norm(x, weight), wide)
    double = [leaf(randn(2, 8, device=device, dtype=torch.float64)) for _ in range(2)]
    assert_reference(kernels, lambda x, y: L.rms_norm(x) * y, double)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_width_is_covered_and_fits(itemsize):
    for width in range(1, MAX_WIDTH + 1):
        launched = kernels.config(width, itemsize)
        assert launched.main + launched.tail >= width > launched.main - launched.main // 2 or width == 1
        # Buffers of dy, x and ds, one less than there are stages. A multiprocessor has 227 KiB, older ones 163.
        tile = launched.rows * (launched.main + launched.tail)
        assert 3 * (launched.num_stages - 1) * tile * itemsize <= 160 * 1024
        for size in (launched.rows, launched.main, launched.tail or 1, launched.num_warps):
            assert size & (size - 1) == 0


@pytest.mark.gpu
@by_spelling
@by_dtype
@pytest.mark.parametrize(
    "width", [64, 128, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 16384]
)
def test_widths_of_models(device, width, dtype, spelling):
    x, weight = (randn(*shape, device=device, dtype=dtype) for shape in ((1000, width), (width,)))
    assert_right(spelling, x, weight)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(device):
    rows = 2**31 // 8192 + 300
    x = torch.zeros(rows, 8192, dtype=torch.bfloat16, device=device)
    x[-300:] = randn(300, 8192, device=device)
    weight = randn(8192, device=device, dtype=torch.bfloat16)
    y, rstd = kernels.forward(x, weight, EPS, 0.0, "llama")
    dx, _ = kernels.backward(x, x, weight, rstd, 0.0, True, True)
    last = x[-300:].clone()
    last_y, last_rstd = kernels.forward(last, weight, EPS, 0.0, "llama")
    last_dx, _ = kernels.backward(last, last, weight, last_rstd, 0.0, True, True)
    assert torch.equal(y[-300:], last_y) and torch.equal(dx[-300:], last_dx)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_it_gives_the_same_numbers(device, mode):
    def both(x, weight):
        return L.rms_norm(x, weight, EPS), L.rms_norm(x, weight, EPS, offset=1.0, casting="gemma")

    x, weight = (leaf(randn(*shape, device=device, dtype=torch.bfloat16)) for shape in ((300, 2560), (2560,)))
    assert_compiled_alike(both, [x, weight], mode)
