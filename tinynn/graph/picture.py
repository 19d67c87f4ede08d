"""Draw a graph: ops as boxes with their multiply-adds and bytes, values on the arrows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinynn.errors import ConfigError
from tinynn.graph.layout import Place, layout
from tinynn.graph.parts import Node, Value
from tinynn.storage import write_bytes

_ROWS = 22  #: boxes below each other before a new column begins
_BOX = (2.1, 0.44)  #: inches
_LANE, _ROW, _GUTTER, _MARGIN = 2.65, 0.86, 0.75, 0.3  #: inches
_OUT, _IN = 0.24, 0.13  #: inches from a box at which arrows turn
_COLOURS = {
    "mix": "#cfe0f5",
    "depthwise": "#d8ecd0",
    "norm": "#eeeeee",
    "pool": "#fbe3c0",
    "join": "#e6d7f0",
    "other": "#ffffff",
}


def draw(nodes: Sequence[Node], source: Value, path: str | Path) -> None:
    """Write a picture of these ops to `path`, SVG or PNG by its ending.

    Each box names the op, its module's path, multiply-adds, and the bytes of its parameters and
    buffers; each arrow the shape of what flows and its bytes. The figures are for the traced batch.
    Raises ConfigError for another ending, OutputError if it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"draw: required a path that ends in .svg or .png; came {path}")
    from matplotlib import rc_context  # here: it takes half a second to import
    from matplotlib.figure import Figure

    canvas = _Canvas(layout(nodes, source, _ROWS))
    figure = Figure(figsize=canvas.size)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, canvas.size[0])
    axes.set_ylim(canvas.size[1], 0)
    canvas.axes = axes
    canvas.box(source, "input", "", "other")
    for node in nodes:
        for v in dict.fromkeys(v for v in node.inputs if v.is_data):
            canvas.arrow(v, node.output)
        canvas.box(node.output, _title(node), _costs(node), _family(node))
    for v in (source, *(n.output for n in nodes)):
        canvas.label(v)
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    image = io.BytesIO()
    # the same graph gives the same file, and its words can be searched
    with rc_context({"svg.hashsalt": "tinynn", "svg.fonttype": "none"}):
        figure.savefig(image, format=path.suffix[1:].lower(), dpi=110, metadata=metadata)
    write_bytes(path, image.getvalue())


