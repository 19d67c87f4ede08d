"""Convolution of bytes, NHWC: y = result of x * w + bias; see `kernels.int8`.

    s[b, oy, ox, n] = bias[n] + sum over taps t inside of (x[b, iy, ix, c] - x_zero) w[t, c, n]
                    = base[v, n] + sum over taps t inside of x[b, iy, ix, c] w[t, c, n]
    base[v, n] = bias[n] - x_zero sum over t in v, and c, of w[t, c, n]

v is the set of taps inside the image, a rectangle of rows times columns of the window, of which
there are few: one where nothing is padded, nine around an image that is. So taps in the padding are
skipped, not computed, and the sum is exact; only where it begins depends on the place.

The loops are those of `kernels.conv`, in steps of four channels (`kernels.int8_product`). Where the
taps along x are neighbours and there are four, eight, ... channels they are one loop. Images with
fewer than four channels are copied first, the padding filled with x_zero; then the taps along x,
if neighbours, are one row of numbers, and their channels make whole quads together.

Where a level WIDENS_IMAGES, all are copied, as int16, and met by weights that were widened too
(`kernels.int8_product`): unless so few taps read a number that it costs more.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from kernels import int8, memory, simd, simd_int, simd_int16
from kernels._jit import Variants
from kernels._levels import WIDENS_IMAGES
from kernels.conv import _Axis, _table
from kernels.geometry import Window
from kernels.int8 import Scaling, checked_sums, fitted, operand, result, widened
from kernels.int8_product import Call, Linear, Panels, height, linear, pack, pack_linear

_BLOCK_BYTES = 384 * 1024  # of images that one panel of weights passes over
_TASKS = 16  # wanted at least
_MOST = 8  # rows of a tile of several vectors: above, LLVM keeps some of the sums in memory
SLACK = 4  # numbers after a copied image, which the last quad reads and multiplies by 0
COPY_ITEM = 2 if WIDENS_IMAGES else 1  # bytes of a number of a copied image, at most


# --- kernels --------------------------------------------------------------------------------------


def _tiles(mr: int, nr: int, widens: bool) -> Any:
    per = 2 if widens else 4
    dot: Any = simd_int16.dot2 if widens else simd_int.dot4
    dot_rows: Any = simd_int16.dot2_rows if widens else simd_int.dot4_rows

    def tiles(X, P, base, scale, low, high, zero, Y, sizes, R, T, cases, first_task, last_task):
        # Y[b, y, x + i, first + n] = result of base[cases[y] + cases[OH + x + i], first + n] +
        #     sum_{t, s, c} X[b, up + t dy, left + i sx + s dx, c] w[t, s, c, first + n]
        # for each (y, up, t_lo, t_hi) in R, t_lo <= t < t_hi, and each tile of mr pixels i in T:
        # see `conv._table`; 0 <= n < cols
        # X (B, H, V, C) uint8, P packed weights, Y (B, OH, OW, N) uint8 or float32, all flat
        # base (cases, N filled up), scale (N filled up,);  widens: X and P as int16
        # quads of one tap; whole: steps over it; tail: another quad covers the last four channels
        # tasks are blocks of images x groups of panels
        B, H, V, C, OH, OW, N = sizes[0]
        TY, TX, dy, sx, dx, quads, whole, tail = sizes[1]
        first, cols, origin, block, groups = sizes[2]
        L = simd.lanes(base)
        W = nr * L
        wide = base.shape[1]
        panels = (cols + W - 1) // W
        tap = quads * 4 * W  # numbers of packed weights
        steps = whole + tail * (4 // per)
        joined = dx == 1 and 4 * quads == C
        for task in prange(first_task, last_task):
            r, g = task // groups, task % groups
            for p in range(panels * g // groups, panels * (g + 1) // groups):
                n, part = first + p * W, min(W, cols - p * W)
                panel = origin + p * TY * TX * tap
                for b in range(r * block, min(B, (r + 1) * block)):
                    for u in range(len(R)):
                        y, up, t_lo, t_hi = R[u, 0], R[u, 1], R[u, 3], R[u, 4]
                        for m in range(len(T)):
                            x, left, done, hi = T[m, 0], T[m, 1], T[m, 2], T[m, 7]
                            s_lo, s_hi, f_lo, f_hi = T[m, 3], T[m, 4], T[m, 5], T[m, 6]
                            at = ((b * H + up) * V + left) * C
                            if f_lo == s_lo and f_hi == s_hi and hi == mr:
                                ib = (cases[y] + cases[OH + x]) * wide + n
                                acc = simd.add(
                                    simd.zeros(mr, nr, base), simd.load(1, nr, base, ib, 0)
                                )
                            else:
                                ib = cases[y] * wide + n
                                acc = simd_int.load_rows(mr, nr, base, ib, wide, cases, OH + x)
                            runs, length = f_hi - f_lo, whole
                            if joined:
                                runs, length = 1, (f_hi - f_lo) * whole
                            for t in range(t_lo, t_hi):
                                for run in range(f_lo, f_lo + runs):
                                    ix = at + (t * dy * V + run * dx) * C
                                    ip = panel + (t * TX + run) * tap
                                    for _ in range(length):
                                        simd.rolled()
                                        acc = dot(acc, X, ix, sx * C, P, ip)
                                        ix += per
                                        ip += per * W
                                    if tail:
                                        ix += C - 4 - per * whole
                                        acc = dot(acc, X, ix, sx * C, P, ip)
                                        if widens:
                                            acc = dot(acc, X, ix + 2, sx * C, P, ip + 2 * W)
                            for s in range(s_lo, s_hi):
                                if f_lo <= s < f_hi:
                                    continue
                                row_lo, row_hi = T[m, 8 + 2 * s], T[m, 9 + 2 * s]
                                for t in range(t_lo, t_hi):
                                    ix = at + (t * dy * V + s * dx) * C
                                    ip = panel + (t * TX + s) * tap
                                    for q in range(steps):
                                        simd.rolled()
                                        jx = ix + per * q
                                        if q >= whole:
                                            jx += C - 4 - per * whole
                                        acc = dot_rows(acc, X, jx, sx * C, P, ip, row_lo, row_hi)
                                        ip += per * W
                            by = simd.load(1, nr, scale, n, 0)
                            iy = ((b * OH + y) * OW + x) * N + n
                            if done == 0 and hi == mr and part == W:
                                simd_int.store_scaled(acc, by, low, high, zero, Y, iy, N)
                            else:
                                simd_int.store_scaled_part(
                                    acc, by, low, high, zero, Y, iy, N, done, hi, part
                                )

    return tiles


@cache
def tile_kernel(mr: int, nr: int, widens: bool = False) -> Variants:
    """X, P, base, scale, low, high, zero, Y, sizes, R, T, cases, first, last: see above."""
    return Variants(_tiles(mr, nr, widens))


def _pad(fill: Any, copy: Any) -> Any:
    def pad(X, S, zero, sizes, first_task, last_task):
        # S[b, y, x, c] = X[b, y - top, x - left, c] inside X, else zero
        # X (B, H, V, C) uint8, S (B, h, v, C) and slack, both flat;  a task is an image
        H, V, C, h, v, top, left = sizes
        for b in prange(first_task, last_task):
            lo, hi = max(0, left), min(v, V + left)
            for y in range(h):
                row = (b * h + y) * v * C
                if not 0 <= y - top < H or hi <= lo:
                    fill(zero, S, row, v * C)
                    continue
                fill(zero, S, row, lo * C)
                copy(X, ((b * H + y - top) * V + lo - left) * C, S, row + lo * C, (hi - lo) * C)
                fill(zero, S, row + hi * C, (v - hi) * C)

    return pad


#: X, S, zero, sizes = (H, V, C, h, v, top, left), first, last; S uint8.
PAD = Variants(_pad(int8.fill_bytes, int8.copy_bytes))
#: The same with S int16.
PAD_WIDENED = Variants(_pad(int8.fill_widened, int8.widen_bytes))


# --- packed layers --------------------------------------------------------------------------------


class Placed(NamedTuple):
    """A layer for images of one size: what its kernels need besides the arrays.

    `copy` are the sizes of `PAD`, if the image is to be copied first, `scratch` then the numbers
    of a copied image, and `widens` whether they are int16. `base` are the sums' beginnings by case.
    """

    output: tuple[int, int]
    copy: tuple[int, ...] | None
    widens: bool
    scratch: int
    base: np.ndarray
    rows: np.ndarray
    cases: np.ndarray
    taps: tuple[int, ...]
    image: tuple[int, int, int]

    @property
    def pad(self) -> Variants:
        """The kernel that makes the copy."""
        return PAD_WIDENED if self.widens else PAD

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the copy."""
        return np.dtype(np.int16 if self.widens else np.uint8)


