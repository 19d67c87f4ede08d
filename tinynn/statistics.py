"""Look inside a training: activations and gradients of every layer, and what is wrong with them.

Dead nodes show as channels that are always zero, saturation and explosion in the spread of the
activations over depth, vanishing gradients in the spread of the gradients (Glorot & Bengio 2010,
"Understanding the difficulty of training deep feedforward neural networks", section 4).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinynn.errors import DataError, GraphError
from tinynn.nn.module import Module, mode, running_module
from tinynn.op import Array, Op, Shape
from tinynn.storage import PathLike, write_bytes
from tinynn.tensor import Tensor, gradients, recording


@dataclass
class Moments:
    """Mean, spread, zeros and norm of all numbers of an array, over one or several batches.

    Parts are combined as in Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances", eq. 2.1; in float64.
    """

    size: int = 0  #: numbers seen
    mean: float = 0.0
    zeros: int = 0  #: how many were exactly zero
    batches: int = 0
    _deviations: float = 0.0
    _squares: float = 0.0

    def add(self, array: Array) -> None:
        """Take in an array of at least one number."""
        x = np.asarray(array, np.float64)
        mean = float(x.mean())
        delta, total = mean - self.mean, self.size + x.size
        self._deviations += float(np.square(x - mean).sum())
        self._deviations += delta * delta * self.size * x.size / total
        self.mean += delta * x.size / total
        self._squares += float(np.square(x).sum())
        self.zeros += int(x.size - np.count_nonzero(x))
        self.size = total
        self.batches += 1

    @property
    def std(self) -> float:
        """The standard deviation of all numbers."""
        return math.sqrt(self._deviations / max(self.size, 1))

    @property
    def zero_share(self) -> float:
        """The share of numbers that are exactly zero."""
        return self.zeros / max(self.size, 1)

    @property
    def norm(self) -> float:
        """The Euclidean norm of the array, root mean square over the batches."""
        return math.sqrt(self._squares / max(self.batches, 1))


@dataclass
class LayerStatistics:
    """The result of one op, and the gradient of the loss by it (no size: none reached it)."""

    path: str  #: of the module that applied the op
    op: str
    shape: Shape  #: of the first batch
    activation: Moments = field(default_factory=Moments)
    gradient: Moments = field(default_factory=Moments)
    used: Array | None = None  #: for each channel, whether it was ever other than zero

    @property
    def dead(self) -> int:
        """How many channels were zero for every input and at every position."""
        return 0 if self.used is None else int((~self.used).sum())

    def take(self, activation: Array) -> None:
        """Count a batch of results in."""
        self.activation.add(activation)
        if activation.ndim > 1:
            seen: Array = np.any(activation.reshape(-1, activation.shape[-1]), axis=0)
            self.used = seen if self.used is None else self.used | seen


@dataclass
class ParameterStatistics:
    """A parameter, and the gradient of the loss by it (no size: none reached it)."""

    name: str
    shape: Shape
    value: Moments
    gradient: Moments = field(default_factory=Moments)

    @property
    def ratio(self) -> float:
        """Norm of the gradient / norm of the parameter: how far a learning rate of 1 moves it."""
        return self.gradient.norm / self.value.norm if self.value.norm else math.inf


@dataclass(frozen=True)
class Inside:
    """Activations and gradients in the order of computation: `print` it, `draw` it."""

    layers: tuple[LayerStatistics, ...]
    parameters: tuple[ParameterStatistics, ...]
    loss: float  #: mean over the batches
    batches: int

    def __str__(self) -> str:
        return "\n".join(_table(self))

    def draw(self, path: PathLike) -> None:
        """Write a PNG: over depth, activations and their zeros, gradients by both, on log scales.

        Raises OutputError if it cannot be written.
        """
        write_bytes(path, _picture(self))


def statistics(model: Module, data: Iterable[Any], loss: Callable[[Tensor, Any], Tensor]) -> Inside:
    """Run a copy of `model` in training mode over `data`, batches (x, y), with `loss(output, y)`.

    The model itself, its gradients and its running statistics stay as they are. NaN and infinity
    are taken in as they come. Raises DataError without a batch, GraphError if the ops depend on
    the data.
    """
    model = model.copy()
    paths = {id(m): path for path, m in model.named_modules()}
    parameters = {
        id(p): ParameterStatistics(name, p.shape, _moments(p.data))
        for name, p in model.named_parameters()
    }
    layers: list[LayerStatistics] = []
    losses: list[float] = []
    with mode(model, training=True), np.errstate(invalid="ignore", over="ignore"):
        for x, y in data:
            output, made = _forward(model, x, paths)
            result = loss(output, y)
            losses.append(float(result.item()))
            if not layers:
                layers = [LayerStatistics(path, op, t.shape) for path, op, t in made]
            if [(r.path, r.op) for r in layers] != [(path, op) for path, op, _ in made]:
                raise GraphError(
                    f"statistics: batch {len(losses) - 1} made the model compute other ops than "
                    "the first; they must not depend on the data"
                )
            rows: dict[int, LayerStatistics | ParameterStatistics] = {**parameters}
            for row, (_, _, t) in zip(layers, made, strict=True):
                row.take(t.data)
                rows[id(t)] = row
            for tensor, gradient in gradients(result, np.ones((), result.dtype), False):
                if id(tensor) in rows:
                    rows[id(tensor)].gradient.add(gradient)
    if not losses:
        raise DataError("statistics: required at least one batch; came none")
    mean = math.fsum(losses) / len(losses)
    return Inside(tuple(layers), tuple(parameters.values()), mean, len(losses))


def _forward(
    model: Module, x: Any, paths: dict[int, str]
) -> tuple[Tensor, list[tuple[str, str, Tensor]]]:
    """The output, and of every op the module's path, its name and its result."""
    made: list[tuple[str, str, Tensor]] = []

    def record(op: Op, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = op.name + ("+relu" if getattr(op, "relu", False) else "")
        made.append((paths.get(id(running_module()), ""), name, output))

    with recording(record):
        return model(Tensor(x)), made


def _moments(array: Array) -> Moments:
    moments = Moments()
    moments.add(array)
    return moments


def _table(inside: Inside) -> list[str]:
    shapes = ["x".join(map(str, row.shape)) or "number" for row in inside.layers]
    layers = [
        [r.path, r.op, shape, f"{r.activation.mean:.3g}", f"{r.activation.std:.3g}",
         f"{r.activation.zero_share:.1%}", f"{r.dead} of {r.shape[-1]}" if r.shape[1:] else "",
         *_gradient(r.gradient)]
        for r, shape in zip(inside.layers, shapes, strict=True)
    ]  # fmt: skip
    parameters = [
        [p.name, "x".join(map(str, p.shape)), f"{p.value.std:.3g}", f"{p.value.norm:.3g}",
         *_gradient(p.gradient), f"{p.ratio:.2e}" if p.gradient.size and p.value.norm else "-"]
        for p in inside.parameters
    ]  # fmt: skip
    head = ["layer", "op", "result", "mean", "std", "zeros", "dead channels"]
    gradient = ["gradient mean", "std", "norm"]
    many = f"{inside.batches} batch{'es' * (inside.batches > 1)}"
    return [
        *_aligned([[*head, *gradient], *layers], 3),
        "",
        *_aligned([["parameter", "shape", "std", "norm", *gradient, "relative"], *parameters], 2),
        "",
        f"{many}, mean loss {inside.loss:.6g}; norms: root mean squares over batches; relative: to "
        "the parameter's norm; dead: zero for every input",
    ]


def _gradient(moments: Moments) -> list[str]:
    if not moments.size:
        return ["-", "-", "-"]
    return [f"{moments.mean:.2e}", f"{moments.std:.2e}", f"{moments.norm:.2e}"]


def _aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _picture(inside: Inside) -> bytes:
    from matplotlib.figure import Figure  # here: it takes half a second to import

    layers, parameters = inside.layers, inside.parameters
    longest = max(len(layers), len(parameters))
    figure = Figure(figsize=(max(6.0, 1.6 + 0.2 * longest), 10), layout="constrained")
    axes = figure.subplots(4, 1)
    for above in axes[:2]:  # the names below the third hold for these, too
        above.sharex(axes[2])
    names = [f"{row.path} {row.op}".strip() for row in layers]
    _bars(axes[0], names, [r.activation.std for r in layers], "#3b6fb5")
    axes[0].set_title("activations: standard deviation", fontsize=9)
    _bars(axes[1], names, [r.activation.zero_share for r in layers], "#9a9a9a", log=False)
    dead = [r.dead / r.shape[-1] if r.shape[1:] else 0.0 for r in layers]
    axes[1].bar(range(len(layers)), dead, 0.4, color="#b03a3a", label="channels always zero")
    axes[1].set_ylim(0, 1)
    axes[1].set_title("activations: share of zeros (grey), of dead channels (red)", fontsize=9)
    _bars(axes[2], names, [r.gradient.std for r in layers], "#d98e32")
    axes[2].set_title("gradients by the activations: standard deviation", fontsize=9)
    for above in axes[:2]:
        above.tick_params(axis="x", labelbottom=False)
    _bars(axes[3], [p.name for p in parameters], [p.gradient.norm for p in parameters], "#5a8f4d")
    axes[3].set_title("gradients by the parameters: Euclidean norm", fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _bars(
    axes: Any, names: Sequence[str], values: Sequence[float], colour: str, *, log: bool = True
) -> None:
    """Bars over depth; on a log scale, what is zero or not finite has none and a cross instead."""
    shown = [v if math.isfinite(v) and (v > 0 or not log) else 0.0 for v in values]
    positive = [v for v in shown if v > 0]
    if log and positive:
        floor = 10 ** (math.floor(math.log10(min(positive))) - 0.3)
        axes.set_yscale("log")
        axes.bar(range(len(shown)), [max(v - floor, 0) for v in shown], 0.8, floor, color=colour)
        axes.set_ylim(floor, 2 * max(positive))
    else:
        axes.bar(range(len(shown)), shown, 0.8, color=colour)
    for i, (v, kept) in enumerate(zip(values, shown, strict=True)):
        if log and not kept:
            what = "0" if v == 0 else "not finite"
            axes.annotate(what, (i, 0), xycoords=("data", "axes fraction"), fontsize=5, ha="center")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_axisbelow(True)
