"""Linear layers and pointwise convolutions of bytes: y = result of x w + bias; see `kernels.int8`.

    s[m, n] = bias[n] + sum_k (x[m, k] - x_zero) w[k, n]
            = base[n] + sum_k x[m, k] w[k, n],  base[n] = bias[n] - x_zero sum_k w[k, n]

A register tile holds mr rows times nr vectors of sums of int32. In each step it takes four bytes of
each row of x and four rows of w, and does four multiply-adds in each lane (`simd_int.dot4`).
Weights are packed for that: quads of rows side by side, in panels of nr vectors of columns.

Where K is not a multiple of four, the last quad covers the last four bytes of a row, and its
weights are 0 for those that earlier quads have had: nothing beyond a row is read. The last tile of
rows moves back over rows already done, and stores only what is new.

Where a level WIDENS, a block of several rows of x is widened to int16 before the tiles pass over
it, and its weights when they are packed, as pairs instead of quads. One row, for which reading the
weights is the work, has them as bytes.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from kernels import int8, simd, simd_int, simd_int16
from kernels._jit import Variants
from kernels._levels import WIDENS
from kernels.int8 import Scaling, checked_sums, fitted, operand, result, widened
from kernels.product import _aligned

_BLOCK_BYTES = 192 * 1024  # of x, which stay in the second-level cache beside a panel
_BLOCK_ROWS = 240  # at most, so that threads share the work evenly
_TASKS = 16  # wanted at least
_HEIGHTS = (12, 8, 7, 6, 4, 3, 2, 1)  # of tiles
_WIDENED = 16 * 1024  # numbers of x, in the first-level cache and on the stack
_WIDE_ROWS = 6  # at least, that share widened weights


# --- packed weights, of convolutions too ----------------------------------------------------------


class Part(NamedTuple):
    """Columns first <= n < first + cols of the weights, in panels of nr vectors."""

    nr: int
    first: int
    cols: int
    panels: int
    origin: int  # of the first panel in the packed array


@dataclass(frozen=True)
class Panels:
    """Weights (T, K, N) as [part][panel][tap][quad][column][4], flat; `quads` of each tap."""

    packed: np.ndarray
    quads: int
    parts: tuple[Part, ...]

    @cached_property
    def widened(self) -> np.ndarray:
        """The same as int16, [part][panel][tap][pair][column][2]: a quad is two pairs."""
        wide = _aligned(self.packed.shape, np.dtype(np.int16))
        ends = [*(part.origin for part in self.parts[1:]), self.packed.size]
        for part, end in zip(self.parts, ends, strict=True):
            quads = self.packed[part.origin : end].reshape(-1, part.nr * simd.LANES, 2, 2)
            wide[part.origin : end] = quads.swapaxes(1, 2).reshape(-1)
        return wide

    def weights(self, wide: bool) -> np.ndarray:
        """As kernels of either kind take them."""
        return self.widened if wide else self.packed


def cut(channels: int, rows: int) -> tuple[Part, ...]:
    """Panels as wide as the registers allow, and one for what is left; `rows` of each column."""
    lanes, most = simd.LANES, simd.TILE[1]
    rest = channels % (most * lanes)
    parts = []
    if channels > rest:
        parts.append(Part(most, 0, channels - rest, channels // (most * lanes), 0))
    if rest:
        origin = rows * (channels - rest)
        parts.append(Part(-(-rest // lanes), channels - rest, rest, 1, origin))
    return tuple(parts)


def pack(w: np.ndarray, shifted: bool) -> Panels:
    """w (T, K, N) int8. `shifted`: the last quad covers rows K - 4 ... K - 1, else it is filled up.

    Rows that an earlier quad has covered have weight 0 in the last.
    """
    taps, depth, channels = w.shape
    quads, rest = -(-depth // 4), depth % 4
    filled = np.zeros((taps, 4 * quads, channels), np.int8)
    filled[:, :depth] = w
    if shifted and rest:
        filled[:, depth - rest :] = 0
        filled[:, 4 * quads - rest :] = w[:, depth - rest :]
    parts = cut(channels, taps * 4 * quads)
    sizes = [p.panels * p.nr * simd.LANES * taps * 4 * quads for p in parts]
    packed = _aligned((sum(sizes),), np.dtype(np.int8))
    for part, size in zip(parts, sizes, strict=True):
        width = part.nr * simd.LANES
        columns = np.zeros((taps, 4 * quads, part.panels * width), np.int8)
        columns[..., : part.cols] = filled[..., part.first : part.first + part.cols]
        panels = columns.reshape(taps, quads, 4, part.panels, width).transpose(3, 0, 1, 4, 2)
        packed[part.origin : part.origin + size] = panels.reshape(-1)
    return Panels(packed, quads, parts)


def height(rows: int, nr: int, most: int) -> int:
    """Rows of a tile of nr vectors that do the least superfluous work, at most `rows`."""
    fitting = [
        h for h in _HEIGHTS if h <= min(rows, most) and h * nr <= simd.TILE[0] * simd.TILE[1]
    ]
    return min(fitting, key=lambda h: (-(-rows // h) * max(h * nr, 5), -h))


# --- kernel ---------------------------------------------------------------------------------------


def _tiles(mr: int, nr: int, wide: bool) -> Any:
    per = 2 if wide else 4
    dot: Any = simd_int16.dot2 if wide else simd_int.dot4
    most = _WIDENED

    def tiles(X, P, base, scale, low, high, zero, Y, sizes, first_task, last_task):
        # Y[m N + first + n] = result of base[first + n] + sum_k X[m K + k] w[k, first + n]
        # X (M K,) uint8, P packed weights, base, scale (N filled up,), Y (M N,) uint8 or float32
        # sizes: M, K, N, first, cols, origin of the panels, rows of a block, groups of panels
        # wide: P as int16, at most `_WIDENED` numbers in a block of X
        # tasks are blocks x groups
        M, K, N, first, cols, origin, block, groups = sizes
        L = simd.lanes(base)
        W = nr * L
        quads, tail = K // 4, K % 4 > 0
        panels = (cols + W - 1) // W
        depth = (quads + 1 if tail else quads) * 4 * W  # of a panel, in numbers
        for task in prange(first_task, last_task):
            r, g = task // groups, task % groups
            A, a0 = X, 0
            if wide:
                A, a0 = simd_int16.scratch(most), min(r * block, M - mr)
                int8.widen_bytes(X, a0 * K, A, 0, (min(M, r * block + block) - a0) * K)
            for p in range(panels * g // groups, panels * (g + 1) // groups):
                n, part = first + p * W, min(W, cols - p * W)
                for m in range(r * block, min(M, r * block + block), mr):
                    start = min(m, M - mr)
                    acc = simd.add(simd.zeros(mr, nr, base), simd.load(1, nr, base, n, 0))
                    ix, ip = (start - a0) * K, origin + p * depth
                    for _ in range(quads * (4 // per)):
                        simd.rolled()
                        acc = dot(acc, A, ix, K, P, ip)
                        ix += per
                        ip += per * W
                    if tail:
                        ix = (start - a0) * K + K - 4
                        acc = dot(acc, A, ix, K, P, ip)
                        if wide:
                            acc = dot(acc, A, ix + 2, K, P, ip + 2 * W)
                    by = simd.load(1, nr, scale, n, 0)
                    iy = start * N + n
                    if start == m and part == W:
                        simd_int.store_scaled(acc, by, low, high, zero, Y, iy, N)
                    else:
                        simd_int.store_scaled_part(
                            acc, by, low, high, zero, Y, iy, N, m - start, mr, part
                        )

    return tiles


@cache
def tile_kernel(mr: int, nr: int, wide: bool = False) -> Variants:
    """X, P, base, scale, low, high, zero, Y, sizes, first, last: see the formula above."""
    return Variants(_tiles(mr, nr, wide))


class Call(NamedTuple):
    """One call of a kernel: its tile, its sizes (a tuple of numbers), its number of tasks."""

    mr: int
    nr: int
    sizes: tuple[int, ...]
    tasks: int
    wide: bool  # whether numbers and weights are int16


# --- public ---------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """A packed layer: what `pack_linear` gives."""

    inputs: int
    outputs: int
    panels: Panels
    base: np.ndarray
    scaling: Scaling

    def calls(self, rows: int) -> tuple[Call, ...]:
        """The calls of `tile_kernel` that make up the layer for this many rows of x."""
        return _calls(rows, max(4, self.inputs), self.outputs, self.panels.parts)


@lru_cache(1024)
def _calls(rows: int, depth: int, channels: int, parts: tuple[Part, ...]) -> tuple[Call, ...]:
    calls = []
    for part in parts:
        mr = height(rows, part.nr, simd.ROWS[part.nr])
        wide = WIDENS and rows >= _WIDE_ROWS and mr * depth <= _WIDENED
        most, panels = min(_BLOCK_ROWS, _BLOCK_BYTES // depth), part.panels
        if wide:  # each task widens its rows: for several panels, so of fewer rows rather
            most = min(most, _WIDENED // depth, max(4 * mr, -(-rows // _TASKS)))
            panels //= 4
        most = max(mr, most // mr * mr)
        block = -(-rows // (-(-rows // most) * mr)) * mr
        blocks = -(-rows // block)
        groups = max(1, min(panels, _TASKS // blocks))
        sizes = (rows, depth, channels, part.first, part.cols, part.origin, block, groups)
        calls.append(Call(mr, part.nr, sizes, blocks * groups, wide))
    return tuple(calls)


def pack_linear(w: np.ndarray, bias: np.ndarray | None, x_zero: int, scaling: Scaling) -> Linear:
    """A linear layer of w (K, N) int8, bias (N,) int32 or None, inputs with this zero point.

    Also a pointwise convolution. Raises TypeError and ValueError for other arrays, OverflowError
    where sums could leave int32.
    """
    if w.ndim != 2 or not w.size:
        raise ValueError(f"pack_linear: expected w (K, N), not empty, got {w.shape}")
    taps, added, most = checked_sums("pack_linear", w[None], bias, x_zero)
    base = widened((added - x_zero * taps[0]).astype(np.int32), np.int32)  # may wrap around
    how = fitted("pack_linear", scaling, most)
    how = how._replace(multiplier=widened(how.multiplier, np.float32))
    panels = pack(w[None], len(w) > 4)
    return Linear(w.shape[0], w.shape[1], panels, base, how)


def linear(x: np.ndarray, layer: Linear, *, out: np.ndarray | None = None) -> np.ndarray:
    """x (..., K) uint8 -> (..., N), uint8 or float32 as the layer's scaling says.

    Raises ValueError for shapes that do not fit, TypeError for another dtype.
    """
    if not x.ndim or x.shape[-1] != layer.inputs:
        raise ValueError(f"linear: expected x (..., {layer.inputs}), got {x.shape}")
    x = operand("linear", x)
    y = result("linear", (*x.shape[:-1], layer.outputs), layer.scaling.dtype, out)
    rows = x.size // layer.inputs
    if not rows:
        return y
    if layer.inputs < 4:
        wide = np.zeros((rows, 4), np.uint8)
        wide[:, : layer.inputs] = x.reshape(rows, layer.inputs)
        x = wide
    for call in layer.calls(rows):
        work = rows * layer.inputs * call.sizes[4] // 4
        tile_kernel(call.mr, call.nr, call.wide).choose(work)(
            x.reshape(-1),
            layer.panels.weights(call.wide),
            layer.base,
            *layer.scaling[:4],
            y.reshape(-1),
            call.sizes,
            0,
            call.tasks,
        )
    return y
