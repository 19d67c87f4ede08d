"""Windows of byte images, moved, mirrored, with changed contrast and brightness, as floats."""

# mypy: allow-untyped-defs

from __future__ import annotations

import math

import numpy as np

from kernels import memory
from kernels._jit import jit

_LARGEST_SIDE = 1 << 15  # column sums of squares fit 32 bits


@jit
def _windows(images, rows, tops, lefts, mirror, contrast, brightness, edge, standardize, out):
    # v[y, x, c] = images[rows[b], tops[b] + y, lefts[b] + x', c], x' = x or w - 1 - x (mirrored),
    #   0 or the nearest pixel outside the image;      images (N, H, W, C) bytes, v (h, w, C)
    # u = contrast[b] (v - m[c]) + m[c] + brightness[b],  m[c] = mean over y, x of v
    # out[b] = u / 255,  or (u - mean(u)) / max(std(u), 1 / sqrt(h w C)) over all of u
    # Both are affine in v: out = scale[c] v + shift[c], from integer sums of v and v^2.
    B, h, w, C = out.shape
    H, W = images.shape[1], images.shape[2]
    window = np.empty((h, w * C), np.uint8)
    total, squares = np.empty(w * C, np.uint32), np.empty(w * C, np.uint32)
    scale, shift = np.empty(w * C, np.float32), np.empty(w * C, np.float32)
    means = np.empty(C, np.float64)
    flat = out.reshape(B, h, w * C)
    for b in range(B):
        image, top, left = images[rows[b]], tops[b], lefts[b]
        for y in range(h):
            sy, row = top + y, window[y]
            if not edge and (sy < 0 or sy >= H):
                row[:] = 0
                continue
            source = image[min(max(sy, 0), H - 1)]
            for x in range(w):
                sx = left + (w - 1 - x if mirror[b] else x)
                inside = sx >= 0 and sx < W
                sx = min(max(sx, 0), W - 1)
                for c in range(C):
                    row[x * C + c] = source[sx, c] if inside or edge else np.uint8(0)
        f, n = contrast[b], h * w
        if standardize or f != 1:
            total[:] = 0
            squares[:] = 0
            for y in range(h):
                row = window[y]
                for j in range(w * C):
                    v = np.uint32(row[j])
                    total[j] += v
                    squares[j] += v * v
            mean, spread = 0.0, 0.0
            for c in range(C):
                t, q = np.int64(0), np.int64(0)
                for x in range(w):
                    t += np.int64(total[x * C + c])
                    q += np.int64(squares[x * C + c])
                means[c] = t / n
                mean += means[c] / C
                spread += f * f * max(0.0, np.float64(q) / n - means[c] * means[c]) / C
            for c in range(C):
                spread += (means[c] - mean) ** 2 / C
        for c in range(C):
            a, d = f, brightness[b]
            if f != 1:
                d += (1 - f) * means[c]
            if standardize:
                deviation = max(math.sqrt(spread), 1 / math.sqrt(n * C))
                a, d = a / deviation, (d - mean - brightness[b]) / deviation
            else:
                a, d = a / 255, d / 255
            for x in range(w):
                scale[x * C + c] = a
                shift[x * C + c] = d
        for y in range(h):
            row, result = window[y], flat[b, y]
            for j in range(w * C):
                result[j] = scale[j] * np.float32(row[j]) + shift[j]


def windows(
    images: np.ndarray,
    rows: np.ndarray,
    tops: np.ndarray,
    lefts: np.ndarray,
    mirror: np.ndarray,
    contrast: np.ndarray,
    brightness: np.ndarray,
    size: tuple[int, int],
    edge: bool,
    standardize: bool,
) -> np.ndarray:
    """The chosen window of each chosen image, (B, h, w, C) float32, with (h, w) = `size`.

    images (N, H, W, C) uint8; the others (B,): rows, tops, lefts int64, mirror bool, contrast and
    brightness float64. A window begins at (tops, lefts), which may lie outside the image: there
    it holds zeros, or with `edge` the nearest pixel. Contrast multiplies the distance from each
    channel's mean; brightness is added, in units of a byte. The result is divided by 255, or with
    `standardize` has mean 0 and standard deviation 1 in each image.

    One thread computes it all, and it holds no lock: made to run beside a training.
    """
    B, C = len(rows), images.shape[-1]
    if images.dtype != np.uint8 or images.ndim != 4 or not images.flags.c_contiguous:
        raise ValueError(
            f"windows: expected C-contiguous (N, H, W, C) uint8, got {images.dtype} {images.shape}"
        )
    if max(*images.shape[1:3], *size) > _LARGEST_SIDE or min(images.shape[1:], default=0) < 1:
        raise ValueError(f"windows: sides must be 1 to {_LARGEST_SIDE}: {images.shape}, {size}")
    wanted = [np.int64] * 3 + [np.bool_] + [np.float64] * 2
    for array, dtype in zip((rows, tops, lefts, mirror, contrast, brightness), wanted, strict=True):
        if array.shape != (B,) or array.dtype != dtype:
            raise ValueError(f"windows: expected {dtype} ({B},), got {array.dtype} {array.shape}")
    if B and not 0 <= rows.min() <= rows.max() < len(images):
        raise ValueError(f"windows: rows must be 0 to {len(images) - 1}")
    out = memory.empty((B, *size, C), np.float32)
    _windows(images, rows, tops, lefts, mirror, contrast, brightness, edge, standardize, out)
    return out
