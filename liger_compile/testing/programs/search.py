"""Runs one Hypothesis search for a wrong program, in this process."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Flaky
from hypothesis.strategies import sampled_from

from liger_compile.testing.programs.differential import Verdict, check
from liger_compile.testing.programs.program import Program
from liger_compile.testing.programs.strategies import programs

SHRINK_SECONDS = 90  # time limit for shrinking a wrong program


@dataclass(frozen=True)
class Settings:
    """The settings of the check of programs; see `differential.check`."""

    policies: tuple[str, ...] = ("auto", "always", "auto", "never")  # each program runs under one of them
    inner: str = "aot_eager"
    device: str = "cpu"


def search(seed: int, how: Settings, count: int) -> tuple[Counter[str], str]:
    """Draws programs until one is wrong. Returns counts of the verdicts, and the shrunk wrong program as text."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    last: list[tuple[Program, Verdict]] = []

    first = 0.0  # the time at which the first wrong program was found

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[*HealthCheck],  # pyright: ignore[reportArgumentType]
        report_multiple_bugs=False,
    )
    @given(programs, sampled_from(how.policies))
    def try_one(program: Program, policy: str) -> None:
        nonlocal first
        if last and time.monotonic() - first > SHRINK_SECONDS:
            return  # the time for shrinking is over
        verdict = check(program, (policy,), how.inner, device=how.device)
        if not last:
            counts.update({verdict.kind: 1, "with a rewrite": int(verdict.replaced > 0)})
        if verdict.kind == "wrong":
            first = first or time.monotonic()
            last.append((program, verdict))
            raise AssertionError

    try:
        try_one()
    except (AssertionError, Flaky):  # flaky: Hypothesis runs the last one again after the time for shrinking
        if not last:
            raise
        program, verdict = last[-1]
        return counts, f"{program}\n" + "\n".join(map(str, verdict.findings))
    return counts, ""


def worker(task: tuple[int, Settings, int]) -> tuple[int, Counter[str], str]:
    """Returns the seed and the result of `search` for it; for a pool of processes."""
    seed, how, count = task
    try:
        return seed, *search(seed, how, count)
    except Exception:  # the harness failed, which counts as a fault too
        return seed, Counter(), f"the search failed: {traceback.format_exc()[-1500:]}"
