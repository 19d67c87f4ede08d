"""Per-channel sums and statistics of an activation in one pass over it."""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
from numba import prange

from kernels._jit import Variants, prepared

_CHUNK = 128  # channels at a time: their sums stay in the first-level cache
_WIDTH = 1024  # elements summed side by side at least: several rows, where channels are few
_ROWS = 64  # of that width, which one task sums in the array's dtype


def _channels_loop(X, count, total, squares, low, high):
    # count[c] = #{m: X[m, c] > 0}, total[c] = sum_m D[m, c], squares[c] = sum_m D[m, c]^2,
    # D[m, c] = X[m, c] - X[0, c]: shifted, so that the squares do not cancel;  X (M, C)
    M, C = X.shape
    for k in prange((C + _CHUNK - 1) // _CHUNK):
        lo, hi = k * _CHUNK, min(C, (k + 1) * _CHUNK)
        n, t, q, small, large = count[lo:hi], total[lo:hi], squares[lo:hi], low[lo:hi], high[lo:hi]
        for m in range(M):
            x, first = X[m, lo:hi], X[0, lo:hi]
            for c in range(hi - lo):
                v = x[c]
                d = np.float64(v) - np.float64(first[c])
                n[c] += np.int64(v > 0)
                t[c] += d
                q[c] += d * d
                small[c] = v if v < small[c] else small[c]
                large[c] = v if v > large[c] else large[c]


_channels = Variants(_channels_loop)

#: count above zero (int64), mean and summed squared deviations from it (float64), least, largest
Moments = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def channels(x: np.ndarray) -> Moments:
    """Count above zero, mean, squared deviations summed, minimum and maximum of each column.

    x (M, C) with M >= 1; every result has shape (C,). A NaN makes its column's mean and squares
    NaN and is passed over by the other three.
    """
    if x.ndim != 2 or not len(x):
        raise ValueError(f"channels: expected (M, C) with M >= 1, got shape {x.shape}")
    (x,) = prepared("channels", x)
    rows, columns = x.shape
    count = np.zeros(columns, np.int64)
    total, squares = np.zeros(columns), np.zeros(columns)
    low, high = np.full(columns, np.inf, x.dtype), np.full(columns, -np.inf, x.dtype)
    _channels.choose(x.nbytes)(x, count, total, squares, low, high)
    return count, x[0] + total / rows, squares - total * total / rows, low, high


_SMALL_BYTES = 16 * 1024  # for which NumPy's own sum costs less than a call of ours


def _sums_loop(X, F, parts, total):
    # total[c] = sum_m X[m C + c], by parts[t, i] = sum_r X[r F + i], t _ROWS <= r < (t + 1) _ROWS
    # X flat, parts (tasks, F), F % C == 0, total (C,) float64, 0 before
    for t in prange(len(parts)):
        part = parts[t]
        part[:] = 0
        for r in range(t * _ROWS, min((t + 1) * _ROWS, (X.size + F - 1) // F)):
            x = X[r * F : (r + 1) * F]
            for i in range(x.size):
                part[i] += x[i]
    for t in range(len(parts)):
        for first in range(0, F, total.size):
            part = parts[t, first : first + total.size]
            for c in range(total.size):
                total[c] += part[c]


_sums = Variants(_sums_loop)


def sums(x: np.ndarray) -> np.ndarray:
    """sum_m x[m, c]: x (..., C) -> (C,), in the dtype of x; its parts are added up in float64."""
    (x,) = prepared("sums", x)
    if x.nbytes < _SMALL_BYTES:
        return np.add.reduce(x.reshape(-1, x.shape[-1]), axis=0)
    total = np.zeros(x.shape[-1])
    if x.size:
        width = max(1, _WIDTH // total.size) * total.size
        parts = np.empty((-(-x.size // (width * _ROWS)), width), x.dtype)
        _sums.choose(x.nbytes)(x.reshape(-1), width, parts, total)
    return total.astype(x.dtype)
