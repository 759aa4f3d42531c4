"""Forward and backward of whole models of transformers: eager, stock torch.compile, liger-kernel, backend="liger".

    python -m bench.train_step --model llama-1b --tokens 4x2048
    python -m bench.train_step --model llama-1b --tokens 4x2048 --variants each     each pattern alone, and left out
    python -m bench.train_step --model tiny --tokens 2x16 --device cpu              shows that it runs

Each variant has a process of its own, with caches of its own, that builds the same model with the same weights. They
take turns, one at a time; docs/benchmarks.md says what is measured. Rows go to bench/results/train_step_<device>.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F

from bench.common import RESULTS, ROOT, Row, file_name, machine, merge_csv, print_row
from bench.models import MODELS
from bench.timing import peak_bytes, spread
from liger_compile.registry import default_patterns

OURS, LIGER_KERNEL, INDUCTOR, FLOOR = "liger-compile", "liger-kernel", "inductor", "floor"
PATTERN_OPS = tuple(dict.fromkeys(pattern.name.partition(".")[0] for pattern in default_patterns()))
BUDGET = 0.8  # of what would be kept for backward; 0.5 was slower and larger (Llama-3.2-1B, 4x2048, H100, 2026-11-22)
LOCK = "BENCH_TRAIN_STEP_LOCK"  # variable of the environment: a file that processes lock
COPIED_ELEMENTS = 2**28  # of the floor at once
LONGEST, MOST_SEQUENCES = 2**18, 2**10  # that are tried
SCALE = "scale"  # what a variant's process reads instead of a number of steps
WARMUP = 2  # steps that are not measured: after the first, which compiles, and in each turn

PACKAGES = ("triton", "transformers", "liger-kernel")
CASE = ("model", "layers", "tokens", "dtype", "returns", "use_cache", "attention_mask", "options", "variant")
KEYS = ("device", "torch", "transformers", *CASE)
WIDTHS = {
    "variant": 29,
    "step_ms": 8,
    "low_ms": 8,
    "high_ms": 8,
    "forward_ms": 10,
    "peak_gib": 8,
    "compile_s": 9,
    "compile_warm_s": 14,
    "loss": 9,
    "grad_norm": 10,
    "replaced": 8,
    "marked": 6,
    "of_floor": 8,
    "time_of_inductor": 16,
    "peak_of_inductor": 16,
    "time_of_liger_kernel": 20,
    "peak_of_liger_kernel": 20,
    "error": 0,
}

SCALE_WIDTHS = {"variant": 29, "longest": 8, "sequences": 9, "length": 7, "seconds": 7, "error": 0}


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
GROUPS: Mapping[str, tuple[str, ...]] = {
    "core": (FLOOR, "eager", INDUCTOR, "inductor loss", LIGER_KERNEL, OURS),
    "peers": tuple(name for name in VARIANTS if not name.startswith(("only ", "without "))),
    "each": (
        INDUCTOR,
        OURS,
        *(name for name in VARIANTS if name.startswith(("only ", "without "))),
    ),
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

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16


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


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Of the processes that are started at once, only one is in here."""
    if LOCK not in os.environ:
        yield
        return
    with open(os.environ[LOCK], "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Step:
    """The step of a variant, in the process that is the variant's own."""

    def __init__(self, case: Case, variant: Variant) -> None:
        torch.set_float32_matmul_precision("highest")
        self._device, self._variant = torch.device(case.device), variant
        model = MODELS[case.model]
        if variant.patched:
            peer = importlib.import_module("liger_kernel.transformers")
            getattr(peer, f"apply_liger_kernel_to_{model.family}")()
        if variant.memory_budget is not None:
            functorch_config.activation_memory_budget = variant.memory_budget
        self.model: Any = model.build(self._device, case.dtype, case.layers)

        self._case = case
        self._inputs = self._inputs_of(*map(int, case.tokens.split("x")))
        self._loss = self._compiled(case, variant)

    def _inputs_of(self, batch: int, length: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(1)
        ids = torch.randint(self.model.config.vocab_size, (batch, length), generator=random).to(self._device)
        inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if self._case.use_cache == "off":
            inputs["use_cache"] = False
        if self._case.attention_mask == "ones":
            inputs["attention_mask"] = torch.ones_like(ids)
        return inputs

    def _compiled(self, case: Case, variant: Variant) -> Callable[..., torch.Tensor]:
        def loss_alone(**inputs: Any) -> torch.Tensor:
            return self.model(**inputs).loss

        returns = variant.returns or case.returns
        function = loss_alone if returns == "loss" else self.model
        if variant.compile is not None:
            arguments = dict(variant.compile)
            if arguments.get("backend") == "liger":
                arguments["options"] = {**arguments["options"], **json.loads(case.options)}
            function = torch.compile(function, **arguments)
        return function

    def first(self) -> Row:
        """Compiles and warms up: seconds of compiling, loss and gradients, peak memory, what was replaced."""
        is_compiled = self._variant.compile is not None
        with contextlib.nullcontext() if is_compiled else alone():
            compiling = self._compiling()
        with alone():
            return self._first(compiling)

    def _first(self, compiling: float) -> Row:
        seconds = [self._clocked() for _ in range(WARMUP)]
        loss = self.run()
        norms = [p.grad.float().norm() for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.stack(norms).norm().item()
        self._clear()
        peak = peak_bytes(self.run) / 2**30 if self._device.type == "cuda" else None
        self._clear()

        import liger_compile

        reports = liger_compile.reports()
        return {
            "compile_s": round(compiling - seconds[-1], 1),
            "loss": round(loss, 5),
            "grad_norm": round(grad_norm, 5),
            "peak_gib": "" if peak is None else round(peak, 2),
            "replaced": sum(report.count("replace") for report in reports),
            "marked": sum(report.count("annotate") for report in reports),
        }

    def turn(self, steps: int) -> Row:
        """Milliseconds of some steps and of their forwards, after some that are not measured."""
        marks = [self._marked() for _ in range(WARMUP + steps)][WARMUP:]
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            marks = [(0.0, a.elapsed_time(b), a.elapsed_time(c)) for a, b, c in marks]
        self._clear()
        return {
            "forward_ms": [forward - begin for begin, forward, _ in marks],
            "step_ms": [end - begin for begin, _, end in marks],
        }

    def run(self, mark: Callable[[], Any] = lambda: None) -> float:
        """Forward and backward from no gradients on; returns the loss."""
        return self._run(mark).item()

    def _run(self, mark: Callable[[], Any]) -> Any:
        self.model.zero_grad(set_to_none=True)
        mark()
        outputs = self._loss(**self._inputs)
        loss = outputs if isinstance(outputs, torch.Tensor) else outputs.loss
        mark()
        loss.backward()
        mark()
        return loss.detach()

    def _marked(self) -> tuple[Any, ...]:
        marks: list[Any] = []

        def mark() -> None:
            if self._device.type == "cuda":
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(1000 * time.perf_counter())

        self._run(mark)  # the CPU may run ahead, as it does in training: no loss is read
        return tuple(marks)

    def fits(self, batch: int, length: int) -> bool:
        """Whether a step of that many tokens fits on the GPU."""
        self._clear()  # of what the step before has left, whole or broken off
        self._inputs = self._inputs_of(batch, length)
        with contextlib.suppress(torch.OutOfMemoryError):
            self.run()
            return True
        return False

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
        with contextlib.suppress(torch.OutOfMemoryError):
            self.run()
            seconds = time.perf_counter() - begin
            self._clear()
            return seconds
        with alone():
            self._clear()
            self.run()
            self._clear()
        return time.perf_counter() - begin

    def _clocked(self) -> float:
        begin = time.perf_counter()
        self.run()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def _clear(self) -> None:
        """Leaves the GPU's memory to the next process, but for the weights."""
        self.model.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


class Floor(Step):
    """The GEMMs of all linear layers, causal attention, and the bytes of the rest; loss and memory mean nothing."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, VARIANTS[FLOOR])
        batch, length = map(int, case.tokens.split("x"))
        config, num_tokens = self.model.config, batch * length

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=self._device, dtype=case.dtype)

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
        self._elements = traffic(self.model, num_tokens)

    def first(self) -> Row:
        for _ in range(1 + WARMUP):
            self._run(lambda: None)
        return {}

    def _run(self, mark: Callable[[], Any]) -> None:
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
            self._copy(self._elements[0])
            mark()
            for weight in self._weights:
                outer, inner = weight.shape
                torch.mm(self._rows[outer], weight, out=self._products[inner])
                torch.mm(self._rows[outer].t(), self._rows[inner], out=self._gradients[weight.shape])
            self._copy(self._elements[1])
        for each in attended:
            torch.autograd.grad(each, self._qkv, self._upstream)
        mark()

    def _copy(self, elements: int) -> None:
        """Reads and writes so many."""
        while elements > 0:
            count = min(elements // 2, COPIED_ELEMENTS)
            torch.neg(self._source[:count], out=self._copied[:count])
            elements -= max(2 * count, 1)


def traffic(model: Any, num_tokens: int) -> tuple[int, int]:
    """The elements that forward and backward must at least read and write, beside their GEMMs and attention.

    Each op as op_table.py has it: norms and the additions before them, rotary, gated activation, loss; the embedding.
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


def serve(case: Case, variant: str) -> None:
    """A variant's process: says what `Step.first` found, then a line for each number of steps that it reads."""
    step = Floor(case) if variant == FLOOR else Step(case, VARIANTS[variant])
    print(json.dumps(step.first()), flush=True)
    for line in sys.stdin:
        print(json.dumps(step.scale() if line.strip() == SCALE else step.turn(int(line))), flush=True)


class Process:
    """A variant's process, seen from the one that hands out the turns."""

    def __init__(self, case: Case, variant: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._errors = (folder / "stderr").open("w+")
        variables = {
            LOCK: str(folder.parent / "lock"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }
        command = [
            sys.executable,
            "-m",
            "bench.train_step",
            "serve",
            json.dumps(dataclasses.asdict(case)),
            variant,
        ]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def answer(self) -> Row:
        """The next that it says. Raises RuntimeError with its last words if it ends instead."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print too
                return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        raise RuntimeError("\n".join(lines[-30:]) or f"ended with {self._process.returncode} and no word")

    def turn(self, steps: int | str) -> Row:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Ends it by the end of its input."""
        try:
            self._process.communicate(timeout=30)
        except (subprocess.TimeoutExpired, BrokenPipeError, ValueError):
            self._process.kill()
            self._process.wait()
        self._errors.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.train_step", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--tokens", required=True, help="batch x length, such as 4x2048")
    parser.add_argument("--layers", type=int, help="instead of the model's")
    parser.add_argument("--variants", default="core", help=f"with commas between; or {', '.join(GROUPS)}")
    parser.add_argument(
        "--returns", choices=("model", "loss"), default="model", help="of the compiled function"
    )
    parser.add_argument(
        "--use-cache", choices=("off", "default"), default="off", help="the argument of the model"
    )
    parser.add_argument("--attention-mask", choices=("none", "ones"), default="none")
    parser.add_argument("--options", default="{}", help='more options for backend="liger", in JSON')
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="measured in a turn")
    parser.add_argument("--warm", action="store_true", help="also compile again from the caches")
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="compile all at the same time; they still take turns to be measured",
    )
    parser.add_argument(
        "--scale", action="store_true", help="instead: the longest sequence and the largest batch that fit"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    chosen = parser.parse_args(arguments)
    case = Case(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Case)})
    names = [n for part in chosen.variants.split(",") for n in GROUPS.get(part, (part,))]
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"expected variants of {', '.join(VARIANTS)}, got {', '.join(unknown)}")

    if chosen.scale:
        found = scaled(case, [name for name in dict.fromkeys(names) if name != FLOOR])
        rows = [
            {**_described(case, name), **row, **machine(case.device, PACKAGES)} for name, row in found.items()
        ]
        for row in rows:
            print_row(row, SCALE_WIDTHS, header=row is rows[0])
        merge_csv(file_name("scale", case.device), rows, KEYS, chosen.out)
        return

    print(f"{case.model}, {case.tokens} tokens, returns {case.returns}", flush=True)
    facts = measure(
        case, list(dict.fromkeys(names)), chosen.rounds, chosen.steps, chosen.warm, chosen.at_once
    )
    rows = [
        {**_described(case, name), **fact, **_ratios(fact, facts), **machine(case.device, PACKAGES)}
        for name, fact in facts.items()
    ]
    for row in rows:
        print_row(row, WIDTHS, header=row is rows[0])
    merge_csv(file_name("train_step", case.device), rows, KEYS, chosen.out)


