"""A pattern of your own: a gate by tanh, replaced by an operator that does not keep the tanh for backward."""

import torch
from torch import Tensor, nn

import liger_compile
from liger_compile import Pattern, register_pattern


@torch.library.custom_op("my_ops::tanh_gate", mutates_args=())
def tanh_gate(gate: Tensor, up: Tensor) -> Tensor:
    return torch.tanh(gate) * up


@tanh_gate.register_fake
def _(gate, up):
    return torch.empty_like(up)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dy):
    gate, up = ctx.saved_tensors
    h = torch.tanh(gate)
    return dy * up * (1 - h * h), dy * h


tanh_gate.register_autograd(backward, setup_context=setup_context)


def search(gate, up):
    return torch.tanh(gate) * up


examples = {"gate": torch.empty(2, 4), "up": torch.empty(2, 4)}
register_pattern(Pattern("tanh_gate.mine", search, tanh_gate, examples=examples))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(16, 64), nn.Linear(16, 64)

    def forward(self, x):
        return self.up(x).mul(self.gate(x).tanh())  # another spelling of what `search` computes


torch.manual_seed(0)
model, x = Gated(), torch.randn(8, 16)
y = torch.compile(model, backend="liger")(x)
torch.testing.assert_close(y, model(x))
y.sum().backward()

print(liger_compile.reports()[-1])
