"""Tiles whose rows lie anywhere: what kernels of sparse weights need beyond `kernels.simd`.

The rules of `kernels.simd` hold: flat offsets, nothing checked, a tile is a value. R is an array of
int64, of offsets into X or C; a negative one stands for a row that is not there.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kernels._emit import I64, SCALARS, Tile, constant
from kernels.simd import _N, _array, _intrinsic, _lanes, _primitive, _tile


@_intrinsic
def rank1_at(typing, acc, A, ia, B, ib, index, ii, width):
    """acc[i, j] += A[ia + i] B[ib + index[ii] width + j L : + L]; index uint8, width a constant."""
    _tile("rank1_at", acc)
    _array("rank1_at", A, acc.dtype)
    _array("rank1_at", B, acc.dtype)
    _array("rank1_at", index, types.uint8)
    vec, L, W = acc.vector, acc.lanes, constant(width)

    def emit(code, x, A, ia, B, ib, index, ii, width):
        b = code.builder
        place = b.zext(b.load(code.at(index, ii)), I64)
        start = b.add(ib, b.mul(place, I64(W)))
        row = [code.load(code.at(B, start, extra=j * L), vec) for j in range(acc.nr)]
        out = []
        for i in range(acc.mr):
            a = code.splat(b.load(code.at(A, ia, extra=i)), L)
            out.append([code.fma(a, row[j], x[i][j]) for j in range(acc.nr)])
        return out

    return _primitive(acc, (acc, A, _N, B, _N, index, _N, width), emit)


def _columns(cols: Any) -> tuple[bool, Any]:
    """Whether only the first `cols` elements of a row are meant: not where it is a constant."""
    part = not isinstance(cols, types.IntegerLiteral)
    return part, _N if part else cols


@_intrinsic
def load_rows(typing, mr, X, ix, R, at, cols):
    """x[i, 0] = X[ix + R[at + i] : + L], its first `cols` elements unless that is a constant.

    0 elsewhere, and in rows with R[at + i] < 0, which are not read.
    """
    _array("load_rows", X, *SCALARS)
    _array("load_rows", R, types.int64)
    tile = Tile(constant(mr), 1, X.dtype, _lanes(X))
    part, kind = _columns(cols)

    def emit(code, mr, X, ix, R, at, cols):
        b, L = code.builder, tile.lanes
        zero = ir.Constant(ir.ArrayType(tile.vector.element, L), None)
        nothing = b.bitcast(cgutils.global_constant(b, "zeros", zero), X.type)
        mask = code.mask(cols, L) if part else None
        rows = []
        for i in range(tile.mr):
            offset = b.load(code.at(R, at, extra=i))
            there = b.icmp_signed(">=", offset, I64(0))
            pointer = b.select(there, code.at(X, b.add(ix, offset)), nothing)
            if part:
                rows.append([code.masked(pointer, tile.vector, mask)])
            else:
                rows.append([code.load(pointer, tile.vector)])
        return rows

    return _primitive(tile, (mr, X, _N, R, _N, kind), emit)


@_intrinsic
def store_rows(typing, x, C, ic, R, at, cols):
    """C[ic + R[at + i] : + L] = x[i, 0], its first `cols` elements unless that is a constant.

    Rows with R[at + i] < 0 are not stored.
    """
    _tile("store_rows", x)
    _array("store_rows", C, x.dtype)
    _array("store_rows", R, types.int64)
    part, kind = _columns(cols)
    L = x.lanes

    def emit(code, x, C, ic, R, at, cols):
        b = code.builder
        mask = code.mask(cols, L) if part else None
        for i, (v,) in enumerate(x):
            offset = b.load(code.at(R, at, extra=i))
            with b.if_then(b.icmp_signed(">=", offset, I64(0))):
                pointer = code.at(C, b.add(ic, offset))
                if part:
                    code.masked(pointer, v.type, mask, v)
                else:
                    code.store(v, pointer)

    return _primitive(types.void, (x, C, _N, R, _N, kind), emit)
