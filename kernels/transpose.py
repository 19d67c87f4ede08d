"""Axes in another order: numbers are moved, of any type, an image of a batch by itself."""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import prange

from kernels._jit import Variants
from kernels.prepack import Packed
from kernels.program import Program, Slot

_ROWS = 64  # rows of the result that a task makes


def walk(shape: Sequence[int], axes: Sequence[int]) -> list[tuple[int, int]]:
    """How x (shape) is gone through for its axes in this order: sizes and steps, outermost first.

    In as few loops as can be: in one if the elements stay in their order.
    """
    loops: list[tuple[int, int]] = []
    steps = [int(np.prod(shape[a + 1 :], dtype=np.int64)) for a in range(len(shape))]
    for n, step in ((shape[a], steps[a]) for a in axes if shape[a] != 1):
        if loops and loops[-1][1] == n * step:
            loops[-1] = (loops[-1][0] * n, step)
        else:
            loops.append((n, step))
    return loops


def _transposed_loop(X, starts, down, right, Y, first, last):
    # Y[m, r, i, j] = X[m, starts[r] + i down + j right];  X (M, n), Y (M, R, P, Q)
    # tasks are blocks of rows (m, r, i)
    M, R, P, Q = Y.shape
    for task in prange(first, last):
        row = task * _ROWS
        m, r, i = row // (R * P), row // P % R, row % P
        for _ in range(min(_ROWS, M * R * P - row)):
            at = starts[r] + i * down
            for j in range(Q):
                Y[m, r, i, j] = X[m, at + j * right]
            i += 1
            if i == P:
                i, r = 0, r + 1
            if r == R:
                r, m = 0, m + 1


_transposed = Variants(_transposed_loop)


def transpose(program: Program, packed: Packed, x: Slot, axes: Sequence[int], y: Slot) -> None:
    """y (B, ...) = x (B, ...) with its axes but the first in this order; 0 is the second of x."""
    loops = walk(x.shape[1:], axes)
    *outer, (down, i_step), (right, j_step) = [(1, 0)] * (2 - len(loops)) + loops

    def starts() -> np.ndarray:
        found = np.zeros(1, np.int64)
        for n, step in outer:
            found = (found[:, None] + step * np.arange(n)).reshape(-1)
        return found

    table = packed.get("starts", starts)
    batch, tasks = x.shape[0], -(-x.shape[0] * len(table) * down // _ROWS)
    program.add(
        _transposed, x.nbytes + y.nbytes, x.reshape(batch, -1), table, i_step, j_step,
        y.reshape(batch, len(table), down, right), tasks=tasks,
    )  # fmt: skip
