"""What a step keeps for backward besides parameters, with DDP and without, counted on a CPU.

    python -m bench.ddp_kept

DDP's optimizer in torch.compile cuts a graph in parts, and what passes from one to the next is kept. Models of
transformers with 12 layers, bfloat16, buckets of 1 MiB: fewer than a layer has, as DDP's 25 MiB are in models of a
billion parameters. Rows go to bench/results/ddp_kept_cpu.csv.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel

import liger_compile
from bench.common import Row, file_name, machine, merge_csv, print_row
from liger_compile.forward_passes.buckets import Places, places_to_cut

BATCH, LENGTH, VOCABULARY, BUCKET_MIB = 4, 128, 4096, 1
_SIZES = {
    "num_hidden_layers": 12,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
_GPT2 = {"n_layer": 12, "n_embd": 256, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": _SIZES,
    "Qwen3ForCausalLM": _SIZES,
    "Gemma2ForCausalLM": _SIZES,
    "GPT2LMHeadModel": _GPT2,
}
ALONE, ANYWHERE, *_ = WAYS = (
    "without DDP",
    "parts begin anywhere",
    "parts begin where layers do",
)
KEYS = ("family", "way", "device", "torch", "transformers")
WIDTHS = {"family": 18, "way": 28, "kept_mib": 8, "parts": 5}


def kept_bytes(model: torch.nn.Module, function: Callable[..., Any], **inputs: Any) -> int:
    """Of the storages that a forward saves, without those of parameters."""
    sizes: dict[int, int] = {}

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        outputs = function(**inputs)
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    outputs.loss.backward()
    return sum(sizes.values())


def measured(family: str, way: str) -> Row:
    torch.compiler.reset()
    liger_compile.clear_reports()
    torch.manual_seed(0)
    kind = getattr(transformers, family)
    model = kind(kind.config_class(vocab_size=VOCABULARY, **FAMILIES[family])).to(torch.bfloat16)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    called = model if way == ALONE else DistributedDataParallel(model, bucket_cap_mb=BUCKET_MIB)
    function = torch.compile(called, backend="liger", options={"liger.inner": "aot_eager"})
    function(**inputs).loss.backward()
    parts = len(liger_compile.reports())
    return {
        "family": family,
        "way": way,
        "kept_mib": round(kept_bytes(model, function, **inputs) / 2**20, 1),
        "parts": parts,
    }


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows = []
    for family in FAMILIES:
        for way in WAYS:
            places = (lambda *_: Places()) if way == ANYWHERE else places_to_cut
            with mock.patch("liger_compile.forward_passes.split_for_ddp.places_to_cut", places):
                row = measured(family, way)
            print_row(row, WIDTHS, header=not rows)
            rows.append({**row, **machine("cpu")})
    dist.destroy_process_group()
    merge_csv(file_name("ddp_kept", "cpu"), rows, KEYS)


if __name__ == "__main__":
    main()
