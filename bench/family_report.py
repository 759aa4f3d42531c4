"""The CSVs of bench.families as tables in Markdown, and which cases break the promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench.common import Row
from bench.family_step import INDUCTOR, INDUCTOR_AGAIN, LIGER_KERNEL, LIGER_KERNEL_EAGER, OURS
from bench.family_table import CASES

PEERS = (LIGER_KERNEL, LIGER_KERNEL_EAGER)
MOST_NOISE = 1.02  # the share of stock's time that a spread of two stock runs may excuse
TITLES = (
    "case",
    "tokens",
    "inductor, ms",
    "again",
    "liger-kernel",
    "eager",
    'backend="liger"',
    "inductor, MiB",
    "liger-kernel",
    "eager",
    'backend="liger"',
    "first step, s: inductor",
    'backend="liger"',
)
Of = Mapping[str, Row]  # the rows of a case by variant


def page(rows: Sequence[Row]) -> str:
    """A table of times and peaks as shares of stock torch.compile's, what failed and why, and what breaks a promise."""
    found = {case.name: {row["variant"]: row for row in rows if row["case"] == case.name} for case in CASES}
    found = {name: of for name, of in found.items() if of}
    notes: dict[str, int] = {}
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    lines += [f"| {' | '.join(_cells(name, of, notes))} |" for name, of in found.items()]
    lines += ["", *(f"[{number}] {error}  " for error, number in notes.items()), ""]
    for title, breaks in PROMISES.items():
        broken = [f"{name} ({why})" for name, of in found.items() if (why := breaks(of))]
        lines.append(f"- {title}: {', '.join(broken) or 'none'}")
    return "\n".join(lines)


def _cells(name: str, of: Of, notes: dict[str, int]) -> list[str]:
    def cell(variant: str, column: str) -> str:
        row = of.get(variant, {})
        if row.get("error"):
            return f"[{notes.setdefault(row['error'], len(notes) + 1)}]"
        return row.get(column, "")

    times = [cell(variant, "of_inductor") for variant in (INDUCTOR_AGAIN, *PEERS, OURS)]
    peaks = [cell(variant, "peak_of_inductor") for variant in (*PEERS, OURS)]
    return [
        name,
        next(iter(of.values()))["tokens"],
        cell(INDUCTOR, "median_ms"),
        *times,
        cell(INDUCTOR, "peak_mib"),
        *peaks,
        cell(INDUCTOR, "first_s"),
        cell(OURS, "first_s"),
    ]


def _number(of: Of, variant: str, column: str) -> float | None:
    text = of.get(variant, {}).get(column)
    return float(text) if text else None


def _slower(of: Of) -> str:
    """Slower than stock, by more than the spread of two stock runs if that is small."""
    ours, again = _number(of, OURS, "of_inductor"), _number(of, INDUCTOR_AGAIN, "of_inductor") or 1
    return f"{ours}" if ours and ours > min(max(again, 1 / again), MOST_NOISE) else ""


def _above(column: str, others: Sequence[str]) -> Callable[[Of], str]:
    def above(of: Of) -> str:
        ours = _number(of, OURS, column)
        theirs = [value for other in others if (value := _number(of, other, column))]
        share = round(ours / min(theirs), 3) if ours and theirs else 1
        return f"{share}" if share > 1 else ""

    return above


def _failing(of: Of) -> str:
    return of.get(OURS, {}).get("error", "")


PROMISES: Mapping[str, Callable[[Of], str]] = {
    'backend="liger" fails': _failing,
    "slower than stock torch.compile": _slower,
    "higher peak than stock torch.compile": _above("peak_mib", [INDUCTOR]),
    "slower than liger-kernel": _above("median_ms", PEERS),
    "higher peak than liger-kernel": _above("peak_mib", PEERS),
}
