"""A plain training loop: a small Llama with random weights, compiled with backend="liger"."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liger_compile

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
config = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    use_cache=False,  # training reads no cache of keys and values
)
model = torch.compile(LlamaForCausalLM(config).to(device), backend="liger")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokens = torch.randint(config.vocab_size, (2, 64), device=device)

for step in range(5):
    loss = model(input_ids=tokens, labels=tokens).loss  # the logits are never computed: nothing reads them
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.3f}")

print(liger_compile.reports()[-1])
