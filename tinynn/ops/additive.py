"""Products and convolutions by the multiplication-free ef-operator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kernels import additive, reference_compressed
from kernels.geometry import Padding, Pair, Window, window
from tinynn.op import Array, Op, Sample, Saved, Shape
from tinynn.ops._common import Operand, tensor
from tinynn.ops.conv import padded, pair
from tinynn.tensor import Tensor, apply


@dataclass(frozen=True)
class Additive(Op):
    """y[m, n] = sum_k sign(x[m, k] w[k, n]) (|x[m, k]| + |w[k, n]|); x (M, K), w (K, N).

    Its jumps at zero have no gradient and are left out of it, as in Afrasiyabi et al. 2017.
    """

    selective = True
    channels = "mix"
    variants = {"numba": additive.linear, "reference": reference_compressed.additive_linear}
    gradients = {
        "numba": additive.linear_grad,
        "reference": reference_compressed.additive_linear_grad,
    }
    samples = staticmethod(
        lambda: [
            Sample(Additive(), ((5, 7), (7, 6))),
            Sample(Additive(), ((3, 2), (2, 9))),
            Sample(Additive(), ((1, 1), (1, 1))),
        ]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        x, w = arrays
        if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0] or not (x.size and w.size):
            raise self.reject("x (M, K) and w (K, N), not empty", x, w)
        return self.kernel()(x, w), (x, w)

    def backward(
        self, grad: Array, saved: Saved, needs: tuple[bool, ...] = (True, True)
    ) -> tuple[Array | None, ...]:
        return self.gradient_kernel()(np.ascontiguousarray(grad), *saved, needs)

    def macs(self, *shapes: Shape) -> int:
        (m, k), (_, n) = shapes
        return 2 * m * k * n


@dataclass(frozen=True)
class AdditiveConv2d(Op):
    """The ef-operator of windows of x (B, H, W, C) and w (KH, KW, C, N) -> (B, OH, OW, N)."""

    stride: Pair = (1, 1)
    padding: Padding = "same"
    dilation: Pair = (1, 1)

    selective = True
    channels = "mix"
    variants = {"numba": additive.conv2d, "reference": reference_compressed.additive_conv2d}
    gradients = {
        "numba": additive.conv2d_grad,
        "reference": reference_compressed.additive_conv2d_grad,
    }
    samples = staticmethod(
        lambda: [
            Sample(AdditiveConv2d(), ((2, 4, 3, 3), (3, 2, 3, 2))),
            Sample(AdditiveConv2d((2, 2), "valid"), ((1, 5, 4, 2), (3, 3, 2, 3))),
        ]
    )

    def _window(self, x: Array, w: Array) -> Window:
        win = window(x.shape[1], x.shape[2], w.shape[:2], self.stride, self.padding, self.dilation)
        try:
            win.output(x.shape[1], x.shape[2])
        except ValueError:
            raise self.reject("an image that the kernel fits in", x, w) from None
        return win

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        x, w = arrays
        if x.ndim != 4 or w.ndim != 4 or x.shape[3] != w.shape[2] or not (x.size and w.size):
            raise self.reject("x (B, H, W, C) and w (KH, KW, C, N), not empty", x, w)
        return self.kernel()(x, w, self._window(x, w)), (x, w)

    def backward(
        self, grad: Array, saved: Saved, needs: tuple[bool, ...] = (True, True)
    ) -> tuple[Array | None, ...]:
        x, w = saved
        return self.gradient_kernel()(np.ascontiguousarray(grad), x, w, self._window(x, w), needs)

    def macs(self, *shapes: Shape) -> int:
        x, w = shapes
        win = window(x[1], x[2], (w[0], w[1]), self.stride, self.padding, self.dilation)
        return 2 * x[0] * math.prod(w) * math.prod(win.output(x[1], x[2]))


def additive_linear(x: Operand, w: Operand) -> Tensor:
    """The ef-operator of x (M, K) and w (K, N) -> (M, N)."""
    return apply(Additive(), tensor(x), tensor(w))


def additive_conv2d(
    x: Operand,
    w: Operand,
    *,
    stride: int | Pair = 1,
    padding: Padding | int = "same",
    dilation: int | Pair = 1,
) -> Tensor:
    """The ef-operator of windows of x (B, H, W, C) and w (KH, KW, C, N) -> (B, OH, OW, N)."""
    name = "additive_conv2d"
    op = AdditiveConv2d(
        pair(name, "stride", stride), padded(name, padding), pair(name, "dilation", dilation)
    )
    return apply(op, tensor(x), tensor(w))
