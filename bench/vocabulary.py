"""Products of linear_cross_entropy where the vocabulary or the width is no round number, and what helps.

    python -m bench.vocabulary                   minutes on one GPU, bench/results/vocabulary_<device>.csv
    python -m bench.vocabulary --device cpu      small shapes, without kernels: shows that it runs

Rows, for each shape of SHAPES:

    product, dx, dweight   one chunk's product by each of WAYS, the copies that it makes included
    loss                   forward and backward of the op, whole and by parts of the vocabulary, and as Inductor
                           compiles the plain code; and of the next shape whose sizes are multiples of 64
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import RESULTS, Row, file_name, machine, print_row, write_csv
from bench.timing import Contender, interleave, spread
from liger_compile import functional
from liger_compile.ops import alignment
from liger_compile.ops import linear_cross_entropy as op

SHAPES = ((8192, 1024, 50257), (16384, 1024, 30522), (8192, 2048, 128257), (8192, 1001, 32001))
SMALL_SHAPES = ((64, 17, 101),)
WIDTHS = {"shape": 20, "what": 10, "way": 16, "median_ms": 12, "of_round": 10, "difference": 12}
PITCH = 64

# (x, weight, dlogits) of one chunk, dlogits with rows PITCH apart -> logits, dx or dweight
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def logits_of(x: Tensor, weight: Tensor, parts: list[slice]) -> Tensor:
    classes = weight.shape[0]
    logits = x.new_empty(x.shape[0], rounded(classes))[:, :classes]
    for part in parts:
        torch.mm(x, weight[part].t(), out=logits[:, part])
    return logits


def dx_of(weight: Tensor, dlogits: Tensor, parts: list[slice]) -> Tensor:
    dx = weight.new_empty(dlogits.shape[0], weight.shape[1])
    for part in parts:
        torch.addmm(dx, dlogits[:, part], weight[part], beta=1 if part.start else 0, out=dx)
    return dx


def dweight_of(x: Tensor, dlogits: Tensor, parts: list[slice]) -> Tensor:
    dweight = x.new_empty(dlogits.shape[1], x.shape[1])
    for part in parts:
        torch.mm(dlogits[:, part].t(), x, out=dweight[part])
    return dweight


def by_parts(aligned: int) -> Mapping[str, Product]:
    def parts(weight: Tensor) -> list[slice]:
        with patch.object(alignment, "ALIGNED", aligned):
            return alignment.class_parts(weight.shape[0], torch.device("cuda"))

    return {
        "product": lambda x, weight, dlogits: logits_of(x, weight, parts(weight)),
        "dx": lambda x, weight, dlogits: dx_of(weight, dlogits, parts(weight)),
        "dweight": lambda x, weight, dlogits: dweight_of(x, dlogits, parts(weight)),
    }


def padded(tensor: Tensor) -> Tensor:
    """A copy with zeros, so that both sizes are multiples of PITCH."""
    return F.pad(tensor, (0, -tensor.shape[1] % PITCH, 0, -tensor.shape[0] % PITCH))


def padded_columns(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, -tensor.shape[1] % PITCH))


BY_COPIES: Mapping[str, Product] = {
    "product": lambda x, weight, _: (padded_columns(x) @ padded(weight).t())[:, : weight.shape[0]],
    "dx": lambda _, weight, dlogits: (padded_columns(dlogits) @ padded(weight))[:, : weight.shape[1]],
    "dweight": lambda x, weight, dlogits: (padded_columns(dlogits).t() @ padded_columns(x))[
        : weight.shape[0], : weight.shape[1]
    ],
}

WAYS: Mapping[str, Mapping[str, Product]] = {
    "whole": by_parts(1),
    "parts of 8": by_parts(8),
    "parts of 64": by_parts(PITCH),
    "padded copies": BY_COPIES,
}


def rounded(size: int) -> int:
    return -(-size // PITCH) * PITCH


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    device, rows = torch.device(chosen.device), []
    where = machine(chosen.device)
    for shape in SMALL_SHAPES if device.type == "cpu" else SHAPES:
        for row in (*products(shape, device, chosen.rounds), *losses(shape, device, chosen.rounds)):
            rows.append({**row, **where})
            print_row(row, WIDTHS)
    write_csv(file_name("vocabulary", chosen.device), rows, chosen.out)


def products(shape: tuple[int, int, int], device: torch.device, rounds: int) -> Iterator[Row]:
    """Each product of a chunk, by each way, and of the round shape."""
    _, width, classes = shape
    x, weight = tensors(shape, device)
    chunk = op.chunks_of(x, weight, True, 0)[0]
    dlogits = randn(chunk.stop, rounded(classes), device=device)[:, :classes]
    arguments = (x.detach()[chunk], weight.detach(), dlogits)
    round_shape = (chunk.stop, rounded(width), rounded(classes))
    round_arguments = (
        *(tensor.detach() for tensor in tensors(round_shape, device)),
        randn(chunk.stop, rounded(classes), device=device),
    )
    for stage in BY_COPIES:
        stages = {name: _stage(way[stage], arguments) for name, way in WAYS.items()}
        stages["round"] = _stage(WAYS["whole"][stage], round_arguments)
        exact = WAYS["whole"][stage](*(tensor.float() for tensor in arguments))
        errors = {name: apart(way[stage](*arguments), exact) for name, way in WAYS.items()}
        yield from _rows(shape, stage, stages, errors, device, rounds)


def losses(shape: tuple[int, int, int], device: torch.device, rounds: int) -> Iterator[Row]:
    """Forward and backward of the op, of Inductor's, and of the op at the round shape."""
    tokens, width, classes = shape
    target = torch.randint(0, classes, (tokens,), device=device)

    def step(
        shape: tuple[int, int, int], function: Callable[..., Tensor], aligned: int
    ) -> Callable[[], list[Tensor]]:
        x, weight = tensors(shape, device)

        def run() -> list[Tensor]:
            with patch.object(alignment, "ALIGNED", aligned):
                loss = function(x, weight, target)
                return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]

        return run

    ours, round_shape = functional.linear_cross_entropy, (tokens, rounded(width), rounded(classes))
    stages = {
        "whole": step(shape, ours, 1),
        "parts of 8": step(shape, ours, 8),
        "parts of 64": step(shape, ours, PITCH),
        "round": step(round_shape, ours, 1),
        "inductor": step(shape, torch.compile(plain, dynamic=False), 1),
    }
    exact = stages["whole"]()
    errors = {name: max(map(apart, run(), exact)) for name, run in stages.items() if name != "round"}
    yield from _rows(shape, "loss", stages, errors, device, rounds)


