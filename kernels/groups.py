"""Groups of neighbouring channels: each channel several times, and the sums over each group."""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
from numba import prange

from kernels import memory
from kernels._jit import Variants

_CHUNK = 8192  # elements of the narrow array, which one task copies or sums


def _copies_loop(X, factor, Y):
    # Y[i factor + r] = X[i], r < factor;  X, Y flat
    for c in prange((X.size + _CHUNK - 1) // _CHUNK):
        x = X[c * _CHUNK : (c + 1) * _CHUNK]
        y = Y[c * _CHUNK * factor : (c * _CHUNK + x.size) * factor]
        if factor == 2:  # written out it vectorises
            for i in range(x.size):
                y[2 * i] = x[i]
                y[2 * i + 1] = x[i]
        else:
            for i in range(x.size):
                for r in range(factor):
                    y[i * factor + r] = x[i]


def _sums_loop(X, factor, Y):
    # Y[i] = sum_r X[i factor + r], r < factor;  X, Y flat
    for c in prange((Y.size + _CHUNK - 1) // _CHUNK):
        y = Y[c * _CHUNK : (c + 1) * _CHUNK]
        x = X[c * _CHUNK * factor : (c * _CHUNK + y.size) * factor]
        if factor == 2:
            for i in range(y.size):
                y[i] = x[2 * i] + x[2 * i + 1]
        else:
            for i in range(y.size):
                total = x[i * factor]
                for r in range(1, factor):
                    total += x[i * factor + r]
                y[i] = total


_copies = Variants(_copies_loop)
_sums = Variants(_sums_loop)


def repeated(x: np.ndarray, factor: int) -> np.ndarray:
    """Each channel `factor` times: x (..., C), as `prepared` gives it, -> (..., C factor)."""
    if factor == 1:
        return x
    wide = memory.empty((*x.shape[:-1], x.shape[-1] * factor), x.dtype)
    _copies.choose(x.nbytes + wide.nbytes)(x.reshape(-1), factor, wide.reshape(-1))
    return wide


def summed(wide: np.ndarray, factor: int) -> np.ndarray:
    """The sum over each `factor` neighbours: wide (..., C factor), C-contiguous, -> (..., C)."""
    x = memory.empty((*wide.shape[:-1], wide.shape[-1] // factor), wide.dtype)
    _sums.choose(x.nbytes + wide.nbytes)(wide.reshape(-1), factor, x.reshape(-1))
    return x
