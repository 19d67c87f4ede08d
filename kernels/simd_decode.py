"""Sixteen compressed weights at a time: the vector primitives of code books and of float16.

Sixteen numbers are one vector or several, as LLVM sees fit; they go to memory, or become a tile.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from kernels import simd
from kernels._emit import I8, I16, I32, I64, Tile, constant
from kernels._primitive import OFFSET, check_array, lanes_of, primitive, tile_intrinsic

HALF = 16  # the kind of float16; +bits and -bits are those of a shared book and one a channel

_V32 = ir.VectorType(I32, 16)
_FLOATS = ir.VectorType(ir.FloatType(), 16)
_STEPS = ir.Constant(_V32, list(range(16)))


def _half(code: Any, pointer: Any) -> Any:
    b = code.builder
    halves = ir.VectorType(I16 if simd.LEVEL == "portable" else ir.HalfType(), 16)
    bits = b.load(b.bitcast(pointer, halves.as_pointer()), align=1)
    if simd.LEVEL != "portable":
        return b.fpext(bits, _FLOATS)

    def all_(value: int) -> Any:
        return ir.Constant(_V32, [value] * 16)

    # Without an instruction for it: exponent and fraction moved to their places make the number
    # times 2**(15 - 127), exactly, subnormal or not; infinity and NaN get their exponent after.
    bits = b.zext(bits, _V32)
    rest = b.shl(b.and_(bits, all_(0x7FFF)), all_(13))
    scale = ir.Constant(_FLOATS, [2.0**112] * 16)
    value = b.bitcast(b.fmul(b.bitcast(rest, _FLOATS), scale), _V32)
    special = b.icmp_unsigned(">=", rest, all_(0x7C00 << 13))
    value = b.or_(value, b.select(special, all_(0x7F800000), all_(0)))
    sign = b.shl(b.and_(bits, all_(0x8000)), all_(16))
    return b.bitcast(b.or_(value, sign), _FLOATS)


def _codes(code: Any, pointer: Any, bits: int) -> Any:
    """Sixteen codes of `bits` bits, the first in the lowest, from 2 bits bytes; 16 are read."""
    b, kind = code.builder, ir.VectorType(I8, 16)
    bytes_ = b.load(b.bitcast(pointer, kind.as_pointer()), align=1)
    starts = [i * bits for i in range(16)]
    # A code lies within two bytes; the second of the last one may be any.
    pairs = code.shuffle(bytes_, bytes_, [n for s in starts for n in (s // 8, min(s // 8 + 1, 15))])
    wide = ir.VectorType(I16, 16)
    words = b.lshr(b.bitcast(pairs, wide), ir.Constant(wide, [s % 8 for s in starts]))
    return b.zext(b.and_(words, ir.Constant(wide, [(1 << bits) - 1] * 16)), _V32)


def _table(code: Any, codes: Any, book: Any, bits: int) -> Any:
    """book[code] of a book of max(16, 2**bits) entries, held in registers: AVX-512."""
    b = code.builder
    entries = [code.load(code.at(book, I64(n)), _FLOATS) for n in range(0, max(16, 1 << bits), 16)]
    if len(entries) == 1:
        return code.call("llvm.x86.avx512.permvar.sf.512", _FLOATS, entries[0], codes)
    name, bit = "llvm.x86.avx512.vpermi2var.ps.512", 5
    pairs = zip(entries[::2], entries[1::2], strict=True)
    found = [code.call(name, _FLOATS, low, codes, high) for low, high in pairs]
    while len(found) > 1:
        chosen = b.and_(codes, ir.Constant(_V32, [1 << bit] * 16))
        high = b.icmp_unsigned("!=", chosen, ir.Constant(_V32, None))
        pairs = zip(found[::2], found[1::2], strict=True)
        found, bit = [b.select(high, q, p) for p, q in pairs], bit + 1
    return found[0]


def _short_table(code: Any, pointer: Any, book: Any, bits: int) -> Any:
    """Sixteen weights of a book of 16 entries by codes of up to 4 bits: AVX2.

    Eight codes are one word, spread over eight lanes, in each of which its own is shifted down. An
    instruction that looks up in eight entries takes three bits of it; the fourth chooses of two.
    """
    b, count = code.builder, ir.VectorType(I32, 8)
    floats, name = ir.VectorType(ir.FloatType(), 8), "llvm.x86.avx2.permps"
    low, high = (code.load(code.at(book, I64(n)), floats) for n in (0, 8))
    halves = []
    for start in (0, bits):
        word = b.bitcast(b.gep(pointer, [I64(start)]), I32.as_pointer())
        codes = code.splat(b.load(word, align=1), 8)
        places = b.lshr(codes, ir.Constant(count, [bits * i for i in range(8)]))
        if bits < 3:
            places = b.and_(places, ir.Constant(count, [(1 << bits) - 1] * 8))
        found = code.call(name, floats, low, places)
        if bits == 4:
            fourth = b.shl(codes, ir.Constant(count, [28 - 4 * i for i in range(8)]))
            beyond = b.icmp_signed("<", fourth, ir.Constant(count, None))
            found = b.select(beyond, code.call(name, floats, high, places), found)
        halves.append(found)
    return code.shuffle(*halves, list(range(16)))


def _places(code: Any, pointer: Any, bits: int) -> list[Any]:
    """Sixteen codes of `bits` bits, one by one, of two words; 8 + `bits` bytes are read."""
    b, places = code.builder, []
    for start in (0, bits):
        word = b.bitcast(b.gep(pointer, [I64(start)]), I64.as_pointer())
        codes = b.load(word, align=1)
        shifted = [b.lshr(codes, I64(bits * i)) for i in range(8)]
        places += [b.and_(codes, I64((1 << bits) - 1)) for codes in shifted]
    return places


def _gathered(code: Any, places: list[Any], book: Any) -> Any:
    """book[place], by one load each: instructions that gather take as long."""
    b, found = code.builder, ir.Constant(_FLOATS, ir.Undefined)
    for i, place in enumerate(places):
        found = b.insert_element(found, b.load(code.at(book, place)), I32(i))
    return found


def _weights(code: Any, which: int, S: Any, i: Any, book: Any, column: Any, columns: Any) -> Any:
    """Sixteen weights, from number i on."""
    b, bits = code.builder, abs(which)
    pointer = code.at(S, b.mul(b.lshr(i, I64(4)), I64(2 * bits)))
    if which == HALF:
        return _half(code, pointer)
    if 0 < which <= 4 and simd.LEVEL.startswith("avx2"):
        return _short_table(code, pointer, book, bits)
    if which > 0 and not simd.LEVEL.startswith("avx512"):
        return _gathered(code, _places(code, pointer, bits), book)
    codes = _codes(code, pointer, bits)
    if which > 0:
        return _table(code, codes, book, bits)
    c = b.add(code.splat(b.trunc(column, I32), 16), _STEPS)
    limit = code.splat(b.trunc(columns, I32), 16)
    c = b.select(b.icmp_signed("<", c, limit), c, b.sub(c, limit))
    places = b.add(b.shl(c, ir.Constant(_V32, [bits] * 16)), codes)
    each = [b.zext(b.extract_element(places, I32(i)), I64) for i in range(16)]
    return _gathered(code, each, book)


@tile_intrinsic
def decode(typing, kind, S, i, book, column, columns, D, at, count):
    """D[at : at + count] = the weights from number i on, a multiple of 16; count <= 16.

    kind, a constant: `HALF`: S holds float16. bits (1 to 8): S holds codes of as many bits, and
    book[code] is the weight. -bits: book[c 2**bits + code] is, c the weight's column: `column` for
    the first, up to `columns`, which is at least 16. S uint8, of which 32 bytes are read.
    """
    _check("decode", S, book)
    check_array("decode", D, types.float32)
    which = constant(kind)

    def emit(code, kind, S, i, book, column, columns, D, at, count):
        b = code.builder
        weights = _weights(code, which, S, i, book, column, columns)
        target = code.at(D, at)
        whole = b.icmp_signed("==", count, I64(16))
        with b.if_else(whole) as (all_, some):
            with all_:
                code.store(weights, target)
            with some:
                code.masked(target, _FLOATS, code.mask(count, 16), weights)

    args = (kind, S, OFFSET, book, OFFSET, OFFSET, D, OFFSET, OFFSET)
    return primitive(types.void, args, emit)


@tile_intrinsic
def decoded(typing, kind, S, i, book, column, columns):
    """A row of the sixteen weights from number i on, a multiple of 16: see `decode`."""
    _check("decoded", S, book)
    which, L = constant(kind), lanes_of(book)
    tile = Tile(1, 16 // L, types.float32, L)

    def emit(code, kind, S, i, book, column, columns):
        found = _weights(code, which, S, i, book, column, columns)
        return [[code.shuffle(found, found, list(range(n, n + L))) for n in range(0, 16, L)]]

    return primitive(tile, (kind, S, OFFSET, book, OFFSET, OFFSET), emit)


def _check(name: str, S: Any, book: Any) -> None:
    check_array(name, S, types.uint8)
    check_array(name, book, types.float32)
