"""The figures of the summation experiment: the net cycle by cycle, its error, all runs compared.

`draw` takes finished records as summation_prune makes them, or as --resume reads them back: without
`snapshots`, with lists for arrays and None for numbers that are not finite. A figure whose entries
are missing is left out.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

import tinynn as tn
from experiments.pictures import (
    BLACK,
    BLUE,
    DPI,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    YELLOW,
    png,
)
from experiments.summation_networks import (
    error_plane,
    final_net,
    networks,
    positive,
    who,
    with_snapshots,
)
from tinynn.errors import OutputError
from tinynn.storage import write_bytes

Record = dict[str, Any]
Writer = Callable[[Path], None]

SHOWS = "tinynn run"  #: the entry of a picture that names the run whose networks it shows

#: phase: its colour, and what it does
PHASES = {
    "prune": ("#e6eff8", "prune: all hidden weights and biases are distorted"),
    "lift": ("#fcebd0", "lift: only the hidden biases are distorted"),
}
#: heading of a group of cells: its colour, and what the thesis says of it
GROUPS = {
    "literal recipe, distortion": (VERMILION, "thesis: one node"),
    "literal recipe, no distortion": (ORANGE, "thesis: never one node"),
    "literal recipe": (VERMILION, ""),
    "default recipe, distortion": (BLUE, "thesis: one node"),
    "default recipe, no distortion": (SKY, "thesis: never one node"),
    "default recipe": (GREEN, "one addition off at a time"),
    "default recipe, other criteria": (YELLOW, ""),
    "random pruning": (PURPLE, "thesis: similar to the criteria"),
    "from scratch": (BLACK, "control"),
}
MARKERS = {"none": "o", "l1": "s", "l2": "^"}


def draw(out: Path, records: list[Record]) -> list[Path]:
    """Write the figures that the records allow, and the first run's net; returns what now stands.

    What `out` holds of these names from other runs and is not written again is removed. Only the
    drawn networks need what --resume does not bring back: they stay if the run that they show is
    among the records, before any that could be drawn.

    A figure that fails is reported on stderr and left out: the results are worth more. OutputError
    is raised, at the end, if `out` cannot be written.
    """
    pictures = {
        "networks.png": networks,
        "cycles.png": _cycles,
        "pareto.png": _pareto,
        "error_plane.png": error_plane,
        "table.png": _table,
    }
    writers: dict[str, Writer | None] = {}
    with matplotlib.style.context(["default", STYLE]):
        for name, picture in pictures.items():
            writers[name] = _picture(name, picture, records)
    net = final_net(records[0]) if records else None
    writers["model.safetensors"] = None if net is None else partial(tn.save, model=net.module())
    standing = []
    if _shows_one_of(out / "networks.png", records):
        del writers["networks.png"]
        standing.append(out / "networks.png")
    standing += [out / name for name, writer in writers.items() if writer is not None]
    errors = [e for name, writer in writers.items() if (e := _replace(out / name, writer))]
    if errors:
        raise OutputError(errors[0].errno, "; ".join(str(e.strerror) for e in errors))
    return standing


def _picture(
    name: str, picture: Callable[[list[Record]], Figure | None], records: list[Record]
) -> Writer | None:
    """What writes the picture, or None if the records do not allow it."""
    try:
        figure = picture(records)
        content = None if figure is None else png(figure, {SHOWS: _drawn_run(records)})
    except Exception as error:
        print(f"{name} is left out: {error!r}", file=sys.stderr)
        return None
    return None if content is None else partial(write_bytes, content=content)


def _replace(path: Path, writer: Writer | None) -> OutputError | None:
    """Write the file anew, or remove it if there is nothing to write."""
    try:
        if writer is None:
            _remove(path)
        else:
            writer(path)
    except OutputError as error:
        return error
    return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(error.errno, f"cannot remove {path} ({error.strerror})") from error


def _drawn_run(records: list[Record]) -> str:
    """The key of the run whose networks are drawn."""
    run = with_snapshots(records)
    return "" if run is None else str(run.get("key", ""))


def _shows_one_of(path: Path, records: list[Record]) -> bool:
    """Whether the networks drawn there are of a run that precedes all that could be drawn."""
    earlier = takewhile(lambda r: not r.get("snapshots"), records)
    try:
        with Image.open(path) as picture:
            return picture.info.get(SHOWS, "") in {r["key"] for r in earlier if r.get("key")}
    except (OSError, SyntaxError, ValueError):
        return False  # none, or no picture: to be replaced


# --- cells and axes -----------------------------------------------------------------------------


def _place(cell: str) -> tuple[str, str]:
    """A cell's group and its name within the group."""
    recipe, *rest = cell.split(", ")
    if len(rest) == 3:
        criterion, how, regulariser = rest
        return f"{recipe} recipe, {how}", f"{criterion}, {regulariser}"
    if rest == ["random pruning"]:
        return "random pruning", f"{recipe} recipe"
    if len(rest) == 1 and recipe in ("default", "literal"):
        return f"{recipe} recipe, other criteria", rest[0]
    recipe, without, part = cell.partition(" without ")
    if recipe in ("default", "literal"):
        return f"{recipe} recipe", f"without {part}" if without else "as it is"
    if cell.endswith(" from scratch"):
        return "from scratch", cell.removesuffix(" from scratch")
    return cell, "all runs"


