"""Depthwise convolution: each channel of an image by itself, with both gradients.

Images are NHWC, so a vector holds neighbouring channels of one pixel, and nothing is ever summed
within a vector. A tile is `mr` neighbouring pixels of one row of the result. For each row of the
kernel it holds `kw` weights of its channels in registers, and loads each input vector once:

    acc[o] += w[ky, k] x[iy, ix + o s + k],   0 <= o < mr, 0 <= k < kw     (simd.slide)

A tile that hangs over the border skips the columns that do not exist; only columns that may not are
behind branches (free of `//`: a division costs as much as a dozen multiply-adds). Kernels whose
rows have 3 or 5 weights without gaps have code of their own; all others take one weight at a time
(kw = 1), where a tile's columns lie a stride apart.

The gradient by the input is the same computation with the kernel turned around. With a stride s,
pixels iy = r (mod s) get contributions from the kernel rows of one residue only: each of the
s x s phases is a convolution of stride 1 with a part of the kernel, whose results lie s apart.

The gradient by the weights keeps the sums of a whole kernel in registers (simd.slide_sums) over a
block of rows, one vector of channels after the other. Reading every fourth cache line, say, defeats
the processor's own prefetching: while one block is computed, the next is asked for in order.

R > 1 results a channel are computed as R copies of the channel.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from kernels import groups, memory, simd
from kernels._jit import Variants, prepared
from kernels.geometry import Pair, Window

_TASKS = 16  # wanted at least; also the most chunks of a sum
_TILES = (8, 7, 6, 4, 2)  # rows of a tile to choose from
_REGISTERS = 32 if simd.TILE[1] > 2 else 16
_ROOM = 6  # registers wanted beside the sums of a kernel
_BLOCK_BYTES = 256 * 1024  # of rows that are read several times: they stay in the second cache
_AHEAD_BYTES = 1 << 20  # of images: what is smaller stays in the second-level cache
_STREAM_BYTES = 8 << 20  # results from here on leave no room in the caches for what they displace


# --- kernels --------------------------------------------------------------------------------------


def _correlate(mr: int, kw: int, step: int, narrow: bool) -> Any:
    edge = kw - 1

    def correlate(X, W, bias, low, Y, phases, parts, streaming):
        # Y[b, qy + oy py, qx + ox px, c] =
        #     max(bias[c] + sum_{ky, kx} X[b, iy, ix, c] W[first + ky wy + kx wx, c], low)
        # iy = oy sy - top + ky dy, ix = ox sx - left + kx dx, where they lie inside X
        # X (B, H, N, C), Y (B, OH, ON, C), W (taps, C), bias (C,)
        # narrow: C < L, W and bias filled up to L
        # phases[f] = ((first, sy, sx, dy, dx), then for y and x: (q, p, count, K, top), (wy, wx))
        B, H, N, C = X.shape
        OH, ON = Y.shape[1:3]
        L = simd.lanes(X)
        width = W.shape[1]
        distant = X.nbytes >= _AHEAD_BYTES
        for task in prange(B * parts):
            b, part = task // parts, task % parts
            for f in range(phases.shape[0]):
                first, sy, sx, dy, dx = phases[f, :5]
                qy, py, rows, KH, top = phases[f, 5:10]
                qx, px, columns, KW, left = phases[f, 10:15]
                wy, wx = phases[f, 15:]
                right, unit = (C, 1) if kw > 1 else (sx * C, sx)
                ld, one = (0, right), (0, 1, 1)
                for oy in range(rows * part // parts, rows * (part + 1) // parts):
                    y0 = oy * sy - top
                    if dy == 1:
                        ky_lo, ky_hi = max(0, -y0), min(KH, H - y0)
                    else:
                        ky_lo, ky_hi = max(0, -(y0 // dy)), min(KH, -((y0 - H) // dy))
                    ahead = (b * H + y0 + (KH - 1) * dy + 1) * N * C  # what the next oy needs
                    for ox0 in range(0, columns, mr):
                        ox = min(ox0, columns - mr) if kw > 1 else ox0  # the last moves back
                        for c0 in range(0, C, L):
                            c = max(0, min(c0, C - L))  # the last moves back
                            for n in range(sy * sx if distant else 0):  # this tile's share
                                i = ahead + ((ox0 * C + c0 * mr) * sx * sy + n * mr * L)
                                simd.prefetch(mr, X, i, L)
                            acc = simd.load(mr, 1, bias, c, 0)
                            for ky in range(ky_lo, ky_hi):
                                row = (b * H + y0 + ky * dy) * N
                                for kx in range(0, KW, kw):
                                    simd.rolled_32()
                                    iw = (first + ky * wy + kx * wx) * width + c
                                    w = simd.load(kw, 1, W, iw, wx * width)
                                    x0 = ox * sx - left + kx * dx
                                    ix = (row + x0) * C + c
                                    last = x0 + ((mr - 1) * step + kw - 1) * unit
                                    across = x0, unit, N
                                    if narrow:
                                        acc = simd.slide(
                                            acc, w, 1, kw, step, 99, X, ix, ld, one, across, C
                                        )
                                    elif kw > 1 or (x0 >= 0 and last < N):
                                        acc = simd.slide(
                                            acc, w, 1, kw, step, edge, X, ix, ld, one, across, 0
                                        )
                                    else:
                                        acc = simd.slide(
                                            acc, w, 1, kw, step, 99, X, ix, ld, one, across, 0
                                        )
                            acc = simd.maximum(acc, simd.fill(1, 1, Y, low))
                            iy = ((b * OH + qy + oy * py) * ON + qx + ox * px) * C + c
                            if narrow or ox + mr > columns:
                                simd.store_part(acc, Y, iy, px * C, 0, columns - ox, C - c)
                            elif streaming:
                                simd.stream(acc, Y, iy, px * C)
                            else:
                                simd.store(acc, Y, iy, px * C)
            if streaming:
                simd.fence()

    return correlate


def _sums(mr: int, kh: int, kw: int, step: int, copies: int, narrow: bool) -> Any:
    height = copies * kh * kw
    edge = kw - 1 if kw > 1 else mr  # columns that may lie outside the image

    def sums(G, X, P, GW, geometry, parts):
        # GW[ky, kx, c] = sum_{b, oy, ox} X[b, iy, ix, c] G[b, oy, ox, c]
        # iy = oy sy - top + ky dy, ix = ox sx - left + kx dx, where they lie inside X
        # X (B, H, N, C), G (B, OH, ON, C), GW (KH, KW, C)
        # P[chunk, v, p, q, (r kh + k) kw + t, l] = part of that for ky = p kh + k, kx = q kw + t
        # and channel c of vector v, lane l; r < copies. P starts at zero
        B, H, N, C = X.shape
        OH, ON = G.shape[1:3]
        KH, KW = GW.shape[:2]
        chunks, vectors = P.shape[:2]
        L = simd.lanes(X)
        sy, sx, dy, dx, top, left = geometry
        right, unit = (C, 1) if kw > 1 else (sx * C, sx)
        ld = dy * N * C, right
        tiles = 0 if narrow else ON // mr
        for chunk in prange(chunks):
            for block in range(B * parts * chunk // chunks, B * parts * (chunk + 1) // chunks):
                b, part = block // parts, block % parts
                first, end = OH * part // parts, OH * (part + 1) // parts
                next_g, next_x = (b * OH + end) * ON * C, (b * H + end * sy) * N * C
                for v in range(vectors):
                    c = max(0, min(v * L, C - L))  # the last moves back
                    ip = (chunk * vectors + v) * copies * KH * KW * L
                    for ky in range(0, KH, kh):
                        for kx in range(0, KW, kw):
                            acc = simd.load(height, 1, P, ip, L)
                            for oy in range(first, end):
                                y0 = oy * sy + ky * dy - top
                                down = y0, dy, H
                                iy = (b * H + y0) * N * C + c
                                ig = (b * OH + oy) * ON * C + c
                                for t in range(tiles):
                                    simd.rolled()
                                    if ky == 0 and kx == 0:  # this tile's share of the next block
                                        i = ((v * (end - first) + oy - first) * tiles + t) * mr * L
                                        simd.prefetch(mr, G, next_g + i, L)
                                        for n in range(sy * sx):
                                            ix = next_x + (i * sy * sx + n * mr * L)
                                            simd.prefetch(mr, X, ix, L)
                                    x0 = t * mr * sx + kx * dx - left
                                    across = x0, unit, N
                                    g = simd.load(mr, 1, G, ig + t * mr * C, C)
                                    ix = iy + x0 * C
                                    acc = simd.slide_sums(
                                        acc, g, kh, kw, step, edge, X, ix, ld, down, across, 0
                                    )
                                for ox in range(tiles * mr, ON):
                                    simd.rolled()
                                    x0 = ox * sx + kx * dx - left
                                    across = x0, unit, N
                                    ix = iy + x0 * C
                                    if narrow:
                                        g = simd.load_part(1, 1, G, ig + ox * C, C, 0, 1, C)
                                        acc = simd.slide_sums(
                                            acc, g, kh, kw, step, 99, X, ix, ld, down, across, C
                                        )
                                    else:
                                        g = simd.load(1, 1, G, ig + ox * C, C)
                                        acc = simd.slide_sums(
                                            acc, g, kh, kw, step, 99, X, ix, ld, down, across, 0
                                        )
                            simd.store(acc, P, ip, L)
                            ip += height * L
        for v in range(vectors):
            c = max(0, min(v * L, C - L))
            for ky in range(KH):
                for kx in range(KW):
                    acc = simd.zeros(1, 1, P)
                    group = (ky // kh * (KW // kw) + kx // kw) * height + ky % kh * kw + kx % kw
                    for chunk in range(chunks):
                        for r in range(copies):
                            ip = (chunk * vectors + v) * copies * KH * KW + group + r * kh * kw
                            acc = simd.add(acc, simd.load(1, 1, P, ip * L, L))
                    simd.store_part(acc, GW, (ky * KW + kx) * C + c, C, 0, 1, C - c)

    return sums


@cache
def _correlate_kernel(mr: int, kw: int, step: int, narrow: bool) -> Variants:
    return Variants(_correlate(mr, kw, step, narrow))


@cache
def _sums_kernel(mr: int, kh: int, kw: int, step: int, copies: int, narrow: bool) -> Variants:
    return Variants(_sums(mr, kh, kw, step, copies, narrow))


# --- plans ----------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """One residue of one axis: results q, q + p, ... (so many) from taps x[o s - before + k d]."""

    q: int
    p: int
    results: int
    taps: tuple[int, int, int]  # of the weights: the first, from one to the next, how many
    before: int
    d: int


class _Plan(NamedTuple):
    table: np.ndarray  # of phases
    tile: int
    kw: int
    step: int
    windows: Pair  # of the convolution, along rows and columns


def _plan(
    axes: list[tuple[_Axis, _Axis]],
    stride: tuple[int, int],
    width: int,
    special: Pair,
    windows: Pair,
) -> _Plan:
    """The phases of a kernel with rows of `width`; `special` code for one that is alone."""
    table: list[tuple[int, ...]] = []
    for y, x in axes:
        (ky, wy, rows), (kx, wx, columns) = y.taps, x.taps
        sizes = (y.q, y.p, y.results, rows, y.before, x.q, x.p, x.results, columns, x.before)
        table.append((ky * width + kx, *stride, y.d, x.d, *sizes, wy * width, wx))
    columns = max(x.results for _, x in axes)
    kw, step = special if len(axes) == 1 else (1, 1)
    fitting = [n for n in _TILES if n <= columns] if kw > 1 else _TILES[:1]
    tile = min(fitting or [1], key=lambda n: -(-columns // n) * (n + 1))
    return _Plan(np.array(table), tile, kw, step, windows)


def _special(win: Window, pays: bool) -> Pair:
    """(kw, step) of the code for rows of a kernel: of their own if it pays, else (1, 1).

    Their tiles hang over the border by less than a kernel.
    """
    kernel, stride = win.kernel[1], win.stride[1]
    simple = kernel in (3, 5) and stride <= 2 and win.dilation[1] == 1
    return (kernel, stride) if pays and simple and max(win.padding[1]) < kernel else (1, 1)


@lru_cache(1024)
def _forward_plan(height: int, width: int, win: Window, special: bool) -> _Plan:
    rows, columns = win.output(height, width)
    y, x = (
        _Axis(0, 1, n, (0, 1, k), before, d)
        for n, k, (before, _), d in zip(
            (rows, columns), win.kernel, win.padding, win.dilation, strict=True
        )
    )
    return _plan([(y, x)], win.stride, win.kernel[1], _special(win, special), (rows, columns))


@lru_cache(1024)
def _backward_plan(height: int, width: int, win: Window, special: bool) -> _Plan:
    by_axis = []
    for n, k, s, (before, _), d in zip(
        (height, width), win.kernel, win.stride, win.padding, win.dilation, strict=True
    ):
        phases = []
        for r in range(min(s, n)):
            # o s = i + before - k d for i = r, r + s, ...: the weights whose o is whole
            taps = [t for t in range(k) if (r + before - t * d) % s == 0]
            last = taps[-1] if taps else 0
            origin = (r + before - last * d) // s if taps else 0
            common = math.gcd(s, d)
            turned = (last, -(s // common), len(taps))
            phases.append(_Axis(r, s, -(-(n - r) // s), turned, -origin, d // common))
        by_axis.append(phases)
    pairs = [(y, x) for y in by_axis[0] for x in by_axis[1]]
    special = special and win.stride == (1, 1)
    windows = win.output(height, width)
    return _plan(pairs, (1, 1), win.kernel[1], _special(win, special), windows)


def _run(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    low: Any,
    shape: tuple[int, ...],
    plan: _Plan,
) -> np.ndarray:
    """x (B, H, W, C), w (KH, KW, C), bias (C,) -> (B, OH, OW, C)."""
    channels, flat = x.shape[3], w.reshape(-1, x.shape[3])
    lanes = simd.LANES * 4 // x.itemsize
    narrow = channels < lanes
    if bias is None:
        bias = _zeros(channels, x.dtype)
    if narrow:
        flat, bias = (_widened(a, lanes) for a in (flat, bias))
    y = memory.empty(shape, x.dtype)
    parts = min(shape[1], max(1, _TASKS // shape[0]))
    kernel = _correlate_kernel(plan.tile, plan.kw, plan.step, narrow)
    streaming = y.nbytes >= _STREAM_BYTES
    kernel.choose(x.nbytes + y.nbytes)(x, flat, bias, low, y, plan.table, parts, streaming)
    return y


@lru_cache(64)
def _zeros(count: int, dtype: Any) -> np.ndarray:
    return np.zeros(count, dtype)


@lru_cache(4)
def _low(relu: bool, dtype: Any) -> Any:
    return dtype.type(0 if relu else -np.inf)


def _widened(a: np.ndarray, lanes: int) -> np.ndarray:
    """The last axis filled up to whole vectors."""
    wide = np.zeros((*a.shape[:-1], lanes), a.dtype)
    wide[..., : a.shape[-1]] = a
    return wide


# --- public ---------------------------------------------------------------------------------------


def depthwise2d(
    x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, win: Window, relu: bool = False
) -> np.ndarray:
    """y[b, oy, ox, c R + r] = bias[c R + r] + sum_{ky, kx} x[b, iy, ix, c] w[ky, kx, c, r].

    x (B, H, W, C), w (KH, KW, C, R), bias (C R,) or None -> (B, OH, OW, C R); of it max(y, 0) if
    `relu` (NaN stays NaN). iy = oy s - top + ky d; taps outside the image are skipped.
    Raises ValueError where shapes do not fit, TypeError where dtypes differ.
    """
    name = "depthwise2d"
    _check_weights(name, x.shape, w, win)
    if bias is None:
        x, w = prepared(name, x, w)
    else:
        results = w.shape[2] * w.shape[3]
        if bias.shape != (results,):
            raise ValueError(f"{name}: w {w.shape}: expected bias ({results},), got {bias.shape}")
        x, w, bias = prepared(name, x, w, bias)
    results = w.shape[2] * w.shape[3]
    plan = _forward_plan(x.shape[1], x.shape[2], win, _hot(x.dtype, results))
    x = groups.repeated(x, w.shape[3])
    return _run(x, w, bias, _low(relu, x.dtype), (len(x), *plan.windows, results), plan)


def depthwise2d_input_grad(
    grad: np.ndarray, w: np.ndarray, shape: Sequence[int], win: Window
) -> np.ndarray:
    """Gradient of `depthwise2d` by x of `shape` (B, H, W, C); grad (B, OH, OW, C R).

    gx[b, iy, ix, c] = sum over its taps, and r, of grad[b, oy, ox, c R + r] w[ky, kx, c, r].
    """
    name = "depthwise2d_input_grad"
    _check_weights(name, shape, w, win)
    channels, factor = w.shape[2:]
    results = channels * factor
    plan = _backward_plan(shape[1], shape[2], win, _hot(grad.dtype, results))
    _check_grad(name, grad, (shape[0], *plan.windows, results))
    grad, w = prepared(name, grad, w)
    gx = _run(grad, w, None, _low(False, grad.dtype), (*shape[:3], results), plan)
    return gx if factor == 1 else groups.summed(gx, factor)


def depthwise2d_weight_grad(grad: np.ndarray, x: np.ndarray, win: Window) -> np.ndarray:
    """Gradient of `depthwise2d` by w (KH, KW, C, R); grad (B, OH, OW, C R), x (B, H, W, C).

    gw[ky, kx, c, r] = sum_{b, oy, ox} x[b, iy, ix, c] grad[b, oy, ox, c R + r].
    """
    name = "depthwise2d_weight_grad"
    if x.ndim != 4 or grad.ndim != 4 or not (x.size and grad.size) or grad.shape[3] % x.shape[3]:
        raise ValueError(
            f"{name}: expected x (B, H, W, C), not empty, and grad (B, OH, OW, C R), "
            f"got {x.shape} and {grad.shape}"
        )
    channels = x.shape[3]
    factor = grad.shape[3] // channels
    results = channels * factor
    plan = _sums_plan(x.shape, win, results, x.itemsize)
    _check_grad(name, grad, plan.grad)
    grad, x = prepared(name, grad, x)
    x = groups.repeated(x, factor)
    gw, sums = np.empty((*win.kernel, results), x.dtype), np.zeros(plan.sums, x.dtype)
    kernel = plan.kernel.choose(x.nbytes + grad.nbytes)
    kernel(grad, x, sums, gw, plan.geometry, plan.parts)
    return gw.reshape(*win.kernel, channels, factor)


class _SumsPlan(NamedTuple):
    kernel: Variants
    grad: tuple[int, ...]  # its shape
    sums: tuple[int, ...]  # the shape of P
    geometry: tuple[int, ...]
    parts: int


@lru_cache(1024)
def _sums_plan(shape: tuple[int, ...], win: Window, results: int, itemsize: int) -> _SumsPlan:
    """How the gradient by the weights is computed for images of `shape`, before repetition."""
    B, H, W, _ = shape
    (OH, OW), (KH, KW), L = win.output(H, W), win.kernel, simd.LANES * 4 // itemsize
    kh, (kw, step), copies = 1, _special(win, itemsize == 4 and results >= simd.LANES), 4
    if kw > 1:
        whole = KH * kw + _ROOM <= _REGISTERS
        kh, copies = (KH, -(-4 // (KH * kw))) if whole else (1, 2)
    fitting = [n for n in _TILES if copies * kh * kw + n <= _REGISTERS - 3] or _TILES[-1:]
    mr = min(fitting, key=lambda n: OW // n * (n + 1) + OW % n * 3)
    line = (W * win.stride[0] + OW) * results * itemsize
    parts = -(-OH // max(1, _BLOCK_BYTES // line))
    chunks = min(_TASKS, B * parts)
    return _SumsPlan(
        _sums_kernel(mr, kh, kw, step, copies, results < L),
        (B, OH, OW, results),
        (chunks, -(-results // L), copies * KH * KW, L),
        (*win.stride, *win.dilation, win.padding[0][0], win.padding[1][0]),
        parts,
    )


def _hot(dtype: Any, channels: int) -> bool:
    """Whether code for special kernels pays: float64 is for checks, short vectors waste anyway."""
    return dtype == np.float32 and channels >= simd.LANES


def _check_weights(name: str, shape: Sequence[int], w: np.ndarray, win: Window) -> None:
    if len(shape) != 4 or w.ndim != 4 or w.shape[:3] != (*win.kernel, shape[3]) or not w.size:
        raise ValueError(
            f"{name}: expected x (B, H, W, C) and w (KH, KW, C, R) of {win}, not empty, "
            f"got {tuple(shape)} and {w.shape}"
        )


def _check_grad(name: str, grad: np.ndarray, expected: tuple[int, ...]) -> None:
    if grad.shape != expected or min(expected) < 1:
        raise ValueError(f"{name}: expected grad {expected}, not empty, got {grad.shape}")
