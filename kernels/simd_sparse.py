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

from kernels._emit import I32, I64, SCALARS, Tile, constant
from kernels._primitive import OFFSET, check_array, check_tile, lanes_of, primitive, tile_intrinsic


@tile_intrinsic
def rank1_at(typing, acc, lo, hi, A, ia, B, ib, index, ii, width):
    """acc[i, j] += A[ia + i - lo] B[ib + index[ii] width + j L : + L] in rows lo <= i < hi.

    index uint8; lo, hi and width constants.
    """
    check_tile("rank1_at", acc)
    check_array("rank1_at", A, acc.dtype)
    check_array("rank1_at", B, acc.dtype)
    check_array("rank1_at", index, types.uint8)
    vec, L, W = acc.vector, acc.lanes, constant(width)
    first, last = constant(lo), constant(hi)

    def emit(code, x, lo, hi, A, ia, B, ib, index, ii, width):
        b = code.builder
        place = b.zext(b.load(code.at(index, ii)), I64)
        start = b.add(ib, b.mul(place, I64(W)))
        rows, columns = range(first, last), range(acc.nr)
        out = [list(row) for row in x]

        def number(i):
            return code.splat(b.load(code.at(A, ia, extra=i - first)), L)

        def vector(j):
            return code.load(code.at(B, start, extra=j * L), vec)

        # The shorter side is held, the longer passes by: few registers are left beside the sums.
        if len(rows) < len(columns):
            held = [number(i) for i in rows]
            for j in columns:
                v = vector(j)
                for i, a in zip(rows, held, strict=True):
                    out[i][j] = code.fma(a, v, x[i][j])
        else:
            held = [vector(j) for j in columns]
            for i in rows:
                a = number(i)
                out[i] = [code.fma(a, v, x[i][j]) for j, v in enumerate(held)]
        return out

    return primitive(acc, (acc, lo, hi, A, OFFSET, B, OFFSET, index, OFFSET, width), emit)


def _columns(cols: Any) -> tuple[bool, Any]:
    """Whether only the first `cols` elements of a row are meant: not where it is a constant."""
    part = not isinstance(cols, types.IntegerLiteral)
    return part, OFFSET if part else cols


@tile_intrinsic
def load_rows(typing, mr, X, ix, R, at, cols):
    """x[i, 0] = X[ix + R[at + i] : + L], its first `cols` elements unless that is a constant.

    0 elsewhere, and in rows with R[at + i] < 0, which are not read.
    """
    check_array("load_rows", X, *SCALARS)
    check_array("load_rows", R, types.int64)
    tile = Tile(constant(mr), 1, X.dtype, lanes_of(X))
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

    return primitive(tile, (mr, X, OFFSET, R, OFFSET, kind), emit)


@tile_intrinsic
def store_rows(typing, x, C, ic, R, at, cols):
    """C[ic + R[at + i] : + L] = x[i, 0], its first `cols` elements unless that is a constant.

    Rows with R[at + i] < 0 are not stored.
    """
    check_tile("store_rows", x)
    check_array("store_rows", C, x.dtype)
    check_array("store_rows", R, types.int64)
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

    return primitive(types.void, (x, C, OFFSET, R, OFFSET, kind), emit)


@tile_intrinsic
def dot_at(typing, acc, A, ia, B, ib, index, ii, width, count):
    """acc[0, 0, l] += A[ia + l] B[ib + index[ii + l // width]], l < count width only.

    acc is one vector; index uint8; width a constant that divides its lanes. If count is a constant,
    all lanes are meant; else elements of A beyond are not read, but those of index are, and what
    they name in B, whose values change nothing.
    """
    check_tile("dot_at", acc)
    check_array("dot_at", A, acc.dtype)
    check_array("dot_at", B, acc.dtype)
    check_array("dot_at", index, types.uint8)
    W, L, vec = constant(width), acc.lanes, acc.vector
    part, kind = _columns(count)

    def emit(code, x, A, ia, B, ib, index, ii, width, count):
        b = code.builder
        found = ir.Constant(ir.VectorType(vec.element, L // W), None)
        for e in range(L // W):
            place = b.zext(b.load(code.at(index, ii, extra=e)), I64)
            found = b.insert_element(found, b.load(code.at(B, b.add(ib, place))), I32(e))
        spread = code.shuffle(found, found, [e // W for e in range(L)])
        if part:
            mask = code.mask(b.mul(count, I64(W)), L)
            a = code.masked(code.at(A, ia), vec, mask)
            spread = b.select(mask, spread, ir.Constant(vec, None))
        else:
            a = code.load(code.at(A, ia), vec)
        return [[code.fma(a, spread, x[0][0])]]

    return primitive(acc, (acc, A, OFFSET, B, OFFSET, index, OFFSET, width, kind), emit)


@tile_intrinsic
def add_folded(typing, acc, width, C, ic):
    """C[ic + w] += the sum of acc[0, 0, l] over l with l % width = w; width a constant."""
    check_tile("add_folded", acc)
    check_array("add_folded", C, acc.dtype)
    W = constant(width)

    def emit(code, x, width, C, ic):
        b, total = code.builder, x[0][0]
        while total.type.count > W:
            half = total.type.count // 2
            low, high = (list(range(k, k + half)) for k in (0, half))
            total = b.fadd(code.shuffle(total, total, low), code.shuffle(total, total, high))
        for w in range(W):
            pointer = code.at(C, ic, extra=w)
            b.store(b.fadd(b.load(pointer), b.extract_element(total, I32(w))), pointer)

    return primitive(types.void, (acc, width, C, OFFSET), emit)
