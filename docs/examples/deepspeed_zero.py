"""DeepSpeed ZeRO with backend="liger". Run by `deepspeed deepspeed_zero.py 3`, or by python as one process."""

import os
import sys

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liger_compile

ONE_PROCESS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 29518}
for name, value in ONE_PROCESS.items():
    os.environ.setdefault(name, str(value))  # a launcher has set them

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    use_cache=False,  # training reads no cache of keys and values
)
stage = int(sys.argv[1]) if len(sys.argv) > 1 else 2
settings = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": torch.cuda.is_available()},
    "zero_optimization": {"stage": stage},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}
module = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
model, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
model.compile(backend="liger")  # DeepSpeed's own method, which compiles the module

tokens = torch.randint(config.vocab_size, (2, 64), device=model.device)
for step in range(3):
    loss = model(input_ids=tokens, labels=tokens).loss
    model.backward(loss)
    model.step()
    print(f"step {step}  loss {loss.item():.3f}")

# In stage 3 there are several: DeepSpeed gathers weights between graphs.
for report in liger_compile.reports():
    print(report)
