"""The specification in code: plain Python loops over NumPy arrays, of any dtype.

Every fast kernel has its slow, obvious twin here, and every test takes it as its oracle. Sums run
in the dtype of the arrays: give float64 to get the exact value, float32 to see the rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Index = tuple[int, ...]


def _indices(shape: Sequence[int]) -> Iterator[Index]:
    return itertools.product(*(range(n) for n in shape))


# --- matrix products and linear layers ------------------------------------------------------------


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (M, K) @ b (K, N) -> (M, N)."""
    # c[m, n] = sum_k a[m, k] b[k, n]
    c = np.zeros((a.shape[0], b.shape[1]), a.dtype)
    for m, n in _indices(c.shape):
        for k in range(a.shape[1]):
            c[m, n] += a[m, k] * b[k, n]
    return c


def matmul_tn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a.T @ b of a (M, K), b (M, N) -> (K, N)."""
    # c[k, n] = sum_m a[m, k] b[m, n]
    c = np.zeros((a.shape[1], b.shape[1]), a.dtype)
    for k, n in _indices(c.shape):
        for m in range(a.shape[0]):
            c[k, n] += a[m, k] * b[m, n]
    return c


def matmul_nt(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b.T of a (M, N), b (K, N) -> (M, K)."""
    # c[m, k] = sum_n a[m, n] b[k, n]
    c = np.zeros((a.shape[0], b.shape[0]), a.dtype)
    for m, k in _indices(c.shape):
        for n in range(a.shape[1]):
            c[m, k] += a[m, n] * b[k, n]
    return c


def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, relu: bool) -> np.ndarray:
    """x (M, K), w (K, N), bias (N,) -> (M, N), through ReLU if asked."""
    # y[m, n] = bias[n] + sum_k x[m, k] w[k, n]
    y = matmul(x, w)
    for m, n in _indices(y.shape):
        if bias is not None:
            y[m, n] += bias[n]
        if relu:
            y[m, n] = _positive(y[m, n])
    return y


