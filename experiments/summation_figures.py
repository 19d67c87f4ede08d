"""The figures of the summation experiment: the net cycle by cycle, its error, all runs compared.

`draw` takes finished records as summation_prune makes them, or as --resume reads them back: without
`snapshots`, with lists for arrays and None for numbers that are not finite. A figure whose entries
are missing is left out. Colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

import io
import math
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, SymLogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

import tinynn as tn
from tinynn import nn
from tinynn.storage import write_bytes

Record = dict[str, Any]
Array = np.ndarray[Any, Any]

BLACK, GREY, PALE = "#222222", "#777777", "#c9c9c9"
BLUE, SKY, GREEN = "#0072b2", "#56b4e9", "#009e73"
VERMILION, ORANGE, PURPLE = "#d55e00", "#e69f00", "#cc79a7"
DIVERGING = LinearSegmentedColormap.from_list("", ["#00304d", BLUE, "white", VERMILION, "#5c2900"])

STYLE: Record = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
}
BOX: Record = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.87}
DPI = 110
LARGE = 300_000  #: bytes of a picture that is worth making smaller
PANELS = 12  #: networks shown, the finished one included
PLANE = (-2.0, 4.0)  #: inputs shown in the error plane
RIGHT = 1e-3  #: errors below this look right in the error plane

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
    "random pruning": (PURPLE, "thesis: similar to the criteria"),
    "from scratch": (BLACK, "control"),
}
MARKERS = {"none": "o", "l1": "s", "l2": "^"}


def draw(out: Path, records: list[Record]) -> list[Path]:
    """Write the figures that the records allow, and the first run's net; returns what was written.

    A figure that fails is reported on stderr and left out: the results are worth more. OutputError
    is raised if `out` cannot be written.
    """
    pictures = {
        "networks.png": _networks,
        "cycles.png": _cycles,
        "pareto.png": _pareto,
        "error_plane.png": _error_plane,
        "table.png": _table,
    }
    written = []
    with matplotlib.style.context(["default", STYLE]):
        for name, picture in pictures.items():
            try:
                figure = picture(records)
                content = None if figure is None else _png(figure)
            except Exception as error:
                print(f"{name} is left out: {error!r}", file=sys.stderr)
                continue
            if content is not None:
                write_bytes(out / name, content)
                written.append(out / name)
    net = _final(records[0]) if records else None
    if net is not None:
        tn.save(out / "model.safetensors", net.module())
        written.append(out / "model.safetensors")
    return written


def _png(figure: Figure) -> bytes:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    content = _encoded(pixels)
    if len(content) > LARGE:  # thousands of thin lines: 52 shades a channel look the same
        content = _encoded((5 * np.rint(pixels / 5)).astype(np.uint8))
    return content


def _encoded(pixels: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


# --- reading records ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """y = relu(x @ w1 + b1) @ w2 + b2 with w1 (2, n), b1 (n,), w2 (n,)."""

    w1: Array
    b1: Array
    w2: Array
    b2: float

    def __call__(self, x: Array) -> Array:
        """The net's output (...) for inputs (..., 2)."""
        return np.maximum(x @ self.w1 + self.b1, 0) @ self.w2 + self.b2

    def module(self) -> nn.Module:
        """The same net as a module, in float32."""
        nodes = len(self.b1)
        rng = np.random.default_rng(0)  # what it draws is overwritten
        layers = nn.Linear(2, nodes, rng=rng), nn.ReLU(), nn.Linear(nodes, 1, rng=rng)
        module = nn.Sequential(*layers)
        values = (self.w1, self.b1, self.w2[:, None], np.array([self.b2]))
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.mutate()[...] = value
        return module


def _net(weights: Record) -> Net:
    w1, b1, w2, b2 = (np.asarray(weights.get(k, 0.0), float) for k in ("w1", "b1", "w2", "b2"))
    return Net(w1, b1.reshape(-1), w2.reshape(-1), float(b2.reshape(-1)[0]))


def _final(record: Record) -> Net | None:
    """The finished net, if the record has it and it is one."""
    if record.get("collapsed") or not record.get("weights"):
        return None
    net = _net(record["weights"])
    finite = all(np.isfinite(v).all() for v in (net.w1, net.b1, net.w2, net.b2))
    return net if finite else None


