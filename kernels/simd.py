"""Explicit vectors for Numba: a block of registers, and the few operations kernels are made of.

Numba compiles Python loops through LLVM, whose vectoriser does not find the arrangement that keeps
a processor's multiply-add units busy. This file lets a kernel state it. It adds one type to Numba:

    Tile    mr x nr vectors of `lanes(array)` elements each, held in registers

and functions on it that can be called from jitted code only. Each becomes one or a few machine
instructions per vector. Loops, offsets and conditions stay ordinary Python:

    @jit
    def product(A, B, C):                 # C = A B;  A (M, K), B (K, N), C (M, N)
        M, K = A.shape                    # M % 6 == 0, N % (4 * lanes) == 0
        N = B.shape[1]
        for n in range(0, N, 4 * simd.lanes(C)):
            for m in range(0, M, 6):
                acc = simd.zeros(6, 4, C)
                for k in range(K):
                    acc = simd.rank1(acc, A, m * K + k, K, B, k * N + n)
                simd.store(acc, C, m * N + n, N)

In each step of k the tile takes 4 vectors of B, and 6 numbers of A spread over a vector each, and
does 24 multiply-adds: 10 loads for 24 vector operations, where plain loops need two each. 24 sums,
4 vectors and one spread number fill 29 of the 32 registers that AVX-512 has.

Rules that hold for every function here:
- A tile is a value: `acc = simd.rank1(acc, ...)` gives the tile after the update.
- `mr` and `nr` must be compile-time constants: written out, or a bare name of a global or of a
  variable of an enclosing function. `MR - 1` is not one.
- nr = 0 stands for one vector of half the lanes, which wastes less on short rows.
- Arrays are C-contiguous, of any number of dimensions, and addressed FLAT: an offset counts
  elements from the start; `ld` is the distance between two rows of a tile. Nothing is checked.
- The element type of a tile is that of the array given to `zeros`, `load`, `fill`: float32, float64
  or int32. A vector has `lanes(array)` elements, so that one source serves all of them.
- In formulas L is the lanes; i a row, j a vector, l a lane; x[i, j] a vector.
- In `x op y`, y may have one row, which serves all rows of x, or one column of vectors, likewise.

How it works: an `intrinsic` is a Python function that Numba runs once, while compiling. It returns
the type of the result, and a function that writes the instructions through LLVM's builder. A
primitive below is its formula, a check of types, and `emit`, which loops over rows and vectors when
compiling: the loop is gone from the machine code. What all of them share is in `kernels._primitive`
and `kernels._emit`; the instruction sets, of which this processor has one, in `kernels._levels`.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError

from kernels import _levels
from kernels._emit import I8, I32, I64, SCALARS, Tile, constant, static_bounds
from kernels._levels import LANES, LEVEL, LEVELS, ROWS, TILE, available
from kernels._primitive import (
    OFFSET,
    bound_types,
    check_array,
    check_tile,
    lanes_of,
    new_tile,
    primitive,
    tile_intrinsic,
)
from kernels._slide import slide, slide_sums

__all__ = ["LANES", "LEVEL", "LEVELS", "ROWS", "TILE", "available", "slide", "slide_sums"]

# --- making tiles ---------------------------------------------------------------------------------


@tile_intrinsic
def lanes(typing, array):
    """L, the number of elements of a vector of the array's dtype."""
    check_array("lanes", array, *SCALARS)
    count = lanes_of(array)
    return primitive(OFFSET, (array,), lambda code, a: I64(count))


@tile_intrinsic
def zeros(typing, mr, nr, array):
    """x[i, j] = 0, of the array's dtype."""
    check_array("zeros", array, *SCALARS)
    tile = new_tile(mr, nr, array)
    zero = ir.Constant(tile.vector, None)
    rows = [[zero] * tile.nr for _ in range(tile.mr)]
    return primitive(tile, (mr, nr, array), lambda code, *_: rows)


@tile_intrinsic
def fill(typing, mr, nr, array, value):
    """x[i, j, l] = value, of the array's dtype."""
    check_array("fill", array, *SCALARS)
    tile = new_tile(mr, nr, array)

    def emit(code, mr, nr, array, value):
        return [[code.splat(value, tile.lanes)] * tile.nr] * tile.mr

    return primitive(tile, (mr, nr, array, tile.dtype), emit)


@tile_intrinsic
def load(typing, mr, nr, X, ix, ld):
    """x[i, j] = X[ix + i ld + j L : + L]."""
    check_array("load", X, *SCALARS)
    tile = new_tile(mr, nr, X)
    vec, L = tile.vector, tile.lanes

    def emit(code, mr, nr, X, ix, ld):
        return [
            [code.load(code.at(X, ix, i, ld, j * L), vec) for j in range(tile.nr)]
            for i in range(tile.mr)
        ]

    return primitive(tile, (mr, nr, X, OFFSET, OFFSET), emit)


