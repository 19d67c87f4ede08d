"""The specification in code of layers with compressed weights: plain loops, as in `reference`."""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np

from kernels.geometry import Window


def sparse_linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, relu: bool) -> np.ndarray:
    """x (M, K), w (K, N) whose zeros are not there, bias (N,) -> (M, N), through ReLU if asked."""
    # y[m, n] = bias[n] + sum of x[m, k] w[k, n] over k with w[k, n] != 0
    win = Window((1, 1))
    return sparse_conv2d(x[:, None, None], w[None, None], bias, win, relu)[:, 0, 0]


def sparse_conv2d(
    x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, win: Window, relu: bool
) -> np.ndarray:
    """x (B, H, W, C), w (KH, KW, C, N) whose zeros are not there -> (B, OH, OW, N)."""
    # y[b, oy, ox, n] = bias[n] + sum of x[b, iy, ix, c] w[ky, kx, c, n] over taps inside and
    #     channels with w[ky, kx, c, n] != 0;  iy = oy stride - padding + ky dilation
    B, H, W, C = x.shape
    y = np.zeros((B, *win.output(H, W), w.shape[3]), x.dtype)
    for b, oy, ox, n in np.ndindex(*y.shape):
        for ky, kx in np.ndindex(*win.kernel):
            iy = oy * win.stride[0] - win.padding[0][0] + ky * win.dilation[0]
            ix = ox * win.stride[1] - win.padding[1][0] + kx * win.dilation[1]
            if 0 <= iy < H and 0 <= ix < W:
                for c in range(C):
                    if w[ky, kx, c, n] != 0:
                        y[b, oy, ox, n] += x[b, iy, ix, c] * w[ky, kx, c, n]
        if bias is not None:
            y[b, oy, ox, n] += bias[n]
        if relu and y[b, oy, ox, n] < 0:
            y[b, oy, ox, n] = 0
    return y


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Numbers below 2**bits as a stream, lowest bit first, uint8 (ceil(size bits / 8),)."""
    stream = np.zeros(-(-codes.size * bits // 8), np.uint8)
    for i, code in enumerate(codes.ravel()):
        for bit in range(bits):
            if int(code) >> bit & 1:
                place = i * bits + bit
                stream[place // 8] |= 1 << place % 8
    return stream


def look_up(codes: np.ndarray, book: np.ndarray) -> np.ndarray:
    """book[code], or book[channel, code] of a book (channels, entries); codes (..., channels)."""
    weights = np.zeros(codes.shape, book.dtype)
    for place in itertools.product(*map(range, codes.shape)):
        code = codes[place]
        weights[place] = book[code] if book.ndim == 1 else book[place[-1], code]
    return weights


def half_bits(value: float) -> int:
    """The bits of IEEE 754 binary16 nearest to a float32, ties to even; NaN becomes 0x7E00."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    sign, magnitude = bits >> 31 << 15, bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return 0x7E00
    exponent, fraction = magnitude >> 23, magnitude & 0x7FFFFF | 0x800000
    # In units of the result's last place, which subnormals share with the least normal exponent.
    places = 13 + max(0, 113 - exponent)
    if exponent < 90:  # less than half the least subnormal
        return sign
    units, rest = fraction >> places, fraction & (1 << places) - 1
    half = 1 << places - 1
    if rest > half or (rest == half and units & 1):
        units += 1  # may carry into the exponent: to the next power of two, or to infinity
    result = units if exponent < 113 else units + ((exponent - 113) << 10)
    return sign | min(result, 0x7C00)


def half_value(bits: int) -> float:
    """The value of the bits of IEEE 754 binary16."""
    sign = -1.0 if bits >> 15 else 1.0
    exponent, fraction = bits >> 10 & 31, bits & 1023
    if exponent == 31:
        return sign * float("inf") if not fraction else float("nan")
    if exponent == 0:
        return sign * fraction * 2.0**-24
    return sign * (1024 + fraction) * 2.0 ** (exponent - 25)


