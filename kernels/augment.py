"""Byte images as changed floats: moved windows with other contrast, and free distortions."""

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


@jit
def _warp(drawings, chosen, matrix, moved, out):
    # out[b, i, j] = d(r, s) / 255, d: bilinear in drawings[chosen[b]] (S, S), 0 outside,
    # (r, s) = matrix[b] (i - (h - 1) / 2 - moved[b, 0, i, j], j - ... - moved[b, 1, i, j]) + middle
    B, h, w = out.shape
    S = drawings.shape[1]
    middle = (S - 1) / 2
    for b in range(B):
        drawing, m = drawings[chosen[b]], matrix[b]
        for i in range(h):
            for j in range(w):
                y = i - (h - 1) / 2 - moved[b, 0, i, j]
                x = j - (w - 1) / 2 - moved[b, 1, i, j]
                r = m[0, 0] * y + m[0, 1] * x + middle
                s = m[1, 0] * y + m[1, 1] * x + middle
                value = 0.0
                if r > -1 and s > -1 and r < S and s < S:
                    r0, s0 = math.floor(r), math.floor(s)
                    for k in range(max(r0, 0), min(r0 + 2, S)):
                        for q in range(max(s0, 0), min(s0 + 2, S)):
                            value += (1 - abs(r - k)) * (1 - abs(s - q)) * drawing[k, q]
                out[b, i, j] = value / 255


def warp(
    drawings: np.ndarray, chosen: np.ndarray, matrix: np.ndarray, moved: np.ndarray
) -> np.ndarray:
    """Drawings seen through random maps, (B, h, w) float32 from 0 to 1.

    drawings (N, S, S) uint8, chosen (B,) int64, matrix (B, 2, 2) and moved (B, 2, h, w) float64:
    a pixel, counted from the middle and moved back by `moved`, times `matrix`, is its place in the
    drawing, counted from the middle; in between it is interpolated, outside it is 0.
    """
    B, h, w = len(chosen), *moved.shape[-2:]
    if drawings.dtype != np.uint8 or drawings.ndim != 3 or len(set(drawings.shape[1:])) != 1:
        raise ValueError(f"warp: expected (N, S, S) uint8, got {drawings.dtype} {drawings.shape}")
    if chosen.dtype != np.int64 or (B and not 0 <= chosen.min() <= chosen.max() < len(drawings)):
        raise ValueError(f"warp: expected int64 from 0 to {len(drawings) - 1} as the chosen")
    if matrix.shape != (B, 2, 2) or moved.shape != (B, 2, h, w):
        raise ValueError(
            f"warp: expected ({B}, 2, 2) and ({B}, 2, h, w), got {matrix.shape}, {moved.shape}"
        )
    arrays = [np.ascontiguousarray(a, np.float64) for a in (matrix, moved)]
    out = memory.empty((B, h, w), np.float32)
    _warp(np.ascontiguousarray(drawings), np.ascontiguousarray(chosen), *arrays, out)
    return out
