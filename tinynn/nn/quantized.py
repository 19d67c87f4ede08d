"""Layers that compute with rounded numbers: what the integer kernels compute, in floating point.

    r = scale n,  n whole, low <= n <= high        a number r on a grid

is the one notion here. An activation stored as uint8 with zero point z has low = -z and
high = 255 - z, its byte is n - low; weights have low = -127, high = 127 and their byte is n; with
b bits there are 2^b - 1 steps, or 2^b - 2 on a symmetric grid. The number 0 is on every grid. A
grid's scale, low and high are floating arrays (low and high hold whole numbers) that broadcast
against what is rounded: one number for an activation, one for each output channel of weights, for
instance (1, 1, 1, N) for a convolution.

A `Quantized` module holds another and up to three quantisers: of its input, its weights and its
result. Every grid is a buffer of a quantiser, and rounding is the op `fake_quantize`: whoever
traces a quantised model finds the grids as named values between the ops, as QuantizeLinear and
DequantizeLinear stand in an ONNX file. `tinynn.compress.integers` reads them.

What runs here differs from the integer arithmetic of `kernels.int8` in two ways: sums are rounded
as float32 sums, and biases are not rounded to multiples of x_scale w_scale, the unit of the integer
sum. Given the same rounded inputs, a layer's result differs by one step at the most, and only where
it lies that close to the middle between two. The intermediate sum of three operands of an `Add` is
not rounded.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from tinynn import ops
from tinynn.errors import ConfigError, ShapeError
from tinynn.nn.module import Module, Parameter, rectifying
from tinynn.op import Array
from tinynn.tensor import Tensor

#: what becomes of a grid in training: it stays, it follows the values, or its scale is trained
Ranges = Literal["fixed", "running", "learned"]

#: the least scale that is not taken for 0
SMALLEST = float(np.finfo(np.float32).tiny)
#: the least learned scale: numbers divided by it, and products of two, stay within float32
_LEAST = 2.0**-60


class Quantizer(Module):
    """Rounds to a grid that is stored: `scale`, `low` and `high`, see the head of this file."""

    scale: Array | Parameter
    low: Array
    high: Array

    def __init__(self, scale: Array, low: Array, high: Array) -> None:
        self.scale, self.low, self.high = np.array(scale), np.array(low), np.array(high)
        self.ranges: Ranges = "fixed"
        self.check()

    def check(self) -> None:
        """Raise ConfigError unless this is a grid with the number 0 on it."""
        scale = np.asarray(self.scale)
        fits = isinstance(self.low, np.ndarray) and isinstance(self.high, np.ndarray)
        fits = fits and {scale.dtype.kind, self.low.dtype.kind, self.high.dtype.kind} == {"f"}
        if not fits or not (
            (scale > 0).all()
            and np.isfinite(scale).all()
            and (self.low <= 0).all()
            and (self.high >= 0).all()
            and self.ranges in ("fixed", "running", "learned")
        ):
            raise ConfigError(
                f"{type(self).__name__}: required scales > 0, low <= 0 <= high, all floating, and "
                f"ranges fixed, running or learned; came {scale!r}, {self.low!r}, {self.high!r}, "
                f"{self.ranges!r}"
            )
        if isinstance(self.scale, Parameter):  # files do not say that it is a scale
            self.scale.least = _LEAST

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.ranges == "running":
            self._follow(x._data)
        learned = isinstance(self.scale, Parameter)
        scale = self.scale if learned else Tensor(self.scale, copy=False)
        low, high = Tensor(self.low, copy=False), Tensor(self.high, copy=False)
        return ops.fake_quantize(x, scale, low, high, gain=self._gain(x) if learned else 1.0)

    def train_ranges(self, ranges: Ranges) -> None:
        """What becomes of the grid in training."""
        scale = np.array(self.scale)
        self.scale = Parameter(scale) if ranges == "learned" else scale
        self.ranges = ranges
        self.check()

    def _gain(self, x: Tensor) -> float:
        # Esser et al. 2020, section 2.2: 1 / sqrt(numbers that share the scale * steps)
        if not self.training:
            return 1.0
        return 1 / math.sqrt(x.size / self.low.size * max(1.0, float(np.max(self.high))))

    def _follow(self, x: Array) -> None:
        raise NotImplementedError(f"{type(self).__name__}._follow")

    def extra(self) -> str:
        """Bits and how many grids there are."""
        return f"{np.max(bits_of(self.low, self.high))} bits, {self.low.size} grids, {self.ranges}"


class WeightQuantizer(Quantizer):
    """Symmetric grids of weights; running ones follow each channel's largest magnitude.

    Where the grid was cut below the largest weight, it stays cut at the same share of it.
    """

    share: Array

    def __init__(self, scale: Array, high: Array, weights: Array) -> None:
        self.share = np.ones_like(scale)
        super().__init__(scale, -high, high)
        largest = self._largest(weights)
        known = np.where(largest > SMALLEST, largest, scale * high)  # else any grid will do
        self.share = (scale * high / known).astype(scale.dtype)

    def _largest(self, weights: Array) -> Array:
        axes = tuple(i for i, n in enumerate(self.low.shape) if n == 1)
        return np.abs(weights).max(axis=axes, keepdims=True)

    def _follow(self, x: Array) -> None:
        largest = self._largest(x)
        moved = np.maximum(largest * self.share / self.high, SMALLEST)
        self.scale = np.where(largest > 0, moved, self.scale).astype(x.dtype)


class ActivationQuantizer(Quantizer):
    """One grid for a whole activation; a running one follows the range that batches have.

    The ends of the range are moving averages (Jacob et al. 2018, section 3.1), by `momentum`
    towards each batch's.
    """

    def __init__(self, least: float, most: float, bits: int, *, momentum: float = 0.01) -> None:
        self.least, self.most = np.array([least, most], np.float32)[:, None].copy()
        self.bits, self.momentum = int(bits), float(momentum)
        super().__init__(*affine(least, most, bits))

    def _follow(self, x: Array) -> None:
        m = self.momentum
        # new arrays: a checkpoint keeps the old ones as they were
        self.least = (self.least * (1 - m) + min(float(x.min()), 0.0) * m).astype(x.dtype)
        self.most = (self.most * (1 - m) + max(float(x.max()), 0.0) * m).astype(x.dtype)
        self.scale, self.low, self.high = affine(
            float(self.least[0]), float(self.most[0]), self.bits, x.dtype
        )


class DynamicQuantizer(Module):
    """A grid for each image of a batch, found from the image's own range: nothing is stored.

    An image is what lies behind one index of the first axis, a row of (B, C). So a result does not
    depend on what else is in the batch.
    """

    def __init__(self, bits: int = 8) -> None:
        self.bits = int(bits)
        self.check()

    def check(self) -> None:
        """Raise ConfigError unless the number of bits is 2 ... 8."""
        if self.bits not in range(2, 9):
            raise ConfigError(f"DynamicQuantizer: required 2 ... 8 bits; came {self.bits!r}")

    def forward(self, x: Tensor) -> Tensor:
        grid = affine_each(x._data, self.bits)
        return ops.fake_quantize(x, *(Tensor(a, copy=False) for a in grid), dynamic=self.bits)


class HalfQuantizer(Module):
    """Rounds to float16."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.round_to_half(x)


