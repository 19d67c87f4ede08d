"""The table and the figures of the compression experiment: accuracy against bytes and time."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import pictures
from experiments.compress_small_findings import findings, summary
from experiments.compress_small_recipes import SWEPT
from experiments.runner import Record
from tinynn.storage import write_bytes

#: heading, entry of a cell, factor, digits behind the point
COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("top-1, %", "accuracy_mean", 100, 2),
    ("file, bytes", "bytes", 1, 0),
    ("deflated, bytes", "deflated_bytes", 1, 0),
    ("parameters", "parameters", 1, 0),
    ("not zero", "non_zeros", 1, 0),
    ("multiply-adds, M", "multiply_adds", 1e-6, 3),
    ("carried out, M", "executed_multiply_adds", 1e-6, 3),
    ("ms, batch 1", "ms_1", 1, 4),
    ("ms, batch 64", "ms_64", 1, 3),
    ("energy, uJ", "energy_joules", 1e6, 1),
    ("epochs trained", "tuning_epochs", 1, 2),
)
_WORST = 20.0  #: points below the best: what is worse is left out of the plot


def draw(out: Path, runs: list[Record]) -> list[Path]:
    """Write table.csv, table.md and the figures into `out`."""
    whole = summary(runs)
    cells = {n: c for n, c in whole["cells"].items() if c["group"] != "sweep"}
    swept = {n: c for n, c in whole["cells"].items() if c["group"] == "sweep"}
    drawn = []
    for name, some in (("table", cells), ("sweep", swept)):
        if some:
            write_bytes(out / f"{name}.csv", _csv(some).encode())
            drawn.append(out / f"{name}.csv")
    if cells:
        write_bytes(out / "table.md", _markdown(cells, whole).encode())
        drawn.append(out / "table.md")
        drawn.append(pictures.write(out / "pareto.png", draw_pareto(cells, whole)))
    if swept:
        drawn.append(pictures.write(out / "sweep.png", draw_sweep(runs)))
    return drawn


# --- the table ------------------------------------------------------------------------------------


def _csv(cells: dict[str, Record]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["recipe", "group", "executed as", *(head for head, *_ in COLUMNS)])
    for name, c in cells.items():
        numbers = [_shown(c, *column[1:], "") for column in COLUMNS]
        writer.writerow([name, c["group"], c["executed_as"], *numbers])
    return text.getvalue()


def _markdown(cells: dict[str, Record], whole: Record) -> str:
    lines = [
        f"Times: medians, threads: {whole['threads_of_times']}. Bytes: the plan's file; where a "
        "recipe is marked *, no plan can express it: the model ran, and bytes are its packed "
        "numbers without a file around them.",
        "",
        "| recipe | " + " | ".join(head for head, *_ in COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    group = None
    for name, c in cells.items():
        if c["group"] != group:
            group = c["group"]
            lines.append(f"| **{group}** |" + " |" * len(COLUMNS))
        star = "" if c["executed_as"] == "plan" else " *"
        numbers = [_shown(c, *column[1:], ",") for column in COLUMNS]
        lines.append(f"| {name}{star} | " + " | ".join(numbers) + " |")
    told = [line.replace("\n ", "") for line in findings(whole)]
    return "\n".join([*lines, "", *(f"- {line}" for line in told), ""])


def _shown(cell: Record, key: str, factor: float, digits: int, thousands: str) -> str:
    value = cell.get(key)
    return "" if value is None else f"{factor * value:{thousands}.{digits}f}"


# --- figures --------------------------------------------------------------------------------------


def draw_pareto(cells: dict[str, Record], whole: Record) -> Figure:
    """Accuracy against bytes, and against milliseconds at batch 1 and 64, with the frontiers."""
    axes_of = [("bytes", "bytes of the plan's file", 1e-3, "kB")]
    if whole["threads_of_times"] is not None:
        threads = whole["threads_of_times"]
        on = f"{threads} thread{'s' * (threads > 1)}"
        axes_of += [(f"ms_{b}", f"ms at batch {b}, {on}", 1.0, "ms") for b in (1, 64)]
    with matplotlib.style.context(["default", pictures.STYLE]):
        figure = pictures.figure(11, 4.2 * len(axes_of))
        panels = figure.subplots(len(axes_of), 1, squeeze=False)[:, 0]
        for ax, (key, label, factor, unit) in zip(panels, axes_of, strict=True):
            plans = {n: c for n, c in cells.items() if c["executed_as"] == "plan" and c.get(key)}
            _panel(ax, plans, key, factor)
            ax.set(xlabel=f"{label}, {unit}" if unit == "kB" else label, ylabel="top-1, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return figure


def _panel(ax: Axes, cells: dict[str, Record], key: str, factor: float) -> None:
    best = max(100 * c["accuracy_mean"] for c in cells.values())
    cells = {n: c for n, c in cells.items() if 100 * c["accuracy_mean"] > best - _WORST}
    groups = list(dict.fromkeys(c["group"] for c in cells.values()))
    colours = [*pictures.CYCLE, pictures.GREY, pictures.PALE]
    for group, colour in zip(groups, colours, strict=False):
        some = [c for c in cells.values() if c["group"] == group]
        x, y = [factor * c[key] for c in some], [100 * c["accuracy_mean"] for c in some]
        ax.scatter(x, y, color=colour, label=group, s=26, zorder=3)
    points = {n: (factor * c[key], 100 * c["accuracy_mean"]) for n, c in cells.items()}
    edge = frontier(points)
    costs, scores = zip(*[points[n] for n in edge], strict=True)
    ax.step(costs, scores, where="post", color=pictures.GREY, linewidth=1)
    if key == "bytes":
        ax.set(xscale="log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}")
    for first, last in _close(ax, [points[name] for name in edge]):  # names would hide each other
        text = str(first + 1) if first == last else f"{first + 1}-{last + 1}"
        at = points[edge[first]]
        ax.annotate(text, at, (-4, 4), textcoords="offset points", fontsize=7.5, ha="right")
    told = "\n".join(f"{i}  {name}" for i, name in enumerate(edge, 1))
    ax.text(1.01, 1, told, transform=ax.transAxes, va="top", fontsize=7.5)


def _close(ax: Axes, points: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """Runs (first, last) of points that lie too close to each other for a number each."""
    ax.autoscale_view()
    places = ax.transData.transform(points)
    runs = [(0, 0)]
    for i in range(1, len(places)):
        near = np.abs(places[i] - places[runs[-1][0]]).max() < 0.12 * ax.figure.dpi
        runs[-1:] = [(runs[-1][0], i)] if near else [runs[-1], (i, i)]
    return runs


def frontier(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names that none beats in both: by rising cost, each more accurate than all before."""
    found: list[str] = []
    for name in sorted(points, key=lambda n: (points[n][0], -points[n][1])):
        if not found or points[name][1] > points[found[-1]][1]:
            found.append(name)
    return found