@dataclass(frozen=True)
class Convolution:
    """A packed layer: what `pack_conv2d` gives. `sums` (T, N) of each tap, `bias` (N,), int64."""

    win: Window
    inputs: int
    outputs: int
    x_zero: int
    panels: Panels
    sums: np.ndarray
    bias: np.ndarray
    scaling: Scaling
    pointwise: Linear | None
    _placed: dict[tuple[int, int], Placed] = field(default_factory=dict, repr=False, compare=False)

    def placed(self, height: int, width: int) -> Placed:
        """The layer for images of this size."""
        found = self._placed.get((height, width))
        if found is None:
            found = self._placed[height, width] = _place(self, height, width)
        return found

    def calls(self, images: int, height: int, width: int) -> list[tuple[Call, np.ndarray]]:
        """The calls of `tile_kernel` that make up the layer, each with its table T."""
        return _calls(self, images, self.placed(height, width))


def _ranges(size: int, count: int, win: Window, axis: int) -> tuple[list[tuple[int, int]], Any]:
    """The ranges of taps that pixels of an axis have inside, and which of them each pixel has."""
    found: list[tuple[int, int]] = []
    which = []
    for o in range(count):
        start = o * win.stride[axis] - win.padding[axis][0]
        inside = [t for t in range(win.kernel[axis]) if 0 <= start + t * win.dilation[axis] < size]
        taps = (inside[0], inside[-1] + 1) if inside else (0, 0)
        if taps not in found:
            found.append(taps)
        which.append(found.index(taps))
    return found, which


