"""Layers over images: the convolution and its alternatives, pools, batch normalisation.

Features are NHWC, weights HWIO. `rectifies` layers apply a following ReLU in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kernels.geometry import Pair
from tinynn import init, ops
from tinynn.errors import ConfigError, ShapeError
from tinynn.nn.layers import Initialiser, ReLU, require_parameters
from tinynn.nn.module import Module, Parameter, Sequential
from tinynn.op import Array
from tinynn.ops.conv import padded, pair
from tinynn.tensor import Tensor


class _Windowed(Module):
    """What the convolutions share: weights, an optional bias, and where the window lies."""

    _pairs: ClassVar[tuple[str, ...]] = ("stride",)

    def _build(
        self,
        shape: tuple[int, int, int, int],
        outputs: int,
        *,
        stride: int | Pair,
        padding: Any,
        bias: bool,
        weight_init: Initialiser,
        rng: np.random.Generator,
        dtype: npt.DTypeLike,
    ) -> None:
        name = type(self).__name__
        if not all(isinstance(m, int | np.integer) and m >= 1 for m in shape):
            raise ConfigError(f"{name}: required whole sizes >= 1; came {shape}")
        self.stride = pair(name, "stride", stride)
        self.padding = padded(name, padding)
        self.weight = Parameter(weight_init(shape, rng, dtype), copy=False)
        self.bias = Parameter(np.zeros(outputs, dtype), copy=False) if bias else None

    def _bias_size(self) -> int:
        return self.weight.shape[3]

    def check(self) -> None:
        """Raise ShapeError, DTypeError or ConfigError unless weights, bias and window fit."""
        check_window(self, *self._pairs)
        require_parameters(type(self).__name__, self.weight, self.bias)
        shape = None if self.bias is None else self.bias.shape
        if self.weight.ndim != 4 or shape not in (None, (self._bias_size(),)):
            raise ShapeError(
                f"{type(self).__name__}: weight {self.weight.shape} and bias {shape} do not fit"
            )

    def extra(self) -> str:
        """Sizes and geometry."""
        height, width, m_in, _ = self.weight.shape
        return (
            f"{height}x{width}, {m_in} -> {self._bias_size()}, stride={self.stride}, "
            f"padding={self.padding!r}, bias={self.bias is not None}"
        )


class _Sliding(_Windowed):
    """A window with dilation, and the op that slides it."""

    rectifies = True
    _pairs = ("stride", "dilation")
    dilation: Pair
    _op: ClassVar[Callable[..., Tensor]]

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        return self.using(x, self.weight, self.bias, relu=relu)

    def using(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool = False
    ) -> Tensor:
        """The layer with these weights in the place of its own, rounded ones for instance."""
        return type(self)._op(
            x,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            relu=relu,
        )


class Conv2d(_Sliding):
    """Convolution: x (B, H, W, m_in), weight (K, K, m_in, m_out), y (B, OH, OW, m_out).

    `kernel`, `stride` and `dilation` are one number or (rows, columns); `padding` is "same",
    "valid", a number, or ((top, bottom), (left, right)).
    """

    _op = staticmethod(ops.conv2d)

    def __init__(
        self,
        m_in: int,
        m_out: int,
        kernel: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: Any = "same",
        dilation: int | Pair = 1,
        bias: bool = True,
        weight_init: Initialiser = init.he_normal,
        rng: np.random.Generator,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        size = pair("Conv2d", "kernel", kernel)
        self.dilation = pair("Conv2d", "dilation", dilation)
        self._build(
            (*size, m_in, m_out),
            m_out,
            stride=stride,
            padding=padding,
            bias=bias,
            weight_init=weight_init,
            rng=rng,
            dtype=dtype,
        )


class PointwiseConv2d(Conv2d):
    """A 1x1 convolution: each position's channels through one matrix."""

    def __init__(self, m_in: int, m_out: int, **options: Any) -> None:
        super().__init__(m_in, m_out, 1, **options)


