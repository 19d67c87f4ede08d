"""What the figures of all experiments share: style, colours, how a file is written, some charts.

Colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tinynn.storage import write_bytes

Array = np.ndarray[Any, Any]
Record = dict[str, Any]

BLACK, GREY, PALE = "#222222", "#777777", "#c9c9c9"
BLUE, SKY, GREEN = "#0072b2", "#56b4e9", "#009e73"
VERMILION, ORANGE, PURPLE = "#d55e00", "#e69f00", "#cc79a7"
YELLOW = "#b8ab00"  #: darker than theirs, which does not show on white
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
DPI = 110
LARGE = 300_000  #: bytes of a picture that is worth making smaller

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


def figure(width: float, height: float) -> Figure:
    """An empty figure of this many inches; draw on it in `matplotlib.style.context(STYLE)`."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def png(figure: Figure, notes: dict[str, str] | None = None) -> bytes:
    """The figure as PNG, with `notes` as text in the file."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    content = _encoded(pixels, notes or {})
    if len(content) > LARGE:  # thousands of thin lines: 52 shades a channel look the same
        content = _encoded((5 * np.rint(pixels / 5)).astype(np.uint8), notes or {})
    return content


def write(path: Path, figure: Figure) -> Path:
    """Write the figure as PNG, atomically. Raises OutputError."""
    write_bytes(path, png(figure))
    return path


def _encoded(pixels: Array, notes: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    info = PngInfo()
    for name, text in notes.items():
        info.add_text(name, text)
    Image.fromarray(pixels).save(buffer, "png", optimize=True, pnginfo=info)
    return buffer.getvalue()


def confusion(ax: Axes, counts: Array, classes: Sequence[str]) -> None:
    """The confusion matrix (classes, classes) in percent of the true class (row)."""
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    off = share.copy()
    np.fill_diagonal(off, 0)
    # the diagonal would drown the confusions: the scale ends at the largest of those
    ax.imshow(share, cmap="Blues", vmin=0, vmax=max(1.0, 2 * off.max()))
    if len(classes) <= 20:
        ax.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        ax.set_yticks(range(len(classes)), classes)
        for i, j in np.ndindex(*share.shape):
            shade = "white" if share[i, j] > 1.2 * off.max() else BLACK
            ax.text(j, i, f"{share[i, j]:.1f}", ha="center", va="center", color=shade, fontsize=8)
    ax.set(xlabel="predicted", ylabel="true")
    ax.grid(visible=False)
