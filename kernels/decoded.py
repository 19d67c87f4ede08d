"""Layers whose weights are stored in fewer bits and decoded while they run.

Weights are a stream, row by row of the matrix (K, N), decoded sixteen at a time (`simd_decode`).
Decoding inside the register tile would repeat it for every six rows of x, and the tile has no
register left for it. So a part of the matrix is decoded into a buffer that stays in the
second-level cache, the columns of a tile together where sixteen divides the columns, and the dense
tile runs over it for all rows of x before the next part is decoded:

    Y[m, n] += sum X[m, k] D[k, n],  k, n in this part

Each weight is decoded once for up to 240 rows of x. For one row of x it is multiplied where it is
decoded: there is less to read, and no buffer.

A convolution decodes the weights of one panel of its channels, which lie in a buffer as packed ones
would, and the tiles of `kernels.conv` run over it for all images before the next panel is decoded.
Every bit of its result is that of the dense convolution.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numba import prange

from kernels import conv, memory, simd, simd_decode
from kernels._jit import Variants, get_threads, prepared, worth_threads
from kernels.geometry import Window
from kernels.product import _aligned

SLACK = 32  # bytes behind a stream that may be read
LEAD = 16  # numbers before a decoded panel that may be written
_BUFFER_BYTES = 128 * 1024
_BLOCK_ROWS = 240  # of x, for which weights are decoded once
_PARTS = 16  # of the sum over k or of the columns, where x has few rows
_WIDE = 128  # columns decoded at a time, at most: a part of a row that fills cache lines
_DEPTH = 512  # rows decoded at a time, at most


def _panel(kind: int) -> Any:
    def panel(S, book, columns, K, N, first, cols, W, D):
        # D[LEAD + k W + j] = weight (k, first + j) of (K, N) where j < cols, 0 for others, j < W
        # D (LEAD + K W,), of which the first LEAD become any numbers
        if N % 16 == 0 and first % 16 == 0 and cols % 16 == 0 and cols == W:  # done sooner
            for k in range(K):
                for j in range(0, cols, 16):
                    n, at = k * N + first + j, LEAD + k * W + j
                    simd_decode.decode(kind, S, n, book, n % columns, columns, D, at, 16)
            return
        # Sixteen weights may begin before those of a row: the row before is put there later.
        for k in range(K - 1, -1, -1):
            i = k * N + first
            start, end = i // 16 * 16, i + cols
            for n in range(start, end, 16):
                at, count = LEAD + k * W + n - i, min(16, end - n)
                simd_decode.decode(kind, S, n, book, n % columns, columns, D, at, count)
            for j in range(cols, W):
                D[LEAD + k * W + j] = 0

    return panel


def _products(kind: int, mr: int, nr: int) -> Any:
    def products(X, S, book, columns, bias, low, Y, N, block, cut, onto, D):
        # Y[c, m, n] = max(bias[n] + sum_k X[m, k] W[k, n], low), k of part c only
        # and what is in Y before, if `onto`, inside the maximum
        # X (>= mr rows, K), Y (parts, M, N), bias (N,); cut, scratch D (slots, size): see `Cut`
        depth, wide, panels, _ = cut
        parts, M = Y.shape[0], Y.shape[1]
        rows, K = X.shape
        W = nr * simd.lanes(Y)
        # W[k, n] at k ld + n // W step + n % W, without panels just at k N + n
        ld, step = (W, depth * W) if panels else (N, W)
        steps = (K + depth - 1) // depth
        blocks = (M + block - 1) // block
        stripes = (N + wide - 1) // wide
        tasks, slots = parts * blocks * stripes, len(D)
        for slot in prange(slots):
            d = D[slot]
            for task in range(tasks * slot // slots, tasks * (slot + 1) // slots):
                c, r, first = task // stripes // blocks, task // stripes % blocks, task % stripes
                first, cols = first * wide, min(wide, N - first * wide)
                s_lo, s_hi = steps * c // parts, steps * (c + 1) // parts
                for s in range(s_lo, s_hi):
                    k_lo, k_hi = s * depth, min(K, s * depth + depth)
                    base = k_lo * N + first
                    lines, length = (k_hi - k_lo, cols) if panels else (1, (k_hi - k_lo) * N)
                    for line in range(lines):
                        for n in range(0, length, 16):
                            i, at = base + line * N + n, line * ld + n // W * step + n % W
                            count = min(16, length - n)
                            simd_decode.decode(kind, S, i, book, i % columns, columns, d, at, count)
                    for n in range(0, cols, W):
                        part = min(W, cols - n)
                        for m in range(r * block, min(M, r * block + block), mr):
                            start = min(m, rows - mr)
                            lo, hi = m - start, min(mr, M - start)
                            iy = (c * M + start) * N + first + n
                            acc = simd.zeros(mr, nr, Y)
                            ix, iw = start * K + k_lo, n // W * step
                            for _ in range(k_hi - k_lo):
                                simd.rolled()
                                acc = simd.rank1(acc, X, ix, K, d, iw)
                                ix += 1
                                iw += ld
                            if s > s_lo or onto:
                                if lo == 0 and hi == mr and part == W:
                                    acc = simd.add(acc, simd.load(mr, nr, Y, iy, N))
                                else:
                                    old = simd.load_part(mr, nr, Y, iy, N, lo, hi, part)
                                    acc = simd.add(acc, old)
                            if s == s_hi - 1:
                                added = simd.load_part(1, nr, bias, first + n, 0, 0, 1, part)
                                acc = simd.add(acc, added)
                                acc = simd.maximum(acc, simd.fill(1, nr, Y, low))
                            if lo == 0 and hi == mr and part == W:
                                simd.store(acc, Y, iy, N)
                            else:
                                simd.store_part(acc, Y, iy, N, lo, hi, part)

    return products


def _rows(kind: int) -> Any:
    V = 16 // simd.LANES

    def rows(X, S, book, columns, bias, low, Y, wide, onto):
        # Y[m, n] = max(bias[n] + sum_k X[m, k] W[k, n], low), each weight decoded where it is used
        # and what is in Y before, if `onto`, inside the maximum
        # X (M, K), Y (M, N), bias (N,); N and wide, the columns of a task, multiples of 16
        (M, K), N = X.shape, Y.shape[1]
        stripes = (N + wide - 1) // wide
        least = simd.fill(1, 1, Y, low)
        for task in prange(M * stripes):
            m, first = task // stripes, task % stripes * wide
            end = min(N, first + wide)
            for n in range(first, end, 16):
                acc = simd.load(1, V, bias, n, 0)
                if onto:
                    acc = simd.add(acc, simd.load(1, V, Y, m * N + n, 0))
                simd.store(acc, Y, m * N + n, 0)
            for k in range(0, K - 3, 4):  # four rows a pass; what they are multiplied with is held
                ix = m * K + k
                x0, x1 = simd.spread(1, X, ix, 0), simd.spread(1, X, ix + 1, 0)
                x2, x3 = simd.spread(1, X, ix + 2, 0), simd.spread(1, X, ix + 3, 0)
                for n in range(first, end, 16):
                    at = k * N + n
                    acc = simd.load(1, V, Y, m * N + n, 0)
                    w = simd_decode.decoded(kind, S, at, book, at % columns, columns)
                    acc = simd.fma(acc, w, x0)
                    at += N
                    w = simd_decode.decoded(kind, S, at, book, at % columns, columns)
                    acc = simd.fma(acc, w, x1)
                    at += N
                    w = simd_decode.decoded(kind, S, at, book, at % columns, columns)
                    acc = simd.fma(acc, w, x2)
                    at += N
                    w = simd_decode.decoded(kind, S, at, book, at % columns, columns)
                    simd.store(simd.fma(acc, w, x3), Y, m * N + n, 0)
            for k in range(K // 4 * 4, K):
                x0 = simd.spread(1, X, m * K + k, 0)
                for n in range(first, end, 16):
                    at = k * N + n
                    acc = simd.load(1, V, Y, m * N + n, 0)
                    w = simd_decode.decoded(kind, S, at, book, at % columns, columns)
                    simd.store(simd.fma(acc, w, x0), Y, m * N + n, 0)
            for n in range(first, end, 16):
                acc = simd.maximum(simd.load(1, V, Y, m * N + n, 0), least)
                simd.store(acc, Y, m * N + n, 0)

    return rows


class Cut(NamedTuple):
    """What of the weights is decoded at a time."""

    depth: int  #: rows, a multiple of 16
    wide: int  #: columns: all, or a multiple of a tile's
    panels: bool  #: whether the columns of each tile lie together
    size: int  #: of the buffer, in weights


def cut(K: int, N: int, nr: int, wide: int = _WIDE) -> Cut:
    """For tiles of nr vectors. Weights are decoded sixteen at a time: N may not allow panels.

    Rows of many columns, one below the other, would share a few places of the nearest cache.
    """
    width = nr * simd.LANES
    panels = N % 16 == 0 and width % 16 == 0
    if panels:
        stripes = -(-N // wide)
        wide = -(-N // (stripes * width)) * width
    else:
        wide = N
    depth = max(16, _BUFFER_BYTES // (4 * wide) // 16 * 16)
    depth = min(depth, -(-K // 16) * 16, _DEPTH)
    return Cut(depth, wide, panels, depth * wide + width)


class Stream(NamedTuple):
    """Weights as `simd_decode.decode` takes them."""

    kind: int
    data: np.ndarray  #: uint8, with `SLACK` bytes behind the last weight
    book: np.ndarray  #: float32, flat, of 16 entries at least
    columns: int  #: after which the columns of the book begin again; 16 at least


class Packed(Protocol):
    """Weights (K, N) or (KH, KW, C, N) in fewer bits: `codebook.CodeBook`, `half.Half`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights."""

    @property
    def source(self) -> Stream:
        """The weights as kernels take them."""


@cache
def panel_kernel(kind: int) -> Variants:
    """Of some columns of the weights, serial only: see `_panel`."""
    return Variants(_panel(kind))


@cache
def product_kernel(kind: int, mr: int, nr: int) -> Variants:
    """Of a linear layer, for tiles of mr rows and nr vectors: see `_products`."""
    return Variants(_products(kind, mr, nr))


@cache
def rows_kernel(kind: int) -> Variants:
    """Of a linear layer of one row whose columns are a multiple of 16: see `_rows`."""
    return Variants(_rows(kind))


def unpack(packed: Packed) -> np.ndarray:
    """The weights, float32."""
    size = math.prod(packed.shape)
    out = memory.empty((LEAD + size,), np.float32)
    kind, data, book, columns = packed.source
    panel_kernel(kind).serial(data, book, columns, 1, size, 0, size, size, out)
    return out[LEAD:].reshape(packed.shape)


def linear(
    x: np.ndarray,
    packed: Packed,
    bias: np.ndarray | None = None,
    relu: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """y = x @ w + bias, of it max(y, 0) if `relu`; x (M, K), w (K, N) packed, bias (N,) -> (M, N).

    Weights (KH, KW, C, N) are the matrix of K = KH KW C rows. Writes to `out` (M, N), C-contiguous,
    if given. Raises ValueError for shapes that do not fit, TypeError unless all are float32.
    """
    name, shape = _named(packed, "linear"), matrix(packed.shape)
    K, N = shape
    kind, data, book, columns = packed.source
    if x.ndim != 2 or x.shape[1] != K:
        raise ValueError(f"{name}: expected x (M, {K}) for weights {shape}, got {x.shape}")
    x, added = operands(name, x, bias, N)
    y = result(name, (len(x), N), out)
    M = len(x)
    low = np.float32(0 if relu else -np.inf)
    parallel = worth_threads(M * K * N)
    if alone(M, N):
        wide = -(-N // (_PARTS * 16)) * 16 if parallel else N
        rows_kernel(kind).choose(M * K * N)(x, data, book, columns, added, low, y, wide, False)
        return y
    nr = 1 if N <= simd.LANES else simd.TILE[1]  # few kernels to compile
    mr = 1 if M < 3 else simd.ROWS[nr]
    if mr > M:
        padded = np.zeros((mr, K), np.float32)
        padded[:M] = x
        x = padded
    blocks = -(-M // _BLOCK_ROWS)
    few = parallel and blocks == 1
    how = cut(K, N, nr, min(_WIDE, -(-N // _PARTS)) if few else _WIDE)
    parts = 1
    if few and not how.panels:
        depth = max(16, min(how.depth, -(-K // (_PARTS * 16)) * 16))
        how = how._replace(depth=depth)
        parts = min(_PARTS, -(-K // depth))
    block = -(-M // (blocks * mr)) * mr
    sums = y.reshape(1, M, N) if parts == 1 else memory.empty((parts, M, N), np.float32)
    slots = min(get_threads(), parts * blocks * -(-N // how.wide)) if parallel else 1
    scratch = _aligned((slots, how.size), x.dtype)
    run = product_kernel(kind, mr, nr).choose(M * K * N)
    first = added if parts == 1 else np.zeros_like(added)
    least = low if parts == 1 else np.float32(-np.inf)
    run(x, data, book, columns, first, least, sums, N, block, tuple(how), False, scratch)
    if parts > 1:
        np.sum(sums, axis=0, out=y)  # over an outer axis: in order, by NumPy
        y += added
        np.maximum(y, low, out=y)
    return y


def alone(M: int, N: int) -> bool:
    """Whether a layer is run by `rows_kernel`."""
    return M == 1 and N % 16 == 0


def conv2d(
    x: np.ndarray,
    packed: Packed,
    bias: np.ndarray | None,
    win: Window,
    relu: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """As `kernels.conv.conv2d` with packed weights (KH, KW, C, N), into `out` if given.

    Raises ValueError for shapes that do not fit, TypeError unless all are float32.
    """
    name, shape = _named(packed, "conv2d"), packed.shape
    if x.ndim != 4 or shape[:3] != (*win.kernel, x.shape[3]):
        raise ValueError(
            f"{name}: expected x (B, H, W, C) and weights ({win.kernel[0]}, {win.kernel[1]}, C, N),"
            f" got {x.shape} and {shape}"
        )
    size = (len(x), *win.output(*x.shape[1:3]), shape[3])
    if win == Window((1, 1)):
        y = result(name, size, out)
        flat = y.reshape(-1, shape[3])
        linear(x.reshape(-1, shape[2]), packed, bias, relu, flat)
        return y
    x, added = operands(name, x, bias, shape[3])
    y = result(name, size, out)
    kind, data, book, columns = packed.source
    (K, N), low = matrix(shape), np.float32(0 if relu else -np.inf)
    for call in conv._calls(x.shape, size, win, True, False, simd.LANES):
        width = call.part.width
        scratch = _aligned((LEAD + K * width,), x.dtype)
        for one in call.alone():
            first, cols = one.part.first, one.part.cols
            panel_kernel(kind).serial(data, book, columns, K, N, first, cols, width, scratch)
            panel = scratch[LEAD:].reshape(one.packed(shape[2]))
            one.kernel.choose(one.macs)(*one.arguments(x, panel, added, low, y, False))
    return y


def operands(name: str, x: np.ndarray, bias: np.ndarray | None, channels: int) -> Any:
    """x and bias (zeros for None) as kernels take them; raises TypeError or ValueError."""
    added = np.zeros(channels, np.float32) if bias is None else bias
    if x.dtype != np.float32 or added.dtype != np.float32:
        raise TypeError(f"{name}: expected arrays of float32, got {x.dtype} and {added.dtype}")
    if added.shape != (channels,):
        raise ValueError(f"{name}: expected bias ({channels},), got {added.shape}")
    return prepared(name, x, added)


def result(name: str, shape: tuple[int, ...], out: np.ndarray | None) -> np.ndarray:
    """`out`, if it fits, or a new array. Raises ValueError."""
    if out is None:
        return memory.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32 or not out.flags.carray:
        raise ValueError(
            f"{name}: expected out {shape} of float32, C-contiguous, got {out.shape} of {out.dtype}"
        )
    return out


def _named(packed: Packed, function: str) -> str:
    """The function as callers know it: of the module that packed the weights."""
    return f"{type(packed).__module__.removeprefix('kernels.')}.{function}"


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(K, N) of weights (K, N), or of a convolution's, whose taps and channels make the rows."""
    return math.prod(shape[:-1]), shape[-1]
