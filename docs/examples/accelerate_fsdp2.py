"""FSDP2 through accelerate, with backend="liger".

On several GPUs: `accelerate launch --num_processes 2 accelerate_fsdp2.py`. Run by `python`, it is one process. On a
CPU accelerate does not shard, so the example shards the model itself, in the way of accelerate.
"""

import os

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import liger_compile

ONE_PROCESS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 29517}
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
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
accelerator = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin)
model = LlamaForCausalLM(config)
if accelerator.is_fsdp2:
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
else:
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model.compile(backend="liger")  # after the layers are sharded

tokens = torch.randint(config.vocab_size, (2, 64), device=accelerator.device)
for step in range(5):
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step}  loss {loss.item():.3f}")

for report in liger_compile.reports():  # one for each graph: FSDP2 breaks the model at sharded modules
    accelerator.print(report)
accelerator.end_training()
