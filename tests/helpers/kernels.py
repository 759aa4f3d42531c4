"""What the tests of the kernels have in common: the numerics bar, and that it was a kernel that met it."""

from __future__ import annotations

from unittest.mock import patch

import torch

from liger_compile.kernels import launch
from liger_compile.testing import precision
from liger_compile.torch_internals.pytree import tree_leaves
from tests.helpers.gradients import gradients_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, device, dtype=torch.float32):
    return torch.randn(shape).to(device, dtype)


def leaf(tensor):
    return tensor.detach().requires_grad_()


def assert_no_worse_than_eager(kernels, ours, eager, inputs):
    """Results and gradients, which the module `kernels` has to have computed. Inputs that require none get none."""
    doubles = precision.as_double(inputs)
    with precision.in_double():
        exact = gradients_of(eager, *doubles)
    with patch.object(kernels, "launch", wraps=launch) as launched:
        actual = gradients_of(ours, *inputs)
    assert launched.called
    precision.assert_no_worse(actual, gradients_of(eager, *inputs), exact)


def assert_compiled_alike(function, inputs, mode):
    """Compiled in one graph, it gives the numbers that it gives in eager mode; a CUDA graph when it replays too."""
    compiled = torch.compile(function, fullgraph=True, mode=mode)
    expected = gradients_of(function, *inputs)
    for _ in range(3):  # the third call replays what the second recorded
        torch.compiler.cudagraph_mark_step_begin()
        assert_alike(gradients_of(compiled, *inputs), expected)


def assert_alike(found, expected):
    """The same up to a unit of rounding (L2): of kernels that a compiler may have contracted differently."""
    for ours, wanted in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
        apart = (ours.double() - wanted.double()).norm()
        assert apart <= torch.finfo(wanted.dtype).eps * wanted.double().norm(), apart / wanted.double().norm()


def assert_reference(kernels, ours, inputs):
    """It runs, and launches nothing."""
    with patch.object(kernels, "launch", wraps=launch) as launched:
        gradients_of(ours, *inputs)
    assert not launched.called
