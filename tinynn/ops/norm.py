"""Batch normalisation: over the batch in training, with running statistics in use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels import batchnorm as kernels
from kernels import reference
from kernels.elementwise import relu_grad
from tinynn.op import Array, Op, Sample, Saved
from tinynn.ops._common import Operand, tensor
from tinynn.tensor import Tensor, apply, run

_SCALE_SHIFT: dict[str, Callable[..., Array]] = {
    "numba": kernels.scale_shift,
    "reference": lambda x, scale, shift, relu: (
        reference.relu(x * scale + shift) if relu else x * scale + shift
    ),
}


@dataclass(frozen=True)
class BatchNorm(Op):
    """y = gamma (x - mean) / sqrt(var + eps) + beta, by the mean and variance of the batch itself.

    x (..., C), gamma and beta (C,); statistics over all axes but the last; y rectified if `relu`.
    Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1.
    """

    eps: float = 1e-5
    relu: bool = False

    channels = "same"
    variants = {
        "numba": kernels.batchnorm,
        "reference": reference.batchnorm,
    }
    samples = staticmethod(
        lambda: [
            Sample(BatchNorm(), ((6, 3), (3,), (3,))),
            Sample(BatchNorm(relu=True), ((2, 3, 2, 3), (3,), (3,))),
        ]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        x, gamma, beta = arrays
        _require(self, x, gamma, beta)
        rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
        y, mean, var = self.kernel()(rows, gamma, beta, self.eps, self.relu)
        return y.reshape(x.shape), (rows, beta if self.relu else None, gamma, mean, var)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        rows, beta, gamma, mean, var = saved
        flat = np.ascontiguousarray(grad).reshape(rows.shape)
        gx, ggamma, gbeta = kernels.batchnorm_grad(flat, rows, beta, gamma, mean, var, self.eps)
        return gx.reshape(grad.shape), ggamma, gbeta


@dataclass(frozen=True)
class BatchNormEval(Op):
    """y = gamma (x - mean) / sqrt(var + eps) + beta, by a mean and a variance that are given.

    x (..., C), gamma, beta, mean and variance (C,); y rectified if `relu`. Ioffe & Szegedy 2015,
    algorithm 2: one factor and one summand a channel.
    """

    eps: float = 1e-5
    relu: bool = False

    selective = True
    channels = "same"
    variants = _SCALE_SHIFT
    samples = staticmethod(
        lambda: [
            Sample(BatchNormEval(), ((6, 3), (3,), (3,), (3,), (3,)), low=0.5),
            Sample(BatchNormEval(relu=True), ((2, 3, 2, 3), (3,), (3,), (3,), (3,)), low=0.5),
        ]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        x, gamma, beta, mean, variance = arrays
        _require(self, x, gamma, beta, mean, variance)
        inverse = (1 / np.sqrt(variance + gamma.dtype.type(self.eps))).astype(gamma.dtype)
        scale = gamma * inverse
        y = self.kernel()(np.ascontiguousarray(x), scale, beta - mean * scale, self.relu)
        return y, (x, gamma, mean, inverse, y if self.relu else None)

    def backward(
        self, grad: Array, saved: Saved, needs: tuple[bool, ...] = (True,) * 5
    ) -> tuple[Array | None, ...]:
        x, gamma, mean, inverse, y = saved
        g = np.ascontiguousarray(grad) if y is None else relu_grad(np.ascontiguousarray(grad), y)
        axes, scale = tuple(range(g.ndim - 1)), gamma * inverse
        total = g.sum(axis=axes, dtype=g.dtype)
        deviation = None
        if needs[1] or needs[4]:
            deviation = (g * (x - mean)).sum(axis=axes, dtype=g.dtype) * inverse
        return (
            g * scale if needs[0] else None,
            deviation if needs[1] else None,
            total if needs[2] else None,
            -total * scale if needs[3] else None,
            -0.5 * deviation * scale * inverse if needs[4] and deviation is not None else None,
        )


@dataclass(frozen=True)
class ScaleShift(Op):
    """y = x scale + shift, one factor and one summand a channel; rectified if `relu`.

    x (..., C), scale and shift (C,).
    """

    relu: bool = False

    channels = "same"
    variants = _SCALE_SHIFT
    samples = staticmethod(
        lambda: [
            Sample(ScaleShift(), ((6, 3), (3,), (3,))),
            Sample(ScaleShift(relu=True), ((2, 3, 2, 3), (3,), (3,))),
        ]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        x, scale, shift = arrays
        _require(self, x, scale, shift)
        y = self.kernel()(np.ascontiguousarray(x), scale, shift, self.relu)
        return y, (x, scale, y if self.relu else None)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        x, scale, y = saved
        g = np.ascontiguousarray(grad) if y is None else relu_grad(np.ascontiguousarray(grad), y)
        axes = tuple(range(g.ndim - 1))
        return g * scale, (g * x).sum(axis=axes, dtype=g.dtype), g.sum(axis=axes, dtype=g.dtype)


def batchnorm(
    x: Operand, gamma: Operand, beta: Operand, *, eps: float = 1e-5, relu: bool = False
) -> tuple[Tensor, Array, Array]:
    """x (..., C) normalised by the batch's own mean and (biased) variance, and those two (C,)."""
    y, saved = run(BatchNorm(eps, relu), tensor(x), tensor(gamma), tensor(beta))
    return y, saved[3], saved[4]


def scale_shift(x: Operand, scale: Operand, shift: Operand, *, relu: bool = False) -> Tensor:
    """x (..., C) times scale (C,) plus shift (C,)."""
    return apply(ScaleShift(relu), tensor(x), tensor(scale), tensor(shift))


def batchnorm_eval(
    x: Operand,
    gamma: Operand,
    beta: Operand,
    mean: Array,
    variance: Array,
    *,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    """x (..., C) normalised by a given mean and variance (C,), as batch normalisation in use.

    The two arrays are not copied: a trace finds the module's buffers in them.
    """
    given = (Tensor(mean, copy=False), Tensor(variance, copy=False))
    return apply(BatchNormEval(eps, relu), tensor(x), tensor(gamma), tensor(beta), *given)


def _require(op: Op, x: Array, *vectors: Array) -> None:
    if x.ndim < 2 or not x.size or any(v.shape != x.shape[-1:] for v in vectors):
        raise op.reject("x (..., C), not empty, and vectors (C,)", x, *vectors)