class DepthwiseConv2d(_Sliding):
    """Each channel with its own kernels: weight (K, K, m_in, R), y (B, OH, OW, m_in R)."""

    _op = staticmethod(ops.depthwise_conv2d)

    def __init__(
        self,
        m_in: int,
        kernel: int | Pair,
        *,
        multiplier: int = 1,
        stride: int | Pair = 1,
        padding: Any = "same",
        dilation: int | Pair = 1,
        bias: bool = True,
        weight_init: Initialiser | None = None,
        rng: np.random.Generator,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        size = pair("DepthwiseConv2d", "kernel", kernel)
        self.dilation = pair("DepthwiseConv2d", "dilation", dilation)
        # a result sees K K inputs, whatever the number of channels
        std = float(np.sqrt(2 / (size[0] * size[1])))
        self._build(
            (*size, m_in, multiplier),
            m_in * multiplier,
            stride=stride,
            padding=padding,
            bias=bias,
            weight_init=weight_init or init.normal(0.0, std),
            rng=rng,
            dtype=dtype,
        )

    def _bias_size(self) -> int:
        return self.weight.shape[2] * self.weight.shape[3]


class ConvTranspose2d(_Windowed):
    """Transposed convolution: x (B, H, W, m_in), weight (K, K, m_in, m_out), y (B, sH, sW, m_out).

    The image grows by the stride, or to `output` = (rows, columns) if given.
    """

    rectifies = True

    def __init__(
        self,
        m_in: int,
        m_out: int,
        kernel: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: Any = "same",
        output: int | Pair = (0, 0),
        bias: bool = True,
        weight_init: Initialiser = init.he_normal,
        rng: np.random.Generator,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        size = pair("ConvTranspose2d", "kernel", kernel)
        self.output = pair("ConvTranspose2d", "output", output, 0)
        self._build(
            (*size, m_in, m_out),
            m_out,
            stride=stride,
            padding=padding,
            bias=bias,
            weight_init=weight_init,
            rng=rng,
            dtype=dtype,
        )

    def check(self) -> None:
        """The same, of the size of the result, too."""
        super().check()
        if not _is_pair(vars(self).get("output"), 0):
            raise ConfigError("ConvTranspose2d: required output, two numbers >= 0")

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        return self.using(x, self.weight, self.bias, relu=relu)

    def using(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool = False
    ) -> Tensor:
        """The layer with these weights in the place of its own."""
        return ops.conv_transpose2d(
            x,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            output=self.output,
            relu=relu,
        )


class BatchNorm(Module):
    """Normalise each channel (the last axis): by the batch in training, by running means in use.

    y = gamma (x - mean) / sqrt(var + eps) + beta; the running statistics move by `momentum` towards
    each batch's mean and (unbiased) variance. Ioffe & Szegedy 2015, algorithms 1 and 2.
    """

    rectifies = True

    def __init__(
        self,
        m: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        if m < 1 or not eps > 0 or not 0 <= momentum <= 1:
            raise ConfigError(
                "BatchNorm: required m >= 1, eps > 0, momentum in [0, 1]; came "
                f"{m}, {eps}, {momentum}"
            )
        self.eps, self.momentum = float(eps), float(momentum)
        self.gamma = Parameter(np.ones(m, dtype), copy=False)
        self.beta = Parameter(np.zeros(m, dtype), copy=False)
        self.mean: Array = np.zeros(m, dtype)
        self.variance: Array = np.ones(m, dtype)

    def check(self) -> None:
        """Raise ShapeError or DTypeError unless all four vectors have one size."""
        require_parameters("BatchNorm", self.gamma, self.beta)
        if not all(type(vars(self).get(name)) is float for name in ("eps", "momentum")):
            raise ConfigError("BatchNorm: required numbers eps and momentum")
        shapes = {a.shape for a in (self.gamma, self.beta, self.mean, self.variance)}
        if len(shapes) != 1 or self.gamma.ndim != 1:
            raise ShapeError(f"BatchNorm: vectors of shapes {shapes} do not fit")

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        if not self.training:
            return ops.batchnorm_eval(
                x, self.gamma, self.beta, self.mean, self.variance, eps=self.eps, relu=relu
            )
        y, mean, variance = ops.batchnorm(x, self.gamma, self.beta, eps=self.eps, relu=relu)
        rows = x.size // x.shape[-1]
        unbiased = variance * variance.dtype.type(rows / max(rows - 1, 1))
        keep = self.mean.dtype.type(1 - self.momentum)
        # new arrays: whoever holds the old ones, a checkpoint for instance, keeps them as they were
        self.mean = keep * self.mean + (1 - keep) * mean
        self.variance = keep * self.variance + (1 - keep) * unbiased
        return y

    def extra(self) -> str:
        """The number of channels."""
        return f"{self.gamma.size}"


class ScaleShift(Module):
    """y = x weight + bias, one factor and one summand a channel: x (..., C), weight, bias (C,).

    What is left of a batch normalisation that follows no convolution: see `fold_batchnorm`.
    """

    rectifies = True

    def __init__(self, weight: npt.ArrayLike, bias: npt.ArrayLike) -> None:
        self.weight, self.bias = Parameter(weight), Parameter(bias)
        self.check()

    def check(self) -> None:
        """Raise ShapeError or DTypeError unless both are vectors of one size."""
        require_parameters("ScaleShift", self.weight, self.bias)
        if self.weight.ndim != 1 or self.weight.shape != self.bias.shape:
            raise ShapeError(
                f"ScaleShift: weight {self.weight.shape} and bias {self.bias.shape} do not fit"
            )

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        return self.using(x, self.weight, self.bias, relu=relu)

    def using(self, x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool = False) -> Tensor:
        """The layer with these weights in the place of its own."""
        return ops.scale_shift(x, weight, bias, relu=relu)

    def extra(self) -> str:
        """The number of channels."""
        return f"{self.weight.size}"


class MaxPool2d(Module):
    """The maximum of each window; the stride is the window's size unless given."""

    def __init__(
        self, size: int | Pair = 2, *, stride: int | Pair | None = None, padding: Any = "valid"
    ) -> None:
        self.kernel, self.stride = _window_of(type(self).__name__, size, stride)
        self.padding = padded(type(self).__name__, padding)

    def check(self) -> None:
        """Raise ConfigError unless the window is usable."""
        check_window(self, "kernel", "stride")

    def forward(self, x: Tensor) -> Tensor:
        return ops.max_pool2d(x, self.kernel, stride=self.stride, padding=self.padding)


class AvgPool2d(MaxPool2d):
    """The mean of each window, over the part of it inside the image."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.avg_pool2d(x, self.kernel, stride=self.stride, padding=self.padding)


class GlobalAvgPool2d(Module):
    """(B, H, W, C) to (B, C): the mean over rows and columns."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.global_avg_pool2d(x)


class KernelComposingConv2d(Sequential):
    """1xK to n channels, then Kx1 to m_out: n (m_in + m_out) K multiply-adds for m_in m_out K K.

    Çallı 2017, section 2.3: `nonlinear` puts a ReLU between the two (its first part has a bias).
    """

    def __init__(
        self,
        m_in: int,
        m_out: int,
        kernel: int,
        n: int,
        *,
        nonlinear: bool = True,
        stride: int = 1,
        bias: bool = True,
        rng: np.random.Generator,
    ) -> None:
        across = Conv2d(m_in, n, (1, kernel), stride=(1, stride), rng=rng)
        down = Conv2d(n, m_out, (kernel, 1), stride=(stride, 1), bias=bias, rng=rng)
        super().__init__(*([across, ReLU(), down] if nonlinear else [across, down]))


class SeparableConv2d(Sequential):
    """Depthwise KxK, then pointwise: m_in (K K + m_out) multiply-adds a position.

    Çallı 2017, section 2.3: `nonlinear` puts batch normalisation and a ReLU between the two.
    """

    def __init__(
        self,
        m_in: int,
        m_out: int,
        kernel: int | Pair,
        *,
        nonlinear: bool = False,
        stride: int | Pair = 1,
        padding: Any = "same",
        bias: bool = True,
        rng: np.random.Generator,
    ) -> None:
        depthwise = DepthwiseConv2d(
            m_in, kernel, stride=stride, padding=padding, bias=bias and not nonlinear, rng=rng
        )
        between = [BatchNorm(m_in), ReLU()] if nonlinear else []
        super().__init__(depthwise, *between, PointwiseConv2d(m_in, m_out, bias=bias, rng=rng))


def _window_of(name: str, size: int | Pair, stride: int | Pair | None) -> tuple[Pair, Pair]:
    kernel = pair(name, "size", size)
    return kernel, pair(name, "stride", kernel if stride is None else stride)


def check_window(layer: Module, *pairs: str) -> None:
    """Raise ConfigError unless the layer's padding and these pairs have the form that ops take."""
    given = vars(layer)
    sides = given.get("padding")
    two = isinstance(sides, tuple) and len(sides) == 2 and all(_is_pair(s, 0) for s in sides)
    wrong = [name for name in pairs if not _is_pair(given.get(name), 1)]
    wrong += [] if two or sides in ("same", "valid") else ["padding"]
    if wrong:
        came = ", ".join(f"{name}={given.get(name)!r:.60}" for name in wrong)
        raise ConfigError(
            f"{type(layer).__name__}: required pairs of numbers >= 1, padding 'same', 'valid' or "
            f"two pairs; came {came}"
        )


def _is_pair(value: object, least: int) -> bool:
    two = isinstance(value, tuple) and len(value) == 2
    return two and all(type(n) is int and n >= least for n in value)  # type: ignore[attr-defined]
