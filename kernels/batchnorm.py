"""Batch normalisation on register tiles: statistics and their gradients in few passes over memory.

The forward pass reads x twice and writes y once, the backward pass reads its arrays twice and
writes gx once; ReLU costs no pass of its own.

An array (M, C) is gone through as (R, F): F = C f, f rows taken as one, so that F is a multiple of
a vector, and of the tile's width or much larger than it. The last of the R rows may be cut short.
Where rows are few, f is 1.

Variances come from deviations from a shift near the mean, so that nothing cancels. Sums run in the
arrays' dtype over blocks of rows, and from there on in float64 over fixed chunks of the blocks,
which are added in order: the result is the same for any number of threads.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from kernels import memory, simd
from kernels._jit import Variants, jit, prepared

_NV = 2 * simd.TILE[1]  # vectors of a tile: many, for long reads from consecutive addresses
_BLOCK = 128  # rows summed in the arrays' dtype
_STEP_BYTES = 16 * 1024  # gone through tile by tile: fits the first-level cache
_LARGE = 8 << 20  # bytes from which on memory is slow, and fast in the order of addresses
_HUGE = 24 << 20  # bytes from which on it is fast in that order only, whatever is asked for ahead
_CHUNKS = 16  # at most: parts that threads share
_CHUNK_ROWS = 64  # at least
_SHIFT_ROWS = 16  # whose mean the shift is
_FOLDED_ROWS = 8  # at least, or too much of the array is in the row that is cut short
_FOLDED_BYTES = 2 * 1024  # of a folded row of a large array at most: its sums are at hand


# --- chunks of rows -------------------------------------------------------------------------------
#
# X, Y, G, D are gone through as if flat, (R - 1) F < size <= R F. Rows of V, part and total have P
# elements, F rounded up to whole tiles. A few rows at a time, which stay in the first-level cache,
# are gone through tile by tile. In tails, what is masked off is 0.


@jit
def _rows(c, chunks, n, F):
    # Rows lo <= r < hi of part c, and how many of all rows are whole.
    R = (n + F - 1) // F
    size = (R + chunks - 1) // chunks
    return min(R, c * size), min(R, (c + 1) * size), n // F


@jit
def _fetch(X, F, first, end, r, j):
    # Rows wider than a tile are not read in the order of addresses, in which processors ask for
    # memory ahead. So while rows first <= r < end are gone through, those that follow are asked
    # for, in that order: a tile of them for each tile j of row r.
    lanes = simd.lanes(X)
    W = _NV * lanes
    if W < F:
        simd.prefetch(_NV, X, end * F + j * (end - first) + (r - first) * W, lanes)


@jit
def _aligned(rows, P, X):
    # (rows, P) of X's dtype; no vector straddles cache lines
    raw = np.empty(rows * P + memory.ALIGNMENT // X.itemsize, X.dtype)
    first = -raw.ctypes.data % memory.ALIGNMENT // X.itemsize
    return raw[first : first + rows * P].reshape(rows, P)


@jit
def _clear(sums):
    for k in range(sums.shape[0]):
        for i in range(sums.shape[1]):
            sums[k, i] = 0


@jit
def _add_block(part, total):
    # total[k, i] += part[k, i];  part[k, i] = 0;  part, total (2, P)
    for k in range(2):
        for i in range(total.shape[1]):
            total[k, i] += part[k, i]
            part[k, i] = 0


@jit
def _moments(X, F, c, chunks, step, shift, part, total):
    # total[0, i] = sum_r d[r, i], total[1, i] = sum_r d[r, i]^2,  d[r, i] = X[r F + i] - shift[i]
    # over the rows of part c;  shift (P,), part (2, P) scratch, total (2, P) float64
    n, W, P = X.size, _NV * simd.lanes(X), shift.size
    lo, hi, whole = _rows(c, chunks, n, F)
    _clear(total)
    _clear(part)
    for first in range(lo, hi, step):
        end = min(hi, first + step)
        for j in range(0, F, W):
            left = F - j
            fast = min(end, whole) if left >= W else first
            a = simd.load(1, _NV, shift, j, 0)
            s, q = simd.load(1, _NV, part, j, 0), simd.load(1, _NV, part, P + j, 0)
            for r in range(first, fast):
                _fetch(X, F, first, end, r, j)
                d = simd.sub(simd.load(1, _NV, X, r * F + j, 0), a)
                s = simd.add(s, d)
                q = simd.fma(q, d, d)
            for r in range(fast, end):
                i = r * F + j
                cols = min(left, n - i)
                a = simd.load_part(1, _NV, shift, j, 0, 0, 1, cols)
                d = simd.sub(simd.load_part(1, _NV, X, i, 0, 0, 1, cols), a)
                s = simd.add(s, d)
                q = simd.fma(q, d, d)
            simd.store(s, part, j, 0)
            simd.store(q, part, P + j, 0)
        if end == hi or (end - lo) % _BLOCK < step:
            _add_block(part, total)


@jit
def _scaled(X, F, c, chunks, step, V, low, Y):
    # Y[i] = max(V[2, i] + V[1, i] (X[i] - V[0, i]), low), i taken modulo F in V;  NaN stays NaN
    # over the rows of part c;  V (3, P)
    n, W, P = X.size, _NV * simd.lanes(X), V.shape[1]
    lo, hi, whole = _rows(c, chunks, n, F)
    least = simd.fill(1, _NV, X, low)
    for first in range(lo, hi, step):
        end = min(hi, first + step)
        for j in range(0, F, W):
            left = F - j
            fast = min(end, whole) if left >= W else first
            mean = simd.load(1, _NV, V, j, 0)
            scale = simd.load(1, _NV, V, P + j, 0)
            shift = simd.load(1, _NV, V, 2 * P + j, 0)
            for r in range(first, fast):
                i = r * F + j
                _fetch(X, F, first, end, r, j)
                d = simd.sub(simd.load(1, _NV, X, i, 0), mean)
                simd.store(simd.maximum(simd.fma(shift, scale, d), least), Y, i, 0)
            for r in range(fast, end):
                i = r * F + j
                cols = min(left, n - i)
                d = simd.sub(simd.load_part(1, _NV, X, i, 0, 0, 1, cols), mean)
                y = simd.maximum(simd.fma(shift, scale, d), least)
                simd.store_part(y, Y, i, 0, 0, 1, cols)


@jit
def _grad_moments(G, X, gated, F, c, chunks, step, V, part, total):
    # total[0, i] = sum_r g[r, i], total[1, i] = sum_r g[r, i] d[r, i]
    # d[r, i] = X[r F + i] - V[0, i]
    # g = G, of it 0 where V[2, i] + V[1, i] d[r, i] <= 0 if gated: where `_scaled` gave 0
    # over the rows of part c;  V (5, P), part (2, P) scratch, total (2, P) float64
    n, W, P = X.size, _NV * simd.lanes(X), V.shape[1]
    lo, hi, whole = _rows(c, chunks, n, F)
    _clear(total)
    _clear(part)
    for first in range(lo, hi, step):
        end = min(hi, first + step)
        for j in range(0, F, W):
            left = F - j
            fast = min(end, whole) if left >= W else first
            mean = simd.load(1, _NV, V, j, 0)
            scale = simd.load(1, _NV, V, P + j, 0)
            shift = simd.load(1, _NV, V, 2 * P + j, 0)
            s, q = simd.load(1, _NV, part, j, 0), simd.load(1, _NV, part, P + j, 0)
            for r in range(first, fast):
                i = r * F + j
                _fetch(G, F, first, end, r, j)
                _fetch(X, F, first, end, r, j)
                g = simd.load(1, _NV, G, i, 0)
                d = simd.sub(simd.load(1, _NV, X, i, 0), mean)
                if gated:
                    g = simd.gate(g, simd.fma(shift, scale, d))
                s = simd.add(s, g)
                q = simd.fma(q, g, d)
            for r in range(fast, end):
                i = r * F + j
                cols = min(left, n - i)
                g = simd.load_part(1, _NV, G, i, 0, 0, 1, cols)
                a = simd.load_part(1, _NV, V, j, 0, 0, 1, cols)
                d = simd.sub(simd.load_part(1, _NV, X, i, 0, 0, 1, cols), a)
                if gated:
                    g = simd.gate(g, simd.fma(shift, scale, d))
                s = simd.add(s, g)
                q = simd.fma(q, g, d)
            simd.store(s, part, j, 0)
            simd.store(q, part, P + j, 0)
        if end == hi or (end - lo) % _BLOCK < step:
            _add_block(part, total)


@jit
def _grad_scaled(G, X, gated, F, c, chunks, step, V, D):
    # D[i] = V[1, i] (g[i] - V[4, i] + V[3, i] (X[i] - V[0, i])), i taken modulo F in V
    # g as in _grad_moments;  over the rows of part c;  V (5, P)
    n, W, P = X.size, _NV * simd.lanes(X), V.shape[1]
    lo, hi, whole = _rows(c, chunks, n, F)
    for first in range(lo, hi, step):
        end = min(hi, first + step)
        for j in range(0, F, W):
            left = F - j
            fast = min(end, whole) if left >= W else first
            mean = simd.load(1, _NV, V, j, 0)
            scale = simd.load(1, _NV, V, P + j, 0)
            shift = simd.load(1, _NV, V, 2 * P + j, 0)
            by_x = simd.load(1, _NV, V, 3 * P + j, 0)
            back = simd.load(1, _NV, V, 4 * P + j, 0)
            for r in range(first, fast):
                i = r * F + j
                _fetch(G, F, first, end, r, j)
                _fetch(X, F, first, end, r, j)
                g = simd.load(1, _NV, G, i, 0)
                d = simd.sub(simd.load(1, _NV, X, i, 0), mean)
                if gated:
                    g = simd.gate(g, simd.fma(shift, scale, d))
                d = simd.fma(simd.sub(g, back), by_x, d)
                simd.store(simd.mul(d, scale), D, i, 0)
            for r in range(fast, end):
                i = r * F + j
                cols = min(left, n - i)
                g = simd.load_part(1, _NV, G, i, 0, 0, 1, cols)
                d = simd.sub(simd.load_part(1, _NV, X, i, 0, 0, 1, cols), mean)
                if gated:
                    g = simd.gate(g, simd.fma(shift, scale, d))
                d = simd.fma(simd.sub(g, back), by_x, d)
                simd.store_part(simd.mul(d, scale), D, i, 0, 0, 1, cols)


# --- between the passes ---------------------------------------------------------------------------


@jit
def _near_mean(X, sums, shift):
    # shift[i] = mean over some rows, spread evenly, of column i modulo C; 0 if not finite
    # X (M, C), sums (P,) float64 scratch, shift (P,)
    rows, C = X.shape
    count = min(rows, _SHIFT_ROWS)
    for c in range(C):
        sums[c] = 0.0
    for k in range(count):
        m = k * rows // count
        for c in range(C):
            sums[c] += X[m, c]
    for c in range(C):
        t = sums[c] / count
        shift[c] = t if math.isfinite(t) else 0.0
    for i in range(C, shift.size):
        shift[i] = shift[i - C]


@jit
def _folded(total, F, C, c):
    # (sum_{h, k} total[h, 0, k C + c], sum_{h, k} total[h, 1, k C + c]);  total (chunks, 2, P)
    s = q = 0.0
    for h in range(total.shape[0]):
        for i in range(c, F, C):
            s += total[h, 0, i]
            q += total[h, 1, i]
    return s, q


@jit
def _statistics(total, F, rows, gamma, beta, eps, mean, var, V):
    # mean, var (C,) from the sums of deviations from V[0], and V (3, P) for `_scaled`
    for c in range(mean.size):
        s, q = _folded(total, F, mean.size, c)
        s /= rows
        v = q / rows - s * s
        mean[c] = V[0, c] + s
        var[c] = 0.0 if v < 0.0 else v
    _normal(gamma, beta, mean, var, eps, V)


@jit
def _normal(gamma, beta, mean, var, eps, V):
    # V[0] = mean, V[1] = gamma / sqrt(var + eps), V[2] = beta: rounded, so that the gradient finds
    # the very numbers that the forward pass used;  V (>= 3, P)
    C = gamma.size
    for c in range(C):
        V[0, c], V[1, c], V[2, c] = mean[c], gamma[c] / math.sqrt(var[c] + eps), beta[c]
    for k in range(3):
        for i in range(C, V.shape[1]):
            V[k, i] = V[k, i - C]


@jit
def _grad_statistics(total, F, rows, var, eps, ggamma, gbeta, V):
    # u = 1 / sqrt(var + eps);  gbeta = sum g, ggamma = u sum g (x - mean), and V (5, P):
    # V[3] = -u ggamma / M, V[4] = gbeta / M
    C = var.size
    for c in range(C):
        s, q = _folded(total, F, C, c)
        u = 1.0 / math.sqrt(var[c] + eps)
        gbeta[c], ggamma[c] = s, u * q
        V[3, c], V[4, c] = -u * u * q / rows, s / rows
    for k in range(3, 5):
        for i in range(C, V.shape[1]):
            V[k, i] = V[k, i - C]


@jit
def _repeat(v, row):
    # row[i] = v[i modulo C];  v (C,), row (P,)
    for i in range(row.size):
        row[i] = v[i] if i < v.size else row[i - v.size]


# --- whole passes ---------------------------------------------------------------------------------
#
# The second pass begins where the first ended: what it reads first is still in a cache.


def _forward_loop(X, F, P, chunks, step, gamma, beta, eps, relu, Y, mean, var):
    # X, Y (M, C), gamma, beta, mean, var (C,)
    V, part = _aligned(3, P, X), _aligned(2 * chunks, P, X).reshape(chunks, 2, P)
    total = np.empty((chunks, 2, P), np.float64)
    low = X.dtype.type(0 if relu else -np.inf)
    _near_mean(X, total[0, 0], V[0])
    for c in prange(chunks):
        _moments(X, F, c, chunks, step, V[0], part[c], total[c])
    _statistics(total, F, X.shape[0], gamma, beta, eps, mean, var, V)
    for c in prange(chunks):
        _scaled(X, F, chunks - 1 - c, chunks, step, V, low, Y)


def _backward_loop(
    G, X, gated, F, P, chunks, step, gamma, beta, mean, var, eps, D, ggamma, gbeta
):  # fmt: skip
    # G, X, D (M, C), gamma, beta, mean, var, ggamma, gbeta (C,)
    V, part = _aligned(5, P, X), _aligned(2 * chunks, P, X).reshape(chunks, 2, P)
    total = np.empty((chunks, 2, P), np.float64)
    _normal(gamma, beta, mean, var, eps, V)
    for c in prange(chunks):
        _grad_moments(G, X, gated, F, c, chunks, step, V, part[c], total[c])
    _grad_statistics(total, F, X.shape[0], var, eps, ggamma, gbeta, V)
    for c in prange(chunks):
        _grad_scaled(G, X, gated, F, chunks - 1 - c, chunks, step, V, D)


def _scale_shift_loop(X, F, step, scale, shift, low, Y, V, chunks):
    # X, Y flat (M C,), scale, shift (C,), V (3, P) with V[0] = 0
    _repeat(scale, V[1])
    _repeat(shift, V[2])
    for c in prange(chunks):
        _scaled(X, F, c, chunks, step, V, low, Y)


_forward = Variants(_forward_loop)
_backward = Variants(_backward_loop)
_scale_shift = Variants(_scale_shift_loop)


class _Plan(NamedTuple):
    """How an array (M, C) is gone through: F, P, parts that threads share, rows at a time."""

    width: int
    padded: int
    chunks: int
    step: int


@lru_cache(1024)
def _plan(rows: int, channels: int, itemsize: int) -> _Plan:
    lanes = simd.LANES * 4 // itemsize
    tile = _NV * lanes
    # Rows of whole vectors; a tile that is not filled costs about three that are.
    unit = lanes // math.gcd(channels, lanes)
    size = rows * channels * itemsize
    large = size >= _LARGE
    widest = _FOLDED_BYTES * (1 if large else 4) // (channels * itemsize)
    most = min(tile, rows // _FOLDED_ROWS, widest)

    def cost(fold: int) -> float:
        whole, rest = divmod(channels * fold, tile)
        return (whole + 3 * (rest > 0)) / fold

    fold = min((1, *range(unit, most + 1, unit)), key=cost)
    width = channels * fold
    parts = max(1, min(_CHUNKS, -(-rows // fold) // _CHUNK_ROWS))
    step = max(4, min(_BLOCK, _STEP_BYTES // (width * itemsize)))
    if size >= _HUGE and width > tile:
        step = 1
    return _Plan(width, -(-width // tile) * tile, 1 << (parts.bit_length() - 1), step)


# --- public ---------------------------------------------------------------------------------------


def batchnorm(
    x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, eps: float, relu: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y = gamma (x - mean) / sqrt(var + eps) + beta, of it max(y, 0) if `relu`; and mean, var.

    x (M, C) with M >= 1, the rest (C,); the statistics are over M, the variance divided by M.
    Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1. NaN stays NaN.
    """
    _check("batchnorm", x, gamma, beta)
    x, gamma, beta = prepared("batchnorm", x, gamma, beta)
    y = memory.empty(x.shape, x.dtype)
    mean, var = np.empty_like(gamma), np.empty_like(gamma)
    plan = _plan(*x.shape, x.itemsize)
    _forward.choose(3 * x.nbytes)(x, *plan, gamma, beta, float(eps), relu, y, mean, var)
    return y, mean, var


