"""One training step of a model, in the ways that bench.train_step compares: what a process of that bench runs."""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from bench.common import Row
from bench.models import MODELS
from bench.process import PROGRESS
from bench.turns import WARMUP, Turns, alone, one_of_few, suppressing_out_of_memory
from liger_compile.patterns import DEFAULT_PATTERNS

OURS, LIGER_KERNEL, INDUCTOR, FLOOR = "liger-compile", "liger-kernel", "inductor", "floor"
PATTERN_OPS = tuple(dict.fromkeys(pattern.name.partition(".")[0] for pattern in DEFAULT_PATTERNS))
BUDGET = 0.8  # of what would be kept for backward; 0.5 was slower and larger (Llama-3.2-1B, 4x2048, H100, 2026-11-22)
NONE, DDP, FSDP = "none", "ddp", "fsdp"
TP, LOSS_PARALLEL = "tp", "loss-parallel"  # tensor parallel; the logits are gathered, or remain divided
PARALLELS = (DDP, FSDP, TP, LOSS_PARALLEL)
COPIED_ELEMENTS = 2**28  # of the floor at once
LONGEST, MOST_SEQUENCES = 2**18, 2**10  # that are tried


@dataclass(frozen=True)
class Variant:
    """How the step is compiled. `compile`: arguments of torch.compile; None is eager."""

    compile: Mapping[str, Any] | None = None
    returns: str | None = None  # what leaves the compiled function, where that is not the user's to choose
    patched: bool = False  # by liger-kernel
    memory_budget: float | None = None


def _ours(*skip: str) -> Variant:
    return Variant({"backend": "liger", "options": {"liger.skip": skip}})


VARIANTS: Mapping[str, Variant] = {
    FLOOR: Variant(),
    "eager": Variant(),
    INDUCTOR: Variant({}),
    "inductor loss": Variant({}, returns="loss"),
    "inductor auto_chunker": Variant({"options": {"auto_chunker.enable": True}}, returns="loss"),
    f"inductor memory_budget={BUDGET}": Variant({}, memory_budget=BUDGET),
    LIGER_KERNEL: Variant(patched=True),
    "liger-kernel inductor": Variant({}, patched=True),
    OURS: _ours(),
    **{f"only {op}": _ours(*(other for other in PATTERN_OPS if other != op)) for op in PATTERN_OPS},
    **{f"without {op}": _ours(op) for op in PATTERN_OPS},
}


@dataclass(frozen=True)
class Case:
    """One training step. `tokens` is batch x length."""

    model: str
    tokens: str
    layers: int | None = None
    returns: str = "model"
    use_cache: str = "off"
    attention_mask: str = "none"
    device: str = "cuda"
    options: str = "{}"  # more of torch.compile's for backend="liger", in JSON
    parallel: str = NONE  # or one of PARALLELS; FSDP is FSDP2's
    processes: int = 1  # with a GPU each; all are given the same tokens

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16


PADDED = {"ones": 0.0, "quarter": 0.25, "half": 0.5}  # the share of padding, by name of the attention mask


def padding_mask(ids: torch.Tensor, share: float) -> torch.Tensor:
    """Ones, and zeros at the end of rows of evenly spread lengths; a `share` of all tokens is padding."""
    batch, length = ids.shape
    padded = (torch.arange(batch) + 0.5) * (2 * share * length / batch)
    at = torch.arange(length, device=ids.device)
    return (at < length - padded.round().to(ids.device)[:, None]).long()


