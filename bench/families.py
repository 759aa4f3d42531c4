"""Many kinds of models and steps: stock torch.compile, liger-kernel and backend="liger", each in a process of its own.

    python -m bench.families                          all cases, about twenty minutes on one H200 with 16 cores
    python -m bench.families --part 1/2 --limit 570   every second case; names those that the time did not suffice for
    python -m bench.families --cases gpt2,bert        some of them
    python -m bench.families --tiny --device cpu      small sizes, to check that it runs; writes a CSV only with --out
    python -m bench.families --table                  the CSVs of bench/results as tables for docs/benchmarks.md

The cases are in bench/family_table.py. bench/README.md states what is measured. Rows go to
bench/results/families_<device>.csv, those of a case as soon as it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bench.common import RESULTS, Row, file_name, machine, merge_csv, print_row, read_csv
from bench.family_report import page
from bench.family_step import AGAIN, INDUCTOR, SETTLE, VARIANTS, variant_of
from bench.family_table import BY_NAME, Case
from bench.process import Process, reason, rotated
from bench.timing import spread
from bench.turns import LOCK, SLOT, SLOTS

PACKAGES = ("triton", "transformers", "liger-kernel", "peft")
KEYS = ("device", "torch", "transformers", "case", "variant")
WIDTHS = {
    "case": 23,
    "variant": 18,
    "median_ms": 9,
    "low_ms": 8,
    "high_ms": 8,
    "of_inductor": 11,
    "launch_ms": 9,
    "peak_mib": 9,
    "peak_of_inductor": 16,
    "first_s": 7,
    "loss": 9,
    "grad_norm": 10,
    "replaced": 8,
    "error": 0,
}
FACTS = (
    "median_ms",
    "low_ms",
    "high_ms",
    "steps",
    "launch_ms",
    "peak_mib",
    "first_s",
    "loss",
    "eager_loss",
    "grad_norm",
)
TURN_SECONDS, FEWEST_STEPS, MOST_STEPS = 0.15, 3, 20  # of measured steps in a turn
MEASURING = 12  # seconds that a case may need to be measured
TURN_PATIENCE = 60  # seconds for one turn
_OF_VARIANTS = "with commas between; also ours with options, as in liger-compile:outline=auto:skip=rotary+mlp"
_LOOK = 0.05  # seconds between looks at the processes that compile


@dataclass(frozen=True)
class Plan:
    """How many processes at once, and how long.

    Args:
        at_once: processes that compile at the same time.
        batch: cases that are compiled together and then measured. Their weights stay on the GPU meanwhile.
        patience: seconds for the first step of a process.
        end: when the program has to end, on time.monotonic.
    """

    variants: Sequence[str]
    device: str
    compiler: str
    tiny: bool
    at_once: int
    batch: int
    rounds: int
    patience: float
    end: float


@dataclass
class Entrant:
    """A variant of a case: its process, what was found so far, and until when the first step has to end."""

    name: str
    process: Process
    deadline: float
    fact: Row = field(default_factory=dict)

    @property
    def has_failed(self) -> bool:
        return "error" in self.fact

    def has_answered(self) -> bool:
        """Whether the first step has ended or failed."""
        with self._failing():
            answer = self.process.poll()
            if answer is not None:
                print(f"  {self.name}: {answer}", flush=True)
                self._take(answer)
            elif time.monotonic() > self.deadline:
                raise TimeoutError("the first step took too long")
        return bool(self.fact)

    def ask(self, line: str | int, deadline: float) -> None:
        with self._failing():
            self.process.ask(line)
            self._take(self.process.answer(deadline))

    def _take(self, answer: Row) -> None:
        self.fact.update(answer)
        if self.has_failed:
            raise RuntimeError(self.fact["error"])

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """A process that fails, dies or takes too long is ended, and the others go on."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            self.fact["error"] = reason(error)
            print(f"  {self.name}: {self.fact['error']}", flush=True)
            self.process.close(patience=0)


