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
from kernels.geometry import Window


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


def unpack(packed: Half) -> np.ndarray:
    """The rounded weights, float32."""
    return decoded.expand(packed.source, packed.shape)


def linear(
    x: np.ndarray,
    packed: Half,
    bias: np.ndarray | None = None,
    relu: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """y = x @ w + bias, of it max(y, 0) if `relu`; x (M, K), w (K, N) packed, bias (N,) -> (M, N).

    Writes to `out` (M, N), C-contiguous, if given. Raises ValueError for shapes that do not fit,
    TypeError unless all are float32.
    """
    return decoded.linear(
        "half.linear", packed.source, decoded.matrix(packed.shape), x, bias, relu, out
    )


def conv2d(
    x: np.ndarray,
    packed: Half,
    bias: np.ndarray | None,
    win: Window,
    relu: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """As `kernels.conv.conv2d` with packed weights (KH, KW, C, N), into `out` if given.

    Raises ValueError for shapes that do not fit, TypeError unless all are float32.
    """
    return decoded.conv2d("half.conv2d", packed.source, packed.shape, x, bias, win, relu, out)
