"""Depthwise convolution of bytes, NHWC: each channel by itself; see `kernels.int8`.

    s[b, oy, ox, c] = base[v, c] + sum over taps inside of x[b, iy, ix, c] w[ky, kx, c]

with base as in `kernels.int8_conv`. A vector holds L neighbouring channels of one pixel. Up to four
rows of the image come together as the four bytes of its int32 lanes, and meet the weights of these
rows in one dot product (`simd_int.slide_bytes`). Rows above or below the image are replaced by the
nearest one inside, and their weights by 0. Small images are copied first, with x_zero around them.

The rest is `kernels.depthwise`: a tile is mr neighbouring pixels of a row; windows whose rows have
3 or 5 weights without gaps have code of their own; columns outside the image are skipped.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from kernels import memory, simd, simd_int
from kernels._jit import Variants
from kernels.geometry import Window
from kernels.int8 import Scaling, checked_sums, multipliers, operand, result, widened
from kernels.int8_conv import PAD, beginnings, check_image, copied

_TASKS = 16  # wanted at least
_HEIGHTS = (8, 6, 4)  # of tiles
_NARROW_IMAGE = 32  # pixels of a row of results, of which many have windows beyond the image


# --- kernel ---------------------------------------------------------------------------------------


def _tiles(mr: int, kw: int, step: int, rows: int, narrow: bool) -> Any:
    def tiles(X, W, base, scale, low, high, zero, Y, sizes, lines, cases, first_task, last_task):
        # Y[b, oy, ox, c] = result of base[cases[oy] + cases[OH + ox], c] +
        #     sum_{g, k, r} w[g, k, c].r X[b, line r of group g, ox sx - left + k dx, c]
        # lines[oy, g] = the first line, how far the others are from it, and which bytes are inside
        # X (B, H, V, C) uint8, W (groups, KW, C filled up) int32, of `rows` bytes each,
        # Y (B, OH, OW, C), all but W flat; base (cases, C filled up), scale (C filled up,)
        # narrow: C < L;  tasks are images x parts of their rows
        H, V, C, OH, OW, sx, dx, left, parts = sizes
        groups, KW, wide = W.shape
        L = simd.lanes(base)
        line = V * C
        ld, unit = (C, 1) if kw > 1 else (sx * C, sx)
        for task in prange(first_task, last_task):
            b, part = task // parts, task % parts
            for oy in range(OH * part // parts, OH * (part + 1) // parts):
                for ox in range(0, OW, mr):
                    start = ox * sx - left
                    inside = start >= 0 and start + (mr - 1) * sx + (KW - 1) * dx < V
                    for c0 in range(0, C, L):
                        c = max(0, min(c0, C - L))  # the last moves back
                        if inside:
                            ib = (cases[oy] + cases[OH + ox]) * wide + c
                            acc = simd.add(simd.zeros(mr, 1, base), simd.load(1, 1, base, ib, 0))
                        else:
                            ib = cases[oy] * wide + c
                            acc = simd_int.load_rows(mr, 1, base, ib, wide, cases, OH + ox)
                        for g in range(groups):
                            mask = lines[oy, g, 4]
                            if mask == 0:
                                continue
                            bits = simd_int.of_int(mask)
                            row = (b * H + lines[oy, g, 0]) * V
                            o1 = lines[oy, g, 1] * line
                            o2 = lines[oy, g, 2] * line
                            o3 = lines[oy, g, 3] * line
                            for kx in range(0, KW, kw):
                                simd.rolled()
                                w = simd.load(kw, 1, W, (g * KW + kx) * wide + c, wide)
                                w = simd_int.bit_and(w, bits)
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
                        by = simd.load(1, 1, scale, c, 0)
                        iy = ((b * OH + oy) * OW + ox) * C + c
                        if narrow or ox + mr > OW:
                            simd_int.store_scaled_part(
                                acc, by, low, high, zero, Y, iy, C, 0, OW - ox, C - c
                            )
                        else:
                            simd_int.store_scaled(acc, by, low, high, zero, Y, iy, C)

    return tiles


@cache
def tile_kernel(mr: int, kw: int, step: int, rows: int, narrow: bool) -> Variants:
    """X, W, base, scale, low, high, zero, Y, sizes, lines, cases, first, last: see above."""
    return Variants(_tiles(mr, kw, step, rows, narrow))


# --- packed layers --------------------------------------------------------------------------------


class Placed(NamedTuple):
    """A layer for images of one size: `tile` chooses the kernel, the rest are its operands."""

    output: tuple[int, int]
    copy: tuple[int, ...] | None  # the sizes of `int8_conv.PAD`, if the image is to be copied first
    scratch: int  # bytes of a copied image
    tile: tuple[int, int, int, int, bool]
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
    multiplier: np.ndarray
    scaling: Scaling
    _placed: dict[tuple[int, int], Placed] = field(default_factory=dict, repr=False, compare=False)

    def placed(self, height: int, width: int) -> Placed:
        """The layer for images of this size."""
        found = self._placed.get((height, width))
        if found is None:
            found = self._placed[height, width] = _place(self, height, width)
        return found


def _grouping(kernel: int) -> tuple[int, int]:
    """Into how many groups the rows of a window are put, and of how many rows."""
    groups = -(-kernel // 4)
    return groups, -(-kernel // groups)


def _place(layer: Depthwise, height: int, width: int) -> Placed:
    win, output = layer.win, layer.win.output(height, width)
    channels = layer.inputs * layer.factor
    narrow = channels < simd.LANES
    copy, scratch = None, 0
    if max(map(max, win.padding)) > 0 and output[1] <= _NARROW_IMAGE and not narrow:
        copy = copied(height, width, channels, win)
        height, width = copy[3:5]
        win, scratch = win._replace(padding=((0, 0), (0, 0))), height * width * channels
    base, cases = beginnings((height, width), win, layer.sums, layer.bias, layer.x_zero)
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
            mask = sum(255 << 8 * r for r in range(4) if inside[r])
            lines[oy, g] = nearest[0], *(y - nearest[0] for y in nearest[1:]), mask
    lines[..., 4] = lines[..., 4].astype(np.uint32).view(np.int32)  # as signed numbers
    special = win.kernel[1] in (3, 5) and win.stride[1] <= 2 and win.dilation[1] == 1
    kw, step = (win.kernel[1], win.stride[1]) if special and not narrow else (1, 1)
    mr = min(_HEIGHTS, key=lambda h: -(-output[1] // h) * h) if special else _HEIGHTS[0]
    sizes = (height, width, channels, *output, win.stride[1], win.dilation[1], win.padding[1][0])
    tile = (mr, kw, step, count, narrow)
    return Placed(output, copy, scratch, tile, sizes, base, lines, cases)


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
    sums, added = checked_sums("pack_depthwise2d", taps, bias, x_zero)
    scale = multipliers("pack_depthwise2d", scaling, C * factor)
    groups, rows = _grouping(KH)
    bytes_ = np.zeros((groups * rows, KW, C * factor), np.int8)
    bytes_[:KH] = taps.reshape(KH, KW, C * factor)
    quads = np.zeros((groups, KW, C * factor, 4), np.int8)
    quads[..., :rows] = bytes_.reshape(groups, rows, KW, -1).transpose(0, 2, 3, 1)
    packed = widened(quads.view(np.int32)[..., 0], np.int32)
    sums = sums.reshape(KH, KW, C * factor)
    return Depthwise(win, C, factor, x_zero, packed, sums, added, scale, scaling)


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
    if at.copy is not None:
        wide = memory.empty((images, at.scratch), np.uint8)
        PAD.choose(wide.nbytes)(x.reshape(-1), wide.reshape(-1), layer.x_zero, at.copy, 0, images)
        x = wide
    share = parts(images, at.output[0])
    _, low, high, zero, _ = layer.scaling
    tile_kernel(*at.tile).choose(x.nbytes + y.nbytes)(
        x.reshape(-1),
        layer.packed,
        at.base,
        layer.multiplier,
        low,
        high,
        zero,
        y.reshape(-1),
        (*at.sizes, share),
        at.lines,
        at.cases,
        0,
        images * share,
    )
    return y
