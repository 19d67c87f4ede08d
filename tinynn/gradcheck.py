"""Check a gradient against central differences, in float64.

One random projection of the gradient against one directional derivative costs two evaluations and
misses no systematic mistake; where the operands are tiny, the whole Jacobian is compared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tinynn.errors import DTypeError, TinynnError
from tinynn.op import Array
from tinynn.tensor import Tensor, no_grad

_TINY = 64  #: elements of operand times elements of result below which the Jacobian is checked


class GradientError(TinynnError, AssertionError):
    """An analytic gradient and its numerical estimate disagree."""


def gradcheck(
    function: Callable[..., Tensor],
    operands: Sequence[npt.ArrayLike],
    *,
    rng: np.random.Generator | None = None,
    projections: int = 3,
    step: float = 1e-6,
    rtol: float = 1e-5,
    atol: float = 1e-7,
) -> None:
    """Raise GradientError unless backward of `function` agrees with central differences.

    `function` takes Tensors and returns one Tensor; `operands` are arrays, the floating ones are
    taken in float64 and differentiated, the integer ones are passed through.
    """
    rng = rng or np.random.default_rng(0)
    arrays = [np.array(a, np.float64) if _floating(a) else np.asarray(a) for a in operands]
    if not any(a.dtype.kind == "f" for a in arrays):
        raise DTypeError("gradcheck: required at least one floating operand")

    def value(*values: Array) -> Array:
        with no_grad():
            return function(*(Tensor(v) for v in values)).numpy()

    tensors = [Tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
    result = function(*tensors)
    if result.dtype != np.float64:
        raise DTypeError(f"gradcheck: float64 operands gave a result of {result.dtype}")
    for _ in range(projections):
        weights = rng.standard_normal(result.shape)
        for t in tensors:
            t.grad = None
        result.backward(weights, retain=True)
        for i, t in enumerate(tensors):
            if t.requires_grad:
                _compare(value, arrays, i, _gradient(t), weights, rng, step, rtol, atol)


def _compare(
    value: Callable[..., Array],
    arrays: list[Array],
    i: int,
    gradient: Array,
    weights: Array,
    rng: np.random.Generator,
    step: float,
    rtol: float,
    atol: float,
) -> None:
    def slope(direction: Array) -> float:
        ahead, behind = list(arrays), list(arrays)
        ahead[i], behind[i] = arrays[i] + step * direction, arrays[i] - step * direction
        return float(((value(*ahead) - value(*behind)) * weights).sum() / (2 * step))

    def require(direction: Array, where: str) -> None:
        numeric, analytic = slope(direction), float((gradient * direction).sum())
        if not np.isclose(analytic, numeric, rtol=rtol, atol=atol):
            raise GradientError(
                f"operand {i} of shape {arrays[i].shape}, {where}: backward gives {analytic:.9g}, "
                f"central differences give {numeric:.9g}"
            )

    if gradient.shape != arrays[i].shape:
        raise GradientError(f"operand {i}: shape {arrays[i].shape}, gradient {gradient.shape}")
    require(rng.standard_normal(arrays[i].shape), "along a random direction")
    if arrays[i].size * weights.size <= _TINY:
        for position in np.ndindex(arrays[i].shape):
            unit = np.zeros(arrays[i].shape)
            unit[position] = 1
            require(unit, f"element {position}")


def _gradient(t: Tensor) -> Array:
    return np.zeros(t.shape) if t.grad is None else np.asarray(t.grad)


def _floating(a: npt.ArrayLike) -> bool:
    return np.asarray(a).dtype.kind == "f"
