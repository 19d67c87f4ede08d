"""Depthwise convolution of bytes, NHWC: each channel by itself; see `kernels.int8`.

    s[b, oy, ox, c] = base[v, c] + sum over taps inside of x[b, iy, ix, c] w[ky, kx, c]

with base as in `kernels.int8_conv`. Up to four rows of the image come together as the four bytes of
int32 lanes, and meet the weights of these rows in one dot product (`simd_int.slide_bytes`): a
vector of bytes of neighbouring channels from each row makes four of int32, INTERLEAVED as
`kernels._bytes` explains. Weights are packed in that order, and the sums' way back to bytes undoes
it. Rows above or below the image are replaced by the nearest one inside, their weights by 0. Where
a level WIDENS_IMAGES, rows come together as two int16 instead, and weights are taken apart likewise
before the tiles of a row of the image.

The rest is `kernels.depthwise`: a tile is mr neighbouring pixels of a row; windows whose rows have
2, 3 or 5 weights without gaps have code of their own; columns outside the image are skipped.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from kernels import simd, simd_int
from kernels._bytes import PLACES
from kernels._jit import Variants
from kernels.geometry import Window
from kernels.int8 import Scaling, checked_sums, fitted, operand, result, widened
from kernels.int8_conv import beginnings, check_image

_TASKS = 16  # wanted at least
_HEIGHTS = (4, 3) if simd.TILE[1] > 2 else (2,)  # of tiles


# --- kernel ---------------------------------------------------------------------------------------


def _tiles(mr: int, kw: int, step: int, rows: int, lanes: int, single: bool, narrow: bool) -> Any:
    def tiles(X, W, base, scale, low, high, zero, Y, sizes, lines, cases, first_task, last_task):
        # Y[b, oy, ox, c] = result of base[cases[oy] + cases[OH + ox], c] +
        #     sum_{g, k, r} w[g, k, c].r X[b, line r of group g, ox sx - left + k dx, c]
        # lines[oy, g] = the first line, how far the others are from it, and which bytes are inside
        # X (B, H, V, C) uint8, W (groups, KW, N) int32, of `rows` bytes each, Y (B, OH, OW, C),
        # all but W flat; base (cases, N), scale (N,); N: as `spread` puts channels
        # single: groups = 1, KW = kw;  narrow: C < 4 lanes;  tasks are images x parts of their rows
        H, V, C, OH, OW, sx, dx, left, parts = sizes
        groups, KW, wide = W.shape
        line = V * C
        ld, unit = (C, 1) if kw > 1 else (sx * C, sx)
        for task in prange(first_task, last_task):
            b, part = task // parts, task % parts
            for oy in range(OH * part // parts, OH * (part + 1) // parts):
                for n in range(0, wide, 4 * lanes):
                    c = max(0, min(n, C - 4 * lanes))  # the last moves back
                    by = simd_int.four(1, lanes, scale, n, 0)
                    w = simd_int.four(kw, lanes, W, n, wide)
                    w = simd_int.bit_and(w, lines[oy, 0, 4])
                    for ox in range(0, OW, mr):
                        start = ox * sx - left
                        inside = start >= 0 and start + (mr - 1) * sx + (KW - 1) * dx < V
                        if inside:
                            ib = (cases[oy] + cases[OH + ox]) * wide + n
                            acc = simd_int.repeated(mr, simd_int.four(1, lanes, base, ib, 0))
                        else:
                            ib = cases[oy] * wide + n
                            acc = simd_int.four_rows(mr, lanes, base, ib, wide, cases, OH + ox)
                        for g in range(1 if single else groups):
                            mask = lines[oy, g, 4]
                            if mask == 0:
                                continue
                            row = (b * H + lines[oy, g, 0]) * V
                            o1 = lines[oy, g, 1] * line
                            o2 = lines[oy, g, 2] * line
                            o3 = lines[oy, g, 3] * line
                            for kx in range(0, kw if single else KW, kw):
                                if not single:
                                    iw = (g * KW + kx) * wide + n
                                    w = simd_int.four(kw, lanes, W, iw, wide)
                                    w = simd_int.bit_and(w, mask)
                                x0 = start + kx * dx
                                ix = (row + x0) * C + c
                                if inside and not narrow:
                                    acc = simd_int.slide_bytes(
                                        acc, w, step, rows, X, ix, o1, o2, o3, ld, 0, 99, 0
                                    )
                                else:
                                    lo, hi = -(x0 // unit), -((x0 - V) // unit)
                                    if narrow:
                                        acc = simd_int.slide_bytes(
                                            acc, w, step, rows, X, ix, o1, o2, o3, ld, lo, hi, C
                                        )
                                    else:
                                        acc = simd_int.slide_bytes(
                                            acc, w, step, rows, X, ix, o1, o2, o3, ld, lo, hi, 0
                                        )
                        iy = ((b * OH + oy) * OW + ox) * C + c
                        if narrow or ox + mr > OW:
                            simd_int.store_interleaved_part(
                                acc, by, low, high, zero, Y, iy, C, 0, OW - ox, C - c
                            )
                        else:
                            simd_int.store_interleaved(acc, by, low, high, zero, Y, iy, C)

    return tiles


@cache
def tile_kernel(*tile: Any) -> Variants:
    """X, W, base, scale, low, high, zero, Y, sizes, lines, cases, first, last: see above."""
    return Variants(_tiles(*tile))


# --- packed layers --------------------------------------------------------------------------------


class Placed(NamedTuple):
    """A layer for images of one size: `tile` chooses the kernel, the rest are its operands."""

    output: tuple[int, int]
    tile: tuple[int, ...]  # the arguments of `tile_kernel`
    sizes: tuple[int, ...]  # H, V, C, OH, OW, sx, dx, left
    base: np.ndarray
    lines: np.ndarray
    cases: np.ndarray


@dataclass(frozen=True)
class Depthwise:
    """A packed layer: what `pack_depthwise2d` gives. `sums` (KH, KW, C R), `bias` (C R,), int64."""

    win: Window
    inputs: int
    factor: int
    x_zero: int
    packed: np.ndarray
    sums: np.ndarray
    bias: np.ndarray
    scaling: Scaling
    _placed: dict[tuple[int, int], Placed] = field(default_factory=dict, repr=False, compare=False)

    def placed(self, height: int, width: int) -> Placed:
        """The layer for images of this size."""
        found = self._placed.get((height, width))
        if found is None:
            found = self._placed[height, width] = _place(self, height, width)
        return found


def _lanes(channels: int) -> int:
    """Of each of the four vectors that hold as many neighbouring channels as there are."""
    return next(n for n in (16, 8, 4) if n <= simd.LANES and (4 * n <= channels or n == 4))


def spread(values: np.ndarray) -> np.ndarray:
    """Values (..., C) of channels as tiles take them: groups of four INTERLEAVED vectors.

    The last group moves back to C, those before it begin where the one before them ends.
    """
    channels = values.shape[-1]
    size = 4 * _lanes(channels)
    if channels < size:
        none = np.zeros((*values.shape[:-1], size - channels), values.dtype)
        values, channels = np.concatenate([values, none], -1), size
    order = np.arange(size).reshape(-1, 4, 4).swapaxes(0, 1).reshape(-1)
    groups = [order + min(c, channels - size) for c in range(0, channels, size)]
    return widened(values[..., np.concatenate(groups)], values.dtype)


def _grouping(kernel: int) -> tuple[int, int]:
    """Into how many groups the rows of a window are put, and of how many rows."""
    groups = -(-kernel // 4)
    return groups, -(-kernel // groups)


def _place(layer: Depthwise, height: int, width: int) -> Placed:
    win, output = layer.win, layer.win.output(height, width)
    channels = layer.inputs * layer.factor
    lanes = _lanes(channels)
    narrow = channels < 4 * lanes
    base, cases = beginnings((height, width), win, layer.sums, layer.bias, layer.x_zero)
    base = spread(base[:, :channels])
    groups, count = _grouping(win.kernel[0])
    lines = np.zeros((output[0], groups, 5), np.int64)
    for oy in range(output[0]):
        for g in range(groups):
            first = oy * win.stride[0] - win.padding[0][0] + g * count * win.dilation[0]
            wanted = [first + r * win.dilation[0] for r in range(4)]
            nearest = [min(max(y, 0), height - 1) for y in wanted]
            inside = [
                r < count and g * count + r < win.kernel[0] and 0 <= y < height
                for r, y in enumerate(wanted)
            ]
            mask = sum(255 << 8 * place for r, place in enumerate(PLACES) if inside[r])
            lines[oy, g] = nearest[0], *(y - nearest[0] for y in nearest[1:]), mask
    lines[..., 4] = lines[..., 4].astype(np.uint32).view(np.int32)  # as signed numbers
    special = win.kernel[1] in (2, 3, 5) and win.stride[1] <= 2 and win.dilation[1] == 1
    kw, step = (win.kernel[1], win.stride[1]) if special and not narrow else (1, 1)
    mr = min(_HEIGHTS, key=lambda h: -(-output[1] // h) * h) if special else _HEIGHTS[0]
    single = groups == 1 and kw == win.kernel[1]
    sizes = (height, width, channels, *output, win.stride[1], win.dilation[1], win.padding[1][0])
    tile = (mr, kw, step, count, lanes, single, narrow)
    return Placed(output, tile, sizes, base, lines, cases)


def parts(images: int, rows: int) -> int:
    """Into how many tasks the rows of each image are cut."""
    return min(rows, max(1, _TASKS // images))


# --- public ---------------------------------------------------------------------------------------


def pack_depthwise2d(
    w: np.ndarray, bias: np.ndarray | None, x_zero: int, scaling: Scaling, win: Window
) -> Depthwise:
    """A depthwise convolution by w (KH, KW, C, R) int8, bias (C R,) int32 or None.

    Raises TypeError and ValueError for other arrays, OverflowError where sums could leave int32.
    """
    if w.ndim != 4 or w.shape[:2] != win.kernel or not w.size:
        raise ValueError(
            f"pack_depthwise2d: expected w ({win.kernel[0]}, {win.kernel[1]}, C, R), not empty, "
            f"got {w.shape}"
        )
    KH, KW, C, factor = w.shape
    taps = w.reshape(KH * KW, 1, C * factor)
    sums, added, most = checked_sums("pack_depthwise2d", taps, bias, x_zero)
    how = fitted("pack_depthwise2d", scaling, most)
    how = how._replace(multiplier=spread(how.multiplier))
    groups, rows = _grouping(KH)
    bytes_ = np.zeros((groups * rows, KW, C * factor), np.int8)
    bytes_[:KH] = taps.reshape(KH, KW, C * factor)
    quads = np.zeros((groups, KW, C * factor, 4), np.int8)
    quads[..., PLACES[:rows]] = bytes_.reshape(groups, rows, KW, -1).transpose(0, 2, 3, 1)
    packed = spread(quads.view(np.int32)[..., 0])
    sums = sums.reshape(KH, KW, C * factor)
    return Depthwise(win, C, factor, x_zero, packed, sums, added, how)


def depthwise2d(x: np.ndarray, layer: Depthwise, *, out: np.ndarray | None = None) -> np.ndarray:
    """x (B, H, W, C) uint8 -> (B, OH, OW, C R), uint8 or float32 as the layer's scaling says.

    Raises ValueError for shapes that do not fit, TypeError for another dtype.
    """
    check_image("depthwise2d", x.shape, layer.inputs)
    x = operand("depthwise2d", x)
    if layer.factor > 1:
        x = np.repeat(x, layer.factor, axis=3)
    at = layer.placed(*x.shape[1:3])
    y = result("depthwise2d", (len(x), *at.output, x.shape[3]), layer.scaling.dtype, out)
    images = len(x)
    share = parts(images, at.output[0])
    tile_kernel(*at.tile).choose(x.nbytes + y.nbytes)(
        x.reshape(-1),
        layer.packed,
        at.base,
        *layer.scaling[:4],
        y.reshape(-1),
        (*at.sizes, share),
        at.lines,
        at.cases,
        0,
        images * share,
    )
    return y
