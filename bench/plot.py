"""Draws figures from the CSVs of bench/results.

    python -m bench.plot                    for every CSV of ops, train_step, families and convergence there
    python -m bench.plot ops_nvidia_h200    for one file

Training steps, families and loss curves go to docs/<file>.svg, the chart of the README to docs/<file>_overview.svg.
The figures of ops go to bench/figures/<file>_<op>.svg, which git ignores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench.common import RESULTS, ROOT

DOCS = ROOT / "docs"
FIGURES = ROOT / "bench" / "figures"
COLORS = {
    "eager": "#9e9e9e",
    "inductor": "#1f77b4",
    "inductor loss": "#7fb2d9",
    "inductor-again": "#7fb2d9",
    "liger-kernel": "#ff9e2c",
    "liger-kernel-eager": "#ffd09b",
    "cut-cross-entropy": "#b07cc6",
    "liger-compile": "#2a9d4a",
    "liger-compile 128 MiB": "#93d1a3",
}


def main(
    names: Sequence[str] = (), results: Path = RESULTS, docs: Path = DOCS, figures: Path = FIGURES
) -> None:
    # The same figures give the same files.
    matplotlib.use("svg")
    plt.rcParams.update({"svg.hashsalt": "liger-compile", "svg.fonttype": "none", "font.size": 9})
    for path in sorted(results.glob("*.csv")):
        if names and path.stem not in names:
            continue
        rows = pd.read_csv(path)
        if path.stem.startswith("ops_"):
            for op, of_op in rows.groupby("op", sort=False):
                figures.mkdir(exist_ok=True)
                _draw_op(str(op), of_op, figures / f"{path.stem}_{op}.svg")
        elif path.stem.startswith("train_step_"):
            _draw_steps(rows, docs / f"{path.stem}.svg")
            _draw_overview(rows, docs / f"{path.stem}_overview.svg")
        elif path.stem.startswith("families_"):
            _draw_families(rows, docs / f"{path.stem}.svg")
        elif path.stem.startswith("convergence_"):
            _draw_curves(rows, docs / f"{path.stem}.svg")


def _draw_op(op: str, rows: pd.DataFrame, path: Path) -> None:
    """Time over the floor of each pass, and the memory of the whole."""
    rows = rows[rows["median_ms"].notna()]
    passes = [name for name in ("forward", "backward", "both") if name in set(rows["pass"])]
    has_memory = rows["extra_mib"].notna().any()
    if not passes:
        return
    figure, axes = _panels(len(passes) + has_memory)
    for ax, pass_name in zip(axes, passes, strict=False):
        of_pass = rows[rows["pass"] == pass_name]
        _bars(ax, of_pass, "shape", "median_ms", f"{pass_name}, times the floor", over="floor_ms")
        ax.axhline(1, color="black", linewidth=0.8)
    if has_memory:
        both = rows[rows["pass"] == "both"]
        _bars(axes[-1], both, "shape", "extra_mib", "MiB beside inputs and gradients")
    figure.suptitle(f"{op}, {rows['dtype'].iloc[0]}, {rows['device'].iloc[0]}, torch {rows['torch'].iloc[0]}")
    _save(figure, axes, path)


def _draw_steps(rows: pd.DataFrame, path: Path) -> None:
    """Time and peak memory of the variants that COLORS knows, for each case of a model with all its layers."""
    is_whole = rows["layers"] == rows.groupby("model")["layers"].transform("max")
    rows = rows[is_whole & rows["step_ms"].notna() & rows["variant"].isin(list(COLORS))].copy()
    if rows.empty:
        return
    rows["case"] = rows["model"] + "\n" + rows["tokens"]
    for column, usual in (("returns", "model"), ("use_cache", "off"), ("attention_mask", "none")):
        odd = (rows[column] != usual) & (rows["variant"] != "inductor loss")
        rows.loc[odd, "case"] += "\n" + column + "=" + rows.loc[odd, column]
    figure, axes = _panels(2)
    _bars(axes[0], rows, "case", "step_ms", "ms a step", low="low_ms", high="high_ms")
    _bars(axes[1], rows, "case", "peak_gib", "GiB above the weights, at the peak")
    figure.suptitle(f"forward + backward, {rows['device'].iloc[0]}, torch {rows['torch'].iloc[0]}")
    _save(figure, axes, path)


def _draw_overview(rows: pd.DataFrame, path: Path) -> None:
    """Time and peak memory of whole models as shares of stock torch.compile, for the README."""
    usual = (rows["returns"] == "model") & (rows["use_cache"] == "off") & (rows["attention_mask"] == "none")
    rows = rows[usual & (rows["layers"] == rows.groupby("model")["layers"].transform("max"))]
    cases = list(dict.fromkeys(zip(rows["model"], rows["tokens"], strict=True)))
    bars = {"liger-kernel": "liger-kernel", "liger-compile": 'backend="liger"'}
    titles = {"time_of_inductor": "time of a step", "peak_of_inductor": "peak memory above the weights"}
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.7), sharey=True)
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        for offset, (variant, label) in zip((-0.2, 0.2), bars.items(), strict=True):
            of_variant = rows[rows["variant"] == variant].set_index(["model", "tokens"])[column]
            shares = [of_variant.loc[case] for case in cases]
            places = [index + offset for index in range(len(cases))]
            drawn = ax.barh(places, shares, 0.38, label=label, color=COLORS[variant])
            ax.bar_label(drawn, [f"{share:.2f}" for share in shares], padding=2, fontsize=7)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(f"{title} (torch.compile = 1)", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(cases)), [f"{model}, {tokens.replace('x', '×')}" for model, tokens in cases])
    axes[0].invert_yaxis()
    _save(figure, list(axes), path)


def _draw_families(rows: pd.DataFrame, path: Path) -> None:
    """Time and peak memory of each case as shares of stock torch.compile: a dot for each variant."""
    rows = rows[rows["median_ms"].notna()]
    places = {name: place for place, name in enumerate(dict.fromkeys(rows["case"]))}
    titles = {"of_inductor": "time of a step", "peak_of_inductor": "peak memory"}
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 1.2 + 0.22 * len(places)), sharey=True)
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        for variant in ("inductor-again", "liger-kernel", "liger-kernel-eager", "liger-compile"):
            of_variant = rows[rows["variant"] == variant]
            ax.scatter(
                of_variant[column], of_variant["case"].map(places), 22, label=variant, color=COLORS[variant]
            )
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(f"{title} (torch.compile = 1)", fontsize=9)
        ax.grid(axis="y", linewidth=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(list(places.values()), list(places), fontsize=7)
    axes[0].invert_yaxis()
    figure.suptitle(f"{rows['device'].iloc[0]}, torch {rows['torch'].iloc[0]}")
    _save(figure, list(axes), path)


def _draw_curves(rows: pd.DataFrame, path: Path) -> None:
    """The loss of each run, and how far it is from eager code's."""
    figure, axes = _panels(2)
    curves = {str(run): of_run.set_index("step")["loss"] for run, of_run in rows.groupby("run", sort=False)}
    for run, curve in curves.items():
        axes[0].plot(curve, label=run, linewidth=1)
        apart = (curve - curves["eager"]).abs()
        axes[1].plot(apart.rolling(10, min_periods=1).mean(), linewidth=1)
    axes[1].set_yscale("log")
    for ax, title in zip(axes, ("loss", "difference from eager, mean of 10 steps"), strict=True):
        ax.set_title(title, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows['model'].iloc[0]}, AdamW, {rows['dtype'].iloc[0]}, {rows['device'].iloc[0]}")
    _save(figure, axes, path)


