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


class Step:
    """The step of a variant, in the process that is the variant's own."""

    def __init__(self, case: Case, variant: Variant) -> None:
        torch.set_float32_matmul_precision("highest")
        self._device = torch.device(case.device)
        model = MODELS[case.model]
        if variant.patched:
            peer = importlib.import_module("liger_kernel.transformers")
            getattr(peer, f"apply_liger_kernel_to_{model.family}")()
        if variant.memory_budget is not None:
            functorch_config.activation_memory_budget = variant.memory_budget
        self.model: Any = model.build(self._device, case.dtype, case.layers)

        random = torch.Generator().manual_seed(1)
        batch, length = map(int, case.tokens.split("x"))
        ids = torch.randint(self.model.config.vocab_size, (batch, length), generator=random).to(self._device)
        inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if case.use_cache == "off":
            inputs["use_cache"] = False
        if case.attention_mask == "ones":
            inputs["attention_mask"] = torch.ones_like(ids)
        self._inputs = inputs
        self._loss = self._compiled(case, variant)

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
        seconds = [self._clocked() for _ in range(1 + WARMUP)]
        loss = self.run()
        norms = [p.grad.float().norm() for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.stack(norms).norm().item()
        self._clear()
        peak = peak_bytes(self.run) / 2**30 if self._device.type == "cuda" else None
        self._clear()

        import liger_compile

        reports = liger_compile.reports()
        return {
            "compile_s": round(seconds[0] - seconds[-1], 1),
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
            torch.cuda.empty_cache()


class Floor(Step):
    """The GEMMs of all linear layers and causal attention, with nothing around them; loss and memory mean nothing."""

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
            mark()
            for weight in self._weights:
                outer, inner = weight.shape
                torch.mm(self._rows[outer], weight, out=self._products[inner])
                torch.mm(self._rows[outer].t(), self._rows[inner], out=self._gradients[weight.shape])
        for each in attended:
            torch.autograd.grad(each, self._qkv, self._upstream)
        mark()


def serve(case: Case, variant: str) -> None:
    """A variant's process: says what `Step.first` found, then a line for each number of steps that it reads."""
    step = Floor(case) if variant == FLOOR else Step(case, VARIANTS[variant])
    print(json.dumps(step.first()), flush=True)
    for line in sys.stdin:
        print(json.dumps(step.turn(int(line))), flush=True)


class Process:
    """A variant's process, seen from the one that hands out the turns."""

    def __init__(self, case: Case, variant: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._errors = (folder / "stderr").open("w+")
        caches = {
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
            env={**os.environ, **caches},
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

    def turn(self, steps: int) -> Row:
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
        "--at-once", action="store_true", help="start all at the same time: quicker, for a look"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    chosen = parser.parse_args(arguments)
    case = Case(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Case)})
    names = [n for part in chosen.variants.split(",") for n in GROUPS.get(part, (part,))]
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"expected variants of {', '.join(VARIANTS)}, got {', '.join(unknown)}")

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
