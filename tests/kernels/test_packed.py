"""The backwards of rotary and norm_rotary that write their results side by side: the same numbers as apart."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from tests.helpers.pairwise import parametrize

pytest.importorskip("triton")
from liger_compile.kernels import launch
from liger_compile.kernels import packed as kernels
from tests.helpers.kernels import DTYPES, randn

ops = torch.ops.liger_compile
BATCH, TOKENS, HEADS, KV_HEADS = 2, 5, 3, 2
RESTS = [None, 1, 40, 1100]


def heads(count, channels, heads_axis, device, dtype):
    x = randn(BATCH, TOKENS, count, channels, device=device, dtype=dtype)
    return x.transpose(1, 2) if heads_axis == 1 else x


def rows(x, heads_axis):
    return (x.transpose(1, 2) if heads_axis == 1 else x).reshape(BATCH * TOKENS, -1)


def inputs(channels, heads_axis, rest_width, device, dtype):
    dq, dk = (heads(count, channels, heads_axis, device, dtype) for count in (HEADS, KV_HEADS))
    angles = randn(1, TOKENS, channels, device=device).unsqueeze(heads_axis)
    rest = None if rest_width is None else randn(BATCH * TOKENS, 2 * rest_width, device=device, dtype=dtype)
    return dq, dk, None if rest is None else rest[:, :rest_width], angles.cos(), angles.sin()


def assert_joined(found, gradients, rest, heads_axis):
    parts = [*(rows(each, heads_axis) for each in gradients), *(() if rest is None else (rest,))]
    assert_close(found, torch.cat(parts, 1))


def assert_close(found, expected):
    """But for how a compiler orders the same operations."""
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(found.dtype).eps, atol=1e-6)


@parametrize(dtype=DTYPES, heads_axis=[1, 2], rest_width=RESTS, channels=[16, 20])
def test_rotary(device, channels, heads_axis, rest_width, dtype):
    dq, dk, rest, cos, sin = inputs(channels, heads_axis, rest_width, device, dtype)
    mode = "half", False, dtype
    with patch.object(kernels, "launch", wraps=launch) as launched:
        found = ops.rotary_backward_packed(dq, dk, rest, heads_axis, cos, sin, *mode, dtype)
    assert launched.called == (rest is not None)
    assert_joined(found, ops.rotary_backward(dq, dk, cos, sin, *mode, dtype), rest, heads_axis)


@parametrize(dtype=DTYPES, heads_axis=[1, 2], rest_width=RESTS)
def test_norm_rotary(device, heads_axis, rest_width, dtype):
    dq, dk, rest, cos, sin = inputs(16, heads_axis, rest_width, device, dtype)
    q, k = (heads(count, 16, heads_axis, device, dtype) for count in (HEADS, KV_HEADS))
    weights = [randn(16, device=device, dtype=dtype) for _ in range(2)]
    others = q, k, *weights, cos, sin, 1e-6, 0.0
    found, dweights = ops.norm_rotary_backward_packed(dq, dk, rest, heads_axis, *others, True, True, True)
    *gradients, expected = ops.norm_rotary_backward(dq, dk, *others, True, True, True)
    assert_joined(found, gradients, rest, heads_axis)
    assert_close(dweights, expected)
