"""Convolution over NHWC images with HWIO weights, its gradients, and its transpose, directly.

Nothing is gathered into a matrix first, and no tap outside the image is computed. One kernel does
the convolution and the gradient by its input; all it needs of either is, along each axis, which
pixels of the result it makes, and where their taps lie in the image (`_Axis`).

    Y[b, y(u), x(v), n] = bias[n] + sum X[b, u sy + t dy - py, v sx + s dx - px, k] W[t, s, k, n]

summed over the taps t, s inside the image and over channels k.

The convolution is that with y(u) = u. In its gradient by the input the pixels of the result fall
into stride x stride phases; those of one phase meet the same taps, evenly spaced, and make a
convolution of stride 1 (`_phases`). So no product with a zero is computed.

A register tile holds mr neighbouring pixels of a row times nr vectors of output channels. Where the
window lies inside the image for all of them, its taps along x and their channels are one loop; the
taps that only some of them have run in those rows of the tile only.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from kernels import few_channels, memory, pointwise, simd
from kernels._jit import Variants, prepared
from kernels.conv_weights import conv2d_weight_grad, is_pointwise
from kernels.geometry import Window
from kernels.product import _aligned
from kernels.tiling import FEW_REGISTERS, MOST, Part, cuts

__all__ = ["conv2d", "conv2d_input_grad", "conv2d_weight_grad", "transposed"]

_BLOCK_BYTES = 384 * 1024  # of images that one panel of weights passes over
_TASKS = 16  # wanted at least


# --- convolution and input gradient ---------------------------------------------------------------


def _tiles(mr: int, nr: int) -> Any:
    def tiles(
        X, P, bias, low, Y, R, T, dy, dx, xs, ys, first, cols, block, bands, groups, onto
    ):  # fmt: skip
        # Y[b, y, x, first + n] = max(bias[first + n] + sum_{t, s, k}
        #     X[b, up + t dy, left + s dx, k] P[n // W, t, s, k, n % W], low)
        # and what is in Y before, if `onto`, inside the maximum
        # for each (y, up, t_lo, t_hi) in R, t_lo <= t < t_hi, and each tile (x, left) in T: see
        # `_table`;  0 <= n < cols, W = nr L or L / 2
        # X (B, H, V, C), Y (B, OH, OW, N), P (panels, TY, TX, C, W), bias (N,)
        # Neighbouring pixels of a tile lie xs elements of X and ys of Y apart.
        B, height, width, C = X.shape
        OH, OW, N = Y.shape[1:]
        TY, TX = P.shape[1:3]
        W = nr * simd.lanes(Y) if nr else simd.lanes(Y) // 2
        panels = (cols + W - 1) // W
        for task in prange((B + block - 1) // block * bands * groups):
            r, band, g = task // groups // bands, task // groups % bands, task % groups
            for p in range(panels * g // groups, panels * (g + 1) // groups):
                n, part = first + p * W, min(W, cols - p * W)
                for b in range(r * block, min(B, (r + 1) * block)):
                    for u in range(len(R) * band // bands, len(R) * (band + 1) // bands):
                        y, up, t_lo, t_hi = R[u, 0], R[u, 1], R[u, 3], R[u, 4]
                        for m in range(len(T)):
                            left, done, hi = T[m, 1], T[m, 2], T[m, 7]
                            f_lo, f_hi = T[m, 5], T[m, 6]
                            at = ((b * height + up) * width + left) * C
                            runs, length = (1, (f_hi - f_lo) * C) if dx == 1 else (f_hi - f_lo, C)
                            acc = simd.zeros(mr, nr, Y)
                            for t in range(t_lo, t_hi):
                                for run in range(runs):
                                    ix = at + (t * dy * width + (f_lo + run) * dx) * C
                                    ip = ((p * TY + t) * TX + f_lo + run) * C * W
                                    for _ in range(length):
                                        simd.rolled()
                                        acc = simd.rank1(acc, X, ix, xs, P, ip)
                                        ix += 1
                                        ip += W
                            for s in range(T[m, 3], T[m, 4]):
                                if f_lo <= s < f_hi:
                                    continue
                                row_lo, row_hi = T[m, 8 + 2 * s], T[m, 9 + 2 * s]
                                for t in range(t_lo, t_hi):
                                    ix = at + (t * dy * width + s * dx) * C
                                    ip = ((p * TY + t) * TX + s) * C * W
                                    for _ in range(C):
                                        simd.rolled()
                                        acc = simd.rank1_rows(acc, X, ix, xs, P, ip, row_lo, row_hi)
                                        ix += 1
                                        ip += W
                            iy = ((b * OH + y) * OW + T[m, 0]) * N + n
                            if done == 0 and hi == mr and part == W:
                                acc = simd.add(acc, simd.load(1, nr, bias, n, 0))
                                if onto:
                                    acc = simd.add(acc, simd.load(mr, nr, Y, iy, ys))
                                acc = simd.maximum(acc, simd.fill(1, nr, Y, low))
                                simd.store(acc, Y, iy, ys)
                            else:
                                acc = simd.add(acc, simd.load_part(1, nr, bias, n, 0, 0, 1, part))
                                if onto:
                                    old = simd.load_part(mr, nr, Y, iy, ys, done, hi, part)
                                    acc = simd.add(acc, old)
                                acc = simd.maximum(acc, simd.fill(1, nr, Y, low))
                                simd.store_part(acc, Y, iy, ys, done, hi, part)

    return tiles


def _pack_taps(L: int, turned: bool) -> Any:
    def pack(w, ky, kx, first, cols, P):
        # P[p, t, s, k, j] = w[ky[t], kx[s], k, first + p W + j], turned w[..., first + p W + j, k];
        # 0 where p W + j >= cols;  w (KH, KW, C, N), turned (KH, KW, N, C)
        # P (panels, TY, TX, C, W)
        panels, TY, TX, C, W = P.shape
        KW, rows, columns = w.shape[1:]
        for work in prange(panels * TY):
            p, t = work // TY, work % TY
            for s in range(TX):
                at = (ky[t] * KW + kx[s]) * rows * columns
                to = (work * TX + s) * C * W
                if turned:
                    for j in range(0, W, L):
                        n = p * W + j
                        for k in range(0, C, L):
                            i, o = at + (first + n) * C + k, to + k * W + j
                            if n + L <= cols and k + L <= C:
                                simd.store(simd.transpose(simd.load(L, 1, w, i, C)), P, o, W)
                            else:
                                block = simd.load_part(L, 1, w, i, C, 0, cols - n, C - k)
                                simd.store_part(simd.transpose(block), P, o, W, 0, C - k, W - j)
                else:
                    for k in range(C):
                        for j in range(0, W, L):
                            n = p * W + j
                            i, o = at + k * columns + first + n, to + k * W + j
                            row = simd.load_part(1, 1, w, i, 0, 0, 1, cols - n)
                            simd.store_part(row, P, o, 0, 0, 1, W - j)

    return pack


@cache
def _taps_kernel(lanes: int, turned: bool) -> Variants:
    return Variants(_pack_taps(lanes, turned))


@cache
def _tile_kernel(mr: int, nr: int) -> Variants:
    return Variants(_tiles(mr, nr))


class _Axis(NamedTuple):
    """Pixels first + i step along rows or columns, i < length: taps at i stride + t gap - shift."""

    length: int
    first: int
    step: int
    taps: int
    stride: int
    gap: int
    shift: int


@lru_cache(1024)
def _table(axis: _Axis, size: int, height: int) -> np.ndarray:
    """Where the tiles of `height` pixels lie on an axis, and their taps in an image of this size.

    A row for each tile: its first pixel; where tap 0 of that lies; the pixels that the tile before
    has done; the taps lo, hi that any of its pixels has inside the image; those that all have; its
    number of pixels; then for each tap the pixels lo, hi that have it.
    """
    rows = []
    for m in range(0, axis.length, height):
        i = max(0, min(m, axis.length - height))
        count = min(height, axis.length - i)
        at = i * axis.stride - axis.shift
        bounds = []
        for t in range(axis.taps):  # 0 <= at + j stride + t gap < size
            start = at + t * axis.gap
            lo = min(count, max(0, -(start // axis.stride)))
            bounds.append((lo, max(lo, min(count, -((start - size) // axis.stride)))))
        some = [t for t, (lo, hi) in enumerate(bounds) if lo < hi]
        full = [t for t, (lo, hi) in enumerate(bounds) if hi - lo == height]
        limits = [n for taps in (some, full) for n in ((taps[0], taps[-1] + 1) if taps else (0, 0))]
        first = axis.first + i * axis.step
        rows.append((first, at, m - i, *limits, count, *(n for pair in bounds for n in pair)))
    return np.array(rows, np.int64)


class _Call(NamedTuple):
    """One call of a tile kernel: some channels of some pixels."""

    part: Part
    kernel: Variants
    pack: Variants
    macs: int
    taps: tuple[np.ndarray, np.ndarray]  # of the weights, along rows and columns
    tables: tuple[np.ndarray, np.ndarray]
    steps: tuple[int, ...]  # dy, dx, xs, ys
    block: int
    bands: int
    groups: int

    def packed(self, channels: int) -> tuple[int, ...]:
        """The shape of its panels of weights, for an image of so many channels."""
        part, (ky, kx) = self.part, self.taps
        return part.panels, len(ky), len(kx), channels, part.width

    def arguments(self, x: Any, panels: Any, bias: Any, low: Any, y: Any, onto: bool) -> Any:
        """What its kernel takes, of arrays or of what stands for them in a program."""
        part, tables = self.part, (*self.tables, *self.steps)
        shares = self.block, self.bands, self.groups
        return x, panels, bias, low, y, *tables, part.first, part.cols, *shares, onto

    def fill(self, w: np.ndarray, panels: np.ndarray) -> None:
        """Pack its part of the weights."""
        kernel = self.pack.choose(2 * panels.nbytes)
        kernel(w, *self.taps, self.part.first, self.part.cols, panels)

    def alone(self) -> list[_Call]:
        """A call for each of its panels, which lies by itself."""
        part, found = self.part, []
        for first in range(0, part.cols, part.width):
            cols = min(part.width, part.cols - first)
            one = part._replace(first=part.first + first, cols=cols, panels=1)
            macs = self.macs // part.cols * cols
            found.append(self._replace(part=one, macs=macs, groups=1))
        return found


@lru_cache(1024)
def _calls(
    shape: tuple[int, ...], result: tuple[int, ...], win: Window, forward: bool, turned: bool,
    lanes: int,
) -> tuple[_Call, ...]:  # fmt: skip
    """How images of this shape become the result: by the convolution, or by its transpose."""
    B, height, width, C = shape
    OH, OW, N = result[1:]
    calls = []
    for rows, ky in _phases(OH, win, 0, forward):
        for columns, kx in _phases(OW, win, 1, forward):
            depth = len(ky) * len(kx) * C
            macs = B * rows.length * columns.length * depth
            cost = _tile_cost(columns, width)
            for part in cuts(N, lanes, MOST, cost)[1]:
                tables = _table(rows, height, 1), _table(columns, width, part.mr)
                steps = (rows.gap, columns.gap, columns.stride * C, columns.step * N)
                fit = _BLOCK_BYTES // (4 * (height * width * C + OH * OW * min(N, part.width)))
                block = max(1, min(fit, B // _TASKS))
                blocks = -(-B // block)
                bands = max(1, min(rows.length, _TASKS // blocks))
                groups = max(1, min(part.panels, _TASKS // (blocks * bands)))
                calls.append(
                    _Call(
                        part,
                        _tile_kernel(part.mr, part.nr),
                        _taps_kernel(lanes, turned),
                        macs * part.cols,
                        (np.array(ky, np.int64), np.array(kx, np.int64)),
                        tables,
                        steps,
                        block,
                        bands,
                        groups,
                    )
                )
    return tuple(calls)


def _tile_cost(axis: _Axis, size: int) -> Callable[[int, float], float]:
    """What all tiles of h pixels and some vectors cost on an axis, in vector operations a channel.

    A step takes a multiply-add for each row and vector, and what surrounds it; one that passes over
    some rows takes a branch for each.
    """

    def cost(height: int, vectors: float) -> float:
        total, around = 0.0, 1 + vectors / 2
        # multiply-adds that must be under way at once; what one with a load of its own counts
        under_way, loads = (8, 1.5) if FEW_REGISTERS else (5, 0)
        for row in _table(axis, size, height):
            full = row[6] - row[5]
            valid = sum(row[9 + 2 * s] - row[8 + 2 * s] for s in range(row[3], row[4]))
            partial = row[4] - row[3] - full
            total += full * (max(height * max(vectors, loads), under_way) + around)
            total += partial * (height + around) + (valid - full * height) * vectors
        return total + 0.01 * height

    return cost


def _convolve(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    low: float,
    y: np.ndarray,
    win: Window,
    forward: bool,
    turned: bool,
) -> None:
    """Fills y. w (KH, KW, C, N) for x (B, H, W, C), or turned: (KH, KW, N, C); C-contiguous."""
    added = np.zeros(y.shape[3], x.dtype) if bias is None else bias
    least, C = x.dtype.type(low), x.shape[3]
    lanes = simd.LANES * 4 // x.itemsize
    for call in _calls(x.shape, y.shape, win, forward, turned, lanes):
        panels = _aligned(call.packed(C), x.dtype)
        call.fill(w, panels)
        call.kernel.choose(call.macs)(*call.arguments(x, panels, added, least, y, False))


# --- what is called -------------------------------------------------------------------------------


def conv2d(
    x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, win: Window, relu: bool = False
) -> np.ndarray:
    """y[b, oy, ox, n] = bias[n] + sum x[b, iy, ix, c] w[ky, kx, c, n], max(y, 0) of it if `relu`.

    x (B, H, W, C), w (KH, KW, C, N), bias (N,) or None -> (B, OH, OW, N), all sizes at least 1;
    iy = oy stride - padding + ky dilation, ix likewise, where they lie in the image. NaN passes.
    Raises ValueError for shapes that do not fit, TypeError unless all are of one float dtype.
    """
    if x.ndim != 4 or w.shape[:3] != (*win.kernel, x.shape[3]) or w.ndim != 4:
        raise ValueError(
            f"conv2d: expected x (B, H, W, C) and w ({win.kernel[0]}, {win.kernel[1]}, C, N), "
            f"got {x.shape} and {w.shape}"
        )
    x, w, bias = _operands("conv2d", x, w, bias, w.shape[3])
    if is_pointwise(win):
        flat = pointwise.linear(x.reshape(-1, x.shape[3]), w[0, 0], bias, relu)
        return flat.reshape(*x.shape[:3], w.shape[3])
    y = memory.empty((len(x), *win.output(*x.shape[1:3]), w.shape[3]), x.dtype)
    _convolve(x, w, bias, 0.0 if relu else -np.inf, y, win, True, False)
    return y


def conv2d_input_grad(
    grad: np.ndarray, w: np.ndarray, shape: Sequence[int], win: Window
) -> np.ndarray:
    """gx[b, iy, ix, c] = sum of grad[b, oy, ox, n] w[ky, kx, c, n] over n and taps that read it.

    grad (B, OH, OW, N), w (KH, KW, C, N) -> (B, H, W, C), which is `shape`.
    """
    if w.ndim != 4:
        raise ValueError(f"conv2d_input_grad: expected w (KH, KW, C, N), got {w.shape}")
    return transposed("conv2d_input_grad", grad, w, None, shape, win, False)


def transposed(
    kernel: str,
    grad: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    shape: Sequence[int],
    win: Window,
    relu: bool,
) -> np.ndarray:
    """`conv2d_input_grad` + bias (C,), through ReLU if asked; `kernel` names it in errors."""
    shape = tuple(shape)
    want = (shape[0], *win.output(*shape[1:3]), w.shape[3])
    if w.shape[:3] != (*win.kernel, shape[3]) or grad.shape != want:
        raise ValueError(
            f"{kernel}: image {shape}, {win}: expected weights {(*win.kernel, *shape[3:])} of "
            f"channels ({w.shape[3]}) and windows {want}, got {w.shape} and {grad.shape}"
        )
    grad, w, bias = _operands(kernel, grad, w, bias, shape[3])
    turned = w.transpose(0, 1, 3, 2)
    if is_pointwise(win):
        flat = grad.reshape(-1, w.shape[3])
        if bias is None and not relu:
            return pointwise.matmul_nt(flat, w[0, 0]).reshape(shape)
        return pointwise.linear(flat, turned[0, 0], bias, relu).reshape(shape)
    low = 0.0 if relu else -np.inf
    if few_channels.pays(shape[3], w.shape[3], grad.itemsize):
        added = np.zeros(shape[3], grad.dtype) if bias is None else bias
        return few_channels.transposed(grad, w, added, grad.dtype.type(low), shape, win)
    gx = memory.empty(shape, grad.dtype)
    _convolve(grad, w, bias, low, gx, win, False, True)
    return gx


def _operands(
    kernel: str, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, channels: int
) -> Any:
    if bias is None:
        return *prepared(kernel, x, w), None
    if bias.shape != (channels,):
        raise ValueError(f"{kernel}: expected bias ({channels},), got {bias.shape}")
    return prepared(kernel, x, w, bias)


def _phases(size: int, win: Window, axis: int, forward: bool) -> list[tuple[_Axis, list[int]]]:
    """The pixels of one axis of a result, by the taps that make them, and these taps.

    Of the convolution: pixel i is made by all taps k, at i s + k d - p.

    Of its transpose: pixel i is made by tap k from pixel o where o s = i + p - k d. In phase f,
    i = f + u s, and the taps are k0, k0 + q, ... with q = s / gcd(s, d); tap k0 + t q reads pixel
    u + (f + p - k0 d) / s - t d / gcd(s, d). They are listed from the last to the first.
    """
    s, d, k = win.stride[axis], win.dilation[axis], win.kernel[axis]
    p = win.padding[axis][0]
    if forward:
        return [(_Axis(size, 0, 1, k, s, d, p), list(range(k)))]
    gap = d // math.gcd(s, d)
    phases = []
    for f in range(min(s, size)):
        taps = [t for t in range(k) if (f + p - t * d) % s == 0][::-1]
        last = taps[0] if taps else 0
        shift = -((f + p - last * d) // s)
        count = (size - f + s - 1) // s
        phases.append((_Axis(count, f, s, len(taps), 1, gap, shift), taps))
    return phases
