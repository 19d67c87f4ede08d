"""Layers whose weights are mostly zero: only the others are stored and multiplied.

    Y[b, oy, ox, n] = max(bias[n] + sum W[t, k, n] X[b, iy(t), ix(t), k], low)

summed over taps t = (ky, kx) inside the image and channels k for which a weight is stored. A linear
layer is the convolution with one tap, its rows the images.

Zeros gain nothing on vectors of output channels, each of which has its weights elsewhere. So the
vectors lie along pixels. A block of P vectors of pixels is turned from rows of channels (NHWC)
into rows of pixels T[k, pixel] by transposing in registers; then an output channel is one loop over
its weights, each spread over a vector and multiplied with the row T[k] that its index names; and
the channels are turned back. In blocks of 4 x 1, four channels share an index, and the row of T
that it names is loaded once for all four: nearly as few loads as a dense product needs.

Layout. The K = taps C inputs are cut into chunks of `depth` at most, whose part of T stays in the
first-level cache, and whose indices fit a byte. For each chunk, and in it for each output channel
(or block of four), come its number of weights (`counts`), their indices within the chunk, and the
values: 5 bytes a weight, 4.25 in blocks. `starts` says where each 16 channels begin in a chunk.

A zero weight is not there: multiplied with infinity or NaN it gives 0, as pruning means it. Weights
must be finite, so that a tap outside the image, a zero in T, adds nothing.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import itertools
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from kernels import memory, simd, simd_sparse
from kernels._jit import Variants, get_threads, jit, prepared, worth_threads
from kernels.geometry import Window
from kernels.product import _aligned

_LANES = simd.LANES  # of float32, a global constant to the kernels
_GROUP = 16  # channels between two entries of `starts`; whole vectors on every level
_BLOCK_PIXELS = 96  # at most: 64 of their rows fill three quarters of a first-level cache
_SUMS_BYTES = 256 * 1024  # of a task's results before they are turned back
_TASKS = 8  # wanted at least, for threads to share


class Sparse(NamedTuple):
    """Packed weights (KH, KW, C, N): what `pack` makes and the layers take."""

    shape: tuple[int, int, int, int]
    block: int  #: output channels that share an index: 1 or 4
    values: np.ndarray  #: float32 (weights, block)
    indices: np.ndarray  #: uint8 (weights,), from the chunk's first input
    counts: np.ndarray  #: uint8 (chunks, channels / block)
    starts: np.ndarray  #: int32 (chunks * groups of 16 channels + 1,), in weights
    edges: np.ndarray  #: int32 (chunks + 1,), the inputs at which chunks begin

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, indices included."""
        return sum(a.nbytes for a in self[2:])

    @property
    def density(self) -> float:
        """The share of weights that are stored."""
        return self.values.size / max(1, int(np.prod(self.shape)))


