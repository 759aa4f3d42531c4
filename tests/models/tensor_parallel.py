"""A program for test_tensor_parallel.py: a head that processes divide by classes, its loss, and norms of DTensors.

    torchrun --nproc-per-node 2 tests/models/tensor_parallel.py DEVICE CASE [CASE ...]

Rank 0 writes a line of JSON for each case: how far loss and gradients are from those of one process with the whole head
in float64, in eager code and with backend="liger"; whether the results are divided over the ranks as in eager code; and
what the report says.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import liger_compile
from liger_compile import functional as L

WIDTH, CLASSES, TOKENS = 16, 31, 10


def rms_norm(x, weight):
    """As transformers spells it."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class WrittenOut(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight)


class Model(nn.Module):
    """A layer, perhaps a norm, and a head."""

    def __init__(self, classes, bias=False, norm=nn.Identity):
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), norm(WIDTH)
        self.head = nn.Linear(WIDTH, classes, bias=bias)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.layer(x))))


def loss_of(**keywords):
    return lambda model, x, labels: F.cross_entropy(model(x), labels, **keywords)


def weighted(**keywords):
    """Class weights, all of which each rank has."""

    def loss(model, x, labels):
        weights = torch.linspace(0, 2, CLASSES, dtype=x.dtype, device=x.device)
        return F.cross_entropy(model(x), labels, weights, **keywords)

    return loss


def upcast(model, x, labels):
    return F.cross_entropy(model(x).float(), labels)


def shifted(model, x, labels):
    logits = model(x.unflatten(0, (2, -1)))
    shifted = labels.unflatten(0, (2, -1))[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), shifted.flatten()) * 3


def capped(model, x, labels):
    return F.cross_entropy(5 * torch.tanh(model(x) * 0.7 / 5), labels)


def without_reduction(model, x, labels):
    return F.cross_entropy(model(x), labels, reduction="none").square().mean()


def with_logits(model, x, labels):
    logits = model(x)
    return F.cross_entropy(logits, labels), logits


def written(model, x, labels):
    """The hidden state is written between head and loss, without autograd's knowledge."""
    hidden = torch.tanh(model.layer(x)).clone()
    logits = model.head(hidden)
    if isinstance(logits, DTensor):  # one process raises autograd's error
        hidden.detach().mul_(1.5)
    return F.cross_entropy(logits, labels)


def called(model, x, labels):
    """The public function."""
    hidden, weight = torch.tanh(model.layer(x)), model.head.weight
    if isinstance(weight, DTensor):
        hidden = DTensor.from_local(hidden, weight.device_mesh, [Replicate()], run_check=False)
    return L.linear_cross_entropy(hidden, weight, labels)


def normed(*placements):
    """The norm alone, on all or on parts of the channels of each row; its weight is a DTensor then."""

    def loss(model, x, labels):
        hidden, weight = torch.tanh(model.layer(x)), model.norm.weight
        if isinstance(weight, DTensor):
            hidden = DTensor.from_local(hidden, weight.device_mesh, [Replicate()], run_check=False)
            hidden = hidden.redistribute(placements=placements)
        result = rms_norm(hidden, weight)
        result = result.full_tensor() if isinstance(result, DTensor) else result
        return model.head(result).square().mean()

    return loss


@dataclass(frozen=True)
class Case:
    """A function of a model, its input and labels, that computes a loss.

    Args:
        form: the logits are "gathered", or remain divided in the context of loss_parallel ("divided"), or remain
            divided outside of it ("outside"); or the head is not divided ("whole").
        norm: the norm before the head.
        labels: changes random labels.
        is_sequence_parallel: the input of the head is divided along its tokens.
    """

    loss: Callable[..., Any] = field(default_factory=loss_of)
    form: str = "gathered"
    norm: Callable[[int], nn.Module] = nn.Identity
    classes: int = CLASSES
    tokens: int = TOKENS
    bias: bool = False
    dtype: torch.dtype = torch.float64
    labels: Callable[[torch.Tensor], torch.Tensor] = lambda labels: labels
    is_sequence_parallel: bool = False
    dynamic: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)


def ignored(labels):
    return labels.masked_fill(labels % 3 == 0, -100)


