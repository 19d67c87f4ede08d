"""Pools: the maximum or the mean of each channel under a sliding window, with gradients.

Images are NHWC; a vector holds neighbouring channels of one pixel. All geometry lies in short
tables, one for each axis, that name the pixels each result takes: pixels outside the image are not
among them. The same loop computes the mean and its gradient, which differ in their tables only.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from kernels import memory, simd
from kernels._jit import Variants, prepared
from kernels.geometry import Window

_TASKS = 16  # wanted at least
_AHEAD_BYTES = 1 << 20  # of images: what is smaller stays in the second-level cache


# --- kernels --------------------------------------------------------------------------------------


def _weighted(nr: int) -> Any:
    def weighted(X, y_at, y_from, y_in, y_out, x_at, x_from, x_in, x_out, Y, parts, below):
        # Y[b, i, j, c] = y_out[i] x_out[j] sum_{e, f} y_in[e] x_in[f] X[b, y_from[e], x_from[f], c]
        # y_at[i] <= e < y_at[i + 1], x_at[j] <= f < x_at[j + 1]
        # X (B, H, N, C), Y (B, OH, ON, C); what lies `below` ahead in X is asked for, unless 0
        B, H, N, C = X.shape
        OH, ON = Y.shape[1:3]
        L = simd.lanes(X)
        W = nr * L
        for task in prange(B * parts):
            b, part = task // parts, task % parts
            for i in range(OH * part // parts, OH * (part + 1) // parts):
                for j in range(ON):
                    iy = ((b * OH + i) * ON + j) * C
                    scale = y_out[i] * x_out[j]
                    for c in range(0, C, W):
                        acc = simd.zeros(1, nr, X)
                        for e in range(y_at[i], y_at[i + 1]):
                            row = (b * H + y_from[e]) * N
                            for f in range(x_at[j], x_at[j + 1]):
                                ix = (row + x_from[f]) * C + c
                                if below:
                                    simd.prefetch(nr, X, ix + below, L)
                                weight = simd.fill(1, 1, X, y_in[e] * x_in[f])
                                if c + W <= C:
                                    x = simd.load(1, nr, X, ix, 0)
                                else:
                                    x = simd.load_part(1, nr, X, ix, 0, 0, 1, C - c)
                                acc = simd.fma(acc, x, weight)
                        acc = simd.mul(acc, simd.fill(1, 1, X, scale))
                        if c + W <= C:
                            simd.store(acc, Y, iy + c, 0)
                        else:
                            simd.store_part(acc, Y, iy + c, 0, 0, 1, C - c)

    return weighted


def _largest(nr: int, np: int) -> Any:
    def largest(X, y_at, y_from, x_at, x_from, low, Y, P, parts, below):
        # Y[b, i, j, c] = max_{e, f} X[b, y_from[e], x_from[f], c],
        # P[b, i, j, c] its place y_from[e] N + x_from[f]
        # e, f as above, in order; the first of equals or the first NaN; low and -1 if there is none
        # X (B, H, N, C), Y, P (B, OH, ON, C); np vectors of P have the lanes of nr vectors of X
        # `below` as above
        B, H, N, C = X.shape
        OH, ON = Y.shape[1:3]
        L = simd.lanes(X)
        W = nr * L
        integer = P.dtype.type
        for task in prange(B * parts):
            b, part = task // parts, task % parts
            for i in range(OH * part // parts, OH * (part + 1) // parts):
                for j in range(ON):
                    iy = ((b * OH + i) * ON + j) * C
                    e_lo, e_hi, f_lo, f_hi = y_at[i], y_at[i + 1], x_at[j], x_at[j + 1]
                    some = e_lo < e_hi and f_lo < f_hi
                    first = y_from[e_lo] * N + x_from[f_lo] if some else -1
                    for c in range(0, C, W):
                        best, place = simd.fill(1, nr, X, low), simd.fill(1, np, P, integer(first))
                        if some:
                            best = simd.load_part(
                                1, nr, X, (b * H * N + first) * C + c, 0, 0, 1, C - c
                            )
                        for e in range(e_lo, e_hi):
                            for f in range(f_lo, f_hi):
                                at = y_from[e] * N + x_from[f]
                                ix = (b * H * N + at) * C + c
                                if below:
                                    simd.prefetch(nr, X, ix + below, L)
                                if c + W <= C:
                                    x = simd.load(1, nr, X, ix, 0)
                                else:
                                    x = simd.load_part(1, nr, X, ix, 0, 0, 1, C - c)
                                here = simd.fill(1, np, P, integer(at))
                                place = simd.above(x, best, here, place)
                                best = simd.above(x, best, x, best)
                        if c + W <= C:
                            simd.store(best, Y, iy + c, 0)
                            simd.store(place, P, iy + c, 0)
                        else:
                            simd.store_part(best, Y, iy + c, 0, 0, 1, C - c)
                            simd.store_part(place, P, iy + c, 0, 0, 1, C - c)

    return largest


def _returned(nr: int, np: int) -> Any:
    def returned(G, P, y_at, y_from, x_at, x_from, X, parts):
        # X[b, i, j, c] = sum_{e, f} G[b, y_from[e], x_from[f], c] where P there is i N + j
        # e, f as above, in order: the windows that pixel (i, j) lies in
        # X (B, H, N, C), G, P (B, OH, ON, C); vectors as above
        B, H, N, C = X.shape
        OH, ON = G.shape[1:3]
        W = nr * simd.lanes(X)
        integer = P.dtype.type
        none = simd.zeros(1, nr, G)
        for task in prange(B * parts):
            b, part = task // parts, task % parts
            for i in range(H * part // parts, H * (part + 1) // parts):
                for j in range(N):
                    ix = ((b * H + i) * N + j) * C
                    here = simd.fill(1, np, P, integer(i * N + j))
                    for c in range(0, C, W):
                        acc = simd.zeros(1, nr, G)
                        for e in range(y_at[i], y_at[i + 1]):
                            row = (b * OH + y_from[e]) * ON
                            for f in range(x_at[j], x_at[j + 1]):
                                at = (row + x_from[f]) * C + c
                                if c + W <= C:
                                    g = simd.load(1, nr, G, at, 0)
                                    place = simd.load(1, np, P, at, 0)
                                else:
                                    g = simd.load_part(1, nr, G, at, 0, 0, 1, C - c)
                                    place = simd.load_part(1, np, P, at, 0, 0, 1, C - c)
                                acc = simd.add(acc, simd.equal(place, here, g, none))
                        if c + W <= C:
                            simd.store(acc, X, ix + c, 0)
                        else:
                            simd.store_part(acc, X, ix + c, 0, 0, 1, C - c)

    return returned


@cache
def _weighted_kernel(nr: int) -> Variants:
    return Variants(_weighted(nr))


@cache
def _largest_kernel(nr: int, np: int) -> Variants:
    return Variants(_largest(nr, np))


@cache
def _returned_kernel(nr: int, np: int) -> Variants:
    return Variants(_returned(nr, np))


def _vectors(channels: int, itemsize: int) -> int:
    """How many vectors of a pixel are taken at once: 1, 2 or 4."""
    most = channels * itemsize // (4 * simd.LANES)
    return 4 if most >= 4 else max(1, most // 2 * 2)


def _with_places(channels: int, itemsize: int) -> tuple[int, int]:
    """How many vectors of a pixel, and of the places that go with them (0: half a vector)."""
    # A vector of int32 has twice the lanes of one of float64.
    return (_vectors(channels, 4),) * 2 if itemsize == 4 else (1, 0)


# --- tables ---------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """Along one axis: result i takes pixels source[at[i] : at[i + 1]]."""

    at: np.ndarray
    source: np.ndarray
    before: np.ndarray  # weight of each pixel taken
    after: np.ndarray  # weight of each result


def _axis(taken: list[list[int]], before: list[list[float]], after: list[float]) -> _Axis:
    at = np.cumsum([0, *map(len, taken)])
    flat = [n for some in taken for n in some] or [0]
    weights = [v for some in before for v in some] or [0.0]
    return _Axis(at, np.array(flat), np.array(weights), np.array(after))


@lru_cache(1024)
def _tables(
    height: int, width: int, win: Window, dtype: Any
) -> tuple[tuple[_Axis, ...], tuple[_Axis, ...]]:
    """Of the mean (y, x), and of its gradient."""
    forward, backward = [], []
    for n, count, k, s, (before, _), d in zip(
        (height, width),
        win.output(height, width),
        win.kernel,
        win.stride,
        win.padding,
        win.dilation,
        strict=True,
    ):
        taken = [
            [p for p in range(o * s - before, o * s - before + k * d, d) if 0 <= p < n]
            for o in range(count)
        ]
        share = [1 / max(1, len(t)) for t in taken]
        readers: list[list[int]] = [[] for _ in range(n)]
        for o, pixels in enumerate(taken):
            for p in pixels:
                readers[p].append(o)
        forward.append(_axis(taken, [[1.0] * len(t) for t in taken], share))
        backward.append(_axis(readers, [[share[o] for o in r] for r in readers], [1.0] * n))
    typed = [
        _Axis(a.at, a.source, a.before.astype(dtype), a.after.astype(dtype))
        for a in forward + backward
    ]
    return tuple(typed[:2]), tuple(typed[2:])


def _combine(
    x: np.ndarray, axes: tuple[_Axis, ...], shape: tuple[int, ...], below: int
) -> np.ndarray:
    y = memory.empty(shape, x.dtype)
    kernel = _weighted_kernel(_vectors(shape[3], x.itemsize))
    kernel.choose(x.nbytes + y.nbytes)(x, *axes[0], *axes[1], y, _parts(shape), below)
    return y


def _below(x: Any, win: Window) -> int:
    """How far below what a window reads lies what the next one in its column reads; or 0.

    Windows of a row take turns in reading from several rows of the image, and processors do not
    foresee what the next ones read. Where windows overlap, most of it has been read before.
    """
    if x.nbytes < _AHEAD_BYTES:
        return 0
    k, s, d = win.kernel[0], win.stride[0], win.dilation[0]
    apart = k > 1 and (k - 1) * d < s < x.shape[1]
    return s * x.shape[2] * x.shape[3] if apart else 0


def _parts(shape: tuple[int, ...]) -> int:
    """Into how many tasks the rows of each image are cut."""
    return min(shape[1], max(1, _TASKS // shape[0]))


# --- public ---------------------------------------------------------------------------------------


def max_pool2d(x: np.ndarray, win: Window) -> tuple[np.ndarray, np.ndarray]:
    """The largest value under each window of x (B, H, W, C), and its place iy W + ix, int32.

    The first of equals, the first NaN if there is one; padding is never the largest. A window that
    lies in the padding altogether gives -inf and place -1. Both results are (B, OH, OW, C).
    """
    _check_image("max_pool2d", x.shape)
    (x,) = prepared("max_pool2d", x)
    shape = (len(x), *win.output(*x.shape[1:3]), x.shape[3])
    (ys, xs), _ = _tables(*x.shape[1:3], win, x.dtype)
    y, place = memory.empty(shape, x.dtype), memory.empty(shape, np.int32)
    kernel = _largest_kernel(*_with_places(shape[3], x.itemsize))
    low = x.dtype.type(-np.inf)
    kernel.choose(x.nbytes + y.nbytes + place.nbytes)(
        x, ys.at, ys.source, xs.at, xs.source, low, y, place, _parts(shape), _below(x, win)
    )
    return y, place


def max_pool2d_grad(
    grad: np.ndarray, place: np.ndarray, shape: Sequence[int], win: Window
) -> np.ndarray:
    """Gradient of `max_pool2d` by x of `shape` (B, H, W, C): it goes to the place of the maximum.

    gx[b, iy, ix, c] = sum of grad[b, oy, ox, c] over windows that pixel (iy, ix) lies in with
    place[b, oy, ox, c] = iy W + ix.
    """
    name = "max_pool2d_grad"
    _check_image(name, shape)
    expected = (shape[0], *win.output(shape[1], shape[2]), shape[3])
    if grad.shape != expected or place.shape != expected:
        raise ValueError(
            f"{name}: expected grad and place {expected}, got {grad.shape} and {place.shape}"
        )
    if place.dtype != np.int32:
        raise TypeError(f"{name}: expected places of int32, got {place.dtype}")
    (grad,) = prepared(name, grad)
    if not place.flags.carray:
        place = np.array(place, order="C")
    gx = memory.empty(tuple(shape), grad.dtype)
    _, (ys, xs) = _tables(shape[1], shape[2], win, grad.dtype)
    _returned_kernel(*_with_places(shape[3], grad.itemsize)).choose(gx.nbytes + 2 * grad.nbytes)(
        grad, place, ys.at, ys.source, xs.at, xs.source, gx, _parts(gx.shape)
    )
    return gx


def avg_pool2d(x: np.ndarray, win: Window) -> np.ndarray:
    """The mean of the values of x (B, H, W, C) under each window; padding does not count.

    A window that lies in the padding altogether gives 0.
    """
    _check_image("avg_pool2d", x.shape)
    (x,) = prepared("avg_pool2d", x)
    shape = (len(x), *win.output(*x.shape[1:3]), x.shape[3])
    axes, _ = _tables(*x.shape[1:3], win, x.dtype)
    return _combine(x, axes, shape, _below(x, win))


def avg_pool2d_grad(grad: np.ndarray, shape: Sequence[int], win: Window) -> np.ndarray:
    """Gradient of `avg_pool2d` by x of `shape` (B, H, W, C).

    gx[b, iy, ix, c] = sum over its windows of grad[b, oy, ox, c] / T[oy, ox], where T counts the
    pixels of the window that lie in the image.
    """
    name = "avg_pool2d_grad"
    _check_image(name, shape)
    expected = (shape[0], *win.output(shape[1], shape[2]), shape[3])
    if grad.shape != expected:
        raise ValueError(f"{name}: expected grad {expected}, got {grad.shape}")
    (grad,) = prepared(name, grad)
    axes = _tables(shape[1], shape[2], win, grad.dtype)[1]
    return _combine(grad, axes, tuple(shape), 0)


def _check_image(name: str, shape: Sequence[int]) -> None:
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"{name}: expected x (B, H, W, C), not empty, got {tuple(shape)}")
