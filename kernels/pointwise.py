"""Matrix products and linear layers: y = act(x @ w + bias).

Where one of the three sizes is at most 4 the product only moves memory, and it is one of three
passes over long rows, with the short side (rank R) held in registers:

    expand   Y[m, n] = max(bias[n] + sum_r S[m, r] W[r, n], low)     writes Y once
    dots     D[m, r] = sum_n A[m, n] W[r, n]                         reads A once
    reduce   P[r, n] = sum_m S[m, r] A[m, n],  B[n] = sum_m A[m, n]  reads A once

A linear layer with few inputs is `expand`, its gradients `reduce` and `dots`; a layer with few
outputs is `dots`, its gradients `expand` and `reduce`. Other sizes take `kernels.product`.

No library is called whose result could depend on its thread count; sums are taken over fixed
chunks and combined in order.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from kernels import memory
from kernels._jit import Variants, jit, prepared
from kernels.elementwise import relu_grad
from kernels.product import gated_sums, product

NARROW = 4  # sizes up to this are held in registers
_CHUNKS = 16  # parts of a sum over rows; also the most threads it can use
_CHUNK_ROWS = 64  # at least, so that partial sums stay small beside what is summed


# --- rank R <= 4: short sides of 3 are padded with zeros to 4, of 1 under a mask to 2 -------------
#
# What is loaded conditionally is loaded first: a load under a condition vectorises badly.


@jit
def _expand_rows(S, W, bias, low, Y, lo, hi):
    # Y[m, n] = max(bias[n] + sum_r S[m, r] W[r, n], low), lo <= m < hi; NaN stays NaN
    # S (M, R), W (R, N), bias (N,), Y (M, N); R = 1, 2 or 4
    N = Y.shape[1]
    R = S.shape[1]
    if R == 1:
        for m in range(lo, hi):
            s = S[m, 0]
            for n in range(N):
                v = bias[n] + s * W[0, n]
                Y[m, n] = low if v < low else v
    elif R == 2:
        for m in range(lo, hi, 2):
            k = min(m + 1, hi - 1)  # an odd last row is written twice
            s0, s1, t0, t1 = S[m, 0], S[m, 1], S[k, 0], S[k, 1]
            for n in range(N):
                b, w0, w1 = bias[n], W[0, n], W[1, n]
                v = b + s0 * w0 + s1 * w1
                u = b + t0 * w0 + t1 * w1
                Y[m, n] = low if v < low else v
                Y[k, n] = low if u < low else u
    else:
        for m in range(lo, hi):
            s0, s1, s2, s3 = S[m, 0], S[m, 1], S[m, 2], S[m, 3]
            for n in range(N):
                v = bias[n] + s0 * W[0, n] + s1 * W[1, n] + s2 * W[2, n] + s3 * W[3, n]
                Y[m, n] = low if v < low else v


@jit
def _dots_rows(A, Y, off, W, D, lo, hi):
    # D[m, r] = sum_n G[m, n] W[r, n], lo <= m < hi, G = A where not Y <= off, else 0
    # A, Y (M, N), W (R, N), D (M, R); R = 1 (Y is not read), 2 or 4
    N = A.shape[1]
    R = W.shape[0]
    zero = A.dtype.type(0)
    for m in range(lo, hi):
        d0, d1, d2, d3 = zero, zero, zero, zero
        if R == 1:
            for n in range(N):
                d0 += A[m, n] * W[0, n]
            D[m, 0] = d0
        elif R == 2:
            for n in range(N):
                a = A[m, n]
                g = zero if Y[m, n] <= off else a
                d0 += g * W[0, n]
                d1 += g * W[1, n]
            D[m, 0], D[m, 1] = d0, d1
        else:
            for n in range(N):
                a = A[m, n]
                g = zero if Y[m, n] <= off else a
                d0 += g * W[0, n]
                d1 += g * W[1, n]
                d2 += g * W[2, n]
                d3 += g * W[3, n]
            D[m, 0], D[m, 1], D[m, 2], D[m, 3] = d0, d1, d2, d3


@jit
def _reduce_rows(S, A, Y, off, P, lo, hi):
    # P[r, n] = sum_m S[m, r] G[m, n], P[R, n] = sum_m G[m, n], lo <= m < hi
    # G = A where not Y <= off, else 0;  S (M, R), A, Y (M, N), P (R + 1, N); R = 2 or 4
    # R = 1: Y is not read, P (1, N)
    # Four rows at a time: a sum is loaded and stored once for four terms.
    N = A.shape[1]
    R = S.shape[1]
    zero = A.dtype.type(0)
    P[:] = zero
    quads = max(lo, lo + (hi - lo) // 4 * 4)
    if R == 1:
        eights = max(lo, lo + (hi - lo) // 8 * 8)
        for m in range(lo, eights, 8):
            s0, s1, s2, s3 = S[m, 0], S[m + 1, 0], S[m + 2, 0], S[m + 3, 0]
            s4, s5, s6, s7 = S[m + 4, 0], S[m + 5, 0], S[m + 6, 0], S[m + 7, 0]
            for n in range(N):
                near = s0 * A[m, n] + s1 * A[m + 1, n] + s2 * A[m + 2, n] + s3 * A[m + 3, n]
                far = s4 * A[m + 4, n] + s5 * A[m + 5, n] + s6 * A[m + 6, n] + s7 * A[m + 7, n]
                P[0, n] += near + far
        for m in range(eights, quads, 4):
            s0, s1, s2, s3 = S[m, 0], S[m + 1, 0], S[m + 2, 0], S[m + 3, 0]
            for n in range(N):
                P[0, n] += s0 * A[m, n] + s1 * A[m + 1, n] + s2 * A[m + 2, n] + s3 * A[m + 3, n]
        for m in range(quads, hi):
            for n in range(N):
                P[0, n] += S[m, 0] * A[m, n]
        return
    for r in range(0, R, 2):
        for m in range(lo, quads, 4):
            s0, s1, s2, s3 = S[m, r], S[m + 1, r], S[m + 2, r], S[m + 3, r]
            t0, t1, t2, t3 = S[m, r + 1], S[m + 1, r + 1], S[m + 2, r + 1], S[m + 3, r + 1]
            for n in range(N):
                a0, a1, a2, a3 = A[m, n], A[m + 1, n], A[m + 2, n], A[m + 3, n]
                g0 = zero if Y[m, n] <= off else a0
                g1 = zero if Y[m + 1, n] <= off else a1
                g2 = zero if Y[m + 2, n] <= off else a2
                g3 = zero if Y[m + 3, n] <= off else a3
                P[r, n] += s0 * g0 + s1 * g1 + s2 * g2 + s3 * g3
                P[r + 1, n] += t0 * g0 + t1 * g1 + t2 * g2 + t3 * g3
                if r == 0:
                    P[R, n] += g0 + g1 + g2 + g3
        for m in range(quads, hi):
            for n in range(N):
                a = A[m, n]
                g = zero if Y[m, n] <= off else a
                P[r, n] += S[m, r] * g
                P[r + 1, n] += S[m, r + 1] * g
                if r == 0:
                    P[R, n] += g


@jit
def _chunk(c, chunks, M):
    # Rows lo <= m < hi of part c: whole groups of four, but for the last.
    size = (M + 4 * chunks - 1) // (4 * chunks) * 4
    return min(M, c * size), min(M, (c + 1) * size)


def _expand_loop(S, W, bias, low, Y, chunks):
    for c in prange(chunks):
        lo, hi = _chunk(c, chunks, Y.shape[0])
        _expand_rows(S, W, bias, low, Y, lo, hi)


def _dots_loop(A, Y, off, W, D, chunks):
    for c in prange(chunks):
        lo, hi = _chunk(c, chunks, A.shape[0])
        _dots_rows(A, Y, off, W, D, lo, hi)


def _reduce_loop(S, A, Y, off, P):
    # P (chunks, R + 1, N), or (chunks, 1, N) where R = 1
    for c in prange(P.shape[0]):
        lo, hi = _chunk(c, P.shape[0], A.shape[0])
        _reduce_rows(S, A, Y, off, P[c], lo, hi)


_expand_variants = Variants(_expand_loop)
_dots_variants = Variants(_dots_loop)
_reduce_variants = Variants(_reduce_loop)


def _padded(array: np.ndarray, axis: int, least: int = 1) -> np.ndarray:
    """`array` with its short side filled up to 1, 2 or 4 by zeros (0 * 0 adds nothing, ever)."""
    rank = array.shape[axis]
    width = NARROW if rank > 2 else max(rank, least)
    if rank == width and array.flags.carray:
        return array
    shape = list(array.shape)
    shape[axis] = width
    out = np.zeros(shape, array.dtype)
    out[(slice(None),) * axis + (slice(rank),)] = array
    return out


def _chunks(rows: int) -> int:
    """A power of two, which common thread counts share evenly."""
    parts = max(1, min(_CHUNKS, rows // _CHUNK_ROWS))
    return 1 << (parts.bit_length() - 1)


def _low(relu: bool, dtype: np.dtype[Any]) -> Any:
    return dtype.type(0 if relu else -np.inf)


def _expand(s: np.ndarray, w: np.ndarray, bias: np.ndarray | None, relu: bool) -> np.ndarray:
    """s (M, R), w (R, N), bias (N,) -> (M, N)."""
    y = memory.empty((s.shape[0], w.shape[1]), s.dtype)
    b = np.zeros(w.shape[1], s.dtype) if bias is None else bias
    kernel = _expand_variants.choose(y.nbytes)
    kernel(_padded(s, 1), _padded(w, 0), b, _low(relu, y.dtype), y, _chunks(len(y)))
    return y


def _dots(a: np.ndarray, w: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """a (M, N), zero where y (M, N) <= 0, and w (R, N) -> (M, R)."""
    rank = w.shape[0]
    w = _padded(w, 0, 1 if y is None else 2)
    d = np.empty((a.shape[0], w.shape[0]), a.dtype)
    mask, off = _mask(a, y)
    _dots_variants.choose(a.nbytes)(a, mask, off, w, d, _chunks(len(a)))
    return d if rank == d.shape[1] else np.ascontiguousarray(d[:, :rank])


def _reduce(s: np.ndarray, a: np.ndarray) -> np.ndarray:
    """s (M, R), a (M, N) -> s.T @ a (R, N)."""
    return _reduced(_padded(s, 1), a, None)[: s.shape[1]]


def _reduce_masked(
    s: np.ndarray, a: np.ndarray, y: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """s (M, R), g (M, N) = a where not y <= 0, else 0 -> s.T @ g (R, N), sum_m g (N,)."""
    total = _reduced(_padded(s, 1, 2), a, y)
    return total[: s.shape[1]], total[-1]


def _reduced(s: np.ndarray, a: np.ndarray, y: np.ndarray | None) -> np.ndarray:
    rank = s.shape[1]
    p = np.empty((_chunks(len(a)), 1 if rank == 1 else rank + 1, a.shape[1]), a.dtype)
    mask, off = _mask(a, y)
    _reduce_variants.choose(a.nbytes)(s, a, mask, off, p)
    return p[0] if len(p) == 1 else p.sum(axis=0)  # over an outer axis: in order, by NumPy


def _mask(a: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, Any]:
    """What the kernels compare and with what: nothing is <= NaN."""
    return (a, a.dtype.type(np.nan)) if y is None else (y, a.dtype.type(0))


# --- public ---------------------------------------------------------------------------------------


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (M, K) @ b (K, N) -> (M, N)."""
    _check("matmul", a, b, 1, 0)
    a, b = prepared("matmul", a, b)
    return _matmul(a, b)


