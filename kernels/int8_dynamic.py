"""Ranges that are found at run time: from float32 to bytes and back, each image by itself.

The numbers x of image b are rounded to the grid of `bits` bits that covers them and 0,

    scale[b] = (max(x, 0) - min(x, 0)) / steps,  steps = 2^bits - 1        as float32
    low[b]   = max(round(min(x, 0) / scale[b]), -steps)
    q        = min(max(round(x / scale[b]), low[b]), low[b] + steps) - low[b]

(DynamicQuantizeLinear of ONNX, but that there one grid is for a whole batch; where the scale is
below the smallest normal number it is 1, and low 0.) A layer then needs the integer sums

    s[n] = sum_k (q[k] + low[b]) w[k, n] = sum_k (q[k] - 128) w[k, n] + (128 + low[b]) sum_k w[k, n]

over the taps k inside the image. The first sum is that of `kernels.int8` with zero point 128 for
all images, which leaves it as float32; the second is known but for its factor, and is added after:

    f = float32(s') + (128 + low[b]) sum_k w[k, n],   y[n] = f (scale[b] w_scale[n]) + bias[n]

in float32, each of the three factors and sums rounded once. As long as sums stay below 2^24, f is
exact, and the bits are those of every processor that has a fused multiply-add. An image with
numbers that are not finite has a scale of NaN, and its result is NaN.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import prange

from kernels import simd, simd_int
from kernels._jit import Variants, jit
from kernels.int8 import widened
from kernels.program import Program, Slot

CHUNK = 4096  # numbers of an image that a task covers
ZERO = 128  #: the zero point of the integer sums
_BYTE, _FLOAT = np.dtype(np.uint8), np.dtype(np.float32)
_SMALLEST = float(np.finfo(np.float32).tiny)
_TASKS = 16  # wanted at least, of those that finish an image


def pieces(size: int) -> int:
    """The number of tasks for an image of so many numbers."""
    return -(-size // CHUNK)


# --- kernels --------------------------------------------------------------------------------------


def _range_loop(X, R, size, first, last):
    # R[2 task] = the largest of some numbers and 0, R[2 task + 1] = the smallest, if below 0
    # X (images, size), the bits of float32 as int32, R int32 likewise, both flat
    # Positive numbers are ordered as their bits; so are the magnitudes of negative ones, which lie
    # above all others where bits are unsigned. NaN lies beyond infinity, either way.
    parts = (size + CHUNK - 1) // CHUNK
    for task in prange(first, last):
        start = task // parts * size + task % parts * CHUNK
        x = X[start : start + min(CHUNK, size - task % parts * CHUNK)]
        most, least = np.int32(0), np.uint32(0)
        for i in range(len(x)):
            most = max(most, x[i])
            least = max(least, np.uint32(x[i]))
        R[2 * task] = most
        R[2 * task + 1] = np.int32(least)


@jit
def _grid(R, first, parts, steps):
    # scale and low of an image from the ranges of its parts; a scale of NaN if they are not finite
    most, least, finite = 0.0, 0.0, True
    for p in range(first, first + parts):
        finite = finite and abs(R[2 * p]) < math.inf and abs(R[2 * p + 1]) < math.inf
        most, least = max(most, R[2 * p]), min(least, R[2 * p + 1])
    if not finite:
        return np.float32(math.nan), 0.0
    scale = np.float32((most - least) / steps)
    if not scale >= _SMALLEST:
        return np.float32(1), 0.0
    return scale, max(-steps, np.rint(least / np.float64(scale)))


def _quantize_loop(X, R, Q, G, size, steps, first, last):
    # Q[b, i] = q of X[b, i], G[b] = (scale, 128 + low), by the ranges R of the parts of image b
    # X (images, size) float32, Q uint8, G (images, 2) float32, all flat;  tasks are those parts
    W = 4 * simd.lanes(X)
    parts = (size + CHUNK - 1) // CHUNK
    for task in prange(first, last):
        b, part = task // parts, task % parts
        scale, least = _grid(R, b * parts, parts, steps)
        if part == 0:
            G[2 * b], G[2 * b + 1] = scale, np.float32(ZERO + least)
        low, high = np.float32(least), np.float32(least + steps)
        zero = int(-least)
        by, one = simd_int.of_float(scale), simd_int.of_float(1)
        end = b * size + min(size, (part + 1) * CHUNK)
        for i in range(b * size + part * CHUNK, end, W):
            if i + W <= end:
                x = simd_int.div(simd.load(1, 4, X, i, 0), by)
                simd_int.store_scaled(x, one, low, high, zero, Q, i, 0)
            else:
                x = simd_int.div(simd.load_part(1, 4, X, i, 0, 0, 1, end - i), by)
                simd_int.store_scaled_part(x, one, low, high, zero, Q, i, 0, 0, 1, end - i)


def _rounded_loop(X, R, Y, size, steps, first, last):
    # Y[b, i] = the number on the grid that is next to X[b, i];  X, R, tasks as above, Y float32
    parts = (size + CHUNK - 1) // CHUNK
    for task in prange(first, last):
        b, part = task // parts, task % parts
        scale, least = _grid(R, b * parts, parts, steps)
        low, high = np.float32(least), np.float32(least + steps)
        start = b * size + part * CHUNK
        x = X[start : b * size + min(size, (part + 1) * CHUNK)]
        y = Y[start : start + len(x)]
        for i in range(len(x)):
            y[i] = min(max(np.rint(x[i] / scale), low), high) * scale


def _finished_loop(Y, G, S, cases, scale, bias, low, sizes, first, last):
    # Y[b, y, x, n] = max(low, (Y[b, y, x, n] + G[b, 1] S[v, n]) (G[b, 0] scale[n]) + bias[n])
    # v = cases[y] + cases[OH + x];  Y (B, OH, OW, N), G (B, 2), flat
    # S (cases, N filled up), scale, bias (N filled up,);  tasks are images x parts of their rows
    OH, OW, N, parts = sizes
    L, wide = simd.lanes(Y), S.shape[1]
    floor = simd_int.of_float(low)
    for task in prange(first, last):
        b, part = task // parts, task % parts
        by, more = simd_int.of_float(G[2 * b]), simd_int.of_float(G[2 * b + 1])
        for y in range(OH * part // parts, OH * (part + 1) // parts):
            for n in range(0, N, L):
                at, v = (b * OH + y) * OW * N + n, -1
                each, shift = (
                    simd.mul(simd.load(1, 1, scale, n, 0), by),
                    simd.load(1, 1, bias, n, 0),
                )
                sums = shift
                for x in range(OW):
                    case = cases[y] + cases[OH + x]
                    if case != v:
                        v, sums = case, simd.load(1, 1, S, case * wide + n, 0)
                    if n + L <= N:
                        f = simd.fma(simd.load(1, 1, Y, at, 0), sums, more)
                        f = simd.maximum(simd.fma(shift, f, each), floor)
                        simd.store(f, Y, at, 0)
                    else:
                        f = simd.load_part(1, 1, Y, at, 0, 0, 1, N - n)
                        f = simd.maximum(simd.fma(shift, simd.fma(f, sums, more), each), floor)
                        simd.store_part(f, Y, at, 0, 0, 1, N - n)
                    at += N


_range = Variants(_range_loop)
_quantize = Variants(_quantize_loop)
_rounded = Variants(_rounded_loop)
_finished = Variants(_finished_loop)


# --- calls ----------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Scratch of a batch: x in bytes, ranges of its parts, (scale, 128 + low) of each image."""

    q: Slot
    ranges: Slot
    grids: Slot


