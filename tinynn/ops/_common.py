"""What the declarations share: operands from plain numbers, axes from whatever the caller wrote."""

from __future__ import annotations

from functools import lru_cache
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.geometry import Padding, Pair, Window, window
from kernels.statistics import sums
from tinynn.errors import DTypeError, ShapeError
from tinynn.op import Array, Shape
from tinynn.tensor import Tensor

Operand = Tensor | npt.ArrayLike
Axis = int | tuple[int, ...] | None


def tensor(x: Operand) -> Tensor:
    """Wrap anything that is not a Tensor yet."""
    return x if isinstance(x, Tensor) else Tensor(x)


def pair(a: Operand, b: Operand) -> tuple[Tensor, Tensor]:
    """Two operands; a number, or integers, take the floating dtype of the other."""
    if isinstance(a, Tensor):
        return a, _like(a, b)
    if isinstance(b, Tensor):
        return _like(b, a), b
    return tensor(a), tensor(b)


@lru_cache(4096)
def fitting(
    height: int, width: int, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair = (1, 1)
) -> Window:
    """The window over an image of height x width. Raises ValueError if it does not fit once."""
    win = window(height, width, kernel, stride, padding, dilation)
    win.output(height, width)
    return win


def is_number(x: object) -> bool:
    """Whether x is one plain number, of Python's or NumPy's kinds."""
    return isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)


def _like(model: Tensor, x: Operand) -> Tensor:
    if isinstance(x, Tensor):
        return x
    array = np.asarray(x)
    if is_number(x) or (array.dtype.kind in "iu" and model.dtype.kind == "f"):
        array = array.astype(model.dtype)
        return Tensor(array, copy=False)
    return tensor(x)


def normal_axes(op: str, axis: Axis, shape: Shape) -> tuple[int, ...]:
    """The axes as sorted non-negative numbers; None means all of them."""
    if axis is None:
        return tuple(range(len(shape)))
    try:
        axes = tuple(map(index, axis)) if isinstance(axis, tuple | list) else (index(axis),)
    except TypeError:
        raise DTypeError(f"{op}: required whole numbers as axes; came {axis!r}") from None
    if any(not -len(shape) <= a < len(shape) for a in axes):
        raise ShapeError(f"{op}: required axes within a shape of {len(shape)} axes; came {axis}")
    normal = tuple(sorted(a % len(shape) for a in axes))
    if len(set(normal)) != len(normal):
        raise ShapeError(f"{op}: required distinct axes; came {axis} for shape {shape}")
    return normal


def integers(op: str, values: Any) -> Tensor:
    """An operand of class numbers or positions: any integer array."""
    array = values._data if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "iu":
        raise DTypeError(f"{op}: required integers; came {array.dtype} of shape {array.shape}")
    return values if isinstance(values, Tensor) else Tensor(array)


def unbroadcast(grad: Array, shape: Shape) -> Array:
    """Sum `grad` over the axes along which an operand of `shape` was broadcast."""
    if grad.shape == shape:
        return grad
    lead = grad.ndim - len(shape)
    if len(shape) == 1 and shape == grad.shape[-1:]:
        return sums(grad)
    stretched = tuple(i + lead for i, n in enumerate(shape) if n == 1 and grad.shape[i + lead] != 1)
    axes = tuple(range(lead)) + stretched
    return np.asarray(grad.sum(axis=axes, dtype=grad.dtype)).reshape(shape)
