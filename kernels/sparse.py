"""Layers whose weights are mostly zero: only the others are stored and multiplied.

    Y[b, oy, ox, n] = max(bias[n] + sum W[t, k, n] X[b, iy(t), ix(t), k], low)

summed over taps t = (ky, kx) inside the image and channels k for which a weight is stored. A linear
layer is the convolution with one tap, its rows the images.

Zeros gain nothing on vectors of output channels, each of which has its weights elsewhere. So the
vectors lie along pixels. A block of P vectors of pixels is turned from rows of channels (NHWC)
into rows of pixels T[k, pixel] by transposing in registers; then an output channel is one loop over
its weights, each spread over a vector and multiplied with the row T[k] that its index names; and
the channels are turned back.

A processor loads about as many vectors as it multiplies, so that an output channel by itself is
limited by its loads. Two channels are summed together: the row T[k] of an input for which both have
a weight is loaded once for both, and in the same turn of the loop one weight of either alone is
multiplied; three loads for four products leave time for the loads of weights and indices. In blocks
of 4 x 1, four channels share an index and a load. See `kernels.sparse_pack` for the layout.

A zero weight is not there: multiplied with infinity or NaN it gives 0, as pruning means it. Weights
must be finite, so that a tap outside the image, a zero in T, adds nothing.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from kernels import memory, simd, simd_sparse
from kernels._jit import Variants, get_threads, jit, prepared, worth_threads
from kernels.geometry import Window
from kernels.product import _aligned
from kernels.sparse_pack import GROUP, Sparse, channels_of_row, pack, unpack

__all__ = ["Sparse", "conv2d", "linear", "pack", "unpack"]

_LANES = simd.LANES  # of float32, a global constant to the kernels
_BLOCK_PIXELS = 64  # at most: 96 of their rows fill three quarters of a first-level cache
_SUMS_BYTES = 256 * 1024  # of a task's results before they are turned back
_TASKS = 8  # of one row of activations, for threads to share
_SMALL_IMAGE = 64  # pixels, of which borders are a large part
_OUTSIDE = -1 << 40  # a row of no image


# --- a block of pixels ----------------------------------------------------------------------------


@jit(inline=True)
def _place(X, Y, first, count, batch_first, sy, sx, py, px, at, left, up, out):
    # Pixel p of the block: at[p] where tap (0, 0) lies in X, up[p], left[p] its row and column
    # there, out[p] where the result lies in Y; outside and -1 for p >= count
    # X (B, H, V, C), Y (B, OH, OW, N); the first rows of all images come first, so that few blocks
    # reach over a border; of a row, the first pixels of all images (batch_first) or the images
    B, H, V, C = X.shape
    _, OH, OW, N = Y.shape
    oy, rest = first // (B * OW), first % (B * OW)
    if batch_first:
        b, ox = rest % B, rest // B
    else:
        b, ox = rest // OW, rest % OW
    done = 0
    while done < count:
        y, x = oy * sy - py, ox * sx - px
        if batch_first:
            end, step_x, step_at, step_out = done + B - b, 0, H * V * C, OH * OW * N
        else:
            end, step_x, step_at, step_out = done + OW - ox, sx, sx * C, N
        end = min(end, count)
        place, result = ((b * H + y) * V + x) * C, ((b * OH + oy) * OW + ox) * N
        for p in range(done, end):
            i = p - done
            up[p], left[p] = y, x + i * step_x
            at[p], out[p] = place + i * step_at, result + i * step_out
        done = end
        if batch_first:
            b, ox = 0, ox + 1
        else:
            b, ox = b + 1, 0
        if b == B or ox == OW:
            b, ox, oy = 0, 0, oy + 1
    for p in range(count, len(at)):
        up[p], out[p] = _OUTSIDE, -1


@jit(inline=True)
def _line(X, Y, first, count, rows, out):
    # As `_place` and `_find` where pixel m of Y is a sum over pixel m of X
    C, N = X.shape[3], Y.shape[3]
    for p in range(len(rows)):
        rows[p] = (first + p) * C if p < count else -1
        out[p] = (first + p) * N if p < count else -1


@jit(inline=True)
def _find(X, dy, dx, at, left, up, rows):
    # rows[p] = where tap (dy, dx) of pixel p lies in X, -1 outside; whether any is inside
    _, H, V, C = X.shape
    shift = (dy * V + dx) * C
    none = np.int64(-1)
    for p in range(len(at)):
        y, x = up[p] + dy, left[p] + dx
        outside = (y | x | (H - 1 - y) | (V - 1 - x)) >> 63  # -1 if any is negative, else 0
        rows[p] = at[p] + shift | outside
        none &= outside
    return none == 0


@jit(inline=True)
def _gather(X, first, channels, rows, T, place):
    # T[place + k, p] = X[rows[p] + first + k], 0 where rows[p] < 0;  0 <= k < channels
    width = T.shape[1]
    for p in range(0, width, _LANES):
        for k in range(0, channels, _LANES):
            it = (place + k) * width + p
            if k + _LANES <= channels:
                tile = simd_sparse.load_rows(_LANES, X, first + k, rows, p, _LANES)
                simd.store(simd.transpose(tile), T, it, width)
            else:
                tile = simd_sparse.load_rows(_LANES, X, first + k, rows, p, channels - k)
                simd.store_part(simd.transpose(tile), T, it, width, 0, channels - k, _LANES)


@jit(inline=True)
def _scatter(U, row, low, onto, Y, first, channels, out):
    # Y[out[p] + first + n] = max(U[row + n, p], low), 0 <= n < channels, where out[p] >= 0
    # and what is in Y before, if `onto`, inside the maximum
    width = U.shape[1]
    least = simd.fill(1, 1, U, low)
    for p in range(0, width, _LANES):
        for n in range(0, channels, _LANES):
            tile = simd.transpose(simd.load(_LANES, 1, U, (row + n) * width + p, width))
            if n + _LANES <= channels:
                if onto:
                    old = simd_sparse.load_rows(_LANES, Y, first + n, out, p, _LANES)
                    tile = simd.add(tile, old)
                tile = simd.maximum(tile, least)
                simd_sparse.store_rows(tile, Y, first + n, out, p, _LANES)
            else:
                if onto:
                    old = simd_sparse.load_rows(_LANES, Y, first + n, out, p, channels - n)
                    tile = simd.add(tile, old)
                tile = simd.maximum(tile, least)
                simd_sparse.store_rows(tile, Y, first + n, out, p, channels - n)


@jit
def _next(first, width, flat, X):
    # Where in X (pixels, ..., C) the rows behind pixels first to first + width - 1 lie, of as many
    # pixels; nothing unless pixels of the input and of the result are the same
    start = min((first + width) * X.shape[3], X.size)
    return start, min(start + width * X.shape[3], X.size) if flat else start


@jit(inline=True)
def _chunk(X, lo, hi, win, at, left, up, rows, T):
    # T[k - lo, p] = X of input k = (tap, channel) of pixel p, lo <= k < hi; whether any is inside
    _, KX, _, _, _, _, DY, DX = win
    C = X.shape[3]
    found = False
    k = lo
    while k < hi:
        tap, channel = k // C, k % C
        some = min(C - channel, hi - k)
        found |= _find(X, tap // KX * DY, tap % KX * DX, at, left, up, rows)
        _gather(X, channel, some, rows, T, k - lo)
        k += some
    return found


def _blocks(R: int, P: int) -> Any:
    W = P * _LANES
    rows_of_group = GROUP // R

    def blocks(X, bias, low, Y, weights, win, batch_first, parts, flat, onto, T, U, Z):
        # The formula at the head of the file; a task is W pixels and a part of the groups.
        # X (B, H, V, C), Y (B, OH, OW, N), bias (16 groups,); flat: pixel m reads pixel m of X only
        # onto: what is in Y before is added inside the maximum
        # scratch: T (slots, longest chunk, W), U (slots, channels of a part, W), Z (slots, 5, W)
        values, indices, counts, starts, edges = weights
        _, _, sy, sx, py, px, _, _ = win
        pixels, N = Y.shape[0] * Y.shape[1] * Y.shape[2], Y.shape[3]
        chunks, rows, _ = counts.shape
        groups = (rows + rows_of_group - 1) // rows_of_group
        tasks = (pixels + W - 1) // W * parts
        slots = len(T)
        for slot in prange(slots):
            t, u, z = T[slot], U[slot], Z[slot]
            at, left, up, inside, out = z[0], z[1], z[2], z[3], z[4]
            for task in range(tasks * slot // slots, tasks * (slot + 1) // slots):
                first, part = task // parts * W, task % parts
                count = min(W, pixels - first)
                if flat:
                    _line(X, Y, first, count, inside, out)
                else:
                    _place(X, Y, first, count, batch_first, sy, sx, py, px, at, left, up, out)
                g_lo, g_hi = groups * part // parts, groups * (part + 1) // parts
                fresh = True
                # What the next block reads and writes, asked for row by row
                x_at, x_end = _next(first, W, flat, X)
                y_at, y_end = _next(first, W, flat, Y)
                lines = (x_end - x_at + y_end - y_at) // 128 + 2
                each = lines // (chunks * (min(rows, g_hi * rows_of_group) - g_lo * rows_of_group))
                for c in range(chunks):
                    last = c == chunks - 1
                    live = starts[c * groups + g_lo, 0] < starts[c * groups + g_hi, 0]
                    if live and flat:
                        _gather(X, edges[c], edges[c + 1] - edges[c], inside, t, 0)
                    elif live:
                        live = _chunk(X, edges[c], edges[c + 1], win, at, left, up, inside, t)
                    if not (live or last):
                        continue
                    for g in range(g_lo, g_hi):
                        j = np.int64(starts[c * groups + g, 0])
                        v = np.int64(starts[c * groups + g, 1])
                        # Sums that are whole at once share a place that stays in the nearest cache
                        base = g if fresh and last else g_lo
                        for r in range(g * rows_of_group, min(rows, (g + 1) * rows_of_group)):
                            for _ in range(each + 1):
                                if x_at < x_end:
                                    simd.prefetch(8, X, x_at, 16)
                                    x_at += 128
                                elif y_at < y_end:
                                    simd.prefetch(8, Y, y_at, 16)
                                    y_at += 128
                            i = (r * R - base * GROUP) * W
                            if fresh:
                                acc = simd.zeros(R, P, t)
                                acc = simd.add(acc, simd.spread(R, bias, r * R, 1))
                            else:
                                acc = simd.load(R, P, u, i, W)
                            if live:
                                n = np.int64(counts[c, r, 0])
                                some = np.int64(0)
                                if R == 2:  # of both channels, then of the first, of the second
                                    one, two = np.int64(counts[c, r, 1]), np.int64(counts[c, r, 2])
                                    j1, v1 = j + n, v + 2 * n
                                    j2, v2 = j1 + one, v1 + one
                                    some = min(n, one, two)
                                    for k in range(some):
                                        simd.rolled_32()
                                        acc = simd_sparse.rank1_at(
                                            acc, 0, R, values, v + 2 * k, t, 0, indices, j + k, W
                                        )
                                        acc = simd_sparse.rank1_at(
                                            acc, 0, 1, values, v1 + k, t, 0, indices, j1 + k, W
                                        )
                                        acc = simd_sparse.rank1_at(
                                            acc, 1, 2, values, v2 + k, t, 0, indices, j2 + k, W
                                        )
                                    for k in range(some, one):
                                        simd.rolled_32()
                                        acc = simd_sparse.rank1_at(
                                            acc, 0, 1, values, v1 + k, t, 0, indices, j1 + k, W
                                        )
                                    for k in range(some, two):
                                        simd.rolled_32()
                                        acc = simd_sparse.rank1_at(
                                            acc, 1, 2, values, v2 + k, t, 0, indices, j2 + k, W
                                        )
                                for k in range(some, n):
                                    simd.rolled_32()
                                    acc = simd_sparse.rank1_at(
                                        acc, 0, R, values, v + R * k, t, 0, indices, j + k, W
                                    )
                                j, v = j + n, v + R * n
                                if R == 2:
                                    j, v = j2 + two, v2 + two
                            simd.store(acc, u, i, W)
                        if last:
                            at_n = g * GROUP
                            size = min(GROUP, N - at_n)
                            _scatter(u, at_n - base * GROUP, low, onto, Y, at_n, size, out)
                    fresh = False

    return blocks


@cache
def kernel(block: int, vectors: int) -> Variants:
    """The kernel for blocks of weights of 1 or 4 channels and for so many vectors of pixels."""
    return Variants(_blocks(channels_of_row(block), vectors))


# --- one row of activations -----------------------------------------------------------------------


def _rows(R: int) -> Any:
    rows_of_group, together, alone = GROUP // R, _LANES // R, _LANES

    def rows(X, bias, low, Y, weights, parts, onto, S):
        # Y[m, n] = max(bias[n] + sum_j values[j] X[m, edges[c] + indices[j]], low): the vectors lie
        # along the weights.  X (M, K), Y (M, N), bias (16 groups,), scratch S (M, 16 groups)
        # onto: what is in Y before is added inside the maximum
        values, indices, counts, starts, edges = weights
        M, K = X.shape
        N = Y.shape[1]
        chunks, size, kinds = counts.shape
        groups = (size + rows_of_group - 1) // rows_of_group
        for task in prange(M * parts):
            m, part = task // parts, task % parts
            g_lo, g_hi = groups * part // parts, groups * (part + 1) // parts
            sums, y = S[m], Y[m]
            for n in range(g_lo * GROUP, g_hi * GROUP):
                sums[n] = bias[n]
            for c in range(chunks):
                j = np.int64(starts[c * groups + g_lo, 0])
                v = np.int64(starts[c * groups + g_lo, 1])
                ix = m * K + np.int64(edges[c])
                for r in range(g_lo * rows_of_group, min(size, g_hi * rows_of_group)):
                    end = j + np.int64(counts[c, r, 0])
                    acc = simd.zeros(1, 1, X)
                    while j + together <= end:
                        acc = simd_sparse.dot_at(acc, values, v, X, ix, indices, j, R, 0)
                        j, v = j + together, v + alone
                    if j < end:
                        acc = simd_sparse.dot_at(acc, values, v, X, ix, indices, j, R, end - j)
                        v, j = v + (end - j) * R, end
                    simd_sparse.add_folded(acc, R, sums, r * R)
                    for kind in range(1, kinds):  # one channel of the row by itself
                        end = j + np.int64(counts[c, r, kind])
                        acc = simd.zeros(1, 1, X)
                        while j + alone <= end:
                            acc = simd_sparse.dot_at(acc, values, v, X, ix, indices, j, 1, 0)
                            j, v = j + alone, v + alone
                        if j < end:
                            acc = simd_sparse.dot_at(acc, values, v, X, ix, indices, j, 1, end - j)
                            v, j = v + end - j, end
                        simd_sparse.add_folded(acc, 1, sums, r * R + kind - 1)
            for n in range(g_lo * GROUP, min(N, g_hi * GROUP)):
                total = sums[n] + y[n] if onto else sums[n]
                y[n] = low if total < low else total

    return rows


@cache
def rows_kernel(block: int) -> Variants:
    """The kernel for a linear layer of few rows."""
    return Variants(_rows(channels_of_row(block)))


# --- what is called -------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a layer is run: vectors of pixels a block, parts of the channels, scratch."""

    vectors: int
    parts: int
    slots: int  # runs of tasks, each with scratch of its own
    batch_first: bool


