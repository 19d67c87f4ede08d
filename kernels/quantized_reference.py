"""The specification of inference in 8-bit integers: plain loops, exact; see `kernels.int8`.

Sums are Python's integers, which cannot overflow. What follows them is float32, one operation at a
time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kernels.geometry import Window
from kernels.int8 import Addition, Scaling


def _indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(n) for n in shape))


def scaled(total: Any, multiplier: Any, low: Any, high: Any, zero: Any, dtype: Any) -> Any:
    """The result of one sum: min(max(float32(total) multiplier, low), high), as dtype."""
    with np.errstate(over="ignore"):
        value = np.float32(total) * np.float32(multiplier)
    value = value if value > low else low  # NaN gives low
    value = value if value < high else high
    return np.float32(value) if dtype == np.float32 else int(np.rint(value)) + int(zero)


def _result(total: int, scaling: Scaling, n: int) -> Any:
    if not -(2**31) <= total < 2**31:
        raise OverflowError(f"the sum {total} does not fit int32")
    multiplier = scaling.multiplier[n if len(scaling.multiplier) > 1 else 0]
    return scaled(total, multiplier, *scaling[1:])


def linear(
    x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, x_zero: int, scaling: Scaling
) -> np.ndarray:
    """x (M, K) uint8, w (K, N) int8, bias (N,) int32 -> (M, N)."""
    # s[m, n] = bias[n] + sum_k (x[m, k] - x_zero) w[k, n]
    y = np.empty((len(x), w.shape[1]), scaling.dtype)
    for m, n in _indices(y.shape):
        total = 0 if bias is None else int(bias[n])
        for k in range(len(w)):
            total += (int(x[m, k]) - x_zero) * int(w[k, n])
        y[m, n] = _result(total, scaling, n)
    return y


def _taps(size: Sequence[int], win: Window, oy: int, ox: int) -> Iterator[tuple[int, ...]]:
    """ky, kx, iy, ix of the taps of window (oy, ox) that lie in the image."""
    (sy, sx), (dy, dx) = win.stride, win.dilation
    for ky, kx in _indices(win.kernel):
        iy = oy * sy - win.padding[0][0] + ky * dy
        ix = ox * sx - win.padding[1][0] + kx * dx
        if 0 <= iy < size[0] and 0 <= ix < size[1]:
            yield ky, kx, iy, ix


def conv2d(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    x_zero: int,
    scaling: Scaling,
    win: Window,
) -> np.ndarray:
    """x (B, H, W, C) uint8, w (KH, KW, C, N) int8, bias (N,) int32 -> (B, OH, OW, N)."""
    # s[b, oy, ox, n] = bias[n] + sum over taps inside of (x[b, iy, ix, c] - x_zero) w[ky, kx, c, n]
    y = np.empty((len(x), *win.output(*x.shape[1:3]), w.shape[3]), scaling.dtype)
    for b, oy, ox, n in _indices(y.shape):
        total = 0 if bias is None else int(bias[n])
        for ky, kx, iy, ix in _taps(x.shape[1:3], win, oy, ox):
            for c in range(x.shape[3]):
                total += (int(x[b, iy, ix, c]) - x_zero) * int(w[ky, kx, c, n])
        y[b, oy, ox, n] = _result(total, scaling, n)
    return y


def depthwise2d(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    x_zero: int,
    scaling: Scaling,
    win: Window,
) -> np.ndarray:
    """x (B, H, W, C) uint8, w (KH, KW, C, R) int8, bias (C R,) int32 -> (B, OH, OW, C R)."""
    # s[b, oy, ox, c R + r] = bias[c R + r] +
    #     sum over taps inside of (x[b, iy, ix, c] - x_zero) w[ky, kx, c, r]
    factor = w.shape[3]
    y = np.empty((len(x), *win.output(*x.shape[1:3]), x.shape[3] * factor), scaling.dtype)
    for b, oy, ox, n in _indices(y.shape):
        c, r = divmod(n, factor)
        total = 0 if bias is None else int(bias[n])
        for ky, kx, iy, ix in _taps(x.shape[1:3], win, oy, ox):
            total += (int(x[b, iy, ix, c]) - x_zero) * int(w[ky, kx, c, r])
        y[b, oy, ox, n] = _result(total, scaling, n)
    return y


def max_pool2d(x: np.ndarray, win: Window) -> np.ndarray:
    """The largest byte under each window of x (B, H, W, C); 0 where it lies in the padding."""
    y = np.zeros((len(x), *win.output(*x.shape[1:3]), x.shape[3]), np.uint8)
    for b, oy, ox, c in _indices(y.shape):
        for _, _, iy, ix in _taps(x.shape[1:3], win, oy, ox):
            y[b, oy, ox, c] = max(y[b, oy, ox, c], x[b, iy, ix, c])
    return y


def avg_pool2d(x: np.ndarray, x_zero: int, scaling: Scaling, win: Window) -> np.ndarray:
    """The mean of the numbers under each window; padding does not count.

    The sum of (x - x_zero) over the T pixels inside has multiplier float32(multiplier / T), the
    division in float64; T = 0 gives the number 0.
    """
    y = np.empty((len(x), *win.output(*x.shape[1:3]), x.shape[3]), scaling.dtype)
    for b, oy, ox, c in _indices(y.shape):
        inside = list(_taps(x.shape[1:3], win, oy, ox))
        total = sum(int(x[b, iy, ix, c]) - x_zero for _, _, iy, ix in inside)
        multiplier = np.float32(float(scaling.multiplier[0]) / max(1, len(inside)))
        y[b, oy, ox, c] = scaled(total, multiplier, *scaling[1:])
    return y


def add(a: np.ndarray, b: np.ndarray, how: Addition) -> np.ndarray:
    """The sum of two arrays of one shape."""
    y = np.empty(a.shape, how.dtype)
    for i in _indices(a.shape):
        total = (int(a[i]) - int(how.a_zero)) * int(how.a_factor)
        total += (int(b[i]) - int(how.b_zero)) * int(how.b_factor)
        y[i] = scaled(total, how.scale, how.low, how.high, how.zero, how.dtype)
    return y


def quantize(x: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """round(min(max(x / scale, -zero), 255 - zero)) + zero of x float32; NaN gives 0."""
    y = np.empty(x.shape, np.uint8)
    for i in _indices(x.shape):
        with np.errstate(over="ignore"):
            ratio = np.float32(x[i]) / np.float32(scale)
        y[i] = scaled(ratio, 1, np.float32(-zero), np.float32(255 - zero), zero, np.uint8)
    return y


def dequantize(x: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """(x - zero) scale of x uint8, float32."""
    y = np.empty(x.shape, np.float32)
    for i in _indices(x.shape):
        y[i] = np.float32(int(x[i]) - zero) * np.float32(scale)
    return y
