"""The IDX format of MNIST and its likes: big-endian sizes, then bytes.

http://yann.lecun.com/exdb/mnist/: two zero bytes, the type (8: unsigned byte), the number of
dimensions, each dimension as 32 bits, then the values with the last dimension varying fastest.
"""

from __future__ import annotations

import math

import numpy as np

from tinynn.data.files import Reader, fail
from tinynn.op import Array

_UNSIGNED_BYTE = 8


def parse_idx(file: Reader, dimensions: int) -> tuple[bytes, Array]:
    """The header and the array of unsigned bytes of an IDX file, packed by gzip or not.

    Raises FileFormatError with the offset for another number of `dimensions`, another type, an
    axis of length 0, a file that is shorter or longer than its header says, or larger than allowed.
    """
    magic = file.exactly(4, "IDX header")
    if magic != bytes([0, 0, _UNSIGNED_BYTE, dimensions]):
        fail(
            file.path,
            0,
            f"required an IDX file of unsigned bytes in {dimensions} dimensions (00 00 08 "
            f"0{dimensions}); came {magic.hex(' ')}",
        )
    sizes = file.exactly(4 * dimensions, "IDX dimensions")
    shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
    count, allowed = math.prod(shape), file.limit - file.offset
    if not 0 < count <= allowed:
        fail(file.path, 4, f"required 1 to {allowed} values; came dimensions {shape}")
    values = file.exactly(count, f"values {shape}")
    file.end()
    return magic + sizes, np.frombuffer(values, np.uint8).reshape(shape)
