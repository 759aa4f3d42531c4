"""What backward computes again is what forward computed, also where an input was written in between."""

import pytest
import torch
import torch.nn.functional as F

from liger_compile.graphs.aliasing import Mutations
from liger_compile.steps.recompute import keep_what_written_inputs_give
from liger_compile.testing import graphs
from tests.helpers.gradients import gradients_of


def norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def read_before(x, buffer):
    y = norm(x + buffer)
    buffer.mul_(2)
    return y


def alias_read_before(x, buffer):
    scale = buffer.float() * 1.0
    y = torch.relu(x * scale).square()
    buffer.mul_(2)
    return y


def read_before_and_after(x, buffer):
    before = x + buffer
    buffer.mul_(2)
    y = norm(before) + buffer
    buffer.add_(1)
    return y


def read_through_views(x, buffer):
    y = F.silu(x) * buffer.view(4, 4).T.exp().reshape(16)
    buffer.copy_(x.detach()[0])
    return F.silu(y)


def written_by_another_call(x, buffer):
    torch._foreach_mul_([buffer], 2)
    y = norm(x * buffer.exp())
    torch._foreach_zero_([buffer])
    return y


@pytest.mark.parametrize(
    "function",
    [read_before, alias_read_before, read_before_and_after, read_through_views, written_by_another_call],
)
@pytest.mark.parametrize("policy", ["auto", "always"])
def test_backward_does_not_compute_from_what_a_written_input_holds_later(function, policy):
    def trained(run):
        torch.manual_seed(1)
        x, buffer = torch.randn(6, 16, requires_grad=True), torch.full((16,), 0.7)
        return gradients_of(run, x, buffer), buffer

    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": policy}
    compiled = torch.compile(function, backend="liger", options=options)
    torch.testing.assert_close(trained(compiled), trained(function), rtol=1e-4, atol=1e-4)


def test_only_what_touches_a_written_input_is_kept():
    def f(x, y, buffer):
        own = torch.tanh(x)
        own.mul_(2)
        read = buffer + x
        buffer.view(2, 8).add_(1)
        return own, torch.sin(y), read, buffer[0].cos(), torch.sqrt(read)

    module, _ = graphs.capture(f, *(torch.rand(16) for _ in range(3)))
    keep_what_written_inputs_give(module.graph, Mutations(module.graph))
    marked = {node.name for node in module.graph.nodes if "recompute" in node.meta}
    assert marked == {"read", "view", "add_", "getitem", "cos"}


def test_what_may_not_be_recomputed_is_in_the_report(run_liger):
    def function(x, buffer):
        y = (buffer.clone() * x).sin()
        buffer.add_(1)
        return y.sum()

    x, buffer = torch.randn(4, requires_grad=True), torch.randn(4)
    _, (report,) = run_liger(function, x, buffer, inner="aot_eager")
    assert any("because the graph writes into their inputs later" in note for note in report.notes)
    _, (report,) = run_liger(lambda x, buffer: (buffer * x).sin().sum(), x, buffer, inner="aot_eager")
    assert not report.notes
