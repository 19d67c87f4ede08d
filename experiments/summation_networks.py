"""The nets of the summation experiment drawn: cycle by cycle, and the finished one's error.

Colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, SymLogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle

from experiments.pictures import (
    BLACK,
    BLUE,
    DPI,
    GREEN,
    ORANGE,
    PALE,
    VERMILION,
    Array,
)
from tinynn import nn

Record = dict[str, Any]

DIVERGING = LinearSegmentedColormap.from_list("", ["#00304d", BLUE, "white", VERMILION, "#5c2900"])

BOX: Record = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.87}
PANELS = 12  #: networks shown, the finished one included
PLANE = (-2.0, 4.0)  #: inputs shown in the error plane
RIGHT = 1e-3  #: errors below this look right in the error plane

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


def net_of(weights: Record) -> Net:
    """The net with a record's weights."""
    w1, b1, w2, b2 = (np.asarray(weights.get(k, 0.0), float) for k in ("w1", "b1", "w2", "b2"))
    return Net(w1, b1.reshape(-1), w2.reshape(-1), float(b2.reshape(-1)[0]))


def final_net(record: Record) -> Net | None:
    """The finished net, if the record has it and it is one."""
    if record.get("collapsed") or not record.get("weights"):
        return None
    net = net_of(record["weights"])
    finite = all(np.isfinite(v).all() for v in (net.w1, net.b1, net.w2, net.b2))
    return net if finite else None


def with_snapshots(records: list[Record]) -> Record | None:
    """The first run whose networks can be drawn."""
    return next((r for r in records if r.get("snapshots")), None)


def positive(value: Any) -> float:
    """A float that a log axis can show, or NaN."""
    return float(value) if value is not None and 0 < value < math.inf else math.nan


def _centre_and_support(net: Net, inputs: str) -> tuple[Array, Array]:
    """Each node's value before the ReLU in the middle of the data, and how far it strays there."""
    if inputs == "normal":
        return net.b1, 3 * np.linalg.norm(net.w1, axis=0)
    return net.b1 + 0.5 * net.w1.sum(axis=0), 0.5 * np.abs(net.w1).sum(axis=0)


def short(value: Any) -> str:
    """An error with two digits, with a power of ten where that is easier to read."""
    value = positive(value)
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


def who(record: Record) -> str:
    """The cell and seed of a run."""
    return f"{record['cell']}, seed {record['seed']}"


# --- networks.png -------------------------------------------------------------------------------


def networks(records: list[Record]) -> Figure | None:
    """One panel a cycle, and the finished net; None without snapshots."""
    record = with_snapshots(records)
    if record is None:
        return None
    inputs = record.get("inputs", "uniform")
    cycles = {c["cycle"]: c for c in record["cycles"]}
    final = final_net(record)
    shown = _chosen(record["snapshots"], cycles, PANELS - (final is not None))
    panels = len(shown) + (final is not None)
    columns = min(4, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(dpi=DPI, figsize=(10.5, 0.9 + 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, snapshot in zip(axes, shown, strict=False):
        _network(ax, net_of(snapshot), np.asarray(snapshot["kept"], bool), inputs)
        _cycle_title(ax, cycles.get(snapshot["cycle"], {}), snapshot)
    if final is not None:
        ax = axes[len(shown)]
        _network(ax, final, np.ones(len(final.b1), bool), inputs)
        _formula(ax, final)
        ax.set_title(
            f"finished net: {_nodes_text(len(final.b1))}\nheld-out RMSE "
            f"{short(record.get('test_rmse'))}",
            fontweight="bold",
        )
    start, end = len(shown[0]["kept"]), record["hidden_nodes"]
    figure.suptitle(
        f"From {start} hidden nodes to {end}: the net at the end of each cycle ({who(record)})\n"
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
        f"{short(cycle.get('train_rmse'))}"
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


# --- error_plane.png ----------------------------------------------------------------------------


def error_plane(records: list[Record]) -> Figure | None:
    """The error of the first finished net over the input plane; None without one."""
    found = next(((r, n) for r in records if (n := final_net(r)) is not None), None)
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
        f"({who(record)})\nRMSE on held-out inputs {short(record.get('test_rmse'))}, "
        f"on [0, 10)² {short(record.get('outside_rmse'))}",
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
