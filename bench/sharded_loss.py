"""The loss of a head that processes divide by classes, forward and backward, beside its matmuls and its exchange.

    torchrun --nproc-per-node 2 -m bench.sharded_loss                      two GPUs, about three minutes
    torchrun --nproc-per-node 2 -m bench.sharded_loss --device cpu         shows that it runs

All variants take turns in the same processes. `floor`: the three local matmuls of all tokens into allocated buffers,
one all_gather of three numbers for each token, and the all_reduce of the gradient of x. `gathered` and `loss_parallel`:
the logits are gathered, or remain divided; compiled by Inductor. `liger-compile`: functional.linear_cross_entropy of
DTensors; `liger-compile 128 MiB`: with that much memory for logits. `extra_mib`: the highest allocated memory of a
forward and backward, minus inputs and gradients, of the first process. The CSV is
bench/results/sharded_loss_<device>.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

from bench.common import RESULTS, Row, file_name, machine, merge_csv, print_row
from bench.timing import Contender, interleave, peak_bytes, spread
from liger_compile import functional

# tokens x hidden x vocabulary: Llama-3.2-1B, Llama-3-8B, Qwen3-0.6B, and a short batch
SHAPES = ((8192, 2048, 128256), (8192, 4096, 128256), (8192, 1024, 151936), (2048, 4096, 128256))
SHORT = ((300, 32, 501),)
KEYS = ("device", "torch", "processes", "tokens", "hidden", "vocabulary", "dtype", "variant")
WIDTHS = {
    "variant": 22,
    **dict.fromkeys(("median_ms", "low_ms", "high_ms", "of_floor", "extra_mib", "loss"), 9),
}
FLOOR = "floor"


class Head:
    """The operands of a divided head, and the ways of computing its loss and gradients."""

    def __init__(self, mesh: Any, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> None:
        device, self.mesh = mesh.device_type, mesh
        random = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(tokens, hidden, dtype=dtype, device=device, generator=random).requires_grad_()
        weight = torch.randn(vocabulary, hidden, dtype=dtype, device=device, generator=random) * 0.02
        self.weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        self.target = torch.randint(vocabulary, (tokens,), device=device, generator=random)
        self._compiled = torch.compile(self._stock, dynamic=False)

    def variants(self) -> Mapping[str, Callable[[], Tensor | None]]:
        """What is measured: each leaves the gradients, and returns the loss, if any."""
        return {
            FLOOR: self._floor(),
            "gathered": lambda: self._step(lambda x: self._compiled(x, Replicate())),
            "loss_parallel": lambda: self._step(lambda x: self._compiled(x, Shard(-1)), loss_parallel()),
            "liger-compile": lambda: self._step(self._ours),
            "liger-compile 128 MiB": lambda: self._step(lambda x: self._ours(x, 128 * 2**20)),
        }

    def _step(
        self,
        loss_of: Callable[[Tensor], Tensor],
        context: contextlib.AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        self.clear()
        with context or contextlib.nullcontext():
            loss = loss_of(DTensor.from_local(self.x, self.mesh, [Replicate()], run_check=False))
            loss.backward()
        return loss.detach()

    def clear(self) -> None:
        self.x.grad = self.weight.grad = None

    def _stock(self, x: DTensor, placement: Any) -> Tensor:
        logits = F.linear(x, self.weight).redistribute(placements=[placement])
        return F.cross_entropy(
            (logits.to_local() if placement == Replicate() else logits).float(), self.target
        )

    def _ours(self, x: Tensor, memory: int | None = None) -> Tensor:
        return functional.linear_cross_entropy(x, self.weight, self.target, memory=memory)

    def _floor(self) -> Callable[[], None]:
        x, weight = self.x.detach(), self.weight.to_local().detach()
        logits, dx, dweight = x.new_empty(len(x), len(weight)), torch.empty_like(x), torch.empty_like(weight)
        numbers = x.new_zeros(3, len(x), dtype=torch.float32)
        of_all = numbers.new_empty(3 * self.mesh.size(), len(x))
        all_gather = (
            getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        )  # torch 2.13, 2.11

        def run() -> None:
            torch.mm(x, weight.t(), out=logits)
            all_gather(of_all, numbers, group=self.mesh.get_group())
            torch.mm(logits, weight, out=dx)
            torch.mm(logits.t(), x, out=dweight)
            dist.all_reduce(dx, group=self.mesh.get_group())

        return run


def measured(head: Head, rounds: int, seconds: float) -> dict[str, Row]:
    """Milliseconds, memory and loss of each variant; all processes run all of it."""
    found: dict[str, Row] = {}
    contenders, is_cuda = [], head.x.is_cuda
    for name, run in head.variants().items():
        run()  # compiles
        loss = run()
        head.clear()
        found[name] = {} if loss is None else {"loss": round(_plain(loss).item(), 5)}
        if is_cuda and name != FLOOR:
            gradients = head.x.nbytes + head.weight.to_local().nbytes
            found[name]["extra_mib"] = round((peak_bytes(run) - gradients) / 2**20)
            head.clear()
        contenders.append(Contender(name, {"both": run}, "events" if is_cuda else "wall"))
    # All processes have to run as many rounds: `seconds` is no limit for them.
    samples = interleave(contenders, rounds, seconds)
    for name, row in found.items():
        median, low, high = spread(samples[name]["both"])
        row.update(median_ms=round(median, 3), low_ms=round(low, 3), high_ms=round(high, 3))
    for row in found.values():
        row["of_floor"] = round(row["median_ms"] / found[FLOOR]["median_ms"], 3)
    return found


def _plain(loss: Tensor) -> Tensor:
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.sharded_loss", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    chosen = parser.parse_args(arguments)
    is_cuda = chosen.device == "cuda"
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if is_cuda else "gloo")
    mesh = dist.device_mesh.init_device_mesh(chosen.device, (dist.get_world_size(),))
    rows = []
    for tokens, hidden, vocabulary in SHAPES if is_cuda else SHORT:
        dtype = torch.bfloat16 if is_cuda else torch.float32
        found = measured(Head(mesh, tokens, hidden, vocabulary, dtype), chosen.rounds, float("inf"))
        case = {"processes": mesh.size(), "tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}
        case["dtype"] = str(dtype).removeprefix("torch.")
        rows += [{**case, "variant": name, **row, **machine(chosen.device)} for name, row in found.items()]
        if dist.get_rank() == 0:
            print(f"{tokens} x {hidden} x {vocabulary}, {mesh.size()} processes", flush=True)
            for at, name in enumerate(found):
                print_row({"variant": name, **found[name]}, WIDTHS, header=at == 0)
    if dist.get_rank() == 0:
        merge_csv(file_name("sharded_loss", chosen.device), rows, KEYS, chosen.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
