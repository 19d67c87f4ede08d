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
compiling: the loop is gone from the machine code. The class `_Code` holds what all of them write.

All knowledge of instruction sets is in `LEVELS` and in `_Code.dot4`. `LEVEL` is the best level of
this processor, or the one named by the environment variable TINYNN_CPU. Floating point may round
differently from level to level, integers never differ.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from kernels._emit import I8, I16, I32, I64, SCALARS, Code, Tile, constant, static_bounds, suffix

# --- instruction sets -----------------------------------------------------------------------------


class Level(NamedTuple):
    """What a set of vector instructions offers, and how LLVM is told to use no more than it."""

    needs: frozenset[str]  # features of the processor, by LLVM's names
    vector_bytes: int
    rows: tuple[int, ...]  # rows of the tallest tile of 1, 2, ... vectors that fits the registers
    dot4: str  # how a product of bytes is summed: "vpdpbusd", "pmaddwd" or "plain"
    cpu: tuple[str, str]  # LLVM's processor name and extra features, when the level is forced


_AVX2 = frozenset({"avx2", "fma"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}) | _AVX2
_32_REGISTERS, _16_REGISTERS = (12, 12, 8, 6), (12, 6)

#: By name, best first.
LEVELS = {
    "avx512vnni": Level(
        _AVX512 | {"avx512vnni"}, 64, _32_REGISTERS, "vpdpbusd", ("x86-64-v4", "+avx512vnni")
    ),
    "avx512": Level(_AVX512, 64, _32_REGISTERS, "pmaddwd", ("x86-64-v4", "")),
    "avx2vnni": Level(
        _AVX2 | {"avxvnni"}, 32, _16_REGISTERS, "vpdpbusd", ("x86-64-v3", "+avxvnni")
    ),
    "avx2": Level(_AVX2, 32, _16_REGISTERS, "pmaddwd", ("x86-64-v3", "")),
    "neon": Level(frozenset({"neon"}), 16, _32_REGISTERS, "plain", ("generic", "+neon")),
    "portable": Level(frozenset(), 16, _16_REGISTERS, "plain", ("", "")),
}


def _features() -> set[str]:
    """The processor's features, as far as Numba is allowed to use them."""
    flags = _config.CPU_FEATURES
    if flags is None:
        try:
            flags = llvm.get_host_cpu_features().flatten()
        except RuntimeError:  # LLVM does not know this processor
            flags = ""
    found = {f[1:] for f in flags.split(",") if f.startswith("+")}
    if platform.machine().lower() in ("arm64", "aarch64"):
        found.add("neon")  # part of the architecture
    return found


def available() -> list[str]:
    """The levels that this processor can execute, best first."""
    return [name for name, level in LEVELS.items() if level.needs <= _FEATURES]


def _choose() -> str:
    possible = available()
    asked = os.environ.get("TINYNN_CPU")
    if not asked:
        return possible[0]
    if asked not in possible:
        known = "unknown" if asked not in LEVELS else "not executable on this processor"
        raise ValueError(f"TINYNN_CPU={asked}: {known}; expected one of {', '.join(possible)}")
    if asked != possible[0]:
        # Instructions of higher levels must not slip in, neither here nor in plain loops.
        name, features = LEVELS[asked].cpu
        _config.CPU_NAME = name or ("x86-64" if "x86" in llvm.get_default_triple() else "")
        _config.CPU_FEATURES = features
    return asked


_config: Any = numba.config
_FEATURES = _features()
LEVEL = _choose()
_level = LEVELS[LEVEL]

#: Elements of a float32 or int32 vector; float64 has half as many.
LANES = _level.vector_bytes // 4
#: The preferred tile is TILE = (mr, nr); ROWS[nr] is the height that suits nr vectors.
ROWS = (_level.rows[0], *_level.rows)
TILE = (ROWS[-1], len(ROWS) - 1)


def _tile(name: str, *kinds: Any) -> None:
    for kind in kinds:
        if not isinstance(kind, Tile):
            raise TypingError(f"simd.{name}: expected a Tile, got {kind}")


def _array(name: str, kind: Any, *dtypes: Any) -> None:
    fits = isinstance(kind, types.Array) and kind.layout == "C" and kind.dtype in dtypes
    if not fits:
        wanted = ", ".join(map(str, dtypes))
        raise TypingError(f"simd.{name}: expected a C-contiguous array of {wanted}, got {kind}")