def measure(
    case: Case, names: Sequence[str], rounds: int, steps: int, warm: bool, at_once: bool
) -> dict[str, Row]:
    """What was found of each variant, in the columns of the CSV."""
    facts: dict[str, Row] = {}
    samples: dict[str, Row] = {name: {"step_ms": [], "forward_ms": []} for name in names}
    with tempfile.TemporaryDirectory() as name_of_folder, contextlib.ExitStack() as opened:
        folder = Path(name_of_folder)

        def started(name: str) -> Process:
            process = Process(case, name, folder / name.replace(" ", "_"))
            opened.callback(process.close)
            return process

        def ready(name: str, process: Process) -> Row:
            begin = time.perf_counter()
            found = process.answer()
            print(f"  {name}: ready after {time.perf_counter() - begin:.0f} s, {found}", flush=True)
            return found

        processes = {name: started(name) for name in names} if at_once else {}
        for name in names:
            with _failing_into(facts, name):
                if not at_once:
                    processes[name] = started(name)
                facts[name] = ready(name, processes[name])
                if at_once:
                    facts[name].pop("compile_s", None)  # with others on the same cores
            if "error" in facts[name]:
                processes.pop(name, None)
        for round_ in range(rounds):
            for name in _rotated(list(processes), round_):
                with _failing_into(facts, name):
                    for key, values in processes[name].turn(steps).items():
                        samples[name][key] += values
                if "error" in facts[name]:
                    processes.pop(name, None)
        opened.close()  # their memory
        for name in list(processes) if warm else ():
            if VARIANTS[name].compile is not None:
                with _failing_into(facts, name):
                    process = started(name)
                    facts[name]["compile_warm_s"] = ready(name, process)["compile_s"]
                    process.close()
    for name, fact in facts.items():
        if "error" not in fact:
            median, low, high = spread(samples[name]["step_ms"])
            fact["step_ms"], fact["low_ms"], fact["high_ms"] = round(median, 2), round(low, 2), round(high, 2)
            fact["forward_ms"] = round(spread(samples[name]["forward_ms"])[0], 2)
            fact["rounds"] = len(samples[name]["step_ms"])
    return facts


