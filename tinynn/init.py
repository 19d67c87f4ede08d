"""Initial values of weights: functions `(shape, rng, dtype) -> array`.

Fans are read off the shape: the last axis is m_out, the second last m_in, and leading axes are
kernel positions (HWIO), so a (K, K, m_in, m_out) kernel has fan_in = K K m_in, fan_out = K K m_out.
Numbers are drawn in float64 and rounded, so that one seed gives the same weights in every dtype.
All functions raise DTypeError for a missing generator or a dtype that is not floating, ShapeError
for a shape that they cannot fill, ConfigError for parameters outside their range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tinynn.errors import ConfigError, DTypeError, ShapeError
from tinynn.op import Array, Shape


class Initialiser(Protocol):
    """What a layer takes to fill a new parameter."""

    def __call__(
        self, shape: Sequence[int], rng: np.random.Generator, dtype: npt.DTypeLike = np.float32
    ) -> Array: ...


def he_normal(
    shape: Sequence[int], rng: np.random.Generator, dtype: npt.DTypeLike = np.float32
) -> Array:
    """Normal, variance 2 / fan_in: keeps the forward variance through ReLUs.

    He et al., Delving Deep into Rectifiers (ICCV 2015), eq. 10.
    """
    fan_in, _ = _fans("he_normal", shape)
    return _normal("he_normal", 0.0, math.sqrt(2 / fan_in), shape, rng, dtype)


def he_uniform(
    shape: Sequence[int], rng: np.random.Generator, dtype: npt.DTypeLike = np.float32
) -> Array:
    """Uniform of variance 2 / fan_in, that is within +-sqrt(6 / fan_in). He et al. 2015, eq. 10."""
    fan_in, _ = _fans("he_uniform", shape)
    bound = math.sqrt(6 / fan_in)
    return _uniform("he_uniform", -bound, bound, shape, rng, dtype)


def xavier_normal(
    shape: Sequence[int], rng: np.random.Generator, dtype: npt.DTypeLike = np.float32
) -> Array:
    """Normal, variance 2 / (fan_in + fan_out): forward and backward variance in balance.

    Glorot & Bengio, Understanding the difficulty of training deep feedforward neural networks
    (AISTATS 2010), eq. 12.
    """
    fan_in, fan_out = _fans("xavier_normal", shape)
    return _normal("xavier_normal", 0.0, math.sqrt(2 / (fan_in + fan_out)), shape, rng, dtype)


def xavier_uniform(
    shape: Sequence[int], rng: np.random.Generator, dtype: npt.DTypeLike = np.float32
) -> Array:
    """Uniform within +-sqrt(6 / (fan_in + fan_out)). Glorot & Bengio 2010, eq. 16."""
    fan_in, fan_out = _fans("xavier_uniform", shape)
    bound = math.sqrt(6 / (fan_in + fan_out))
    return _uniform("xavier_uniform", -bound, bound, shape, rng, dtype)


def zeros(
    shape: Sequence[int], rng: np.random.Generator, dtype: npt.DTypeLike = np.float32
) -> Array:
    """All 0. Draws nothing from `rng`, which every initialiser takes."""
    return _constant("zeros", 0.0, shape, rng, dtype)


def uniform(low: float, high: float) -> Initialiser:
    """Uniform in [low, high)."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"uniform: required finite low < high; came low={low}, high={high}")
    return partial(_uniform, "uniform", low, high)


def normal(mean: float = 0.0, std: float = 1.0) -> Initialiser:
    """Normal of this mean and standard deviation."""
    _check_std("normal", mean, std)
    return partial(_normal, "normal", mean, std)


def truncated_normal(mean: float = 0.0, std: float = 1.0) -> Initialiser:
    """Normal, with every value further than 2 std from the mean drawn anew.

    The standard deviation of the result is 0.88 std.
    """
    _check_std("truncated_normal", mean, std)
    return partial(_truncated_normal, mean, std)


def constant(value: float) -> Initialiser:
    """All `value`."""
    if not math.isfinite(value):
        raise ConfigError(f"constant: required a finite value; came {value}")
    return partial(_constant, "constant", value)


def _normal(
    name: str,
    mean: float,
    std: float,
    shape: Sequence[int],
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
) -> Array:
    shape, dtype = _check(name, shape, rng, dtype)
    return rng.normal(mean, std, shape).astype(dtype)


def _uniform(
    name: str,
    low: float,
    high: float,
    shape: Sequence[int],
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
) -> Array:
    shape, dtype = _check(name, shape, rng, dtype)
    values = rng.uniform(low, high, shape).astype(dtype)
    # Rounding to a shorter dtype can reach `high`, which does not belong to the interval.
    return np.minimum(values, np.nextafter(dtype.type(high), dtype.type(low)))


def _truncated_normal(
    mean: float,
    std: float,
    shape: Sequence[int],
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
) -> Array:
    shape, dtype = _check("truncated_normal", shape, rng, dtype)
    z = rng.standard_normal(shape)
    flat = z.reshape(-1)
    outside = np.flatnonzero(np.abs(flat) > 2)
    while outside.size:
        flat[outside] = rng.standard_normal(outside.size)
        outside = outside[np.abs(flat[outside]) > 2]
    return (mean + std * z).astype(dtype)


def _constant(
    name: str,
    value: float,
    shape: Sequence[int],
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
) -> Array:
    shape, dtype = _check(name, shape, rng, dtype)
    return np.full(shape, value, dtype)


def _fans(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight of this shape."""
    if len(shape) < 2 or min(shape) < 1:
        raise ShapeError(f"{name}: required a shape (..., m_in, m_out) of sizes >= 1; came {shape}")
    positions = math.prod(shape[:-2])
    return positions * shape[-2], positions * shape[-1]


def _check(
    name: str, shape: Sequence[int], rng: np.random.Generator, dtype: npt.DTypeLike
) -> tuple[Shape, np.dtype[Any]]:
    if not isinstance(rng, np.random.Generator):
        raise DTypeError(f"{name}: required a numpy.random.Generator; came {rng!r}")
    result: np.dtype[Any] = np.dtype(dtype)
    if result.kind != "f":
        raise DTypeError(f"{name}: required a floating dtype; came {result}")
    if any(n < 0 for n in shape):
        raise ShapeError(f"{name}: required sizes >= 0; came {shape}")
    return tuple(shape), result


def _check_std(name: str, mean: float, std: float) -> None:
    if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
        raise ConfigError(
            f"{name}: required a finite mean and std >= 0; came mean={mean}, std={std}"
        )


#: Initialisers by name, for flags and configuration files; those with parameters at N(0, 1) and
#: [0, 1).
by_name: dict[str, Initialiser] = {
    "he_normal": he_normal,
    "he_uniform": he_uniform,
    "xavier_normal": xavier_normal,
    "xavier_uniform": xavier_uniform,
    "uniform": uniform(0.0, 1.0),
    "normal": normal(),
    "truncated_normal": truncated_normal(),
    "zeros": zeros,
}