# --- writing instructions -------------------------------------------------------------------------


class _Code(Code):
    """Adds the instructions that depend on the level."""

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z, rounded once where the processor can."""
        if isinstance(x.type.element, ir.IntType):
            return self.builder.add(self.builder.mul(x, y), z)
        name = "fmuladd" if LEVEL == "portable" else "fma"
        return self.call(f"llvm.{name}.{suffix(x.type)}", x.type, x, y, z)

    def dot4(self, z: Any, u: Any, s: Any) -> Any:
        """z + the dot product of 4 unsigned bytes of u and 4 signed of s, in each int32 lane."""
        b, kind = self.builder, z.type
        bits = kind.count * 32
        if _level.dot4 == "vpdpbusd":
            # Takes vectors of int32 up to LLVM 21; later versions convert this form.
            return self.call(f"llvm.x86.avx512.vpdpbusd.{bits}", kind, z, u, s)
        if _level.dot4 == "pmaddwd":
            # Even and odd bytes as int16, whose products pmaddwd sums in pairs, exactly.
            half = ir.VectorType(I16, kind.count * 2)
            eight = ir.Constant(half, [8] * half.count)
            u, s = b.bitcast(u, half), b.bitcast(s, half)
            pairs = (
                (b.and_(u, ir.Constant(half, [255] * half.count)), b.ashr(b.shl(s, eight), eight)),
                (b.lshr(u, eight), b.ashr(s, eight)),
            )
            name = f"llvm.x86.{'avx512.pmaddw.d.512' if bits == 512 else 'avx2.pmadd.wd'}"
            for p, q in pairs:
                z = b.add(z, self.call(name, kind, p, q))
            return z
        for byte in range(4):
            low, high = (ir.Constant(kind, [n] * kind.count) for n in (8 * byte, 24 - 8 * byte))
            p = b.and_(b.lshr(u, low), ir.Constant(kind, [255] * kind.count))
            q = b.ashr(b.shl(s, high), ir.Constant(kind, [24] * kind.count))
            z = b.add(z, b.mul(p, q))
        return z


_N = types.intp  # the type of offsets and counts
_intrinsic: Any = intrinsic(prefer_literal=True)  # constants arrive as such


def _primitive(result: Any, kinds: tuple[Any, ...], emit: Callable[..., Any]) -> Any:
    """What Numba wants of an intrinsic, from `emit(code, *arguments)`."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code = _Code(context, builder)
        args = [code.unwrap(k, v) for k, v in zip(signature.args, values, strict=True)]
        return code.wrap(signature.return_type, emit(code, *args))

    return result(*kinds), codegen


def _bounds(lo: Any, hi: Any) -> tuple[Any, Any]:
    """Their types. Numba keeps one code for each signature: constants must show in it."""
    return (lo, hi) if static_bounds(lo, hi) else (_N, _N)


