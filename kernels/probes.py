"""Loops that do nothing but arithmetic, or nothing but reading: what the machine can do at most.

Arithmetic runs on the largest register tile of the level, reading is plain Numba, which LLVM
vectorises. They reached 103 GFLOP/s and 188 GB/s from L1 on a Zen 3 core (AVX2: two vectors of each
a cycle, at 3.2 GHz); on a Zen 4 core (AVX-512) reading reached 217 GB/s, and a loop of plain Numba,
in the place of the tile's, 117 GFLOP/s. Where LLVM finds no such code for reading a limit comes out
too low, and a share of the roofline above 1 will tell.

Every row of `a` (rows, n) is read by one thread. The results keep the loops from being dropped.
"""

from __future__ import annotations

import numba
import numpy as np

from kernels import simd
from kernels._jit import jit

_MR, _NR = simd.TILE
FMAS_PER_ELEMENT = _MR * _NR


@jit
def _fma_row(a, c, repeats):  # type: ignore[no-untyped-def]
    L = simd.lanes(a)
    acc = simd.load(_MR, _NR, a, 0, _NR * L)  # different, or LLVM would keep one sum for all
    by = simd.fill(1, 1, a, c)
    for _ in range(repeats):
        for i in range(0, a.size, L):
            acc = simd.fma(acc, simd.load(1, 1, a, i, 0), by)
    sums = np.empty(FMAS_PER_ELEMENT * L, np.float32)
    simd.store(acc, sums, 0, _NR * L)
    return sums.sum()


@jit
def _read_row(a, repeats):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for _ in range(repeats):
        for i in range(a.size):
            total += a[i]
    return total


@jit
def _read_row_in_four(a, repeats):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    q = a.size // 4
    for _ in range(repeats):
        for i in range(q):
            total += (a[i] + a[i + q]) + (a[i + 2 * q] + a[i + 3 * q])
    return total


@jit(parallel=True)
def fma(a, c, repeats, out):  # type: ignore[no-untyped-def]
    """out[t] = sum of a[t, i] c, `repeats` times, by FMAS_PER_ELEMENT sums at once; n >= 512."""
    for t in numba.prange(a.shape[0]):
        out[t] = _fma_row(a[t], c, repeats)


@jit(parallel=True)
def read(a, repeats, out):  # type: ignore[no-untyped-def]
    """out[t] = sum of a[t, i], `repeats` times, in one stream: best from L2, L3 and memory."""
    for t in numba.prange(a.shape[0]):
        out[t] = _read_row(a[t], repeats)


@jit(parallel=True)
def read_in_four(a, repeats, out):  # type: ignore[no-untyped-def]
    """As `read`, in four streams: fewer additions that wait for each other, best from L1."""
    for t in numba.prange(a.shape[0]):
        out[t] = _read_row_in_four(a[t], repeats)
