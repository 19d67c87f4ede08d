"""Primitives for bytes that were widened to int16, for levels that multiply no others (WIDENS).

There a dot product of four bytes takes two of int16, and as many instructions again to part the
bytes. Widened beforehand, they take part in many products. The primitives follow the rules of
`kernels.simd`; results are exact, those of `simd_int.dot4`.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kernels._emit import I8, I16, I32, I64, constant
from kernels._levels import LANES
from kernels._primitive import OFFSET, check_array, primitive, tile_intrinsic
from kernels.simd import _update
from kernels.simd_int import _int32

_ARRAY = types.Array(types.int16, 1, "C")


@tile_intrinsic
def scratch(typing, size):
    """An array of `size` int16 on the stack, for as long as the calling function runs."""
    count = constant(size)

    def emit(code, size):
        with code.builder.goto_entry_block():  # once, however often it is reached
            memory = code.builder.alloca(ir.ArrayType(I16, count))
        memory.align = 64
        out = code.context.make_array(_ARRAY)(code.context, code.builder)
        code.context.populate_array(
            out,
            data=code.builder.bitcast(memory, I16.as_pointer()),
            shape=cgutils.pack_array(code.builder, [I64(count)]),
            strides=cgutils.pack_array(code.builder, [I64(2)]),
            itemsize=I64(2),
            meminfo=None,
        )
        return out._getvalue()

    return primitive(_ARRAY, (size,), emit)


@tile_intrinsic
def store_widened(typing, X, ix, A, ia):
    """A[ia : ia + 2 L] = X[ix : ix + 2 L];  X uint8, A int16."""
    check_array("store_widened", X, types.uint8)
    check_array("store_widened", A, types.int16)
    count = 2 * LANES

    def emit(code, X, ix, A, ia):
        x = code.load(code.at(X, ix), ir.VectorType(I8, count))
        wide = ir.VectorType(I16, count)
        pointer = code.builder.bitcast(code.at(A, ia), wide.as_pointer())
        code.builder.store(code.builder.zext(x, wide), pointer, align=2)

    return primitive(types.void, (X, OFFSET, A, OFFSET), emit)


def _dot2(name: str, acc: Any, A: Any, B: Any, lo: Any = None, hi: Any = None) -> Any:
    _int32(name, acc)
    check_array(name, A, types.int16)
    check_array(name, B, types.int16)
    L, half = acc.lanes, ir.VectorType(I16, 2 * acc.lanes)

    def vectors(code, B, ib):
        return [code.load(code.at(B, ib, extra=2 * j * L), half) for j in range(acc.nr)]

    def row(code, x, A, ia, lda, b, i):
        pointer = code.builder.bitcast(code.row_of(A, ia, i, lda), I32.as_pointer())
        a = code.splat(code.builder.load(pointer, align=2), L)
        a = code.builder.bitcast(a, half)
        return [code.dot2(x[i][j], a, b[j]) for j in range(acc.nr)]

    return _update(acc, (acc, A, OFFSET, OFFSET, B, OFFSET), vectors, row, lo, hi)


@tile_intrinsic
def dot2(typing, acc, A, ia, lda, B, ib):
    """acc[i, j, l] += sum_{t<2} A[ia + i lda + t] B[ib + 2 (j L + l) + t]; A, B int16.

    Exact for numbers of nine bits; acc int32, wrapping around. On little-endian processors.
    """
    return _dot2("dot2", acc, A, B)


@tile_intrinsic
def dot2_rows(typing, acc, A, ia, lda, B, ib, lo, hi):
    """As `dot2`, in rows lo <= i < hi only. A is not read for others; constants save branches."""
    return _dot2("dot2_rows", acc, A, B, lo, hi)