def _lanes(array: Any) -> int:
    return int(_level.vector_bytes * 8 // array.dtype.bitwidth)


def _new(mr: Any, nr: Any, array: Any) -> Tile:
    vectors = constant(nr)
    lanes = _lanes(array) if vectors else _lanes(array) // 2
    return Tile(constant(mr), max(vectors, 1), array.dtype, lanes)


# --- making tiles ---------------------------------------------------------------------------------


@_intrinsic
def lanes(typing, array):
    """L, the number of elements of a vector of the array's dtype."""
    _array("lanes", array, *SCALARS)
    count = _lanes(array)
    return _primitive(_N, (array,), lambda code, a: I64(count))


@_intrinsic
def zeros(typing, mr, nr, array):
    """x[i, j] = 0, of the array's dtype."""
    _array("zeros", array, *SCALARS)
    tile = _new(mr, nr, array)
    zero = ir.Constant(tile.vector, None)
    rows = [[zero] * tile.nr for _ in range(tile.mr)]
    return _primitive(tile, (mr, nr, array), lambda code, *_: rows)


@_intrinsic
def fill(typing, mr, nr, array, value):
    """x[i, j, l] = value, of the array's dtype."""
    _array("fill", array, *SCALARS)
    tile = _new(mr, nr, array)

    def emit(code, mr, nr, array, value):
        return [[code.splat(value, tile.lanes)] * tile.nr] * tile.mr

    return _primitive(tile, (mr, nr, array, tile.dtype), emit)


@_intrinsic
def load(typing, mr, nr, X, ix, ld):
    """x[i, j] = X[ix + i ld + j L : + L]."""
    _array("load", X, *SCALARS)
    tile = _new(mr, nr, X)
    vec, L = tile.vector, tile.lanes

    def emit(code, mr, nr, X, ix, ld):
        return [
            [code.load(code.at(X, ix, i, ld, j * L), vec) for j in range(tile.nr)]
            for i in range(tile.mr)
        ]

    return _primitive(tile, (mr, nr, X, _N, _N), emit)


@_intrinsic
def load_part(typing, mr, nr, X, ix, ld, lo, hi, cols):
    """As `load` in rows lo <= i < hi and the first `cols` elements of each row, 0 elsewhere.

    Memory outside that part is not read. lo and hi may vary; constants save the branches.
    """
    _array("load_part", X, *SCALARS)
    tile = _new(mr, nr, X)
    vec, L, static = tile.vector, tile.lanes, static_bounds(lo, hi)

    def emit(code, mr, nr, X, ix, ld, lo, hi, cols):
        masks = code.masks(cols, tile.nr, L)

        def row(i):
            return [
                code.masked(code.at(X, ix, i, ld, j * L), vec, masks[j]) for j in range(tile.nr)
            ]

        zero = [[ir.Constant(vec, None)] * tile.nr] * tile.mr
        return code.rows_within(*(static or (lo, hi)), tile.mr, row, zero)

    return _primitive(tile, (mr, nr, X, _N, _N, *_bounds(lo, hi), _N), emit)


@_intrinsic
def prefetch(typing, mr, X, ix, ld):
    """Asks for the cache lines of X[ix + i ld], i < mr, ahead of their use; any address will do."""
    _array("prefetch", X, *SCALARS)
    count = constant(mr)

    def emit(code, mr, X, ix, ld):
        for i in range(count):
            pointer = code.builder.bitcast(code.at(X, ix, i, ld), I8.as_pointer())
            args = (pointer, I32(0), I32(3), I32(1))  # to read, into all levels, data
            code.call("llvm.prefetch.p0", ir.VoidType(), *args)

    return _primitive(types.void, (mr, X, _N, _N), emit)


@_intrinsic
def spread(typing, mr, X, ix, ld):
    """x[i, 0, l] = X[ix + i ld]: one number a row, in every lane."""
    _array("spread", X, *SCALARS)
    tile = Tile(constant(mr), 1, X.dtype, _lanes(X))

    def emit(code, mr, X, ix, ld):
        load = code.builder.load
        return [[code.splat(load(code.at(X, ix, i, ld)), tile.lanes)] for i in range(tile.mr)]

    return _primitive(tile, (mr, X, _N, _N), emit)


@_intrinsic
def rows(typing, x, lo, hi):
    """x[lo : hi], the rows lo <= i < hi; constants."""
    _tile("rows", x)
    first, last = constant(lo), constant(hi)
    tile = Tile(last - first, x.nr, x.dtype, x.lanes)
    return _primitive(tile, (x, lo, hi), lambda code, x, lo, hi: x[first:last])


# --- products -------------------------------------------------------------------------------------


def _rank1(name: str, acc: Any, A: Any, B: Any, lo: Any = None, hi: Any = None) -> Any:
    _tile(name, acc)
    _array(name, A, acc.dtype)
    _array(name, B, acc.dtype)
    vec, L = acc.vector, acc.lanes

    def vectors(code, B, ib):
        return [code.load(code.at(B, ib, extra=j * L), vec) for j in range(acc.nr)]

    def row(code, x, A, ia, lda, b, i):
        a = code.splat(code.builder.load(code.row_of(A, ia, i, lda)), L)
        return [code.fma(a, b[j], x[i][j]) for j in range(acc.nr)]

    return _update(acc, (acc, A, _N, _N, B, _N), vectors, row, lo, hi)


def _update(acc: Any, kinds: tuple[Any, ...], vectors: Any, row: Any, lo: Any, hi: Any) -> Any:
    """x[i] += a[i] b for all rows, or for lo <= i < hi."""
    if lo is None:

        def emit(code, x, A, ia, lda, B, ib):
            b = vectors(code, B, ib)
            return [row(code, x, A, ia, lda, b, i) for i in range(acc.mr)]

        return _primitive(acc, kinds, emit)
    static = static_bounds(lo, hi)

    def emit_rows(code, x, A, ia, lda, B, ib, lo, hi):
        b = vectors(code, B, ib)
        bounds = static or (lo, hi)
        return code.rows_within(*bounds, acc.mr, lambda i: row(code, x, A, ia, lda, b, i), x)

    return _primitive(acc, (*kinds, *_bounds(lo, hi)), emit_rows)


@_intrinsic
def rank1(typing, acc, A, ia, lda, B, ib):
    """acc[i, j] += A[ia + i lda] B[ib + j L : + L]."""
    return _rank1("rank1", acc, A, B)


@_intrinsic
def rank1_rows(typing, acc, A, ia, lda, B, ib, lo, hi):
    """As `rank1`, in rows lo <= i < hi only. A is not read for others; constants save branches."""
    return _rank1("rank1_rows", acc, A, B, lo, hi)


def _dot4(name: str, acc: Any, A: Any, B: Any, lo: Any = None, hi: Any = None) -> Any:
    _tile(name, acc)
    _array(name, A, types.uint8)
    _array(name, B, types.int8)
    if acc.dtype != types.int32:
        raise TypingError(f"simd.{name}: expected a Tile of int32, got {acc}")
    vec, L = acc.vector, acc.lanes
    bytes_ = ir.VectorType(I8, 4 * L)

    def vectors(code, B, ib):
        return [
            code.builder.bitcast(code.load(code.at(B, ib, extra=4 * j * L), bytes_), vec)
            for j in range(acc.nr)
        ]

    def row(code, x, A, ia, lda, b, i):
        pointer = code.builder.bitcast(code.at(A, ia, i, lda), I32.as_pointer())
        a = code.splat(code.builder.load(pointer, align=1), L)
        return [code.dot4(x[i][j], a, b[j]) for j in range(acc.nr)]

    return _update(acc, (acc, A, _N, _N, B, _N), vectors, row, lo, hi)


@_intrinsic
def dot4(typing, acc, A, ia, lda, B, ib):
    """acc[i, j, l] += sum_{t<4} A[ia + i lda + t] B[ib + 4 (j L + l) + t]; A uint8, B int8, exact.

    acc int32, wrapping around. On little-endian processors.
    """
    return _dot4("dot4", acc, A, B)


@_intrinsic
def dot4_rows(typing, acc, A, ia, lda, B, ib, lo, hi):
    """As `dot4`, in rows lo <= i < hi only. A is not read for others; constants save branches."""
    return _dot4("dot4_rows", acc, A, B, lo, hi)


def _columns(code: Any, x: Any, count: int, bounds: Any, static: Any, column: Any) -> Any:
    """Apply column(c, x), which gives new vectors by row, for each c < count within the bounds."""
    x, b = [list(row) for row in x], code.builder
    for c in range(count):
        if static:
            if static[0] <= c < static[1]:
                for i, v in column(c, x).items():
                    x[i] = [v]
            continue
        lo, hi = bounds
        inside = b.and_(b.icmp_signed("<=", lo, I64(c)), b.icmp_signed("<", I64(c), hi))
        before = b.block
        with b.if_then(inside):
            new, end = column(c, x), b.block
        for i, v in new.items():
            phi = b.phi(v.type)
            phi.add_incoming(x[i][0], before)
            phi.add_incoming(v, end)
            x[i] = [phi]
    return x


def _slide(name: str, acc: Any, X: Any, cols: Any, *tiles: Any) -> Any:
    """How a column of X is loaded: whole, or its first `cols` elements if that is no constant."""
    _tile(name, acc, *tiles)
    _array(name, X, acc.dtype)
    part = not isinstance(cols, types.IntegerLiteral)

    def load(code, X, ix, ld, c, cols):
        if part:
            return code.masked(code.at(X, ix, c, ld), acc.vector, code.mask(cols, acc.lanes))
        return code.load(code.at(X, ix, c, ld), acc.vector)

    return load, _N if part else cols


@_intrinsic
def slide(typing, acc, w, step, X, ix, ld, lo, hi, cols):
    """acc[o] += sum_k w[k] x[o step + k], x[c] = X[ix + c ld : + L], of columns lo <= c < hi only.

    acc and w have one vector a row, step is a constant. Each x[c] is loaded once; only its first
    `cols` elements, unless that is a constant. Constant lo and hi save the branches.
    """
    load, kind = _slide("slide", acc, X, cols, w)
    S, static = constant(step), static_bounds(lo, hi)

    def emit(code, acc, w, step, X, ix, ld, lo, hi, cols):
        def column(c, rows):
            pairs = [(o, c - o * S) for o in range(len(rows)) if 0 <= c - o * S < len(w)]
            x = load(code, X, ix, ld, c, cols) if pairs else None
            return {o: code.fma(x, w[k][0], rows[o][0]) for o, k in pairs}

        return _columns(code, acc, (len(acc) - 1) * S + len(w), (lo, hi), static, column)

    return _primitive(acc, (acc, w, step, X, _N, _N, *_bounds(lo, hi), kind), emit)


@_intrinsic
def slide_sums(typing, acc, g, step, taps, X, ix, ld, lo, hi, cols):
    """acc[r taps + k] += sum_o g[o] x[o step + k] of o with o % (mr / taps) = r; see `slide`.

    Several sums for each k, so that additions need not wait for each other.
    """
    load, kind = _slide("slide_sums", acc, X, cols, g)
    S, K, static = constant(step), constant(taps), static_bounds(lo, hi)

    def emit(code, acc, g, step, taps, X, ix, ld, lo, hi, cols):
        def column(c, rows):
            pairs = [(o, c - o * S) for o in range(len(g)) if 0 <= c - o * S < K]
            x = load(code, X, ix, ld, c, cols) if pairs else None
            target = {o: o * K % len(rows) + k for o, k in pairs}
            return {i: code.fma(x, g[o][0], rows[i][0]) for o, i in target.items()}

        return _columns(code, acc, (len(g) - 1) * S + K, (lo, hi), static, column)

    return _primitive(acc, (acc, g, step, taps, X, _N, _N, *_bounds(lo, hi), kind), emit)


@_intrinsic
def rolled(typing):
    """No instruction: LLVM leaves the loop that calls it as it is.

    Unrolled, the loop around a tile that fills the registers keeps some of it in memory. Levels of
    16 registers have tiles of fewer multiply-adds, to which unrolling does good and no harm.
    """

    def emit(code):
        if len(_level.rows) == len(_16_REGISTERS):
            return
        nothing = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "", True)
        # One of LLVM's own attributes, which llvmlite's list of known ones lacks.
        set.add(code.builder.call(nothing, []).attributes, "noduplicate")

    return _primitive(types.void, (), emit)


