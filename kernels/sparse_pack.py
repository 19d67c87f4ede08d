"""Weights of which most are zero, packed for `kernels.sparse`: only the others, and where they are.

Channels of the result are taken together in rows. In blocks of 4 x 1 a row is four channels, and an
index names an input for which any of them has a weight. Single weights are packed in rows of two
channels: first come the inputs for which both have a weight, then those of the first channel alone,
then those of the second. Where both have one, a kernel reads the activations once for two products.

The K = taps C inputs are cut into chunks of `depth` at most, whose activations stay in the
first-level cache, and whose indices fit a byte. For each chunk, and in it for each row, come the
numbers of its inputs (`counts`), their indices within the chunk, and the values: at most 5 bytes a
weight, 4.25 in blocks. `starts` says where each 16 channels begin in a chunk.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from kernels import simd

GROUP = 16  # channels between two entries of `starts`; whole vectors on every level
SLACK = 16  # indices behind the last, which may be read: as many as a vector has lanes, or more

# Inputs of a chunk, at least. With 16 registers fewer pixels are summed at a time: of as many more
# inputs there is room for them.
_LEAST = 80 if simd.TILE == (6, 4) else 128

#: By block, of each kind of input in the order of packing: which channels of a row have a weight.
MEMBERS = {
    1: np.array([[True, True], [True, False], [False, True]]),
    4: np.array([[True, True, True, True]]),
}


class Sparse(NamedTuple):
    """Packed weights (KH, KW, C, N): what `pack` makes and the layers take."""

    shape: tuple[int, int, int, int]
    block: int  #: output channels that share an index: 1 or 4
    depth: int  #: inputs of the longest chunk
    values: np.ndarray  #: float32 (weights,), those of a block side by side
    indices: np.ndarray  #: uint8 (inputs + SLACK,), from the chunk's first input
    counts: np.ndarray  #: uint8 (chunks, rows, kinds), of inputs
    starts: np.ndarray  #: int32 (chunks * groups of 16 channels + 1, 2), in inputs and in weights
    edges: np.ndarray  #: int32 (chunks + 1,), the inputs at which chunks begin

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, indices included, without the slack."""
        return sum(a.nbytes for a in self.arrays) - SLACK

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What kernels take, in this order."""
        return self[3:]

    @property
    def density(self) -> float:
        """The share of weights that are stored."""
        return self.values.size / max(1, int(np.prod(self.shape)))


def channels_of_row(block: int) -> int:
    """How many channels kernels compute together."""
    return int(MEMBERS[block].shape[1])


def pack(weights: np.ndarray, block: int = 1, depth: int | None = None) -> Sparse:
    """Weights (K, N) or (KH, KW, C, N), float32, in which zeros are not to be stored.

    `block` 4 stores channels 4 i to 4 i + 3 of an input together if any of them is not 0. `depth`:
    inputs of a chunk, at most 255; by default chosen for batches. Raises ValueError for other
    shapes, blocks and depths and for weights that are not finite, TypeError unless float32.
    """
    if weights.dtype != np.float32:
        raise TypeError(f"sparse.pack: expected float32, got {weights.dtype}")
    if weights.ndim not in (2, 4) or not weights.size or block not in MEMBERS:
        raise ValueError(
            f"sparse.pack: expected weights (K, N) or (KH, KW, C, N), not empty, and block 1 or 4, "
            f"got {weights.shape} and {block}"
        )
    if not np.isfinite(weights).all():
        raise ValueError("sparse.pack: expected finite weights, got NaN or infinity")
    shape = (1, 1, *weights.shape) if weights.ndim == 2 else weights.shape
    inputs, channels = int(np.prod(shape[:3])), shape[3]
    together, members = channels_of_row(block), MEMBERS[block]
    padded = np.zeros((inputs, -(-channels // together) * together), np.float32)
    padded[:, :channels] = weights.reshape(inputs, channels)
    numbers = padded.reshape(inputs, -1, together)
    kinds = _kinds(numbers != 0, block)
    if depth is None:
        depth = _depth(float((numbers != 0).mean()), block)
    if not 1 <= depth <= 255:
        raise ValueError(f"sparse.pack: expected 1 <= depth <= 255, got {depth}")
    edges = _edges(shape[0] * shape[1], shape[2], depth)
    values, indices, counts = [], [], []
    for lo, hi in itertools.pairwise(edges):
        row, kind, place = np.nonzero(kinds[lo:hi].transpose(1, 2, 0))
        values.append(numbers[lo + place, row][members[kind]])
        indices.append(place.astype(np.uint8))
        counts.append(kinds[lo:hi].sum(axis=0))
    table = np.stack(counts)
    sizes = np.stack([table.sum(axis=2), table @ members.sum(axis=1)], axis=2)
    groups = np.add.reduceat(sizes, np.arange(0, table.shape[1], GROUP // together), axis=1)
    starts = np.zeros((groups.shape[0] * groups.shape[1] + 1, 2), np.int32)
    starts[1:] = groups.reshape(-1, 2).cumsum(axis=0)
    return Sparse(
        shape,
        block,
        int(np.diff(edges).max()),
        np.concatenate(values),
        np.concatenate([*indices, np.zeros(SLACK, np.uint8)]),
        table.astype(np.uint8),
        starts,
        edges,
    )


def unpack(packed: Sparse) -> np.ndarray:
    """The weights (KH, KW, C, N), zeros included."""
    members = MEMBERS[packed.block]
    chunks, rows, kinds = packed.counts.shape
    each = np.repeat(np.arange(packed.counts.size), packed.counts.ravel())
    chunk, row, kind = np.unravel_index(each, (chunks, rows, kinds))
    numbers = np.zeros((len(each), members.shape[1]), np.float32)
    numbers[members[kind]] = packed.values
    dense = np.zeros((packed.edges[-1], rows, members.shape[1]), np.float32)
    dense[packed.edges[chunk] + packed.indices[:-SLACK], row] = numbers
    channels = packed.shape[3]
    return np.ascontiguousarray(dense.reshape(len(dense), -1)[:, :channels]).reshape(packed.shape)


def _kinds(there: np.ndarray, block: int) -> np.ndarray:
    """Of which kind each input of a row is: (inputs, rows, kinds) of (inputs, rows, channels)."""
    if block > 1:
        return np.asarray(there.any(axis=2, keepdims=True))
    return np.asarray((there[:, :, None, :] == MEMBERS[block]).all(axis=3))


def _depth(density: float, block: int) -> int:
    """Inputs of a chunk. Sparse ones are longer: a sum is kept for some weights at least."""
    return 128 if block > 1 else int(min(192, max(_LEAST, 24 / max(density, 1e-9))))


def _edges(taps: int, channels: int, depth: int) -> np.ndarray:
    """Chunks of whole taps, or equal parts of one: a tap outside the image is then left out."""
    if channels > depth:
        parts = -(-channels // depth)
        within = np.arange(parts + 1) * channels // parts
        edges = (np.arange(taps)[:, None] * channels + within[:-1]).ravel()
    else:
        edges = np.arange(0, taps, depth // channels) * channels
    return np.append(edges, taps * channels).astype(np.int32)