def additive_linear(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The ef-operator on x (M, K), w (K, N) -> (M, N)."""
    # y[m, n] = sum_k sign(x[m, k] w[k, n]) (|x[m, k]| + |w[k, n]|)
    return additive_conv2d(x[:, None, None], w[None, None], Window((1, 1)))[:, 0, 0]


def additive_conv2d(x: np.ndarray, w: np.ndarray, win: Window) -> np.ndarray:
    """The ef-operator on x (B, H, W, C) and w (KH, KW, C, N), over taps inside the image."""
    B, H, W, C = x.shape
    y = np.zeros((B, *win.output(H, W), w.shape[3]), x.dtype)
    for b, oy, ox, n in np.ndindex(*y.shape):
        for ky, kx in np.ndindex(*win.kernel):
            iy = oy * win.stride[0] - win.padding[0][0] + ky * win.dilation[0]
            ix = ox * win.stride[1] - win.padding[1][0] + kx * win.dilation[1]
            if 0 <= iy < H and 0 <= ix < W:
                for c in range(C):
                    p, q = x[b, iy, ix, c], w[ky, kx, c, n]
                    y[b, oy, ox, n] += np.sign(p) * np.sign(q) * (abs(p) + abs(q))
    return y


def additive_linear_grad(
    grad: np.ndarray, x: np.ndarray, w: np.ndarray, needs: tuple[bool, ...] = (True, True)
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Gradients of `additive_linear` where neither x nor w is zero."""
    # gx[m, k] = sum_n g[m, n] sign(w[k, n]), gw[k, n] = sum_m g[m, n] sign(x[m, k])
    gx, gw = np.zeros_like(x), np.zeros_like(w)
    for m, k, n in np.ndindex(*x.shape, w.shape[1]):
        gx[m, k] += grad[m, n] * np.sign(w[k, n])
        gw[k, n] += grad[m, n] * np.sign(x[m, k])
    return gx if needs[0] else None, gw if needs[1] else None


def additive_conv2d_grad(
    grad: np.ndarray,
    x: np.ndarray,
    w: np.ndarray,
    win: Window,
    needs: tuple[bool, ...] = (True, True),
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Gradients of `additive_conv2d` where neither x nor w is zero."""
    gx, gw = np.zeros_like(x), np.zeros_like(w)
    H, W = x.shape[1:3]
    for b, oy, ox, n in np.ndindex(*grad.shape):
        for ky, kx in np.ndindex(*win.kernel):
            iy = oy * win.stride[0] - win.padding[0][0] + ky * win.dilation[0]
            ix = ox * win.stride[1] - win.padding[1][0] + kx * win.dilation[1]
            if 0 <= iy < H and 0 <= ix < W:
                for c in range(x.shape[3]):
                    gx[b, iy, ix, c] += grad[b, oy, ox, n] * np.sign(w[ky, kx, c, n])
                    gw[ky, kx, c, n] += grad[b, oy, ox, n] * np.sign(x[b, iy, ix, c])
    return gx if needs[0] else None, gw if needs[1] else None


def hashed(
    values: np.ndarray, shape: tuple[int, ...], buckets: tuple[int, ...], seed: int
) -> np.ndarray:
    """v (sum of buckets,) -> w (KH, KW, C, N) or (K, N): see `kernels.hashing`."""
    # w[ky, kx, c, n] = sum_j1 sum_j2 D[j1, ky] D'[j2, kx] F[j1, j2, c, n]
    full = shape if len(shape) == 4 else (1, 1, *shape)
    F, w = np.zeros(full, values.dtype), np.zeros(full, values.dtype)
    for i, place in enumerate(np.ndindex(*full)):
        band = place[0] + place[1]
        bucket = sum(buckets[:band]) + splitmix64(seed, 2 * i) % buckets[band]
        F[place] = -values[bucket] if splitmix64(seed, 2 * i + 1) >> 63 else values[bucket]
    for ky, kx, c, n in np.ndindex(*full):
        for j1, j2 in np.ndindex(*full[:2]):
            factor = dct(j1, ky, full[0]) * dct(j2, kx, full[1])
            w[ky, kx, c, n] += factor * F[j1, j2, c, n]
    return w.reshape(shape)


def splitmix64(seed: int, place: int) -> int:
    """The number at this place of the generator's sequence."""
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def dct(j: int, k: int, size: int) -> float:
    """The element of the orthonormal DCT-II."""
    return math.sqrt((2 if j else 1) / size) * math.cos(math.pi * j * (k + 0.5) / size)