def matmul_tn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a.T @ b of a (M, K), b (M, N) -> (K, N)."""
    _check("matmul_tn", a, b, 0, 0)
    return _matmul_tn(*prepared("matmul_tn", a, b))


def matmul_nt(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b.T of a (M, N), b (K, N) -> (M, K)."""
    _check("matmul_nt", a, b, 1, 1)
    return _matmul_nt(*prepared("matmul_nt", a, b))


def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, relu: bool) -> np.ndarray:
    """y = x @ w + bias, of it max(y, 0) if `relu` (NaN stays NaN).

    x (M, K), w (K, N), bias (N,) or None -> (M, N).
    """
    _check("linear", x, w, 1, 0)
    if bias is not None:
        if bias.shape != (w.shape[1],):
            raise ValueError(
                f"linear: x {x.shape}, w {w.shape}: expected bias ({w.shape[1]},), got {bias.shape}"
            )
        x, w, bias = prepared("linear", x, w, bias)
    else:
        x, w = prepared("linear", x, w)
    return _matmul(x, w, bias, relu)


def linear_grad(
    grad: np.ndarray,
    x: np.ndarray,
    w: np.ndarray,
    y: np.ndarray | None,
    relu: bool,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Gradients of `linear` with respect to x (M, K), w (K, N) and bias (N,), where needed.

    grad (M, N); y (M, N) is the result of `linear`, used with `relu` only: the gradient passes
    where not y <= 0, so that NaN in y does not silence it.
    """
    _check("linear_grad", x, w, 1, 0)
    shape = (x.shape[0], w.shape[1])
    if grad.shape != shape or (relu and (y is None or y.shape != shape)):
        found = None if y is None else y.shape
        raise ValueError(
            f"linear_grad: x {x.shape}, w {w.shape}, relu={relu}: expected grad and y of shape "
            f"{shape}, got {grad.shape} and {found}"
        )
    if relu and y is not None:
        grad, x, w, y = prepared("linear_grad", grad, x, w, y)
    else:
        grad, x, w = prepared("linear_grad", grad, x, w)
        y = None
    need_x, need_w, need_b = needs
    gx = gw = gb = None
    if x.shape[1] <= NARROW:
        if need_x:
            gx = _dots(grad, w, y)
        if need_w or need_b:
            gw, gb = _reduce_masked(x, grad, y)
    else:
        if need_b:
            grad, gb = gated_sums(grad, y)
        elif y is not None:
            grad = relu_grad(grad, y)
        if need_x:
            gx = _matmul_nt(grad, w)
        if need_w:
            gw = _matmul_tn(x, grad)
    return gx, gw if need_w else None, gb if need_b else None


def _matmul(
    a: np.ndarray, b: np.ndarray, bias: np.ndarray | None = None, relu: bool = False
) -> np.ndarray:
    (m, k), n = a.shape, b.shape[1]
    if k <= NARROW:
        return _expand(a, b, bias, relu)
    if n > NARROW and m > NARROW:
        return product(a, b, bias, 0 if relu else -np.inf)
    c = _dots(a, np.ascontiguousarray(b.T)) if n <= NARROW else _reduce(a.T, b)
    if bias is not None:
        c = c + bias
    return np.maximum(c, 0) if relu else c


def _matmul_tn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (m, k), n = a.shape, b.shape[1]
    if m <= NARROW:
        return _expand(a.T, b, None, False)
    if k <= NARROW:
        return _reduce(a, b)
    if n <= NARROW:
        return np.ascontiguousarray(_reduce(b, a).T)
    return product(a, b, transpose_a=True)


def _matmul_nt(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (m, n), k = a.shape, b.shape[0]
    if n <= NARROW:
        return _expand(a, b.T, None, False)
    if k <= NARROW:
        return _dots(a, b)
    if m <= NARROW:
        return np.ascontiguousarray(_dots(b, a).T)
    return product(a, b, transpose_b=True)


def _check(kernel: str, a: np.ndarray, b: np.ndarray, axis_a: int, axis_b: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[axis_a] != b.shape[axis_b]:
        raise ValueError(
            f"{kernel}: expected two matrices with axis {axis_a} of the first as long as axis "
            f"{axis_b} of the second, got {a.shape} and {b.shape}"
        )