def linear_grad(
    grad: np.ndarray,
    x: np.ndarray,
    w: np.ndarray,
    y: np.ndarray | None,
    relu: bool,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Gradients with respect to x (M, K), w (K, N), bias (N,) from grad, y (M, N)."""
    # g[m, n] = grad[m, n] where not y[m, n] <= 0, else 0
    # gx = g w^T, gw = x^T g, gb[n] = sum_m g[m, n]
    g = relu_grad(grad, y) if relu and y is not None else grad
    gx = matmul_nt(g, w) if needs[0] else None
    gw = matmul_tn(x, g) if needs[1] else None
    gb = reduce_sum(g, (0,)) if needs[2] else None
    return gx, gw, gb


# --- element by element ---------------------------------------------------------------------------


def elementwise(fn: Callable[..., Any], *arrays: Any) -> np.ndarray:
    """fn(a, b, ...) for each element of the arrays, broadcast against each other.

    The result has the dtype that NumPy's promotion gives the arrays.
    """
    # out[i] = fn(a[i], b[i], ...), a length of 1 repeated
    operands = [np.asarray(a) for a in arrays]
    shape = np.broadcast_shapes(*(a.shape for a in operands))
    out = np.empty(shape, np.result_type(*operands))
    for i in _indices(shape):
        out[i] = fn(*(a[_broadcast_index(i, a.shape)] for a in operands))
    return out


def _broadcast_index(index: Index, shape: Sequence[int]) -> Index:
    tail = index[len(index) - len(shape) :]
    return tuple(0 if n == 1 else i for i, n in zip(tail, shape, strict=True))


def _positive(v: Any) -> Any:
    return type(v)(0) if v < 0 else v


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0); NaN stays NaN."""
    return elementwise(_positive, x)


def relu_grad(grad: np.ndarray, y: np.ndarray) -> np.ndarray:
    """grad where not y <= 0, else 0: where y is NaN the gradient passes."""
    return elementwise(lambda g, v: type(g)(0) if v <= 0 else g, grad, y)


# --- reductions -----------------------------------------------------------------------------------

Axes = int | Sequence[int] | None


def _reduce(
    fn: Callable[[list[Any]], Any], x: np.ndarray, axes: Axes, keepdims: bool
) -> np.ndarray:
    # out[kept] = fn([x[kept and reduced] for all reduced])
    if axes is None:
        axes = tuple(range(x.ndim))
    reduced = {a % x.ndim for a in ((axes,) if isinstance(axes, int) else axes)}
    shape = tuple(1 if a in reduced else n for a, n in enumerate(x.shape))
    out = np.empty(shape, x.dtype)
    for i in _indices(shape):
        ranges = [range(x.shape[a]) if a in reduced else (i[a],) for a in range(x.ndim)]
        out[i] = fn([x[j] for j in itertools.product(*ranges)])
    if keepdims:
        return out
    return out.reshape([n for a, n in enumerate(x.shape) if a not in reduced])


def _sum(values: list[Any]) -> Any:
    total = type(values[0])(0)
    for v in values:
        total = total + v
    return total


def _max(values: list[Any]) -> Any:
    best = values[0]
    for v in values[1:]:
        if v > best or v != v:  # the first NaN stays: nothing compares above it
            best = v
    return best


def reduce_sum(x: np.ndarray, axes: Axes = None, keepdims: bool = False) -> np.ndarray:
    """sum of x over `axes` (all by default)."""
    return _reduce(_sum, x, axes, keepdims)


def reduce_mean(x: np.ndarray, axes: Axes = None, keepdims: bool = False) -> np.ndarray:
    """sum of x over `axes`, divided by the count."""
    return _reduce(lambda v: _sum(v) / len(v), x, axes, keepdims)


def reduce_var(x: np.ndarray, axes: Axes = None, keepdims: bool = False) -> np.ndarray:
    """mean of (x - mean(x))^2 over `axes` (the biased variance)."""

    def variance(values: list[Any]) -> Any:
        mean = _sum(values) / len(values)
        return _sum([(v - mean) * (v - mean) for v in values]) / len(values)

    return _reduce(variance, x, axes, keepdims)


def reduce_max(x: np.ndarray, axes: Axes = None, keepdims: bool = False) -> np.ndarray:
    """max of x over `axes`; NaN if any is NaN."""
    return _reduce(_max, x, axes, keepdims)


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """exp(x[i] - max x) / sum_j exp(x[j] - max x) along `axis`."""
    top = reduce_max(x, axis, keepdims=True)
    e = elementwise(lambda v, t: np.exp(v - t), x, top)
    return elementwise(lambda v, s: v / s, e, reduce_sum(e, axis, keepdims=True))


# --- moving elements ------------------------------------------------------------------------------


def transpose(x: np.ndarray, order: Sequence[int] | None = None) -> np.ndarray:
    """Axis a of the result is axis order[a] of x; reversed by default."""
    # out[i] = x[j] with j[order[a]] = i[a]
    axes = tuple(reversed(range(x.ndim))) if order is None else tuple(a % x.ndim for a in order)
    out = np.empty([x.shape[a] for a in axes], x.dtype)
    for i in _indices(out.shape):
        j = [0] * x.ndim
        for position, a in enumerate(axes):
            j[a] = i[position]
        out[i] = x[tuple(j)]
    return out


def concat(arrays: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
    """The arrays one behind the other along `axis`."""
    # out[.., start_p + i, ..] = arrays[p][.., i, ..]
    axis %= arrays[0].ndim
    shape = list(arrays[0].shape)
    shape[axis] = sum(a.shape[axis] for a in arrays)
    out = np.empty(shape, np.result_type(*arrays))
    start = 0
    for a in arrays:
        for i in _indices(a.shape):
            out[(*i[:axis], start + i[axis], *i[axis + 1 :])] = a[i]
        start += a.shape[axis]
    return out


def pad(x: np.ndarray, widths: Sequence[tuple[int, int]], value: float = 0.0) -> np.ndarray:
    """x with widths[a] = (before, after) elements of `value` added along each axis a."""
    # out[i + before] = x[i], value elsewhere
    out = np.empty([n + lo + hi for n, (lo, hi) in zip(x.shape, widths, strict=True)], x.dtype)
    for i in _indices(out.shape):
        j = tuple(k - lo for k, (lo, _) in zip(i, widths, strict=True))
        inside = all(0 <= k < n for k, n in zip(j, x.shape, strict=True))
        out[i] = x[j] if inside else value
    return out


def take_slice(x: np.ndarray, slices: Sequence[slice]) -> np.ndarray:
    """x[slices]: one slice for each of the first axes, the other axes whole."""
    # out[i] = x[start_a + i_a step_a]
    ranges = [range(n)[s] for n, s in zip(x.shape, slices, strict=False)]
    ranges += [range(n) for n in x.shape[len(ranges) :]]
    out = np.empty([len(r) for r in ranges], x.dtype)
    for i in _indices(out.shape):
        out[i] = x[tuple(r[k] for r, k in zip(ranges, i, strict=True))]
    return out
