"""Lays out a report as lines of text. The strings are written where they arise; nothing here decides anything."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from liger_compile.report.report import GraphReport, Near, Site

T = TypeVar("T")
WIDTH = 110
NO_PASSES = "did not run yet: backward is compiled later, or Inductor's cache has its code"
MAX_NEAR_MISSES = 12  # in the text; to_dict() has all of them

Row = tuple[Sequence[str], Sequence[str], str]  # cells; lines under the last cell; a sentence under them


def details(report: GraphReport) -> list[str]:
    """Returns the lines below the summary."""
    headings = {
        "replace": "Replaced",
        "annotate": "Left to Inductor, marked as cheap to recompute",
        "leave": "Left alone",
    }
    lines: list[str] = []
    for kind, heading in headings.items():
        sites = [site for site in report.sites if site.kind == kind]
        groups = _grouped(sites, key=lambda site: (site.pattern, site.reason))
        groups.sort(key=lambda group: (-sum(site.saved_bytes or 0 for site in group), group[0].pattern))
        lines += _section(heading, [_site_row(group) for group in groups])
    nearest_first = sorted(report.near_misses, key=lambda near: -near.score)
    groups = _grouped(nearest_first, key=lambda near: (near.pattern, near.reason, near.place.source))
    rows = [_near_row(group) for group in groups[:MAX_NEAR_MISSES]]
    lines += _section("Near misses: similar to a pattern, not replaced because they differ from it", rows)
    if len(groups) > MAX_NEAR_MISSES:
        lines.append(f"  and {len(groups) - MAX_NEAR_MISSES} more, in to_dict()")
    groups = _grouped(report.backward.sites, key=lambda site: (site.pattern, site.reason))
    rows = [_site_row(group) for group in groups]
    rows += [((name, "", ""), (), sentence) for name, sentence in report.backward.choices.items()]
    if rows and report.backward.has_passes and not report.backward.is_compiled:
        rows.append((("passes", "", ""), (), NO_PASSES))
    lines += _section("In backward", rows)
    if notes := (*report.notes, *report.late_notes):
        lines += ["", "Notes"]
        for note in notes:
            lines += textwrap.wrap(note, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return lines


def _site_row(sites: Sequence[Site]) -> Row:
    first = sites[0]
    sizes = [site.saved_bytes for site in sites if site.kind != "leave" and site.saved_bytes is not None]
    parts = [
        " ".join(dict.fromkeys(site.place.source for site in sites)),
        ("-> " + ", ".join(first.ops)) if first.ops else "",
        " ".join(dict.fromkeys(site.result for site in sites)),
    ]
    cells = [first.pattern, f"{len(sites)}x", size(sum(sizes)) if any(sizes) else ""]
    return cells, [*_places(sites), "  ".join(filter(None, parts))], first.reason


def _near_row(nears: Sequence[Near]) -> Row:
    first = nears[0]
    code = f"{first.place.source}  {first.place.code}".strip()
    cells = [first.pattern, f"{len(nears)}x", f"{first.score:.0%} alike"]
    return cells, [*_places(nears), code], first.reason


def _section(heading: str, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(cells[column]) for cells, _, _ in rows) for column in range(3)]
    margin = " " * (2 + sum(widths) + 3 * 3)
    lines = ["", heading]
    for (name, count, figure), under, reason in rows:
        start = f"  {name:<{widths[0]}}   {count:>{widths[1]}}   {figure:>{widths[2]}}   "
        under = [line for line in under if line]
        lines += [(start + (under[0] if under else "")).rstrip(), *(margin + line for line in under[1:])]
        lines += textwrap.wrap(reason, WIDTH, initial_indent="      ", subsequent_indent="      ")
    return lines


def _grouped(items: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _places(items: Iterable[Site | Near]) -> list[str]:
    lines: list[str] = []
    for same_class in _grouped((item.place for item in items), key=lambda place: place.module_class):
        suffix = f" ({same_class[0].module_class})" if same_class[0].module_class else ""
        lines += [(path + suffix).strip() for path in folded({place.module: None for place in same_class})]
    return lines


def folded(paths: Iterable[str]) -> list[str]:
    """Returns `["h.0.mlp", "h.1.mlp"]` as `["h.{0..1}.mlp"]`; merges the paths component by component."""
    rows = [tuple(path.split(".")) for path in paths]
    for depth in range(max(map(len, rows))):

        def key(row: tuple[str, ...], depth: int = depth) -> tuple[Any, ...]:
            numbered = depth < len(row) and row[depth].isdigit()
            return (*row[:depth], None, *row[depth + 1 :]) if numbered else row

        rows = [group[0] if len(group) == 1 else _merged(group, depth) for group in _grouped(rows, key)]
    return [".".join(row) for row in rows]


def _merged(rows: Sequence[tuple[str, ...]], depth: int) -> tuple[str, ...]:
    numbers = sorted(int(row[depth]) for row in rows)
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    text = ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ranges)
    return (*rows[0][:depth], "{" + text + "}", *rows[0][depth + 1 :])


def size(num_bytes: int) -> str:
    """Returns a number of bytes in the unit that suits it: "1.5 MiB"."""
    size, units = float(num_bytes), iter(("KiB", "MiB", "GiB"))
    unit = "B"
    while size >= 1024 and (larger := next(units, None)):
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def counted(texts: Iterable[str]) -> str:
    """Returns the texts joined by commas, equal ones once with their number."""
    return ", ".join(text if count == 1 else f"{count} x {text}" for text, count in Counter(texts).items())


def plural(count: int, singular: str, many: str) -> str:
    """Returns the number and the noun in its form for that number."""
    return f"{count} {singular if count == 1 else many}"
