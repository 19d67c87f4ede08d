"""Watch a model work: per-channel statistics of its activations, in one pass over the data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from kernels import statistics
from tinynn.errors import DataError, GraphError, NonFiniteError, PruneError
from tinynn.graph import Value, trace
from tinynn.nn.module import Module, mode, running_module
from tinynn.op import Array, Op
from tinynn.tensor import Tensor, no_grad, recording


@dataclass
class Statistics:
    """Running statistics of an activation, one entry a channel (its last axis), in float64.

    Means and variances of the parts are combined as in Chan, Golub and LeVeque 1979, "Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances", eq. 2.1.
    """

    channels: int
    samples: int = 0  #: values seen in each channel: rows times positions
    count: Array = field(init=False)  #: how many of them were above zero
    mean: Array = field(init=False)
    low: Array = field(init=False)  #: the smallest
    high: Array = field(init=False)  #: the largest
    _squares: Array = field(init=False)  #: summed squared deviations from the mean

    def __post_init__(self) -> None:
        self.count = np.zeros(self.channels, np.int64)
        self.mean, self._squares = np.zeros(self.channels), np.zeros(self.channels)
        self.low, self.high = np.full(self.channels, np.inf), np.full(self.channels, -np.inf)

    @property
    def variance(self) -> Array:
        """Mean squared deviation from the mean; exactly 0 where all values were equal."""
        return np.where(self.low == self.high, 0.0, self._squares / max(self.samples, 1))

    @property
    def rate(self) -> Array:
        """The share of values above zero."""
        return self.count / max(self.samples, 1)

    @property
    def constant(self) -> Array:
        """Whether all values of the channel were equal."""
        return self.low == self.high

    @property
    def finite(self) -> Array:
        """Whether neither the values nor what is computed of them is NaN or infinite."""
        numbers = np.stack([self.mean, self._squares, self.low, self.high])
        return np.asarray(np.isfinite(numbers).all(axis=0))

    def pooled(self, places: Array, size: int) -> Statistics:
        """The statistics of `size` channels of which column i here holds values of places[i].

        Several columns may hold values of one channel (after a flatten for instance), each channel
        has equally many; columns of place -1 do not count.
        """
        columns = np.flatnonzero(places >= 0)
        order = columns[np.argsort(places[columns], kind="stable")].reshape(size, -1)
        out = Statistics(size, self.samples * order.shape[1])
        out.count = self.count[order].sum(axis=1)
        out.low, out.high = self.low[order].min(axis=1), self.high[order].max(axis=1)
        mean = self.mean[order]
        out.mean = mean[:, 0] if order.shape[1] == 1 else mean.mean(axis=1)
        between = ((mean - out.mean[:, None]) ** 2).sum(axis=1) * self.samples
        out._squares = self._squares[order].sum(axis=1) + between
        return out

    def add(self, activation: Array) -> None:
        """Take in an array (..., channels) of at least one row."""
        x = activation.reshape(-1, activation.shape[-1])
        x = x if x.dtype.kind == "f" else x.astype(np.float64)
        n = len(x)
        with np.errstate(invalid="ignore", over="ignore"):  # `finite` tells
            count, mean, squares, low, high = statistics.channels(x)
            delta, total = mean - self.mean, self.samples + n
            self.mean = self.mean + delta * (n / total)
            self._squares = self._squares + squares + delta * delta * (self.samples * n / total)
        self.count = self.count + count
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.samples = total


@dataclass
class Histogram:
    """How often which numbers occurred in a whole activation, for the choice of a range.

    Bin i covers [(i - bins) width, (i - bins + 1) width), where width = reach / bins and the reach
    is the smallest power of two above every magnitude so far: when it grows, neighbours are added,
    so that the counts are those of one pass with the final bins. Exact zeros, which a ReLU makes
    in numbers, are counted apart. `bins` is a power of two.
    """

    bins: int = 2048
    reach: float = 0.0
    low: float = math.inf  #: the smallest number
    high: float = -math.inf  #: the largest
    zeros: int = 0
    counts: Array = field(init=False)  #: (2 bins,)

    def __post_init__(self) -> None:
        if self.bins < 1 or self.bins & (self.bins - 1):
            raise DataError(f"Histogram: required a power of two; came {self.bins} bins")
        self.counts = np.zeros(2 * self.bins, np.int64)

    @property
    def width(self) -> float:
        """The width of a bin; 0 while all numbers are 0."""
        return self.reach / self.bins

    @property
    def centres(self) -> Array:
        """The middle of each bin, (2 bins,)."""
        return (np.arange(-self.bins, self.bins) + 0.5) * self.width

    def add(self, activation: Array) -> None:
        """Take in finite numbers."""
        x = activation.reshape(-1)
        x = x if x.dtype.kind == "f" else x.astype(np.float64)
        low, high = float(x.min()), float(x.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        zeros = x.size - int(np.count_nonzero(x))
        self.zeros += zeros
        if not self.reach:
            return
        factor = self.bins / self.reach
        if factor > float(np.finfo(x.dtype).max):  # numbers near the smallest there are
            x = x.astype(np.float64)
        place = np.floor(x * x.dtype.type(factor)).astype(np.int64) + self.bins
        self.counts += np.bincount(place, minlength=2 * self.bins)
        self.counts[self.bins] -= zeros

    def merge(self, other: Histogram) -> None:
        """Take in what another of as many bins has counted."""
        counts = Histogram(other.bins, other.reach)
        counts.counts = other.counts.copy()
        self._widen(other.reach / 2)
        counts._widen(self.reach / 2)
        self.counts += counts.counts
        self.zeros += other.zeros
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def _widen(self, magnitude: float) -> None:
        if magnitude < self.reach or not magnitude:
            return
        reach = math.ldexp(1.0, math.frexp(magnitude)[1])
        if self.reach:
            factor = min(int(min(reach / self.reach, 2.0**40)), self.bins)
            above = self.counts[self.bins :].reshape(-1, factor).sum(axis=1)
            below = self.counts[: self.bins].reshape(-1, factor).sum(axis=1)
            self.counts = np.zeros_like(self.counts)
            self.counts[self.bins : self.bins + len(above)] = above
            self.counts[self.bins - len(below) : self.bins] = below
        self.reach = reach


class Observer:
    """The graph of a model and the statistics of every value that an op computed in it.

    `example`: a batch of one or more rows on which the graph is traced. A value whose last axis
    changes its length with the batch has no channels and no statistics, nor has one without axes.
    With `bins` every value has a `Histogram`, too.
    """

    def __init__(self, model: Module, example: Array, *, bins: int = 0) -> None:
        self.example = np.array(example)
        self.graph = trace(model, example)
        self._digest = _digest(model)
        self._paths = {id(m): path for path, m in model.named_modules()}
        values = [self.graph.input, *(n.output for n in self.graph.nodes)]
        self._statistics = {v.index: Statistics(v.channels) for v in values if v.shape}
        self._histograms = {v.index: Histogram(bins) for v in values} if bins else {}

    def __contains__(self, value: Value) -> bool:
        return value.index in self._statistics

    def __getitem__(self, value: Value) -> Statistics:
        if value not in self:
            raise GraphError(f"observe: nothing was observed of {value}: it has no channels")
        return self._statistics[value.index]

    def histogram(self, value: Value) -> Histogram:
        """The histogram of a value. Raises GraphError if none were asked for."""
        if value.index not in self._histograms:
            raise GraphError(
                f"observe: no histogram of {value}: observe(..., bins=2048) makes them"
            )
        return self._histograms[value.index]

    def require(self, model: Module, who: str) -> None:
        """Raise PruneError unless this was observed on `model` as it is now, for the pass `who`."""
        if _digest(model) != self._digest:
            raise PruneError(
                f"{who}: what was observed belongs to another model, or to this one before its "
                "parameters changed; observe it again"
            )

    def watch(self, model: Module, x: Array) -> None:
        """Run the model on one batch and take its activations in.

        Raises GraphError if it computes other ops than were traced, NonFiniteError for activations
        that are NaN or infinite, or so large that their variance is.
        """
        nodes, position = self.graph.nodes, 0

        def record(op: Op, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal position
            path = self._paths.get(id(running_module()), "")
            # Not the ops themselves: an attribute, as a shape, may hold the size of the batch.
            node = nodes[position] if position < len(nodes) else None
            if node is None or (node.op.name, node.path) != (op.name, path):
                traced = f"{node.op.name} in {node.path!r}" if node else "nothing more"
                raise GraphError(
                    f"observe: the model computed {op.name} in {path!r} where the trace has "
                    f"{traced}; its ops must not depend on the data"
                )
            self._add(node.output, output._data, f"the result of {op.name} in {path!r}")
            position += 1

        self._add(self.graph.input, x, "the model's input")
        with no_grad(), recording(record):
            model(Tensor(x, copy=False))
        if position < len(nodes):
            raise GraphError(
                f"observe: the model computed {position} ops where the trace has {len(nodes)}; its "
                "ops must not depend on the data"
            )

    def _add(self, value: Value, activation: Array, what: str) -> None:
        if value in self and activation.shape[-1:] != (self[value].channels,):
            del self._statistics[value.index]
        if value not in self:
            return
        self[value].add(activation)
        bad = int((~self[value].finite).sum())
        if bad:
            raise NonFiniteError(
                f"observe: in {what}, {bad} of {value.channels} channels are not finite, or too "
                "large for their variance"
            )
        if value.index in self._histograms:
            self._histograms[value.index].add(activation)


Watching = TypeVar("Watching", bound=Observer)


def observe(model: Module, data: Iterable[Any], *, bins: int = 0) -> Observer:
    """Run `model` in eval mode over `data`, batches: inputs, or tuples whose first is the input.

    With `bins`, a power of two, every value has a histogram of twice as many bins, besides.

    Raises DataError if there is no batch or an empty one, or one array instead of an iterable of
    batches, GraphError if the model's ops depend on the data, NonFiniteError naming the op and its
    module if an activation is NaN or infinite.
    """
    return observe_by(lambda m, example: Observer(m, example, bins=bins), model, data)


def observe_by(
    kind: Callable[[Module, Array], Watching], model: Module, data: Iterable[Any]
) -> Watching:
    """The same by an Observer of another kind, which sees every activation."""
    require_batches("observe", data)
    observer = None
    with mode(model, training=False):
        for i, batch in enumerate(data):
            x = rows("observe", i, batch)
            if observer is None:
                observer = kind(model, x[:1])
            observer.watch(model, x)
    if observer is None:
        raise DataError("observe: required at least one batch; came none")
    return observer


def rows(what: str, i: int, batch: Any) -> Array:
    """The input of batch number i: the batch, or the first of a tuple or list of arrays.

    Raises DataError, which names `what` reads it, if it has no rows.
    """
    arrays = isinstance(batch, list) and batch and getattr(batch[0], "ndim", 0) > 0
    x = np.asarray(batch[0] if arrays or isinstance(batch, tuple) else batch)
    if x.ndim == 0 or x.size == 0:
        raise DataError(f"{what}: required at least one row; batch {i} has {x.shape}")
    return x


def require_batches(what: str, data: object) -> None:
    """Raise DataError for one array, whose rows would be taken for batches."""
    if isinstance(data, np.ndarray | Tensor):
        raise DataError(
            f"{what}: required an iterable of batches; came one array of shape {data.shape} (a "
            "single batch x is given as [x])"
        )


def _digest(model: Module) -> str:
    """A hash of the module tree's classes, its parameters and its buffers."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        digest.update(repr((path, module.kind())).encode())
    arrays = {k: p.data for k, p in model.named_parameters()} | dict(model.named_buffers())
    for name, array in arrays.items():
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
