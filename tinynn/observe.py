"""Watch a model work: per-channel statistics of its activations, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernels import statistics
from tinynn.errors import DataError, GraphError
from tinynn.graph import Graph, Value, trace
from tinynn.nn.module import Module
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

    def add(self, activation: Array) -> None:
        """Take in an array (..., channels)."""
        x = activation.reshape(-1, activation.shape[-1])
        n = len(x)
        count, mean, squares, low, high = statistics.channels(x)
        delta, total = mean - self.mean, self.samples + n
        self.mean = self.mean + delta * (n / total)
        self._squares = self._squares + squares + delta * delta * (self.samples * n / total)
        self.count = self.count + count
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.samples = total


class Observer:
    """The graph of a model and the statistics of every value that an op computed in it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._statistics = {n.output.index: Statistics(n.output.shape[-1]) for n in graph.nodes}
        self._statistics[graph.input.index] = Statistics(graph.input.shape[-1])

    def __getitem__(self, value: Value) -> Statistics:
        return self._statistics[value.index]

    def watch(self, model: Module, x: Array) -> None:
        """Run the model on one batch and take its activations in."""
        position = 0

        def record(op: Op, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal position
            if position >= len(self.graph.nodes) or self.graph.nodes[position].op != op:
                raise GraphError(f"observe: the model computed {op} where the trace did not")
            self._statistics[self.graph.nodes[position].output.index].add(output._data)
            position += 1

        self._statistics[self.graph.input.index].add(x)
        with no_grad(), recording(record):
            model(Tensor(x, copy=False))


def observe(model: Module, data: Iterable[Any]) -> Observer:
    """Run `model` in eval mode over `data` (batches: arrays, or tuples whose first is the input).

    Raises DataError if there is no batch, GraphError if the model's ops depend on the data.
    """
    observer = None
    modes = [(m, m.training) for _, m in model.named_modules()]
    model.eval()
    try:
        for batch in data:
            x = np.asarray(batch[0] if isinstance(batch, tuple) else batch)
            if observer is None:
                observer = Observer(trace(model, x[:1]))
            observer.watch(model, x)
    finally:
        for module, mode in modes:
            module.training = mode
    if observer is None:
        raise DataError("observe: required at least one batch; came none")
    return observer