Known = TypeVar("Known")
Entrants = dict[tuple[str, str], Entrant]  # by case and variant


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    folder = chosen.out or (None if chosen.tiny else RESULTS)
    if chosen.table:
        for path in sorted((chosen.out or RESULTS).glob("families_*.csv")):
            print(f"{path.name}\n\n{page(read_csv(path))}\n")
        return
    cases = _of_part(_named(chosen.cases, BY_NAME, parser), chosen.part, parser)
    variants = chosen.variants.split(",")
    try:
        for variant in variants:
            variant_of(variant)
    except (LookupError, ValueError) as error:
        parser.error(str(error))
    plan = Plan(
        variants,
        chosen.device,
        chosen.compiler,
        chosen.tiny,
        chosen.at_once,
        chosen.batch or 1 + -(-chosen.at_once // len(variants)),
        chosen.rounds,
        chosen.patience,
        time.monotonic() + chosen.limit,
    )
    bench, left = "families_tiny" if plan.tiny else "families", [case.name for case in cases]
    for case, facts in measured(cases, plan):
        left.remove(case.name)
        rows = rows_of(case, facts, plan)
        for row in rows:
            print_row(row, WIDTHS, header=row is rows[0])
        if folder is not None:
            merge_csv(file_name(bench, plan.device), rows, KEYS, folder)
    if left:
        print(f"not measured for lack of time: --cases {','.join(left)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bench.families", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(BY_NAME), help="with commas between; all by default")
    parser.add_argument("--part", default="1/1", help="such as 1/2 and 2/2: every second case")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=_OF_VARIANTS)
    parser.add_argument("--at-once", type=int, default=max(_cores() - 1, 1), help="processes that compile")
    parser.add_argument("--batch", type=int, help="cases that are compiled together")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--limit", type=float, default=3600, help="seconds until it ends with what it has")
    parser.add_argument("--patience", type=float, default=200, help="seconds for the first step of a process")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to check that it runs")
    parser.add_argument("--compiler", default=INDUCTOR, help="of torch.compile, and behind backend='liger'")
    parser.add_argument("--table", action="store_true", help="print the tables of the CSVs instead")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="folder of the CSV, instead of bench/results")
    return parser


