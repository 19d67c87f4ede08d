"""The specification in code: plain Python loops over NumPy arrays, of any dtype.

Every fast kernel has its slow, obvious twin here, and every test takes it as its oracle. Sums run
in the dtype of the arrays: give float64 to get the exact value, float32 to see the rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kernels.geometry import Window

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


# --- losses ---------------------------------------------------------------------------------------


def mse(pred: np.ndarray, target: np.ndarray) -> Any:
    """mean_i (pred[i] - target[i])^2."""
    return sum((p - t) ** 2 for p, t in zip(pred.flat, target.flat, strict=True)) / pred.size


def mse_grad(pred: np.ndarray, target: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """2 scale / n (pred[i] - target[i])."""
    return elementwise(lambda p, t: 2 * scale / pred.size * (p - t), pred, target)


def softmax_cross_entropy(
    logits: np.ndarray, labels: np.ndarray, smoothing: float = 0.0
) -> tuple[Any, np.ndarray]:
    """mean_b -sum_c q[b, c] log p[b, c], and p = softmax(logits) (B, C)."""
    # log p[b, c] = (z[b, c] - top_b) - log sum_k exp(z[b, k] - top_b)
    top = reduce_max(logits, 1, keepdims=True)
    shifted = elementwise(lambda z, t: z - t, logits, top)
    sums = reduce_sum(elementwise(np.exp, shifted), 1)
    loss = 0.0
    for b, c in _indices(logits.shape):
        q = _smoothed(labels[b], c, logits.shape[1], smoothing)
        if q > 0:
            loss -= q * (shifted[b, c] - np.log(sums[b]))
    return loss / len(logits), softmax(logits)


def softmax_cross_entropy_grad(
    probabilities: np.ndarray, labels: np.ndarray, smoothing: float = 0.0, scale: float = 1.0
) -> np.ndarray:
    """scale / B (p[b, c] - q[b, c])."""
    grad = np.empty_like(probabilities)
    batch, classes = probabilities.shape
    for b, c in _indices(grad.shape):
        q = _smoothed(labels[b], c, classes, smoothing)
        grad[b, c] = scale / batch * (probabilities[b, c] - q)
    return grad


def _smoothed(label: int, c: int, classes: int, smoothing: float) -> float:
    # q[b, c] = (1 - smoothing) [c = label] + smoothing / C
    return (1 - smoothing) * (c == label) + smoothing / classes


# --- optimiser steps, in place --------------------------------------------------------------------
# g = grad + l1 sign(w) + l2 w;  w is first scaled by 1 - lr decay (decoupled decay)


def sgd(
    w: np.ndarray,
    grad: np.ndarray,
    velocity: np.ndarray | None,
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    l1: float = 0.0,
    l2: float = 0.0,
    decay: float = 0.0,
) -> None:
    """v <- momentum v + g;  w <- w - lr v, or w - lr (g + momentum v) with Nesterov."""
    for i in _indices(w.shape):
        g = grad[i] + l1 * np.sign(w[i]) + l2 * w[i]
        step = g
        if velocity is not None:
            velocity[i] = momentum * velocity[i] + g
            step = g + momentum * velocity[i] if nesterov else velocity[i]
        w[i] = w[i] * (1 - lr * decay) - lr * step


def adam(
    w: np.ndarray,
    grad: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    l1: float = 0.0,
    l2: float = 0.0,
    decay: float = 0.0,
) -> None:
    """a <- beta1 a + (1 - beta1) g;  b <- beta2 b + (1 - beta2) g^2

    w <- w - lr a / (1 - beta1^t) / (sqrt(b / (1 - beta2^t)) + eps)
    """
    for i in _indices(w.shape):
        g = grad[i] + l1 * np.sign(w[i]) + l2 * w[i]
        mean[i] = beta1 * mean[i] + (1 - beta1) * g
        square[i] = beta2 * square[i] + (1 - beta2) * g * g
        a, b = mean[i] / (1 - beta1**step), square[i] / (1 - beta2**step)
        w[i] = w[i] * (1 - lr * decay) - lr * a / (np.sqrt(b) + eps)


def nadam(
    w: np.ndarray,
    grad: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    *,
    step: int,
    mu_product: float,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    momentum_decay: float = 0.004,
    l1: float = 0.0,
    l2: float = 0.0,
    decay: float = 0.0,
) -> float:
    """a, b as in `adam`; mu_t = beta1 (1 - 0.5 0.96^(t momentum_decay)), u_t = mu_1 ... mu_t

    w <- w - lr (mu_(t+1) a / (1 - u_(t+1)) + (1 - mu_t) g / (1 - u_t))
             / (sqrt(b / (1 - beta2^t)) + eps)
    """
    mu, following = (beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
    mu_product *= mu
    for i in _indices(w.shape):
        g = grad[i] + l1 * np.sign(w[i]) + l2 * w[i]
        mean[i] = beta1 * mean[i] + (1 - beta1) * g
        square[i] = beta2 * square[i] + (1 - beta2) * g * g
        ahead = following * mean[i] / (1 - mu_product * following)
        ahead += (1 - mu) * g / (1 - mu_product)
        b = square[i] / (1 - beta2**step)
        w[i] = w[i] * (1 - lr * decay) - lr * ahead / (np.sqrt(b) + eps)
    return mu_product


def adadelta(
    w: np.ndarray,
    grad: np.ndarray,
    square: np.ndarray,
    delta: np.ndarray,
    *,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    l1: float = 0.0,
    l2: float = 0.0,
    decay: float = 0.0,
) -> None:
    """s <- rho s + (1 - rho) g^2;  step = sqrt(d + eps) / sqrt(s + eps) g

    d <- rho d + (1 - rho) step^2;  w <- w - lr step
    """
    for i in _indices(w.shape):
        g = grad[i] + l1 * np.sign(w[i]) + l2 * w[i]
        square[i] = rho * square[i] + (1 - rho) * g * g
        step = np.sqrt(delta[i] + eps) / np.sqrt(square[i] + eps) * g
        delta[i] = rho * delta[i] + (1 - rho) * step * step
        w[i] = w[i] * (1 - lr * decay) - lr * step


def rmsprop(
    w: np.ndarray,
    grad: np.ndarray,
    square: np.ndarray,
    velocity: np.ndarray | None,
    *,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    l1: float = 0.0,
    l2: float = 0.0,
    decay: float = 0.0,
) -> None:
    """s <- alpha s + (1 - alpha) g^2;  v <- momentum v + g / (sqrt(s) + eps);  w <- w - lr v."""
    for i in _indices(w.shape):
        g = grad[i] + l1 * np.sign(w[i]) + l2 * w[i]
        square[i] = alpha * square[i] + (1 - alpha) * g * g
        step = g / (np.sqrt(square[i]) + eps)
        if velocity is not None:
            velocity[i] = momentum * velocity[i] + step
            step = velocity[i]
        w[i] = w[i] * (1 - lr * decay) - lr * step


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


def scatter(x: np.ndarray, places: Sequence[int], width: int, value: float) -> np.ndarray:
    """x (..., n) at `places` of a last axis of this width, `value` elsewhere."""
    out = np.full((*x.shape[:-1], width), value, x.dtype)
    for i in _indices(x.shape):
        out[(*i[:-1], places[i[-1]])] = x[i]
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


def channels(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Count above zero, mean, squared deviations summed, minimum and maximum of each column."""
    # mean[c] = 1/M sum_m x[m, c], squares[c] = sum_m (x[m, c] - mean[c])^2
    rows, columns = x.shape
    count = np.array([sum(x[m, c] > 0 for m in range(rows)) for c in range(columns)], np.int64)
    mean = np.array([math.fsum(x[m, c] for m in range(rows)) / rows for c in range(columns)])
    squares = np.array(
        [math.fsum((float(x[m, c]) - mean[c]) ** 2 for m in range(rows)) for c in range(columns)]
    )
    low = np.array([min(x[m, c] for m in range(rows)) for c in range(columns)], x.dtype)
    high = np.array([max(x[m, c] for m in range(rows)) for c in range(columns)], x.dtype)
    return count, mean, squares, low, high