@tile_intrinsic
def load_part(typing, mr, nr, X, ix, ld, lo, hi, cols):
    """As `load` in rows lo <= i < hi and the first `cols` elements of each row, 0 elsewhere.

    Memory outside that part is not read. lo and hi may vary; constants save the branches.
    """
    check_array("load_part", X, *SCALARS)
    tile = new_tile(mr, nr, X)
    vec, L, static = tile.vector, tile.lanes, static_bounds(lo, hi)

    def emit(code, mr, nr, X, ix, ld, lo, hi, cols):
        masks = code.masks(cols, tile.nr, L)

        def row(i):
            return [
                code.masked(code.at(X, ix, i, ld, j * L), vec, masks[j]) for j in range(tile.nr)
            ]

        zero = [[ir.Constant(vec, None)] * tile.nr] * tile.mr
        return code.rows_within(*(static or (lo, hi)), tile.mr, row, zero)

    return primitive(tile, (mr, nr, X, OFFSET, OFFSET, *bound_types(lo, hi), OFFSET), emit)


@tile_intrinsic
def prefetch(typing, mr, X, ix, ld):
    """Asks for the cache lines of X[ix + i ld], i < mr, ahead of their use; any address will do.

    Into the second-level cache. Cheap only for lines that follow each other.
    """
    check_array("prefetch", X, *SCALARS)
    count = constant(mr)

    def emit(code, mr, X, ix, ld):
        for i in range(count):
            pointer = code.builder.bitcast(code.at(X, ix, i, ld), I8.as_pointer())
            args = (pointer, I32(0), I32(2), I32(1))  # to read, not into the first level, data
            code.call("llvm.prefetch.p0", ir.VoidType(), *args)

    return primitive(types.void, (mr, X, OFFSET, OFFSET), emit)


@tile_intrinsic
def spread(typing, mr, X, ix, ld):
    """x[i, 0, l] = X[ix + i ld]: one number a row, in every lane."""
    check_array("spread", X, *SCALARS)
    tile = Tile(constant(mr), 1, X.dtype, lanes_of(X))

    def emit(code, mr, X, ix, ld):
        load = code.builder.load
        return [[code.splat(load(code.at(X, ix, i, ld)), tile.lanes)] for i in range(tile.mr)]

    return primitive(tile, (mr, X, OFFSET, OFFSET), emit)


@tile_intrinsic
def rows(typing, x, lo, hi):
    """x[lo : hi], the rows lo <= i < hi; constants."""
    check_tile("rows", x)
    first, last = constant(lo), constant(hi)
    tile = Tile(last - first, x.nr, x.dtype, x.lanes)
    return primitive(tile, (x, lo, hi), lambda code, x, lo, hi: x[first:last])


# --- products -------------------------------------------------------------------------------------


def _rank1(name: str, acc: Any, A: Any, B: Any, lo: Any = None, hi: Any = None) -> Any:
    check_tile(name, acc)
    check_array(name, A, acc.dtype)
    check_array(name, B, acc.dtype)
    vec, L = acc.vector, acc.lanes

    def vectors(code, B, ib):
        return [code.load(code.at(B, ib, extra=j * L), vec) for j in range(acc.nr)]

    def row(code, x, A, ia, lda, b, i):
        a = code.splat(code.builder.load(code.row_of(A, ia, i, lda)), L)
        return [code.fma(a, b[j], x[i][j]) for j in range(acc.nr)]

    return _update(acc, (acc, A, OFFSET, OFFSET, B, OFFSET), vectors, row, lo, hi)


def _update(acc: Any, kinds: tuple[Any, ...], vectors: Any, row: Any, lo: Any, hi: Any) -> Any:
    """x[i] += a[i] b for all rows, or for lo <= i < hi."""
    if lo is None:

        def emit(code, x, A, ia, lda, B, ib):
            b = vectors(code, B, ib)
            return [row(code, x, A, ia, lda, b, i) for i in range(acc.mr)]

        return primitive(acc, kinds, emit)
    static = static_bounds(lo, hi)

    def emit_rows(code, x, A, ia, lda, B, ib, lo, hi):
        b = vectors(code, B, ib)
        bounds = static or (lo, hi)
        return code.rows_within(*bounds, acc.mr, lambda i: row(code, x, A, ia, lda, b, i), x)

    return primitive(acc, (*kinds, *bound_types(lo, hi)), emit_rows)


@tile_intrinsic
def rank1(typing, acc, A, ia, lda, B, ib):
    """acc[i, j] += A[ia + i lda] B[ib + j L : + L]."""
    return _rank1("rank1", acc, A, B)


