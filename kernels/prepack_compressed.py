"""Layers on compressed weights as calls of a `Program`: see `kernels.prepack`, of `onto`, too.

Scratch is one slot of bytes that the caller provides, of the size that the function beside says.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kernels import conv, decoded, simd, sparse
from kernels.geometry import Window
from kernels.prepack import Packed, _bias, _low, depthwise2d
from kernels.program import ALIGNMENT, Program, Slot

_BYTES = np.dtype(np.uint8)


class Carver:
    """Cuts slots out of a slot of bytes, or counts what they would take without one."""

    def __init__(self, scratch: Slot | None = None) -> None:
        self._scratch = scratch
        self.nbytes = 0

    def take(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Slot:
        """The next piece, at the start of a cache line."""
        kind = np.dtype(dtype)
        base, at = (0, 0) if self._scratch is None else self._scratch[:2]
        slot = Slot(base, at + self.nbytes, shape, kind)
        self.nbytes += -(-math.prod(shape) * kind.itemsize // ALIGNMENT) * ALIGNMENT
        return slot


def _sparse_plan(w: sparse.Sparse, y: Slot) -> sparse.Plan:
    return sparse.plan(math.prod(y.shape[:3]), y.shape[0], y.shape[3], w.block, 0)


def _sparse_scratch(w: sparse.Sparse, y: Slot, few: bool, carve: Carver) -> list[Slot]:
    groups = -(-y.shape[3] // sparse.GROUP)
    if few:
        return [carve.take((math.prod(y.shape[:3]), groups * sparse.GROUP))]
    how = _sparse_plan(w, y)
    width = how.vectors * sparse._LANES
    rows = -(-groups // how.parts) * sparse.GROUP
    return [
        carve.take((1, w.depth, width)),
        carve.take((1, rows, width)),
        carve.take((1, 5, width), np.int64),
    ]


def sparse2d(
    program: Program | None,
    packed: Packed,
    x: Slot,
    w: sparse.Sparse,
    bias: np.ndarray | None,
    y: Slot,
    win: Window,
    relu: bool,
    onto: bool,
    carve: Carver,
) -> None:
    """y (B, OH, OW, N) = `sparse.conv2d` of x (B, H, W, C); without a program only counts scratch.

    A linear layer is the convolution of images of one pixel with a window of one.
    """
    pixels, flat = math.prod(y.shape[:3]), win == Window((1, 1))
    if flat:
        x, y = (s.reshape(pixels, 1, 1, s.shape[3]) for s in (x, y))
    few = flat and pixels <= sparse._FEW
    scratch = _sparse_scratch(w, y, few, carve)
    if program is None:
        return

    def padded() -> np.ndarray:
        return sparse._operands("sparse", np.zeros(1, np.float32), bias, y.shape[3])[1]

    added = packed.get("padded", padded)
    if few:
        rows = x.reshape(pixels, x.shape[3]), y.reshape(pixels, y.shape[3])
        parts = min(len(added) // sparse.GROUP, sparse._TASKS)
        kernel = sparse.rows_kernel(w.block)
        program.add(kernel, 0, rows[0], added, _low(relu), rows[1], w.arrays, parts, onto, *scratch)
        return
    how = _sparse_plan(w, y)
    table = (*win.kernel, *win.stride, win.padding[0][0], win.padding[1][0], *win.dilation)
    program.add(
        sparse.kernel(w.block, how.vectors), 0,
        x, added, _low(relu), y, w.arrays, table, how.batch_first, how.parts, flat, onto, *scratch,
    )  # fmt: skip


def decoded_linear(
    program: Program | None,
    packed: Packed,
    x: Slot,
    w: decoded.Stream,
    bias: np.ndarray | None,
    y: Slot,
    relu: bool,
    onto: bool,
    carve: Carver,
) -> None:
    """y (M, N) = x (M, K) times the weights (K, N) of a stream, decoded while it runs."""
    (M, K), N = x.shape, y.shape[1]
    added = _bias(packed, bias, N)
    if decoded.alone(M, N):
        if program is not None:
            program.add(
                decoded.rows_kernel(w.kind), 0,
                x, w.data, w.book, w.columns, added, _low(relu), y, N, onto,
            )  # fmt: skip
        return
    nr = 1 if N <= simd.LANES else simd.TILE[1]
    mr = 1 if simd.ROWS[nr] > M else simd.ROWS[nr]
    how = decoded.cut(K, N, nr)
    block = -(-M // (-(-M // decoded._BLOCK_ROWS) * mr)) * mr
    scratch = carve.take((1, how.size))
    if program is not None:
        program.add(
            decoded.product_kernel(w.kind, mr, nr), 0,
            x, w.data, w.book, w.columns, added, _low(relu),
            y.reshape(1, M, N), N, block, tuple(how), onto, scratch,
        )  # fmt: skip


def decoded_conv2d(
    program: Program | None,
    packed: Packed,
    x: Slot,
    w: decoded.Packed,
    bias: np.ndarray | None,
    y: Slot,
    win: Window,
    relu: bool,
    onto: bool,
    carve: Carver,
) -> None:
    """y (B, OH, OW, N) = `decoded.conv2d` of x (B, H, W, C); its calls run in order."""
    (K, N), (kind, data, book, columns) = decoded.matrix(w.shape), w.source
    added = _bias(packed, bias, N)
    calls = conv._calls(x.shape, y.shape, win, True, False, simd.LANES)
    scratch = carve.take((decoded.LEAD + K * max(call.part.width for call in calls),))
    if program is None:
        return
    with program.in_order():
        for one in (one for call in calls for one in call.alone()):
            part = one.part
            program.add(
                decoded.panel_kernel(kind), 0,
                data, book, columns, K, N, part.first, part.cols, part.width, scratch,
            )  # fmt: skip
            panel = _behind_lead(scratch, one.packed(x.shape[3]))
            program.add(one.kernel, one.macs, *one.arguments(x, panel, added, _low(relu), y, onto))


def decoded_depthwise2d(
    program: Program | None,
    packed: Packed,
    x: Slot,
    w: decoded.Packed,
    bias: np.ndarray | None,
    y: Slot,
    win: Window,
    relu: bool,
    carve: Carver,
) -> None:
    """`prepack.depthwise2d` with packed weights (KH, KW, C, 1), C >= 16; its calls run in order."""
    size, (kind, data, book, columns) = math.prod(w.shape), w.source
    scratch = carve.take((decoded.LEAD + size,))
    if program is None:
        return
    with program.in_order():
        program.add(
            decoded.panel_kernel(kind), 0, data, book, columns, 1, size, 0, size, size, scratch
        )
        depthwise2d(program, packed, x, _behind_lead(scratch, w.shape[:3]), bias, y, win, relu)


def _behind_lead(scratch: Slot, shape: tuple[int, ...]) -> Slot:
    """Where the numbers of a decoded panel lie."""
    start = scratch.offset + decoded.LEAD * scratch.dtype.itemsize
    return scratch._replace(offset=start, shape=shape)
