"""8-bit layers as calls of a `Program`: see `kernels.int8` for the arithmetic.

Each function appends its calls; operands and results are slots of uint8 (results of float32 where
the layer's scaling says so). `scratch`: a slot of as many bytes as the function beside says, or
None where that is 0.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math

import numpy as np
from numba import prange

from kernels import (
    elementwise,
    int8,
    int8_conv,
    int8_depthwise,
    int8_pool,
    int8_product,
    pool,
    prepack,
)
from kernels._jit import Variants
from kernels.geometry import Window
from kernels.int8 import Addition, Scaling
from kernels.int8_conv import Convolution
from kernels.int8_depthwise import Depthwise
from kernels.int8_product import Linear
from kernels.program import Program, Slot

_BYTE = np.dtype(np.uint8)
_ROWS = 64  # of a task


def _flat(slot: Slot) -> Slot:
    return slot.reshape(-1)


def _quads(size: int) -> int:
    """How many multiply-adds of float32 take as long as so many of bytes."""
    return size // 4


# --- products and convolutions --------------------------------------------------------------------


def linear_scratch(layer: Linear, rows: int) -> int:
    """Bytes for so many rows: fewer than four numbers are copied to four."""
    return 4 * rows if layer.inputs < 4 else 0


def linear(program: Program, layer: Linear, x: Slot, y: Slot, scratch: Slot | None) -> None:
    """y (M, N) = `int8_product.linear` of x (M, K)."""
    rows = x.shape[0]
    if scratch is not None:
        wide = scratch._replace(shape=(4 * rows,), dtype=_BYTE)
        sizes = (rows, layer.inputs, 1, rows, 4, 0, 0)
        program.add(int8_conv.PAD, x.nbytes, _flat(x), wide, 0, sizes, tasks=1)
        x = wide
    for call in layer.calls(rows):
        program.add(
            int8_product.tile_kernel(call.mr, call.nr, call.wide),
            _quads(rows * layer.inputs * call.sizes[4]),
            _flat(x), layer.panels.weights(call.wide), layer.base, *layer.scaling[:4],
            _flat(y), call.sizes, tasks=call.tasks,
        )  # fmt: skip


def conv2d_scratch(layer: Convolution, images: int, height: int, width: int) -> int:
    """Bytes for so many images of this size, where they are copied."""
    if layer.pointwise is not None:
        return linear_scratch(layer.pointwise, images * height * width)
    at = layer.placed(height, width)
    if at.copy is None:
        return 0
    return (images * at.scratch + int8_conv.SLACK) * at.dtype.itemsize


def conv2d(program: Program, layer: Convolution, x: Slot, y: Slot, scratch: Slot | None) -> None:
    """y (B, OH, OW, N) = `int8_conv.conv2d` of x (B, H, W, C)."""
    images, height, width = x.shape[:3]
    if layer.pointwise is not None:
        rows, results = (s.reshape(-1, s.shape[3]) for s in (x, y))
        return linear(program, layer.pointwise, rows, results, scratch)
    at = layer.placed(height, width)
    source = _flat(x)
    if at.copy is not None:
        assert scratch is not None
        source = scratch._replace(shape=(images * at.scratch + int8_conv.SLACK,), dtype=at.dtype)
        sizes = _flat(x), source, layer.x_zero, at.copy
        program.add(at.pad, source.nbytes, *sizes, tasks=images)
    macs = math.prod(y.shape) * math.prod(layer.win.kernel) * layer.inputs
    for call, columns in layer.calls(images, height, width):
        program.add(
            int8_conv.tile_kernel(call.mr, call.nr, call.wide), _quads(macs),
            source, layer.panels.weights(call.wide), at.base, *layer.scaling[:4], _flat(y),
            call.sizes, at.rows, columns, at.cases, tasks=call.tasks,
        )  # fmt: skip
    return None


def depthwise2d(program: Program, layer: Depthwise, x: Slot, y: Slot, scratch: Slot | None) -> None:
    """y (B, OH, OW, C R) = `int8_depthwise.depthwise2d` of x (B, H, W, C).

    scratch: R copies of x, where R > 1.
    """
    images, height, width, channels = x.shape
    at = layer.placed(height, width)
    if layer.factor > 1:
        assert scratch is not None
        copies = scratch._replace(shape=(*x.shape[:3], channels * layer.factor), dtype=_BYTE)
        prepack.repeat(program, x, layer.factor, copies)
        x = copies
    parts = int8_depthwise.parts(images, at.output[0])
    program.add(
        int8_depthwise.tile_kernel(*at.tile), x.nbytes + y.nbytes,
        _flat(x), layer.packed, at.base, *layer.scaling[:4], _flat(y),
        (*at.sizes, parts), at.lines, at.cases, tasks=images * parts,
    )  # fmt: skip


def scale_shift(program: Program, layer: Depthwise, x: Slot, y: Slot) -> None:
    """y (..., C) = x times a factor and plus a summand for each channel: windows of one pixel."""
    images, *inner, channels = x.shape
    if not inner:
        images, inner = 1, [images]
    shape = images, math.prod(inner[:-1]), inner[-1], channels
    depthwise2d(program, layer, x.reshape(*shape), y.reshape(*shape), None)


# --- pools ----------------------------------------------------------------------------------------


def max_pool2d(program: Program, x: Slot, y: Slot, win: Window) -> None:
    """The largest byte under each window."""
    (ys, xs), _ = pool._tables(*x.shape[1:3], win, np.float32)
    parts = pool._parts(y.shape)
    program.add(
        int8_pool.LARGEST_OF, x.nbytes + y.nbytes,
        _flat(x), _flat(y), (*x.shape[1:], *y.shape[1:3], parts),
        ys.at, ys.source, xs.at, xs.source, tasks=x.shape[0] * parts,
    )  # fmt: skip


def avg_pool2d(
    program: Program, x: Slot, x_zero: int, table: np.ndarray, how: Scaling, win: Window, y: Slot
) -> None:
    """The sum under each window of T pixels inside the image, times table[T], as `how` says."""
    (ys, xs), _ = pool._tables(*x.shape[1:3], win, np.float32)
    parts = pool._parts(y.shape)
    program.add(
        int8_pool.mean_kernel(int8_pool.vectors(y.shape[3])), x.nbytes + y.nbytes,
        _flat(x), x_zero, table, *how[1:4], _flat(y), (*x.shape[1:], *y.shape[1:3], parts),
        ys.at, ys.source, xs.at, xs.source, tasks=x.shape[0] * parts,
    )  # fmt: skip


# --- element by element ---------------------------------------------------------------------------


def quantize(program: Program, x: Slot, y: Slot, scale: float, zero: int, top: int) -> None:
    """y = `int8.quantize` of x float32, to bytes 0 ... `top`."""
    numbers = np.float32(scale), np.float32(-zero), np.float32(top - zero), zero
    tasks = int8.chunks(math.prod(x.shape))
    program.add(int8.QUANTIZE, x.nbytes, _flat(x), _flat(y), *numbers, tasks=tasks)


def dequantize(program: Program, x: Slot, y: Slot, scale: float, zero: int) -> None:
    """y float32 = (x - zero) scale."""
    tasks = int8.chunks(math.prod(x.shape))
    program.add(int8.DEQUANTIZE, y.nbytes, _flat(x), _flat(y), np.float32(scale), zero, tasks=tasks)


def add(program: Program, a: Slot, b: Slot, y: Slot, how: Addition) -> None:
    """y = `int8.add` of a and b; y may be one of them."""
    tasks = int8.chunks(math.prod(y.shape))
    numbers = _flat(a), *how[:2], _flat(b), *how[2:8], _flat(y)
    program.add(int8.ADD, 3 * y.nbytes, *numbers, tasks=tasks)


def _at_least_loop(X, low, Y, first, last):
    # Y[i] = max(X[i], low);  X, Y (n,) uint8;  tasks are chunks
    for task in prange(first, last):
        for i in range(task * int8._CHUNK, min(len(X), (task + 1) * int8._CHUNK)):
            Y[i] = max(X[i], low)


def _columns_loop(X, offset, Y, first, last):
    # Y[m, offset + c] = X[m, c];  X (M, C), Y (M, N) uint8;  tasks are blocks of rows
    for task in prange(first, last):
        for m in range(task * _ROWS, min(len(X), (task + 1) * _ROWS)):
            C = X.shape[1]
            int8.copy_bytes(X, m * C, Y, m * Y.shape[1] + offset, C)


def _frame_loop(X, i0, j0, k0, value, Y, first, last):
    # Y[i, j, k] = X[i - i0, j - j0, k - k0] where that lies in X, else value;  uint8
    # tasks are blocks of rows (i, j)
    N, M, K = X.shape
    rows, width = Y.shape[1:]
    for task in prange(first, last):
        for at in range(task * _ROWS, min(Y.shape[0] * rows, (task + 1) * _ROWS)):
            i, j = at // rows - i0, at % rows - j0
            if 0 <= i < N and 0 <= j < M:
                int8.fill_bytes(value, Y, at * width, k0)
                int8.copy_bytes(X, (i * M + j) * K, Y, at * width + k0, K)
                int8.fill_bytes(value, Y, at * width + k0 + K, width - k0 - K)
            else:
                int8.fill_bytes(value, Y, at * width, width)


def _scatter_loop(X, P, value, Y, first, last):
    # Y[m, P[c]] = X[m, c], elsewhere value;  X (M, C), Y (M, N) uint8, P (C,)
    # tasks are blocks of rows
    C, N = X.shape[1], Y.shape[1]
    for task in prange(first, last):
        for m in range(task * _ROWS, min(len(X), (task + 1) * _ROWS)):
            int8.fill_bytes(value, Y, m * N, N)
            for c in range(C):
                Y[m, P[c]] = X[m, c]


_at_least = Variants(_at_least_loop)
_columns = Variants(_columns_loop)
_frame = Variants(_frame_loop)
_scatter = Variants(_scatter_loop)


def relu(program: Program, x: Slot, y: Slot, zero: int) -> None:
    """y = max(x, zero); y may be x."""
    tasks = int8.chunks(math.prod(x.shape))
    program.add(_at_least, 2 * x.nbytes, _flat(x), zero, _flat(y), tasks=tasks)


def concat(program: Program, parts: list[Slot], y: Slot) -> None:
    """The parts side by side along the last axis."""
    offset = 0
    for x in parts:
        rows = [s.reshape(-1, s.shape[-1]) for s in (x, y)]
        tasks = -(-rows[0].shape[0] // _ROWS)
        program.add(_columns, 2 * x.nbytes, rows[0], offset, rows[1], tasks=tasks)
        offset += x.shape[-1]


def scatter(program: Program, x: Slot, places: np.ndarray, value: int, y: Slot) -> None:
    """Channel c of x (last axis) at places[c] of y, an int32 each; bytes `value` elsewhere."""
    rows = [s.reshape(-1, s.shape[-1]) for s in (x, y)]
    tasks = -(-rows[0].shape[0] // _ROWS)
    program.add(_scatter, x.nbytes + y.nbytes, rows[0], places, value, rows[1], tasks=tasks)


def frame(
    program: Program, x: Slot, widths: tuple[tuple[int, int], ...], value: int, y: Slot
) -> None:
    """x with bytes `value` around it, widths[i] = (before, after) of axis i, three at most."""
    inner, around = elementwise._merged(x.shape, widths)
    outer = [n + b + a for n, (b, a) in zip(inner, around, strict=True)]
    starts = [b for b, _ in around]
    tasks = -(-outer[0] * outer[1] // _ROWS)
    program.add(
        _frame, x.nbytes + y.nbytes,
        x.reshape(*inner), *starts, value, y.reshape(*outer), tasks=tasks,
    )  # fmt: skip