@tile_intrinsic
def rank1_rows(typing, acc, A, ia, lda, B, ib, lo, hi):
    """As `rank1`, in rows lo <= i < hi only. A is not read for others; constants save branches."""
    return _rank1("rank1_rows", acc, A, B, lo, hi)


@tile_intrinsic
def rolled(typing):
    """No instruction: LLVM leaves the loop that calls it as it is.

    Unrolled, the loop around a tile that fills the registers keeps some of it in memory, or the
    offsets of its rows, which each copy of the loop's body wants in registers of its own.
    """
    return primitive(types.void, (), _rolled)


@tile_intrinsic
def rolled_32(typing):
    """As `rolled`, but only on levels of 32 registers: others do better with such loops unrolled.

    Their tiles are smaller, and all offsets are found anew in each pass.
    """
    many = len(_levels.CHOSEN.rows) > len(_levels.REGISTERS_16)
    return primitive(types.void, (), _rolled if many else lambda code: None)


def _rolled(code: Any) -> None:
    nothing = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "", True)
    # One of LLVM's own attributes, which llvmlite's list of known ones lacks.
    set.add(code.builder.call(nothing, []).attributes, "noduplicate")


# --- element by element ---------------------------------------------------------------------------


def _elementwise(name: str, op: Callable[..., Any], *tiles: Any) -> Any:
    """op(code, x[i, j], y[i, j], ...), of the first tile's shape."""
    check_tile(name, *tiles)
    x = tiles[0]
    for y in tiles[1:]:
        if y.vector != x.vector or y.mr not in (1, x.mr) or y.nr not in (1, x.nr):
            raise TypingError(f"simd.{name}: {y} does not fit {x}")

    def emit(code, *values):
        def pick(v, i, j):
            row = v[min(i, len(v) - 1)]
            return row[min(j, len(row) - 1)]

        return [
            [op(code, *(pick(v, i, j) for v in values)) for j in range(x.nr)] for i in range(x.mr)
        ]

    return primitive(x, tiles, emit)


def _arithmetic(name: str, x: Any, y: Any) -> Any:
    # fadd, fsub, fmul, or add, sub, mul
    prefix = "f" if isinstance(getattr(x, "dtype", None), types.Float) else ""
    return _elementwise(name, lambda code, p, q: getattr(code.builder, prefix + name)(p, q), x, y)


@tile_intrinsic
def add(typing, x, y):
    """x + y."""
    return _arithmetic("add", x, y)


@tile_intrinsic
def sub(typing, x, y):
    """x - y."""
    return _arithmetic("sub", x, y)


@tile_intrinsic
def mul(typing, x, y):
    """x y."""
    return _arithmetic("mul", x, y)


@tile_intrinsic
def fma(typing, acc, x, y):
    """acc + x y, rounded once where the processor can."""
    return _elementwise("fma", lambda code, z, p, q: code.fma(p, q, z), acc, x, y)


def _select(code: Any, sign: str, p: Any, q: Any, yes: Any, no: Any) -> Any:
    integer = isinstance(p.type.element, ir.IntType)
    compare = code.builder.icmp_signed if integer else code.builder.fcmp_ordered
    return code.builder.select(compare(sign, p, q), yes, no)


@tile_intrinsic
def maximum(typing, x, y):
    """y where x < y, else x: max, where NaN in x stays and NaN in y is passed over.

    With y = 0 it is ReLU, with y = -inf it does nothing.
    """
    return _elementwise("maximum", lambda code, p, q: _select(code, "<", p, q, q, p), x, y)


@tile_intrinsic
def greater(typing, x, y, p, q):
    """p where x > y, else q: NaN in x or y gives q. All of x's shape, or broadcast to it."""
    return _elementwise(
        "greater", lambda code, a, b, c, d: _select(code, ">", a, b, c, d), x, y, p, q
    )


@tile_intrinsic
def above(typing, x, y, p, q):
    """p where x > y, or x is NaN and y is not; else q. p and q of one type, with x's lanes."""

    def wins(code, a, b):
        known = code.builder.fcmp_ordered("ord", b, b)
        return code.builder.and_(code.builder.fcmp_unordered(">", a, b), known)

    return _choice("above", wins, x, y, p, q)


@tile_intrinsic
def equal(typing, x, y, p, q):
    """p where x = y, integers; else q. p and q of one type, with x's lanes."""
    return _choice("equal", lambda code, a, b: code.builder.icmp_signed("==", a, b), x, y, p, q)


def _choice(name: str, wins: Callable[..., Any], x: Any, y: Any, p: Any, q: Any) -> Any:
    """p[i, j] where wins(code, x[i, j], y[i, j]), else q[i, j]."""
    check_tile(name, x, y, p, q)
    if x != y or p != q or (x.mr, x.nr, x.lanes) != (p.mr, p.nr, p.lanes):
        raise TypingError(f"simd.{name}: {x}, {y}, {p}, {q} do not fit")

    def emit(code, *tiles):
        def pick(a, b, c, d):
            return code.builder.select(wins(code, a, b), c, d)

        return [[pick(*v) for v in zip(*r, strict=True)] for r in zip(*tiles, strict=True)]

    return primitive(p, (x, y, p, q), emit)