def draw_sweep(runs: list[Record]) -> Figure:
    """Accuracy by pruning threshold and SVD error, a panel for each rounding."""
    cells = summary(runs)["cells"]
    with matplotlib.style.context(["default", pictures.STYLE]):
        figure = pictures.figure(3.6 * len(SWEPT["decimals"]), 3.6)
        panels = figure.subplots(1, len(SWEPT["decimals"]), squeeze=False)[0]
        for ax, decimals in zip(panels, SWEPT["decimals"], strict=True):
            names = [
                [f"threshold {t}, error {e}, decimals {decimals}" for e in SWEPT["error"]]
                for t in SWEPT["threshold"]
            ]
            _squares(ax, [[cells.get(n) for n in row] for row in names])
            told = "not rounded" if decimals is None else f"{decimals} decimals"
            ax.set(title=f"top-1, % and kB, {told}", xlabel="SVD error threshold")
        panels[0].set(ylabel="mean + this times the deviation of |w|")
        return figure


def _squares(ax: Axes, rows: Sequence[Sequence[Any]]) -> None:
    values = np.array(
        [[np.nan if c is None else 100 * c["accuracy_mean"] for c in r] for r in rows]
    )
    ax.imshow(values, cmap="Blues", vmin=0, vmax=130, aspect="auto")
    for i, j in np.ndindex(*values.shape):
        cell = rows[i][j]
        if cell is not None:
            text = f"{values[i, j]:.1f}\n{cell['bytes'] / 1e3:.0f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=7.5)
    ax.set_xticks(range(len(SWEPT["error"])), [_name(v) for v in SWEPT["error"]])
    ax.set_yticks(range(len(SWEPT["threshold"])), [_name(v) for v in SWEPT["threshold"]])
    ax.grid(visible=False)


def _name(value: Any) -> str:
    return "none" if value is None else f"{value:g}"
