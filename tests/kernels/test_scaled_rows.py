"""float16 rows with a power of two each: the kernel as the reference, and numbers of any size kept."""

from __future__ import annotations

import pytest
import torch

from liger_compile.ops import dispatch, scaled_rows

pytest.importorskip("triton")

EXPONENTS = [-120, -70, -40, -14, 0, 15, 40, 90]


@pytest.fixture(params=["kernel", "reference"])
def device(request, device, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(dispatch, "has_kernel", lambda *_: False)
        monkeypatch.setattr(scaled_rows, "has_kernel", lambda *_: False)
    return device


def stored(values, rows=None, scales=None):
    """What is kept of values, and of rows and scales if they are given."""
    adds = rows is not None
    rows = rows if adds else torch.empty_like(values, dtype=torch.float16)
    scales = scales if adds else values.new_empty(len(values))
    scaled_rows.store(values, rows, scales, adds)
    return rows, scales


def number(rows, scales):
    return rows.double() * scales.double().unsqueeze(-1)


@pytest.mark.parametrize("width", [1, 5, 64, 5000])
def test_rows_of_any_size_are_kept_to_eleven_bits(device, width):
    values = torch.randn(len(EXPONENTS), width).to(device)
    values *= torch.tensor([2.0**exponent for exponent in EXPONENTS], device=device).unsqueeze(-1)
    rows, scales = stored(values)
    largest = rows.float().abs().amax(-1)
    above = values.abs().amax(-1) >= scaled_rows.LEAST
    assert (largest[above] >= scaled_rows.TOP).all() and (largest <= 2 * scaled_rows.TOP).all()
    assert torch.equal(scales.view(torch.int32) & 0x7FFFFF, torch.zeros_like(scales, dtype=torch.int32))
    error = (number(rows, scales) - values.double()).abs()
    smallest = scales.double() * 2.0**-25  # half of the smallest number of float16
    assert (error <= torch.maximum(values.double().abs() * 2.0**-11, smallest.unsqueeze(-1))).all()


@pytest.mark.parametrize("first, second", [(-30, 20), (20, -30), (3, 3), (0, 60)])
def test_sums_keep_what_the_larger_allows(device, first, second):
    a, b = (torch.randn(3, 70).to(device) * 2.0**exponent for exponent in (first, second))
    rows, scales = stored(b, *stored(a))
    exact = a.double() + b.double()
    error = (number(rows, scales) - exact).abs().amax(-1)
    assert (error <= 2.0**-10 * exact.abs().amax(-1)).all()


def test_what_is_added_may_take_all_away(device):
    a = torch.randn(2, 40).to(device)
    rows, scales = stored(a)
    rows, scales = stored(-number(rows, scales).float(), rows, scales)
    assert (rows == 0).all() and scales.isfinite().all()


def test_zeros_infinities_and_nan(device):
    values = torch.zeros(5, 3)
    values[1, 1], values[2, 1], values[3, :2], values[4, 0] = (
        torch.inf,
        -torch.inf,
        torch.tensor([torch.nan, 5]),
        1e-44,
    )
    rows, scales = stored(values.to(device))
    assert scales.isfinite().all() and (scales > 0).all()
    found = number(rows, scales).cpu()
    assert torch.equal(found[:3], values[:3].double())
    assert found[3, 0].isnan() and found[3, 2] == 0 and found[4, 0] == 0


@pytest.mark.parametrize(
    "value, power", [(1.0, 1.0), (1.99, 1.0), (0.3, 0.25), (7.0, 4.0), (torch.inf, 2.0**60), (0.0, 2.0**-60)]
)
def test_power_of_two(value, power):
    assert scaled_rows.power_of_two(torch.tensor(value)) == power


def test_no_rows(device):
    rows, scales = stored(torch.zeros(0, 4, device=device))
    assert rows.shape == (0, 4) and scales.shape == (0,)
