"""Primitives of integer kernels: bytes into tiles of int32, and sums of int32 out as bytes.

They follow the rules of `kernels.simd`. Nothing here depends on the instruction set, and everything
gives the same bits at every level: integers are exact or wrap around, and no floating-point result
has more than one operation between two roundings, so that there is nothing to fuse or to reorder.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError

from kernels import _bytes
from kernels._emit import I32, I64, Tile, constant, static_bounds
from kernels._levels import LANES, WIDENS_IMAGES
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


def _int32(name: str, *kinds: Any) -> None:
    check_tile(name, *kinds)
    for kind in kinds:
        if kind.dtype != types.int32:
            raise TypingError(f"simd_int.{name}: expected a Tile of int32, got {kind}")


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
            bytes_ = code.load(code.at(X, ix, i, ld, j * L), _bytes.vector(L))
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
        masks = [_bytes.mask(code, code.builder.sub(cols, I64(j * L)), L) for j in range(tile.nr)]

        def vector(i, j):
            bytes_ = _bytes.masked(code, code.at(X, ix, i, ld, j * L), L, masks[j])
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
            mask = _bytes.mask(code, cols, 4 * LANES)
            x = _bytes.masked(code, code.at(X, ix), 4 * LANES, mask)
        else:
            x = code.load(code.at(X, ix), _bytes.vector(4 * LANES))
        return [[code.builder.bitcast(x, tile.vector)]]

    return primitive(tile, (X, OFFSET, OFFSET if part else cols), emit)


@tile_intrinsic
def max_bytes(typing, x, y):
    """The larger of each byte of x and y, unsigned."""
    _int32("max_bytes", x, y)

    def op(code, p, q):
        b, kind, whole = code.builder, _bytes.vector(4 * x.lanes), p.type
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
        kind, pointer = _bytes.vector(4 * x[0][0].type.count), code.at(Y, iy)
        y = code.builder.bitcast(x[0][0], kind)
        if part:
            mask = _bytes.mask(code, cols, kind.count)
            _bytes.masked(code, pointer, kind.count, mask, y)
        else:
            code.builder.store(y, code.builder.bitcast(pointer, kind.as_pointer()), align=1)

    return primitive(types.void, (x, Y, OFFSET, OFFSET if part else cols), emit)


@tile_intrinsic
def load_rows(typing, mr, nr, X, ix, ld, index, at):
    """x[i, j] = X[ix + index[at + i] ld + j L : + L]: rows chosen by an int64 array."""
    return _load_rows("load_rows", new_tile(mr, nr, X), mr, nr, X, index)


def _load_rows(name: str, tile: Tile, mr: Any, size: Any, X: Any, index: Any) -> Any:
    check_array(name, X, types.int32)
    check_array(name, index, types.int64)

    def emit(code, mr, size, X, ix, ld, index, at):
        b, rows = code.builder, []
        for i in range(tile.mr):
            row = b.load(code.at(index, at, extra=i))
            start = b.add(ix, b.mul(row, ld))
            rows.append(
                [code.load(code.at(X, start, extra=j * tile.lanes), tile.vector)
                 for j in range(tile.nr)]
            )  # fmt: skip
        return rows

    return primitive(tile, (mr, size, X, OFFSET, OFFSET, index, OFFSET), emit)


@tile_intrinsic
def four_rows(typing, mr, lanes, X, ix, ld, index, at):
    """As `load_rows`, four vectors of so many lanes a row."""
    tile = Tile(constant(mr), 4, X.dtype, constant(lanes))
    return _load_rows("four_rows", tile, mr, lanes, X, index)


@tile_intrinsic
def four(typing, mr, lanes, X, ix, ld):
    """x[i, v] = X[ix + i ld + v lanes : + lanes], v < 4; int32 or float32."""
    check_array("four", X, types.int32, types.float32)
    tile = Tile(constant(mr), 4, X.dtype, constant(lanes))

    def emit(code, mr, lanes, X, ix, ld):
        starts = [[code.at(X, ix, i, ld, v * tile.lanes) for v in range(4)] for i in range(tile.mr)]
        return [[code.load(start, tile.vector) for start in row] for row in starts]

    return primitive(tile, (mr, lanes, X, OFFSET, OFFSET), emit)


@tile_intrinsic
def repeated(typing, mr, x):
    """A tile of mr rows, each of them that of x, which has one."""
    check_tile("repeated", x)
    tile = Tile(constant(mr), x.nr, x.dtype, x.lanes)
    return primitive(tile, (mr, x), lambda code, mr, x: x * tile.mr)


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
def bit_and(typing, x, mask):
    """x & mask, one number."""
    _int32("bit_and", x)

    def emit(code, x, mask):
        mask = code.splat(mask, x[0][0].type.count)
        return [[code.builder.and_(v, mask) for v in row] for row in x]

    return primitive(x, (x, types.int32), emit)


@tile_intrinsic
def div(typing, x, y):
    """x / y of floating-point tiles."""
    return _elementwise("div", lambda code, p, q: code.builder.fdiv(p, q), x, y)


def _dot4(name: str, acc: Any, A: Any, B: Any, lo: Any = None, hi: Any = None) -> Any:
    _int32(name, acc)
    check_array(name, A, types.uint8)
    check_array(name, B, types.int8)
    vec, L = acc.vector, acc.lanes
    bytes_ = _bytes.vector(4 * L)

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
    """Apply column(c, x), which gives new rows by number, for each c < count within the bounds."""
    x, b = list(x), code.builder
    for c in range(count):
        if static:
            if static[0] <= c < static[1]:
                for i, row in column(c, x).items():
                    x[i] = row
            continue
        inside = b.and_(
            b.icmp_signed("<=", bounds[0], I64(c)), b.icmp_signed("<", I64(c), bounds[1])
        )
        before = b.block
        with b.if_then(inside):
            new, end = column(c, x), b.block
        for i, row in new.items():
            merged = []
            for was, now in zip(x[i], row, strict=True):
                merged.append(_bytes.merged(b, (was, before), (now, end)))
            x[i] = merged
    return x


@tile_intrinsic
def slide_bytes(typing, acc, w, step, rows, X, ix, o1, o2, o3, ld, lo, hi, cols):
    """acc[o] += sum_{k, r < rows} w[k].r x[o step + k].r of columns lo <= c < hi only.

    acc and w have four vectors of int32 a row, w[k].r is byte PLACES[r], signed, of lanes of w[k];
    x[c].r = X[ix + o_r + c ld : + 4 lanes], uint8, with o_0 = 0, INTERLEAVED: see `kernels._bytes`.
    step and rows <= 4 are constants. Only the first `cols` elements of x[c] are read unless that is
    a constant; constant lo and hi save the branches.
    """
    _int32("slide_bytes", acc, w)
    check_array("slide_bytes", X, types.uint8)
    if (acc.nr, acc.lanes) != (4, w.lanes) or w.nr != 4:
        raise TypingError(f"simd_int.slide_bytes: {acc} and {w} do not fit")
    S, R, static = constant(step), constant(rows), static_bounds(lo, hi)
    part, kind = not isinstance(cols, types.IntegerLiteral), _bytes.vector(4 * acc.lanes)

    def emit(code, acc, w, step, rows, X, ix, o1, o2, o3, ld, lo, hi, cols):
        if WIDENS_IMAGES:
            w = [[_bytes.weight_pairs(code, v) for v in row] for row in w]
        starts = [ix, *(code.builder.add(ix, o) for o in (o1, o2, o3)[: R - 1])]
        mask = _bytes.mask(code, cols, kind.count) if part else None

        def load(start, c):
            pointer = code.at(X, start, c, ld)
            if not part:
                return code.load(pointer, kind)
            return _bytes.masked(code, pointer, kind.count, mask)

        def summed(row, x, w):
            for i, vectors in enumerate(x):
                row = [code.dot2(*zpq) for zpq in zip(row, vectors, [q[i] for q in w], strict=True)]
            return row

        def column(c, old):
            pairs = [(o, c - o * S) for o in range(len(old)) if 0 <= c - o * S < len(w)]
            if not pairs:
                return {}
            loaded = [load(start, c) for start in starts]
            if WIDENS_IMAGES:
                x = _bytes.paired(code, loaded)
                return {o: summed(old[o], x, w[k]) for o, k in pairs}
            x = _bytes.interleaved(code, loaded)
            return {
                o: [_bytes.dot4(code, *zuw) for zuw in zip(old[o], x, w[k], strict=True)]
                for o, k in pairs
            }

        return _columns(code, acc, (len(acc) - 1) * S + len(w), (lo, hi), static, column)

    kinds = (acc, w, step, rows, X, *[OFFSET] * 5, *bound_types(lo, hi), OFFSET if part else cols)
    return primitive(acc, kinds, emit)


# --- storing --------------------------------------------------------------------------------------


def _natural(code: Any, four: list[Any]) -> list[Any]:
    """Four INTERLEAVED vectors in their natural order."""
    L = four[0].type.count
    pairs = [code.shuffle(*four[i : i + 2], list(range(2 * L))) for i in (0, 2)]
    order = [v * L + 4 * k + t for k in range(L // 4) for v in range(4) for t in range(4)]
    return [code.shuffle(*pairs, order[j * L : (j + 1) * L]) for j in range(4)]


def _store_scaled(
    name: str, x: Any, scale: Any, high: Any, Y: Any, part: Any, spread: bool = False
) -> Any:
    check_tile(name, x, scale)
    check_array(name, Y, types.uint8, types.float32)
    fits = (scale.lanes, scale.mr) == (x.lanes, 1) and scale.nr in (1, x.nr)
    if not fits or scale.dtype != types.float32 or x.dtype not in (types.int32, types.float32):
        raise TypingError(f"simd_int.{name}: {x} and scale {scale} do not fit")
    L, integer, to_bytes = x.lanes, x.dtype == types.int32, Y.dtype == types.uint8
    small, one = isinstance(high, types.Integer), types.float32
    if small and not (integer and to_bytes):
        raise TypingError(f"simd_int.{name}: {x} to {Y} requires high of float32, got {high}")
    real = ir.VectorType(ir.FloatType(), L)

    def emit(code, x, scale, low, high, zero, Y, iy, ld, *limits):
        b = code.builder
        bounds = I32(0), I32(255)
        if to_bytes:
            top = high if small else b.fptosi(high, I32)
            bounds = b.add(b.fptosi(low, I32), zero), b.add(top, zero)
        low, high = (
            code.splat(v, L) for v in (low, b.sitofp(high, real.element) if small else high)
        )

        def number(v, j):
            v = b.fmul(b.sitofp(v, real) if integer else v, scale[0][min(j, len(scale[0]) - 1)])
            if not (integer and to_bytes):  # NaN gives low
                v = b.select(b.fcmp_ordered(">", v, low), v, low)
            if small and _bytes.SATURATING:
                return v
            return b.select(b.fcmp_ordered("<", v, high), v, high)

        def vectors(row):
            """Where each vector to be stored begins, and the vector."""
            v = [number(v, j) for j, v in enumerate(row)]
            if not to_bytes:
                return [(j * L, w) for j, w in enumerate(_natural(code, v) if spread else v)]
            found, j = [], 0
            while j < len(v):
                count = next(n for n in (4, 2, 1) if j + n <= len(v))
                y = _bytes.rounded(code, v[j : j + count] * (4 // count), bounds, zero)
                if not spread:
                    order = [4 * k + i for i in range(count) for k in range(L // 4)]
                    y = _bytes.quarters(code, y, order)
                found.append((j * L, y))
                j += count
            return found

        def row(i):
            for start, y in vectors(x[i]):
                pointer = code.at(Y, iy, i, ld, start)
                if not limits:
                    code.store(y, pointer)
                    continue
                left, count = b.sub(limits[2], I64(start)), y.type.count
                if to_bytes:
                    _bytes.masked(code, pointer, count, _bytes.mask(code, left, count), y)
                else:
                    code.masked(pointer, real, _bytes.lanes(code, left, count), y)
            return []

        if limits:
            code.rows_within(*(static_bounds(*part) or limits[:2]), len(x), row)
        else:
            for i in range(len(x)):
                row(i)

    kinds = (x, scale, one, types.int32 if small else one, types.int32, Y, OFFSET, OFFSET)
    return primitive(types.void, (*kinds, *bound_types(*part), OFFSET) if part else kinds, emit)


@tile_intrinsic
def store_scaled(typing, x, scale, low, high, zero, Y, iy, ld):
    """Y[iy + i ld + j L : + L] = min(max(x[i, j] scale[0, j], low), high), as Y's dtype.

    x int32 (rounded to float32, to nearest even) or float32; scale float32; the product rounded
    once. NaN gives low. float32 Y takes that as it is, uint8 Y rounded, half to even, + zero:
    low and high must be integers with 0 <= low + zero and high + zero <= 255. An int32 as high, for
    tiles of int32 to bytes, promises that no x[i, j] scale[0, j] leaves int32, which saves time.
    """
    return _store_scaled("store_scaled", x, scale, high, Y, ())


@tile_intrinsic
def store_scaled_part(typing, x, scale, low, high, zero, Y, iy, ld, lo, hi, cols):
    """As `store_scaled`, in rows lo <= i < hi and the first `cols` elements of each row.

    Memory outside that part is not written.
    """
    return _store_scaled("store_scaled_part", x, scale, high, Y, (lo, hi))


@tile_intrinsic
def store_interleaved(typing, x, scale, low, high, zero, Y, iy, ld):
    """As `store_scaled`, of four vectors a row which are INTERLEAVED, as are those of `scale`."""
    return _store_scaled("store_interleaved", x, scale, high, Y, (), True)


@tile_intrinsic
def store_interleaved_part(typing, x, scale, low, high, zero, Y, iy, ld, lo, hi, cols):
    """As `store_scaled_part`, likewise."""
    return _store_scaled("store_interleaved_part", x, scale, high, Y, (lo, hi), True)
