"""Loops that do nothing but arithmetic, or nothing but reading: what the machine can do at most.

Plain Numba, vectorised by LLVM. On a Zen 4 core (AVX-512) they reach what hand-written vector code
reaches: 117 GFLOP/s, and 217 GB/s from L1. Where LLVM finds no such code (other processors were not
tried) a limit comes out too low, and a share of the roofline above 1 will tell.

Every row of `a` (rows, n) is read by one thread. The results keep the loops from being dropped.
"""

from __future__ import annotations

import numba
import numpy as np

from kernels._jit import jit

FMAS_PER_ELEMENT = 32


@jit
def _horner4(y, x, c):  # type: ignore[no-untyped-def]
    y = y * x + c
    y = y * x + c
    y = y * x + c
    return y * x + c


@jit
def _horner16(y, x, c):  # type: ignore[no-untyped-def]
    return _horner4(_horner4(_horner4(_horner4(y, x, c), x, c), x, c), x, c)


@jit
def _fma_row(a, c, repeats):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for _ in range(repeats):
        for i in range(a.size):
            total += _horner16(_horner16(a[i], a[i], c), a[i], c)
    return total


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
    """out[t] = sum over i, `repeats` times, of a polynomial of degree 32 in a[t, i]."""
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
