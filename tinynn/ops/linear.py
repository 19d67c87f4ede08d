"""Matrix products: `matmul`, and `linear` with its bias and ReLU in the same pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kernels import pointwise, reference
from tinynn.op import Array, Op, Sample, Saved, Shape
from tinynn.ops._common import Operand, tensor
from tinynn.tensor import Tensor, apply


@dataclass(frozen=True)
class Matmul(Op):
    """(..., M, K) @ (K, N) or (..., K, N) with equal leading axes -> (..., M, N)."""

    selective = True
    channels = "mix"
    variants = {"numba": pointwise.matmul, "reference": reference.matmul}
    samples = staticmethod(
        lambda: [
            Sample(Matmul(), ((3, 4), (4, 5))),
            Sample(Matmul(), ((1, 7), (7, 1))),
            Sample(Matmul(), ((2, 3, 4), (4, 2))),
            Sample(Matmul(), ((2, 2, 3, 2), (2, 2, 2, 3))),
        ]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        a, b = arrays
        fits = a.ndim >= 2 and b.ndim >= 2 and a.shape[-1] == b.shape[-2]
        if not fits or (b.ndim > 2 and a.shape[:-2] != b.shape[:-2]) or not (a.size and b.size):
            raise self.reject("(..., M, K) and (K, N) or (..., K, N), not empty", a, b)
        return self._product(a, b), (a, b)

    def backward(
        self, grad: Array, saved: Saved, needs: tuple[bool, ...] = (True, True)
    ) -> tuple[Array | None, ...]:
        a, b = saved
        ga = self._product(grad, np.swapaxes(b, -1, -2)) if needs[0] else None
        if not needs[1]:
            return ga, None
        if b.ndim == 2:  # one matrix for all: their gradients add up
            a, grad = a.reshape(-1, a.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return ga, self._product(np.swapaxes(a, -1, -2), grad)

    def _product(self, a: Array, b: Array) -> Array:
        multiply, shape = self.kernel(), (*a.shape[:-1], b.shape[-1])
        if b.ndim == 2:
            return multiply(a.reshape(-1, a.shape[-1]), b).reshape(shape)
        pairs = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
        return np.stack([multiply(x, y) for x, y in pairs]).reshape(shape)

    def macs(self, *shapes: Shape) -> int:
        a, b = shapes
        return math.prod(a) * b[-1]


@dataclass(frozen=True)
class Linear(Op):
    """y = x @ w + bias, then max(y, 0) if `relu`; x (M, K), w (K, N), bias (N,), y (M, N)."""

    relu: bool = False

    selective = True
    channels = "mix"
    variants = {"numba": pointwise.linear, "reference": reference.linear}
    gradients = {"numba": pointwise.linear_grad, "reference": reference.linear_grad}
    samples = staticmethod(
        lambda: [
            Sample(Linear(relu), ((m, k), (k, n), (n,)))
            for relu in (False, True)
            for m, k, n in ((5, 2, 7), (5, 7, 1), (4, 6, 5), (1, 1, 1))
        ]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        x, w = arrays[:2]
        bias = arrays[2] if len(arrays) > 2 else None
        if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
            raise self.reject("x (M, K), w (K, N), bias (N,)", *arrays)
        if bias is not None and bias.shape != w.shape[1:]:
            raise self.reject("x (M, K), w (K, N), bias (N,)", *arrays)
        if not x.size:
            raise self.reject("at least one row and one column in x", *arrays)
        y = self.kernel()(x, w, bias, self.relu)
        return y, (x, w, y if self.relu else None)

    def backward(
        self, grad: Array, saved: Saved, needs: tuple[bool, ...] = (True, True, True)
    ) -> tuple[Array | None, ...]:
        x, w, y = saved
        wanted = (needs[0], needs[1], len(needs) > 2 and needs[2])
        grads = self.gradient_kernel()(np.ascontiguousarray(grad), x, w, y, self.relu, wanted)
        return grads[: len(needs)]

    def macs(self, *shapes: Shape) -> int:
        (m, k), (_, n) = shapes[:2]
        return m * k * n


def matmul(a: Operand, b: Operand) -> Tensor:
    """The product of (..., M, K) and (K, N), or (..., K, N) with equal leading axes."""
    return apply(Matmul(), tensor(a), tensor(b))


def linear(x: Operand, w: Operand, bias: Operand | None = None, *, relu: bool = False) -> Tensor:
    """x @ w + bias, rectified if `relu`: x (M, K), w (K, N), bias (N,) or None -> (M, N)."""
    operands = (tensor(x), tensor(w)) + (() if bias is None else (tensor(bias),))
    return apply(Linear(relu), *operands)