def _colour(group: str) -> str:
    return GROUPS.get(group, (GREY, ""))[0]


def _grouped(records: list[Record]) -> dict[str, dict[str, list[Record]]]:
    """Runs by group and by name of the cell in the group, in the order of first appearance."""
    groups: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        group, name = _place(record["cell"])
        groups.setdefault(group, {}).setdefault(name, []).append(record)
    return groups


def _plain(axis: Any) -> None:
    """1, 10, 100 for powers of ten: what is counted reads better so."""
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


# --- cycles.png ---------------------------------------------------------------------------------


def _cycles(records: list[Record]) -> Figure | None:
    first = next((r for r in records if r.get("cycles")), None)
    if first is None:
        return None
    runs = [r for r in records if r["cell"] == first["cell"] and r.get("cycles")]
    figure = Figure(dpi=DPI, figsize=(10.5, 6.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for run in reversed(runs):
        _course(top, bottom, run, bold=run is first)
    if not any(math.isfinite(positive(c.get("train_rmse"))) for r in runs for c in r["cycles"]):
        bottom.set_ylim(0.01, 1)  # a log axis cannot scale itself to nothing
    for ax in (top, bottom):
        ax.set_yscale("log")
        for number, cycle in enumerate(first["cycles"], 1):
            colour, _ = PHASES[cycle["phase"]]
            ax.axvspan(number - 0.5, number + 0.5, color=colour, linewidth=0, zorder=0)
    top.set_ylabel("hidden nodes left")
    top.set_ylim(bottom=0.8)
    bottom.set_ylabel("RMSE of $y$, training set")
    bottom.set_xlabel("cycle (train, observe, remove, distort); 0: the net before the first")
    bottom.set_xlim(-0.3, max(len(r["cycles"]) for r in runs) + 1.5)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    others = f", thin: {len(runs) - 1} more" if len(runs) > 1 else ""
    top.set_title(f"What each cycle leaves (bold: {who(first)}{others})")
    used = dict.fromkeys(c["phase"] for c in first["cycles"])
    handles: list[Any] = [Patch(color=PHASES[p][0], label=PHASES[p][1]) for p in used]
    style: Record = {"linestyle": "", "color": BLUE}
    handles.append(Line2D([], [], marker="*", markersize=11, label="finished net", **style))
    if any(c.get("collapse") for r in runs for c in r["cycles"]):
        style["color"] = VERMILION
        handles.append(Line2D([], [], marker="x", label="collapse: nodes before it", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    _plain(top.yaxis)
    return figure


def _course(top: Axes, bottom: Axes, run: Record, bold: bool) -> None:
    cycles = run["cycles"]
    numbers = np.arange(1, len(cycles) + 1)
    nodes = np.array([c["before"] if c.get("collapse") else c["after"] for c in cycles], float)
    errors = np.array([positive(c.get("train_rmse")) for c in cycles])
    look: Record = {"color": BLUE if bold else GREY, "alpha": 1.0 if bold else 0.55}
    look |= {"linewidth": 2.2 if bold else 0.8, "marker": "o", "markersize": 4.5 if bold else 2}
    top.plot([0, *numbers], [cycles[0]["before"], *nodes], drawstyle="steps-post", **look)
    alive = np.isfinite(errors)
    bottom.plot(numbers[alive], errors[alive], **look)
    dead = np.array([bool(c.get("collapse")) for c in cycles])
    cross: Record = {"color": VERMILION, "marker": "x", "s": 55 if bold else 25, "zorder": 4}
    top.scatter(numbers[dead], nodes[dead], **cross)
    bottom.scatter(numbers[dead & alive], errors[dead & alive], **cross)
    if not run.get("collapsed"):
        star: Record = {"s": 170 if bold else 45, "marker": "*", "zorder": 5}
        star |= {"color": look["color"], "edgecolors": "white", "linewidths": 0.6}
        end = len(cycles) + 1
        for ax, last, final in (
            (top, nodes[-1], float(run["hidden_nodes"])),
            (bottom, errors[-1], positive(run.get("train_rmse"))),
        ):
            ax.plot([end - 1, end], [last, final], **{**look, "linestyle": ":", "marker": ""})
            ax.scatter([end], [final], **star)


# --- pareto.png ---------------------------------------------------------------------------------


def _pareto(records: list[Record]) -> Figure | None:
    good = [r for r in records if _measured(r)]
    if not good:
        return None
    figure = Figure(dpi=DPI, figsize=(10.5, 6.4), layout="constrained")
    ax = figure.add_subplot()
    ax.set_xscale("log")
    ax.set_yscale("log")
    groups = _grouped(good)
    grid = any(", " in name for cells in groups.values() for name in cells)
    handles: list[Any] = []
    for group, cells in groups.items():
        colour = _colour(group)
        for name, runs in cells.items():
            criterion, _, regulariser = name.partition(", ")
            ring = criterion == "variance"
            # the same for both criteria: where they agree, rings lie around dots
            jitter = np.random.default_rng(zlib.crc32(f"{group}{regulariser or name}".encode()))
            ax.scatter(
                [r["hidden_nodes"] * math.exp(jitter.uniform(-0.05, 0.05)) for r in runs],
                [r["test_rmse"] for r in runs],
                95 if ring else 42,
                marker=MARKERS.get(regulariser, "D" if grid else "o"),
                facecolors="none" if ring else colour,
                edgecolors=colour if ring else "white",
                linewidths=1.1 if ring else 0.5,
                alpha=0.85,
                zorder=4,
            )
        handles.append(Line2D([], [], marker="o", linestyle="", color=colour, label=group))
    handles += _marker_legend() if grid else []

    front = _front([(r["hidden_nodes"], r["test_rmse"]) for r in good])
    widest = max(r["hidden_nodes"] for r in good)
    trail = next((r for r in records if r.get("cycles")), None)
    if trail is not None:
        widest = max(widest, _trajectory(ax, trail))
        text = "first run, cycle by cycle (training RMSE)"
        handles.append(Line2D([], [], color=GREY, marker=".", alpha=0.7, label=text))
    highest = ax.get_ylim()[1]
    x, y = zip((front[0][0], highest), *front, (widest * 1.4, front[-1][1]), strict=True)
    ax.step(x, y, where="post", color=BLACK, linewidth=1.2, linestyle="--", zorder=3)
    handles.append(Line2D([], [], color=BLACK, linestyle="--", label="Pareto front of the runs"))

    ax.set_xlim(0.75, widest * 1.4)
    ax.axvline(1, color=GREEN, linewidth=1, alpha=0.6, zorder=1)
    floor = min(r["test_rmse"] for r in good) / 20
    ax.set_ylim(floor, highest)
    optimum: Record = {"marker": "*", "s": 260, "color": GREEN, "edgecolors": "white"}
    ax.scatter([1], [floor * 1.25], clip_on=False, zorder=6, **optimum)
    ax.annotate(
        "known optimum: 1 node, error 0 (below the axis)",
        (1, floor * 1.25),
        (14, 4),
        textcoords="offset points",
        color=GREEN,
    )
    lost = len(records) - len(good)
    left_out = f"; left out: {lost} collapsed or without a finite error" if lost else ""
    ax.set_title(f"Size against error at the end of each run (runs: {len(good)}{left_out})")
    ax.set_xlabel("hidden nodes at the end (jittered by up to 5 %)")
    ax.set_ylabel("RMSE of $y$ on held-out inputs")
    _plain(ax.xaxis)
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if grid else 3)
    return figure


def _measured(record: Record) -> bool:
    finite = math.isfinite(positive(record.get("test_rmse")))
    return finite and not record.get("collapsed") and record["hidden_nodes"] > 0


def _marker_legend() -> list[Line2D]:
    style: Record = {"linestyle": "", "color": GREY}
    ring: Record = {**style, "markersize": 10, "markerfacecolor": "none"}
    return [
        Line2D([], [], marker="o", label="no regulariser", **style),
        Line2D([], [], marker="s", label="L1", **style),
        Line2D([], [], marker="^", label="L2", **style),
        Line2D([], [], marker="D", label="not in the grid", **style),
        Line2D([], [], marker="o", label="ring: by variance, filled: by count", **ring),
    ]


def _trajectory(ax: Axes, run: Record) -> float:
    """Draw a run's way through the plane; returns the most nodes it had."""
    points = [(c["before"], positive(c.get("train_rmse"))) for c in run["cycles"]]
    if _measured(run):
        points.append((run["hidden_nodes"], run["test_rmse"]))
    x, y = np.array([p for p in points if math.isfinite(p[1])]).reshape(-1, 2).T
    ax.plot(x, y, color=GREY, marker=".", linewidth=1, alpha=0.6, zorder=2)
    if len(x):
        ax.annotate(
            "cycle 1", (x[0], y[0]), (0, 6), textcoords="offset points", color=GREY, ha="right"
        )
    return float(max(p[0] for p in points))


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, by the first."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


# --- table.png ----------------------------------------------------------------------------------


def _table(records: list[Record]) -> Figure | None:
    groups = _grouped(records)
    cells = sum(len(named) for named in groups.values())
    if cells < 2:
        return None
    lines = cells + 1.7 * len(groups)
    figure = Figure(dpi=DPI, figsize=(11.5, 1.7 + 0.225 * lines), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    jitter = np.random.default_rng(0)
    ticks: dict[float, str] = {}
    y = 0.0
    for group, named in groups.items():
        colour, verdict = GROUPS.get(group, (GREY, ""))
        for ax in (left, right):
            ax.axhline(y, color=GREY, linewidth=0.6)
        heading = f"{group} ({verdict})" if verdict else group
        style: Record = {"transform": left.get_yaxis_transform(), "va": "center"}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        left.text(0.012, y + 0.75, heading, fontweight="bold", **style)
        y += 1.7
        for name, runs in named.items():
            ticks[y] = name.replace("l1", "L1").replace("l2", "L2")
            _strip(left, right, runs, y, colour, jitter)
            y += 1
    counts = [r["hidden_nodes"] for r in records]
    left.set_xscale("log")
    left.set_xlim(0.45, max(2, *counts) * 1.6)
    left.set_xlabel("hidden nodes at the end")
    _plain(left.xaxis)
    if not any(math.isfinite(positive(r.get("test_rmse"))) for r in records):
        right.set_xlim(0.01, 1)
    right.set_xscale("log")
    right.set_xlabel("RMSE of $y$ on held-out inputs")
    left.set_yticks(list(ticks), list(ticks.values()))
    left.set_ylim(y, 0)
    left.axvline(1, color=BLACK, linewidth=1, linestyle=":", zorder=1)
    for ax in (left, right):
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
    figure.suptitle(
        f"Every configuration of the table: {len(records)} runs, one dot each; bar: median",
        fontsize=11,
    )
    figure.legend(handles=_table_legend(), loc="outside lower center", ncols=3)
    return figure


def _strip(
    left: Axes, right: Axes, runs: list[Record], y: float, colour: str, jitter: np.random.Generator
) -> None:
    """One cell's runs as dots beside its median, and in how many one node was left."""
    counts = np.array([0 if r.get("collapsed") else r["hidden_nodes"] for r in runs], float)
    errors = np.array([positive(r.get("test_rmse")) for r in runs])
    height = y + (jitter.uniform(-0.24, 0.24, len(runs)) if len(runs) > 1 else np.zeros(1))
    alive = counts > 0
    look: Record = {"color": colour, "s": 20, "alpha": 0.75, "linewidths": 0, "zorder": 3}
    left.scatter(np.full((~alive).sum(), 0.6), height[~alive], 28, color=BLACK, marker="x")
    for ax, values in ((left, counts), (right, errors)):
        shown = alive & np.isfinite(values)
        ax.scatter(values[shown], height[shown], **look)
        if shown.any():
            middle = np.median(values[shown])
            ax.plot([middle, middle], [y - 0.36, y + 0.36], color=colour, linewidth=2)
    text = f"one node: {(counts == 1).sum()}/{len(runs)}"
    style: Record = {"transform": right.get_yaxis_transform(), "va": "center", "fontsize": 8}
    right.text(1.01, y, text, color=BLACK if (counts == 1).any() else GREY, **style)


def _table_legend() -> list[Line2D]:
    style: Record = {"linestyle": "", "color": BLACK}
    return [
        Line2D([], [], marker="o", markersize=4, label="a run", **style),
        Line2D([], [], marker="x", label="collapsed: all nodes died", **style),
        Line2D([], [], linestyle=":", color=BLACK, label="known optimum: 1 node"),
    ]
