"""Fake quantisation: numbers rounded to what few bits can hold, in floating arithmetic.

The gradient of rounding is taken for 1, the straight-through estimator (Bengio et al. 2013,
"Estimating or propagating gradients through stochastic neurons"), so that a model can
be trained while it computes with rounded numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from kernels import memory, reference
from tinynn.errors import ConfigError
from tinynn.op import Array, Op, Sample, Saved
from tinynn.ops._common import Operand, tensor, unbroadcast
from tinynn.tensor import Tensor, apply

_HALF = 65504.0  #: the largest float16


def _fake_quantize(x: Array, scale: Array, low: Array, high: Array) -> Array:
    y = memory.empty(x.shape, x.dtype)
    np.divide(x, scale, out=y)
    np.rint(y, out=y)
    np.maximum(y, low, out=y)
    np.minimum(y, high, out=y)
    np.multiply(y, scale, out=y)
    return y


@dataclass(frozen=True)
class FakeQuantize(Op):
    """y = scale min(max(round(x / scale), low), high), ties to even.

    `scale` > 0, `low` and `high` broadcast against x; the last two are whole numbers: the grid in
    steps from the number 0, which is always on it. For uint8 with a zero point z they are -z and
    255 - z, for symmetric int8 -127 and 127. The gradient of x is 1 inside the range and 0 outside;
    that of the scale is round(x / scale) - x / scale inside, low and high outside, times `gain`
    (Esser et al. 2020, "Learned step size quantization", section 2.1).

    `dynamic` changes nothing here; where it is not 0, the grid was found from x itself, one of so
    many bits for each image, and whoever reads a traced graph must find it anew.
    """

    gain: float = 1.0
    dynamic: int = 0

    selective = True
    variants = {
        "numpy": _fake_quantize,
        "reference": partial(
            reference.elementwise,
            lambda x, scale, low, high: scale * min(max(round(x / scale), low), high),
        ),
    }
    #: only where everything is cut is the gradient that of the function itself
    samples = staticmethod(
        lambda: [
            Sample(FakeQuantize(), ((3, 4), (1,), (1,), (1,)), low=1.5, high=2),
            Sample(FakeQuantize(), ((2, 3, 4), (1, 1, 4), (4,), (1,)), low=1.5, high=2),
        ]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        x, scale, low, high = arrays
        try:
            fits = np.broadcast_shapes(*(a.shape for a in arrays)) == x.shape
        except ValueError:
            fits = False
        if not fits:
            raise self.reject("scale, low and high that broadcast to x", *arrays)
        if not (scale > 0).all():
            raise ConfigError(f"{self}: required scales > 0; came {scale.min()}")
        return self.kernel()(x, scale, low, high), arrays

    def backward(
        self, grad: Array, saved: Saved, needs: tuple[bool, ...] = (True,) * 4
    ) -> tuple[Array | None, ...]:
        x, scale, low, high = saved
        ratio = x / scale
        n = np.rint(ratio)
        above = np.maximum(n, low) > high
        below = (n < low) & ~above
        found: list[Array | None] = [None] * 4
        if needs[0]:
            found[0] = grad * ~(above | below)
        if needs[1]:
            slope = np.where(above, high, np.where(below, low, n - ratio))
            found[1] = unbroadcast(grad * slope, scale.shape) * scale.dtype.type(self.gain)
        if needs[2]:
            found[2] = unbroadcast(grad * scale * below, low.shape)
        if needs[3]:
            found[3] = unbroadcast(grad * scale * above, high.shape)
        return tuple(found)


@dataclass(frozen=True)
class RoundToHalf(Op):
    """The nearest float16, ties to even; beyond +-65504 that number. The gradient there is 0."""

    variants = {
        "numpy": lambda x: np.clip(x, -_HALF, _HALF).astype(np.float16).astype(x.dtype),
        "reference": partial(
            reference.elementwise, lambda x: float(np.float16(min(max(x, -_HALF), _HALF)))
        ),
    }
    samples = staticmethod(lambda: [Sample(RoundToHalf(), ((3, 4),), low=7e4, high=8e4)])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        return np.asarray(self.kernel()(*arrays)), arrays

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (grad * (np.abs(saved[0]) <= _HALF),)


def fake_quantize(
    x: Operand,
    scale: Operand,
    low: Operand,
    high: Operand,
    *,
    gain: float = 1.0,
    dynamic: int = 0,
) -> Tensor:
    """x rounded to scale times a whole number in low ... high: see `FakeQuantize`."""
    op = FakeQuantize(gain, dynamic)
    return apply(op, tensor(x), tensor(scale), tensor(low), tensor(high))


def round_to_half(x: Operand) -> Tensor:
    """x rounded to what float16 can hold."""
    return apply(RoundToHalf(), tensor(x))
