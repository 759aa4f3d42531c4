"""Products of bfloat16 and float32 in bfloat16 parts: as exact as float32, and without wide copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from liger_compile.ops import adapters
from liger_compile.testing import precision

_ours = torch.ops.liger_compile
ROWS, IN, OUT, RANK = 40, 96, 80, 4


def ours(base, x, a, b):
    return _ours.adapter_up.default(base, _ours.adapter_down.default(x, a), b, 1.3)


def eager(base, x, a, b):
    return (base + F.linear(F.linear(x.to(a.dtype), a), b) * 1.3).to(base.dtype)


def operands(layer, adapter, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, ROWS, OUT), (2, ROWS, IN), (RANK, IN), (OUT, RANK)]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [t.to(layer if at < 2 else adapter).requires_grad_() for at, t in enumerate(drawn)]


@pytest.mark.parametrize("layer", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_beside_half_precision(layer):
    given = operands(layer, torch.float32)
    double = precision.as_double(given)
    with precision.in_double():
        exact = eager(*double)
    results = [
        (out, precision.gradients(out, of))
        for out, of in ((ours(*given), given), (eager(*given), given), (exact, double))
    ]
    precision.assert_no_worse(*results)


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30, 3.4e38 / 4], ids=str)
def test_three_parts_are_the_number(scale):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).clamp(-4, 4) * scale
    parts = adapters.parts_of(x)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), x.double())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_is_not_hidden(which, value):
    given = [t.detach() for t in operands(torch.bfloat16, torch.float32)]
    given[which].view(-1)[3] = value
    got, expected = ours(*given), eager(*given)
    assert torch.equal(got.isfinite(), expected.isfinite())


def test_on_a_gpu_no_wide_copy_of_the_large_operands_is_made():
    with FakeTensorMode():
        base, x = (torch.empty(2, ROWS, size, dtype=torch.bfloat16, device="cuda") for size in (OUT, IN))
        a, b = (torch.empty(shape, device="cuda") for shape in ((RANK, IN), (OUT, RANK)))

        def step(base, x, a, b):
            down = adapters.adapter_down._init_fn(x, a)
            y = adapters.adapter_up._init_fn(base, down, b, 1.3)
            ddown, db = adapters.adapter_up_backward._init_fn(y, down, b, 1.3, True, True)
            return y, db, *adapters.adapter_down_backward._init_fn(ddown, x, a, True, True)

        graph = make_fx(step)(base, x, a, b).graph
    values = [node.meta.get("val") for node in graph.nodes]
    wide = [value for value in values if isinstance(value, torch.Tensor) and value.dtype == torch.float32]
    assert wide and max(value.numel() for value in wide) < 2 * ROWS * min(IN, OUT)
