"""A program for test_parallel.py: trains a Llama on several processes, eager and with backend="liger".

    torchrun --nproc-per-node 2 tests/models/parallel.py DEVICE WAY [WAY ...]

Rank 0 writes a line of JSON for each way: the losses of both, how far the first step's gradients are from eager's, the
patterns that were found, and what reading logits late gives in both.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import liger_compile

DDP, FSDP, FSDP_BY_LAYER = "ddp", "fsdp", "fsdp by layer"
FSDP_RESHARDED = "fsdp, root resharded"  # its weights are freed after forward too
STEPS, BATCH, LENGTH = 3, 2, 32
CONFIG = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
)


def trained(way, device, arguments):
    """Losses, gradients of the first step, sizes of logits. `arguments` are torch.compile's; None is eager.

    The logits of the first step are read in the second, after its forward; those of the second at once, by this process
    alone if it is rank 0; those of the third after the optimizer's step.
    """
    torch._dynamo.reset()
    liger_compile.clear_reports()
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(device)
    function = DistributedDataParallel(model) if way == DDP else model
    if way != DDP:
        mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in model.model.layers:
            if way == FSDP_BY_LAYER and arguments:
                layer.compile(**arguments)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True if way == FSDP_RESHARDED else None)
    if way != FSDP_BY_LAYER and arguments:
        function = torch.compile(function, **arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    random = torch.Generator().manual_seed(dist.get_rank())
    losses, gradients, read, outputs = [], [], [], None
    for step in range(STEPS):
        ids = torch.randint(CONFIG.vocab_size, (BATCH, LENGTH), generator=random).to(device)
        last, outputs = outputs, function(input_ids=ids, labels=ids, use_cache=False)
        if step == 1:
            read.append(size_of(last.logits))
            read.extend([size_of(outputs.logits)] if dist.get_rank() == 0 else [])
        outputs.loss.backward()
        losses.append(outputs.loss.item())
        gradients = gradients or [whole(parameter.grad) for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    read.append(size_of(outputs.logits))
    return losses, gradients, read


def size_of(tensor):
    return tensor.detach().abs().mean().item()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def compared(way, device):
    inner = "inductor" if device.type == "cuda" else "aot_eager"
    # "auto" leaves so few logits to Inductor on a GPU.
    policy = "always" if device.type == "cuda" else "auto"
    options = {"liger.inner": inner, "liger.strict": True, "liger.policy": policy}
    eager_losses, eager_gradients, eager_logits = trained(way, device, None)
    losses, gradients, logits = trained(way, device, {"backend": "liger", "options": options})
    pairs = zip(gradients, eager_gradients, strict=True)
    sites = [site for report in liger_compile.reports() for site in report.sites if site.kind != "leave"]
    return {
        "way": way,
        "losses": losses,
        "eager_losses": eager_losses,
        "difference": max(((ours - eager).norm() / eager.norm()).item() for ours, eager in pairs),
        "found": sorted(site.pattern for site in sites),
        "logits": logits,
        "eager_logits": eager_logits,
    }


def main(device_type, *ways):
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = os.environ.get("STORE", "env://")  # the test starts the processes itself, which is faster
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
    for way in ways:
        row = compared(way, device)
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