@tile_intrinsic
def gate(typing, g, y):
    """0 where y <= 0, else g: the gradient of ReLU from its result y, NaN in y lets g pass."""

    def op(code, p, q):
        zero = ir.Constant(p.type, None)
        return _select(code, "<=", q, zero, zero, p)

    return _elementwise("gate", op, g, y)


@tile_intrinsic
def row_sum(typing, x, i):
    """sum_{j, l} x[i, j, l], a number; i a constant. Vectors are added first, then halves."""
    check_tile("row_sum", x)
    row = constant(i)

    def emit(code, x, i):
        integer = isinstance(x[0][0].type.element, ir.IntType)
        plus = code.builder.add if integer else code.builder.fadd
        total = x[row][0]
        for v in x[row][1:]:
            total = plus(total, v)
        while total.type.count > 1:
            half = total.type.count // 2
            low, high = (list(range(k, k + half)) for k in (0, half))
            total = plus(code.shuffle(total, total, low), code.shuffle(total, total, high))
        return code.builder.extract_element(total, I32(0))

    return primitive(x.dtype, (x, i), emit)


@tile_intrinsic
def transpose(typing, x):
    """y[i, 0, l] = x[l, 0, i] of a square block: L rows of one vector."""
    check_tile("transpose", x)
    if (x.mr, x.nr) != (x.lanes, 1):
        raise TypingError(f"simd.transpose: expected {x.lanes} rows of one vector, got {x}")

    def emit(code, x):
        v, L = [row[0] for row in x], len(x)
        step = 1
        while step < L:  # swap the off-diagonal blocks of every 2 step x 2 step block
            for i in (i for i in range(L) if not i & step):
                a, b = v[i], v[i + step]
                v[i] = code.shuffle(a, b, [n if not n & step else L + n - step for n in range(L)])
                v[i + step] = code.shuffle(
                    a, b, [n + step if not n & step else L + n for n in range(L)]
                )
            step *= 2
        return [[row] for row in v]

    return primitive(x, (x,), emit)


# --- storing --------------------------------------------------------------------------------------


def _store(name: str, x: Any, C: Any, write: Callable[..., Any]) -> Any:
    check_tile(name, x)
    check_array(name, C, x.dtype)

    def emit(code, x, C, ic, ldc):
        for i, row in enumerate(x):
            for j, v in enumerate(row):
                write(code, v, code.at(C, ic, i, ldc, j * v.type.count))

    return primitive(types.void, (x, C, OFFSET, OFFSET), emit)


@tile_intrinsic
def store(typing, x, C, ic, ldc):
    """C[ic + i ldc + j L : + L] = x[i, j]."""
    return _store("store", x, C, lambda code, v, pointer: code.store(v, pointer))


@tile_intrinsic
def stream(typing, x, C, ic, ldc):
    """As `store`, past the caches where the address is a multiple of the vector's bytes.

    Pays for results larger than the last-level cache. End the loop with `fence()`.
    """

    def write(code, v, pointer):
        b, size = code.builder, _levels.CHOSEN.vector_bytes
        low = b.and_(b.ptrtoint(pointer, I64), I64(size - 1))
        with b.if_else(b.icmp_unsigned("==", low, I64(0))) as (aligned, other):
            with aligned:
                hint = code.builder.module.add_metadata([I32(1)])
                code.store(v, pointer, size).set_metadata("nontemporal", hint)
            with other:
                code.store(v, pointer)

    return _store("stream", x, C, write)


@tile_intrinsic
def fence(typing):
    """Makes what `stream` wrote visible to other threads."""
    return primitive(types.void, (), lambda code: code.builder.fence("seq_cst") and None)


@tile_intrinsic
def store_part(typing, x, C, ic, ldc, lo, hi, cols):
    """As `store`, in rows lo <= i < hi and the first `cols` elements of each row.

    Memory outside that part is not written. lo and hi may vary; constants save the branches.
    """
    check_tile("store_part", x)
    check_array("store_part", C, x.dtype)
    vec, L, static = x.vector, x.lanes, static_bounds(lo, hi)

    def emit(code, x, C, ic, ldc, lo, hi, cols):
        masks = code.masks(cols, len(x[0]), L)

        def row(i):
            for j, v in enumerate(x[i]):
                code.masked(code.at(C, ic, i, ldc, j * L), vec, masks[j], v)
            return []

        code.rows_within(*(static or (lo, hi)), len(x), row)

    return primitive(types.void, (x, C, OFFSET, OFFSET, *bound_types(lo, hi), OFFSET), emit)