def scaled(case: Case, names: Sequence[str]) -> dict[str, Row]:
    """What `Step.scale` found, of one variant after the other: each has the GPU to itself."""
    facts: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with _failing_into(facts, name), contextlib.ExitStack() as opened:
                process = Process(case, name, Path(folder) / name.replace(" ", "_"))
                opened.callback(process.close)
                begin = time.perf_counter()
                process.answer()
                facts[name] = process.turn(SCALE)
                facts[name]["seconds"] = round(time.perf_counter() - begin)
                print(f"  {name}: {facts[name]}", flush=True)
    return facts


@contextlib.contextmanager
def _failing_into(facts: dict[str, Row], name: str) -> Iterator[None]:
    """A variant that fails is reported in its row, and the others go on."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        print(f"  {name} failed:\n{error}", flush=True)
        facts[name] = {"error": str(error).splitlines()[-1][:200]}


def _rotated(names: list[str], by: int) -> list[str]:
    by %= max(len(names), 1)
    return names[by:] + names[:by]


def _described(case: Case, name: str) -> Row:
    """The columns that say what was measured."""
    row = {key: getattr(case, key, "") for key in CASE}
    layers = MODELS[case.model].sizes["num_hidden_layers"] if case.layers is None else case.layers
    is_ours = (VARIANTS[name].compile or {}).get("backend") == "liger"
    return {
        **row,
        "layers": layers,
        "dtype": str(case.dtype).removeprefix("torch."),
        "returns": VARIANTS[name].returns or case.returns,
        "options": case.options if is_ours else "{}",
        "variant": name,
    }


def _ratios(fact: Row, facts: Mapping[str, Row]) -> Row:
    """Time and peak memory as shares of those of two peers in the same run, and times the floor."""
    floor = facts.get(FLOOR, {}).get("step_ms")
    shares: Row = {"of_floor": round(fact["step_ms"] / floor, 3) if floor and "step_ms" in fact else ""}
    for peer in (INDUCTOR, LIGER_KERNEL):
        other = facts.get(peer, {})
        for column, key in (("time", "step_ms"), ("peak", "peak_gib")):
            mine, theirs = fact.get(key), other.get(key)
            name = f"{column}_of_{peer.replace('-', '_')}"
            shares[name] = round(mine / theirs, 3) if mine and theirs else ""
    return shares


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Case(**json.loads(sys.argv[2])), sys.argv[3])
    else:
        main()