def _number(value: Any) -> float:
    """A float that a log axis can show, or NaN."""
    return float(value) if value is not None and 0 < value < math.inf else math.nan


def _centre_and_support(net: Net, inputs: str) -> tuple[Array, Array]:
    """Each node's value before the ReLU in the middle of the data, and how far it strays there."""
    if inputs == "normal":
        return net.b1, 3 * np.linalg.norm(net.w1, axis=0)
    return net.b1 + 0.5 * net.w1.sum(axis=0), 0.5 * np.abs(net.w1).sum(axis=0)


def _place(cell: str) -> tuple[str, str]:
    """A cell's group and its name within the group."""
    recipe, *rest = cell.split(", ")
    if len(rest) == 3:
        criterion, how, regulariser = rest
        return f"{recipe} recipe, {how}", f"{criterion}, {regulariser}"
    if rest == ["random pruning"]:
        return "random pruning", f"{recipe} recipe"
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


def _short(value: Any) -> str:
    """An error with two digits, with a power of ten where that is easier to read."""
    value = _number(value)
    if not math.isfinite(value):
        return "not known"
    if 1e-3 <= value < 10:
        return f"{value:#.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return rf"${mantissa}\cdot10^{{{int(exponent)}}}$"


def _sum(*terms: tuple[float, str], digits: str = "#.3g") -> str:
    """Factors and what they multiply, as a sum; with the minus of print."""
    text = ""
    for value, what in terms:
        sign = "−" if value < 0 else "+" if text else ""
        text += f" {sign} " if text else sign
        text += f"{abs(value):{digits}}".rstrip(".") + f" {what}" * bool(what)
    return text


def _plain(axis: Any) -> None:
    """1, 10, 100 for powers of ten: what is counted reads better so."""
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _who(record: Record) -> str:
    return f"{record['cell']}, seed {record['seed']}"


# --- networks.png -------------------------------------------------------------------------------


