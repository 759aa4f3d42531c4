"""Numbers beside half precision are rounded to its dtype under Inductor, as in eager mode."""

import pytest
import torch
import torch.nn.functional as F

import liger_compile

# 1 and 0.1 are what bfloat16 rounds 0.999 and 0.1 to; 2048 is what both dtypes round 2049 to.
VALUES = [1.0, 0.999, 0.9961, 0.1, -0.1, 0.5, 2048.0, 2049.0, float("inf"), float("nan")]
SCALAR = torch.tensor(0.999)


def _filled(x, where):
    x = x.clone()
    x[where] = 0.1
    return x


PROGRAMS = {
    "orders": lambda x: (x > 0.999, x < 0.999, x.ge(0.999), torch.less_equal(x, 0.1), x >= 2049),
    "equalities": lambda x: (x == 0.1, torch.ne(x, 0.1), torch.eq(x, 2049)),
    "infinity": lambda x: (x < 1e39, x >= 1e39, x == float("inf"), x > 70000),
    "in place": lambda x: (x.clone().gt_(0.999), x.clone().eq_(0.1)),
    "a scalar tensor": lambda x: (x > SCALAR, x <= SCALAR, x == SCALAR, x > torch.full((), 0.999)),
    "wider than the number": lambda x: (x.float() > SCALAR, x.double() > 0.999),
    "remainders": lambda x: (x % 0.1, torch.remainder(x, 0.1), torch.fmod(x, 0.1)),
    "fills": lambda x: (
        x.masked_fill(x > 0.5, 0.1) == 0.1, torch.full_like(x, 0.1) == x, x.new_full((2, 5), 0.1) == x.view(2, 5)),
    "writes": lambda x: (_filled(x, x > 0.5) == 0.1, _filled(x, slice(3)) == 0.1, F.pad(x, (1, 1), value=0.1) == 0.1),
    "no dimensions": lambda x: (x[1] > 0.999, x[3] == 0.1),
    "choices": lambda x: (torch.where(x > 0.5, 0.1, x) == 0.1,),
    "limits": lambda x: (x.clamp(-0.1, 0.999) < x, F.hardtanh(x, -0.1, 0.1) == x, x.clip(max=0.1) < x),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_numbers_are_rounded_as_in_eager_mode(dtype, device):
    """All programs are compiled as one graph."""
    x = torch.tensor(VALUES, dtype=dtype, device=device)

    def function(x):
        return {name: program(x) for name, program in PROGRAMS.items()}

    expected = function(x)
    found = torch.compile(function, backend="liger", options={"liger.strict": True})(x)
    for name, values in expected.items():
        for index, (value, other) in enumerate(zip(values, found[name], strict=True)):
            assert torch.equal(value.nan_to_num(), other.nan_to_num()), (name, index)
    (report,) = liger_compile.reports()
    assert any("rounded to its dtype in" in note for note in report.notes)


def test_exact_numbers_and_wider_tensors_are_left():
    def function(x, wide):
        return x > 0.5, x == 2048, x.clamp(min=0.0), wide > 0.1, x.masked_fill(x > 1, float("-inf"))

    x = torch.tensor(VALUES, dtype=torch.bfloat16)
    torch.compile(function, backend="liger")(x, x.float())
    (report,) = liger_compile.reports()
    assert not any("rounded" in note for note in report.notes)


def test_a_scalar_gets_its_gradient():
    x, scalar = torch.randn(8, dtype=torch.bfloat16), torch.tensor(0.3, requires_grad=True)

    def loss(x, scalar):
        return (x % scalar).float().sum() + (x > scalar).sum() + scalar

    torch.compile(loss, backend="liger", options={"liger.strict": True})(x, scalar).backward()
    found, scalar.grad = scalar.grad, None
    loss(x, scalar).backward()
    torch.testing.assert_close(found, scalar.grad)
