"""Weights of few values: rounding, k-means code books, and what they take to store.

    shared = cluster.kmeans(model, 16)          # 16 values a layer, 4 bits a weight
    tn.fit(shared, ...)                         # trains the values: each moves by the sum of its
                                                # weights' gradients
    cluster.nbytes(shared)

The weights that share a value bear one number in `Parameter.codes`, which every optimiser respects.
Masked weights stay zero and share nothing; their zero is an entry of the code book of its own.
Weights are the parameters with two axes or more but for learned scales.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np

from kernels import codebook
from kernels.codebook import CodeBook
from tinynn.compress.sparsify import weights_of
from tinynn.data.batches import is_count
from tinynn.errors import ConfigError
from tinynn.nn.module import Module
from tinynn.op import Array

_ROUNDS = 1000  #: of Lloyd's algorithm; it ends long before


# --- passes ---------------------------------------------------------------------------------------


def rounded(model: Module, decimals: int, *, only: Collection[str] | None = None) -> Module:
    """A new model whose weights have this many decimals; equal ones share their value from then on.

    The crude clustering of Çallı 2017, section 2.4.2, which takes two decimals. Masked weights stay
    masked; others that round to zero share an entry that training may move. `only` names the
    weights, by dotted path. Raises PruneError for unknown names.
    """
    out = model.copy()
    for p in weights_of(out, only).values():
        p.codes = None
        p.mutate()[...] = np.round(p.data, decimals)
    tie(out, only=only)
    return out


def kmeans(
    model: Module,
    entries: int,
    *,
    per: Literal["layer", "channel"] = "layer",
    init: Literal["linear", "k-means++"] = "linear",
    rng: np.random.Generator | None = None,
    only: Collection[str] | None = None,
) -> Module:
    """A new model whose weights take at most `entries` values, 2 to 256, and share them.

    One code book a layer, or with per="channel" one for each index of the weights' last axis. Where
    a book's weights are masked, zero is one of its entries. The values are means of clusters that
    Lloyd's algorithm finds from `init`: "linear", equally spaced between the smallest and the
    largest weight (Han et al. 2016, "Deep Compression", section 3.2), or "k-means++", drawn from
    the weights by `rng` (Arthur & Vassilvitskii 2007). `only` names the weights, by dotted path.

    Raises ConfigError for options out of range, PruneError for unknown names.
    """
    if not is_count(entries) or not 2 <= entries <= 256 or per not in ("layer", "channel"):
        raise ConfigError(
            "cluster.kmeans: required 2 to 256 whole entries, per 'layer' or 'channel'; came "
            f"{entries!r}, {per!r}"
        )
    if init not in ("linear", "k-means++") or (init == "k-means++") != (rng is not None):
        raise ConfigError(
            "cluster.kmeans: init is 'linear', or 'k-means++' with a generator as rng; came "
            f"{init!r} and {rng!r}"
        )
    out = model.copy()
    for p in weights_of(out, only).values():
        p.codes = None
        channels = p.shape[-1] if per == "channel" else 1
        rows = p.data.reshape(-1, channels).astype(np.float64)
        kept = np.ones(rows.shape, bool) if p.mask is None else p.mask.reshape(rows.shape)
        codes = np.zeros(rows.shape, np.intp)
        used = 0
        for column, live, code in zip(rows.T, kept.T, codes.T, strict=True):
            if live.any():
                found, code[live] = _clusters(column[live], entries - (not live.all()), rng)
                column[live] = found[code[live]]
                code[live] += used
                used += len(found)
        p.mutate()[...] = rows.reshape(p.shape)
        p.codes = codes.reshape(p.shape)
    return out


def tie(model: Module, *, only: Collection[str] | None = None) -> None:
    """Let weights of one layer and value share it, for instance in a model loaded from a file."""
    for p in weights_of(model, only).values():
        p.codes = np.unique(p.data, return_inverse=True)[1].reshape(p.shape)


# --- Lloyd's algorithm on a line ------------------------------------------------------------------


def _clusters(values: Array, count: int, rng: np.random.Generator | None) -> tuple[Array, Array]:
    """At most `count` means and the number of its mean for each value, float64.

    On a line a cluster is a run of the sorted values, so that its mean comes from running sums; the
    algorithm ends when no value changes its cluster. A mean that has lost its values goes where the
    worst represented value is.
    """
    line, back, times = np.unique(values, return_inverse=True, return_counts=True)
    if len(line) <= count:
        return line, back.reshape(values.shape)
    weights = np.append(0, np.cumsum(times))
    sums = np.append(0.0, np.cumsum(line * times))
    means = np.linspace(line[0], line[-1], count) if rng is None else _spread(values, count, rng)
    for _ in range(_ROUNDS):
        ends = np.append(_ends(line, means), len(line))
        size, total = np.diff(weights[ends], prepend=0), np.diff(sums[ends], prepend=0.0)
        moved = total[size > 0] / size[size > 0]
        if len(moved) < count:
            worst = np.argsort(-_gaps(line, moved), kind="stable")[: count - len(moved)]
            moved = np.sort(np.concatenate([moved, line[worst]]))
        if np.array_equal(moved, means):
            break
        means = moved
    code = np.searchsorted(_ends(line, means), np.arange(len(line)), side="right")
    return means, code[back.ravel()].reshape(values.shape)


def _ends(line: Array, means: Array) -> Array:
    """Where the run of sorted values that belong to each mean ends, but for the last."""
    return np.searchsorted(line, (means[1:] + means[:-1]) / 2)


def _gaps(line: Array, means: Array) -> Array:
    """How far each value is from the nearest of the sorted means."""
    right = np.clip(np.searchsorted(means, line), 0, len(means) - 1)
    return np.minimum(np.abs(line - means[right]), np.abs(line - means[np.maximum(right - 1, 0)]))


def _spread(values: Array, count: int, rng: np.random.Generator) -> Array:
    """k-means++: each next mean a value drawn with the squared distance to those before as odds."""
    chosen = [values[rng.integers(len(values))]]
    distance = np.square(values - chosen[0])
    for _ in range(count - 1):
        chosen.append(values[rng.choice(len(values), p=distance / distance.sum())])
        distance = np.minimum(distance, np.square(values - chosen[-1]))
    return np.sort(chosen)


# --- what it takes to store -----------------------------------------------------------------------


def pack(weights: Array) -> CodeBook | None:
    """Weights (K, N) or (KH, KW, C, N) by packed codes and one book, or one for each N if smaller.

    The values alone are read, zeros of pruned weights among them, so that models from files will
    do. None where neither has at most 256 entries a book, where both take more bytes than the
    weights, and for weights that are not float32.
    """
    if weights.dtype != np.float32 or weights.ndim not in (2, 4):
        return None
    found = [b for b in (_one_book(weights), _channel_books(weights)) if b is not None]
    best = min(found, key=lambda b: b.nbytes, default=None)
    return None if best is None or best.nbytes >= weights.nbytes else best


def _one_book(weights: Array) -> CodeBook | None:
    values, codes = np.unique(weights, return_inverse=True)
    if len(values) > 256:
        return None
    return codebook.pack(codes.reshape(weights.shape), _filled(values, 2))


def _channel_books(weights: Array) -> CodeBook | None:
    columns = weights.reshape(-1, weights.shape[-1]).T
    found = [np.unique(column, return_inverse=True) for column in columns]
    entries = max(2, *(len(values) for values, _ in found))
    if entries > 256:
        return None
    codes = np.stack([codes.ravel() for _, codes in found], axis=1).reshape(weights.shape)
    return codebook.pack(codes, np.stack([_filled(values, entries) for values, _ in found]))


def _filled(values: Array, entries: int) -> Array:
    return np.append(values, np.repeat(values[-1:], max(0, entries - len(values))))


def nbytes(model: Module) -> int:
    """Bytes of all parameters and buffers, weights with few values as packed codes and books."""
    total = sum(b.nbytes for _, b in model.named_buffers())
    for p in model.parameters():
        packed = pack(p.data)
        total += p.data.nbytes if packed is None else packed.nbytes
    return total
