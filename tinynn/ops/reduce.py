"""Ops that fold axes away: sum and max are declared, mean and variance derived from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kernels import reference
from tinynn.errors import ShapeError
from tinynn.op import Array, ChannelRule, Op, Sample, Saved, Shape
from tinynn.ops._common import Axis, Operand, normal_axes, tensor
from tinynn.ops.elementwise import mul, sub
from tinynn.tensor import Tensor, apply


def _kept(shape: Shape, axes: tuple[int, ...]) -> Shape:
    return tuple(1 if i in axes else n for i, n in enumerate(shape))


class _Reduction(Op):
    """An op that folds `axes` away."""

    axes: tuple[int, ...]
    channels = "end"

    def rule(self, *shapes: Shape) -> ChannelRule | None:
        """Channels stay what they are unless they themselves are folded away."""
        return self.channels if len(shapes[0]) - 1 in self.axes else "same"


@dataclass(frozen=True)
class Sum(_Reduction):
    """The sum over `axes`."""

    axes: tuple[int, ...] = (0,)
    keepdims: bool = False

    variants = {
        "numpy": lambda x, axes, keepdims: np.asarray(
            x.sum(axis=axes, keepdims=keepdims, dtype=x.dtype)
        ),
        "reference": reference.reduce_sum,
    }
    samples = staticmethod(
        lambda: [Sample(Sum((0,)), ((3, 4),)), Sample(Sum((1, 2), keepdims=True), ((2, 3, 4),))]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        (x,) = arrays
        return self.kernel()(x, self.axes, self.keepdims), (x.shape,)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        (shape,) = saved
        return (np.broadcast_to(grad.reshape(_kept(shape, self.axes)), shape),)


@dataclass(frozen=True)
class Max(_Reduction):
    """The maximum over `axes`; tied maxima share the gradient equally."""

    axes: tuple[int, ...] = (0,)
    keepdims: bool = False

    variants = {
        "numpy": lambda x, axes, keepdims: np.asarray(x.max(axis=axes, keepdims=keepdims)),
        "reference": reference.reduce_max,
    }
    samples = staticmethod(
        lambda: [Sample(Max((0,)), ((3, 4),)), Sample(Max((0, 2), keepdims=True), ((2, 3, 4),))]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        (x,) = arrays
        if any(x.shape[a] == 0 for a in self.axes):
            raise self.reject("axes with at least one element", x)
        y = self.kernel()(x, self.axes, self.keepdims)
        return y, (x, y)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        x, y = saved
        kept = _kept(x.shape, self.axes)
        hit = x == y.reshape(kept)
        shares = hit.sum(axis=self.axes, keepdims=True).astype(x.dtype)
        with np.errstate(all="ignore"):  # no hit at all: the maximum is NaN, and so are the shares
            return (hit * (grad.reshape(kept) / shares),)


def sum(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The sum over `axis` (all axes by default)."""
    x = tensor(x)
    return apply(Sum(normal_axes("sum", axis, x.shape), keepdims), x)


def max(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The maximum over `axis` (all axes by default)."""
    x = tensor(x)
    return apply(Max(normal_axes("max", axis, x.shape), keepdims), x)


def mean(x: Operand, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The arithmetic mean over `axis` (all axes by default)."""
    x = tensor(x)
    return mul(sum(x, axis, keepdims), 1.0 / _population("mean", x, axis, 0))


def var(x: Operand, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Tensor:
    """The variance over `axis`: squared deviations summed, over their number less `ddof`."""
    x = tensor(x)
    deviation = sub(x, mean(x, axis, keepdims=True))
    total = sum(mul(deviation, deviation), axis, keepdims)
    return mul(total, 1.0 / _population("var", x, axis, ddof))


def _population(op: str, x: Tensor, axis: Axis, ddof: int) -> int:
    count = math.prod(x.shape[a] for a in normal_axes(op, axis, x.shape))
    if count <= ddof:
        raise ShapeError(f"{op}: required more than {ddof} elements; came shape {x.shape}")
    return count - ddof
