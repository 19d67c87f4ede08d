"""Weights made of few values by hashing: see `kernels.hashing`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels import hashing, reference_compressed
from tinynn.errors import ConfigError
from tinynn.op import Array, Op, Sample, Saved, Shape
from tinynn.ops._common import Operand, tensor
from tinynn.tensor import Tensor, apply

#: Bounds, so that a small file cannot ask for much memory: weights of a layer, taps of a filter,
#: weights for each value.
_MOST_WEIGHTS, _MOST_TAPS, _MOST_SHARERS = 1 << 26, 1 << 10, 1 << 12


@dataclass(frozen=True)
class Hashed(Op):
    """values (sum of buckets,) -> weights of `shape`, (KH, KW, C, N) or (K, N).

    Each DCT coefficient of the weights over their taps is one of the values, or its negative, as
    two hashes of its index and `seed` say. Coefficients of frequencies j1 + j2 = j share the j-th
    number of `buckets`; weights (K, N) have one band and no DCT. No multiply-adds are counted: they
    depend on no activation, and a plan does them once.
    """

    shape: Shape = (1, 1)
    buckets: Shape = (1,)
    seed: int = 0

    variants = {"numpy": hashing.weights, "reference": reference_compressed.hashed}
    samples = staticmethod(
        lambda: [
            Sample(Hashed((5, 7), (6,)), ((6,),)),
            Sample(Hashed((1, 1, 3, 2), (4,), 9), ((4,),)),
            Sample(Hashed((3, 3, 2, 3), (3, 4, 5, 2, 1), 1), ((15,),)),
            Sample(Hashed((2, 5, 1, 3), (1, 2, 3, 2, 2, 1), 2), ((11,),)),
        ]
    )

    def __post_init__(self) -> None:
        shape, buckets = self.shape, self.buckets
        whole = all(_whole(n) and n >= 1 for n in (*shape, *buckets)) and _whole(self.seed)
        if not whole or len(shape) not in (2, 4) or not 0 <= self.seed < 1 << 63:
            self._refuse("shape (KH, KW, C, N) or (K, N), buckets >= 1, a seed from 0 to 2**63 - 1")
        size, taps = math.prod(shape), math.prod(shape[:-2])
        if size > _MOST_WEIGHTS or taps > _MOST_TAPS:
            self._refuse(f"at most {_MOST_WEIGHTS} weights of {_MOST_TAPS} taps")
        sizes = band_sizes(shape)
        if len(sizes) != len(buckets) or any(b > n for b, n in zip(buckets, sizes, strict=True)):
            self._refuse(f"{len(sizes)} numbers of buckets, each at most that of {sizes}")
        if size > _MOST_SHARERS * sum(buckets):
            self._refuse(f"a bucket for every {_MOST_SHARERS} weights")

    def _refuse(self, required: str) -> None:
        raise ConfigError(f"hashed: required {required}; came {str(self)[:200]}")

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        (values,) = arrays
        if values.shape != (sum(self.buckets),):
            raise self.reject(f"values ({sum(self.buckets)},)", values)
        return self.kernel()(values, self.shape, self.buckets, self.seed), ()

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (hashing.weights_grad(grad, self.buckets, self.seed),)

    def fitted(self, weights: Array) -> Array:
        """The values that give the weights nearest to these, by least squares."""
        return hashing.fitted(weights, self.buckets, self.seed)


def hashed(values: Operand, shape: Shape, buckets: Shape, seed: int = 0) -> Tensor:
    """Weights of `shape` made of values (sum of buckets,): see `Hashed`."""
    return apply(Hashed(shape, buckets, seed), tensor(values))


def band_sizes(shape: Shape) -> Shape:
    """How many coefficients of weights of this shape each frequency band has."""
    height, width = shape[:2] if len(shape) == 4 else (1, 1)
    taps = np.bincount(np.add.outer(np.arange(height), np.arange(width)).reshape(-1))
    return tuple(int(n) * shape[-2] * shape[-1] for n in taps)


def share_out(shape: Shape, share: float, alpha: float, beta: float) -> Shape:
    """Buckets for each frequency band, about `share` times as many in all as weights of this shape.

    Of band j's coefficients the share is in proportion to x**(alpha - 1) (1 - x)**(beta - 1), x =
    (j + 1) / (KH + KW) (Chen et al. 2016), at most 1; a band has at least one bucket.
    """
    if not (0 < share <= 1 and 0 < alpha < math.inf and 0 < beta < math.inf):
        raise ConfigError(
            "hashed: required 0 < share <= 1, alpha and beta > 0; came "
            f"{share!r}, {alpha!r} and {beta!r}"
        )
    sizes = np.array(band_sizes(shape), np.float64)
    x = np.arange(1, len(sizes) + 1) / (len(sizes) + 1)
    rate = x ** (alpha - 1) * (1 - x) ** (beta - 1)
    full = np.zeros(len(sizes), bool)  # bands with a bucket for each coefficient
    while True:
        left, total = share * sizes.sum() - sizes[full].sum(), (rate * sizes)[~full].sum()
        shares = rate * (left / total if total else 0.0)
        if not (more := ~full & (shares > 1)).any():
            break
        full |= more
    ends = np.rint(np.cumsum(np.where(full, sizes, shares * sizes)))
    counts = np.clip(np.diff(ends, prepend=0), 1, sizes)
    return tuple(int(n) for n in counts)


def _whole(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)
