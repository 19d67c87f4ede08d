"""Layers whose weights are stored as float16 and computed with as float32.

Half the bytes; the sums are those of float32 with the rounded weights. Conversion follows IEEE 754
binary16: to nearest, ties to even; beyond 65520 infinity; subnormals, infinities and NaN kept. See
`kernels.decoded` for how the layers run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kernels import decoded, simd_decode
from kernels.decoded import conv2d, linear, unpack

__all__ = ["Half", "conv2d", "linear", "pack", "unpack"]


@dataclass(frozen=True)
class Half:
    """Weights (K, N) or (KH, KW, C, N) in float16: what `pack` makes."""

    values: np.ndarray  #: float16, in the shape of the weights

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.values.nbytes

    @cached_property
    def source(self) -> decoded.Stream:
        """The weights as kernels take them, with room behind them."""
        data = np.zeros(self.nbytes + decoded.SLACK, np.uint8)
        data[: self.nbytes] = self.values.reshape(-1).view(np.uint8)
        return decoded.Stream(simd_decode.HALF, data, np.zeros(16, np.float32), 16)


def pack(weights: np.ndarray) -> Half:
    """Weights (K, N) or (KH, KW, C, N), float32, rounded to float16.

    Raises TypeError for other dtypes, ValueError for other shapes.
    """
    if weights.dtype != np.float32:
        raise TypeError(f"half.pack: expected float32, got {weights.dtype}")
    if weights.ndim not in (2, 4) or not weights.size:
        raise ValueError(
            f"half.pack: expected weights (K, N) or (KH, KW, C, N), not empty, got {weights.shape}"
        )
    with np.errstate(over="ignore"):  # infinity is what the format has for it
        return Half(np.ascontiguousarray(weights, np.float16))