# --- element by element ---------------------------------------------------------------------------


def _elementwise(name: str, op: Callable[..., Any], *tiles: Any) -> Any:
    """op(code, x[i, j], y[i, j], ...), of the first tile's shape."""
    _tile(name, *tiles)
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

    return _primitive(x, tiles, emit)


def _arithmetic(name: str, x: Any, y: Any) -> Any:
    # fadd, fsub, fmul, or add, sub, mul
    prefix = "f" if isinstance(getattr(x, "dtype", None), types.Float) else ""
    return _elementwise(name, lambda code, p, q: getattr(code.builder, prefix + name)(p, q), x, y)


@_intrinsic
def add(typing, x, y):
    """x + y."""
    return _arithmetic("add", x, y)


@_intrinsic
def sub(typing, x, y):
    """x - y."""
    return _arithmetic("sub", x, y)


@_intrinsic
def mul(typing, x, y):
    """x y."""
    return _arithmetic("mul", x, y)


@_intrinsic
def fma(typing, acc, x, y):
    """acc + x y, rounded once where the processor can."""
    return _elementwise("fma", lambda code, z, p, q: code.fma(p, q, z), acc, x, y)


def _select(code: Any, sign: str, p: Any, q: Any, yes: Any, no: Any) -> Any:
    integer = isinstance(p.type.element, ir.IntType)
    compare = code.builder.icmp_signed if integer else code.builder.fcmp_ordered
    return code.builder.select(compare(sign, p, q), yes, no)


