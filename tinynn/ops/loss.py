"""Losses, and the softmax that the classification loss stands on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels import loss as kernels
from kernels import reference
from tinynn.errors import ConfigError, DataError
from tinynn.op import Array, Op, Sample, Saved
from tinynn.ops._common import Operand, integers, normal_axes, tensor
from tinynn.tensor import Tensor, apply


@dataclass(frozen=True)
class _Normalised(Op):
    """An op that normalises along `axis`, and whose gradient needs its result only."""

    axis: int = -1

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        if not arrays[0].size:
            raise self.reject("at least one element", *arrays)
        y = self.kernel()(arrays[0], self.axis)
        return y, (y,)


@dataclass(frozen=True)
class Softmax(_Normalised):
    """exp(x_i) / sum_j exp(x_j) along `axis`, shifted by the maximum against overflow."""

    variants = {
        "numpy": lambda x, axis: _softmax(x, axis),
        "reference": reference.softmax,
    }
    samples = staticmethod(lambda: [Sample(Softmax(), ((3, 4),)), Sample(Softmax(0), ((3, 4),))])

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        (y,) = saved
        gy = grad * y
        return (gy - y * gy.sum(axis=self.axis, keepdims=True),)


@dataclass(frozen=True)
class LogSoftmax(_Normalised):
    """x_i - log(sum_j exp(x_j)) along `axis`."""

    variants = {
        "numpy": lambda x, axis: _log_softmax(x, axis),
        "reference": lambda x, axis: reference.elementwise(math.log, reference.softmax(x, axis)),
    }
    samples = staticmethod(lambda: [Sample(LogSoftmax(), ((3, 4),))])

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        (y,) = saved
        return (grad - np.exp(y) * grad.sum(axis=self.axis, keepdims=True),)


class _Regression(Op):
    channels = "end"

    def _check(self, prediction: Array, target: Array) -> None:
        # No broadcasting here: (B, 1) against (B,) would silently compare all with all.
        if prediction.shape != target.shape or not prediction.size:
            raise self.reject("prediction and target of one shape, not empty", prediction, target)


@dataclass(frozen=True)
class Mse(_Regression):
    """mean((prediction - target) ** 2) over all elements."""

    variants = {"numba": kernels.mse, "reference": reference.mse}
    gradients = {"numba": kernels.mse_grad, "reference": reference.mse_grad}
    samples = staticmethod(lambda: [Sample(Mse(), ((5, 3), (5, 3)))])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        self._check(*arrays)
        return _number(self.kernel()(*arrays), arrays[0]), arrays

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        prediction, target = saved
        g = self.gradient_kernel()(prediction, target, float(grad))
        return g, -g


@dataclass(frozen=True)
class Rmse(_Regression):
    """sqrt(mean((prediction - target) ** 2) + eps): eps keeps the gradient finite at zero loss."""

    eps: float = 1e-12

    variants = {
        "numba": lambda p, t, eps: math.sqrt(kernels.mse(p, t) + eps),
        "reference": lambda p, t, eps: math.sqrt(reference.mse(p, t) + eps),
    }
    gradients = {"numba": kernels.mse_grad, "reference": reference.mse_grad}
    samples = staticmethod(lambda: [Sample(Rmse(), ((5, 3), (5, 3)))])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        self._check(*arrays)
        root = self.kernel()(*arrays, self.eps)
        return _number(root, arrays[0]), (*arrays, root)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        prediction, target, root = saved
        g = self.gradient_kernel()(prediction, target, float(grad) / (2 * root))
        return g, -g


@dataclass(frozen=True)
class SoftmaxCrossEntropy(Op):
    """Mean over rows of -sum_c q_c log softmax(logits)_c.

    q puts 1 - smoothing + smoothing / C on the label and smoothing / C on the other classes
    (Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7).
    """

    smoothing: float = 0.0

    channels = "end"
    integers = True
    variants = {
        "numba": kernels.softmax_cross_entropy,
        "reference": reference.softmax_cross_entropy,
    }
    gradients = {
        "numba": kernels.softmax_cross_entropy_grad,
        "reference": reference.softmax_cross_entropy_grad,
    }
    samples = staticmethod(
        lambda: [Sample(SoftmaxCrossEntropy(s), ((6, 4), (6,)), labels=4) for s in (0.0, 0.1)]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        logits, labels = arrays
        if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.size:
            raise self.reject("logits (B, C) and labels (B,), not empty", logits, labels)
        wrong = (labels < 0) | (labels >= logits.shape[1])
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"{self}: required labels in [0, {logits.shape[1]}); came {labels[row]} in row "
                f"{row} ({int(wrong.sum())} of {len(labels)} are out of range)"
            )
        value, softmax = self.kernel()(logits, labels, self.smoothing)
        return _number(value, logits), (softmax, labels)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        softmax, labels = saved
        return kernels.softmax_cross_entropy_grad(
            softmax, labels, self.smoothing, float(grad)
        ), None


def _number(value: float, like: Array) -> Array:
    """A loss in the dtype of its operand; one too large for it is infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(value, like.dtype)


def _softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _log_softmax(x: Array, axis: int) -> Array:
    shifted = x - x.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def softmax(x: Operand, axis: int = -1) -> Tensor:
    """exp(x) over its sum along `axis`."""
    x = tensor(x)
    return apply(Softmax(*normal_axes("softmax", axis, x.shape)), x)


def log_softmax(x: Operand, axis: int = -1) -> Tensor:
    """The logarithm of softmax(x), computed without underflow."""
    x = tensor(x)
    return apply(LogSoftmax(*normal_axes("log_softmax", axis, x.shape)), x)


def mse(prediction: Operand, target: Operand) -> Tensor:
    """Mean squared error over all elements; both operands of one shape."""
    return apply(Mse(), tensor(prediction), tensor(target))


def rmse(prediction: Operand, target: Operand, *, eps: float = 1e-12) -> Tensor:
    """Root of the mean squared error plus eps; both operands of one shape."""
    if not 0 < eps < math.inf:
        raise ConfigError(f"rmse: required eps > 0, else zero loss has no gradient; came {eps}")
    return apply(Rmse(eps), tensor(prediction), tensor(target))


def softmax_cross_entropy(
    logits: Operand, labels: npt.ArrayLike | Tensor, *, smoothing: float = 0.0
) -> Tensor:
    """Mean cross entropy of logits (B, C) against class numbers (B,), with label smoothing."""
    if not 0 <= smoothing < 1:
        raise ConfigError(f"softmax_cross_entropy: required 0 <= smoothing < 1; came {smoothing}")
    name = "softmax_cross_entropy"
    return apply(SoftmaxCrossEntropy(smoothing), tensor(logits), integers(name, labels))