def _networks(records: list[Record]) -> Figure | None:
    record = next((r for r in records if r.get("snapshots")), None)
    if record is None:
        return None
    inputs = record.get("inputs", "uniform")
    cycles = {c["cycle"]: c for c in record["cycles"]}
    final = _final(record)
    shown = _chosen(record["snapshots"], cycles, PANELS - (final is not None))
    panels = len(shown) + (final is not None)
    columns = min(4, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(dpi=DPI, figsize=(10.5, 0.9 + 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, snapshot in zip(axes, shown, strict=False):
        _network(ax, _net(snapshot), np.asarray(snapshot["kept"], bool), inputs)
        _cycle_title(ax, cycles.get(snapshot["cycle"], {}), snapshot)
    if final is not None:
        ax = axes[len(shown)]
        _network(ax, final, np.ones(len(final.b1), bool), inputs)
        _formula(ax, final)
        ax.set_title(
            f"finished net: {_nodes_text(len(final.b1))}\nheld-out RMSE "
            f"{_short(record.get('test_rmse'))}",
            fontweight="bold",
        )
    start, end = len(shown[0]["kept"]), record["hidden_nodes"]
    figure.suptitle(
        f"From {start} hidden nodes to {end}: the net at the end of each cycle ({_who(record)})\n"
        "nodes in the order of their kinks: on for all inputs at the top, off at the bottom",
        fontsize=11,
    )
    figure.legend(handles=_network_legend(), loc="outside lower center", ncols=5)
    return figure


def _chosen(snapshots: list[Record], cycles: dict[int, Record], most: int) -> list[Record]:
    """All, or the first three, the last three and evenly chosen ones that changed in between."""
    if len(snapshots) <= most:
        return snapshots

    def changed(snapshot: Record) -> bool:
        cycle = cycles.get(snapshot["cycle"], {})
        return bool(cycle.get("removed") or cycle.get("merged"))

    between = [s for s in snapshots[3:-3] if changed(s)]
    count = min(len(between), most - 6)
    picked = np.linspace(0, len(between) - 1, count).round().astype(int)
    return [*snapshots[:3], *(between[i] for i in picked), *snapshots[-3:]]


def _cycle_title(ax: Axes, cycle: Record, snapshot: Record) -> None:
    after = cycle.get("after", int(np.sum(snapshot["kept"])))
    merged = f", {cycle['merged']} merged" if cycle.get("merged") else ""
    ax.set_title(
        f"cycle {snapshot['cycle']} ({cycle.get('phase', '?')}{merged})\n"
        f"{len(snapshot['kept'])} → {_nodes_text(after)}, RMSE "
        f"{_short(cycle.get('train_rmse'))}"
    )


def _nodes_text(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"


def _network(ax: Axes, net: Net, kept: Array, inputs: str) -> None:
    nodes = len(net.b1)
    centre, support = _centre_and_support(net, inputs)
    reach = min(1.0, 0.4 * (nodes - 1))
    height = np.empty(nodes)
    height[np.argsort(centre / np.maximum(support, 1e-12), kind="stable")] = np.linspace(
        -reach, reach, nodes
    )

    ends = np.array([[0.0, 0.5], [0.0, -0.5], [2.0, 0.0]])
    middle = np.stack([np.ones(nodes), height], axis=1)
    segments = np.stack(
        [np.broadcast_to(ends[:, None], (3, nodes, 2)), np.broadcast_to(middle, (3, nodes, 2))],
        axis=2,
    )
    values = np.stack([net.w1[0], net.w1[1], net.w2])
    size = np.abs(values)
    # each layer on its own scale, so that both are seen; the few largest do not set it
    scale = [np.quantile(layer, 0.95) for layer in (size[:2], size[:2], size[2])]
    strength = np.minimum(size / np.maximum(scale, 1e-12)[:, None], 1)
    crowd = max(1.0, nodes / 12)
    colours = np.where((values > 0)[..., None], to_rgba(BLUE), to_rgba(VERMILION))
    colours[..., 3] = (0.25 + 0.75 * strength) * max(0.22, crowd**-0.45)
    widths = (0.5 + 2.3 * strength) * max(0.14, crowd**-0.5)
    colours[:, ~kept] = to_rgba(PALE, max(0.12, 0.9 * crowd**-0.5))
    for some, z in ((~kept, 1), (kept, 2)):
        ax.add_collection(
            LineCollection(
                list(segments[:, some].reshape(-1, 2, 2)),
                colors=colours[:, some].reshape(-1, 4),
                linewidths=widths[:, some].ravel(),
                zorder=z,
            )
        )
    area = float(np.clip(2000 / nodes, 5, 110))
    faces = np.where(kept, np.where(centre > support, GREEN, BLACK), "#e4e4e4")
    rim = np.where(kept, "white", "#b5b5b5")
    order = np.argsort(kept, kind="stable")
    ax.scatter(
        middle[order, 0],
        middle[order, 1],
        area,
        color=list(faces[order]),
        edgecolors=list(rim[order]),
        linewidths=0.2 + 0.006 * area,
        zorder=3,
    )
    ax.scatter(ends[:, 0], ends[:, 1], 190, color="white", edgecolors=BLACK, zorder=3)
    for (x, y), text in zip(ends, ("$x_1$", "$x_2$", "$y$"), strict=True):
        ax.text(x, y, text, ha="center", va="center_baseline", fontsize=9, zorder=4)
    if nodes <= 3:
        _weights_on_edges(ax, net, values, segments, height)
    ax.set_xlim(-0.2, 2.2)
    ax.set_ylim(-1.12, 1.12)


def _weights_on_edges(ax: Axes, net: Net, values: Array, segments: Array, height: Array) -> None:
    look: Record = {"ha": "center", "va": "center", "fontsize": 7.5, "bbox": BOX, "zorder": 5}
    for (edge, node), value in np.ndenumerate(values):
        start, end = segments[edge, node]
        # where edges neither cross nor run into a bias
        part = 0.7 if edge < 2 and len(height) > 1 else 0.4 if edge == 2 else 0.5
        x, y = start + part * (end - start)
        ax.text(x, y, _sum((value, "")), color=BLUE if value > 0 else VERMILION, **look)
    for node, bias in enumerate(net.b1):
        ax.text(1.12, height[node] - 0.19, f"b = {_sum((bias, ''))}", **look)


def _formula(ax: Axes, net: Net) -> None:
    """Write a net of one node out, and what it is where the node is on."""
    if len(net.b1) != 1:
        return
    (v,), (b,) = net.w2, net.b1
    (w1,), (w2,) = net.w1
    inner = _sum((w1, "$x_1$"), (w2, "$x_2$"), (b, ""))
    outer = _sum((v, "max(0, $a$)"), (net.b2, ""))
    on = _sum((v * w1, "$x_1$"), (v * w2, "$x_2$"), (v * b + net.b2, ""), digits=".4f")
    text = f"$a$ = {inner}\n$y$ = {outer}\n= {on} where on"
    ax.text(1.0, -0.62, text, ha="center", va="top", fontsize=8, linespacing=1.5)


def _network_legend() -> list[Line2D]:
    def dot(colour: str, rim: str, text: str) -> Line2D:
        style: Record = {"marker": "o", "linestyle": "", "markersize": 7}
        return Line2D([], [], color=colour, markeredgecolor=rim, label=text, **style)

    return [
        Line2D([], [], color=BLUE, linewidth=2, label="positive weight (width: size)"),
        Line2D([], [], color=VERMILION, linewidth=2, label="negative weight"),
        dot("#e4e4e4", "#b5b5b5", "removed by this cycle"),
        dot(BLACK, "white", "stays"),
        dot(GREEN, "white", "stays, on in all of the training range"),
    ]


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
    if not any(math.isfinite(_number(c.get("train_rmse"))) for r in runs for c in r["cycles"]):
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
    top.set_title(f"What each cycle leaves (bold: {_who(first)}{others})")
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
    errors = np.array([_number(c.get("train_rmse")) for c in cycles])
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
            (bottom, errors[-1], _number(run.get("train_rmse"))),
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
    finite = math.isfinite(_number(record.get("test_rmse")))
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
    points = [(c["before"], _number(c.get("train_rmse"))) for c in run["cycles"]]
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


# --- error_plane.png ----------------------------------------------------------------------------


def _error_plane(records: list[Record]) -> Figure | None:
    found = next(((r, n) for r in records if (n := _final(r)) is not None), None)
    if found is None:
        return None
    record, net = found
    inputs = record.get("inputs", "uniform")
    figure = Figure(dpi=DPI, figsize=(11.5, 5.7), layout="constrained")
    axes = figure.subplot_mosaic([["plane", "sum"], ["plane", "error"]], width_ratios=[1.15, 1])
    _plane(figure, axes["plane"], net, inputs)
    _diagonal(axes["sum"], axes["error"], net, inputs)
    figure.suptitle(
        f"Where the finished net adds and where it does not: {_nodes_text(len(net.b1))} "
        f"({_who(record)})\nRMSE on held-out inputs {_short(record.get('test_rmse'))}, "
        f"on [0, 10)² {_short(record.get('outside_rmse'))}",
        fontsize=11,
    )
    return figure


def _plane(figure: Figure, ax: Axes, net: Net, inputs: str) -> None:
    low, high = PLANE
    grid = low + (high - low) * (np.arange(360) + 0.5) / 360
    x = np.stack(np.meshgrid(grid, grid), axis=-1)
    error = net(x) - x.sum(axis=-1)
    most = max(10.0 ** math.ceil(math.log10(max(np.abs(error).max(), 0.1))), 10 * RIGHT)
    norm = SymLogNorm(RIGHT, linscale=0.6, vmin=-most, vmax=most)
    image = ax.imshow(
        error, cmap=DIVERGING, norm=norm, extent=(low, high, low, high), origin="lower"
    )
    decades = 10.0 ** np.arange(round(math.log10(RIGHT)), round(math.log10(most)) + 1)
    bar = figure.colorbar(image, ax=ax, shrink=0.9, ticks=[*-decades[::-1], 0, *decades])
    bar.ax.minorticks_off()
    bar.set_label("prediction − ($x_1 + x_2$), linear within ±0.001")
    ax.grid(False)
    if inputs == "normal":
        ax.add_patch(Circle((0, 0), 3, fill=False, color=BLACK, linewidth=1.8))
        text, at = "training inputs (3 σ)", (0.0, 3.3)
    else:
        ax.add_patch(Rectangle((0, 0), 1, 1, fill=False, color=BLACK, linewidth=1.8))
        text, at = "training inputs\n[0, 1)²", (1.06, 0.5)
    ax.text(*at, text, va="center", fontsize=8.5, bbox=BOX, zorder=5)
    kinks = _kinks(ax, net)
    ax.set(xlim=PLANE, ylim=PLANE, xlabel="input $x_1$", ylabel="input $x_2$", aspect="equal")
    hint = "" if kinks else "; no node switches here"
    ax.set_title(f"error over the input plane (white: less than 0.001{hint})")


def _kinks(ax: Axes, net: Net) -> int:
    """Draw where each node switches, with an arrow to the side where it is on; counts them."""
    drawn = 0
    low, high = PLANE
    text: Record = {"fontsize": 8, "ha": "center", "va": "center", "clip_on": True}
    for node, (w, b) in enumerate(zip(net.w1.T, net.b1, strict=True), 1):
        length = float(np.hypot(*w))
        if not length:
            continue
        normal = w / length
        along = np.array([-normal[1], normal[0]]) * (1 if normal[1] < 0 else -1)
        foot = 1 - (b + w.sum()) / length * normal  # the point of the line nearest to the middle
        line = foot + np.linspace(-4.5, 4.5, 181)[:, None] * along
        line = line[((line > low) & (line < high)).all(axis=1)]
        if not len(line):
            continue
        drawn += 1
        ax.plot(*line.T, color=BLACK, linewidth=1.1, linestyle=(0, (5, 2)))
        start = line[int(0.8 * len(line))]
        arrow: Record = {"arrowstyle": "-|>", "color": BLACK, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", start + 0.45 * normal, start, arrowprops=arrow)
        if len(net.b1) <= 3:
            x, y = start + 0.6 * normal
            ax.text(x, y, "on", **text)
            kink = _sum((w[0], "$x_1$"), (w[1], "$x_2$"), (b, ""))
            angle = math.degrees(math.atan2(along[1], along[0]))
            x, y = line[int(0.4 * len(line))] - 0.2 * normal
            ax.text(x, y, f"node {node}: {kink} = 0", rotation=angle, bbox=BOX, **text)
        else:  # spread the numbers of lines that lie close together
            x, y = line[int(len(line) * (0.15 + 0.55 * (node * 0.618 % 1)))]
            ax.text(x, y, str(node), bbox=BOX, **text)
    return drawn


def _diagonal(top: Axes, bottom: Axes, net: Net, inputs: str) -> None:
    t = np.linspace(*PLANE, 1201)
    prediction = net(np.stack([t, t], axis=1))
    trained = (0.0, 1.0) if inputs == "uniform" else (-3 / math.sqrt(2), 3 / math.sqrt(2))
    slope = net.w1.sum(axis=0)
    at = -net.b1[slope != 0] / slope[slope != 0]
    at = at[(at > PLANE[0]) & (at < PLANE[1])]
    for ax in (top, bottom):
        ax.axvspan(*trained, color="#ececec", linewidth=0, label="range of training")
        for kink in at:
            ax.axvline(kink, color=BLACK, linewidth=1, linestyle=(0, (5, 2)))
    top.plot(t, prediction, color=BLUE, linewidth=2.4, label="prediction")
    top.plot(t, 2 * t, color=ORANGE, linewidth=1.4, linestyle="--", label="true sum")
    if len(at):
        top.plot([], [], color=BLACK, linewidth=1, linestyle=(0, (5, 2)), label="kink of a node")
    top.set(title="along the diagonal $x_1 = x_2 = t$", ylabel="output $y$", xlim=PLANE)
    top.tick_params(labelbottom=False)
    top.legend(loc="lower right")
    bottom.semilogy(t, np.maximum(np.abs(prediction - 2 * t), 1e-10), color=VERMILION)
    low, high = bottom.get_ylim()
    bottom.set_ylim(min(low, high / 1000), high)
    bottom.set(xlabel="$t$ (both inputs)", ylabel="absolute error", xlim=PLANE)


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
    if not any(math.isfinite(_number(r.get("test_rmse"))) for r in records):
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
    errors = np.array([_number(r.get("test_rmse")) for r in runs])
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