def _panels(number: int) -> tuple[plt.Figure, list[Axes]]:
    figure, axes = plt.subplots(1, number, figsize=(4.6 * number, 3.4), squeeze=False)
    return figure, list(axes[0])


def _bars(
    ax: Axes,
    rows: pd.DataFrame,
    group: str,
    value: str,
    title: str,
    over: str | None = None,
    low: str = "low_ms",
    high: str = "high_ms",
) -> None:
    """A group of bars for each value of `group`, a bar for each variant; quartiles as whiskers on times."""
    groups = list(dict.fromkeys(rows[group]))
    variants = [name for name in COLORS if name in set(rows["variant"])]
    width = 0.8 / max(len(variants), 1)
    for place, variant in enumerate(variants):
        of_variant = rows[rows["variant"] == variant].drop_duplicates(group, keep="last").set_index(group)
        of_variant = of_variant.reindex(groups)
        unit = of_variant[over] if over else 1
        heights = of_variant[value] / unit
        whiskers = None
        if value.endswith("_ms"):
            whiskers = [heights - of_variant[low] / unit, of_variant[high] / unit - heights]
        x = [index + (place - (len(variants) - 1) / 2) * width for index in range(len(groups))]
        ax.bar(x, heights, width, yerr=whiskers, label=variant, color=COLORS[variant], error_kw={"lw": 0.8})
    ax.set_xticks(range(len(groups)), [str(name).replace("x", "×") for name in groups], fontsize=7)
    if any(len(str(group)) > 9 for group in groups):
        plt.setp(ax.get_xticklabels(), rotation=20, ha="right", rotation_mode="anchor")
    ax.set_title(title, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: plt.Figure, axes: Sequence[Axes], path: Path) -> None:
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="lower center", ncols=7, frameon=False, fontsize=8
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(f"drawn: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


if __name__ == "__main__":
    main(sys.argv[1:])
