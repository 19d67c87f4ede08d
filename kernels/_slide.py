"""Sliding windows on tiles: `slide` and `slide_sums`, which depthwise convolutions are made of.

They are primitives of `kernels.simd`, which says what a tile is, and are called by that name.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from numba import types

from kernels._emit import I64, constant, static_bounds
from kernels._primitive import (
    OFFSET,
    bound_types,
    check_array,
    check_tile,
    primitive,
    tile_intrinsic,
)


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
    check_tile(name, acc, *tiles)
    check_array(name, X, acc.dtype)
    part = not isinstance(cols, types.IntegerLiteral)

    def load(code, X, ix, ld, c, cols):
        if part:
            return code.masked(code.at(X, ix, c, ld), acc.vector, code.mask(cols, acc.lanes))
        return code.load(code.at(X, ix, c, ld), acc.vector)

    return load, OFFSET if part else cols


@tile_intrinsic
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

    return primitive(acc, (acc, w, step, X, OFFSET, OFFSET, *bound_types(lo, hi), kind), emit)


@tile_intrinsic
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

    return primitive(acc, (acc, g, step, taps, X, OFFSET, OFFSET, *bound_types(lo, hi), kind), emit)
