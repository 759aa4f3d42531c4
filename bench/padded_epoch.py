"""An epoch of batches that are padded to their longest row: stock torch.compile, and ours with all or live rows.

    python -m bench.padded_epoch                     Llama of 1B's widths, 4 layers, batches of 4 rows up to 2048 tokens
    python -m bench.padded_epoch --device cpu        a tiny model: shows that it runs, measures nothing

Lengths of rows are random and the last batch is smaller, so that sizes become symbolic. Two epochs compile; then each
batch of a third epoch runs with every variant in turn. Prints the time of each variant as a share of stock's (the sum
over batches), the graphs that were compiled, and the peak memory of a variant's epoch above the weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

import liger_compile
from bench.common import machine

SHAPES = {
    "cuda": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 128256},
    "cpu": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128},
}
ROWS, LENGTH = 4, {"cuda": 2048, "cpu": 48}
VARIANTS: dict[str, dict[str, Any]] = {
    "stock": {},
    "all rows": {"backend": "liger"},
    "live rows": {"backend": "liger", "options": {"liger.rows": "auto"}},
}
Step = Callable[..., Any]


def epoch(num_batches: int, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the same batches in each epoch."""
    random = torch.Generator().manual_seed(0)
    longest = LENGTH[device]
    for at in range(num_batches):
        rows = ROWS if at < num_batches - 1 else ROWS - 1
        lengths = torch.randint(longest // 8, longest + 1, (rows,), generator=random)
        ids = torch.randint(3, SHAPES[device]["vocab_size"], (rows, int(lengths.max())), generator=random)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        yield {name: tensor.to(device) for name, tensor in given.items()}


def of_its_own(model: torch.nn.Module) -> Step:
    """Returns a function with code of its own that calls the model."""
    names: dict[str, Any] = {"model": model}
    exec("def run(**kwargs):\n    return model(**kwargs)", names)
    return names["run"]


def seconds(step: Step, given: dict[str, torch.Tensor], model: torch.nn.Module) -> float:
    """Returns the time of a forward and backward, until the device has finished."""
    model.zero_grad(set_to_none=True)
    wait = torch.cuda.synchronize if next(model.parameters()).is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    step(**given, use_cache=False).loss.backward()
    wait()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.padded_epoch")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batches", type=int, default=24)
    chosen = parser.parse_args()
    device, dtype = chosen.device, torch.bfloat16 if chosen.device == "cuda" else torch.float32
    heads = {"num_attention_heads": SHAPES[device]["hidden_size"] // 64 or 1, "num_key_value_heads": 1}
    if device == "cuda":
        heads["num_key_value_heads"] = 8
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[device], **heads)
    model = transformers.LlamaForCausalLM(config).to(device, dtype).train()
    # A model of its own for each variant, on the same weights: Dynamo remembers the sizes of a function.
    steps = {name: torch.compile(of_its_own(model), **kwargs) for name, kwargs in VARIANTS.items()}
    batches = list(epoch(chosen.batches, device))
    peaks: dict[str, float] = {}
    for name, step in steps.items():
        for _ in range(2):
            if device == "cuda":
                model.zero_grad(set_to_none=True)
                torch.cuda.reset_peak_memory_stats()
                weights = torch.cuda.memory_allocated()
            for given in batches:
                seconds(step, given, model)
            if device == "cuda":
                peaks[name] = (torch.cuda.max_memory_allocated() - weights) / 2**20
        print(name, *(f"{r.name} {r.variant}" for r in liger_compile.reports()), sep="; ")
        liger_compile.clear_reports()
    times = dict.fromkeys(steps, 0.0)
    for given in batches:
        for name, step in steps.items():
            times[name] += seconds(step, given, model)
    live = sum(int(given["attention_mask"].sum()) for given in batches)
    print(machine(device), f"live rows: {live / sum(g['input_ids'].numel() for g in batches):.2f}")
    for name, total in times.items():
        share = f"{total / times['stock']:.3f} of stock's time, {peaks.get(name, 0):.0f} MiB"
        print(f"{name}: {1e3 * total / len(batches):.2f} ms a batch, {share}")
    assert not liger_compile.reports(), "the third epoch compiled"


if __name__ == "__main__":
    main()