# --- convolutions and pools: x (B, H, W, C), y (B, OH, OW, N); see geometry.Window ---------------


def _taps(win: Window, shape: Sequence[int]) -> Iterator[tuple[int, int, int, int, int, int]]:
    """(oy, ox, ky, kx, iy, ix) for every tap that lies inside an image of shape (B, H, W, C)."""
    # iy = oy sy - top + ky dy,  ix = ox sx - left + kx dx
    height, width = shape[1:3]
    rows, columns = win.output(height, width)
    for oy, ox, ky, kx in _indices((rows, columns, *win.kernel)):
        iy = oy * win.stride[0] - win.padding[0][0] + ky * win.dilation[0]
        ix = ox * win.stride[1] - win.padding[1][0] + kx * win.dilation[1]
        if 0 <= iy < height and 0 <= ix < width:
            yield oy, ox, ky, kx, iy, ix


def conv2d(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, win: Window) -> np.ndarray:
    """Convolution (cross-correlation): w (KH, KW, C, N), bias (N,)."""
    # y[b, oy, ox, n] = bias[n] + sum_{ky, kx, c} x[b, iy, ix, c] w[ky, kx, c, n]
    y = np.zeros((len(x), *win.output(*x.shape[1:3]), w.shape[3]), x.dtype)
    if bias is not None:
        y += bias
    for oy, ox, ky, kx, iy, ix in _taps(win, x.shape):
        for b, c, n in _indices((len(x), *w.shape[2:])):
            y[b, oy, ox, n] += x[b, iy, ix, c] * w[ky, kx, c, n]
    return y


