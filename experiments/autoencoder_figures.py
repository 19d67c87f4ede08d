"""The figures of the auto-encoder experiment: what it sees, cycle by cycle, and what that costs."""

from __future__ import annotations

from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import pictures
from experiments.classify import by_cell
from experiments.pictures import Array, Record

FILTERS = 64  #: shown at the most of one layer


def draw(out: Path, runs: list[Record]) -> list[Path]:
    """Write what the records allow: `snapshots` are there only for runs of this call."""
    drawn = []
    with matplotlib.style.context(["default", pictures.STYLE]):
        fresh = next((r for r in runs if r.get("snapshots")), None)
        if fresh is not None:
            drawn.append(pictures.write(out / "reconstructions.png", reconstructions(fresh)))
            drawn.append(pictures.write(out / "filters.png", filters(fresh)))
        drawn.append(pictures.write(out / "cycles.png", cycles(runs)))
        drawn.append(pictures.write(out / "pareto.png", pareto(runs)))
    return drawn


def reconstructions(run: Record) -> Figure:
    """The same digits after every cycle, one row each."""
    rows = run["snapshots"]
    figure = pictures.figure(8.6, 0.62 * len(rows) + 0.5)
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for ax, row in zip(axes, rows, strict=True):
        images = np.clip(row["images"][..., 0], 0, 1)
        ax.imshow(np.concatenate(list(images), axis=1), cmap="gray_r", vmin=0, vmax=1)
        error = f"\nRMSE {row['rmse']:.3f}" if "rmse" in row else ""
        ax.set_ylabel(row["name"] + error, rotation=0, ha="right", va="center", fontsize=8)
        ax.set(xticks=[], yticks=[])
        ax.grid(visible=False)
        for side in ax.spines.values():
            side.set_visible(False)
    figure.suptitle(f"{run['cell']}, seed {run['seed']}: test images through the auto-encoder")
    return figure


def filters(run: Record) -> Figure:
    """The 3x3 kernels of the first and the last layer, before and after."""
    trained = [s for s in run["snapshots"] if s["name"].startswith("cycle")]
    figure = pictures.figure(9, 3.4)
    axes = figure.subplots(2, 2, width_ratios=[3, 1])
    for column, shown in zip(axes.T, (trained[0], trained[-1]), strict=True):
        for ax, layer in zip(column, ("first", "last"), strict=True):
            # (3, 3, 1, m) of the first layer, (3, 3, m, 1) of the last: m kernels of 3x3
            _tiles(ax, shown[layer].reshape(3, 3, -1).transpose(2, 0, 1))
            ax.set_title(f"{layer} layer, {shown['name']}", fontsize=9)
    return figure


def _tiles(ax: Axes, kernels: Array) -> None:
    """Kernels side by side, red below zero and blue above."""
    kernels = kernels[:FILTERS]
    columns = max(4, min(16, len(kernels)))
    rows = -(-len(kernels) // columns)
    sheet = np.full((rows * 4 - 1, columns * 4 - 1), np.nan)
    for i, kernel in enumerate(kernels):
        y, x = 4 * (i // columns), 4 * (i % columns)
        sheet[y : y + 3, x : x + 3] = kernel
    limit = float(np.nanmax(np.abs(sheet)))
    ax.imshow(sheet, cmap="RdBu", vmin=-limit, vmax=limit)
    ax.set_axis_off()


def cycles(runs: list[Record]) -> Figure:
    """Channels and error by cycle, of every run."""
    figure = pictures.figure(9, 3.8)
    left, right = figure.subplots(1, 2)
    for (cell, members), style in zip(by_cell(runs).items(), _styles(runs), strict=True):
        colour, marker, line = style
        for i, run in enumerate(members):
            x = [c["cycle"] for c in run["cycles"]]
            total = [sum(c["channels"]) for c in run["cycles"]]
            error = [c["rmse"] for c in run["cycles"]]
            for ax, y, label in ((left, total, cell if i == 0 else None), (right, error, None)):
                ax.plot(x, y, line, color=colour, marker=marker, markersize=2.5, label=label)
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel="cycle", ylabel="channels of inner layers", yscale="log")
    right.set(xlabel="cycle", ylabel="RMSE on test images", yscale="log")
    figure.legend(loc="outside lower center", ncols=2, fontsize=7.5)
    return figure


def pareto(runs: list[Record]) -> Figure:
    """Error against channels: every cycle of every run, its end, the controls, the baselines."""
    figure = pictures.figure(9, 4.6)
    ax = figure.subplots()
    for (cell, members), style in zip(by_cell(runs).items(), _styles(runs), strict=True):
        colour, shape, _ = style
        steps = [(sum(c["channels"]), c["rmse"]) for r in members for c in r["cycles"]]
        x, y = zip(*steps, strict=True)
        ax.scatter(x, y, s=9, color=colour, marker=shape, alpha=0.4, linewidths=0)
        ends = [(sum(r["channels"]), r["rmse"]) for r in members]
        x, y = zip(*ends, strict=True)
        ax.scatter(x, y, s=38, color=colour, marker=shape, label=cell)
    for control, marker in (("random", "x"), ("scratch", "+")):
        found = [(sum(r["channels"]), r[control]["rmse"]) for r in runs if control in r]
        if found:
            x, y = zip(*found, strict=True)
            ax.scatter(x, y, s=45, color=pictures.BLACK, marker=marker, label=control)
    codes = sorted({(r["channels"][1], r["baselines"]["pca"]) for r in runs})
    ax.axhline(
        runs[0]["baselines"]["mean_image"], color=pictures.GREY, linewidth=1, label="mean image"
    )
    for code, error in codes[:3]:
        ax.axhline(error, color=pictures.GREY, linewidth=1, linestyle=":")
        ax.annotate(
            f"PCA, {49 * code} numbers",
            (1, error),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=pictures.GREY,
        )
    ax.set(xlabel="channels of the three inner layers", ylabel="RMSE on test images")
    ax.set(xscale="log", yscale="log")
    figure.legend(loc="outside right upper", fontsize=7.5)
    return figure


def _styles(runs: list[Record]) -> list[tuple[str, str, str]]:
    """Colour, marker and line of each cell: others once the colours begin again."""
    shapes = (("o", "-"), ("s", "--"), ("^", ":"))
    laps = [divmod(i, len(pictures.CYCLE)) for i in range(len(by_cell(runs)))]
    return [(pictures.CYCLE[i], *shapes[lap % len(shapes)]) for lap, i in laps]