@_intrinsic
def maximum(typing, x, y):
    """y where x < y, else x: max, where NaN in x stays and NaN in y is passed over.

    With y = 0 it is ReLU, with y = -inf it does nothing.
    """
    return _elementwise("maximum", lambda code, p, q: _select(code, "<", p, q, q, p), x, y)


@_intrinsic
def greater(typing, x, y, p, q):
    """p where x > y, else q: NaN in x or y gives q. All of x's shape, or broadcast to it."""
    return _elementwise(
        "greater", lambda code, a, b, c, d: _select(code, ">", a, b, c, d), x, y, p, q
    )


@_intrinsic
def above(typing, x, y, p, q):
    """p where x > y, or x is NaN and y is not; else q. p and q of one type, with x's lanes."""
    _tile("above", x, y, p, q)
    if x != y or p != q or (x.mr, x.nr, x.lanes) != (p.mr, p.nr, p.lanes):
        raise TypingError(f"simd.above: {x}, {y}, {p}, {q} do not fit")

    def emit(code, *tiles):
        def pick(a, b, c, d):
            known = code.builder.fcmp_ordered("ord", b, b)
            wins = code.builder.and_(code.builder.fcmp_unordered(">", a, b), known)
            return code.builder.select(wins, c, d)

        return [[pick(*v) for v in zip(*r, strict=True)] for r in zip(*tiles, strict=True)]

    return _primitive(p, (x, y, p, q), emit)


