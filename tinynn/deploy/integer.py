"""The steps of plans that compute in 8 bits: see `kernels.int8` for the arithmetic.

A value of bytes lies on a grid (scale, zero, top): the byte q in 0 ... top is the number
scale (q - zero). Every layer sums exactly and rounds once, in its store: to bytes on the grid `y`,
or, `floating`, to the float32 that the sum is. ReLU comes first if `relu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels import int8, prepack_int8
from kernels.geometry import Pair, Window
from kernels.int8_conv import COPY_ITEM, SLACK, pack_conv2d
from kernels.int8_depthwise import pack_depthwise2d
from kernels.int8_product import Linear, pack_linear
from tinynn.deploy.steps import BYTE, FLOAT, Arrays, Sides, Site, Step, Windowed
from tinynn.op import Array, Shape

Grid = tuple[float, int, int]  #: scale, zero point, largest byte
UNIT: Grid = (1.0, 0, 255)
_FEW = 4  # pixels of a side of a window


def _quads(nbytes: int) -> int:
    return -(-nbytes // 4)


class _Integer(Step):
    """A step that reads bytes on the grid `x`."""

    x: Grid = UNIT
    y: Grid = UNIT
    floating: bool = False
    relu: bool = False

    def dtype(self, kinds: Sequence[Any]) -> Any:
        self.require_kinds(kinds, BYTE)
        return FLOAT if self.floating else BYTE

    def _grids_fit(self) -> bool:
        return _is_grid(self.x) and _is_grid(self.y)

    def _scaling(self, factor: Any) -> int8.Scaling:
        """From sums in units of x's scale times `factor`: one number, or one a channel."""
        if self.floating:
            return int8.dequantized(self.x[0], factor, relu=self.relu)
        scale, zero, top = self.y
        return int8.requantized(self.x[0], factor, scale, zero, relu=self.relu, top=top)


def _is_grid(grid: Grid) -> bool:
    scale, zero, top = grid
    with np.errstate(over="ignore"):
        usable = bool(0 < np.float32(scale) < math.inf)
    return usable and 0 <= zero <= top <= 255


class _Weighted(_Integer):
    """A step with integer weights, a scale for each of their channels, and biases in int32."""

    weights = ("weight", "scale")
    optional = ("bias",)
    dtypes = {"weight": np.dtype(np.int8), "bias": np.dtype(np.int32)}

    def _check(self, fits: bool, channels: int, inputs: Sequence[Shape], arrays: Arrays) -> None:
        """Refuse what does not fit, or weights whose sums could leave int32."""
        scale, bias = arrays["scale"], arrays.get("bias")
        fits = fits and scale.shape == (channels,) and self._grids_fit()
        if not fits or not (bias is None or bias.shape == (channels,)):
            self.refuse("grids, x, weights, and a scale and a bias a channel", inputs, arrays)
        try:
            self._scaling(scale)
            taps = arrays["weight"].reshape(1, -1, channels)
            int8.checked_sums(self.kind, taps, bias, self.x[1])
        except (ValueError, OverflowError) as error:
            self.refuse(f"what 8-bit kernels take ({error})", inputs, arrays)


@dataclass(frozen=True)
class IntLinear(_Weighted):
    """x (K,) @ weight (K, N) + bias (N,)."""

    x: Grid = UNIT
    y: Grid = UNIT
    floating: bool = False
    relu: bool = False

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        w = arrays["weight"]
        fits = w.ndim == 2 and w.size > 0 and inputs[0] == w.shape[:1]
        self._check(fits, w.shape[-1] if w.ndim else 0, inputs, arrays)
        return w.shape[1:]

    def macs(self, inputs: Sequence[Shape], arrays: Arrays, output: Shape) -> int:
        return arrays["weight"].size

    def scratch(self, inputs: Sequence[Shape], output: Shape) -> int:
        return 1 if inputs[0][0] < 4 else 0

    def emit(self, at: Site) -> None:
        def pack() -> Linear:
            a = at.arrays
            return pack_linear(a["weight"], a.get("bias"), self.x[1], self._scaling(a["scale"]))

        layer = at.packed.get("int8", pack)
        prepack_int8.linear(at.program, layer, at.inputs[0], at.output, at.scratch)


@dataclass(frozen=True)
class _Slid(Windowed, _Weighted):
    """Weights (KH, KW, C, ...) that slide over x (H, W, C)."""

    stride: Pair = (1, 1)
    padding: Sides = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    x: Grid = UNIT
    y: Grid = UNIT
    floating: bool = False
    relu: bool = False

    def _made(self, weight: Shape) -> int:
        """The channels of the result."""
        raise NotImplementedError

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        w = arrays["weight"]
        if w.ndim != 4 or not w.size:
            self.refuse("weight (KH, KW, C, ...)", inputs, arrays)
        win = self._window((w.shape[0], w.shape[1]), inputs, arrays)
        size, channels = self._slid(win, inputs, arrays), self._made(w.shape)
        self._check(inputs[0][2] == w.shape[2], channels, inputs, arrays)
        return (*size, channels)

    def macs(self, inputs: Sequence[Shape], arrays: Arrays, output: Shape) -> int:
        return arrays["weight"].size * output[0] * output[1]

    def _packed(self, at: Site, pack: Callable[..., Any]) -> Any:
        def make() -> Any:
            a, w = at.arrays, at.arrays["weight"]
            win = Window(w.shape[:2], self.stride, self.padding, self.dilation)
            return pack(w, a.get("bias"), self.x[1], self._scaling(a["scale"]), win)

        return at.packed.get("int8", make)


