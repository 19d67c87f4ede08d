"""Layers whose weights are numbers of entries in a code book: 1 to 8 bits a weight, packed.

    W[t, k, n] = book[code[t, k, n]],  or  book[n, code[t, k, n]] with a book for each channel

(Han, Mao, Dally 2016, "Deep Compression", section 3: weight sharing.) The codes are one stream of
bits, row by row, each code's lowest bit first, with nothing between them. See `kernels.decoded`
for how the layers run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kernels import decoded
from kernels.decoded import conv2d, linear, unpack

__all__ = ["CodeBook", "codes", "conv2d", "linear", "pack", "pack_bits", "unpack", "unpack_bits"]


@dataclass(frozen=True)
class CodeBook:
    """Weights (K, N) or (KH, KW, C, N) as packed codes and a book: what `pack` makes."""

    shape: tuple[int, ...]
    bits: int
    stream: np.ndarray  #: uint8 (ceil(weights bits / 8),)
    book: np.ndarray  #: float32 (entries,) or (N, entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the stream and the book."""
        return self.stream.nbytes + self.book.nbytes

    @cached_property
    def source(self) -> decoded.Stream:
        """The weights as kernels take them: room behind the stream, the book filled up."""
        data = np.concatenate([self.stream, np.zeros(decoded.SLACK, np.uint8)])
        entries, channels = 1 << self.bits, self.shape[-1]
        if self.book.ndim == 1:
            book = np.zeros(max(16, entries), np.float32)
            book[: len(self.book)] = self.book
            return decoded.Stream(self.bits, data, book, 16)
        times = -(-16 // channels)
        book = np.zeros((times, channels, entries), np.float32)
        book[:, :, : self.book.shape[1]] = self.book
        return decoded.Stream(-self.bits, data, book.ravel(), times * channels)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers below 2**bits as a stream of bits, uint8 (ceil(size bits / 8),)."""
    flat = codes.astype(np.uint8).reshape(-1, 1)
    return np.packbits((flat >> np.arange(bits, dtype=np.uint8)) & 1, bitorder="little")


def unpack_bits(stream: np.ndarray, bits: int, size: int) -> np.ndarray:
    """The first `size` numbers of a stream of `pack_bits`, uint8."""
    each = np.unpackbits(stream, count=size * bits, bitorder="little").reshape(size, bits)
    return (each << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)


def pack(codes: np.ndarray, book: np.ndarray) -> CodeBook:
    """Codes (K, N) or (KH, KW, C, N), any integers, and their book, float32.

    book (entries,) for the layer or (N, entries) with one for each channel, 2 to 256 entries; a
    code takes as many bits as the number of entries asks for. Raises ValueError for other shapes
    and for codes that the book does not have, TypeError for other dtypes.
    """
    if codes.dtype.kind not in "iu" or book.dtype != np.float32:
        raise TypeError(
            f"codebook.pack: expected integer codes and a book of float32, got {codes.dtype} and "
            f"{book.dtype}"
        )
    entries = book.shape[-1] if book.ndim else 0
    fits = book.ndim == 1 or (book.ndim == 2 and len(book) == codes.shape[-1])
    if codes.ndim not in (2, 4) or not codes.size or not fits or not 2 <= entries <= 256:
        raise ValueError(
            "codebook.pack: expected codes (K, N) or (KH, KW, C, N), not empty, and a book "
            f"(entries,) or (N, entries) of 2 to 256 entries, got {codes.shape} and {book.shape}"
        )
    if codes.min() < 0 or codes.max() >= entries:
        raise ValueError(
            f"codebook.pack: expected codes from 0 to {entries - 1}, got {codes.min()} to "
            f"{codes.max()}"
        )
    bits = (entries - 1).bit_length()
    return CodeBook(codes.shape, bits, pack_bits(codes, bits), np.ascontiguousarray(book))


def codes(packed: CodeBook) -> np.ndarray:
    """The codes, uint8, in the shape of the weights."""
    size = int(np.prod(packed.shape))
    return unpack_bits(packed.stream, packed.bits, size).reshape(packed.shape)
