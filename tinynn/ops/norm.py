"""Batch normalisation: over the batch in training, with running statistics in use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels import batchnorm as kernels
from kernels import reference
from tinynn.op import Array, Op, Sample, Saved
from tinynn.ops._common import Operand, tensor
from tinynn.tensor import Tensor, apply


@dataclass(frozen=True)
class BatchNorm(Op):
    """y = gamma (x - mean) / sqrt(var + eps) + beta over all axes but the last, in training.

    x (..., C), gamma and beta (C,); rectified if `relu`. The result has mean and variance (biased)
    of the batch as two more rows for whoever keeps running statistics: see `batchnorm`.
    Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1.
    """

    eps: float = 1e-5
    relu: bool = False

    channels = "same"
    variants = {"numba": kernels.batchnorm, "reference": reference.batchnorm}
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
        return y.reshape(x.shape), (rows, y if self.relu else None, gamma, mean, var)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        rows, y, gamma, mean, var = saved
        flat = np.ascontiguousarray(grad).reshape(rows.shape)
        gx, ggamma, gbeta = kernels.batchnorm_grad(flat, rows, y, gamma, mean, var, self.eps)
        return gx.reshape(grad.shape), ggamma, gbeta


def _require(op: Op, x: Array, *vectors: Array) -> None:
    if x.ndim < 2 or not x.size or any(v.shape != x.shape[-1:] for v in vectors):
        raise op.reject("x (..., C), not empty, and vectors (C,)", x, *vectors)


def batchnorm(
    x: Operand, gamma: Operand, beta: Operand, *, eps: float = 1e-5, relu: bool = False
) -> Tensor:
    """x (..., C) normalised by its own mean and variance over all axes but the last."""
    return apply(BatchNorm(eps, relu), tensor(x), tensor(gamma), tensor(beta))
