"""Depthwise convolution: each channel of an image by itself, with both gradients.

Images are NHWC, so a vector holds neighbouring channels of one pixel, and nothing is ever summed
within a vector. A tile is `mr` neighbouring pixels of one row of the result. For each row of the
kernel it holds `kw` weights of its channels in registers, and loads each input vector once:

    acc[o] += w[ky, k] x[iy, ix + o s + k],   0 <= o < mr, 0 <= k < kw     (simd.slide)

A tile that hangs over the border skips the columns that do not exist. Kernels whose rows have 3 or
5 weights without gaps have code of their own; all others take one weight at a time (kw = 1), where
a tile's columns lie a stride apart.

The gradient by the input is the same computation with the kernel turned around. With a stride s,
pixels iy = r (mod s) get contributions from the kernel rows of one residue only: each of the
s x s phases is a convolution of stride 1 with a part of the kernel, whose results lie s apart.

The gradient by the weights keeps the sums of one kernel row in registers (simd.slide_sums) over a
block of rows that stays in the first-level cache.

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

from kernels import memory, simd
from kernels._jit import Variants, prepared
from kernels.geometry import Window

_TASKS = 16  # wanted at least; also the most chunks of a sum
_TILES = (8, 6, 4)  # rows of a tile to choose from: for few registers, and little left over
_BLOCK_BYTES = 24 * 1024  # of rows that are read several times: they stay in the nearest cache
_STREAM_BYTES = 8 << 20  # results from here on leave no room in the caches for what they displace


# --- kernels --------------------------------------------------------------------------------------


def _correlate(mr: int, kw: int, step: int, narrow: bool) -> Any:
    def correlate(X, W, bias, low, Y, phases, parts, streaming):
        # Y[b, qy + oy py, qx + ox px, c] =
        #     max(bias[c] + sum_{ky, kx} X[b, iy, ix, c] W[first + ky KW + kx, c], low)
        # iy = oy sy - top + ky dy, ix = ox sx - left + kx dx, where they lie inside X
        # X (B, H, N, C), Y (B, OH, ON, C), W (taps, C), bias (C,)
        # narrow: C < L, W and bias filled up to L
        # phases[f] = ((first, sy, sx, dy, dx), then for y and x: (q, p, count, K, top), ...)
        B, H, N, C = X.shape
        OH, ON = Y.shape[1:3]
        L = simd.lanes(X)
        width = W.shape[1]
        for task in prange(B * parts):
            b, part = task // parts, task % parts
            for f in range(phases.shape[0]):
                first, sy, sx, dy, dx = phases[f, :5]
                qy, py, rows, KH, top = phases[f, 5:10]
                qx, px, columns, KW, left = phases[f, 10:15]
                ld, unit = (C, 1) if kw > 1 else (sx * C, sx)
                for oy in range(rows * part // parts, rows * (part + 1) // parts):
                    y0 = oy * sy - top
                    ky_lo, ky_hi = max(0, -(y0 // dy)), min(KH, -((y0 - H) // dy))
                    ahead = (b * H + y0 + (KH - 1) * dy + 1) * N  # rows that the next oy needs
                    for ox in range(0, columns, mr):
                        for c0 in range(0, C, L):
                            c = max(0, min(c0, C - L))  # the last moves back
                            for r in range(sy):
                                for s in range(sx):
                                    ix = (ahead + r * N + ox * sx + s) * C + c
                                    simd.prefetch(mr, X, ix, sx * C)
                            acc = simd.load(mr, 1, bias, c, 0)
                            for ky in range(ky_lo, ky_hi):
                                row = (b * H + y0 + ky * dy) * N
                                for kx in range(0, KW, kw):
                                    simd.rolled()
                                    iw = (first + ky * KW + kx) * width + c
                                    w = simd.load(kw, 1, W, iw, width)
                                    x0 = ox * sx - left + kx * dx
                                    ix = (row + x0) * C + c
                                    last = x0 + ((mr - 1) * step + kw - 1) * unit
                                    if x0 >= 0 and last < N and not narrow:
                                        acc = simd.slide(acc, w, step, X, ix, ld, 0, 99, 0)
                                    else:
                                        lo, hi = -(x0 // unit), -((x0 - N) // unit)
                                        if narrow:
                                            acc = simd.slide(acc, w, step, X, ix, ld, lo, hi, C)
                                        else:
                                            acc = simd.slide(acc, w, step, X, ix, ld, lo, hi, 0)
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


def _sums(mr: int, kw: int, step: int, copies: int) -> Any:
    height = copies * kw

    def sums(G, X, P, geometry, parts):
        # P[chunk, v, ky, g, :, l] = parts of sum_{b, oy, ox} X[b, iy, ix, c] G[b, oy, ox, c]
        # iy = oy sy - top + ky dy, ix = ox sx - left + (g kw + k) dx, inside X
        # c is channel of vector v, lane l
        # X (B, H, N, C), G (B, OH, ON, C), P (chunks, vectors, KH, KW / kw, copies kw, L), zero
        B, H, N, C = X.shape
        OH, ON = G.shape[1:3]
        chunks, vectors, KH, groups = P.shape[:4]
        L = simd.lanes(X)
        sy, sx, dy, dx, top, left = geometry
        ld, unit = (C, 1) if kw > 1 else (sx * C, sx)
        tiles = 0 if C < L else ON // mr
        for chunk in prange(chunks):
            for block in range(B * parts * chunk // chunks, B * parts * (chunk + 1) // chunks):
                b, part = block // parts, block % parts
                first, end = OH * part // parts, OH * (part + 1) // parts
                ahead = end - first
                for v in range(vectors):
                    c = max(0, min(v * L, C - L))  # the last moves back
                    for ky in range(KH):
                        above = ky * dy - top
                        oy_lo, oy_hi = max(first, -(above // sy)), min(end, -((above - H) // sy))
                        for g in range(groups):
                            ip = (((chunk * vectors + v) * KH + ky) * groups + g) * height * L
                            acc = simd.load(height, 1, P, ip, L)
                            x_lo = g * kw * dx - left  # of ox = 0
                            reach = ((mr - 1) * step + kw - 1) * unit
                            t_lo = min(tiles, max(0, -(x_lo // (mr * sx))))
                            t_hi = min(tiles, (N - 1 - reach - x_lo) // (mr * sx) + 1)
                            inner = max(0, t_hi - t_lo)
                            for oy in range(oy_lo, oy_hi):
                                ix = ((b * H + oy * sy + above) * N + x_lo) * C + c
                                ig = (b * OH + oy) * ON * C + c
                                if ky == KH // 2 and g == 0:  # what the next block needs
                                    for ox in range(0, ON, mr):
                                        i = ig + (ahead * ON + ox) * C
                                        simd.prefetch(mr, G, i, C)
                                        for r in range(sy):
                                            for s in range(sx):
                                                i = ((ahead * sy + r) * N + ox * sx + s) * C
                                                simd.prefetch(mr, X, ix + i, sx * C)
                                for t in range(t_lo, t_lo + inner):
                                    simd.rolled()
                                    pixels = simd.load(mr, 1, G, ig + t * mr * C, C)
                                    i = ix + t * mr * sx * C
                                    acc = simd.slide_sums(acc, pixels, step, kw, X, i, ld, 0, 99, 0)
                                for e in range(tiles - inner):
                                    t = e if e < t_lo else e + inner
                                    x0 = x_lo + t * mr * sx
                                    lo, hi = -(x0 // unit), -((x0 - N) // unit)
                                    pixels = simd.load(mr, 1, G, ig + t * mr * C, C)
                                    i = ix + t * mr * sx * C
                                    acc = simd.slide_sums(
                                        acc, pixels, step, kw, X, i, ld, lo, hi, 0
                                    )
                                for ox in range(tiles * mr, ON):
                                    x0 = x_lo + ox * sx
                                    lo, hi = -(x0 // unit), -((x0 - N) // unit)
                                    pixels = simd.load_part(1, 1, G, ig + ox * C, C, 0, 1, C - c)
                                    acc = simd.slide_sums(
                                        acc,
                                        pixels,
                                        step,
                                        kw,
                                        X,
                                        ix + ox * sx * C,
                                        ld,
                                        lo,
                                        hi,
                                        C - c,
                                    )
                            simd.store(acc, P, ip, L)

    return sums


@cache
def _correlate_kernel(mr: int, kw: int, step: int, narrow: bool) -> Variants:
    return Variants(_correlate(mr, kw, step, narrow))


@cache
def _sums_kernel(mr: int, kw: int, step: int) -> Variants:
    return Variants(_sums(mr, kw, step, _copies(kw)))


def _copies(kw: int) -> int:
    """Sums for each weight, so that at least four additions are on their way at once."""
    return -(-4 // kw)


# --- plans ----------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """One residue of one axis: results q, q + p, ... (so many) from taps x[o s - before + k d]."""

    q: int
    p: int
    results: int
    taps: tuple[int, ...]  # which weights, in order of k
    before: int
    d: int


class _Plan(NamedTuple):
    table: np.ndarray  # of phases
    tile: int
    kw: int
    step: int
    order: np.ndarray | None  # of the weights by phase, where it is not theirs


def _plan(
    axes: list[tuple[_Axis, _Axis]], stride: tuple[int, int], width: int, special: bool
) -> _Plan:
    """The phases of a kernel with rows of `width`; whether they may have code of their own."""
    table: list[tuple[int, ...]] = []
    order: list[int] = []
    for y, x in axes:
        sizes = [(a.q, a.p, a.results, len(a.taps), a.before) for a in (y, x)]
        table.append((len(order), *stride, y.d, x.d, *sizes[0], *sizes[1]))
        order += [ky * width + kx for ky in y.taps for kx in x.taps]
    columns = max(x.results for _, x in axes)
    tile = min(_TILES, key=lambda mr: -(-columns // mr) * mr)
    kw, step = 1, 1
    if special and len(axes) == 1:
        kw, step = _special(len(axes[0][1].taps), stride[1], axes[0][1].d)
    if not special:
        tile = _TILES[0]
    moved = order != list(range(len(order)))
    return _Plan(np.array(table), tile, kw, step, np.array(order) if moved else None)


def _special(kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """(kw, step) of the code for rows of a kernel."""
    return (kernel, stride) if kernel in (3, 5) and stride <= 2 and dilation == 1 else (1, 1)


@lru_cache(1024)
def _forward_plan(height: int, width: int, win: Window, special: bool) -> _Plan:
    rows, columns = win.output(height, width)
    y, x = (
        _Axis(0, 1, n, tuple(range(k)), before, d)
        for n, k, (before, _), d in zip(
            (rows, columns), win.kernel, win.padding, win.dilation, strict=True
        )
    )
    return _plan([(y, x)], win.stride, win.kernel[1], special)


@lru_cache(1024)
def _backward_plan(height: int, width: int, win: Window, special: bool) -> _Plan:
    by_axis = []
    for n, k, s, (before, _), d in zip(
        (height, width), win.kernel, win.stride, win.padding, win.dilation, strict=True
    ):
        phases = []
        for r in range(min(s, n)):
            # o s = i + before - k d for i = r, r + s, ...: the weights whose o is whole
            taps = tuple(t for t in range(k) if (r + before - t * d) % s == 0)[::-1]
            origin = (r + before - taps[0] * d) // s if taps else 0
            phases.append(_Axis(r, s, -(-(n - r) // s), taps, -origin, d // math.gcd(s, d)))
        by_axis.append(phases)
    return _plan([(y, x) for y in by_axis[0] for x in by_axis[1]], (1, 1), win.kernel[1], special)


def _run(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    low: float,
    shape: tuple[int, ...],
    plan: _Plan,
) -> np.ndarray:
    """x (B, H, W, C), w (KH, KW, C), bias (C,) -> (B, OH, OW, C)."""
    channels, taps = x.shape[3], len(w) * w.shape[1]
    flat = w.reshape(taps, channels)
    if plan.order is not None:
        flat = flat[plan.order]
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
    kernel.choose(x.nbytes + y.nbytes)(
        x, flat, bias, x.dtype.type(low), y, plan.table, parts, streaming
    )
    return y


@lru_cache(64)
def _zeros(count: int, dtype: Any) -> np.ndarray:
    return np.zeros(count, dtype)


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
    x = _repeated(x, w.shape[3])
    shape = (len(x), *win.output(x.shape[1], x.shape[2]), results)
    return _run(x, w.reshape(*win.kernel, results), bias, 0 if relu else -np.inf, shape, plan)


def depthwise2d_input_grad(
    grad: np.ndarray, w: np.ndarray, shape: Sequence[int], win: Window
) -> np.ndarray:
    """Gradient of `depthwise2d` by x of `shape` (B, H, W, C); grad (B, OH, OW, C R).

    gx[b, iy, ix, c] = sum over its taps, and r, of grad[b, oy, ox, c R + r] w[ky, kx, c, r].
    """
    name = "depthwise2d_input_grad"
    _check_weights(name, shape, w, win)
    channels, factor = w.shape[2:]
    _check_grad(name, grad, shape, factor, win)
    grad, w = prepared(name, grad, w)
    results = channels * factor
    plan = _backward_plan(shape[1], shape[2], win, _hot(grad.dtype, results))
    gx = _run(grad, w.reshape(*win.kernel, results), None, -np.inf, (*shape[:3], results), plan)
    return gx if factor == 1 else gx.reshape(*shape, factor).sum(axis=-1)


def depthwise2d_weight_grad(grad: np.ndarray, x: np.ndarray, win: Window) -> np.ndarray:
    """Gradient of `depthwise2d` by w (KH, KW, C, R); grad (B, OH, OW, C R), x (B, H, W, C).

    gw[ky, kx, c, r] = sum_{b, oy, ox} x[b, iy, ix, c] grad[b, oy, ox, c R + r].
    """
    name = "depthwise2d_weight_grad"
    if x.ndim != 4 or grad.ndim != 4 or not x.size or grad.shape[3] % x.shape[3]:
        raise ValueError(
            f"{name}: expected x (B, H, W, C), not empty, and grad (B, OH, OW, C R), "
            f"got {x.shape} and {grad.shape}"
        )
    channels = x.shape[3]
    factor = grad.shape[3] // channels
    _check_grad(name, grad, x.shape, factor, win)
    grad, x = prepared(name, grad, x)
    x = _repeated(x, factor)
    B, OH, OW, results = grad.shape
    L = simd.LANES * 4 // x.itemsize
    kw, step, tile = 1, 1, _TILES[0]
    if _hot(x.dtype, results):
        kw, step = _special(win.kernel[1], win.stride[1], win.dilation[1])
        tile = min(_TILES, key=lambda mr: OW // mr * mr + 3 * (OW % mr))
    line, extra = x.strides[1], win.kernel[0] - win.stride[0]
    rows = (_BLOCK_BYTES - extra * line) // (grad.strides[1] + win.stride[0] * line)
    rows = max(1, rows)
    parts = -(-OH // rows)
    chunks = min(_TASKS, B * parts)
    vectors, groups, height = -(-results // L), win.kernel[1] // kw, _copies(kw) * kw
    sums = np.zeros((chunks, vectors, win.kernel[0], groups, height, L), x.dtype)
    geometry = (*win.stride, *win.dilation, win.padding[0][0], win.padding[1][0])
    kernel = _sums_kernel(tile, kw, step)
    kernel.choose(x.nbytes + grad.nbytes)(grad, x, sums, geometry, parts)
    # Over outer axes, in order, by NumPy: (vectors, KH, KW, L)
    total = sums.sum(axis=0).reshape(vectors, *win.kernel[:1], groups, -1, kw, L).sum(axis=3)
    total = total.reshape(vectors, *win.kernel, L).transpose(1, 2, 0, 3)
    gw = np.empty((*win.kernel, results), x.dtype)
    whole = results // L * L
    gw[..., :whole] = total[:, :, : whole // L].reshape(*win.kernel, whole)
    if whole < results:
        start = max(0, results - L)
        gw[..., start:] = total[:, :, -1, : results - start]
    return gw.reshape(*win.kernel, channels, factor)


def _hot(dtype: Any, channels: int) -> bool:
    """Whether code for special kernels pays: float64 is for checks, short vectors waste anyway."""
    return dtype == np.float32 and channels >= simd.LANES


def _repeated(x: np.ndarray, factor: int) -> np.ndarray:
    """Each channel `factor` times."""
    return x if factor == 1 else np.repeat(x, factor, axis=3)


def _check_weights(name: str, shape: Sequence[int], w: np.ndarray, win: Window) -> None:
    if len(shape) != 4 or w.ndim != 4 or w.shape[:3] != (*win.kernel, shape[3]) or not w.size:
        raise ValueError(
            f"{name}: expected x (B, H, W, C) and w (KH, KW, C, R) of {win}, not empty, "
            f"got {tuple(shape)} and {w.shape}"
        )


def _check_grad(
    name: str, grad: np.ndarray, shape: Sequence[int], factor: int, win: Window
) -> None:
    expected = (shape[0], *win.output(shape[1], shape[2]), shape[3] * factor)
    if grad.shape != expected or min(expected) < 1:
        raise ValueError(f"{name}: expected grad {expected}, not empty, got {grad.shape}")
