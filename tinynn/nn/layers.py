"""Layers: a module for each op that has parameters or a state, and the plain activations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tinynn import init, ops
from tinynn.errors import ConfigError, DTypeError, ShapeError
from tinynn.nn.module import Module, Parameter
from tinynn.op import Array
from tinynn.tensor import Tensor

Initialiser = Callable[..., Array]


class Linear(Module):
    """y = x @ weight + bias: x (B, m_in), weight (m_in, m_out), bias (m_out,), y (B, m_out)."""

    rectifies = True

    def __init__(
        self,
        m_in: int,
        m_out: int,
        *,
        bias: bool = True,
        weight_init: Initialiser = init.he_normal,
        bias_init: Initialiser = init.zeros,
        rng: np.random.Generator,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        if not all(isinstance(m, int | np.integer) and m >= 1 for m in (m_in, m_out)):
            raise ConfigError(f"Linear: required whole sizes >= 1; came {m_in} and {m_out}")
        self.weight = Parameter(weight_init((m_in, m_out), rng, dtype), copy=False)
        self.bias = Parameter(bias_init((m_out,), rng, dtype), copy=False) if bias else None

    def check(self) -> None:
        """Raise ShapeError or DTypeError unless weights and bias are parameters that fit."""
        parts = require_parameters("Linear", self.weight, self.bias)
        shapes = [p.shape for p in parts]
        if self.weight.ndim != 2 or shapes[1:] not in ([], [self.weight.shape[1:]]):
            raise ShapeError(f"Linear: required weight (K, N) and bias (N,); came {shapes}")

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        return self.using(x, self.weight, self.bias, relu=relu)

    def using(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool = False
    ) -> Tensor:
        """The layer with these weights in the place of its own, rounded ones for instance."""
        return ops.linear(x, weight, bias, relu=relu)

    def extra(self) -> str:
        """The sizes."""
        return f"{self.weight.shape[0]} -> {self.weight.shape[1]}, bias={self.bias is not None}"


class ReLU(Module):
    """max(x, 0)."""

    is_relu = True

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(x)


class Tanh(Module):
    """The hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.tanh(x)


class Sigmoid(Module):
    """1 / (1 + e ** -x)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.sigmoid(x)


class Softmax(Module):
    """exp(x) over its sum along the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.softmax(x)


class Flatten(Module):
    """(B, ...) to (B, rest)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.flatten(x)


class Dropout(Module):
    """Zero each value with probability p in training and scale the rest by 1 / (1 - p).

    Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
    in the inverted form: nothing happens outside training.
    """

    def __init__(self, p: float, *, rng: np.random.Generator) -> None:
        self.p = float(p)
        self.rng = rng
        self.check()

    def check(self) -> None:
        """Raise ConfigError unless 0 <= p < 1."""
        if not (isinstance(self.p, float) and 0 <= self.p < 1):
            raise ConfigError(f"Dropout: required 0 <= p < 1; came {self.p!r}")
        if not isinstance(self.rng, np.random.Generator):
            raise ConfigError(f"Dropout: required a numpy Generator as rng; came {self.rng!r}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = self.rng.random(x.shape, dtype=np.float32) >= self.p
        return ops.mul(x, Tensor(kept.astype(x.dtype) / x.dtype.type(1 - self.p), copy=False))


def require_parameters(layer: str, *parts: Parameter | None) -> list[Parameter]:
    """Those that are not None; raises DTypeError unless they are Parameters of one dtype."""
    given = [p for p in parts if p is not None]
    if not all(isinstance(p, Parameter) for p in given) or len({p.dtype for p in given}) > 1:
        raise DTypeError(f"{layer}: required parameters of one dtype; came {given}")
    return given