@lru_cache(1024)
def plan(pixels: int, images: int, channels: int, block: int, threads: int) -> Plan:
    """For so many pixels in all images; `threads` 0 for the serial version.

    The threads share the tasks, each with scratch of its own. How many there are changes no sum.
    """
    registers = simd.TILE[0] * simd.TILE[1]
    most = max(1, min(_BLOCK_PIXELS // _LANES, registers // channels_of_row(block)))
    sizes = {most, -(-most // 2)} | ({4} if most == 6 else set())  # images are often 2**n large
    vectors = min(sizes, key=lambda v: (-(-pixels // (v * _LANES)) * (v + 0.5), -v))
    width = vectors * _LANES
    groups = -(-channels // GROUP)
    parts = -(-channels * width * 4 // _SUMS_BYTES)
    blocks = -(-pixels // width)
    if threads > 1:
        parts = max(parts, -(-2 * threads // blocks))
    parts = min(parts, groups)
    slots = max(1, min(threads, blocks * parts))
    in_turn = images >= width and pixels <= _SMALL_IMAGE * images
    return Plan(vectors, parts, slots, in_turn)


def linear(
    x: np.ndarray,
    packed: Sparse,
    bias: np.ndarray | None = None,
    relu: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """y = x @ w + bias, of it max(y, 0) if `relu`; x (M, K), w (K, N) packed, bias (N,) -> (M, N).

    Writes to `out` (M, N), C-contiguous, if given. Raises ValueError for shapes that do not fit,
    TypeError unless all are float32.
    """
    if x.ndim != 2 or packed.shape[:3] != (1, 1, x.shape[1]):
        raise ValueError(
            f"sparse.linear: expected x (M, {packed.shape[2]}) and weights (K, N), "
            f"got {x.shape} and {packed.shape}"
        )
    y = _result("sparse.linear", (len(x), packed.shape[3]), out)
    if len(x) > _FEW:
        image = x.reshape(len(x), 1, 1, -1)
        _run(
            "sparse.linear", image, packed, bias, Window((1, 1)), relu, y.reshape(len(x), 1, 1, -1)
        )
        return y
    x, added = _operands("sparse.linear", x, bias, packed.shape[3])
    run = rows_kernel(packed.block).choose(len(x) * packed.values.size)
    low = np.float32(0 if relu else -np.inf)
    sums = np.empty((len(x), len(added)), np.float32)
    run(x, added, low, y, packed.arrays, min(len(added) // GROUP, _TASKS), False, sums)
    return y


_FEW = 2  # rows of x, for which vectors of pixels would be nearly empty


def conv2d(
    x: np.ndarray,
    packed: Sparse,
    bias: np.ndarray | None,
    win: Window,
    relu: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """y[b, oy, ox, n] = bias[n] + sum x[b, iy, ix, c] w[ky, kx, c, n], max(y, 0) of it if `relu`.

    As `kernels.conv.conv2d`: x (B, H, W, C), w (KH, KW, C, N) packed -> (B, OH, OW, N), written to
    `out` if given. Raises ValueError for shapes that do not fit, TypeError unless all are float32.
    """
    if x.ndim != 4 or packed.shape[:3] != (*win.kernel, x.shape[3]):
        raise ValueError(
            f"sparse.conv2d: expected x (B, H, W, C) and weights ({win.kernel[0]}, "
            f"{win.kernel[1]}, C, N), got {x.shape} and {packed.shape}"
        )
    shape = (len(x), *win.output(*x.shape[1:3]), packed.shape[3])
    y = _result("sparse.conv2d", shape, out)
    if win == Window((1, 1)):
        linear(x.reshape(-1, x.shape[3]), packed, bias, relu, y.reshape(-1, shape[3]))
    else:
        _run("sparse.conv2d", x, packed, bias, win, relu, y)
    return y


def _run(
    name: str,
    x: np.ndarray,
    packed: Sparse,
    bias: np.ndarray | None,
    win: Window,
    relu: bool,
    y: np.ndarray,
) -> None:
    x, added = _operands(name, x, bias, packed.shape[3])
    pixels, channels = y.size // y.shape[3], y.shape[3]
    work = pixels * packed.values.size
    threads = get_threads() if worth_threads(work) else 0
    how = plan(pixels, len(x), channels, packed.block, threads)
    width = how.vectors * _LANES
    rows = -(-len(added) // (how.parts * GROUP)) * GROUP
    table = (*win.kernel, *win.stride, win.padding[0][0], win.padding[1][0], *win.dilation)
    size = how.slots * packed.depth * width
    scratch = _aligned((size + how.slots * rows * width,), x.dtype)
    kernel(packed.block, how.vectors).choose(work)(
        x,
        added,
        np.float32(0 if relu else -np.inf),
        y,
        packed.arrays,
        table,
        how.batch_first,
        how.parts,
        win == Window((1, 1)),
        False,
        scratch[:size].reshape(how.slots, packed.depth, width),
        scratch[size:].reshape(how.slots, rows, width),
        np.empty((how.slots, 5, width), np.int64),
    )


def _operands(name: str, x: np.ndarray, bias: np.ndarray | None, channels: int) -> Any:
    """x as kernels take it, and bias filled up to whole groups."""
    added = np.zeros(-(-channels // GROUP) * GROUP, np.float32)
    if x.dtype != np.float32 or (bias is not None and bias.dtype != np.float32):
        found = x.dtype if bias is None else f"{x.dtype}, {bias.dtype}"
        raise TypeError(f"{name}: expected arrays of float32, got {found}")
    if bias is not None:
        if bias.shape != (channels,):
            raise ValueError(f"{name}: expected bias ({channels},), got {bias.shape}")
        added[:channels] = bias
    return prepared(name, x)[0], added


def _result(name: str, shape: tuple[int, ...], out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return memory.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32 or not out.flags.carray:
        raise ValueError(
            f"{name}: expected out {shape} of float32, C-contiguous, got {out.shape} of {out.dtype}"
        )
    return out
