"""Entropy coding of a plan's streams for storage: each through DEFLATE by itself.

Packed streams are taken apart first, a number a byte, so that Huffman's codes are of the numbers:
the last stage of Han, Mao & Dally 2016, "Deep Compression", section 4. What gets no smaller stays
as it is. Reading trusts nothing: sizes are checked before anything is decompressed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from kernels.codebook import pack_bits, unpack_bits
from tinynn.deploy.encode import number_bits
from tinynn.errors import FileFormatError

_MOST_RATIO = 32  # of what a stream holds to what it takes: with it a file bounds its memory
_MOST_STREAMS = 1 << 20

#: Of a stream: its bytes, how many bits its numbers have, and the bytes it takes; 0: as it is.
Row = tuple[int, int, int]


def deflate(data: bytes, plan: Any) -> tuple[bytes, list[Row]]:
    """The data of a described plan, each stream in its fewest bytes, and what they were."""
    bits = {0: 8, len(data): 8}
    for head in _forms(plan):
        bits |= {p[1]: number_bits(head, name) for name, p in head["parts"].items() if p[2]}
    out, rows = bytearray(), list[Row]()
    for start, end in pairwise(sorted(bits)):
        stream = data[start:end]
        tried = [(_coded(_apart(stream, b)), b) for b in {8, bits[start]}]
        coded, width = min(tried, key=lambda pair: (len(pair[0]), pair[1]))
        worth = len(stream) / _MOST_RATIO <= len(coded) < len(stream)
        rows.append((len(stream), width, len(coded) if worth else 0))
        out += coded if worth else stream
    return bytes(out), rows


def inflate(stored: bytes, rows: Any, what: str) -> bytes:
    """The data that `deflate` was given. Raises FileFormatError for anything that does not fit."""
    if not isinstance(rows, list) or len(rows) > _MOST_STREAMS:
        raise FileFormatError(f"{what}: required a list of streams; came {str(rows)[:80]}")
    for row in rows:
        whole = isinstance(row, list) and len(row) == 3 and all(type(n) is int for n in row)
        if not whole or not 1 <= row[1] <= 8 or not 0 <= row[2] <= len(stored) or row[0] < 1:
            raise FileFormatError(f"{what}: required a stream [bytes, bits, taken]; came {row}")
        if row[0] > _MOST_RATIO * (row[2] or len(stored)):
            raise FileFormatError(f"{what}: required at most {_MOST_RATIO} times the bytes: {row}")
    if sum(taken or size for size, _, taken in rows) != len(stored):
        raise FileFormatError(f"{what}: required streams of {len(stored)} bytes together")
    out, at = bytearray(), 0
    for size, bits, taken in rows:
        piece = stored[at : at + (taken or size)]
        out += _plain(piece, size, bits, what) if taken else piece
        at += len(piece)
    return bytes(out)


def _apart(stream: bytes, bits: int) -> bytes:
    """The numbers of so many bits in a stream, a byte each."""
    packed = np.frombuffer(stream, np.uint8)
    return stream if bits == 8 else unpack_bits(packed, bits, -(-8 * len(stream) // bits)).tobytes()


def _coded(stream: bytes) -> bytes:
    """The smaller of DEFLATE with and without looking for repetitions."""
    tried = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        coder = zlib.compressobj(9, strategy=strategy)
        tried.append(coder.compress(stream) + coder.flush())
    return min(tried, key=len)


def _plain(piece: bytes, size: int, bits: int, what: str) -> bytes:
    """A stream of this size again; never more than it is said to have is decompressed."""
    count = size if bits == 8 else -(-8 * size // bits)
    unpacker = zlib.decompressobj()
    try:
        numbers = unpacker.decompress(piece, count + 1)
    except zlib.error as error:
        raise FileFormatError(f"{what}: a stream cannot be read: {error}") from error
    codes = np.frombuffer(numbers, np.uint8)
    whole = len(codes) == count and unpacker.eof and not unpacker.unused_data
    if not whole or (bits < 8 and codes.max() >> bits):
        raise FileFormatError(f"{what}: required a stream of {count} numbers of {bits} bits")
    return numbers if bits == 8 else pack_bits(codes, bits).tobytes()[:size]


def _forms(value: Any) -> Iterator[Any]:
    """All descriptions of arrays in a plan's text."""
    if isinstance(value, dict) and "parts" in value:
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _forms(inner)
