"""Copies of inputs that the graph writes into later are what backward reads, under Inductor too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import liger_compile


def written_into(x):
    result = torch.empty_like(x)
    result.copy_(x)
    return result


def set_item(x):
    result = torch.empty_like(x)
    result[:] = x
    return result


COPIES = {
    "clone": torch.clone,
    "cat": lambda x: torch.cat([x]),
    "stack": lambda x: torch.stack([x])[0],
    "repeat": lambda x: x.repeat(1, 1),
    "a cast and back": lambda x: x.to(torch.float64).to(x.dtype),
    "to": lambda x: x.to(x.dtype, copy=True),
    "a power": lambda x: x**1,
    "a product": lambda x: F.dropout(x, 0.5, False) * 1.0,
    "copy_": written_into,
    "setitem": set_item,
    "of a view": lambda x: x.t().clone().t(),
    "behind a detach": lambda x: x.detach().contiguous().clone(),
}


def step(function):
    torch.manual_seed(0)
    x, weights = torch.randn(4, 8), torch.randn(len(COPIES), 4, 8, requires_grad=True)
    outputs = function(x, weights)
    outputs[0].sum().backward()
    return *(output.detach() for output in outputs), x, weights.grad


def compiled(function, inner="inductor"):
    return torch.compile(function, backend="liger", options={"liger.inner": inner, "liger.strict": True})


def test_backward_reads_the_copy():
    """All in one graph, because a compilation takes long: each copy has weights, and gradients, of its own."""

    def function(x, weights):
        copies = [copy(x) for copy in COPIES.values()]
        loss = sum((y * weight).sin() for y, weight in zip(copies, weights, strict=True))
        x.mul_(2)
        return loss, copies[0]

    torch.testing.assert_close(step(compiled(function)), step(function))
    (report,) = liger_compile.reports()
    assert any("copies are kept for backward" in note for note in report.notes)


def _later_but_not_an_input(x, weights):
    x = x * 3
    y = x.clone()
    x.mul_(2)
    return (y * weights[0]).sin(), y


def _never(x, weights):
    y = x.clone()
    return (y * weights[0]).sin(), y


def _before(x, weights):
    x.mul_(2)
    y = x.clone()
    return (y * weights[0]).sin(), y


def _without_gradients(x, weights):
    y = x.clone()
    x.mul_(2)
    return y + weights[0].detach(), y


def _the_same_memory(x, weights):
    """contiguous() returns x itself, which is written later: eager mode reads what was written."""
    y = x.contiguous()
    x.mul_(2)
    return (y * weights[0]).sin(), y + 0


@pytest.mark.parametrize(
    "function", [_later_but_not_an_input, _never, _before, _without_gradients, _the_same_memory]
)
def test_other_copies_are_left(function):
    x, weights = torch.randn(4, 8), torch.randn(1, 4, 8, requires_grad=True)
    explanation = liger_compile.explain(function, x.clone(), weights)
    assert not any("kept for backward" in note and "copy" in note for note in explanation.graphs[0].notes)
    torch.testing.assert_close(function(x.clone(), weights), compiled(function, "aot_eager")(x, weights))