@dataclass(frozen=True)
class IntConv(_Slid):
    """The convolution of x (H, W, C) with weight (KH, KW, C, N), bias (N,)."""

    def _made(self, weight: Shape) -> int:
        return weight[3]

    def scratch(self, inputs: Sequence[Shape], output: Shape) -> int:
        height, width, channels = inputs[0]
        sides = tuple(n + sum(p) for n, p in zip((height, width), self.padding, strict=True))
        if channels >= 4:  # a copy in longer numbers, where it is not a product
            copied = COPY_ITEM > 1 and not (height, width) == sides == output[:2]
            return _quads((math.prod(inputs[0]) + SLACK) * COPY_ITEM) if copied else 0
        # a copy of what windows touch, or of each pixel as four bytes
        return max(_quads((math.prod(sides) * channels + SLACK) * COPY_ITEM), height * width)

    def emit(self, at: Site) -> None:
        layer, x = self._packed(at, pack_conv2d), at.inputs[0]
        need = prepack_int8.conv2d_scratch(layer, *x.shape[:3])
        scratch = at.scratch if need else None
        prepack_int8.conv2d(at.program, layer, x, at.output, scratch)


@dataclass(frozen=True)
class IntDepthwise(_Slid):
    """Each channel of x (H, W, C) with its own kernels, weight (KH, KW, C, R), bias (C R,)."""

    def _made(self, weight: Shape) -> int:
        return weight[2] * weight[3]

    def scratch(self, inputs: Sequence[Shape], output: Shape) -> int:
        height, width, channels = inputs[0]
        several = output[2] > channels  # of each channel: it is copied so many times
        return _quads(height * width * output[2]) if several else 0

    def emit(self, at: Site) -> None:
        layer = self._packed(at, pack_depthwise2d)
        prepack_int8.depthwise2d(at.program, layer, at.inputs[0], at.output, at.scratch)


@dataclass(frozen=True)
class IntScaleShift(_Weighted):
    """x (..., C) weight (C,) + bias (C,): batch norm that no layer before it can take over."""

    x: Grid = UNIT
    y: Grid = UNIT
    floating: bool = False
    relu: bool = False

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        (x,) = inputs
        fits = len(x) > 0 and arrays["weight"].shape == x[-1:]
        self._check(fits, x[-1] if fits else 0, inputs, arrays)
        return x

    def emit(self, at: Site) -> None:
        def pack() -> Any:
            a, one = at.arrays, Window((1, 1))
            w, how = a["weight"].reshape(1, 1, -1, 1), self._scaling(a["scale"])
            return pack_depthwise2d(w, a.get("bias"), self.x[1], how, one)

        layer = at.packed.get("int8", pack)
        prepack_int8.scale_shift(at.program, layer, at.inputs[0], at.output)


@dataclass(frozen=True)
class IntAdd(Step):
    """The sum of two values on the grids `a` and `b`."""

    a: Grid = UNIT
    b: Grid = UNIT
    y: Grid = UNIT
    relu: bool = False

    operands = 2
    in_place = True

    def dtype(self, kinds: Sequence[Any]) -> Any:
        self.require_kinds(kinds, BYTE)
        return BYTE

    def _how(self) -> int8.Addition:
        scale, zero, top = self.y
        return int8.addition(*self.a[:2], *self.b[:2], scale, zero, relu=self.relu, top=top)

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        if inputs[0] != inputs[1] or not all(map(_is_grid, (self.a, self.b, self.y))):
            self.refuse("two values of one shape, and grids", inputs, arrays)
        try:
            self._how()
        except (ValueError, OverflowError) as error:
            self.refuse(f"grids that are not too far apart ({error})", inputs, arrays)
        return inputs[0]

    def emit(self, at: Site) -> None:
        a, b = at.inputs
        prepack_int8.add(at.program, a, b, at.output, self._how())


@dataclass(frozen=True)
class MaxBytes(Windowed):
    """The largest byte under each window of x (H, W, C); padding does not count."""

    kernel: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Sides = ((0, 0), (0, 0))

    def dtype(self, kinds: Sequence[Any]) -> Any:
        self.require_kinds(kinds, BYTE)
        return BYTE

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        win = self._window(self.kernel, inputs, arrays)
        return (*self._slid(win, inputs, arrays), inputs[0][2])

    def emit(self, at: Site) -> None:
        win = Window(self.kernel, self.stride, self.padding)
        prepack_int8.max_pool2d(at.program, at.inputs[0], at.output, win)