@_intrinsic
def gate(typing, g, y):
    """0 where y <= 0, else g: the gradient of ReLU from its result y, NaN in y lets g pass."""

    def op(code, p, q):
        zero = ir.Constant(p.type, None)
        return _select(code, "<=", q, zero, zero, p)

    return _elementwise("gate", op, g, y)


@_intrinsic
def row_sum(typing, x, i):
    """sum_{j, l} x[i, j, l], a number; i a constant. Vectors are added first, then halves."""
    _tile("row_sum", x)
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

    return _primitive(x.dtype, (x, i), emit)


@_intrinsic
def transpose(typing, x):
    """y[i, 0, l] = x[l, 0, i] of a square block: L rows of one vector."""
    _tile("transpose", x)
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

    return _primitive(x, (x,), emit)


# --- storing --------------------------------------------------------------------------------------


def _store(name: str, x: Any, C: Any, write: Callable[..., Any]) -> Any:
    _tile(name, x)
    _array(name, C, x.dtype)

    def emit(code, x, C, ic, ldc):
        for i, row in enumerate(x):
            for j, v in enumerate(row):
                write(code, v, code.at(C, ic, i, ldc, j * v.type.count))

    return _primitive(types.void, (x, C, _N, _N), emit)


@_intrinsic
def store(typing, x, C, ic, ldc):
    """C[ic + i ldc + j L : + L] = x[i, j]."""
    return _store("store", x, C, lambda code, v, pointer: code.store(v, pointer))


@_intrinsic
def stream(typing, x, C, ic, ldc):
    """As `store`, past the caches where the address is a multiple of the vector's bytes.

    Pays for results larger than the last-level cache. End the loop with `fence()`.
    """

    def write(code, v, pointer):
        b, size = code.builder, _level.vector_bytes
        low = b.and_(b.ptrtoint(pointer, I64), I64(size - 1))
        with b.if_else(b.icmp_unsigned("==", low, I64(0))) as (aligned, other):
            with aligned:
                hint = code.builder.module.add_metadata([I32(1)])
                code.store(v, pointer, size).set_metadata("nontemporal", hint)
            with other:
                code.store(v, pointer)

    return _store("stream", x, C, write)


@_intrinsic
def fence(typing):
    """Makes what `stream` wrote visible to other threads."""
    return _primitive(types.void, (), lambda code: code.builder.fence("seq_cst") and None)


@_intrinsic
def store_part(typing, x, C, ic, ldc, lo, hi, cols):
    """As `store`, in rows lo <= i < hi and the first `cols` elements of each row.

    Memory outside that part is not written. lo and hi may vary; constants save the branches.
    """
    _tile("store_part", x)
    _array("store_part", C, x.dtype)
    vec, L, static = x.vector, x.lanes, static_bounds(lo, hi)

    def emit(code, x, C, ic, ldc, lo, hi, cols):
        masks = code.masks(cols, len(x[0]), L)

        def row(i):
            for j, v in enumerate(x[i]):
                code.masked(code.at(C, ic, i, ldc, j * L), vec, masks[j], v)
            return []

        code.rows_within(*(static or (lo, hi)), len(x), row)

    return _primitive(types.void, (x, C, _N, _N, *_bounds(lo, hi), _N), emit)
