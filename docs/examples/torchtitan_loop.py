"""A loop in the way of torchtitan: a model that returns logits, and a loss that is a function of its own.

torchtitan compiles each layer and the loss by itself. Then head and loss are not fused, as the report notes. Here one
function that calls both is compiled.
"""

import torch
import torch.nn.functional as F
from torch import nn

import liger_compile


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.wqkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.w1, self.w3 = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        qkv = self.wqkv(self.attention_norm(x)).chunk(3, dim=2)
        q, k, v = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in qkv)
        x = x + self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(
    nn.Embedding(512, 64),
    *(Layer(64, heads=4) for _ in range(2)),
    nn.RMSNorm(64, eps=1e-5),
    nn.Linear(64, 512, bias=False),
).to(device)


def forward_and_loss(tokens, labels):
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten())


# torchtitan: for layer in model[1:-2]: layer.compile(backend="liger", fullgraph=True)
compiled = torch.compile(forward_and_loss, backend="liger", fullgraph=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(3):
    tokens = torch.randint(512, (4, 65), device=device)
    loss = compiled(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.3f}")

print(liger_compile.reports()[-1])
