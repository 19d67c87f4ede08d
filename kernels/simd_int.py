"""Primitives of integer kernels: bytes into tiles of int32, and sums of int32 out as bytes.

They follow the rules of `kernels.simd`, whose `dot4` makes the sums. Nothing here depends on the
instruction set, and everything gives the same bits at every level: integers are exact or wrap
around, and no floating-point result has more than one operation between two roundings, so that
there is nothing to fuse or to reorder.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError

from kernels._emit import I8, I32, I64, Tile, constant, static_bounds
from kernels._levels import LANES
from kernels._primitive import (
    OFFSET,
    bound_types,
    check_array,
    check_tile,
    new_tile,
    primitive,
    tile_intrinsic,
)
from kernels.simd import _elementwise, _update

#: 1.5 * 2^23. Added to |x| <= 2^22 it leaves no room for a fraction: the sum is x rounded to the
#: nearest integer, half to even, and the low byte of its bits is that integer's low byte.
_ROUND = 12582912.0


def _int32(name: str, *kinds: Any) -> None:
    check_tile(name, *kinds)
    for kind in kinds:
        if kind.dtype != types.int32:
            raise TypingError(f"simd_int.{name}: expected a Tile of int32, got {kind}")


def _byte_vector(count: int) -> Any:
    return ir.VectorType(I8, count)


def _masked_bytes(code: Any, pointer: Any, mask: Any, store: Any = None) -> Any:
    """As `Code.masked`, of bytes."""
    kind = _byte_vector(mask.type.count)
    pointer = code.builder.bitcast(pointer, kind.as_pointer())
    if store is None:
        zero = ir.Constant(kind, None)
        name = f"llvm.masked.load.v{kind.count}i8.p0"
        return code.call(name, kind, pointer, I32(1), mask, zero)
    name = f"llvm.masked.store.v{kind.count}i8.p0"
    return code.call(name, ir.VoidType(), store, pointer, I32(1), mask)


def _byte_tile(mr: Any, nr: Any) -> Tile:
    return Tile(constant(mr), constant(nr), types.int32, LANES)


@tile_intrinsic
def byte_lanes(typing):
    """L, the number of bytes that become a vector of int32."""
    return primitive(OFFSET, (), lambda code: I64(LANES))


# --- bytes into tiles -----------------------------------------------------------------------------


@tile_intrinsic
def load_bytes(typing, mr, nr, X, ix, ld):
    """x[i, j] = X[ix + i ld + j L : + L], uint8 or int8 as int32."""
    check_array("load_bytes", X, types.uint8, types.int8)
    tile = _byte_tile(mr, nr)
    L, extend = tile.lanes, "sext" if X.dtype.signed else "zext"

    def emit(code, mr, nr, X, ix, ld):
        def vector(i, j):
            bytes_ = code.load(code.at(X, ix, i, ld, j * L), _byte_vector(L))
            return getattr(code.builder, extend)(bytes_, tile.vector)

        return [[vector(i, j) for j in range(tile.nr)] for i in range(tile.mr)]

    return primitive(tile, (mr, nr, X, OFFSET, OFFSET), emit)


@tile_intrinsic
def load_bytes_part(typing, mr, nr, X, ix, ld, cols):
    """As `load_bytes`, the first `cols` elements of each row, 0 elsewhere; others are not read."""
    check_array("load_bytes_part", X, types.uint8, types.int8)
    tile = _byte_tile(mr, nr)
    L, extend = tile.lanes, "sext" if X.dtype.signed else "zext"

    def emit(code, mr, nr, X, ix, ld, cols):
        masks = code.masks(cols, tile.nr, L)

        def vector(i, j):
            bytes_ = _masked_bytes(code, code.at(X, ix, i, ld, j * L), masks[j])
            return getattr(code.builder, extend)(bytes_, tile.vector)

        return [[vector(i, j) for j in range(tile.nr)] for i in range(tile.mr)]

    return primitive(tile, (mr, nr, X, OFFSET, OFFSET, OFFSET), emit)


def _whole_bytes(name: str, X: Any) -> Tile:
    """One vector of bytes, held as if it were int32."""
    check_array(name, X, types.uint8)
    return Tile(1, 1, types.int32, LANES)


@tile_intrinsic
def bytes_at(typing, X, ix, cols):
    """X[ix : ix + 4 L], four bytes to each int32; 0 from the element `cols` on, which is not read.

    All are read if cols is a constant.
    """
    tile, part = _whole_bytes("bytes_at", X), not isinstance(cols, types.IntegerLiteral)

    def emit(code, X, ix, cols):
        if part:
            x = _masked_bytes(code, code.at(X, ix), code.mask(cols, 4 * LANES))
        else:
            x = code.load(code.at(X, ix), _byte_vector(4 * LANES))
        return [[code.builder.bitcast(x, tile.vector)]]

    return primitive(tile, (X, OFFSET, OFFSET if part else cols), emit)


@tile_intrinsic
def max_bytes(typing, x, y):
    """The larger of each byte of x and y, unsigned."""
    _int32("max_bytes", x, y)

    def op(code, p, q):
        b, kind, whole = code.builder, _byte_vector(4 * x.lanes), p.type
        p, q = b.bitcast(p, kind), b.bitcast(q, kind)
        return b.bitcast(b.select(b.icmp_unsigned(">", p, q), p, q), whole)

    return _elementwise("max_bytes", op, x, y)


@tile_intrinsic
def store_bytes(typing, x, Y, iy, cols):
    """Y[iy : iy + 4 L] = the bytes of x, one vector; only `cols` of them unless a constant."""
    _int32("store_bytes", x)
    _whole_bytes("store_bytes", Y)
    part = not isinstance(cols, types.IntegerLiteral)

    def emit(code, x, Y, iy, cols):
        kind, pointer = _byte_vector(4 * x[0][0].type.count), code.at(Y, iy)
        y = code.builder.bitcast(x[0][0], kind)
        if part:
            _masked_bytes(code, pointer, code.mask(cols, kind.count), y)
        else:
            code.builder.store(y, code.builder.bitcast(pointer, kind.as_pointer()), align=1)

    return primitive(types.void, (x, Y, OFFSET, OFFSET if part else cols), emit)


@tile_intrinsic
def load_rows(typing, mr, nr, X, ix, ld, index, at):
    """x[i, j] = X[ix + index[at + i] ld + j L : + L]: rows chosen by an int64 array."""
    check_array("load_rows", X, types.int32)
    check_array("load_rows", index, types.int64)
    tile = new_tile(mr, nr, X)

    def emit(code, mr, nr, X, ix, ld, index, at):
        b, rows = code.builder, []
        for i in range(tile.mr):
            row = b.load(code.at(index, at, extra=i))
            start = b.add(ix, b.mul(row, ld))
            rows.append(
                [code.load(code.at(X, start, extra=j * tile.lanes), tile.vector)
                 for j in range(tile.nr)]
            )  # fmt: skip
        return rows

    return primitive(tile, (mr, nr, X, OFFSET, OFFSET, index, OFFSET), emit)


@tile_intrinsic
def zeros(typing, mr, nr):
    """x[i, j] = 0, int32."""
    tile = _byte_tile(mr, nr)
    rows = [[ir.Constant(tile.vector, None)] * tile.nr for _ in range(tile.mr)]
    return primitive(tile, (mr, nr), lambda code, *_: rows)


@tile_intrinsic
def of_float(typing, value):
    """One vector of float32, all of them `value`."""
    tile = Tile(1, 1, types.float32, LANES)
    return primitive(tile, (types.float32,), lambda code, v: [[code.splat(v, LANES)]])


@tile_intrinsic
def of_int(typing, value):
    """One vector of int32, all of them `value`."""
    tile = Tile(1, 1, types.int32, LANES)
    return primitive(tile, (types.int32,), lambda code, v: [[code.splat(v, LANES)]])


# --- arithmetic -----------------------------------------------------------------------------------


@tile_intrinsic
def bit_and(typing, x, y):
    """x & y."""
    _int32("bit_and", x, y)
    return _elementwise("bit_and", lambda code, p, q: code.builder.and_(p, q), x, y)


@tile_intrinsic
def div(typing, x, y):
    """x / y of floating-point tiles."""
    return _elementwise("div", lambda code, p, q: code.builder.fdiv(p, q), x, y)


def _dot4(name: str, acc: Any, A: Any, B: Any, lo: Any = None, hi: Any = None) -> Any:
    _int32(name, acc)
    check_array(name, A, types.uint8)
    check_array(name, B, types.int8)
    vec, L = acc.vector, acc.lanes
    bytes_ = _byte_vector(4 * L)

    def vectors(code, B, ib):
        return [
            code.builder.bitcast(code.load(code.at(B, ib, extra=4 * j * L), bytes_), vec)
            for j in range(acc.nr)
        ]

    def row(code, x, A, ia, lda, b, i):
        pointer = code.builder.bitcast(code.row_of(A, ia, i, lda), I32.as_pointer())
        a = code.splat(code.builder.load(pointer, align=1), L)
        return [code.dot4(x[i][j], a, b[j]) for j in range(acc.nr)]

    return _update(acc, (acc, A, OFFSET, OFFSET, B, OFFSET), vectors, row, lo, hi)


@tile_intrinsic
def dot4(typing, acc, A, ia, lda, B, ib):
    """acc[i, j, l] += sum_{t<4} A[ia + i lda + t] B[ib + 4 (j L + l) + t]; A uint8, B int8, exact.

    acc int32, wrapping around. On little-endian processors.
    """
    return _dot4("dot4", acc, A, B)


@tile_intrinsic
def dot4_rows(typing, acc, A, ia, lda, B, ib, lo, hi):
    """As `dot4`, in rows lo <= i < hi only. A is not read for others; constants save branches."""
    return _dot4("dot4_rows", acc, A, B, lo, hi)


def _columns(code: Any, x: Any, count: int, bounds: Any, static: Any, column: Any) -> Any:
    """Apply column(c, x), which gives new vectors by row, for each c < count within the bounds."""
    x, b = [row[0] for row in x], code.builder
    for c in range(count):
        if static:
            if static[0] <= c < static[1]:
                for i, v in column(c, x).items():
                    x[i] = v
            continue
        inside = b.and_(
            b.icmp_signed("<=", bounds[0], I64(c)), b.icmp_signed("<", I64(c), bounds[1])
        )
        before = b.block
        with b.if_then(inside):
            new, end = column(c, x), b.block
        for i, v in new.items():
            phi = b.phi(v.type)
            phi.add_incoming(x[i], before)
            phi.add_incoming(v, end)
            x[i] = phi
    return [[v] for v in x]


@tile_intrinsic
def slide_bytes(typing, acc, w, step, rows, X, ix, o1, o2, o3, ld, lo, hi, cols):
    """acc[o] += sum_{k, r < rows} w[k].r x[o step + k].r of columns lo <= c < hi only.

    w[k].r is byte r, signed, of each int32 of w[k]; x[c].r = X[ix + o_r + c ld : + L], uint8, with
    o_0 = 0. step and rows <= 4 are constants. Only the first `cols` elements of x[c] are read
    unless that is a constant; constant lo and hi save the branches.
    """
    _int32("slide_bytes", acc, w)
    check_array("slide_bytes", X, types.uint8)
    S, R, static = constant(step), constant(rows), static_bounds(lo, hi)
    part = not isinstance(cols, types.IntegerLiteral)
    L, vec = acc.lanes, acc.vector

    def emit(code, acc, w, step, rows, X, ix, o1, o2, o3, ld, lo, hi, cols):
        b = code.builder

        def load(offset, c):
            start = code.at(X, b.add(ix, offset) if offset is not None else ix, c, ld)
            if part:
                bytes_ = _masked_bytes(code, start, code.mask(cols, L))
            else:
                bytes_ = code.load(start, _byte_vector(L))
            return b.zext(bytes_, vec)

        def column(c, old):
            pairs = [(o, c - o * S) for o in range(len(old)) if 0 <= c - o * S < len(w)]
            if not pairs:
                return {}
            x = load(None, c)
            for r, offset in enumerate((o1, o2, o3)[: R - 1], 1):
                shift = ir.Constant(vec, [8 * r] * L)
                x = b.or_(x, b.shl(load(offset, c), shift))
            return {o: code.dot4(old[o], x, w[k][0]) for o, k in pairs}

        return _columns(code, acc, (len(acc) - 1) * S + len(w), (lo, hi), static, column)

    kinds = (acc, w, step, rows, X, *[OFFSET] * 5, *bound_types(lo, hi), OFFSET if part else cols)
    return primitive(acc, kinds, emit)


# --- storing --------------------------------------------------------------------------------------


def _clamped(code: Any, x: Any, low: Any, high: Any) -> Any:
    """min(max(x, low), high); NaN gives low."""
    x = code.builder.select(code.builder.fcmp_ordered(">", x, low), x, low)
    return code.builder.select(code.builder.fcmp_ordered("<", x, high), x, high)


def _store_scaled(name: str, x: Any, scale: Any, Y: Any, part: Any) -> Any:
    check_tile(name, x, scale)
    check_array(name, Y, types.uint8, types.float32)
    fits = (scale.lanes, scale.mr) == (x.lanes, 1) and scale.nr in (1, x.nr)
    if not fits or scale.dtype != types.float32 or x.dtype not in (types.int32, types.float32):
        raise TypingError(f"simd_int.{name}: {x} and scale {scale} do not fit")
    L, integer, to_bytes = x.lanes, x.dtype == types.int32, Y.dtype == types.uint8

    def emit(code, x, scale, low, high, zero, Y, iy, ld, *limits):
        b, real = code.builder, ir.VectorType(ir.FloatType(), L)
        low, high = code.splat(low, L), code.splat(high, L)
        if to_bytes:
            zero = code.splat(b.trunc(zero, I8), L)

        def result(v, j):
            v = b.sitofp(v, real) if integer else v
            v = _clamped(code, b.fmul(v, scale[0][min(j, len(scale[0]) - 1)]), low, high)
            if not to_bytes:
                return v
            v = b.fadd(v, ir.Constant(real, [_ROUND] * L))
            return b.add(b.trunc(b.bitcast(v, ir.VectorType(I32, L)), _byte_vector(L)), zero)

        masks = code.masks(limits[2], len(x[0]), L) if limits else None

        def row(i):
            for j, v in enumerate(x[i]):
                pointer, y = code.at(Y, iy, i, ld, j * L), result(v, j)
                if masks is None:
                    b.store(y, b.bitcast(pointer, y.type.as_pointer()), align=1 if to_bytes else 4)
                elif to_bytes:
                    _masked_bytes(code, pointer, masks[j], y)
                else:
                    code.masked(pointer, real, masks[j], y)
            return []

        if limits:
            code.rows_within(*(static_bounds(*part) or limits[:2]), len(x), row)
        else:
            for i in range(len(x)):
                row(i)

    real = types.float32
    kinds = (x, scale, real, real, types.int32, Y, OFFSET, OFFSET)
    return primitive(types.void, (*kinds, *bound_types(*part), OFFSET) if part else kinds, emit)


@tile_intrinsic
def store_scaled(typing, x, scale, low, high, zero, Y, iy, ld):
    """Y[iy + i ld + j L : + L] = min(max(x[i, j] scale[0, j], low), high), as Y's dtype.

    x int32 (rounded to float32, to nearest even) or float32; scale float32; the product rounded
    once. NaN gives low. float32 Y takes that as it is, uint8 Y rounded, half to even, + zero:
    low and high must be integers with 0 <= low + zero and high + zero <= 255.
    """
    return _store_scaled("store_scaled", x, scale, Y, ())


@tile_intrinsic
def store_scaled_part(typing, x, scale, low, high, zero, Y, iy, ld, lo, hi, cols):
    """As `store_scaled`, in rows lo <= i < hi and the first `cols` elements of each row.

    Memory outside that part is not written.
    """
    return _store_scaled("store_scaled_part", x, scale, Y, (lo, hi))
