"""Weights in the fewest bytes that give back every bit: the forms in which files hold them.

    float32   the numbers themselves
    float16   where each is one of that format's
    bfloat16  likewise, its bits as integers
    integers  int8 or int32, each less the smallest of them, in as few bits as the largest takes
    coded     numbers of entries in a book of at most 256 (Han, Mao & Dally 2016, section 3)
    columns   int8, those of each channel in as few bits as the largest of them takes
    books     as `coded`, with a book for each channel
    hashed    the values that float32 weights are made of by hashing (see `kernels.hashing`), and a
              factor for each channel
    gaps      the numbers that are not 0, in one of the other forms, and how many zeros lie between
              them, b bits each; 2**b - 1 stands for so many zeros and no number (ibid., section 2)

`decode` trusts nothing: it raises FileFormatError for whatever does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kernels.codebook import pack_bits, unpack_bits
from tinynn.deploy.origin import Origin
from tinynn.errors import ConfigError, FileFormatError
from tinynn.op import Array, Shape
from tinynn.ops.hashing import Hashed

_LEAST = 16  # numbers for which a form is worth its name
_ENTRIES = 256

#: What describes a form, and its arrays.
Form = tuple[dict[str, Any], dict[str, Array]]


def encode(array: Array, origin: Origin | None = None) -> Form:
    """The smallest form of an array of float32, int8 or int32; `origin`: what it was made of."""
    tried: list[Form | None] = []
    if array.dtype != np.float32:
        forms = [_integers(array)]
        if array.dtype == np.int8:
            tried += [_columns(array, n) for n in _channels(array.shape)]
    else:
        forms = [_plain(array)]
        if array.size >= _LEAST:
            tried += [_half(array), _upper(array), _coded(array)]
            best = min(form_bytes(f) for f in (*forms, *tried) if f is not None)
            tried += [_books(array, n, best) for n in _channels(array.shape)]
    if array.size >= _LEAST:
        tried.append(_gaps(array))
    if origin is not None and array.dtype == np.float32:
        tried.append(_hashed(array, origin))
    return min((*forms, *(f for f in tried if f is not None)), key=form_bytes)


def form_bytes(form: Form) -> int:
    """The bytes of its arrays."""
    return sum(a.nbytes for a in form[1].values())


def number_bits(head: Mapping[str, Any], part: str) -> int:
    """Of how many bits the numbers are that this part of a form consists of; 8 of unpacked ones."""
    bits: Any = 8
    if part[:5] == "codes":
        bits = int(part[5:] or head.get("inner", head)["bits"])
    elif part == "gaps":
        bits = head["bits"]
    elif part in ("bits", "counts"):
        bits = head[part]["bits"]
    return min(bits, 8)


def decode(head: Any, arrays: Mapping[str, Array]) -> Array:
    """The array that `encode` described by `head` and `arrays`."""
    kinds: dict[str, Any] = {
        "float32": _from_plain, "float16": _from_half, "bfloat16": _from_upper,
        "integers": _from_integers, "coded": _from_coded, "gaps": _from_gaps,
        "columns": _from_columns, "books": _from_books, "hashed": _from_hashed,
    }  # fmt: skip
    kind = head.get("form") if isinstance(head, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise FileFormatError(f"required a form of {sorted(kinds)}; came {str(head)[:80]}")
    return kinds[kind](head, arrays)


def _plain(array: Array) -> Form:
    return {"form": "float32", "shape": list(array.shape)}, {"values": array.reshape(-1)}


def _half(array: Array) -> Form | None:
    with np.errstate(over="ignore"):
        values = array.reshape(-1).astype(np.float16)
    if not np.array_equal(_bits(values.astype(np.float32)), _bits(array.reshape(-1))):
        return None
    return {"form": "float16", "shape": list(array.shape)}, {"values": values}


def _upper(array: Array) -> Form | None:
    bits = _bits(array.reshape(-1))
    if np.any(bits & 0xFFFF):
        return None
    codes = bits >> 16
    low = int(codes.min())
    width = max(1, int(codes.max() - low).bit_length())
    head = {"form": "bfloat16", "shape": list(array.shape), "bits": width, "low": low}
    return head, {"codes": _pack(codes - np.uint32(low), width)}


def _integers(array: Array) -> Form:
    flat = array.reshape(-1).astype(np.int64)
    low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
    bits = max(1, (high - low).bit_length())
    head = {
        "form": "integers", "shape": list(array.shape), "dtype": array.dtype.name, "bits": bits,
        "low": low,
    }  # fmt: skip
    return head, {"codes": _pack((flat - low).astype(np.uint32), bits)}


def _coded(array: Array) -> Form | None:
    book, codes = np.unique(_bits(array.reshape(-1)), return_inverse=True)
    if len(book) > _ENTRIES:
        return None
    bits = max(1, (len(book) - 1).bit_length())
    head = {"form": "coded", "shape": list(array.shape), "bits": bits}
    return head, {"codes": pack_bits(codes, bits), "book": book.view(np.float32)}


def _channels(shape: Shape) -> list[int]:
    """How many channels weights of this shape may have: of depthwise ones two axes count them."""
    return [math.prod(shape[-n:]) for n in range(1, min(len(shape), 3))]


def _columns(array: Array, channels: int) -> Form | None:
    flat = array.reshape(-1, channels).astype(np.int64)
    largest = np.maximum(flat.max(axis=0), -1 - flat.min(axis=0))
    bits = (1 + np.frexp(largest)[1]).astype(np.int8)  # with one for the sign
    if len(np.unique(bits)) < 2:
        return None
    codes = flat & ((1 << bits.astype(np.int64)) - 1)
    head, arrays = _integers(bits)
    head = {"form": "columns", "shape": list(array.shape), "bits": head}
    return head, {**_pack_columns(codes, bits), "bits": arrays["codes"]}


def _books(array: Array, channels: int, most: int) -> Form | None:
    """The form unless it takes as many bytes as another; finding the books takes the longest."""
    rows = _bits(array).reshape(-1, channels)
    line = np.sort(rows, axis=0)
    counts = 1 + np.count_nonzero(line[1:] != line[:-1], axis=0)
    held = 4 * counts.sum() + len(rows) * _width(counts).sum() / 8
    if counts.max() > _ENTRIES or held >= most:
        return None
    found = [np.unique(column, return_inverse=True) for column in rows.T]
    codes = np.stack([inverse for _, inverse in found], axis=1)
    head, arrays = _integers(counts.astype(np.int32))
    head = {"form": "books", "shape": list(array.shape), "counts": head}
    return head, {
        **_pack_columns(codes, _width(counts)),
        "counts": arrays["codes"],
        "book": np.concatenate([book for book, _ in found]).view(np.float32),
    }


def _width(counts: Array) -> Array:
    """The bits of codes below each count."""
    return np.maximum(1, np.frexp(counts - 1)[1])


def _pack_columns(codes: Array, bits: Array) -> dict[str, Array]:
    """Codes (K, N) whose column n takes bits[n]: a stream for each number of bits."""
    return {f"codes{b}": pack_bits(codes[:, bits == b], int(b)) for b in np.unique(bits)}


def _gaps(array: Array) -> Form | None:
    places = np.flatnonzero(_content(array.reshape(-1)))
    if not 0 < len(places) < array.size:
        return None
    zeros = np.diff(places, prepend=-1) - 1
    _, bits = min((_symbols(zeros, b) * b, b) for b in range(1, 9))
    top = (1 << bits) - 1
    stream = np.full(_symbols(zeros, bits), top, np.uint8)
    stream[np.cumsum(zeros // top + 1) - 1] = zeros % top
    inner, arrays = encode(array.reshape(-1)[places])
    head = {
        "form": "gaps", "shape": list(array.shape), "bits": bits, "symbols": len(stream),
        "inner": inner,
    }  # fmt: skip
    return head, {**arrays, "gaps": pack_bits(stream, bits)}


def _hashed(array: Array, origin: Origin) -> Form | None:
    if not np.array_equal(_bits(origin.expanded()), _bits(array)):
        return None  # they have changed since
    op = origin.op
    head = {
        "form": "hashed", "shape": list(op.shape), "buckets": list(op.buckets), "seed": op.seed,
    }  # fmt: skip
    arrays = {"values": origin.values}
    return head, arrays if origin.scale is None else {**arrays, "scale": origin.scale}


def _symbols(zeros: Array, bits: int) -> int:
    return int((zeros // ((1 << bits) - 1) + 1).sum())


def _content(array: Array) -> Array:
    """What is 0 where nothing need be stored."""
    return _bits(array) if array.dtype == np.float32 else array


def _pack(codes: Array, bits: int) -> Array:
    """As `pack_bits`, of numbers of up to 32 bits."""
    if bits == 8:
        return codes.astype(np.uint8)
    if bits < 8:
        return pack_bits(codes, bits)
    each = (codes.reshape(-1, 1) >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(each.astype(np.uint8), bitorder="little")


def _unpack(stream: Array, bits: int, size: int) -> Array:
    """What `_pack` packed, int64."""
    if bits == 8:
        return stream.astype(np.int64)
    if bits < 8:
        return unpack_bits(stream, bits, size).astype(np.int64)
    each = np.unpackbits(stream, count=size * bits, bitorder="little").reshape(size, bits)
    return each.astype(np.int64) @ (1 << np.arange(bits))


def _bits(array: Array) -> Array:
    """The bits of float32 numbers, by which -0 is not 0 and NaN is equal to itself."""
    return np.ascontiguousarray(array).view(np.uint32)


# --- back -----------------------------------------------------------------------------------------


def _shape(head: Mapping[str, Any]) -> Shape:
    sizes: Any = head.get("shape")
    fits = isinstance(sizes, list) and len(sizes) <= 8
    if not fits or not all(type(n) is int and 1 <= n <= 1 << 28 for n in sizes):
        raise FileFormatError(f"required a shape; came {str(sizes)[:80]}")
    if math.prod(sizes) > 1 << 28:
        raise FileFormatError(f"required at most 2**28 weights; came {sizes}")
    return tuple(sizes)


def _part(arrays: Mapping[str, Array], name: str, dtype: Any, size: int | None) -> Array:
    array = arrays.get(name)
    if array is None or array.dtype != dtype or array.ndim != 1 or size not in (None, array.size):
        came = None if array is None else (array.dtype, array.shape)
        raise FileFormatError(f"required {name} of {np.dtype(dtype)}, {size} of them; came {came}")
    return array


def _packed(arrays: Mapping[str, Array], name: str, bits: Any, count: Any, most: int = 8) -> Array:
    if type(bits) is not int or not 1 <= bits <= most or type(count) is not int or count < 1:
        raise FileFormatError(f"required 1 to {most} bits and a count; came {bits!r}, {count!r}")
    stream = _part(arrays, name, np.uint8, -(-count * bits // 8))
    return _unpack(stream, bits, count)


def _from_plain(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> Array:
    shape = _shape(head)
    return _part(arrays, "values", np.float32, math.prod(shape)).reshape(shape)


def _from_half(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> Array:
    shape = _shape(head)
    values = _part(arrays, "values", np.float16, math.prod(shape))
    return values.astype(np.float32).reshape(shape)


def _from_upper(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> Array:
    shape, low = _shape(head), head.get("low")
    codes = _packed(arrays, "codes", head.get("bits"), math.prod(shape), most=16)
    if type(low) is not int or not 0 <= low <= 0xFFFF - int(codes.max()):
        raise FileFormatError(f"required codes of 16 bits; came {codes.max()} above {low!r}")
    return ((codes + low).astype(np.uint32) << 16).view(np.float32).reshape(shape)


def _from_integers(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> Array:
    shape, name, low = _shape(head), head.get("dtype"), head.get("low")
    if name not in ("int8", "int32") or type(low) is not int or abs(low) > 1 << 31:
        raise FileFormatError(f"required int8 or int32, and the lowest; came {name!r}, {low!r}")
    codes = _packed(arrays, "codes", head.get("bits"), math.prod(shape), most=32)
    values, ends = codes + low, np.iinfo(name)
    if values.min() < ends.min or values.max() > ends.max:
        raise FileFormatError(f"required numbers of {name}; came {values.min()}, {values.max()}")
    return values.astype(name).reshape(shape)


def _from_coded(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> Array:
    shape = _shape(head)
    book = _part(arrays, "book", np.float32, None)
    codes = _packed(arrays, "codes", head.get("bits"), math.prod(shape))
    if codes.max() >= len(book):
        raise FileFormatError(f"required codes below {len(book)}; came {codes.max()}")
    return book[codes].reshape(shape)


def _from_columns(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> Array:
    shape, bits = _shape(head), _each(head, arrays, "bits", 8)
    codes = _unpack_columns(arrays, bits, math.prod(shape))
    signed = codes - ((codes >> (bits - 1)) << bits)
    return signed.astype(np.int8).reshape(shape)


def _from_books(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> Array:
    shape, counts = _shape(head), _each(head, arrays, "counts", _ENTRIES)
    book = _part(arrays, "book", np.float32, int(counts.sum()))
    codes = _unpack_columns(arrays, _width(counts), math.prod(shape))
    if (codes >= counts).any():
        raise FileFormatError(f"required codes below {counts.max()}; came {codes.max()}")
    return book[codes + (np.cumsum(counts) - counts)].reshape(shape)


def _each(head: Mapping[str, Any], arrays: Mapping[str, Array], name: str, most: int) -> Array:
    """A number from 1 to `most` for each channel, int64."""
    inner = head.get(name)
    if not isinstance(inner, dict) or inner.get("form") != "integers" or name not in arrays:
        raise FileFormatError(f"required integers {name}; came {str(inner)[:80]}")
    found = _from_integers(inner, {"codes": arrays[name]}).astype(np.int64).reshape(-1)
    if found.min() < 1 or found.max() > most:
        raise FileFormatError(f"required {name} from 1 to {most}; came {found.min()}")
    return found


def _unpack_columns(arrays: Mapping[str, Array], bits: Array, size: int) -> Array:
    """What `_pack_columns` packed, int64 (K, N)."""
    rows, left = divmod(size, len(bits))
    if left or not rows:
        raise FileFormatError(f"required {size} weights of {len(bits)} channels")
    codes = np.empty((rows, len(bits)), np.int64)
    for b, times in zip(*np.unique(bits, return_counts=True), strict=True):
        stream = _packed(arrays, f"codes{b}", int(b), rows * int(times))
        codes[:, bits == b] = stream.reshape(rows, times)
    return codes


def origin_of(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> Origin | None:
    """What `head` and `arrays` say that an array was made of: of the form "hashed" alone."""
    if head.get("form") != "hashed":
        return None
    buckets, seed = head.get("buckets"), head.get("seed")
    if not isinstance(buckets, list):
        raise FileFormatError(f"required a list of buckets; came {str(buckets)[:80]}")
    try:
        op = Hashed(_shape(head), tuple(buckets), seed)  # type: ignore[arg-type]
    except ConfigError as error:
        raise FileFormatError(str(error)) from error
    values = _part(arrays, "values", np.float32, sum(op.buckets))
    scale = _part(arrays, "scale", np.float32, op.shape[-1]) if "scale" in arrays else None
    return Origin(op, values, scale)


def _from_hashed(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> Array:
    made = origin_of(head, arrays)
    assert made is not None
    return made.expanded()


def _from_gaps(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> Array:
    shape, bits, inner = _shape(head), head.get("bits"), head.get("inner")
    if not isinstance(inner, dict) or inner.get("form") in ("gaps", "hashed"):
        raise FileFormatError(f"required a form of the numbers; came {str(inner)[:80]}")
    symbols = _packed(arrays, "gaps", bits, head.get("symbols")).astype(np.int64)
    values = decode(inner, arrays)
    top = (1 << int(bits or 1)) - 1
    found = symbols != top
    places = np.cumsum(symbols + found)[found] - 1
    size = math.prod(shape)
    if values.ndim != 1 or len(values) != len(places) or not 0 < len(places) <= size:
        raise FileFormatError(f"required a number for each gap; came {len(values)}, {len(places)}")
    if places[-1] >= size:
        raise FileFormatError(f"required places below {size}; came {places[-1]}")
    out = np.zeros(size, values.dtype)
    out[places] = values
    return out.reshape(shape)