def conv2d_input_grad(
    grad: np.ndarray, w: np.ndarray, shape: Sequence[int], win: Window
) -> np.ndarray:
    """Gradient of `conv2d` by x of this shape, given grad = d loss / d y."""
    # gx[b, iy, ix, c] = sum of grad[b, oy, ox, n] w[ky, kx, c, n] over the taps that read it, and n
    gx = np.zeros(shape, grad.dtype)
    for oy, ox, ky, kx, iy, ix in _taps(win, shape):
        for b, c, n in _indices((len(grad), *w.shape[2:])):
            gx[b, iy, ix, c] += grad[b, oy, ox, n] * w[ky, kx, c, n]
    return gx


def conv2d_weight_grad(grad: np.ndarray, x: np.ndarray, win: Window) -> np.ndarray:
    """Gradient of `conv2d` by w (KH, KW, C, N)."""
    # gw[ky, kx, c, n] = sum_{b, oy, ox} x[b, iy, ix, c] grad[b, oy, ox, n]
    gw = np.zeros((*win.kernel, x.shape[3], grad.shape[3]), x.dtype)
    for oy, ox, ky, kx, iy, ix in _taps(win, x.shape):
        for b, c, n in _indices((len(x), x.shape[3], grad.shape[3])):
            gw[ky, kx, c, n] += x[b, iy, ix, c] * grad[b, oy, ox, n]
    return gw


def depthwise2d(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, win: Window) -> np.ndarray:
    """Each channel by itself: w (KH, KW, C, R), R results a channel; y (B, OH, OW, C R)."""
    # y[b, oy, ox, c R + r] = bias[c R + r] + sum_{ky, kx} x[b, iy, ix, c] w[ky, kx, c, r]
    channels, factor = w.shape[2:]
    y = np.zeros((len(x), *win.output(*x.shape[1:3]), channels * factor), x.dtype)
    if bias is not None:
        y += bias
    for oy, ox, ky, kx, iy, ix in _taps(win, x.shape):
        for b, c, r in _indices((len(x), channels, factor)):
            y[b, oy, ox, c * factor + r] += x[b, iy, ix, c] * w[ky, kx, c, r]
    return y


def depthwise2d_input_grad(
    grad: np.ndarray, w: np.ndarray, shape: Sequence[int], win: Window
) -> np.ndarray:
    """Gradient of `depthwise2d` by x of this shape."""
    # gx[b, iy, ix, c] = sum over its taps, and r, of grad[b, oy, ox, c R + r] w[ky, kx, c, r]
    channels, factor = w.shape[2:]
    gx = np.zeros(shape, grad.dtype)
    for oy, ox, ky, kx, iy, ix in _taps(win, shape):
        for b, c, r in _indices((len(grad), channels, factor)):
            gx[b, iy, ix, c] += grad[b, oy, ox, c * factor + r] * w[ky, kx, c, r]
    return gx


def depthwise2d_weight_grad(grad: np.ndarray, x: np.ndarray, win: Window) -> np.ndarray:
    """Gradient of `depthwise2d` by w (KH, KW, C, R)."""
    # gw[ky, kx, c, r] = sum_{b, oy, ox} x[b, iy, ix, c] grad[b, oy, ox, c R + r]
    channels = x.shape[3]
    factor = grad.shape[3] // channels
    gw = np.zeros((*win.kernel, channels, factor), x.dtype)
    for oy, ox, ky, kx, iy, ix in _taps(win, x.shape):
        for b, c, r in _indices((len(x), channels, factor)):
            gw[ky, kx, c, r] += x[b, iy, ix, c] * grad[b, oy, ox, c * factor + r]
    return gw


def max_pool2d(x: np.ndarray, win: Window) -> tuple[np.ndarray, np.ndarray]:
    """The largest value under each window, and its place iy W + ix (the first of equals).

    Padding is never the largest; a NaN under the window is the result.
    """
    # y[b, oy, ox, c] = max_{ky, kx} x[b, iy, ix, c]
    y = np.full((len(x), *win.output(*x.shape[1:3]), x.shape[3]), -np.inf, x.dtype)
    place = np.full(y.shape, -1, np.int32)
    for oy, ox, _, _, iy, ix in _taps(win, x.shape):
        for b, c in _indices((len(x), x.shape[3])):
            v, o = x[b, iy, ix, c], (b, oy, ox, c)
            if place[o] < 0 or v > y[o] or (v != v and y[o] == y[o]):
                y[o], place[o] = v, iy * x.shape[2] + ix
    return y, place


