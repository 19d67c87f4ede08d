"""Layers of low rank: W = U S V^T, cut after n singular values, as two thinner layers.

    small = factorize.layers(model, example, factorize.error(1e-3), report=print)

A linear layer or a pointwise convolution of m_in x m_out becomes two of m_in x n and n x m_out. A
K x K convolution can be cut in two ways:

- "matrix": its weights as (K K m_in) x m_out; a K x K convolution to n channels, then a pointwise
  one (Çallı 2017, section 2.4.3);
- "separable": as (K m_in) x (K m_out); a 1 x K convolution to n channels, then a K x 1 one
  (Jaderberg et al. 2014, "Speeding up convolutional neural networks with low rank expansions",
  scheme 2).

A layer is replaced only where that costs fewer multiply-adds: n < m_in m_out / (m_in + m_out) for a
matrix. Depthwise convolutions are never cut: they have one input channel. A mask is not kept: the
factors of a sparse matrix are dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tinynn.compress.exchange import LAYERS, exchange, plain_layers, require_floating
from tinynn.count import macs
from tinynn.errors import ConfigError
from tinynn.graph import Node, trace
from tinynn.nn.conv import Conv2d, PointwiseConv2d
from tinynn.nn.layers import Linear
from tinynn.nn.module import Module, Sequential
from tinynn.op import Array, Shape

#: (singular values, largest first; number of weights) -> how many of them stay
Rank = Callable[[Array, int], int]
Form = Literal["matrix", "separable", "cheapest"]


# --- the rank -------------------------------------------------------------------------------------


def error(threshold: float) -> Rank:
    """The lowest rank whose mean squared error stays below `threshold`.

    The rank is lowered by one for as long as it does (Çallı 2017, section 2.4.3). The error of rank
    n is the sum of the squared singular values behind the n-th over the number of weights.
    """
    if not 0 <= threshold < math.inf:
        raise ConfigError(f"factorize.error: required a finite threshold >= 0; came {threshold}")

    def rank(values: Array, size: int) -> int:
        return max(1, int((_lost(values) / size >= threshold).sum()))

    return rank


def energy(share: float) -> Rank:
    """The lowest rank that holds this share of the summed squared singular values."""
    if not 0 < share <= 1:
        raise ConfigError(f"factorize.energy: required 0 < share <= 1; came {share}")

    def rank(values: Array, size: int) -> int:
        lost = _lost(values)
        return max(1, int((lost > (1 - share) * lost[0]).sum()))

    return rank


def number(rank: int) -> Rank:
    """This rank, or the full one where that is lower."""
    if rank < 1:
        raise ConfigError(f"factorize.number: required a rank >= 1; came {rank}")
    return lambda values, size: min(rank, len(values))


def _lost(values: Array) -> Array:
    """What each rank from 0 to full - 1 leaves out, as a sum of squares."""
    return np.cumsum(np.square(values[::-1]))[::-1]


# --- the pass -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """What was found for one layer; `str` is one line of a report."""

    path: str
    form: str  #: "matrix" or "separable"
    shape: Shape  #: of the weights
    rank: int
    full: int  #: the rank of the whole
    error: float  #: mean squared error of the weights
    energy: float  #: the share of the squared singular values that is kept
    macs: int  #: of the whole layer, on a batch like the example
    macs_after: int  #: of the two that stand for it
    weights: int
    weights_after: int
    applied: bool  #: whether it costs less, so that the layer was replaced

    def __str__(self) -> str:
        said = "replaced" if self.applied else "left as it is"
        return (
            f"{self.path} {self.shape} {self.form}: rank {self.rank} of {self.full}, mean squared "
            f"error {self.error:.3g}, energy {self.energy:.4f}; multiply-adds {self.macs:,} -> "
            f"{self.macs_after:,}, weights {self.weights:,} -> {self.weights_after:,}: {said}"
        )


def layers(
    model: Module,
    example: Any,
    rank: Rank,
    *,
    form: Form = "matrix",
    only: Collection[str] | None = None,
    always: bool = False,
    report: Callable[[Cut], None] | None = None,
) -> Module:
    """A new model in which linear layers and convolutions are two of lower rank where it pays.

    `example` is a batch, for the sizes of the images. `rank` says how much of a layer stays; `form`
    how a K x K convolution is cut, "cheapest" by whichever way has fewer multiply-adds. `only`
    names the layers by dotted path; `always` replaces them even where that costs more. `report` is
    called with a Cut for every layer that was looked at, replaced or not.

    Left alone, without a report: depthwise and transposed convolutions, subclasses with a forward
    of their own, layers that share their weights with others or do not run on the example. A model
    that is one layer is refused. Raises ConfigError for `only` that names other than layers to cut,
    and for a model with quantised layers: `fold_batchnorm`, then this, then `quantize`.
    """
    if form not in ("matrix", "separable", "cheapest"):
        raise ConfigError(f"factorize: form is matrix, separable or cheapest; came {form!r}")
    if type(model) in LAYERS:
        raise ConfigError("factorize: required layers inside a model; put this one in a Sequential")
    if only is None:
        require_floating(model, "factorize")
    runs: dict[str, list[Node]] = {}
    for node in trace(model, example).nodes:
        runs.setdefault(node.path, []).append(node)
    found = {path: m for path, m in plain_layers(model).items() if path in runs}
    if only is not None and (unknown := sorted(set(only) - found.keys())):
        raise ConfigError(f"factorize: no layers {unknown} to cut; there are {sorted(found)}")
    new: dict[str, Module] = {}
    for path, layer in found.items():
        if only is not None and path not in only:
            continue
        forms = ("matrix", "separable") if form == "cheapest" else (form,)
        cuts = [_cut(path, layer, runs[path], f, rank, always) for f in forms]
        cut, factors = min(cuts, key=lambda c: (c[0].macs_after, c[0].error))
        if cut.applied:
            new[path] = factors
        if report:
            report(cut)
    return exchange(model, new)


def _cut(
    path: str, layer: Linear | Conv2d, runs: list[Node], form: str, rank: Rank, always: bool
) -> tuple[Cut, Sequential]:
    matrix = _matrix(layer.weight.data, form)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    n = rank(values, matrix.size)
    root = np.sqrt(values[:n])
    factors = _factors(layer, left[:, :n] * root, root[:, None] * right[:n], form)
    lost = np.append(_lost(values), 0.0)
    before = sum(macs(node) for node in runs)
    inputs = [np.zeros(run.inputs[0].shape, run.inputs[0].dtype) for run in runs]
    after = sum(macs(node) for x in inputs for node in trace(factors, x).nodes)
    cut = Cut(
        path,
        form,
        layer.weight.shape,
        rank=n,
        full=len(values),
        error=float(lost[n] / matrix.size),
        energy=float(1 - lost[n] / lost[0]) if lost[0] else 1.0,
        macs=before,
        macs_after=after,
        weights=layer.weight.size,
        weights_after=sum(p.size for p in factors.parameters() if p.ndim > 1),
        applied=always or after < before,
    )
    return cut, factors


def _matrix(weight: Array, form: str) -> Array:
    """The weights as the matrix that the form cuts, in float64."""
    w = weight.astype(np.float64)
    if w.ndim == 4 and form == "separable":
        rows, columns, m_in, m_out = w.shape
        return w.transpose(1, 2, 0, 3).reshape(columns * m_in, rows * m_out)
    return w.reshape(-1, w.shape[-1])


def _factors(layer: Linear | Conv2d, first: Array, second: Array, form: str) -> Sequential:
    """The two layers: `first` (rows, n) and `second` (n, columns) as their weights."""
    n, trained = len(second), layer.weight.like
    dtype = layer.weight.dtype
    rng = np.random.default_rng(0)  # of what is replaced at once
    if isinstance(layer, Linear):
        a: Linear | Conv2d = Linear(1, 1, bias=False, rng=rng)
        b: Linear | Conv2d = Linear(1, 1, bias=False, rng=rng)
        shapes: tuple[Shape, Shape] = (first.shape, second.shape)
    else:
        height, width, m_in, m_out = layer.weight.shape
        if form == "separable":
            (rows, columns), (up, across) = layer.stride, layer.dilation
            down_by, along_by = _sides(layer.padding)
            a = _conv(rng, (1, columns), along_by, (1, across))
            b = _conv(rng, (rows, 1), down_by, (up, 1))
            shapes = (1, width, m_in, n), (height, 1, n, m_out)
            second = second.reshape(n, height, m_out).transpose(1, 0, 2)
        else:
            a = _conv(rng, layer.stride, layer.padding, layer.dilation)
            b = PointwiseConv2d(1, 1, bias=False, rng=rng)
            shapes = (height, width, m_in, n), (1, 1, n, m_out)
    a.weight = trained(first.reshape(shapes[0]).astype(dtype))
    b.weight = trained(second.reshape(shapes[1]).astype(dtype))
    b.bias = None if layer.bias is None else layer.bias.like(layer.bias.data)
    return Sequential(a, b)


def _conv(rng: np.random.Generator, stride: Any, padding: Any, dilation: Any) -> Conv2d:
    return Conv2d(1, 1, 1, stride=stride, padding=padding, dilation=dilation, bias=False, rng=rng)


def _sides(padding: Any) -> tuple[Any, Any]:
    """The padding of the K x 1 and of the 1 x K part."""
    if isinstance(padding, str):
        return padding, padding
    above, beside = padding
    return (above, (0, 0)), ((0, 0), beside)
