"""CIFAR-10 and CIFAR-100 in their published formats.

https://www.cs.toronto.edu/~kriz/cifar.html: a record is the label (CIFAR-100: the coarse label,
then the fine one) and 3072 bytes, the red, green and blue planes of 32 x 32, row by row. The
Python version has the same records as a pickled dict: `data` (n, 3072), and lists of labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinynn.data.files import fail
from tinynn.data.pickles import parse_pickle
from tinynn.errors import FileFormatError
from tinynn.op import Array

SIDE, PIXELS = 32, 3 * 32 * 32


def records(data: bytes, path: object, limits: Sequence[int]) -> Array:
    """The records of a binary file, (n, labels + 3072) uint8; `limits`: classes of each label.

    `data` is the file's content, `path` is for errors. Raises FileFormatError with the offset for
    no or no whole number of records, or a label that is no class.
    """
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


def pickled_records(
    data: bytes, path: object, labels: Sequence[str], limits: Sequence[int]
) -> Array:
    """The records of a file of the Python version, in the order of the binary one.

    `labels`: the names of the lists that hold the labels, `limits`: their numbers of classes.
    """
    content = parse_pickle(data, path)
    pixels = content.get("data")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise FileFormatError(f"{path}: required 'data', an array (n, {PIXELS}) of unsigned bytes")
    if not len(pixels) or pixels.shape[1] != PIXELS:
        raise FileFormatError(f"{path}: required 'data' (n, {PIXELS}); came {pixels.shape}")
    rows = np.empty((len(pixels), len(labels) + PIXELS), np.uint8)
    rows[:, len(labels) :] = pixels
    for column, (name, limit) in enumerate(zip(labels, limits, strict=True)):
        values = content.get(name)
        if not isinstance(values, list) or len(values) != len(rows):
            raise FileFormatError(f"{path}: required {name!r}, a list of {len(rows)} labels")
        for i, value in enumerate(values):
            if type(value) is not int or not 0 <= value < limit:
                raise FileFormatError(
                    f"{path}: {name}[{i}]: required a label from 0 to {limit - 1}; came "
                    f"{type(value).__name__} {value if type(value) is int else ''}"
                )
        rows[:, column] = values
    return rows
