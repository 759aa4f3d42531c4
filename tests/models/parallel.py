"""A program for test_parallel.py: trains models on several processes, eager and with backend="liger".

    torchrun --nproc-per-node 2 tests/models/parallel.py DEVICE WAY [WAY ...]

Rank 0 writes a line of JSON for each way: the losses of both, how far the first step's gradients are from eager's, the
patterns that were found, the notes, and what reading logits late gives in both. The models are transformers' Llama, and
torchtitan's (`Titan`) for its own ways: layers that are compiled one by one, and tensor parallel.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torchtitan_style import Titan  # beside this program
from transformers import LlamaConfig, LlamaForCausalLM

import liger_compile

DDP, FSDP, FSDP_BY_LAYER = "ddp", "fsdp", "fsdp by layer"
FSDP_RESHARDED = "fsdp, root resharded"  # its weights are freed after forward too
TITAN_FSDP, TITAN_TP, TITAN_SP = "titan, fsdp by layer", "titan, tensor", "titan, tensor and sequence"
STEPS, BATCH, LENGTH = 3, 2, 32
CONFIG = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
)
ONE_LAYER = LlamaConfig(
    **{**CONFIG.to_dict(), "num_hidden_layers": 1}
)  # where the graphs are those of another way


def trained(way, device, arguments):
    """Losses, gradients of the first step, sizes of logits. `arguments` are torch.compile's; None is eager.

    The logits of the first step are read in the second, after its forward; those of the second at once, by this process
    alone if it is rank 0; those of the third after the optimizer's step.
    """
    torch._dynamo.reset()
    liger_compile.clear_reports()
    torch.manual_seed(0)
    model = LlamaForCausalLM(ONE_LAYER if way == FSDP_RESHARDED else CONFIG).to(device)
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


def trained_titan(way, device, arguments):
    """The same for torchtitan's model, in its order: parallelize, compile, shard. It returns no logits."""
    torch._dynamo.reset()
    liger_compile.clear_reports()
    torch.manual_seed(0)
    model = Titan(512, 64, 128, layers=2, heads=4, kv_heads=2).to(device)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    if way != TITAN_FSDP:
        parallelize(model, mesh, is_by_sequence=way == TITAN_SP)

    def loss_of(tokens):
        return F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())

    function = loss_of
    if way == TITAN_FSDP:
        for layer in model.layers.values():
            if arguments:
                layer.compile(fullgraph=True, **arguments)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif arguments:
        function = torch.compile(loss_of, **arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    random = torch.Generator().manual_seed(dist.get_rank() if way == TITAN_FSDP else 0)
    losses, gradients = [], []
    for _ in range(STEPS):
        loss = function(torch.randint(512, (BATCH, LENGTH), generator=random).to(device))
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or [whole(parameter.grad) for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, []


def parallelize(model, mesh, *, is_by_sequence):
    """Applies torchtitan's plan: heads and MLPs divided, and perhaps norms and the residual stream by tokens."""
    between = {"output_layouts": Shard(1)} if is_by_sequence else {}
    colwise, rowwise = ColwiseParallel, RowwiseParallel
    layers = {f"attention.{name}": colwise() for name in ("wq", "wk", "wv")}
    layers |= {f"feed_forward.{name}": colwise() for name in ("w1", "w3")}
    layers |= {name: rowwise(**between) for name in ("attention.wo", "feed_forward.w2")}
    whole_model = {"output": colwise(output_layouts=Replicate())}
    if is_by_sequence:
        gathered = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
        of_three = {name: (*placements, None, None) for name, placements in gathered.items()}
        layers |= {"attention_norm": SequenceParallel(), "ffn_norm": SequenceParallel()}
        layers |= {
            "attention": PrepareModuleInput(**of_three),
            "feed_forward": PrepareModuleInput(**gathered),
        }
        whole_model |= {
            "tok_embeddings": rowwise(input_layouts=Replicate(), **between),
            "norm": SequenceParallel(),
            "output": colwise(input_layouts=Shard(1), output_layouts=Replicate()),
        }
    parallelize_module(model, mesh, whole_model)
    for layer in model.layers.values():
        parallelize_module(layer, mesh, layers)


def size_of(tensor):
    return tensor.detach().abs().mean().item()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def compared(way, device):
    inner = "inductor" if device.type == "cuda" else "aot_eager"
    # "auto" leaves so few logits to Inductor on a GPU.
    policy = "always" if device.type == "cuda" else "auto"
    options = {"liger.inner": inner, "liger.strict": True, "liger.policy": policy}
    train = trained_titan if way.startswith("titan") else trained
    eager_losses, eager_gradients, eager_logits = train(way, device, None)
    losses, gradients, logits = train(way, device, {"backend": "liger", "options": options})
    pairs = zip(gradients, eager_gradients, strict=True)
    sites = [site for report in liger_compile.reports() for site in report.sites if site.kind != "leave"]
    return {
        "way": way,
        "losses": losses,
        "eager_losses": eager_losses,
        "difference": max(((ours - eager).norm() / eager.norm()).item() for ours, eager in pairs),
        "found": sorted(site.pattern for site in sites),
        "notes": [note for report in liger_compile.reports() for note in report.notes],
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