def plain(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target)


def tensors(shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    tokens, width, classes = shape
    x, weight = randn(tokens, width, device=device), randn(classes, width, device=device)
    return x.requires_grad_(), weight.mul_(width**-0.5).requires_grad_()


def randn(*shape: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)


def apart(found: Tensor, reference: Tensor) -> float:
    return ((found.float() - reference.float()).norm() / reference.float().norm()).item()


def _stage(product: Product, arguments: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: product(*arguments)


def _rows(
    shape: tuple[int, ...],
    what: str,
    stages: Mapping[str, Callable[[], object]],
    errors: Mapping[str, float],
    device: torch.device,
    rounds: int,
) -> Iterator[Row]:
    timed_by = "wall" if device.type == "cpu" else "events"
    for run in stages.values():  # compiles, and takes workspaces
        run()
    contenders = [Contender(name, {what: run}, timed_by) for name, run in stages.items()]
    samples = {name: found[what] for name, found in interleave(contenders, rounds, 60).items()}
    round_ms = spread(samples["round"])[0]
    for name, found in samples.items():
        median, low, high = spread(found)
        yield {
            "shape": "x".join(map(str, shape)),
            "what": what,
            "way": name,
            "median_ms": round(median, 4),
            "low_ms": round(low, 4),
            "high_ms": round(high, 4),
            "of_round": round(median / round_ms, 3),
            "difference": errors.get(name, ""),
        }


if __name__ == "__main__":
    main()
