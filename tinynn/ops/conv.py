"""Convolutions over images: dense, depthwise and transposed. Features are NHWC, weights HWIO."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import index as whole
from typing import Any, ClassVar

import numpy as np

from kernels import conv, deconv, depthwise, reference
from kernels.elementwise import relu_grad
from kernels.geometry import Padding, Pair, Window, window
from kernels.statistics import sums
from tinynn.errors import ConfigError
from tinynn.op import Array, Op, Sample, Saved, Shape
from tinynn.ops._common import Operand, fitting, is_number, tensor
from tinynn.tensor import Tensor, apply

_GEOMETRIES: tuple[dict[str, Any], ...] = (
    {},
    {"padding": "valid"},
    {"stride": (2, 2)},
    {"padding": ((2, 0), (0, 1)), "dilation": (1, 2)},
)


@dataclass(frozen=True)
class _Windowed(Op):
    """An op that slides weights (KH, KW, ...) over images (B, H, W, C)."""

    stride: Pair = (1, 1)
    padding: Padding = "same"
    dilation: Pair = (1, 1)
    relu: bool = False

    selective = True
    input_grad: ClassVar[Callable[..., Array]]  # of (grad, w, shape of x, window)
    weight_grad: ClassVar[Callable[..., Array]]  # of (grad, x, window)
    required: ClassVar[str]

    @staticmethod
    def _results(w: Array) -> int:
        """How many channels the weights make."""
        raise NotImplementedError

    def _window(self, x: Array, w: Array) -> Window:
        size = x.shape[1:3]
        try:
            return fitting(*size, w.shape[:2], self.stride, self.padding, self.dilation)
        except ValueError:
            raise self.reject("an image that the kernel fits in", x, w) from None

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        x, w = arrays[:2]
        bias = arrays[2] if len(arrays) > 2 else None
        fits = (
            x.ndim == 4
            and w.ndim == 4
            and x.shape[3] == w.shape[2]
            and (bias is None or bias.shape == (self._results(w),))
        )
        if not fits or not all(a.size for a in arrays):
            raise self.reject(self.required, *arrays)
        y = self.kernel()(x, w, bias, self._window(x, w), self.relu)
        return y, (x, w, y if self.relu else None)

    def backward(
        self, grad: Array, saved: Saved, needs: tuple[bool, ...] = (True, True, True)
    ) -> tuple[Array | None, ...]:
        x, w, y = saved
        win, grad = self._window(x, w), _rectified(grad, y)
        grads = (
            type(self).input_grad(grad, w, x.shape, win) if needs[0] else None,
            type(self).weight_grad(grad, x, win) if needs[1] else None,
            sums(grad) if len(needs) > 2 and needs[2] else None,
        )
        return grads[: len(needs)]

    def macs(self, *shapes: Shape) -> int:
        x, w = shapes[:2]
        win = window(x[1], x[2], (w[0], w[1]), self.stride, self.padding, self.dilation)
        return x[0] * math.prod(w) * math.prod(win.output(x[1], x[2]))


@dataclass(frozen=True)
class Conv2d(_Windowed):
    """y[b, oy, ox, n] = bias[n] + sum_{ky, kx, c} x[b, iy, ix, c] w[ky, kx, c, n].

    iy = oy stride - padding + ky dilation, ix likewise; taps outside the image count as zeros.
    x (B, H, W, C), w (KH, KW, C, N), bias (N,), y (B, OH, OW, N), rectified if `relu`.
    """

    channels = "mix"
    required = "x (B, H, W, C), w (KH, KW, C, N), bias (N,), not empty"
    input_grad = staticmethod(conv.conv2d_input_grad)
    weight_grad = staticmethod(conv.conv2d_weight_grad)
    variants = {
        "numba": conv.conv2d,
        "reference": lambda x, w, b, win, relu: _plain(reference.conv2d(x, w, b, win), relu),
    }
    samples = staticmethod(
        lambda: [
            *(Sample(Conv2d(**g), ((2, 5, 4, 3), (3, 2, 3, 4), (4,))) for g in _GEOMETRIES),
            Sample(Conv2d(relu=True), ((1, 4, 4, 2), (3, 3, 2, 3), (3,))),
            Sample(Conv2d(), ((1, 1, 1, 1), (3, 3, 1, 1), (1,))),
        ]
    )

    @staticmethod
    def _results(w: Array) -> int:
        return w.shape[3]


@dataclass(frozen=True)
class DepthwiseConv2d(_Windowed):
    """y[b, oy, ox, c R + r] = bias[c R + r] + sum_{ky, kx} x[b, iy, ix, c] w[ky, kx, c, r].

    x (B, H, W, C), w (KH, KW, C, R), bias (C R,), y (B, OH, OW, C R), rectified if `relu`.
    """

    channels = "same"
    required = "x (B, H, W, C), w (KH, KW, C, R), bias (C R,), not empty"
    input_grad = staticmethod(depthwise.depthwise2d_input_grad)
    weight_grad = staticmethod(depthwise.depthwise2d_weight_grad)
    weight_axis = 2
    variants = {
        "numba": depthwise.depthwise2d,
        "reference": lambda x, w, b, win, relu: _plain(reference.depthwise2d(x, w, b, win), relu),
    }
    samples = staticmethod(
        lambda: [
            *(
                Sample(DepthwiseConv2d(**g), ((2, 5, 4, 3), (3, 2, 3, 1), (3,)))
                for g in _GEOMETRIES
            ),
            Sample(DepthwiseConv2d(), ((1, 4, 4, 2), (3, 3, 2, 2), (4,))),
        ]
    )

    @staticmethod
    def _results(w: Array) -> int:
        return w.shape[2] * w.shape[3]


@dataclass(frozen=True)
class ConvTranspose2d(Op):
    """The transposed convolution: the gradient by the input of a convolution of these windows.

    y[b, iy, ix, n] = bias[n] + sum x[b, oy, ox, c] w[ky, kx, c, n] over all taps with
    iy = oy s - p + ky. x (B, OH, OW, C), w (KH, KW, C, N), bias (N,); y (B, H, W, N), where H, W is
    `output`, or the stride times the input if that is (0, 0), as in Çallı 2017, section 2.1.3.
    """

    stride: Pair = (1, 1)
    padding: Padding = "same"
    output: Pair = (0, 0)
    relu: bool = False

    selective = True
    channels = "mix"
    variants = {
        "numba": deconv.conv2d_transpose,
        "reference": lambda x, w, b, shape, win, relu: _plain(
            _biased(reference.conv2d_input_grad(x, w.transpose(0, 1, 3, 2), shape, win), b), relu
        ),
    }
    samples = staticmethod(
        lambda: [
            Sample(ConvTranspose2d(), ((2, 3, 4, 3), (3, 3, 3, 2), (2,))),
            Sample(ConvTranspose2d((2, 2)), ((2, 3, 2, 3), (3, 3, 3, 2), (2,))),
            Sample(ConvTranspose2d((2, 2), output=(5, 4)), ((1, 3, 2, 2), (3, 3, 2, 3), (3,))),
        ]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        x, w = arrays[:2]
        bias = arrays[2] if len(arrays) > 2 else None
        if not (
            x.ndim == 4
            and w.ndim == 4
            and x.shape[3] == w.shape[2]
            and x.size
            and w.size
            and (bias is None or bias.shape == w.shape[3:])
        ):
            raise self.reject("x (B, H, W, C), w (KH, KW, C, N), bias (N,), not empty", *arrays)
        shape, win = self._geometry(x, w)
        y = self.kernel()(x, w, bias, shape, win, self.relu)
        return y, (x, w, y if self.relu else None)

    def backward(
        self, grad: Array, saved: Saved, needs: tuple[bool, ...] = (True, True, True)
    ) -> tuple[Array | None, ...]:
        x, w, y = saved
        _, win = self._geometry(x, w)
        grad = _rectified(grad, y)
        grads = (
            deconv.conv2d_transpose_input_grad(grad, w, win) if needs[0] else None,
            deconv.conv2d_transpose_weight_grad(grad, x, win) if needs[1] else None,
            sums(grad) if len(needs) > 2 and needs[2] else None,
        )
        return grads[: len(needs)]

    def _geometry(self, x: Array, w: Array) -> tuple[Shape, Window]:
        height, width = (n or x.shape[i + 1] * self.stride[i] for i, n in enumerate(self.output))
        try:
            win = fitting(height, width, w.shape[:2], self.stride, self.padding)
        except ValueError:
            raise self.reject(f"a kernel that fits in {height} x {width}", x, w) from None
        if win.output(height, width) != x.shape[1:3]:
            raise self.reject(f"an input of {win.output(height, width)} windows", x, w)
        return (len(x), height, width, w.shape[3]), win

    def macs(self, *shapes: Shape) -> int:
        x, w = shapes[:2]
        return x[0] * x[1] * x[2] * math.prod(w)


def _plain(y: Array, relu: bool) -> Array:
    return reference.relu(y) if relu else y


def _biased(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias


def _rectified(grad: Array, y: Array | None) -> Array:
    """The gradient before the ReLU that was applied in the same pass, if any."""
    return np.ascontiguousarray(grad) if y is None else relu_grad(np.ascontiguousarray(grad), y)


def pair(op: str, name: str, value: int | Pair, least: int = 1) -> Pair:
    """(rows, columns) from one whole number or two, none below `least`."""
    try:
        rows, columns = map(whole, (value, value) if is_number(value) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        rows = columns = least - 1
    if min(rows, columns) < least:
        raise ConfigError(
            f"{op}: required {name} >= {least}, one whole number or two; came {value!r}"
        )
    return rows, columns


def padded(op: str, value: Any) -> Padding:
    """A padding as the ops take it, from "same", "valid", a number or two pairs of numbers."""
    if isinstance(value, str) and value in ("same", "valid"):
        return value  # type: ignore[return-value]
    try:
        (top, bottom), (left, right) = [(value, value)] * 2 if is_number(value) else value
        sides = ((whole(top), whole(bottom)), (whole(left), whole(right)))
    except (TypeError, ValueError):
        sides = ((-1, -1), (-1, -1))
    if min(min(s) for s in sides) < 0:
        raise ConfigError(
            f"{op}: padding is 'same', 'valid', a whole number >= 0 or two pairs of them; came "
            f"{value!r}"
        )
    return sides


def conv2d(
    x: Operand,
    w: Operand,
    bias: Operand | None = None,
    *,
    stride: int | Pair = 1,
    padding: Any = "same",
    dilation: int | Pair = 1,
    relu: bool = False,
) -> Tensor:
    """Convolution of x (B, H, W, C) with w (KH, KW, C, N) and bias (N,), rectified if `relu`."""
    return _slide(Conv2d, x, w, bias, stride, padding, dilation, relu)


def depthwise_conv2d(
    x: Operand,
    w: Operand,
    bias: Operand | None = None,
    *,
    stride: int | Pair = 1,
    padding: Any = "same",
    dilation: int | Pair = 1,
    relu: bool = False,
) -> Tensor:
    """Each channel of x (B, H, W, C) with its own kernels w (KH, KW, C, R); bias (C R,)."""
    return _slide(DepthwiseConv2d, x, w, bias, stride, padding, dilation, relu)


def _slide(
    kind: type[_Windowed],
    x: Operand,
    w: Operand,
    bias: Operand | None,
    stride: int | Pair,
    padding: Any,
    dilation: int | Pair,
    relu: bool,
) -> Tensor:
    op = kind(
        pair(kind.name, "stride", stride),
        padded(kind.name, padding),
        pair(kind.name, "dilation", dilation),
        relu,
    )
    return apply(op, tensor(x), tensor(w), *(() if bias is None else (tensor(bias),)))


def conv_transpose2d(
    x: Operand,
    w: Operand,
    bias: Operand | None = None,
    *,
    stride: int | Pair = 1,
    padding: Any = "same",
    output: int | Pair = (0, 0),
    relu: bool = False,
) -> Tensor:
    """Transposed convolution of x (B, H, W, C) with w (KH, KW, C, N), to `output` rows, columns."""
    name = "conv_transpose2d"
    op = ConvTranspose2d(
        pair(name, "stride", stride), padded(name, padding), pair(name, "output", output, 0), relu
    )
    return apply(op, tensor(x), tensor(w), *(() if bias is None else (tensor(bias),)))
