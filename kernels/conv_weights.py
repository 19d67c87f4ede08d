"""The gradient of a convolution by its weights, directly: rows of a tile are input channels.

    gw[ky, kx, c, n] = sum over b, oy, ox of x[b, iy, ix, c] grad[b, oy, ox, n]

A tile of sums stays in registers while it passes over the pixels of some images. Where channels are
few, the taps along x and their channels, which are neighbours in memory, are rows of one tile.
Images are summed in chunks that depend on the shapes only, and these are added in order.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numba import prange

from kernels import memory, pointwise, simd
from kernels._jit import Variants, prepared
from kernels.geometry import Window
from kernels.product import _aligned, _pack_kernel
from kernels.tiling import Part, cuts

_BLOCK_BYTES = 384 * 1024  # of images that one panel of results passes over
_TASKS = 16  # wanted at least; also the most chunks of a sum
#: Rows of a tile of one vector, of several: above these, LLVM keeps some of the sums in memory.
_MOST = (16, 9)
_CHUNK_PIXELS = 1024  # of a sum over pixels, at least


def _weight_tiles(mr: int, nr: int) -> Any:
    def weight_tiles(G, origin, step, ld, OH, OW, X, S, rows, columns, first, cols, block, groups):
        # S[c, ky, kx, r, first + n] = sum over part c of the images, and over oy, ox inside, of
        #     X[b, oy sy + ky dy - py, ox sx + kx dx - px + r // C, r % C] g[b, oy, ox, n]
        # g[b, oy, ox, p W + j] = G[origin + p step + ((b OH + oy) OW + ox) ld + j]
        # X (B, H, V, C), S (chunks, KH, KW, R, N): R = C, or all the taps along x are rows of one
        B, height, width, C = X.shape
        chunks, KH, KW, R, N = S.shape
        sy, dy, py = rows
        sx, dx, px = columns
        W = nr * simd.lanes(G) if nr else simd.lanes(G) // 2
        panels = (cols + W - 1) // W
        size = (B + chunks - 1) // chunks
        works = panels * KH
        for task in prange(chunks * groups):
            c, group = task // groups, task % groups
            b_first, b_end = c * size, min(B, (c + 1) * size)
            for b_lo in range(b_first, max(b_first + 1, b_end), block):
                b_hi = min(b_end, b_lo + block)
                for work in range(works * group // groups, works * (group + 1) // groups):
                    p, ky = work // KH, work % KH
                    part = min(W, cols - p * W)
                    # rows of the result whose tap is inside: 0 <= oy sy - up < H
                    up = py - ky * dy
                    y_lo = max(0, (up + sy - 1) // sy)
                    y_hi = min(OH, (height + up + sy - 1) // sy)
                    for kx in range(KW):
                        left = px - kx * dx
                        for i in range(0, R, mr):
                            r = min(i, R - mr)
                            # pixels where all rows of the tile are inside: f_lo <= ox < f_hi,
                            # where any is: x_lo <= ox < x_hi
                            near, far = left - r // C, left - (r + mr - 1) // C
                            x_lo = max(0, (far + sx - 1) // sx)
                            x_hi = min(OW, (width + near + sx - 1) // sx)
                            f_lo = max(x_lo, (near + sx - 1) // sx)
                            f_hi = min(x_hi, (width + far + sx - 1) // sx)
                            if f_hi < f_lo:
                                f_lo = f_hi = x_hi
                            out = (((c * KH + ky) * KW + kx) * R + r) * N + first + p * W
                            acc = simd.zeros(mr, nr, S)
                            if b_lo > b_first:
                                acc = simd.load_part(mr, nr, S, out, N, 0, mr, part)
                            for b in range(b_lo, b_hi):
                                for oy in range(y_lo, y_hi):
                                    at = ((b * height + oy * sy - up) * width - left) * C + r
                                    ig = origin + p * step + (b * OH + oy) * OW * ld
                                    for k in range(x_lo, x_hi - (f_hi - f_lo)):
                                        ox = k if k < f_lo else k + (f_hi - f_lo)
                                        lo = (left - ox * sx) * C - r
                                        ix = at + ox * sx * C
                                        acc = simd.rank1_rows(
                                            acc, X, ix, 1, G, ig + ox * ld, lo, lo + width * C
                                        )
                                    ix, iw = at + f_lo * sx * C, ig + f_lo * ld
                                    for _ in range(f_hi - f_lo):
                                        simd.rolled()
                                        acc = simd.rank1(acc, X, ix, 1, G, iw)
                                        ix += sx * C
                                        iw += ld
                            simd.store_part(acc, S, out, N, i - r, mr, part)

    return weight_tiles


def _cost(
    rows: int, channels: int, lefts: Sequence[int], stride: int, width: int, count: int
) -> Callable[[int, float], float]:
    """What tiles of h rows and some vectors cost for `count` pixels in a row, in multiply-adds.

    The numbers are measured. Loads take time, too, most where each multiply-add has its own, with
    one vector. A pixel near the border, where only some rows of a tile are inside the image, takes
    a branch for each of them. Names as in `_weight_tiles`; a tap for each of `lefts`.
    """

    def cost(height: int, vectors: float) -> float:
        total = 0.0
        step = max(height * vectors, 8) + 1 + 0.1 * (height + vectors)
        if vectors <= 1:
            step += height / 16
        for left in lefts:
            for i in range(0, rows, height):
                r = min(i, rows - height)
                near, far = left - r // channels, left - (r + height - 1) // channels
                some = min(count, -((-width - near) // stride)) - max(0, -(-far // stride))
                full = min(count, -((-width - far) // stride)) - max(0, -(-near // stride))
                full = max(0, min(full, some))
                total += full * step + 3.5 * height * max(0, some - full) + 10
        return total

    return cost


@cache
def _weight_kernel(mr: int, nr: int) -> Variants:
    return Variants(_weight_tiles(mr, nr))


def conv2d_weight_grad(grad: np.ndarray, x: np.ndarray, win: Window) -> np.ndarray:
    """gw[ky, kx, c, n] = sum over b, oy, ox of x[b, iy, ix, c] grad[b, oy, ox, n].

    grad (B, OH, OW, N), x (B, H, W, C) -> (KH, KW, C, N).
    """
    if x.ndim != 4 or grad.ndim != 4 or grad.shape[:3] != (len(x), *win.output(*x.shape[1:3])):
        raise ValueError(
            f"conv2d_weight_grad: x {x.shape}, {win}: expected grad "
            f"{(len(x), *win.output(*x.shape[1:3]), 'N')}, got {grad.shape}"
        )
    grad, x = prepared("conv2d_weight_grad", grad, x)
    B, OH, OW, N = grad.shape
    C = x.shape[3]
    if is_pointwise(win):
        return pointwise.matmul_tn(x.reshape(-1, C), grad.reshape(-1, N)).reshape(1, 1, C, N)
    KH, KW = win.kernel
    span, chunks, calls = _weight_calls(x.shape, N, win, simd.LANES * 4 // x.itemsize)
    sums = memory.empty((chunks, KH, KW // span, span * C, N), x.dtype)
    rows, columns = ((win.stride[a], win.dilation[a], win.padding[a][0]) for a in (0, 1))
    for part, kernel, block, groups in calls:
        source, origin, step, ld = grad, part.first, part.width, N
        if part.cols % part.width:
            source = _aligned((part.panels, B * OH * OW, part.width), x.dtype)
            _pack_kernel(0).choose(2 * source.nbytes)(
                grad.reshape(-1, N), part.first, part.cols, source
            )
            origin, step, ld = 0, B * OH * OW * part.width, part.width
            source = source.reshape(1, 1, -1, part.width)
        kernel.choose(B * OH * OW * KH * KW * C * part.cols)(
            source,
            origin,
            step,
            ld,
            OH,
            OW,
            x,
            sums,
            rows,
            columns,
            part.first,
            part.cols,
            block,
            groups,
        )
    total = sums[0] if chunks == 1 else sums.sum(axis=0)  # over an outer axis: in order, by NumPy
    return total.reshape(KH, KW, C, N)


@lru_cache(1024)
def _weight_calls(
    shape: tuple[int, ...], channels: int, win: Window, lanes: int
) -> tuple[int, int, tuple[tuple[Part, Variants, int, int], ...]]:
    """Taps that are rows of one tile, chunks of the sum; tiles, kernels, blocks and groups."""
    B, height, width, C = shape
    OH, OW = win.output(height, width)
    KH, KW = win.kernel
    stride, dilation, (before, _) = win.stride[1], win.dilation[1], win.padding[1]
    lefts = [before - kx * dilation for kx in range(KW)]

    def tiles(rows: int, lefts: list[int]) -> tuple[float, tuple[Part, ...]]:
        most = min(rows, _MOST[0]), min(rows, _MOST[1])
        return cuts(channels, lanes, most, _cost(rows, C, lefts, stride, width, OW))

    span, (cost, parts) = 1, tiles(C, lefts)
    if dilation == 1 and KW > 1 and C < 64:  # the taps along x as rows of one
        wide, joined = tiles(KW * C, lefts[:1])
        if wide < cost:
            span, parts = KW, joined
    chunks = max(1, min(B, _TASKS, B * OH * OW // _CHUNK_PIXELS))
    calls = []
    for part in parts:
        groups = max(1, min(KH * part.panels, _TASKS // chunks))
        block = max(1, _BLOCK_BYTES // (4 * (height * width * C + OH * OW * part.width)))
        calls.append((part, _weight_kernel(part.mr, part.nr), block, groups))
    return span, chunks, tuple(calls)


def is_pointwise(win: Window) -> bool:
    """Whether a window is one pixel, and each pixel is one: the convolution is a product."""
    return win.kernel == win.stride == (1, 1) and win.padding == ((0, 0), (0, 0))