def pack(weights: np.ndarray, block: int = 1, depth: int | None = None) -> Sparse:
    """Weights (K, N) or (KH, KW, C, N), float32, in which zeros are not to be stored.

    `block` 4 stores channels 4 i to 4 i + 3 of an input together if any of them is not 0. `depth`:
    inputs of a chunk, at most 255; by default chosen for batches. Raises ValueError for other
    shapes, blocks and depths and for weights that are not finite, TypeError unless float32.
    """
    if weights.dtype != np.float32:
        raise TypeError(f"sparse.pack: expected float32, got {weights.dtype}")
    if weights.ndim not in (2, 4) or not weights.size or block not in (1, 4):
        raise ValueError(
            f"sparse.pack: expected weights (K, N) or (KH, KW, C, N), not empty, and block 1 or 4, "
            f"got {weights.shape} and {block}"
        )
    if not np.isfinite(weights).all():
        raise ValueError("sparse.pack: expected finite weights, got NaN or infinity")
    shape = (1, 1, *weights.shape) if weights.ndim == 2 else weights.shape
    inputs, channels = int(np.prod(shape[:3])), shape[3]
    rows = -(-channels // block)
    blocks = np.zeros((inputs, rows * block), np.float32)
    blocks[:, :channels] = weights.reshape(inputs, channels)
    blocks = blocks.reshape(inputs, rows, block)
    stored = (blocks != 0).any(axis=2)
    if depth is None:
        depth = _depth(float(stored.mean()), block)
    if not 1 <= depth <= 255:
        raise ValueError(f"sparse.pack: expected 1 <= depth <= 255, got {depth}")
    edges = _edges(shape[0] * shape[1], shape[2], depth)
    values, indices, counts = [], [], []
    for lo, hi in itertools.pairwise(edges):
        row, place = np.nonzero(stored[lo:hi].T)
        values.append(blocks[lo + place, row])
        indices.append(place.astype(np.uint8))
        counts.append(stored[lo:hi].sum(axis=0))
    table = np.stack(counts)
    starts = np.add.reduceat(table, np.arange(0, rows, _GROUP // block), axis=1).cumsum()
    return Sparse(
        shape,
        block,
        np.concatenate(values),
        np.concatenate(indices),
        table.astype(np.uint8),
        np.concatenate([[0], starts]).astype(np.int32),
        edges,
    )


def unpack(packed: Sparse) -> np.ndarray:
    """The weights (KH, KW, C, N), zeros included."""
    *_, channels = packed.shape
    rows = packed.counts.shape[1]
    chunks = len(packed.edges) - 1
    dense = np.zeros((packed.edges[-1], rows, packed.block), np.float32)
    counts = packed.counts.ravel()
    chunk, row = np.divmod(np.arange(chunks * rows), rows)
    inputs = packed.edges[np.repeat(chunk, counts)] + packed.indices
    dense[inputs, np.repeat(row, counts)] = packed.values
    return np.ascontiguousarray(dense.reshape(len(dense), -1)[:, :channels]).reshape(packed.shape)


def _depth(density: float, block: int) -> int:
    """Inputs of a chunk. Sparse ones are longer: a sum is kept for some weights at least."""
    return 128 if block > 1 else int(min(192, max(64, 16 / max(density, 1e-9))))


def _edges(taps: int, channels: int, depth: int) -> np.ndarray:
    """Chunks of whole taps, or equal parts of one: a tap outside the image is then left out."""
    if channels > depth:
        parts = -(-channels // depth)
        within = np.arange(parts + 1) * channels // parts
        edges = (np.arange(taps)[:, None] * channels + within[:-1]).ravel()
    else:
        edges = np.arange(0, taps, depth // channels) * channels
    return np.append(edges, taps * channels).astype(np.int32)


# --- a block of pixels ----------------------------------------------------------------------------


@jit
def _place(X, Y, first, count, batch_first, sy, sx, py, px, at, left, up, out):
    # Pixel p of the block: at[p] where tap (0, 0) lies in X, up[p], left[p] its row and column
    # there, out[p] where the result lies in Y; out[p] = -1 for p >= count
    # X (B, H, V, C), Y (B, OH, OW, N); pixels run along images (batch_first) or along rows
    B, H, V, C = X.shape
    _, OH, OW, N = Y.shape
    pixels = OH * OW
    if batch_first:
        b, o = first % B, first // B
    else:
        b, o = first // pixels, first % pixels
    oy, ox = o // OW, o % OW
    for p in range(len(at)):
        up[p], left[p] = oy * sy - py, ox * sx - px
        at[p] = ((b * H + up[p]) * V + left[p]) * C
        out[p] = ((b * OH + oy) * OW + ox) * N if p < count else -1
        if batch_first:
            b += 1
            if b < B:
                continue
            b = 0
        ox += 1
        if ox == OW:
            ox, oy = 0, oy + 1
            if oy == OH:
                oy, b = 0, b + 1


@jit
def _find(X, count, dy, dx, at, left, up, rows):
    # rows[p] = where tap (dy, dx) of pixel p lies in X, -1 outside; whether any is inside
    _, H, V, C = X.shape
    shift = (dy * V + dx) * C
    found = False
    for p in range(len(at)):
        y, x = up[p] + dy, left[p] + dx
        inside = (p < count) & (y >= 0) & (y < H) & (x >= 0) & (x < V)
        rows[p] = at[p] + shift if inside else -1
        found |= inside
    return found


@jit
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


@jit
def _scatter(U, row, low, Y, first, channels, out):
    # Y[out[p] + first + n] = max(U[row + n, p], low), 0 <= n < channels, where out[p] >= 0
    width = U.shape[1]
    for p in range(0, width, _LANES):
        for n in range(0, channels, _LANES):
            tile = simd.load(_LANES, 1, U, (row + n) * width + p, width)
            tile = simd.maximum(simd.transpose(tile), simd.fill(1, 1, U, low))
            if n + _LANES <= channels:
                simd_sparse.store_rows(tile, Y, first + n, out, p, _LANES)
            else:
                simd_sparse.store_rows(tile, Y, first + n, out, p, channels - n)


@jit
def _chunk(X, lo, hi, win, count, at, left, up, rows, T):
    # T[k - lo, p] = X of input k = (tap, channel) of pixel p, lo <= k < hi; whether any is inside
    _, KX, _, _, _, _, DY, DX = win
    C = X.shape[3]
    found = False
    k = lo
    while k < hi:
        tap, channel = k // C, k % C
        some = min(C - channel, hi - k)
        found |= _find(X, count, tap // KX * DY, tap % KX * DX, at, left, up, rows)
        _gather(X, channel, some, rows, T, k - lo)
        k += some
    return found


def _blocks(R: int, P: int) -> Any:
    W = P * _LANES
    rows_of_group = _GROUP // R

    def blocks(X, bias, low, Y, weights, win, batch_first, parts, flat, T, U, Z):
        # The formula at the head of the file; a task is W pixels and a part of the groups.
        # X (B, H, V, C), Y (B, OH, OW, N), bias (16 groups,); flat: pixel m reads row m of X;
        # the rows of the next block, and those of Y to be written, are asked for meanwhile
        # scratch: T (slots, longest chunk, W), U (slots, channels of a part, W), Z (slots, 5, W)
        values, indices, counts, starts, edges = weights
        _, _, sy, sx, py, px, _, _ = win
        pixels, N = Y.shape[0] * Y.shape[1] * Y.shape[2], Y.shape[3]
        chunks, rows = counts.shape
        groups = (rows + rows_of_group - 1) // rows_of_group
        tasks = (pixels + W - 1) // W * parts
        slots = len(T)
        for slot in prange(slots):
            t, u, z = T[slot], U[slot], Z[slot]
            at, left, up, inside, out = z[0], z[1], z[2], z[3], z[4]
            for task in range(tasks * slot // slots, tasks * (slot + 1) // slots):
                first, part = task // parts * W, task % parts
                count = min(W, pixels - first)
                _place(X, Y, first, count, batch_first, sy, sx, py, px, at, left, up, out)
                g_lo, g_hi = groups * part // parts, groups * (part + 1) // parts
                fresh = True
                ahead = (first + W) * X.shape[3]
                ahead_end = min(ahead + W * X.shape[3], X.size) if flat else ahead
                mine = first * N if flat else Y.size
                mine_end = min(mine + W * N, Y.size)
                for c in range(chunks):
                    if starts[c * groups + g_lo] == starts[c * groups + g_hi]:
                        continue
                    if not _chunk(X, edges[c], edges[c + 1], win, count, at, left, up, inside, t):
                        continue
                    for g in range(g_lo, g_hi):
                        j = np.int64(starts[c * groups + g])
                        for r in range(g * rows_of_group, min(rows, (g + 1) * rows_of_group)):
                            if ahead < ahead_end:
                                simd.prefetch(8, X, ahead, 16)
                                ahead += 128
                            if mine < mine_end:
                                simd.prefetch(8, Y, mine, 16)
                                mine += 128
                            i = (r * R - g_lo * _GROUP) * W
                            if fresh:
                                acc = simd.zeros(R, P, t)
                                acc = simd.add(acc, simd.spread(R, bias, r * R, 1))
                            else:
                                acc = simd.load(R, P, u, i, W)
                            for _ in range(np.int64(counts[c, r])):
                                simd.rolled()
                                acc = simd_sparse.rank1_at(acc, values, j * R, t, 0, indices, j, W)
                                j += 1
                            simd.store(acc, u, i, W)
                    fresh = False
                if fresh:
                    for r in range(g_lo * rows_of_group, min(rows, g_hi * rows_of_group)):
                        acc = simd.add(simd.zeros(R, P, t), simd.spread(R, bias, r * R, 1))
                        simd.store(acc, u, (r * R - g_lo * _GROUP) * W, W)
                n = g_lo * _GROUP
                _scatter(u, 0, low, Y, n, min(N, g_hi * _GROUP) - n, out)

    return blocks


@cache
def kernel(block: int, vectors: int) -> Variants:
    """The kernel for blocks of weights of 1 or 4 channels and for so many vectors of pixels."""
    return Variants(_blocks(block, vectors))


# --- one row of activations -----------------------------------------------------------------------


def _rows(R: int) -> Any:
    rows_of_group, together = _GROUP // R, _LANES // R

    def rows(X, bias, low, Y, weights, parts, S):
        # Y[m, n] = max(bias[n] + sum_j values[j] X[m, edges[c] + indices[j]], low): the vectors lie
        # along the weights.  X (M, K), Y (M, N), bias (16 groups,), scratch S (M, 16 groups)
        values, indices, counts, starts, edges = weights
        M, K = X.shape
        N = Y.shape[1]
        chunks, size = counts.shape
        groups = (size + rows_of_group - 1) // rows_of_group
        for task in prange(M * parts):
            m, part = task // parts, task % parts
            g_lo, g_hi = groups * part // parts, groups * (part + 1) // parts
            sums, y = S[m], Y[m]
            for n in range(g_lo * _GROUP, g_hi * _GROUP):
                sums[n] = bias[n]
            for c in range(chunks):
                j, ix = np.int64(starts[c * groups + g_lo]), m * K + np.int64(edges[c])
                for r in range(g_lo * rows_of_group, min(size, g_hi * rows_of_group)):
                    end = j + np.int64(counts[c, r])
                    acc = simd.zeros(1, 1, X)
                    while j + together <= end:
                        acc = simd_sparse.dot_at(acc, values, j * R, X, ix, indices, j, R, 0)
                        j += together
                    if j < end:
                        acc = simd_sparse.dot_at(acc, values, j * R, X, ix, indices, j, R, end - j)
                        j = end
                    simd_sparse.add_folded(acc, R, sums, r * R)
            for n in range(g_lo * _GROUP, min(N, g_hi * _GROUP)):
                y[n] = low if sums[n] < low else sums[n]

    return rows


@cache
def rows_kernel(block: int) -> Variants:
    """The kernel for a linear layer of few rows."""
    return Variants(_rows(block))


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

    How the work is cut, and with it the rounding, depends on the sizes only. The threads share the
    tasks, each with scratch of its own.
    """
    registers = simd.TILE[0] * simd.TILE[1]
    most = max(1, min(_BLOCK_PIXELS // _LANES, registers // block))
    sizes = {most, -(-most // 4)}
    vectors = min(sizes, key=lambda v: (-(-pixels // (v * _LANES)) * (v + 0.5), -v))
    width = vectors * _LANES
    groups = -(-channels // _GROUP)
    parts = -(-channels * width * 4 // _SUMS_BYTES)
    blocks = -(-pixels // width)
    if threads:
        parts = max(parts, -(-_TASKS // blocks))
    parts = min(parts, groups)
    slots = max(1, min(threads, blocks * parts))
    return Plan(vectors, parts, slots, images >= width)


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
    run(x, added, low, y, packed[2:], min(len(added) // _GROUP, _TASKS), sums)
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
    depth = int(np.diff(packed.edges).max())
    rows = -(-len(added) // (how.parts * _GROUP)) * _GROUP
    table = (*win.kernel, *win.stride, win.padding[0][0], win.padding[1][0], *win.dilation)
    kernel(packed.block, how.vectors).choose(work)(
        x,
        added,
        np.float32(0 if relu else -np.inf),
        y,
        packed[2:],
        table,
        how.batch_first,
        how.parts,
        x.shape[1:3] == y.shape[1:3] == (1, 1),
        _aligned((how.slots, depth, width), x.dtype),
        _aligned((how.slots, rows, width), x.dtype),
        np.empty((how.slots, 5, width), np.int64),
    )


def _operands(name: str, x: np.ndarray, bias: np.ndarray | None, channels: int) -> Any:
    """x as kernels take it, and bias filled up to whole groups."""
    added = np.zeros(-(-channels // _GROUP) * _GROUP, np.float32)
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
