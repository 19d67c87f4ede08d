"""Layers of the multiplication-free ef-operator, trainable (Afrasiyabi et al. 2017)."""

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
from tinynn.ops.conv import padded, pair
from tinynn.tensor import Tensor


class _Additive(Module):
    """Weights, and for each output a scale and a bias: y = scale (x (+) weight) + bias."""

    rectifies = True
    _axes = 2

    def _build(
        self,
        shape: tuple[int, ...],
        weight_init: Initialiser,
        rng: np.random.Generator,
        dtype: npt.DTypeLike,
    ) -> None:
        if not all(isinstance(m, int | np.integer) and m >= 1 for m in shape):
            raise ConfigError(f"{type(self).__name__}: required whole sizes >= 1; came {shape}")
        terms = int(np.prod(shape[:-1]))
        self.weight = Parameter(weight_init(shape, rng, dtype), copy=False)
        # Each term is about as large as x: their sum is brought back to that.
        self.scale = Parameter(np.full(shape[-1], terms**-0.5, dtype), copy=False)
        self.bias = Parameter(np.zeros(shape[-1], dtype), copy=False)

    def check(self) -> None:
        """Raise ShapeError or DTypeError unless weight, scale and bias are parameters that fit."""
        name = type(self).__name__
        shapes = [p.shape for p in require_parameters(name, self.weight, self.scale, self.bias)]
        if self.weight.ndim != self._axes or shapes[1:] != [self.weight.shape[-1:]] * 2:
            raise ShapeError(
                f"{name}: required weight of {self._axes} axes (..., N), scale (N,) and bias (N,); "
                f"came {shapes}"
            )


class AdditiveLinear(_Additive):
    """y = scale (x (+) weight) + bias: x (B, m_in), weight (m_in, m_out), y (B, m_out).

    x (+) w sums sign(x w) (|x| + |w|) over the inputs. scale and bias (m_out,).
    """

    def __init__(
        self,
        m_in: int,
        m_out: int,
        *,
        weight_init: Initialiser = init.he_normal,
        rng: np.random.Generator,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self._build((m_in, m_out), weight_init, rng, dtype)

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        return ops.scale_shift(
            ops.additive_linear(x, self.weight), self.scale, self.bias, relu=relu
        )

    def extra(self) -> str:
        """The sizes."""
        return f"{self.weight.shape[0]} -> {self.weight.shape[1]}"


class AdditiveConv2d(_Additive):
    """As `AdditiveLinear` on windows: x (B, H, W, m_in), weight (K, K, m_in, m_out).

    `kernel`, `stride`, `padding`, `dilation` as for `Conv2d`; taps outside the image add nothing.
    """

    _axes = 4

    def __init__(
        self,
        m_in: int,
        m_out: int,
        kernel: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: Any = "same",
        dilation: int | Pair = 1,
        weight_init: Initialiser = init.he_normal,
        rng: np.random.Generator,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        size = pair("AdditiveConv2d", "kernel", kernel)
        self.stride = pair("AdditiveConv2d", "stride", stride)
        self.dilation = pair("AdditiveConv2d", "dilation", dilation)
        self.padding = padded("AdditiveConv2d", padding)
        self._build((*size, m_in, m_out), weight_init, rng, dtype)

    def check(self) -> None:
        """The same, and of the window, too."""
        check_window(self, "stride", "dilation")
        super().check()

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        y = ops.additive_conv2d(
            x,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        return ops.scale_shift(y, self.scale, self.bias, relu=relu)

    def extra(self) -> str:
        """Sizes and geometry."""
        height, width, m_in, m_out = self.weight.shape
        return (
            f"{height}x{width}, {m_in} -> {m_out}, stride={self.stride}, padding={self.padding!r}"
        )