def beginnings(
    size: tuple[int, int], win: Window, sums: np.ndarray, bias: np.ndarray, x_zero: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where sums begin: base (cases, N filled up) int32, and the case of each pixel.

    base[v, n] = bias[n] - x_zero times the sums (KH, KW, N) of the taps of case v. Pixel (y, x) of
    OH x OW has case cases[y] + cases[OH + x], int64; some more follow, for tiles that reach beyond.
    """
    output = win.output(*size)
    ys, y_of = _ranges(size[0], output[0], win, 0)
    xs, x_of = _ranges(size[1], output[1], win, 1)
    base = [bias - x_zero * sums[slice(*y), slice(*x)].sum((0, 1)) for y in ys for x in xs]
    cases = [y * len(xs) for y in y_of] + x_of + [0] * (simd.TILE[0] * simd.TILE[1])
    wrapped = np.array(base).astype(np.int32)  # what leaves int32 comes back in the sum
    return widened(wrapped, np.int32), np.array(cases, np.int64)


def copied(height: int, width: int, channels: int, win: Window) -> tuple[int, ...]:
    """The sizes of `PAD` for a copy of images of all that windows touch."""
    output = win.output(height, width)
    h, v = (
        (output[a] - 1) * win.stride[a] + (win.kernel[a] - 1) * win.dilation[a] + 1 for a in (0, 1)
    )
    return (height, width, channels, h, v, win.padding[0][0], win.padding[1][0])


def _place(layer: Convolution, height: int, width: int) -> Placed:
    win = layer.win
    size = (height, width)
    output = win.output(height, width)
    reads = math.prod(output) * math.prod(win.kernel)
    widens = WIDENS_IMAGES and reads >= height * width
    copy = None
    if layer.inputs < 4:  # all that windows touch, and no more
        copy = copied(height, width, layer.inputs, win)
        size, win = (copy[3], copy[4]), win._replace(padding=((0, 0), (0, 0)))
    elif widens:
        copy = (*size, layer.inputs, *size, 0, 0)
    sums = layer.sums.reshape(*win.kernel, -1)
    base, cases = beginnings(size, win, sums, layer.bias, layer.x_zero)
    taps = (win.kernel[1], win.dilation[0], win.stride[1], win.dilation[1])
    if layer.inputs < 4 and win.dilation[1] == 1:
        taps = (1, win.dilation[0], win.stride[1], 1)
    rows = _table(_axis(output, win, 0), size[0], 1)
    return Placed(
        output,
        copy,
        widens,
        math.prod(copy[2:5]) if copy else 0,
        base,
        rows,
        cases,
        (win.kernel[0], *taps),
        (*size, layer.inputs),
    )


def _axis(output: tuple[int, int], win: Window, axis: int, taps: int = 0) -> _Axis:
    return _Axis(
        output[axis],
        0,
        1,
        taps or win.kernel[axis],
        win.stride[axis],
        win.dilation[axis],
        win.padding[axis][0],
    )


def _calls(layer: Convolution, images: int, at: Placed) -> list[tuple[Call, np.ndarray]]:
    calls = []
    h, v, channels = at.image
    few = channels < 4
    win = layer.win._replace(padding=((0, 0), (0, 0))) if few else layer.win
    quads, tail = layer.panels.quads, int(not few and channels % 4 > 0)
    whole = quads - tail
    if at.widens:  # of the quads that few channels are filled up to, a half may do
        row = channels * win.kernel[1] if few and win.dilation[1] == 1 else channels
        whole = -(-row // 2) if few else 2 * whole
    image = h * v * channels * at.dtype.itemsize
    block = max(1, min(images, _BLOCK_BYTES // image, images // _TASKS))
    blocks = -(-images // block)
    for part in layer.panels.parts:
        most = simd.ROWS[part.nr] if part.nr == 1 else min(_MOST, simd.ROWS[part.nr] + 2)
        mr = height(max(at.output[1], 1), part.nr, most)
        # the joined taps of one row count as one, which is inside wherever its first is
        columns = _table(_axis(at.output, win, 1, at.taps[1]), v, mr)
        groups = max(1, min(part.panels, _TASKS // blocks))
        sizes: Any = (
            (images, h, v, channels, *at.output, layer.outputs),
            (*at.taps, quads, whole, tail),
            (part.first, part.cols, part.origin, block, groups),
        )
        calls.append((Call(mr, part.nr, sizes, blocks * groups, at.widens), columns))
    return calls


# --- public ---------------------------------------------------------------------------------------


def pack_conv2d(
    w: np.ndarray, bias: np.ndarray | None, x_zero: int, scaling: Scaling, win: Window
) -> Convolution:
    """A convolution by w (KH, KW, C, N) int8, bias (N,) int32 or None, for inputs of x_zero.

    Raises TypeError and ValueError for other arrays, OverflowError where sums could leave int32.
    """
    if w.ndim != 4 or w.shape[:2] != win.kernel or not w.size:
        raise ValueError(
            f"pack_conv2d: expected w ({win.kernel[0]}, {win.kernel[1]}, C, N), not empty, "
            f"got {w.shape}"
        )
    KH, KW, C, N = w.shape
    taps = w.reshape(KH * KW, C, N)
    sums, added, most = checked_sums("pack_conv2d", taps, bias, x_zero)
    how = fitted("pack_conv2d", scaling, most)
    how = how._replace(multiplier=widened(how.multiplier, np.float32))
    pointwise = None
    if win.kernel == win.stride == (1, 1) and win.padding == ((0, 0), (0, 0)):
        pointwise = pack_linear(w[0, 0], bias, x_zero, scaling)
        panels = pointwise.panels
    elif C < 4 and win.dilation[1] == 1:
        panels = pack(w.reshape(KH, KW * C, N), False)
    else:
        panels = pack(taps, C > 4)
    return Convolution(win, C, N, x_zero, panels, sums, added, how, pointwise)


def conv2d(x: np.ndarray, layer: Convolution, *, out: np.ndarray | None = None) -> np.ndarray:
    """x (B, H, W, C) uint8 -> (B, OH, OW, N), uint8 or float32 as the layer's scaling says.

    Raises ValueError for shapes that do not fit, TypeError for another dtype.
    """
    check_image("conv2d", x.shape, layer.inputs)
    if layer.pointwise is not None:
        return linear(x, layer.pointwise, out=out)
    x = operand("conv2d", x)
    at = layer.placed(*x.shape[1:3])
    y = result("conv2d", (len(x), *at.output, layer.outputs), layer.scaling.dtype, out)
    images = x.reshape(-1)
    if at.copy is not None:
        images = memory.empty(len(x) * at.scratch + SLACK, at.dtype)
        images[-SLACK:] = 0
        at.pad.choose(images.nbytes)(x.reshape(-1), images, layer.x_zero, at.copy, 0, len(x))
    macs = y.size * math.prod(layer.win.kernel) * layer.inputs
    for call, columns in layer.calls(len(x), *x.shape[1:3]):
        tile_kernel(call.mr, call.nr, call.wide).choose(macs // 4)(
            images,
            layer.panels.weights(call.wide),
            at.base,
            *layer.scaling[:4],
            y.reshape(-1),
            call.sizes,
            at.rows,
            columns,
            at.cases,
            0,
            call.tasks,
        )
    return y


def check_image(name: str, shape: Sequence[int], channels: int) -> None:
    """Raises ValueError unless it is the shape of images of so many channels, not empty."""
    if len(shape) != 4 or shape[3] != channels or min(shape) < 1:
        raise ValueError(f"{name}: expected x (B, H, W, {channels}), not empty, got {tuple(shape)}")
