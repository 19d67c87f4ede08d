"""Ops that treat every element alike, with NumPy's broadcasting: arithmetic and nonlinearities."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import partial

import numpy as np

from kernels import elementwise, reference
from tinynn.op import Array, Op, Sample, Saved
from tinynn.ops._common import Operand, is_number, pair, tensor, unbroadcast
from tinynn.tensor import Tensor, apply


class _Binary(Op):
    """An op on two operands that broadcast against each other."""

    channels = "tie"

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        a, b = arrays
        try:
            np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            raise self.reject("shapes that broadcast", a, b) from None
        return np.asarray(self.kernel()(a, b)), self._keep(a, b)

    def _keep(self, a: Array, b: Array) -> Saved:
        return a, b


_BROADCASTS = (((3, 4), (3, 4)), ((2, 3, 4), (4,)), ((3, 1), (1, 4)), ((), (2, 2)))


@dataclass(frozen=True)
class Add(_Binary):
    """a + b."""

    variants = {"numba": elementwise.add, "reference": partial(reference.elementwise, operator.add)}
    samples = staticmethod(lambda: [Sample(Add(), shapes) for shapes in _BROADCASTS])

    def _keep(self, a: Array, b: Array) -> Saved:
        return a.shape, b.shape  # the values do not matter to the gradient

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return unbroadcast(grad, saved[0]), unbroadcast(grad, saved[1])


@dataclass(frozen=True)
class Sub(_Binary):
    """a - b."""

    variants = {"numba": elementwise.sub, "reference": partial(reference.elementwise, operator.sub)}
    samples = staticmethod(lambda: [Sample(Sub(), shapes) for shapes in _BROADCASTS])

    def _keep(self, a: Array, b: Array) -> Saved:
        return a.shape, b.shape

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return unbroadcast(grad, saved[0]), unbroadcast(-grad, saved[1])


@dataclass(frozen=True)
class Mul(_Binary):
    """a * b."""

    variants = {"numba": elementwise.mul, "reference": partial(reference.elementwise, operator.mul)}
    samples = staticmethod(lambda: [Sample(Mul(), shapes) for shapes in _BROADCASTS])

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        a, b = saved
        return unbroadcast(grad * b, a.shape), unbroadcast(grad * a, b.shape)


@dataclass(frozen=True)
class Div(_Binary):
    """a / b."""

    variants = {
        "numba": elementwise.div,
        "reference": partial(reference.elementwise, operator.truediv),
    }
    samples = staticmethod(lambda: [Sample(Div(), shapes, low=0.5) for shapes in _BROADCASTS])

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        a, b = saved
        return unbroadcast(grad / b, a.shape), unbroadcast(-grad * (a / b) / b, b.shape)


@dataclass(frozen=True)
class Maximum(_Binary):
    """max(a, b) elementwise; at a tie the gradient goes to both in equal parts."""

    variants = {"numpy": np.maximum, "reference": partial(reference.elementwise, max)}
    samples = staticmethod(lambda: [Sample(Maximum(), shapes) for shapes in _BROADCASTS])

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        a, b = saved
        share = ((a > b) + 0.5 * (a == b)).astype(grad.dtype)
        return unbroadcast(grad * share, a.shape), unbroadcast(grad * (1 - share), b.shape)


@dataclass(frozen=True)
class Minimum(_Binary):
    """min(a, b) elementwise; at a tie the gradient goes to both in equal parts."""

    variants = {"numpy": np.minimum, "reference": partial(reference.elementwise, min)}
    samples = staticmethod(lambda: [Sample(Minimum(), shapes) for shapes in _BROADCASTS])

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        a, b = saved
        share = ((a < b) + 0.5 * (a == b)).astype(grad.dtype)
        return unbroadcast(grad * share, a.shape), unbroadcast(grad * (1 - share), b.shape)


class _Unary(Op):
    """An op on one operand, whose gradient follows from its result alone unless it says more."""

    channels = "same"

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        y = np.asarray(self.kernel()(*arrays))
        return y, (y,)


@dataclass(frozen=True)
class Neg(_Unary):
    """-x."""

    variants = {"numpy": np.negative, "reference": partial(reference.elementwise, operator.neg)}
    samples = staticmethod(lambda: [Sample(Neg(), ((3, 4),))])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        return np.asarray(self.kernel()(*arrays)), ()

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (-grad,)


@dataclass(frozen=True)
class Exp(_Unary):
    """e ** x."""

    variants = {"numpy": np.exp, "reference": partial(reference.elementwise, math.exp)}
    samples = staticmethod(lambda: [Sample(Exp(), ((3, 4),))])

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (grad * saved[0],)


@dataclass(frozen=True)
class Log(_Unary):
    """The natural logarithm; NaN below zero and -inf at zero, as IEEE 754 says."""

    variants = {"numpy": np.log, "reference": partial(reference.elementwise, math.log)}
    samples = staticmethod(lambda: [Sample(Log(), ((3, 4),), low=0.2)])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        with np.errstate(all="ignore"):
            return np.asarray(self.kernel()(*arrays)), arrays

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        with np.errstate(all="ignore"):
            return (grad / saved[0],)


@dataclass(frozen=True)
class Sqrt(_Unary):
    """The square root. Its gradient at 0 is infinite; `rmse` has an epsilon for that reason."""

    variants = {"numpy": np.sqrt, "reference": partial(reference.elementwise, math.sqrt)}
    samples = staticmethod(lambda: [Sample(Sqrt(), ((3, 4),), low=0.2)])

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        with np.errstate(all="ignore"):
            return (grad / (2 * saved[0]),)


@dataclass(frozen=True)
class Absolute(_Unary):
    """|x|; the gradient at 0 is 0."""

    variants = {"numpy": np.abs, "reference": partial(reference.elementwise, abs)}
    samples = staticmethod(lambda: [Sample(Absolute(), ((3, 4),))])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        return np.asarray(self.kernel()(*arrays)), arrays

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (grad * np.sign(saved[0]),)


@dataclass(frozen=True)
class Power(_Unary):
    """x ** exponent, the exponent a constant."""

    exponent: float = 2.0

    variants = {
        "numpy": np.power,
        "reference": partial(reference.elementwise, operator.pow),
    }
    samples = staticmethod(
        lambda: [Sample(Power(3.0), ((3, 4),)), Sample(Power(-0.5), ((3, 4),), low=0.2)]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        (x,) = arrays
        with np.errstate(all="ignore"):
            return np.asarray(self.kernel()(x, x.dtype.type(self.exponent))), (x,)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        if self.exponent == 0:
            return (np.zeros_like(grad),)
        (x,) = saved
        with np.errstate(all="ignore"):
            return (grad * x.dtype.type(self.exponent) * x ** x.dtype.type(self.exponent - 1),)


@dataclass(frozen=True)
class Relu(_Unary):
    """max(x, 0); the gradient at 0 is 0, and NaN stays NaN both ways."""

    variants = {
        "numba": elementwise.relu,
        "reference": partial(reference.elementwise, reference.relu),
    }
    gradients = {"numba": elementwise.relu_grad, "reference": reference.relu_grad}
    samples = staticmethod(lambda: [Sample(Relu(), ((3, 4),)), Sample(Relu(), ((2, 3, 3, 5),))])

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (self.gradient_kernel()(grad, saved[0]),)


@dataclass(frozen=True)
class Tanh(_Unary):
    """The hyperbolic tangent."""

    variants = {"numpy": np.tanh, "reference": partial(reference.elementwise, math.tanh)}
    samples = staticmethod(lambda: [Sample(Tanh(), ((3, 4),))])

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (grad * (1 - saved[0] * saved[0]),)


def _sigmoid(x: Array) -> Array:
    # exp of a negative number alone, so that nothing overflows
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


@dataclass(frozen=True)
class Sigmoid(_Unary):
    """1 / (1 + e ** -x), without overflow for any x."""

    variants = {
        "numpy": _sigmoid,
        "reference": partial(reference.elementwise, lambda x: 1 / (1 + math.exp(-x))),
    }
    samples = staticmethod(lambda: [Sample(Sigmoid(), ((3, 4),))])

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (grad * saved[0] * (1 - saved[0]),)


def add(a: Operand, b: Operand) -> Tensor:
    """a + b with broadcasting."""
    return apply(Add(), *pair(a, b))


def sub(a: Operand, b: Operand) -> Tensor:
    """a - b with broadcasting."""
    return apply(Sub(), *pair(a, b))


def mul(a: Operand, b: Operand) -> Tensor:
    """a * b with broadcasting."""
    return apply(Mul(), *pair(a, b))


def div(a: Operand, b: Operand) -> Tensor:
    """a / b with broadcasting."""
    return apply(Div(), *pair(a, b))


def maximum(a: Operand, b: Operand) -> Tensor:
    """The larger of a and b, elementwise, with broadcasting."""
    return apply(Maximum(), *pair(a, b))


def minimum(a: Operand, b: Operand) -> Tensor:
    """The smaller of a and b, elementwise, with broadcasting."""
    return apply(Minimum(), *pair(a, b))


def neg(x: Operand) -> Tensor:
    """-x."""
    return apply(Neg(), tensor(x))


def exp(x: Operand) -> Tensor:
    """e ** x."""
    return apply(Exp(), tensor(x))


def log(x: Operand) -> Tensor:
    """The natural logarithm of x."""
    return apply(Log(), tensor(x))


def sqrt(x: Operand) -> Tensor:
    """The square root of x."""
    return apply(Sqrt(), tensor(x))


def absolute(x: Operand) -> Tensor:
    """|x|."""
    return apply(Absolute(), tensor(x))


def power(x: Operand, exponent: Operand) -> Tensor:
    """x ** exponent; where the exponent is more than a number, x must be positive."""
    if is_number(exponent):
        return apply(Power(float(exponent)), tensor(x))  # type: ignore[arg-type]
    return exp(mul(exponent, log(pair(x, exponent)[0])))


def relu(x: Operand) -> Tensor:
    """max(x, 0)."""
    return apply(Relu(), tensor(x))


def tanh(x: Operand) -> Tensor:
    """The hyperbolic tangent of x."""
    return apply(Tanh(), tensor(x))


def sigmoid(x: Operand) -> Tensor:
    """1 / (1 + e ** -x)."""
    return apply(Sigmoid(), tensor(x))
