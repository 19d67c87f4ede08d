"""Element by element: ReLU and its gradient, arithmetic, frames around arrays; one pass each.

Where NumPy does as well it is used, with memory of the pool: in a fresh array page faults cost more
than the arithmetic.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numba import prange

from kernels import memory, simd
from kernels._jit import FLOATS, Variants, jit, prepared, worth_threads

_CHUNK = 16384  # elements; loops run from 0 over slices: so they vectorise
_ROWS = 64  # of a frame, which one task writes


def _relu_loop(X, Y):
    # Y[i] = max(X[i], 0), NaN stays NaN;  X, Y (n,), Y may be X: LLVM would not vectorise that
    W = 4 * simd.lanes(Y)
    zero = simd.fill(1, 1, Y, X.dtype.type(0))
    for c in prange((Y.size + _CHUNK - 1) // _CHUNK):
        end = min(Y.size, (c + 1) * _CHUNK)
        for i in range(c * _CHUNK, end, W):
            if i + W <= end:
                simd.store(simd.maximum(simd.load(1, 4, X, i, 0), zero), Y, i, 0)
            else:
                x = simd.load_part(1, 4, X, i, 0, 0, 1, end - i)
                simd.store_part(simd.maximum(x, zero), Y, i, 0, 0, 1, end - i)


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


# --- arithmetic -----------------------------------------------------------------------------------


def _loop_over(op: Callable[[Any, Any], Any]) -> Any:
    def loop(A, B, step_a, step_b, size, Y):
        # Y[c size + i] = op(A[c step_a + i], B[c step_b + i]), i < size;  A, B, Y flat
        # a step is `size`, or 0 for an operand that repeats itself after `size` elements
        for c in prange((Y.size + size - 1) // size):
            y = Y[c * size : (c + 1) * size]
            a, b = A[c * step_a : c * step_a + y.size], B[c * step_b : c * step_b + y.size]
            for i in range(y.size):
                y[i] = op(a[i], b[i])

    return loop


_SMALL_BYTES = 16 * 1024  # of operands for which asking costs more than it gains


class Arithmetic:
    """A function of two arrays with NumPy's broadcasting: NumPy's own, or a loop on all threads.

    Their results are the same to the bit.
    """

    def __init__(self, ufunc: np.ufunc, op: Callable[[Any, Any], Any]) -> None:
        self._ufunc = ufunc
        self._loop = jit(_loop_over(op), parallel=True)

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of arrays whose shapes broadcast. Raises ValueError where they do not."""
        if a.nbytes + b.nbytes < _SMALL_BYTES:
            return np.asarray(self._ufunc(a, b))
        shape = a.shape if a.shape == b.shape else np.broadcast_shapes(a.shape, b.shape)
        if a.dtype != b.dtype or a.dtype not in FLOATS:
            return np.asarray(self._ufunc(a, b))
        y = memory.empty(shape, a.dtype)
        if worth_threads(3 * y.nbytes):
            small = min(a, b, key=_size)
            size = small.size * max(1, _CHUNK // max(1, small.size))
            size = _CHUNK if small.size == y.size else size
            left, right = _periodic(a, y, size), _periodic(b, y, size)
            if left is not None and right is not None:
                self._loop(left[0], right[0], left[1], right[1], size, y.reshape(-1))
                return y
        return self._ufunc(a, b, out=y)


def _size(x: np.ndarray) -> int:
    return x.size


def _periodic(x: np.ndarray, y: np.ndarray, size: int) -> tuple[np.ndarray, int] | None:
    """x, broadcast to y, as a flat array and a step for the loop; None if it is not periodic."""
    if not x.flags.carray:
        return None
    if x.size == y.size:
        return x.reshape(-1), size
    own = x.shape[next((i for i, n in enumerate(x.shape) if n != 1), x.ndim) :]
    if own != y.shape[y.ndim - len(own) :]:
        return None
    return np.tile(x.reshape(-1), size // x.size), 0


add = Arithmetic(np.add, operator.add)
sub = Arithmetic(np.subtract, operator.sub)
mul = Arithmetic(np.multiply, operator.mul)
div = Arithmetic(np.divide, operator.truediv)


# --- frames ---------------------------------------------------------------------------------------


@jit
def _fill(Y, lo, hi, value):
    # Y[i] = value, lo <= i < hi;  Y flat
    W = 2 * simd.lanes(Y)
    v = simd.fill(1, 2, Y, value)
    for i in range(lo, hi, W):
        if i + W <= hi:
            simd.store(v, Y, i, 0)
        else:
            simd.store_part(v, Y, i, 0, 0, 1, hi - i)


@jit
def _copy(X, ix, Y, iy, count):
    # Y[iy + i] = X[ix + i], i < count;  X, Y flat
    W = 2 * simd.lanes(Y)
    for i in range(0, count, W):
        if i + W <= count:
            simd.store(simd.load(1, 2, X, ix + i, 0), Y, iy + i, 0)
        else:
            v = simd.load_part(1, 2, X, ix + i, 0, 0, 1, count - i)
            simd.store_part(v, Y, iy + i, 0, 0, 1, count - i)


def _framed_loop(X, i0, j0, k0, value, Y):
    # Y[i, j, k] = X[i - i0, j - j0, k - k0] where that lies in X, else value
    N, M, K = X.shape
    rows, width = Y.shape[1:]
    lo, hi = min(width, max(0, k0)), min(width, max(0, k0 + K))
    total = Y.shape[0] * rows
    for c in prange((total + _ROWS - 1) // _ROWS):
        i, j = c * _ROWS // rows - i0, c * _ROWS % rows - j0
        for at in range(c * _ROWS * width, min(total, (c + 1) * _ROWS) * width, width):
            if 0 <= i < N and 0 <= j < M and lo < hi:
                _fill(Y, at, at + lo, value)
                _copy(X, (i * M + j) * K + lo - k0, Y, at + lo, hi - lo)
                _fill(Y, at + hi, at + width, value)
            else:
                _fill(Y, at, at + width, value)
            j += 1
            if j == rows - j0:
                i, j = i + 1, -j0


_framed = Variants(_framed_loop)

#: For each axis, elements before and after; negative ones cut off.
Widths = tuple[tuple[int, int], ...]


@lru_cache(1024)
def _merged(shape: tuple[int, ...], widths: Widths) -> tuple[tuple[int, ...], Widths]:
    """The same frame on fewer axes: one without a frame is part of the axis before it."""
    axes: list[tuple[int, int, int]] = []
    for n, (before, after) in zip(shape, widths, strict=True):
        if axes and not before and not after:
            axes[-1] = (axes[-1][0] * n, axes[-1][1] * n, axes[-1][2] * n)
        else:
            axes.append((n, before, after))
    axes = [(1, 0, 0)] * (3 - len(axes)) + axes
    return tuple(n for n, _, _ in axes), tuple((b, a) for _, b, a in axes)


def frame(x: np.ndarray, widths: Sequence[tuple[int, int]], value: float = 0.0) -> np.ndarray:
    """x with elements `value` around it: widths[i] = (before, after) of axis i.

    Negative widths cut off instead. Raises ValueError if an axis gets a negative size.
    """
    shape = tuple(n + b + a for n, (b, a) in zip(x.shape, widths, strict=True))
    if min(shape, default=0) < 0:
        raise ValueError(f"frame: expected sizes >= 0, got {shape} from {x.shape} and {widths}")
    (x,) = prepared("frame", x)
    y = memory.empty(shape, x.dtype)
    if not y.size:
        return y
    inner, around = _merged(x.shape, tuple(widths))
    if len(inner) > 3:  # rare
        y.fill(value)
        cut = [(n, b, min(0, a)) for n, (b, a) in zip(x.shape, widths, strict=True)]
        to = tuple(slice(max(0, b), max(0, n + b + a)) for n, b, a in cut)
        y[to] = x[tuple(slice(max(0, -b), max(0, n + a)) for n, b, a in cut)]
        return y
    outer = tuple(n + b + a for n, (b, a) in zip(inner, around, strict=True))
    starts = [b for b, _ in around]
    kernel = _framed.choose(x.nbytes + y.nbytes)
    kernel(x.reshape(inner), *starts, x.dtype.type(value), y.reshape(outer))
    return y
