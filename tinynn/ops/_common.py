"""What the declarations share: operands from plain numbers, axes from whatever the caller wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tinynn.errors import DTypeError, ShapeError
from tinynn.op import Shape
from tinynn.tensor import Tensor

Operand = Tensor | npt.ArrayLike
Axis = int | tuple[int, ...] | None


def tensor(x: Operand) -> Tensor:
    """Wrap anything that is not a Tensor yet."""
    return x if isinstance(x, Tensor) else Tensor(x)


def pair(a: Operand, b: Operand) -> tuple[Tensor, Tensor]:
    """Two operands; a plain Python number takes the dtype of the other."""
    if isinstance(a, Tensor) and isinstance(b, int | float):
        return a, Tensor(np.asarray(b, a.dtype), copy=False)
    if isinstance(b, Tensor) and isinstance(a, int | float):
        return Tensor(np.asarray(a, b.dtype), copy=False), b
    return tensor(a), tensor(b)


def normal_axes(op: str, axis: Axis, shape: Shape) -> tuple[int, ...]:
    """The axes as sorted non-negative numbers; None means all of them."""
    if axis is None:
        return tuple(range(len(shape)))
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
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