class _Canvas:
    """Turns places into inches (y downwards) and puts boxes, arrows and labels there."""

    def __init__(self, places: dict[int, Place]) -> None:
        self.places = places
        lanes = [0] * (1 + max(p.column for p in places.values()))
        for p in places.values():
            lanes[p.column] = max(lanes[p.column], p.lane + 1)
        self.left = [_MARGIN + _GUTTER]
        for n in lanes:
            self.left.append(self.left[-1] + n * _LANE + _GUTTER)
        rows = 1 + max(p.row for p in places.values())
        self.size = (self.left[-1] - _GUTTER + _MARGIN, rows * _ROW + 2 * _MARGIN)
        self.axes: Any = None
        self.taken = {(p.column, p.lane, p.row) for p in places.values()}

    def centre(self, value: Value) -> tuple[float, float]:
        place = self.places[value.index]
        x = self.left[place.column] + place.lane * _LANE + _BOX[0] / 2
        return x, _MARGIN + place.row * _ROW + _BOX[1] / 2

    def box(self, value: Value, title: str, costs: str, family: str) -> None:
        from matplotlib.patches import FancyBboxPatch

        x, y = self.centre(value)
        width, height = _BOX
        corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.06"
        patch = FancyBboxPatch(corner, width, height, boxstyle=style, zorder=2)
        patch.set(facecolor=_COLOURS[family], edgecolor="#444444", linewidth=0.7)
        self.axes.add_patch(patch)
        if costs:
            self.text(x, y - 0.085, title, 7.5, ha="center", weight="bold")
            self.text(x, y + 0.095, costs, 6.5, ha="center", color="#333333")
        else:
            self.text(x, y, title, 7.5, ha="center", weight="bold")

    def label(self, value: Value) -> None:
        """What flows out of a box, beside the beginning of its arrow."""
        x, y = self.centre(value)
        shape = "\N{MULTIPLICATION SIGN}".join(map(str, value.shape)) or "one number"
        self.text(x + 0.06, y + _BOX[1] / 2 + 0.12, f"{shape}  {_bytes(value.nbytes)}", 6.2)

    def arrow(self, start: Value, end: Value) -> None:
        """Straight down if nothing lies between, else around it on the left."""
        a, b = self.places[start.index], self.places[end.index]
        (x, y), (u, v) = self.centre(start), self.centre(end)
        y, v = y + _BOX[1] / 2, v - _BOX[1] / 2
        between = any((a.column, a.lane, row) in self.taken for row in range(a.row + 1, b.row))
        if a.column != b.column:
            side = self.left[b.column] - 0.6
            path = [(x, y), (x, y + _OUT), (side, y + _OUT), (side, v - _IN), (u, v - _IN), (u, v)]
        elif a.lane == b.lane and between:
            side = x - _BOX[0] / 2 - 0.16 - 0.05 * (b.row % 4)
            start_y, end_y = y - _BOX[1] / 2, v + _BOX[1] / 2
            path = [(x - _BOX[0] / 2, start_y), (side, start_y), (side, end_y)]
            path.append((u - _BOX[0] / 2, end_y))
        elif a.lane == b.lane:
            path = [(x, y), (u, v)]
        elif b.row == a.row + 1 or not between:  # down its own lane, then across
            path = [(x, y), (x, v - _IN), (u, v - _IN), (u, v)]
        else:  # across at once, then down the other lane's side
            side = u + (_BOX[0] / 2 + 0.12) * (1 if u < x else -1)
            middle = v + _BOX[1] / 2
            path = [(x, y), (x, y + _OUT), (side, y + _OUT), (side, middle)]
            path.append((u + _BOX[0] / 2 * (1 if u < x else -1), middle))
        self.line(path)

    def line(self, path: list[tuple[float, float]]) -> None:
        xs, ys = zip(*path, strict=True)
        self.axes.plot(xs, ys, color="#666666", linewidth=0.9, zorder=1, solid_joinstyle="round")
        style = {"arrowstyle": "-|>", "color": "#666666", "lw": 0.9, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", xy=path[-1], xytext=path[-2], arrowprops=style)

    def text(self, x: float, y: float, words: str, size: float, **style: Any) -> None:
        self.axes.text(x, y, words, fontsize=size, va="center", zorder=3, **style)


def _title(node: Node) -> str:
    words = [node.op.name.replace("_", " ")]
    if len(node.inputs) > 1 and node.inputs[1].is_named and len(node.inputs[1].shape) == 4:
        height, width = node.inputs[1].shape[:2]
        words.append(f"{height}\N{MULTIPLICATION SIGN}{width}")
    stride = getattr(node.op, "stride", (1, 1))
    if stride != (1, 1):
        words.append(f"/{stride[0]}" if stride[0] == stride[1] else f"/{stride[0]},{stride[1]}")
    if getattr(node.op, "relu", False):
        words.append("+ relu")
    return " ".join(words)


def _costs(node: Node) -> str:
    """Module, multiply-adds and bytes of parameters and buffers, where there are any."""
    macs = node.op.macs(*(v.shape for v in node.inputs))
    held = sum(v.nbytes for v in node.inputs if v.is_named)
    parts = [node.path, f"{_short(macs)} MAC" if macs else "", _bytes(held) if held else ""]
    return "   ".join(p for p in parts if p)


def _family(node: Node) -> str:
    rule = node.op.rule(*(v.shape for v in node.inputs))
    name = node.op.name
    if rule == "mix":
        return "mix"
    if node.op.weight_axis is not None:
        return "depthwise"
    if name in ("batch_norm", "batch_norm_eval", "scale_shift"):
        return "norm"
    if "pool" in name or name in ("sum", "max"):
        return "pool"
    return "join" if sum(v.is_data for v in node.inputs) > 1 else "other"


def _short(n: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def _bytes(n: int) -> str:
    return f"{_short(n)}B" if n >= 1000 else f"{n} B"