def max_pool2d_grad(grad: np.ndarray, place: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Gradient of `max_pool2d` by x of this shape: it goes to the place of the maximum."""
    # gx[b, iy, ix, c] = sum of grad[b, oy, ox, c] over windows whose maximum lies there
    gx = np.zeros(shape, grad.dtype)
    for b, oy, ox, c in _indices(grad.shape):
        if place[b, oy, ox, c] >= 0:
            gx[b, place[b, oy, ox, c] // shape[2], place[b, oy, ox, c] % shape[2], c] += grad[
                b, oy, ox, c
            ]
    return gx


def avg_pool2d(x: np.ndarray, win: Window) -> np.ndarray:
    """The mean of the values under each window; padding does not count."""
    # y[b, oy, ox, c] = 1/T sum_{taps} x[b, iy, ix, c],  T = taps inside the image
    y = np.zeros((len(x), *win.output(*x.shape[1:3]), x.shape[3]), x.dtype)
    taps = np.zeros(y.shape[1:3], x.dtype)
    for oy, ox, _, _, iy, ix in _taps(win, x.shape):
        taps[oy, ox] += 1
        for b, c in _indices((len(x), x.shape[3])):
            y[b, oy, ox, c] += x[b, iy, ix, c]
    return y / np.maximum(taps, 1)[None, :, :, None]


def avg_pool2d_grad(grad: np.ndarray, shape: Sequence[int], win: Window) -> np.ndarray:
    """Gradient of `avg_pool2d` by x of this shape."""
    # gx[b, iy, ix, c] = sum over its windows of grad[b, oy, ox, c] / T[oy, ox]
    gx = np.zeros(shape, grad.dtype)
    taps = np.zeros(grad.shape[1:3], grad.dtype)
    for oy, ox, *_ in _taps(win, shape):
        taps[oy, ox] += 1
    for oy, ox, _, _, iy, ix in _taps(win, shape):
        for b, c in _indices((len(grad), grad.shape[3])):
            gx[b, iy, ix, c] += grad[b, oy, ox, c] / taps[oy, ox]
    return gx


# --- batch normalisation: x (M, C), statistics over M --------------------------------------------


def batchnorm(
    x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, eps: float, relu_after: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, mean and variance (biased) of each column; y is rectified if `relu_after`.

    Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1.
    """
    # y[m, c] = gamma[c] (x[m, c] - mean[c]) / sqrt(var[c] + eps) + beta[c]
    rows, columns = x.shape
    mean = np.array([math.fsum(x[:, c]) / rows for c in range(columns)])
    var = np.array(
        [math.fsum((float(v) - mean[c]) ** 2 for v in x[:, c]) / rows for c in range(columns)]
    )
    y = np.empty_like(x)
    for m, c in _indices(x.shape):
        v = gamma[c] * (x[m, c] - mean[c]) / math.sqrt(var[c] + eps) + beta[c]
        y[m, c] = _positive(v) if relu_after else v
    return y, mean.astype(x.dtype), var.astype(x.dtype)


def batchnorm_grad(
    grad: np.ndarray,
    x: np.ndarray,
    y: np.ndarray | None,
    gamma: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    eps: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients by x, gamma and beta; y is given if it was rectified: then only y > 0 passes."""
    # h = (x - mean) / sqrt(var + eps);  ggamma = sum_m g h, gbeta = sum_m g
    # gx[m, c] = gamma / sqrt(var + eps) (g[m, c] - gbeta / M - h[m, c] ggamma / M)
    rows, columns = x.shape
    gx, ggamma, gbeta = np.empty_like(x), np.zeros_like(gamma), np.zeros_like(gamma)
    for c in range(columns):
        scale = 1 / math.sqrt(var[c] + eps)
        g = [0.0 if y is not None and y[m, c] <= 0 else float(grad[m, c]) for m in range(rows)]
        h = [(float(x[m, c]) - float(mean[c])) * scale for m in range(rows)]
        total, moment = math.fsum(g), math.fsum(a * b for a, b in zip(g, h, strict=True))
        gbeta[c], ggamma[c] = total, moment
        for m in range(rows):
            gx[m, c] = gamma[c] * scale * (g[m] - total / rows - h[m] * moment / rows)
    return gx, ggamma, gbeta