def largest(fits: Callable[[int], bool], first: int, most: int) -> int:
    """The largest number up to `most` that fits, to an eighth: doubled from `first`, then between the last two.

    0 if `first` does not fit.
    """
    low, high = 0, first
    while fits(high):
        low, high = high, min(2 * high, most)
        if low == most:
            return most
    precision = max((high - low) // 8, 1)
    while low and high - low > precision:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Step(Turns):
    """The step of a variant, in the process that is the variant's own."""

    def __init__(self, case: Case, variant: Variant) -> None:
        torch.set_float32_matmul_precision("highest")
        self.device, self._variant = torch.device(case.device), variant
        model = MODELS[case.model]
        if variant.patched:
            patch(model.family)
        if variant.memory_budget is not None:
            functorch_config.activation_memory_budget = variant.memory_budget
        self.model: Any = model.build(self.device, case.dtype, case.layers)
        self._parallel = parallelized(self.model, case)
        self._case = case
        self._inputs = self._inputs_of(*map(int, case.tokens.split("x")))
        self._loss = self._compiled(case, variant)

    def _inputs_of(self, batch: int, length: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(1)
        ids = torch.randint(self.model.config.vocab_size, (batch, length), generator=random).to(self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if self._case.use_cache == "off" and MODELS[self._case.model].is_causal:
            inputs["use_cache"] = False
        if self._case.attention_mask != "none":
            inputs["attention_mask"] = mask = padding_mask(ids, PADDED[self._case.attention_mask])
            inputs["labels"] = ids.masked_fill(mask == 0, -100)
        return inputs

    def _compiled(self, case: Case, variant: Variant) -> Callable[..., torch.Tensor]:
        def loss_alone(**inputs: Any) -> torch.Tensor:
            return self._parallel(**inputs).loss

        returns = variant.returns or case.returns
        function = loss_alone if returns == "loss" else self._parallel
        if variant.compile is not None:
            arguments = dict(variant.compile)
            if arguments.get("backend") == "liger":
                arguments["options"] = {**arguments["options"], **json.loads(case.options)}
            function = torch.compile(function, **arguments)
        return function

    def first(self) -> Row:
        """Compiles and warms up: seconds of compiling, loss and gradients, peak memory, what was replaced."""
        is_compiled = self._variant.compile is not None
        with one_of_few() if is_compiled else alone():
            compiling = self._compiling()
        with alone():
            return self._first(compiling)

    def _first(self, compiling: float) -> Row:
        found = self.settle()
        peak = found["peak"]

        import liger_compile

        reports = liger_compile.reports()
        return {
            "compile_s": round(compiling - found["step_s"], 1),
            "loss": round(found["loss"], 5),
            "grad_norm": round(found["grad_norm"], 5),
            "peak_gib": "" if peak == "" else round(peak / 2**30, 2),
            "replaced": sum(report.count("replace") for report in reports),
            "marked": sum(report.count("annotate") for report in reports),
        }

    def turn(self, steps: int) -> Row:
        """As of any step; then leaves the memory to the next process."""
        found = super().turn(steps)
        self.clear()
        return found

    def run_marked(self, mark: Callable[[], Any]) -> Any:
        self.model.zero_grad(set_to_none=True)
        mark()
        with loss_parallel() if self._case.parallel == LOSS_PARALLEL else contextlib.nullcontext():
            outputs = self._loss(**self._inputs)
            loss = outputs if isinstance(outputs, torch.Tensor) else outputs.loss
            mark()
            loss.backward()
        mark()
        return loss.detach().full_tensor() if isinstance(loss, dist.tensor.DTensor) else loss.detach()

    def fits(self, batch: int, length: int) -> bool:
        """Whether a step of that many tokens fits on the GPU."""
        self.clear()  # of what the step before has left, whole or broken off
        self._inputs = self._inputs_of(batch, length)
        begin, fits = time.perf_counter(), False
        with suppressing_out_of_memory():
            self.run()
            fits = True
        verdict = "fits" if fits else "does not fit"
        print(f"{PROGRESS}{batch}x{length} {verdict}, {time.perf_counter() - begin:.0f} s", flush=True)
        return fits

    def scale(self) -> Row:
        """The longest sequence, and the most sequences of the case's length, of which a step fits on the GPU."""
        batch, length = map(int, self._case.tokens.split("x"))
        most = getattr(self.model.config, "max_position_embeddings", 2**20)
        longest = largest(lambda count: self.fits(1, count), length, min(most, LONGEST))
        sequences = largest(lambda count: self.fits(count, length), batch, MOST_SEQUENCES)
        return {"longest": longest, "sequences": sequences, "length": length}

    def _compiling(self) -> float:
        """Seconds of the first step. Where others have taken the memory, it has another try when they have stopped."""
        begin = time.perf_counter()
        with suppressing_out_of_memory():
            self.run()
            seconds = time.perf_counter() - begin
            self.clear()
            return seconds
        with alone():
            self.clear()
            self.run()
            self.clear()
        return time.perf_counter() - begin


def patch(family: str) -> None:
    """Has liger-kernel patch a family of transformers' models."""
    peer = importlib.import_module("liger_kernel.transformers")
    getattr(peer, f"apply_liger_kernel_to_{family}")()


def parallelized(model: Any, case: Case) -> Any:
    """What is called instead of the model where several processes share the work."""
    if case.parallel == DDP:
        return torch.nn.parallel.DistributedDataParallel(model)
    if case.parallel == FSDP:
        mesh = dist.device_mesh.init_device_mesh(case.device, (case.processes,))
        for layer in (*model.model.layers, model):
            dist.fsdp.fully_shard(layer, mesh=mesh)
    if case.parallel in (TP, LOSS_PARALLEL):
        mesh = dist.device_mesh.init_device_mesh(case.device, (case.processes,))
        parallelize_module(model, mesh, _plan(is_gathered=case.parallel == TP))
    return model


def _plan(*, is_gathered: bool) -> dict[str, Any]:
    """The tensor-parallel plan of transformers' Llama: attention, MLP and head. A head of its own, if it was tied."""
    columns = [f"model.layers.*.self_attn.{name}_proj" for name in "qkv"]
    columns += [f"model.layers.*.mlp.{name}_proj" for name in ("gate", "up")]
    rows = ["model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj"]
    head = (
        ColwiseParallel(output_layouts=Replicate())
        if is_gathered
        else ColwiseParallel(use_local_output=False)
    )
    return {
        **{name: ColwiseParallel() for name in columns},
        **{name: RowwiseParallel() for name in rows},
        "lm_head": head,
    }


class Floor(Step):
    """The GEMMs of all linear layers, causal attention, and the bytes of the rest; loss and memory mean nothing."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, VARIANTS[FLOOR])
        batch, length = map(int, case.tokens.split("x"))
        config, num_tokens = self.model.config, batch * length

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=self.device, dtype=case.dtype)

        self._weights = [m.weight for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        widths = {width for weight in self._weights for width in weight.shape}
        self._rows = {width: random(num_tokens, width) for width in widths}
        self._products = {width: torch.empty_like(rows) for width, rows in self._rows.items()}
        self._gradients = {weight.shape: torch.empty_like(weight) for weight in self._weights}
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self._qkv = [random(batch, n, length, config.head_dim).requires_grad_() for n in heads]
        self._upstream = torch.randn_like(self._qkv[0])
        self._source = random(COPIED_ELEMENTS)
        self._copied = torch.empty_like(self._source)
        self.elements = traffic(self.model, num_tokens)

    def first(self) -> Row:
        for _ in range(1 + WARMUP):
            self.run_marked(lambda: None)
        return {}

    def run_marked(self, mark: Callable[[], Any]) -> None:
        q, k, v = self._qkv
        mark()
        attended = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            for _ in range(self.model.config.num_hidden_layers)
        ]
        with torch.no_grad():
            for weight in self._weights:
                outer, inner = weight.shape
                torch.mm(self._rows[inner], weight.t(), out=self._products[outer])
            self._copy(self.elements[0])
            mark()
            for weight in self._weights:
                outer, inner = weight.shape
                torch.mm(self._rows[outer], weight, out=self._products[inner])
                torch.mm(self._rows[outer].t(), self._rows[inner], out=self._gradients[weight.shape])
            self._copy(self.elements[1])
        for output in attended:
            torch.autograd.grad(output, self._qkv, self._upstream)
        mark()

    def _copy(self, elements: int) -> None:
        """Reads and writes so many."""
        while elements > 0:
            count = min(elements // 2, COPIED_ELEMENTS)
            torch.neg(self._source[:count], out=self._copied[:count])
            elements -= max(2 * count, 1)


def traffic(model: Any, num_tokens: int) -> tuple[int, int]:
    """The elements that forward and backward must at least read and write, beside their GEMMs and attention.

    Norms and the additions before them, rotary, the gate of the MLP, loss; the embedding.
    """
    config = model.config
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = config.num_attention_heads + config.num_key_value_heads
    norms = [m.weight.numel() for name, m in model.named_modules() if name.endswith("norm")]
    wide = norms.count(hidden)
    of_heads = heads * config.head_dim * any(width == config.head_dim for width in norms)
    forward = (2 * wide + 2 * 2 * layers) * hidden + 2 * layers * heads * config.head_dim + 3 * layers * inner
    backward = (3 * wide + 2 * layers) * hidden + layers * (
        2 * heads * config.head_dim + of_heads + 6 * inner
    )
    loss, embedding = 2 * config.vocab_size, 2 * hidden
    forward = num_tokens * (forward + loss + embedding)
    return forward, num_tokens * (backward + hidden) + config.vocab_size * hidden
