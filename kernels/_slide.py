"""Sliding windows on tiles: `slide` and `slide_sums`, which depthwise convolutions are made of.

They are primitives of `kernels.simd`, which says what a tile is, and are called by that name.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from numba import types
from numba.core import cgutils

from kernels._emit import I64, constant
from kernels._primitive import (
    OFFSET,
    check_array,
    check_tile,
    primitive,
    tile_intrinsic,
)


def _guarded(code: Any, x: Any, place: Any, size: Any, update: Any) -> Any:
    """update(x) if 0 <= place < size, else x: behind a branch."""
    b = code.builder
    before = b.block
    with b.if_then(b.icmp_unsigned("<", place, size)):
        new, end = update(x), b.block
    merged = []
    for (was,), (now,) in zip(x, new, strict=True):
        phi = b.phi(was.type)
        phi.add_incoming(was, before)
        phi.add_incoming(now, end)
        merged.append([phi])
    return merged


def _slide(name: str, args: tuple[Any, ...], pixels: int, pairs: Callable[..., Any]) -> Any:
    """acc[i] += x[k, c] y[j] for each (i, j) of pairs(k, c), with the arguments of `slide`."""
    acc, y, kh, kw, step, edge, X, *_, cols = args
    check_tile(name, acc, y)
    check_array(name, X, acc.dtype)
    part = not isinstance(cols, types.IntegerLiteral)
    height, width = constant(kh), (pixels - 1) * constant(step) + constant(kw)
    sure = range(constant(edge), width - constant(edge))

    def emit(code, x, y, kh, kw, step, edge, X, ix, strides, rows, columns, cols):
        b, mask = code.builder, code.mask(cols, acc.lanes) if part else None
        (down, right), (y0, dy, H), (x0, dx, N) = (
            cgutils.unpack_tuple(b, t) for t in (strides, rows, columns)
        )

        def place(start, step, n):
            return b.add(start, b.mul(step, I64(n)))

        def column(start, k, c, x):
            at = code.row_of(X, start, c, right)
            v = code.masked(at, acc.vector, mask) if part else code.load(at, acc.vector)
            x = list(x)
            for i, j in pairs(k, c):
                x[i] = [code.fma(v, y[j][0], x[i][0])]
            return x

        def window_row(k, x):
            start = code.unrelated(place(ix, down, k))  # few addresses at a time
            for c in (c for c in range(width) if pairs(k, c)):
                update = partial(column, start, k, c)
                x = update(x) if c in sure else _guarded(code, x, place(x0, dx, c), N, update)
            return x

        for k in range(height):
            x = _guarded(code, x, place(y0, dy, k), H, partial(window_row, k))
        return x

    three = types.UniTuple(OFFSET, 3)
    kinds = (acc, y, kh, kw, step, edge, X, OFFSET, types.UniTuple(OFFSET, 2), three, three)
    return primitive(acc, (*kinds, OFFSET if part else cols), emit)


@tile_intrinsic
def slide(typing, acc, w, kh, kw, step, edge, X, ix, strides, rows, columns, cols):
    """acc[o] += sum_{k < kh, t < kw} w[k kw + t] x[k, o step + t], neighbouring pixels o.

    x[k, c] = X[ix + k down + c right : + L], strides = (down, right), where it lies in the image:
    rows = (y0, dy, H) and columns = (x0, dx, N) say that it does if 0 <= y0 + k dy < H and
    0 <= x0 + c dx < N. The caller knows that all columns do but the first and last `edge`, which
    saves their branches. acc and w have one vector a row; kh, kw, step and edge are constants. Each
    x[k, c] is loaded once; only its first `cols` elements, unless that is a constant.
    """
    K, S = constant(kw), constant(step)

    def pairs(k, c):
        return [(o, k * K + c - o * S) for o in range(acc.mr) if 0 <= c - o * S < K]

    args = (acc, w, kh, kw, step, edge, X, ix, strides, rows, columns, cols)
    return _slide("slide", args, acc.mr, pairs)


@tile_intrinsic
def slide_sums(typing, acc, g, kh, kw, step, edge, X, ix, strides, rows, columns, cols):
    """acc[r kh kw + k kw + t] += sum_o g[o] x[k, o step + t] of pixels o = r (mod copies).

    copies = rows of acc / (kh kw): so many additions to one weight are under way at once. All else
    as in `slide`.
    """
    K, S = constant(kw), constant(step)
    taps = constant(kh) * K

    def pairs(k, c):
        inside = [(o, c - o * S) for o in range(g.mr) if 0 <= c - o * S < K]
        return [(o * taps % acc.mr + k * K + t, o) for o, t in inside]

    args = (acc, g, kh, kw, step, edge, X, ix, strides, rows, columns, cols)
    return _slide("slide_sums", args, g.mr, pairs)