def batchnorm_grad(
    grad: np.ndarray,
    x: np.ndarray,
    beta: np.ndarray | None,
    gamma: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    eps: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `batchnorm` by x (M, C), gamma (C,) and beta (C,).

    grad (M, C); mean, var (C,) as `batchnorm` gave them; beta (C,), if the result was rectified:
    the gradient passes where the result, computed again, is not <= 0: NaN in it does not stop it.
    """
    gated = beta is not None
    beta = gamma if beta is None else beta
    _check("batchnorm_grad", x, gamma, beta, mean, var)
    if grad.shape != x.shape:
        raise ValueError(f"batchnorm_grad: expected grad of x's shape {x.shape}, got {grad.shape}")
    grad, x, gamma, beta, mean, var = prepared("batchnorm_grad", grad, x, gamma, beta, mean, var)
    gx = memory.empty(x.shape, x.dtype)
    ggamma, gbeta = np.empty_like(gamma), np.empty_like(gamma)
    plan = _plan(*x.shape, x.itemsize)
    kernel = _backward.choose(5 * x.nbytes)
    kernel(grad, x, gated, *plan, gamma, beta, mean, var, float(eps), gx, ggamma, gbeta)
    return gx, ggamma, gbeta


def scale_shift(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, relu: bool) -> np.ndarray:
    """x scale + shift, of it max(., 0) if `relu`: x (..., C), scale and shift (C,)."""
    if x.ndim < 1:
        raise ValueError("scale_shift: expected x (..., C), got a scalar")
    rows = x.reshape(-1, x.shape[-1]) if x.size else x.reshape(0, x.shape[-1])
    _check("scale_shift", rows, scale, shift)
    rows, scale, shift = prepared("scale_shift", rows, scale, shift)
    y = memory.empty(rows.shape, rows.dtype)
    plan = _plan(*rows.shape, rows.itemsize)
    vectors = np.zeros((3, plan.padded), rows.dtype)
    low = rows.dtype.type(0 if relu else -np.inf)
    kernel = _scale_shift.choose(2 * rows.nbytes)
    flat, result = rows.reshape(-1), y.reshape(-1)
    kernel(flat, plan.width, plan.step, scale, shift, low, result, vectors, plan.chunks)
    return y.reshape(x.shape)


def _check(kernel: str, x: np.ndarray, *vectors: np.ndarray) -> None:
    fits, expected = x.ndim == 2 and x.size > 0, x.shape[1:]
    for v in vectors:
        fits = fits and v.shape == expected
    if not fits:
        found = ", ".join(str(v.shape) for v in vectors)
        raise ValueError(
            f"{kernel}: expected x (M, C), not empty, and vectors (C,), got {x.shape} and {found}"
        )
