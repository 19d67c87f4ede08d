"""Weights out of a short vector of values, by hashing, in the frequency domain.

    F[j1, j2, c, n] = s(i) v[start(j) + h(2 i) mod buckets[j]],   i the flat index of F's element
    s(i) = -1 if h(2 i + 1) >= 2**63 else 1,   j = j1 + j2 the frequency band, start(j) its buckets'
    w[ky, kx, c, n] = sum over j1, j2 of D[j1, ky] D'[j2, kx] F[j1, j2, c, n]

D and D' are the orthonormal DCT-II of KH and KW points, h(m) the m-th number of splitmix64 from a
seed. Chen, Wilson, Tyree, Weinberger & Chen 2016, "Compressing Convolutional Neural Networks in the
Frequency Domain". With one tap there is one band, and w = F: Chen et al. 2015, "Compressing Neural
Networks with the Hashing Trick".
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from kernels import pointwise

#: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", with the variant 13
#: of Stafford 2011, "Better bit mixing". Files depend on them: they never change.
_GAMMA = 0x9E3779B97F4A7C15
_MIXES = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31

_BLOCK = 1 << 20  # elements hashed at once
_TABLES = 32  # of which one for each layer in use is wanted again and again

Shape = tuple[int, ...]


def weights(
    values: np.ndarray, shape: Shape, buckets: Shape, seed: int, *, keep: bool = True
) -> np.ndarray:
    """v (sum of buckets,) -> w of `shape`, (KH, KW, C, N) or (K, N).

    Where each value goes is kept for the next time, unless there will be none: `keep`.
    """
    both, table = np.concatenate([values, -values]), _table if keep else _table.__wrapped__
    found = both[table(shape, buckets, seed)]
    if len(found) > 1:
        found = pointwise.matmul(_basis(shape[0], shape[1], values.dtype).T, found)
    return found.reshape(shape)


def weights_grad(grad: np.ndarray, buckets: Shape, seed: int) -> np.ndarray:
    """The gradient of the values: the signed sum, over each bucket, of the gradient's DCT."""
    table = _table(grad.shape, buckets, seed)
    found = np.ascontiguousarray(grad).reshape(table.shape)
    if len(found) > 1:
        found = pointwise.matmul(_basis(grad.shape[0], grad.shape[1], grad.dtype), found)
    size = sum(buckets)
    sums = np.bincount(table.reshape(-1), found.reshape(-1), 2 * size)
    return (sums[:size] - sums[size:]).astype(grad.dtype)


def fitted(w: np.ndarray, buckets: Shape, seed: int) -> np.ndarray:
    """The values whose weights have the least squared distance from w: means; 0 for no weights."""
    size = sum(buckets)
    counts = np.bincount(_table(w.shape, buckets, seed).reshape(-1) % size, minlength=size)
    sums = weights_grad(w.astype(np.float64), buckets, seed)
    return (sums / np.maximum(counts, 1)).astype(w.dtype)


def splitmix64(seed: int, places: np.ndarray) -> np.ndarray:
    """The numbers of the generator's sequence at these places (from 0), uint64."""
    z = (places + np.uint64(1)) * np.uint64(_GAMMA)
    z += np.uint64(seed)
    for shift, factor in _MIXES:
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(_LAST_SHIFT))


@lru_cache(_TABLES)
def _table(shape: Shape, buckets: Shape, seed: int) -> np.ndarray:
    """For each coefficient, (taps, C N), its place in [v; -v]."""
    taps, pairs, size = math.prod(shape[:-2]), shape[-2] * shape[-1], sum(buckets)
    table = np.empty((taps, pairs), np.int32)
    for tap in range(taps):
        band = sum(divmod(tap, shape[1])) if len(shape) == 4 else 0
        start, count = sum(buckets[:band]), buckets[band]
        for low in range(0, pairs, _BLOCK):
            high = min(pairs, low + _BLOCK)
            twice = np.arange(2 * (tap * pairs + low), 2 * (tap * pairs + high), 2, dtype=np.uint64)
            bucket = splitmix64(seed, twice) % np.uint64(count)
            negative = splitmix64(seed, twice + np.uint64(1)) >> np.uint64(63)
            table[tap, low:high] = bucket + negative * np.uint64(size) + np.uint64(start)
    table.flags.writeable = False
    return table


@lru_cache(_TABLES)
def _basis(height: int, width: int, dtype: Any) -> np.ndarray:
    """(taps, taps): the coefficients of a filter of height x width are this times its weights."""
    matrix = np.kron(_dct(height), _dct(width)).astype(dtype)
    matrix.flags.writeable = False
    return matrix


def _dct(size: int) -> np.ndarray:
    """The orthonormal DCT-II, D[j, k] = sqrt((2 - [j = 0]) / size) cos(pi j (k + 1/2) / size)."""
    j, k = np.ogrid[:size, :size]
    return np.sqrt(np.where(j == 0, 1, 2) / size) * np.cos(np.pi * j * (k + 0.5) / size)
