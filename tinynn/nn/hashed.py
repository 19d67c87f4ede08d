"""Layers whose weights are not stored, but made of few values by hashing: see `kernels.hashing`.

Chen et al. 2015 (HashedNets) for linear layers and convolutions of one tap, Chen et al. 2016
(FreshNets) for the others. They train as any layer: a value moves by the sum of what its weights
are told to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.geometry import Pair
from tinynn import init, ops
from tinynn.errors import ConfigError, ShapeError
from tinynn.nn.conv import check_window
from tinynn.nn.layers import Initialiser, require_parameters
from tinynn.nn.module import Module, Parameter
from tinynn.op import Shape
from tinynn.ops.conv import padded, pair
from tinynn.ops.hashing import Hashed, share_out
from tinynn.tensor import Tensor


class _Hashed(Module):
    """The values, (sum of buckets,), and the attributes of the op that makes weights of them."""

    rectifies = True
    shape: Shape
    buckets: Shape
    seed: int
    values: Parameter
    bias: Parameter | None
    _axes = 2

    def _build(
        self,
        shape: Shape,
        share: float,
        frequencies: tuple[float, float],
        seed: int,
        bias: bool,
        weight_init: Initialiser,
        rng: np.random.Generator,
        dtype: npt.DTypeLike,
    ) -> None:
        if not all(isinstance(m, int | np.integer) and m >= 1 for m in shape):
            raise ConfigError(f"{type(self).__name__}: required whole sizes >= 1; came {shape}")
        self.shape, self.seed = tuple(int(m) for m in shape), seed
        self.buckets = share_out(self.shape, share, *frequencies)
        count = sum(self.op().buckets)
        # The transform is orthonormal: independent values of one variance make weights of the same.
        drawn = weight_init(self.shape, rng, dtype).reshape(-1)[:count]
        self.values = Parameter(drawn)
        self.bias = Parameter(np.zeros(self.shape[-1], dtype), copy=False) if bias else None

    def op(self) -> Hashed:
        """What makes the weights; raises ConfigError if its attributes do not fit."""
        return Hashed(self.shape, self.buckets, self.seed)

    def weights(self) -> Tensor:
        """The weights that the values make."""
        return ops.hashed(self.values, self.shape, self.buckets, self.seed)

    def check(self) -> None:
        """Raise ShapeError, DTypeError or ConfigError unless values, bias and hash fit."""
        name = type(self).__name__
        given = [vars(self).get(part) for part in ("shape", "buckets")]
        if not all(isinstance(sizes, tuple) for sizes in given) or len(self.shape) != self._axes:
            raise ConfigError(f"{name}: required shape, {self._axes} sizes, and buckets")
        shapes = [p.shape for p in require_parameters(name, self.values, self.bias)]
        if shapes[0] != (sum(self.op().buckets),) or shapes[1:] not in ([], [self.shape[-1:]]):
            raise ShapeError(
                f"{name}: required values (B,) for B buckets, bias (N,); came {shapes}"
            )

    def _sizes(self) -> str:
        return f"{self.shape[-2]} -> {self.shape[-1]}, {self.values.size} values, seed={self.seed}"


class HashedLinear(_Hashed):
    """y = x @ w + bias as `Linear`; w (m_in, m_out) of `share` times as many values."""

    def __init__(
        self,
        m_in: int,
        m_out: int,
        *,
        share: float,
        seed: int = 0,
        bias: bool = True,
        weight_init: Initialiser = init.he_normal,
        rng: np.random.Generator,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self._build((m_in, m_out), share, (1.0, 1.0), seed, bias, weight_init, rng, dtype)

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        return ops.linear(x, self.weights(), self.bias, relu=relu)

    def extra(self) -> str:
        """The sizes."""
        return f"{self._sizes()}, bias={self.bias is not None}"


class HashedConv2d(_Hashed):
    """A convolution as `Conv2d`; its weights (K, K, m_in, m_out) of `share` times as many values.

    `alpha` and `beta` say which frequencies get more of them: see `ops.hashing.share_out`.
    """

    _axes = 4

    def __init__(
        self,
        m_in: int,
        m_out: int,
        kernel: int | Pair,
        *,
        share: float,
        alpha: float = 1.0,
        beta: float = 2.0,
        seed: int = 0,
        stride: int | Pair = 1,
        padding: Any = "same",
        dilation: int | Pair = 1,
        bias: bool = True,
        weight_init: Initialiser = init.he_normal,
        rng: np.random.Generator,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        size = pair("HashedConv2d", "kernel", kernel)
        self.stride = pair("HashedConv2d", "stride", stride)
        self.dilation = pair("HashedConv2d", "dilation", dilation)
        self.padding = padded("HashedConv2d", padding)
        frequencies = (alpha, beta)
        self._build((*size, m_in, m_out), share, frequencies, seed, bias, weight_init, rng, dtype)

    def check(self) -> None:
        """The same, and of the window, too."""
        check_window(self, "stride", "dilation")
        super().check()

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        return ops.conv2d(
            x,
            self.weights(),
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            relu=relu,
        )

    def extra(self) -> str:
        """Sizes and geometry."""
        return (
            f"{self.shape[0]}x{self.shape[1]}, {self._sizes()}, stride={self.stride}, "
            f"padding={self.padding!r}, bias={self.bias is not None}"
        )