class Quantized(Module):
    """Another module with its input, its weights or its result rounded, each where not None.

    `weight` needs a layer that has `weight`, `bias` and `using`. A ReLU that follows comes before
    the result is rounded.
    """

    rectifies = True

    def __init__(
        self,
        layer: Module,
        *,
        input: Module | None = None,
        weight: Module | None = None,
        output: Module | None = None,
    ) -> None:
        self.layer, self.input, self.weight, self.output = layer, input, weight, output
        self.check()

    def check(self) -> None:
        """Raise ConfigError, ShapeError unless the quantisers fit the layer."""
        parts = (self.input, self.weight, self.output)
        if not isinstance(self.layer, Module) or not all(
            p is None or isinstance(p, Module) for p in parts
        ):
            raise ConfigError(f"Quantized: required a module and quantisers; came {parts}")
        if self.weight is None:
            return
        if not hasattr(self.layer, "using"):
            raise ConfigError(f"Quantized: {type(self.layer).__name__} has no weights to round")
        if isinstance(self.weight, Quantizer):
            shapes = self.layer.weight.shape, self.weight.low.shape  # type: ignore[attr-defined]
            if len(shapes[0]) != len(shapes[1]) or np.broadcast_shapes(*shapes) != shapes[0]:
                raise ShapeError(f"Quantized: weights and their grid do not fit: {shapes}")

    def forward(self, *inputs: Tensor, relu: bool = False) -> Tensor:
        if self.input is not None:
            inputs = (self.input(inputs[0]), *inputs[1:])
        if self.weight is not None:
            layer: Any = self.layer
            y = layer.using(*inputs, self.weight(layer.weight), self._bias(layer), relu=relu)
        elif relu and rectifying(self.layer):
            y = self.layer(*inputs, relu=True)
        else:
            y = self.layer(*inputs)
            y = ops.relu(y) if relu else y
        return y if self.output is None else self.output(y)

    def _bias(self, layer: Any) -> Tensor | None:
        half = isinstance(self.weight, HalfQuantizer) and layer.bias is not None
        return self.weight(layer.bias) if half and self.weight is not None else layer.bias

    def extra(self) -> str:
        """Nothing: the parts say it."""
        return ""


def affine(
    least: float, most: float, bits: int, dtype: Any = np.float32
) -> tuple[Array, Array, Array]:
    """scale, low and high, each (1,), of 2^bits - 1 steps from `least` to `most` and over 0.

    The ends move by half a step at the most, so that 0 is on the grid (Jacob et al. 2018, section
    3); a range without extent gives a scale of 2^-16: the biases of the next layer, whose unit it
    makes in integers, stay fine.
    """
    least, most, steps = min(least, 0.0), max(most, 0.0), 2**bits - 1
    scale = np.asarray([(most - least) / steps], dtype)
    if not scale[0] >= SMALLEST:
        scale[0], low = 2.0**-16, 0.0
    else:
        low = max(-float(steps), float(np.rint(least / float(scale[0]))))
    return scale, np.asarray([low], dtype), np.asarray([low + steps], dtype)


def affine_each(x: Array, bits: int) -> tuple[Array, Array, Array]:
    """`affine` of each image of x (B, ...): scale, low and high, each (B, 1, ...)."""
    axes, steps = tuple(range(1, x.ndim)), 2**bits - 1
    least = x.min(axis=axes, keepdims=True, initial=0).astype(np.float64)
    most = x.max(axis=axes, keepdims=True, initial=0).astype(np.float64)
    with np.errstate(invalid="ignore"):
        scale = ((most - least) / steps).astype(x.dtype)
        known = (scale >= SMALLEST) & np.isfinite(scale)
    scale = np.where(known, scale, x.dtype.type(1))
    low = np.where(known, np.maximum(np.rint(least / scale.astype(np.float64)), -steps), 0)
    return scale, low.astype(x.dtype), (low + steps).astype(x.dtype)


def bits_of(low: Array, high: Array) -> Array:
    """How many bits hold the numbers low ... high."""
    return np.ceil(np.log2(np.asarray(high - low, np.float64) + 1)).astype(np.int64)
