"""What the benches share: the machine they ran on, and where their figures go."""

from __future__ import annotations

import contextlib
import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"

Row = dict[str, Any]


def machine(device: str = "cpu", packages: Sequence[str] = ("transformers",)) -> Row:
    """Columns that say where, with what and when a row was measured. A package that is not installed is ""."""
    cores = f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"
    on_cpu = torch.device(device).type == "cpu"
    return {
        "device": cores if on_cpu else torch.cuda.get_device_name(device),
        **({"threads": torch.get_num_threads()} if on_cpu else {"commit": commit()}),
        "torch": torch.__version__,
        **{package.replace("-", "_"): installed(package) for package in packages},
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def installed(package: str) -> str:
    """Its version, or "" for one that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that is checked out, with a + if files differ from it; "" outside a repository."""
    git = ["git", "-C", str(ROOT)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        name = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], stderr=subprocess.DEVNULL)
        changed = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"])
        return name.decode().strip() + ("+" if changed else "")
    return ""


def file_name(bench: str, device: str) -> str:
    """Such as ops_nvidia_h200.csv: a file for each kind of device."""
    kind = "cpu" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device)
    return f"{bench}_{kind.lower().replace(' ', '_')}.csv"


def write_csv(name: str, rows: Sequence[Mapping[str, Any]], folder: Path = RESULTS) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path = folder / name
    print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def merge_csv(name: str, rows: Sequence[Row], keys: Sequence[str], folder: Path = RESULTS) -> None:
    """Writes the rows into the file, in the place of those that agree with one of them in all `keys`.

    The file is that in `folder`, or, if there is none yet, begins as a copy of that in bench/results.
    """

    def key(row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(column, "")) for column in keys)

    new = {key(row) for row in rows}
    before = next((path for path in (folder / name, RESULTS / name) if path.exists()), None)
    kept = [row for row in read_csv(before) if key(row) not in new] if before else []
    write_csv(name, [*kept, *rows], folder)


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def print_row(row: Mapping[str, Any], widths: Mapping[str, int], header: bool = False) -> None:
    """The columns that `widths` names, as a line of a table; with their names above it if asked to."""
    if header:
        print("  ".join(column.ljust(width) for column, width in widths.items()))
    print("  ".join(str(row.get(column, "")).ljust(width) for column, width in widths.items()), flush=True)
