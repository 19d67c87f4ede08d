"""Pools over images (B, H, W, C): maximum, average, and the average over everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernels import pool, reference
from kernels.geometry import Padding, Pair, Window
from tinynn.op import Array, Op, Sample, Saved
from tinynn.ops._common import Operand, fitting, tensor
from tinynn.ops.conv import padded, pair
from tinynn.ops.reduce import mean
from tinynn.tensor import Tensor, apply


class _Pool(Op):
    """An op that slides a window over each channel of an image."""

    kernel_size: Pair
    stride: Pair
    padding: Padding

    channels = "same"

    def _window(self, x: Array) -> Window:
        if x.ndim != 4 or not x.size:
            raise self.reject("images (B, H, W, C), not empty", x)
        try:
            win = fitting(*x.shape[1:3], self.kernel_size, self.stride, self.padding)
        except ValueError:
            raise self.reject("an image that the window fits in", x) from None
        if any(max(side) >= k for side, k in zip(win.padding, self.kernel_size, strict=True)):
            raise self.reject("less padding than the window, else one sees no pixel at all", x)
        return win


_GEOMETRIES: tuple[tuple[Any, ...], ...] = (
    ((2, 2), (2, 2), "valid"),
    ((3, 3), (2, 2), "same"),
    ((3, 2), (1, 2), ((1, 0), (0, 1))),
)


@dataclass(frozen=True)
class MaxPool2d(_Pool):
    """The largest value under each window; padding is never it. Ties go to the first tap."""

    kernel_size: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Padding = "valid"

    variants = {"numba": pool.max_pool2d, "reference": reference.max_pool2d}
    samples = staticmethod(lambda: [Sample(MaxPool2d(*g), ((2, 5, 4, 3),)) for g in _GEOMETRIES])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        (x,) = arrays
        win = self._window(x)
        y, place = self.kernel()(x, win)
        return y, (place, x.shape, win)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        place, shape, win = saved
        return (pool.max_pool2d_grad(grad, place, shape, win),)


@dataclass(frozen=True)
class AvgPool2d(_Pool):
    """The mean of the values under each window; padding does not count."""

    kernel_size: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Padding = "valid"

    variants = {"numba": pool.avg_pool2d, "reference": reference.avg_pool2d}
    samples = staticmethod(lambda: [Sample(AvgPool2d(*g), ((2, 5, 4, 3),)) for g in _GEOMETRIES])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        (x,) = arrays
        win = self._window(x)
        return self.kernel()(x, win), (x.shape, win)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        shape, win = saved
        return (pool.avg_pool2d_grad(grad, shape, win),)


def max_pool2d(
    x: Operand, size: int | Pair = 2, *, stride: int | Pair | None = None, padding: Any = "valid"
) -> Tensor:
    """The maximum of each window of x (B, H, W, C); the stride is the window's size by default."""
    return apply(MaxPool2d(*_geometry("max_pool2d", size, stride, padding)), tensor(x))


def avg_pool2d(
    x: Operand, size: int | Pair = 2, *, stride: int | Pair | None = None, padding: Any = "valid"
) -> Tensor:
    """The mean of each window of x (B, H, W, C), over the part of it inside the image."""
    return apply(AvgPool2d(*_geometry("avg_pool2d", size, stride, padding)), tensor(x))


def global_avg_pool2d(x: Operand) -> Tensor:
    """The mean over rows and columns: (B, H, W, C) to (B, C)."""
    return mean(x, (1, 2))


def _geometry(
    op: str, size: int | Pair, stride: int | Pair | None, padding: Any
) -> tuple[Pair, Pair, Padding]:
    kernel = pair(op, "size", size)
    return kernel, pair(op, "stride", kernel if stride is None else stride), padded(op, padding)
