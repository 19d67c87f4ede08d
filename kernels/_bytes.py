"""Bytes in vectors: rows of an image side by side in int32 lanes, and numbers as bytes again.

For `kernels.simd_int`. A processor moves bytes cheaply only within quarters of 16 bytes of a long
vector: there it can interleave two vectors, or narrow two to one. Both are made of that here, so
that four vectors of int32 come out in an order of their own, INTERLEAVED: element 16 k + 4 v + t
is lane 4 k + t of vector v, t < 4. Vectors of four lanes are in their natural order then.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

from llvmlite import ir

from kernels._emit import I8, I16, I32, I64
from kernels._levels import CHOSEN, MASKS_BYTES, WIDENS_IMAGES

#: 1.5 * 2^23. Added to |x| <= 2^22 it leaves no room for a fraction: the sum is x rounded to the
#: nearest integer, half to even, and the low byte of its bits is that integer's low byte.
_ROUND = 12582912.0

#: Whether there are instructions that narrow numbers to the nearest that fits.
SATURATING = CHOSEN.dot4 != "plain"

#: The byte of a weight for each of four rows that come together.
PLACES = (0, 2, 1, 3) if WIDENS_IMAGES else (0, 1, 2, 3)

#: By the bits of a vector: rounding to int32, then narrowing to int16 and to unsigned bytes.
_X86 = {
    128: ("sse2.cvtps2dq", "sse2.packssdw.128", "sse2.packuswb.128"),
    256: ("avx.cvt.ps2dq.256", "avx2.packssdw", "avx2.packuswb"),
    512: ("avx512.mask.cvtps2dq.512", "avx512.packssdw.512", "avx512.packuswb.512"),
}


def _zip(code: Any, x: Any, y: Any, kind: Any) -> list[Any]:
    """Elements of `kind` of x and y in turn: of the first halves of all quarters, of the second."""
    count, per = kind.count, 128 // kind.element.width
    x, y = (code.builder.bitcast(v, kind) for v in (x, y))
    found = []
    for half in (0, per // 2):
        places = [q + half + i for q in range(0, count, per) for i in range(per // 2)]
        found.append(code.shuffle(x, y, [p + side for p in places for side in (0, count)]))
    return found


def interleaved(code: Any, rows: list[Any]) -> list[Any]:
    """Byte r of each int32 of the result: that of row r of one to four, INTERLEAVED.

    Where there is no row r it is anything.
    """
    size = rows[0].type.count
    halves = ir.VectorType(I16, size // 2)
    first = _zip(code, rows[0], rows[min(1, len(rows) - 1)], rows[0].type)
    second = _zip(code, rows[min(2, len(rows) - 1)], rows[-1], rows[0].type)
    words = [_zip(code, a, b, halves) for a, b in zip(first, second, strict=True)]
    whole = ir.VectorType(I32, size // 4)
    return [code.builder.bitcast(v, whole) for pair in words for v in pair]


def dot4(code: Any, z: Any, u: Any, s: Any) -> Any:
    """`LevelCode.dot4` of vectors of any length."""
    if CHOSEN.dot4 != "pmaddwd" or z.type.count > 4:
        return code.dot4(z, u, s)
    unset = ir.Constant(z.type, ir.Undefined)  # it has no form of that for 128 bits
    twice = [code.shuffle(v, unset, list(range(8))) for v in (z, u, s)]
    both = code.dot4(*twice)
    return code.shuffle(both, both, [0, 1, 2, 3])


def paired(code: Any, rows: list[Any]) -> list[list[Any]]:
    """Rows 2 i and 2 i + 1 as the two int16 of each lane, INTERLEAVED, for each i; WIDENS only."""
    zero, kind = ir.Constant(rows[0].type, None), rows[0].type
    found = []
    for i in range(0, len(rows), 2):
        pair = _zip(code, rows[i], rows[i + 1] if i + 1 < len(rows) else zero, kind)
        found.append([v for half in pair for v in _zip(code, half, zero, kind)])
    return found


def weight_pairs(code: Any, w: Any) -> list[Any]:
    """Bytes 0 and 2, signed, of each int32 as two int16, then 1 and 3: weights of `paired` rows."""
    b, half = code.builder, ir.VectorType(I16, 2 * w.type.count)
    w, eight = b.bitcast(w, half), ir.Constant(half, [8] * half.count)
    return [b.ashr(b.shl(w, eight), eight), b.ashr(w, eight)]


def rounded(code: Any, four: list[Any], bounds: tuple[Any, Any], zero: Any) -> Any:
    """round(x) + zero, half to even, of four vectors of float32 as bytes, which are INTERLEAVED.

    Cut to 0 <= bounds[0] ... bounds[1] <= 255; these and zero are int32. Unless SATURATING the
    caller has cut x above, and x < 2^31 in any case.
    """
    b, lanes = code.builder, four[0].type.count
    bytes_ = ir.VectorType(I8, 4 * lanes)
    zero8, least, most = (code.splat(b.trunc(n, I8), 4 * lanes) for n in (zero, *bounds))
    if not SATURATING:
        real = four[0].type
        low = code.splat(b.sitofp(b.sub(bounds[0], zero), ir.FloatType()), lanes)
        parts = []
        for x in four:
            x = b.select(b.fcmp_ordered(">", x, low), x, low)
            x = b.bitcast(b.fadd(x, ir.Constant(real, [_ROUND] * lanes)), ir.VectorType(I32, lanes))
            parts.append(b.trunc(x, ir.VectorType(I8, lanes)))
        whole = [code.shuffle(p, q, list(range(2 * lanes))) for p, q in (parts[:2], parts[2:])]
        return b.add(code.shuffle(*whole, list(range(4 * lanes))), zero8)
    convert, to_words, to_bytes = (f"llvm.x86.{name}" for name in _X86[32 * lanes])
    ints, words = ir.VectorType(I32, lanes), ir.VectorType(I16, 2 * lanes)
    n = [_converted(code, convert, x, ints) for x in four]
    pairs = [code.call(to_words, words, *n[i : i + 2]) for i in (0, 2)]
    zero16 = code.splat(b.trunc(zero, I16), 2 * lanes)
    add = f"llvm.sadd.sat.v{2 * lanes}i16"
    pairs = [code.call(add, words, p, zero16) for p in pairs]
    y = code.call(to_bytes, bytes_, *pairs)
    y = b.select(b.icmp_unsigned(">", y, least), y, least)
    return b.select(b.icmp_unsigned("<", y, most), y, most)


def _converted(code: Any, name: str, x: Any, ints: Any) -> Any:
    """Rounded to int32; what does not fit becomes the lowest."""
    if ints.count < 16:
        return code.call(name, ints, x)
    every = ir.Constant(I16, -1)
    as_set = I32(4)  # the rounding that the processor is set to: to nearest, half to even
    return code.call(name, ints, x, ir.Constant(ints, None), every, as_set)


def quarters(code: Any, y: Any, order: list[int]) -> Any:
    """Groups of four bytes of y in this order."""
    groups = ir.VectorType(I32, y.type.count // 4)
    moved = code.shuffle(*[code.builder.bitcast(y, groups)] * 2, order)
    return code.builder.bitcast(moved, ir.VectorType(I8, 4 * len(order)))


# --- some bytes of a vector -----------------------------------------------------------------------


def vector(count: int) -> Any:
    """The type of so many bytes."""
    return ir.VectorType(I8, count)


def lanes(code: Any, cols: Any, count: int) -> Any:
    """As `Code.mask`, in fewer instructions for many lanes: at most 64."""
    steps = ir.Constant(vector(count), list(range(count)))
    cols = code.builder.trunc(_within(code, cols, count), I8)
    return code.builder.icmp_signed("<", steps, code.splat(cols, count))


def _within(code: Any, cols: Any, count: int) -> Any:
    """The nearest of 0 ... count."""
    b = code.builder
    for sign, bound in (("<", 0), (">", count)):
        cols = b.select(b.icmp_signed(sign, cols, I64(bound)), I64(bound), cols)
    return cols


def mask(code: Any, cols: Any, count: int) -> Any:
    """The first `cols` of so many bytes, for `masked`."""
    return lanes(code, cols, count) if MASKS_BYTES else _within(code, cols, count)


def masked(code: Any, pointer: Any, count: int, some: Any, store: Any = None) -> Any:
    """As `Code.masked`, of so many bytes."""
    kind = vector(count)
    if not MASKS_BYTES:
        return (_load_some if store is None else _store_some)(code, pointer, some, store or kind)
    pointer = code.builder.bitcast(pointer, kind.as_pointer())
    if store is None:
        zero = ir.Constant(kind, None)
        name = f"llvm.masked.load.v{kind.count}i8.p0"
        return code.call(name, kind, pointer, I32(1), some, zero)
    name = f"llvm.masked.store.v{kind.count}i8.p0"
    return code.call(name, ir.VoidType(), store, pointer, I32(1), some)


def _powers(count: int) -> list[int]:
    """1, 2, 4, ... count."""
    return [1 << i for i in range(count.bit_length())]


def _load_some(code: Any, pointer: Any, cols: Any, kind: Any) -> Any:
    """The first `cols` bytes, then 0: the last one if odd, the two before that, and so on."""
    b, at = code.builder, cols
    x = ir.Constant(kind, None)
    for size in _powers(kind.count):
        before = b.block
        with b.if_then(b.icmp_unsigned("!=", b.and_(cols, I64(size)), I64(0))):
            start = b.sub(at, I64(size))
            part = code.load(b.gep(pointer, [start]), vector(size))
            part = code.shuffle(part, part, [min(i, size - 1) for i in range(kind.count)])
            order = [i if i < size else kind.count + i - size for i in range(kind.count)]
            new, end = code.shuffle(part, x, order), b.block
        x = merged(b, (x, before), (new, end))
        at = merged(b, (at, before), (start, end))
    return x


def _store_some(code: Any, pointer: Any, cols: Any, x: Any) -> None:
    """The first `cols` bytes of x, as `_load_some` from the other end."""
    b, count = code.builder, x.type.count
    for size in reversed(_powers(count)):
        before = b.block
        with b.if_then(b.icmp_unsigned("!=", b.and_(cols, I64(size)), I64(0))):
            code.store(code.shuffle(x, x, list(range(size))), pointer)
            rest = code.shuffle(x, x, [min(i + size, count - 1) for i in range(count)])
            after, end = b.gep(pointer, [I64(size)]), b.block
        x = merged(b, (x, before), (rest, end))
        pointer = merged(b, (pointer, before), (after, end))


def merged(b: Any, *ways: tuple[Any, Any]) -> Any:
    """The value of that way, from its block, on which this place was reached."""
    phi = b.phi(ways[0][0].type)
    for value, block in ways:
        phi.add_incoming(value, block)
    return phi
