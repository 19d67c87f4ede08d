"""Which range of numbers few bits should stand for.

A range that reaches the largest number has coarse steps; one that cuts it off is wrong about a few
numbers and better about the others. For activations a `Range` takes a `Histogram` and the number
of steps, and gives the two ends; for weights a `Clip` takes a matrix with a column for each channel
and the number of steps on each side of 0, and gives each column's largest magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np

from tinynn.errors import ConfigError
from tinynn.observe import Histogram
from tinynn.op import Array

#: (histogram, steps) -> (least, most)
Range = Callable[[Histogram, int], tuple[float, float]]
#: (weights (K, N), steps on each side of 0 (N,)) -> the magnitude at which each column is cut (N,)
Clip = Callable[[Array, Array], Array]
Distribution = Literal["laplace", "gauss", "best"]

_CANDIDATES = 128  #: thresholds that are tried, equally far from each other


# --- activations ----------------------------------------------------------------------------------


def minmax(seen: Histogram, steps: int) -> tuple[float, float]:
    """From the smallest number to the largest."""
    return min(seen.low, 0.0), max(seen.high, 0.0)


def percentile(share: float = 99.99) -> Range:
    """All but the outermost 100 - share percent of the numbers at each end that exists."""
    if not 50 < share <= 100:
        raise ConfigError(f"calibrate.percentile: required 50 < share <= 100; came {share}")

    def find(seen: Histogram, steps: int) -> tuple[float, float]:
        counts = seen.counts.copy()
        counts[seen.bins] += seen.zeros
        total = np.concatenate([[0], np.cumsum(counts)])
        edges = np.arange(-seen.bins, seen.bins + 1) * seen.width
        outside = total[-1] * (1 - share / 100)
        # the last edge up to which no more than `outside` lie, and in its bin in proportion
        ends = np.interp(
            [outside, total[-1] - outside], total + np.arange(len(total)) * 1e-9, edges
        )
        least, most = minmax(seen, steps)
        return max(least, min(float(ends[0]), 0.0)), min(most, max(float(ends[1]), 0.0))

    return find


def mse(seen: Histogram, steps: int) -> tuple[float, float]:
    """The cut with the least mean squared error of the rounded numbers.

    Found among 128 equally distant magnitudes; all of a bin counts as its middle. Choukroun et al.
    2019, "Low-bit quantization of neural networks for efficient inference", MMSE.
    """
    return _best(seen, lambda t: squared_error(seen, *_cut(seen, t), steps))


def kl(seen: Histogram, steps: int) -> tuple[float, float]:
    """The cut whose rounded numbers have the distribution that diverges least from the true one.

    Migacz 2017, "8-bit inference with TensorRT" (GTC): the distribution P of
    the numbers, with those beyond the cut in its last bin, against the distribution Q that is P
    without them, gathered in as many parts as there are levels and spread over the bins that were
    not empty. Of magnitudes, with half the levels for each sign if there are both; without zeros.
    """
    levels = steps + 1 if seen.low >= 0 or seen.high <= 0 else (steps + 1) // 2
    sizes = seen.counts[seen.bins :] + seen.counts[: seen.bins][::-1]
    filled = np.flatnonzero(sizes)
    if not len(filled) or filled[-1] < levels:
        return minmax(seen, steps)
    last = int(filled[-1]) + 1
    stride = max(1, last // (2 * _CANDIDATES))
    tried = range(last, levels - 1, -stride)
    found = [_divergence(sizes[:last].astype(np.float64), n, levels) for n in tried]
    return _cut(seen, tried[int(np.argmin(found))] * seen.width)


def _divergence(sizes: Array, n: int, levels: int) -> float:
    """KL(P || Q) with the cut after n bins."""
    p, kept = sizes[:n].copy(), sizes[:n]
    p[-1] += sizes[n:].sum()
    part = np.arange(n) * levels // n
    filled = np.bincount(part, kept > 0, levels)
    q = np.where(kept > 0, (np.bincount(part, kept, levels) / np.maximum(filled, 1))[part], 0)
    p, q = p / p.sum(), q / max(q.sum(), 1.0)
    # where nothing but what was cut off lies in the last bin, Q has nothing to say of it
    q = np.maximum(q, 1e-12)
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


def aciq(distribution: Distribution = "best") -> Range:
    """The cut with the least expected squared error of Laplace or Gauss distributed numbers.

    Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for rapid-
    deployment", analytical clipping: about 0, the parameters those of the numbers that are not 0;
    for numbers of one sign half the distribution. "best" is the one that really has the smaller
    error.
    """
    _require(distribution)

    def find(seen: Histogram, steps: int) -> tuple[float, float]:
        total = seen.counts.sum()
        if not total:
            return minmax(seen, steps)
        share, centres = seen.counts / total, seen.centres
        spread = {
            "laplace": float(share @ np.abs(centres)),
            "gauss": float(np.sqrt(share @ np.square(centres))),
        }
        intervals = 2 * steps if seen.low >= 0 or seen.high <= 0 else steps
        cuts = [
            width * clipping(kind, intervals)
            for kind, width in spread.items()
            if distribution in (kind, "best")
        ]
        return _least(seen, cuts, lambda t: squared_error(seen, *_cut(seen, t), steps))

    return find


def squared_error(seen: Histogram, least: float, most: float, steps: int) -> float:
    """The mean squared error of the middles of the bins, rounded to that many steps."""
    total = seen.counts.sum() + seen.zeros
    if not total or most <= least:
        return float(seen.counts @ np.square(seen.centres)) / max(int(total), 1)
    some = seen.counts > 0
    x, scale = seen.centres[some], (most - least) / steps
    low = np.rint(least / scale)
    rounded = np.clip(np.rint(x / scale), low, low + steps) * scale
    return float(seen.counts[some] @ np.square(x - rounded)) / int(total)


def _best(seen: Histogram, error: Callable[[float], float]) -> tuple[float, float]:
    top = max(-seen.low, seen.high)
    return _least(seen, [top * k / _CANDIDATES for k in range(_CANDIDATES, 0, -1)], error)


def _least(
    seen: Histogram, cuts: Iterable[float], error: Callable[[float], float]
) -> tuple[float, float]:
    return _cut(seen, min(cuts, key=error))


def _cut(seen: Histogram, magnitude: float) -> tuple[float, float]:
    least, most = minmax(seen, 0)
    return max(least, -magnitude), min(most, magnitude)


# --- weights --------------------------------------------------------------------------------------


def largest(weights: Array, steps: Array) -> Array:
    """Nothing is cut."""
    return np.abs(weights).max(axis=0)


def weights_aciq(distribution: Distribution = "best") -> Clip:
    """`aciq` for each channel's weights."""
    _require(distribution)

    def find(weights: Array, steps: Array) -> Array:
        spread = {
            "laplace": np.abs(weights).mean(axis=0),
            "gauss": np.sqrt(np.square(weights).mean(axis=0)),
        }
        cuts = [
            width * np.array([clipping(kind, 2 * int(n)) for n in steps])
            for kind, width in spread.items()
            if distribution in (kind, "best")
        ]
        return _least_columns(
            weights, steps, [np.minimum(c, largest(weights, steps)) for c in cuts]
        )

    return find


