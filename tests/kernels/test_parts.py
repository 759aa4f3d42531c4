"""float32 matrices in bfloat16 parts: the kernels give the bits of the reference, from any strides."""

from __future__ import annotations

import pytest
import torch

from liger_compile.ops import dispatch
from liger_compile.ops.adapters import parts_of

pytest.importorskip("triton")

_ours = torch.ops.liger_compile
ROWS, WIDE, RANK = 70, 40, 16


def drawn(*shape, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, 3.4e38, 1e-30, -1.0 - 2.0**-23])
    x.view(-1)[:4] = special[: x.numel()]
    return x.to(device)


def narrow(device):
    """A part of a joined `adapter_down`: its rows are not adjacent."""
    return drawn(ROWS, 3 * RANK, device=device)[:, RANK : 2 * RANK]


def pairs(device):
    return [
        (narrow(device), drawn(WIDE, RANK, device=device).t()),
        (narrow(device), drawn(RANK, WIDE, device=device)),
        (drawn(1, 1, device=device), drawn(1, 1, device=device)),
        (drawn(0, RANK, device=device), drawn(RANK, WIDE, device=device)),
    ]


@pytest.mark.parametrize("which", range(4))
def test_pairs_are_parts_side_by_side(device, which):
    a, b = pairs(device)[which]
    left, right = _ours.paired_parts.default(a, b)
    (a1, a2, a3), (b1, b2, b3) = parts_of(a), parts_of(b)
    assert torch.equal(left, torch.cat((a1, a1, a2, a1, a2, a3), 1))
    assert torch.equal(right, torch.cat((b1, b2, b1, b3, b2, b1), 0))


def products(device):
    x = torch.randn(ROWS, WIDE, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    weight = torch.randn(RANK, WIDE, generator=torch.Generator().manual_seed(2)).to(device)
    rows = torch.randn(ROWS, 3 * RANK, generator=torch.Generator().manual_seed(3)).to(device)[:, :RANK]
    return {
        "x A": (x, weight.t()),
        "dy B": (x, weight.t().contiguous()),
        "dA": (rows.t(), x),
        "dB": (x.t(), rows),
    }


@pytest.mark.parametrize("name", ["x A", "dy B", "dA", "dB"])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_a_product_is_as_exact_as_in_float32(device, name, scale):
    a, b = products(device)[name]
    found = _ours.split_matmul.default(a, b, scale)
    exact = scale * (a.double() @ b.double())
    # The errors of 70 sums in float32, each rounded to 24 bits.
    bound = scale * (a.double().abs() @ b.double().abs()) * a.shape[1] * 2.0**-24
    assert ((found.double() - exact).abs() <= bound).all()
    torch.library.opcheck(_ours.split_matmul.default, (a, b, scale))


@pytest.mark.gpu
def test_memory_of_a_product_on_a_gpu():
    """No float32 copy of the large operand: the parts and the product of the small one are all that is made."""
    x = torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(16, 2048, device="cuda")
    assert dispatch.has_kernel(x, weight)
    _ours.split_matmul.default(x, weight.t(), 1.0)  # cuBLAS makes its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _ours.split_matmul.default(x, weight.t(), 1.0)
    assert torch.cuda.max_memory_allocated() - before <= x.nbytes / 8