CASES = {
    "gathered": Case(),
    "divided": Case(form="divided", labels=ignored),
    "sum, ignored class, labels of one rank": Case(
        loss_of(reduction="sum", ignore_index=3), labels=lambda labels: labels % 7
    ),
    "cap, bias, many chunks": Case(
        capped, tokens=300, bias=True, labels=ignored, options={"liger.loss_memory": 1}
    ),
    "no labels": Case(labels=lambda labels: torch.full_like(labels, -100)),
    "any size": Case(shifted, form="divided", dynamic=True),
    "sequence": Case(is_sequence_parallel=True),
    "class weights": Case(weighted(), labels=ignored),
    "class weights, divided": Case(weighted(reduction="sum"), form="divided"),
    "half": Case(upcast, dtype=torch.bfloat16),
    "function": Case(called, form="divided"),
    "inductor": Case(shifted, options={"liger.inner": "inductor"}),
    "dropped": Case(with_logits, options={"liger.logits": "none"}),
    # left alone
    "returned": Case(with_logits),
    "smoothing": Case(loss_of(label_smoothing=0.1)),
    "outside": Case(form="outside"),
    "written": Case(written, form="divided"),
    # norms of DTensors
    "norm": Case(norm=WrittenOut, dtype=torch.float32, is_sequence_parallel=True, labels=ignored),
    "norm, any size": Case(
        norm=nn.RMSNorm,
        form="divided",
        tokens=12,
        dtype=torch.float32,
        is_sequence_parallel=True,
        dynamic=True,
    ),
    "norm, half": Case(upcast, norm=WrittenOut, dtype=torch.bfloat16, is_sequence_parallel=True),
    "norm, default": Case(
        norm=nn.RMSNorm, dtype=torch.float32, is_sequence_parallel=True, options={"liger.policy": "auto"}
    ),
    "layer norm": Case(norm=nn.LayerNorm, is_sequence_parallel=True),
    "norm of whole rows": Case(normed(Replicate()), norm=nn.RMSNorm, form="whole", dtype=torch.float32),
    "norm of parts of rows": Case(normed(Shard(1)), norm=nn.RMSNorm, form="whole", dtype=torch.float32),
    # on three processes
    "uneven": Case(form="divided", classes=5),
    "a rank without classes": Case(shifted, classes=4),
    # slow
    "no reduction": Case(without_reduction),
    "half, divided": Case(upcast, form="divided", dtype=torch.float16),
    "inductor, divided": Case(
        upcast, form="divided", dtype=torch.float32, options={"liger.inner": "inductor"}
    ),
}


def divided(model, case, mesh):
    """The model, with its head divided."""
    layouts = {"output_layouts": Replicate()} if case.form == "gathered" else {"use_local_output": False}
    if case.is_sequence_parallel:
        size, rank = mesh.size(), mesh.get_local_rank()
        model.layer.register_forward_hook(lambda _, __, output: output.chunk(size, 0)[rank])
        layouts["input_layouts"] = Shard(0)
    plan = {} if case.form == "whole" else {"head": ColwiseParallel(**layouts)}
    if case.norm is not nn.Identity:
        plan["norm"] = SequenceParallel(sequence_dim=0)
    return parallelize_module(model, mesh, plan)


def computed(case, device, mesh, arguments):
    """Loss and gradients; without a mesh of one process. `arguments` are torch.compile's, None for eager code."""
    torch._dynamo.reset()
    liger_compile.clear_reports()
    torch.manual_seed(0)
    model = Model(case.classes, case.bias, case.norm).to(case.dtype)
    x, labels = torch.randn(case.tokens, WIDTH).to(case.dtype), torch.randint(case.classes, (case.tokens,))
    labels = case.labels(labels).to(device)
    model, x = (model.double(), x.double()) if mesh is None else (model, x)
    model, x = model.to(device), x.to(device).requires_grad_()
    if mesh is not None:
        divided(model, case, mesh)
    function = case.loss if arguments is None else torch.compile(case.loss, **arguments)
    is_divided = case.form == "divided" and mesh is not None
    with loss_parallel() if is_divided else contextlib.nullcontext():
        if case.form == "outside" and mesh is not None:
            labels = DTensor.from_local(labels, mesh, [Replicate()], run_check=False)
        results = function(model, x, labels)
        loss = results[0] if isinstance(results, tuple) else results
        loss.backward()
    if case.is_sequence_parallel and mesh is not None:  # each process has the gradients of its tokens
        for tensor in (x, *model.layer.parameters()):
            dist.all_reduce(tensor.grad)
    return [loss.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def compared(name, device, mesh):
    case = CASES[name]
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    if case.loss is with_logits and not case.options:
        options["liger.policy"] = "auto"  # profit leaves logits that are returned
    exact = computed(case, device, None, None)
    eager = computed(case, device, mesh, None)
    arguments = {"backend": "liger", "dynamic": case.dynamic, "options": {**options, **case.options}}
    ours = computed(case, device, mesh, arguments)
    reports = liger_compile.reports()
    return {
        "case": name,
        "difference": far(ours, exact),
        "eager_difference": far(eager, exact),
        "from_eager": far(ours, eager),
        "placements": list(map(placed, ours)) == list(map(placed, eager)),
        "sites": [[site.pattern, site.kind, site.reason] for report in reports for site in report.sites],
        "notes": [note for report in reports for note in report.notes],
    }


def far(found, exact):
    """The largest relative distance of a loss or a gradient; 0 where both are NaN."""
    pairs = [
        (whole(ours).double(), whole(wanted).double()) for ours, wanted in zip(found, exact, strict=True)
    ]
    return max(
        (
            (ours - wanted).nan_to_num(0.0, posinf=1e9).norm() / wanted.nan_to_num().norm().clamp(min=1e-30)
        ).item()
        if torch.equal(ours.isnan(), wanted.isnan())
        else float("inf")
        for ours, wanted in pairs
    )


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor):
    return str(tensor.placements) if isinstance(tensor, DTensor) else "plain"


def main(device_type, *names):
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = os.environ.get("STORE", "env://")  # the test starts the processes itself, which is faster
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for name in names:
        row = compared(name, device, mesh)
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