def _named(names: str, known: Mapping[str, Known], parser: argparse.ArgumentParser) -> dict[str, Known]:
    chosen = names.split(",")
    if unknown := set(chosen) - set(known):
        parser.error(f"expected names of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return {name: known[name] for name in chosen}


def _of_part(cases: Mapping[str, Case], part: str, parser: argparse.ArgumentParser) -> list[Case]:
    first, _, parts = part.partition("/")
    if not (first.isdigit() and parts.isdigit() and 1 <= int(first) <= int(parts)):
        parser.error(f"expected --part such as 1/2, got {part}")
    return list(cases.values())[int(first) - 1 :: int(parts)]


def measured(cases: Sequence[Case], plan: Plan) -> Iterator[tuple[Case, dict[str, Row]]]:
    """The facts of each case by variant, one batch of cases after the other.

    Cases are left out of which not all variants could end their first step before the end.
    """
    for begin in range(0, len(cases), plan.batch):
        yield from _measured_batch(cases[begin : begin + plan.batch], plan)


def _measured_batch(cases: Sequence[Case], plan: Plan) -> Iterator[tuple[Case, dict[str, Row]]]:
    """Compiles side by side, and measures case after case once nothing compiles any more."""
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        entrants = _compiled(cases, plan, Path(folder), opened)
        for case in cases:
            own = {v: entrants[case.name, v] for v in plan.variants if (case.name, v) in entrants}
            if len(own) == len(plan.variants):
                yield case, _measured_case(own, plan)
            for entrant in own.values():
                entrant.process.close(patience=0)  # its memory


def _compiled(cases: Sequence[Case], plan: Plan, folder: Path, opened: contextlib.ExitStack) -> Entrants:
    """All whose first step has ended or failed, without those for which the time was over."""
    waiting = [(case.name, variant) for case in cases for variant in plan.variants]
    entrants: Entrants = {}
    compiling: list[tuple[str, str]] = []
    end = plan.end - MEASURING * len(cases)
    while (compiling or waiting) and time.monotonic() < end:
        while waiting and len(compiling) < plan.at_once:
            key = waiting.pop(0)
            entrants[key] = started(key, len(entrants), plan, folder)
            opened.callback(entrants[key].process.close, patience=0)
            compiling.append(key)
        compiling = [key for key in compiling if not entrants[key].has_answered()]
        time.sleep(_LOOK)
    for key in compiling:
        entrants.pop(key).process.close(patience=0)
    for key, entrant in list(entrants.items()):  # one after the other: now the others leave them the memory
        if AGAIN in entrant.fact and time.monotonic() > end:
            del entrants[key]
        elif AGAIN in entrant.fact:
            entrant.ask(AGAIN, min(time.monotonic() + plan.patience, plan.end))
            entrant.fact.pop("first_s", None)
    return entrants


def started(key: tuple[str, str], number: int, plan: Plan, folder: Path) -> Entrant:
    """A process with caches of its own, and with its share of the cores. `number`: of those before it."""
    own, threads = folder / f"{number}-{key[0]}", str(max(_cores() // plan.at_once, 1))
    variables = {
        LOCK: str(folder / "lock"),
        SLOT: str(number % SLOTS),
        "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor"),
        "TRITON_CACHE_DIR": str(own / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
    }
    process = Process(command_of(*key, plan), variables, own)
    return Entrant(" ".join(key), process, time.monotonic() + plan.patience)


def command_of(case: str, variant: str, plan: Plan) -> list[str]:
    more = ["--compiler", plan.compiler, *(["--tiny"] if plan.tiny else [])]
    return [sys.executable, "-m", "bench.family_step", case, variant, plan.device, *more]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _measured_case(entrants: Mapping[str, Entrant], plan: Plan) -> dict[str, Row]:
    """The variants of a case in turns, with nothing else at work."""
    samples: dict[str, list[float]] = {variant: [] for variant in entrants}
    for variant in _alive(entrants):
        entrants[variant].ask(SETTLE, time.monotonic() + TURN_PATIENCE)
    slowest = max((entrants[variant].fact["step_s"] for variant in _alive(entrants)), default=1)
    steps = min(max(round(TURN_SECONDS / slowest), FEWEST_STEPS), MOST_STEPS)
    for round_ in range(plan.rounds):
        if round_ and time.monotonic() > plan.end:
            break
        for variant in rotated(_alive(entrants), round_):
            entrants[variant].ask(steps, time.monotonic() + TURN_PATIENCE)
            samples[variant] += entrants[variant].fact.pop("step_ms", [])
    for variant in _alive(entrants):
        median, low, high = (round(ms, 3) for ms in spread(samples[variant]))
        steps = len(samples[variant])
        entrants[variant].fact.update(median_ms=median, low_ms=low, high_ms=high, steps=steps)
    return {variant: entrant.fact for variant, entrant in entrants.items()}


def _alive(entrants: Mapping[str, Entrant]) -> list[str]:
    return [variant for variant, entrant in entrants.items() if not entrant.has_failed]


def rows_of(case: Case, facts: Mapping[str, Row], plan: Plan) -> list[Row]:
    """The rows of the CSV: what was measured, shares of stock torch.compile, and where."""
    stock = facts.get(INDUCTOR, {})
    where = machine(plan.device, PACKAGES)
    return [
        {
            "case": case.name,
            "model": case.model,
            "tokens": case.tiny_tokens if plan.tiny else case.tokens,
            "weights": str(case.weights).removeprefix("torch."),
            "variant": variant,
            **{name: fact.get(name, "") for name in FACTS},
            "of_inductor": _share(fact.get("median_ms"), stock.get("median_ms")),
            "peak_of_inductor": _share(fact.get("peak_mib"), stock.get("peak_mib")),
            "replaced": fact.get("replaced", ""),
            "error": fact.get("error", ""),
            **where,
        }
        for variant, fact in facts.items()
    ]


def _share(mine: float | str | None, of: float | str | None) -> float | str:
    return round(float(mine) / float(of), 3) if mine and of else ""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all processes are ended
    main()