@dataclass(frozen=True)
class IntMean(Windowed, _Integer):
    """The mean under each window of x (H, W, C); padding does not count.

    A sum of T pixels is multiplied by float32(float32(x's scale / y's) / T). Small windows that
    all have as many are those of a depthwise convolution.
    """

    kernel: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Sides = ((0, 0), (0, 0))
    x: Grid = UNIT
    y: Grid = UNIT
    floating: bool = False
    relu: bool = False

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        win = self._window(self.kernel, inputs, arrays)
        shape = (*self._slid(win, inputs, arrays), inputs[0][2])
        _check_mean(self, math.prod(self.kernel), inputs, arrays)
        return shape

    def emit(self, at: Site) -> None:
        win, how = Window(self.kernel, self.stride, self.padding), self._scaling(1.0)

        def table() -> Array:
            counts = np.maximum(np.arange(math.prod(self.kernel) + 1), 1)
            return (how.multiplier.astype(np.float64) / counts).astype(np.float32)

        x, y = at.inputs[0], at.output
        if max(map(max, self.padding)) == 0 and max(self.kernel) <= _FEW:

            def pack() -> Any:
                ones = np.ones((*self.kernel, x.shape[3], 1), np.int8)
                every = how._replace(multiplier=table()[-1:])
                return pack_depthwise2d(ones, None, self.x[1], every, win)

            layer = at.packed.get("int8", pack)
            prepack_int8.depthwise2d(at.program, layer, x, y, None)
            return
        shares = at.packed.get("table", table)
        prepack_int8.avg_pool2d(at.program, x, self.x[1], shares, how, win, y)


@dataclass(frozen=True)
class IntGlobalSum(_Integer):
    """`scale` times the sum of x (H, W, C) over rows and columns: (C,)."""

    scale: float = 1.0
    x: Grid = UNIT
    y: Grid = UNIT
    floating: bool = False
    relu: bool = False

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        if len(inputs[0]) != 3:
            self.refuse("an image (H, W, C)", inputs, arrays)
        _check_mean(self, math.prod(inputs[0][:2]), inputs, arrays, self.scale)
        return inputs[0][2:]

    def emit(self, at: Site) -> None:
        x, how = at.inputs[0], self._scaling(self.scale)
        count = math.prod(x.shape[1:3])
        win = Window((x.shape[1], x.shape[2]))
        shares = at.packed.get("table", lambda: np.repeat(how.multiplier, count + 1))
        y = at.output.reshape(x.shape[0], 1, 1, x.shape[3])
        prepack_int8.avg_pool2d(at.program, x, self.x[1], shares, how, win, y)


def _check_mean(
    step: Any, count: int, inputs: Sequence[Shape], arrays: Arrays, scale: float = 1.0
) -> None:
    if not step._grids_fit() or count > int8.LARGEST // 255:
        step.refuse("grids, and a window whose sums int32 holds", inputs, arrays)
    try:
        step._scaling(scale)
    except (ValueError, OverflowError) as error:
        step.refuse(f"what 8-bit kernels take ({error})", inputs, arrays)


# --- from and to numbers --------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantize(Step):
    """float32 to bytes: round(x / scale), cut at the ends of the grid; NaN becomes byte 0."""

    y: Grid = UNIT

    def dtype(self, kinds: Sequence[Any]) -> Any:
        self.require_kinds(kinds, FLOAT)
        return BYTE

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        if not _is_grid(self.y):
            self.refuse("a grid", inputs, arrays)
        return inputs[0]

    def emit(self, at: Site) -> None:
        prepack_int8.quantize(at.program, at.inputs[0], at.output, *self.y)


@dataclass(frozen=True)
class Dequantize(Step):
    """Bytes to the float32 that they stand for."""

    x: Grid = UNIT

    def dtype(self, kinds: Sequence[Any]) -> Any:
        self.require_kinds(kinds, BYTE)
        return FLOAT

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        if not _is_grid(self.x):
            self.refuse("a grid", inputs, arrays)
        return inputs[0]

    def emit(self, at: Site) -> None:
        prepack_int8.dequantize(at.program, at.inputs[0], at.output, *self.x[:2])


@dataclass(frozen=True)
class ByteReLU(Step):
    """ReLU of bytes: the larger of each and `zero`, the byte of the number 0."""

    zero: int = 0

    in_place = True

    def dtype(self, kinds: Sequence[Any]) -> Any:
        self.require_kinds(kinds, BYTE)
        return BYTE

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        if not 0 <= self.zero <= 255:
            self.refuse("a zero point in 0 ... 255", inputs, arrays)
        return inputs[0]

    def emit(self, at: Site) -> None:
        prepack_int8.relu(at.program, at.inputs[0], at.output, self.zero)