def weights_mmse(weights: Array, steps: Array) -> Array:
    """The cut with the least squared error, among 128 magnitudes (Choukroun et al. 2019)."""
    top = largest(weights, steps)
    return _least_columns(
        weights, steps, [top * k / _CANDIDATES for k in range(_CANDIDATES, 0, -1)]
    )


def _least_columns(weights: Array, steps: Array, cuts: list[Array]) -> Array:
    errors = np.stack([_column_errors(weights, steps, c) for c in cuts])
    return np.take_along_axis(np.stack(cuts), errors.argmin(axis=0)[None], axis=0)[0]


def _column_errors(weights: Array, steps: Array, cut: Array) -> Array:
    scale = np.where(cut > 0, cut / steps, 1)
    rounded = np.clip(np.rint(weights / scale), -steps, steps) * scale
    return np.square(weights - rounded).sum(axis=0)


def allocate(widths: Array, bits: int, *, least: int = 2, most: int = 8) -> Array:
    """Bits for each channel, as many levels together as with `bits` for all.

    The levels are in proportion to width^(2/3), which minimises the sum of the squared errors, and
    rounded to the nearest number of bits; `widths` (N,) are the channels' ranges. Banner et al.
    2019, per-channel bit allocation.
    """
    shares = np.where(widths > 0, widths, 0) ** (2 / 3)
    if not shares.any():
        return np.full(len(widths), bits)
    levels = shares / shares.sum() * len(widths) * 2**bits
    return np.clip(np.rint(np.log2(np.maximum(levels, 1))), least, most).astype(np.int64)


def shared(scales: Array, count: int) -> Array:
    """Each scale's next larger one among `count` in geometric series, the largest of all included.

    Nothing that the old grids reached is cut; steps grow by (largest / smallest)^(1 / count) at the
    most. `scales` (N,) are above 0.
    """
    top, octaves = scales.max(), np.log2(scales.max() / scales.min())
    if octaves == 0:
        return scales
    step = octaves / count
    below = np.clip(np.floor(np.log2(top / scales) / step), 0, count - 1)
    return top * 2.0 ** (-below * step)


# --- the optimal cut of a distribution ------------------------------------------------------------


def clipping(distribution: str, intervals: int) -> float:
    """Where to cut a Laplace distribution of scale 1 or a Gauss distribution of deviation 1.

    The magnitude t that minimises what rounding to `intervals` steps in -t ... t and cutting cost:

        laplace:  2 e^-t + t^2 / (3 intervals^2)
        gauss:    2 ((1 + t^2) Q(t) - t phi(t)) + t^2 / (3 intervals^2)

    (Banner et al. 2019), by bisection of the derivative. For 2, 3 and 4 bits 2.83,
    3.90, 5.03 and 1.71, 2.15, 2.56.
    """

    def slope(t: float) -> float:  # half the derivative
        if distribution == "laplace":
            tail = math.exp(-t)
        else:
            outside = math.erfc(t / math.sqrt(2)) / 2
            tail = 2 * (math.exp(-t * t / 2) / math.sqrt(2 * math.pi) - t * outside)
        return t / (3 * intervals**2) - tail

    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low


def _require(distribution: str) -> None:
    if distribution not in ("laplace", "gauss", "best"):
        raise ConfigError(f"aciq: required laplace, gauss or best; came {distribution!r}")
