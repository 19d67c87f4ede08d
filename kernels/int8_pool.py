"""Pools of bytes, NHWC: the largest or the mean of each channel under a window; see `kernels.int8`.

As in `kernels.pool`, short tables name the pixels that each result takes along an axis, and pixels
outside the image are not among them. The largest byte is that of the largest number, so that a
maximum needs no scale.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import prange

from kernels import simd, simd_int
from kernels._jit import Variants
from kernels.geometry import Window
from kernels.int8 import LARGEST, Scaling, check_zero, operand, result
from kernels.int8_conv import check_image
from kernels.pool import _parts, _tables

# --- kernels --------------------------------------------------------------------------------------


def _largest_loop(X, Y, sizes, y_at, y_from, x_at, x_from, first_task, last_task):
    # Y[b, i, j, c] = max_{e, f} X[b, y_from[e], x_from[f], c], 0 of none
    # y_at[i] <= e < y_at[i + 1], x_at[j] <= f < x_at[j + 1]
    # X (B, H, V, C), Y (B, OH, OW, C), flat, uint8;  tasks are images x parts of their rows
    H, V, C, OH, OW, parts = sizes
    W = 4 * simd_int.byte_lanes()
    for task in prange(first_task, last_task):
        b, part = task // parts, task % parts
        for i in range(OH * part // parts, OH * (part + 1) // parts):
            for j in range(OW):
                iy = ((b * OH + i) * OW + j) * C
                for c in range(0, C, W):
                    best = simd_int.of_int(0)
                    for e in range(y_at[i], y_at[i + 1]):
                        for f in range(x_at[j], x_at[j + 1]):
                            ix = ((b * H + y_from[e]) * V + x_from[f]) * C + c
                            if c + W <= C:
                                best = simd_int.max_bytes(best, simd_int.bytes_at(X, ix, 0))
                            else:
                                best = simd_int.max_bytes(best, simd_int.bytes_at(X, ix, C - c))
                    if c + W <= C:
                        simd_int.store_bytes(best, Y, iy + c, 0)
                    else:
                        simd_int.store_bytes(best, Y, iy + c, C - c)


def _mean(nr: int) -> Any:
    def mean(X, x_zero, scale, low, high, zero, Y, sizes, y_at, y_from, x_at, x_from, first, last):
        # Y[b, i, j, c] = result of sum_{e, f} (X[b, y_from[e], x_from[f], c] - x_zero)
        # with multiplier scale[T], T the number of terms; e, f, X, Y, tasks as above
        H, V, C, OH, OW, parts = sizes
        W = nr * simd_int.byte_lanes()
        for task in prange(first, last):
            b, part = task // parts, task % parts
            for i in range(OH * part // parts, OH * (part + 1) // parts):
                for j in range(OW):
                    iy = ((b * OH + i) * OW + j) * C
                    count = (y_at[i + 1] - y_at[i]) * (x_at[j + 1] - x_at[j])
                    for c in range(0, C, W):
                        start = simd_int.of_int(-count * x_zero)
                        acc = simd.add(simd_int.zeros(1, nr), start)
                        for e in range(y_at[i], y_at[i + 1]):
                            for f in range(x_at[j], x_at[j + 1]):
                                ix = ((b * H + y_from[e]) * V + x_from[f]) * C + c
                                if c + W <= C:
                                    x = simd_int.load_bytes(1, nr, X, ix, 0)
                                else:
                                    x = simd_int.load_bytes_part(1, nr, X, ix, 0, C - c)
                                acc = simd.add(acc, x)
                        by = simd_int.of_float(scale[count])
                        if c + W <= C:
                            simd_int.store_scaled(acc, by, low, high, zero, Y, iy + c, 0)
                        else:
                            simd_int.store_scaled_part(
                                acc, by, low, high, zero, Y, iy + c, 0, 0, 1, C - c
                            )

    return mean


#: X, Y, sizes = (H, V, C, OH, OW, parts), y_at, y_from, x_at, x_from, first, last.
LARGEST_OF = Variants(_largest_loop)


@cache
def mean_kernel(nr: int) -> Variants:
    """X, x_zero, scale, low, high, zero, Y, sizes, y_at, y_from, x_at, x_from, first, last."""
    return Variants(_mean(nr))


def vectors(channels: int) -> int:
    """How many vectors the kernel of the mean takes at once."""
    return next(n for n in (4, 2, 1) if channels >= n * simd.LANES or n == 1)


# --- public ---------------------------------------------------------------------------------------


def max_pool2d(x: np.ndarray, win: Window, *, out: np.ndarray | None = None) -> np.ndarray:
    """The largest byte under each window of x (B, H, W, C) uint8 -> (B, OH, OW, C).

    The scale and zero point stay. A window that lies in the padding altogether gives 0.
    """
    check_image("max_pool2d", x.shape, x.shape[-1])
    x = operand("max_pool2d", x)
    shape = (len(x), *win.output(*x.shape[1:3]), x.shape[3])
    y = result("max_pool2d", shape, np.uint8, out)
    (ys, xs), _ = _tables(*x.shape[1:3], win, np.float32)
    parts = _parts(shape)
    LARGEST_OF.choose(x.nbytes + y.nbytes)(
        x.reshape(-1),
        y.reshape(-1),
        (*x.shape[1:], *shape[1:3], parts),
        ys.at,
        ys.source,
        xs.at,
        xs.source,
        0,
        len(x) * parts,
    )
    return y


def avg_pool2d(
    x: np.ndarray,
    x_zero: int,
    scaling: Scaling,
    win: Window,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The mean under each window of x (B, H, W, C) uint8 -> (B, OH, OW, C), as the scaling says.

    Padding does not count: the sum of the T pixels inside has multiplier float32(multiplier / T),
    the division in float64. A window that lies in the padding altogether gives the number 0. The
    global pool has a window as large as the image.
    Raises ValueError for shapes that do not fit, or a window whose sum could leave int32.
    """
    check_image("avg_pool2d", x.shape, x.shape[-1])
    check_zero("avg_pool2d", x_zero)
    if len(scaling.multiplier) != 1:
        raise ValueError(f"avg_pool2d: expected one multiplier, got {len(scaling.multiplier)}")
    most = win.kernel[0] * win.kernel[1]
    if most > LARGEST // 255:
        raise ValueError(f"avg_pool2d: window {win.kernel} is too large for sums in int32")
    x = operand("avg_pool2d", x)
    shape = (len(x), *win.output(*x.shape[1:3]), x.shape[3])
    y = result("avg_pool2d", shape, scaling.dtype, out)
    (ys, xs), _ = _tables(*x.shape[1:3], win, np.float32)
    counts = np.maximum(np.arange(most + 1), 1)
    scale = (scaling.multiplier.astype(np.float64) / counts).astype(np.float32)
    parts = _parts(shape)
    mean_kernel(vectors(shape[3])).choose(x.nbytes + y.nbytes)(
        x.reshape(-1),
        x_zero,
        scale,
        *scaling[1:4],
        y.reshape(-1),
        (*x.shape[1:], *shape[1:3], parts),
        ys.at,
        ys.source,
        xs.at,
        xs.source,
        0,
        len(x) * parts,
    )
    return y
