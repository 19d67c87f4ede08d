"""The general matrix product on register tiles: C = max(A B + bias, low), A or B transposed or not.

C is cut into panels of nr vectors and these into tiles of mr rows (`simd.ROWS`). A tile takes one
number of each of its rows of A and one row of the panel of B at a time:

    acc[i, j] += A[m + i, k] B[k, n + j],  k = 0 ... K - 1

A is read where it lies, transposed or not: only the strides of a tile's numbers differ. A panel of
B is read where it lies if its rows are at hand, whole and few enough for the second-level cache;
else it is packed, its last vector filled up with zeros. The last tile of rows moves back over rows
already done, and stores only what is new.

Each element of C is the same sum for any number of threads: k runs in blocks, their sums are added
in order. Long sums for few results run in chunks, so that threads share them; how many depends on
the sizes only.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from kernels import memory, simd
from kernels._jit import Variants

_DEPTH = 512  # most terms summed in registers: a panel of B stays in the second-level cache
_BLOCK_BYTES = 192 * 1024  # of A, which stay in the second-level cache beside the panel
_BLOCK_ROWS = 240  # at most, so that threads share the work evenly
_DIRECT_BYTES = 512 * 1024  # of B, whose panels are read in place
_DIRECT_ROWS = 48  # of A: for fewer, packing B costs more than it gains
_PACK_ROWS = 8  # of B, packed together
_TASKS = 16  # wanted at least; also the most chunks of a sum
_CHUNK_TERMS = 1024  # of a sum, at least


def _panels(mr: int, nr: int) -> Any:
    def panels(
        A, rows, sm, sk, B, origin, step, ldb, bias, low, C, K, first, cols, block, groups, onto
    ):  # fmt: skip
        # C[c, m, first + n] = max(bias[first + n] + sum_k A[m sm + k sk] B[k, n], low)
        # and what is in C before, if `onto`, inside the maximum
        # c: part of the sum over k < K; 0 <= n < cols;  C (chunks, M, N), bias (N,)
        # B[k, p W + j] = B[origin + p step + k ldb + j], W = nr L or L / 2;  A has rows >= mr rows
        chunks, M, N = C.shape
        W = nr * simd.lanes(C) if nr else simd.lanes(C) // 2
        P = (cols + W - 1) // W
        blocks = (M + block - 1) // block
        chunk = (K + chunks - 1) // chunks
        depth = (chunk + _DEPTH - 1) // _DEPTH
        depth = (chunk + depth - 1) // depth
        for task in prange(chunks * blocks * groups):
            c, r, g = task // groups // blocks, task // groups % blocks, task % groups
            k_first, k_end = c * chunk, min(K, (c + 1) * chunk)
            for k_lo in range(k_first, k_end, depth):
                k_hi = min(k_end, k_lo + depth)
                for p in range(P * g // groups, P * (g + 1) // groups):
                    n, part = first + p * W, min(W, cols - p * W)
                    for m in range(r * block, min(M, r * block + block), mr):
                        start = min(m, rows - mr)
                        lo, hi = m - start, min(mr, M - start)
                        acc = simd.zeros(mr, nr, C)
                        ia = start * sm + k_lo * sk
                        ib = origin + p * step + k_lo * ldb
                        for _ in range(k_lo, k_hi):
                            simd.rolled()
                            acc = simd.rank1(acc, A, ia, sm, B, ib)
                            ia += sk
                            ib += ldb
                        ic = (c * M + start) * N + n
                        if lo == 0 and hi == mr and part == W:
                            if k_lo > k_first or onto:
                                acc = simd.add(acc, simd.load(mr, nr, C, ic, N))
                            if k_hi == k_end:
                                acc = simd.add(acc, simd.load(1, nr, bias, n, 0))
                                acc = simd.maximum(acc, simd.fill(1, nr, C, low))
                            simd.store(acc, C, ic, N)
                        else:
                            if k_lo > k_first or onto:
                                acc = simd.add(acc, simd.load_part(mr, nr, C, ic, N, lo, hi, part))
                            if k_hi == k_end:
                                acc = simd.add(acc, simd.load_part(1, nr, bias, n, 0, 0, 1, part))
                                acc = simd.maximum(acc, simd.fill(1, nr, C, low))
                            simd.store_part(acc, C, ic, N, lo, hi, part)

    return panels


def _pack_rows(B, first, cols, P):
    # P[p, k, j] = B[k, first + p W + j], 0 where p W + j >= cols;  B (K, N), P (panels, K, W)
    # A few rows of B at a time: they lie in one piece, a panel's part of them does not.
    panels, K, W = P.shape
    N = B.shape[1]
    L = simd.lanes(P)
    for block in prange((K + _PACK_ROWS - 1) // _PACK_ROWS):
        for p in range(panels):
            for k in range(block * _PACK_ROWS, min(K, (block + 1) * _PACK_ROWS)):
                for j in range(0, W, L):
                    n = p * W + j
                    ib, ip = k * N + first + n, (p * K + k) * W + j
                    if n + L <= cols and j + L <= W:
                        simd.store(simd.load(1, 1, B, ib, 0), P, ip, 0)
                    else:
                        row = simd.load_part(1, 1, B, ib, 0, 0, 1, cols - n)
                        simd.store_part(row, P, ip, 0, 0, 1, W - j)


def _pack_columns(L: int) -> Any:
    def pack_columns(B, first, cols, P):
        # P[p, k, j] = B[first + p W + j, k], 0 where p W + j >= cols;  B (N, K), P (panels, K, W)
        panels, K, W = P.shape
        for p in prange(panels):
            for j in range(0, W, L):
                n = p * W + j
                for k in range(0, K, L):
                    ib, ip = (first + n) * K + k, (p * K + k) * W + j
                    if n + L <= cols and k + L <= K:
                        block = simd.transpose(simd.load(L, 1, B, ib, K))
                        simd.store(block, P, ip, W)
                    else:
                        part = simd.load_part(L, 1, B, ib, K, 0, cols - n, K - k)
                        simd.store_part(simd.transpose(part), P, ip, W, 0, K - k, W - j)

    return pack_columns


def _gated_sums_loop(G, Y, gated, D, S):
    # D = G where not Y <= 0, else 0, if gated;  S[c, n] = sum of D[m, n] over part c of the rows
    # G, Y, D (M, N), S (chunks, N)
    M, N = G.shape
    chunks = S.shape[0]
    size = (M + 4 * chunks - 1) // (4 * chunks) * 4
    W = 2 * simd.lanes(G)
    for c in prange(chunks):
        for n in range(0, N, W):
            acc = simd.zeros(4, 2, G)
            for m in range(c * size, min(M, (c + 1) * size), 4):
                i = m * N + n
                if m + 4 <= M and n + W <= N:
                    g = simd.load(4, 2, G, i, N)
                    if gated:
                        g = simd.gate(g, simd.load(4, 2, Y, i, N))
                        simd.store(g, D, i, N)
                else:
                    g = simd.load_part(4, 2, G, i, N, 0, M - m, N - n)
                    if gated:
                        g = simd.gate(g, simd.load_part(4, 2, Y, i, N, 0, M - m, N - n))
                        simd.store_part(g, D, i, N, 0, M - m, N - n)
                acc = simd.add(acc, g)
            pair = simd.add(simd.rows(acc, 0, 2), simd.rows(acc, 2, 4))
            total = simd.add(simd.rows(pair, 0, 1), simd.rows(pair, 1, 2))
            simd.store_part(total, S, c * N + n, 0, 0, 1, N - n)


_gated_sums = Variants(_gated_sums_loop)


def _last_columns_loop(A, W, bias, low, C, first):
    # C[m, first + r] = max(bias[first + r] + sum_k A[m, k] W[r, k], low), NaN stays
    # A (>= M, K), W (R, K), C (M, N), bias (N,)
    M, K = C.shape[0], A.shape[1]
    for block in prange((M + _BLOCK_ROWS - 1) // _BLOCK_ROWS):
        for m in range(block * _BLOCK_ROWS, min(M, (block + 1) * _BLOCK_ROWS)):
            for r in range(W.shape[0]):
                total = A.dtype.type(0)
                for k in range(K):
                    total += A[m, k] * W[r, k]
                total += bias[first + r]
                C[m, first + r] = low if total < low else total


_last_columns = Variants(_last_columns_loop)


def gated_sums(grad: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """grad (M, N) where not y <= 0, else 0, or grad itself without y; and its sums over M (N,)."""
    gated = grad if y is None else memory.empty(grad.shape, grad.dtype)
    sums = np.empty((max(1, min(_TASKS, len(grad) // 64)), grad.shape[1]), grad.dtype)
    kernel = _gated_sums.choose(2 * grad.nbytes)
    kernel(grad, grad if y is None else y, y is not None, gated, sums)
    return gated, sums.sum(axis=0)  # over an outer axis: in order, by NumPy


@cache
def _panel_kernel(nr: int, mr: int) -> Variants:
    return Variants(_panels(mr, nr))


@cache
def _pack_kernel(lanes: int) -> Variants:
    """Of B transposed, for vectors of this length; of B as it is for 0."""
    return Variants(_pack_columns(lanes) if lanes else _pack_rows)


def product(
    a: np.ndarray,
    b: np.ndarray,
    bias: np.ndarray | None = None,
    low: float = -np.inf,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> np.ndarray:
    """max(a b + bias, low), a (M, K) or (K, M) if transposed, b (K, N) or (N, K); NaN stays NaN.

    a, b, bias as `prepared` gives them; M, K, N >= 1.
    """
    K, M = a.shape if transpose_a else a.shape[::-1]
    N = b.shape[0] if transpose_b else b.shape[1]
    lanes = simd.LANES * 4 // a.itemsize
    last = 0 if transpose_a else _single_columns(M, K, N, lanes)
    chunks, parts = _plan(M, K, N, a.itemsize, transpose_b, last)
    c = memory.empty((chunks, M, N), a.dtype)
    added = np.zeros(N, a.dtype) if bias is None or chunks > 1 else bias
    least = a.dtype.type(low if chunks == 1 else -np.inf)
    turned, rows = transpose_a, M
    sm, sk = (1, M) if transpose_a else (K, 1)
    for part in parts:
        mr = simd.ROWS[part.nr]
        if mr > rows:
            padded = np.zeros((mr, K), a.dtype)
            padded[:M] = a.T if turned else a[:M]
            a, turned, rows, sm, sk = padded, False, mr, K, 1
        panel, origin, step, ldb = b, part.first, part.width, N
        if part.packed:
            panel = _aligned((part.panels, K, part.width), b.dtype)
            pack = _pack_kernel(simd.LANES * 4 // a.itemsize if transpose_b else 0)
            pack.choose(2 * panel.nbytes)(b, part.first, part.cols, panel)
            origin, step, ldb = 0, K * part.width, part.width
        _panel_kernel(part.nr, mr).choose(M * K * part.cols)(
            a,
            rows,
            sm,
            sk,
            panel,
            origin,
            step,
            ldb,
            added,
            least,
            c,
            K,
            part.first,
            part.cols,
            part.block,
            part.groups,
            False,
        )
    if last:
        w = b[N - last :] if transpose_b else np.ascontiguousarray(b[:, N - last :].T)
        _last_columns.choose(M * K * last)(a, w, added, least, c[0], N - last)
    if chunks == 1:
        return c[0]
    total = c.sum(axis=0)  # over an outer axis: in order, by NumPy
    if bias is not None:
        total += bias
    return np.maximum(total, a.dtype.type(low), out=total)


def _single_columns(M: int, K: int, N: int, lanes: int) -> int:
    """How many columns after the last whole vector are summed along k, one by one.

    Most lanes of a vector of one or two columns are idle; a row of A and one of B fill them.
    """
    rest = N % lanes
    pays = lanes >= 8 and lanes < N and M >= 4 * _DIRECT_ROWS and 64 <= K < 2 * _CHUNK_TERMS
    return rest if pays and rest <= 2 else 0


class _Part(NamedTuple):
    """Columns first <= n < first + cols, in panels of nr vectors."""

    nr: int
    first: int
    cols: int
    width: int  # of a panel, in elements
    panels: int
    packed: bool
    block: int  # rows that one task covers, whole tiles
    groups: int  # of panels, shared out as tasks


@lru_cache(1024)
def _plan(
    M: int, K: int, N: int, itemsize: int, transpose_b: bool, last: int
) -> tuple[int, tuple[_Part, ...]]:
    """In how many chunks the terms are summed, and how all but the last columns are cut."""
    stride, N = N, N - last
    lanes, most = simd.LANES * 4 // itemsize, simd.TILE[1]
    rest = N % (most * lanes)
    cuts = [(most, 0, N - rest)] if rest < N else []
    if _half_pays(rest % lanes, lanes):
        whole = rest // lanes
        cuts += [(whole, N - rest, whole * lanes)] if whole else []
        cuts.append((0, N - rest % lanes, rest % lanes))
    elif rest:
        cuts.append((-(-rest // lanes), N - rest, rest))
    tasks = -(-M // _BLOCK_ROWS) * -(-N // (most * lanes))
    chunks = max(1, min(-(-_TASKS // tasks), K // _CHUNK_TERMS, _TASKS))
    depth = min(-(-K // chunks), _DEPTH)
    in_place = not transpose_b and (depth * stride * itemsize <= _DIRECT_BYTES or M < _DIRECT_ROWS)
    parts = []
    for nr, first, cols in cuts:
        mr, width = simd.ROWS[nr], nr * lanes or lanes // 2
        panels = -(-cols // width)
        rows = max(mr, min(_BLOCK_ROWS, _BLOCK_BYTES // (depth * itemsize)) // mr * mr)
        block = -(-M // (-(-M // rows) * mr)) * mr
        groups = max(1, min(panels, _TASKS // (-(-M // block) * chunks)))
        packed = cols % width > 0 or not in_place
        parts.append(_Part(nr, first, cols, width, panels, packed, block, groups))
    return chunks, tuple(parts)


def _half_pays(rest: int, lanes: int) -> bool:
    """Whether half a vector serves the last columns, which do not fill a whole one.

    Where vectors of 8 lanes take as long as halves, what is stored in part takes longest.
    """
    half = lanes // 2
    return 0 < rest <= half if simd.LANES >= 16 else simd.LANES == 8 and rest == half


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Scratch whose vectors do not straddle cache lines."""
    size = math.prod(shape) * dtype.itemsize
    if size >= memory.POOL_FROM:
        return memory.empty(shape, dtype)
    raw = np.empty(size + memory.ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, raw, -raw.ctypes.data % memory.ALIGNMENT)