def scratch(size: int) -> int:
    """Numbers of four bytes that `Work` takes for an image of `size` numbers."""
    return -(-size // 4) + 2 * pieces(size) + 2


def carved(memory: Slot, x: Slot) -> tuple[Work, Slot]:
    """`Work` for x (B, ...), and what is left of the memory behind it."""
    images, size = x.shape[0], math.prod(x.shape[1:])
    found, at = [], memory.offset
    for shape, dtype in (
        ((images * 2,), _FLOAT),
        ((images * 2 * pieces(size),), _FLOAT),
        (x.shape, _BYTE),
    ):
        found.append(Slot(memory.base, at, shape, dtype))
        at += -(-found[-1].nbytes // 4) * 4
    grids, ranges, q = found
    return Work(q, ranges, grids), memory._replace(offset=at)


def _ranges(program: Program, x: Slot, work: Work) -> tuple[int, int]:
    """Find the ranges of x; the size of an image, and the tasks of all."""
    images, size = x.shape[0], math.prod(x.shape[1:])
    tasks = images * pieces(size)
    numbers = [s.reshape(-1)._replace(dtype=np.dtype(np.int32)) for s in (x, work.ranges)]
    program.add(_range, x.nbytes, *numbers, size, tasks=tasks)
    return size, tasks


def quantize(program: Program, x: Slot, work: Work, bits: int) -> None:
    """work.q = the bytes of x float32, each image on the grid of `bits` bits that it needs."""
    size, tasks = _ranges(program, x, work)
    results = work.ranges, work.q.reshape(-1), work.grids
    steps = 2.0**bits - 1
    program.add(_quantize, x.nbytes, x.reshape(-1), *results, size, steps, tasks=tasks)


def rounded(program: Program, x: Slot, work: Work, y: Slot, bits: int) -> None:
    """y = x, each image rounded to the grid of `bits` bits that it needs; y may be x."""
    size, tasks = _ranges(program, x, work)
    steps = 2.0**bits - 1
    program.add(
        _rounded, 2 * x.nbytes,
        x.reshape(-1), work.ranges, y.reshape(-1), size, steps, tasks=tasks,
    )  # fmt: skip


class Finish(NamedTuple):
    """What `finished` needs: sums of weights by case, (cases, N), and the case of each pixel."""

    sums: np.ndarray
    cases: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def finish(
    sums: np.ndarray, cases: np.ndarray, scale: np.ndarray, bias: np.ndarray | None
) -> Finish:
    """Of sums (cases, N), cases as `int8_conv.beginnings` gives them, w_scale (N,), bias (N,)."""
    none = np.zeros(len(scale), np.float32)
    vectors = [widened(a, np.float32) for a in (scale, none if bias is None else bias)]
    return Finish(widened(sums, np.float32), cases, *vectors)


def finished(program: Program, y: Slot, work: Work, how: Finish, relu: bool) -> None:
    """From sums s' in y (B, OH, OW, N) float32 to the layer's result, through ReLU if asked."""
    images, rows, columns, channels = y.shape
    parts = min(rows, max(1, _TASKS // images))
    low = np.float32(0 if relu else -math.inf)
    program.add(
        _finished, 2 * y.nbytes,
        y.reshape(-1), work.grids, *how, low, (rows, columns, channels, parts),
        tasks=images * parts,
    )  # fmt: skip
