"""Element by element: ReLU and its gradient, in one pass each."""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
from numba import prange

from kernels import memory
from kernels._jit import Variants, prepared

_CHUNK = 16384  # elements; loops run from 0 over slices: so they vectorise


def _relu_loop(X, Y):
    # Y[i] = max(X[i], 0), NaN stays NaN;  X, Y (n,)
    zero = X.dtype.type(0)
    for c in prange((X.size + _CHUNK - 1) // _CHUNK):
        x, y = X[c * _CHUNK : (c + 1) * _CHUNK], Y[c * _CHUNK : (c + 1) * _CHUNK]
        for i in range(x.size):
            v = x[i]
            y[i] = zero if v < zero else v


def _relu_grad_loop(G, Y, D):
    # D[i] = 0 where Y[i] <= 0, else G[i];  G, Y, D (n,)
    zero = G.dtype.type(0)
    for c in prange((G.size + _CHUNK - 1) // _CHUNK):
        lo, hi = c * _CHUNK, (c + 1) * _CHUNK
        g, y, d = G[lo:hi], Y[lo:hi], D[lo:hi]
        for i in range(g.size):
            v = g[i]
            d[i] = zero if y[i] <= zero else v


_relu = Variants(_relu_loop)
_relu_grad = Variants(_relu_grad_loop)


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0) for an array of any shape; NaN stays NaN."""
    (x,) = prepared("relu", x)
    y = memory.empty(x.shape, x.dtype)
    _relu.choose(2 * x.nbytes)(x.reshape(-1), y.reshape(-1))
    return y


def relu_grad(grad: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Gradient of `relu` from its result y: grad where not y <= 0 (NaN in y lets it pass)."""
    if grad.shape != y.shape:
        raise ValueError(f"relu_grad: expected grad of y's shape {y.shape}, got {grad.shape}")
    grad, y = prepared("relu_grad", grad, y)
    result = memory.empty(y.shape, y.dtype)
    _relu_grad.choose(3 * y.nbytes)(grad.reshape(-1), y.reshape(-1), result.reshape(-1))
    return result
