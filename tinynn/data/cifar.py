"""CIFAR-10 and CIFAR-100 in their published formats.

https://www.cs.toronto.edu/~kriz/cifar.html: a record is the label (CIFAR-100: the coarse label,
then the fine one) and 3072 bytes, the red, green and blue planes of 32 x 32, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinynn.data.files import Reader, fail
from tinynn.op import Array

SIDE, PIXELS = 32, 3 * 32 * 32


def read_records(path: Path, limits: Sequence[int]) -> Array:
    """The records of a binary file, (n, labels + 3072) uint8; `limits`: classes of each label.

    Raises FileFormatError with the offset for no or no whole number of records, or a label that is
    no class.
    """
    with Reader(path) as file:
        return records(file.read(file.limit), path, limits)


def records(data: bytes, path: object, limits: Sequence[int]) -> Array:
    """The same from the content of a file; `path` is for errors."""
    size = len(limits) + PIXELS
    if not data or len(data) % size:
        whole = len(data) - len(data) % size
        fail(path, whole, f"required whole records of {size} bytes; came {len(data) - whole} bytes")
    rows = np.frombuffer(data, np.uint8).reshape(-1, size)
    for column, limit in enumerate(limits):
        bad = np.flatnonzero(rows[:, column] >= limit)
        if bad.size:
            at = int(bad[0]) * size + column
            fail(path, at, f"required a label below {limit}; came {rows[bad[0], column]}")
    return rows


def images_and_labels(parts: Sequence[Array]) -> tuple[Array, Array]:
    """Images (n, 32, 32, 3) uint8 and the last label of each record, (n,) int64."""
    images = np.empty((sum(map(len, parts)), SIDE, SIDE, 3), np.uint8)
    at = 0
    for rows in parts:
        planes = rows[:, -PIXELS:].reshape(-1, 3, SIDE, SIDE)
        np.copyto(images[at : at + len(rows)], planes.transpose(0, 2, 3, 1))
        at += len(rows)
    return images, np.concatenate([rows[:, -PIXELS - 1] for rows in parts]).astype(np.int64)
