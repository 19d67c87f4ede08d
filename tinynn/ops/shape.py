"""Ops that move elements without changing them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index as whole
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels import memory, reference
from kernels.elementwise import frame
from tinynn.errors import DTypeError, ShapeError
from tinynn.op import Array, Op, Sample, Saved, Shape
from tinynn.ops._common import Operand, integers, normal_axes, tensor
from tinynn.tensor import Tensor, apply

#: A slice as (start, stop, step): slices themselves are not hashable before Python 3.12.
Key = tuple[int | None, int | None, int | None]

_KEYS = (int, np.integer, slice, type(None), type(Ellipsis))


@dataclass(frozen=True)
class Reshape(Op):
    """The same elements in row-major order under another shape."""

    shape: Shape = ()

    channels = "spread"
    variants = {"numpy": np.reshape}
    samples = staticmethod(lambda: [Sample(Reshape((4, 3)), ((2, 6),))])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        (x,) = arrays
        if x.size != math.prod(self.shape):
            raise self.reject(f"{math.prod(self.shape)} elements", x)
        return self.kernel()(x, self.shape), (x.shape,)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (grad.reshape(saved[0]),)


@dataclass(frozen=True)
class Transpose(Op):
    """The axes in another order: result axis i is operand axis axes[i]."""

    axes: tuple[int, ...] = ()

    channels = "spread"
    variants = {
        "numpy": lambda x, axes: np.array(x.transpose(axes), order="C"),
        "reference": reference.transpose,
    }
    samples = staticmethod(lambda: [Sample(Transpose((2, 0, 1)), ((2, 3, 4),))])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        return self.kernel()(arrays[0], self.axes), ()

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (np.array(grad.transpose(np.argsort(self.axes)), order="C"),)


def _side_by_side(arrays: Sequence[Array], axis: int) -> Array:
    first = arrays[0].shape
    shape = (*first[:axis], sum(a.shape[axis] for a in arrays), *first[axis + 1 :])
    return np.concatenate(arrays, axis, out=memory.empty(shape, arrays[0].dtype))


@dataclass(frozen=True)
class Concat(Op):
    """Operands side by side along `axis`."""

    axis: int = 0

    channels = "stack"
    variants = {
        "numpy": _side_by_side,
        "reference": reference.concat,
    }
    samples = staticmethod(lambda: [Sample(Concat(1), ((2, 3), (2, 1), (2, 4)))])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        first = arrays[0].shape
        for a in arrays:
            same = a.shape[: self.axis] + a.shape[self.axis + 1 :]
            if a.ndim != len(first) or same != first[: self.axis] + first[self.axis + 1 :]:
                raise self.reject(f"equal shapes but for axis {self.axis}", *arrays)
        return self.kernel()(arrays, self.axis), tuple(a.shape[self.axis] for a in arrays)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        none = [(0, 0)] * self.axis
        ends = np.cumsum(saved).tolist()
        return tuple(
            frame(grad, [*none, (n - end, end - ends[-1]), *[(0, 0)] * (grad.ndim - self.axis - 1)])
            for n, end in zip(saved, ends, strict=True)
        )


@dataclass(frozen=True)
class Pad(Op):
    """Constant elements before and after each axis: widths[i] = (before, after) of axis i."""

    widths: tuple[tuple[int, int], ...] = ()
    value: float = 0.0

    channels = "stack"
    variants = {
        "numba": frame,
        "reference": reference.pad,
    }
    samples = staticmethod(lambda: [Sample(Pad(((1, 0), (2, 3)), 0.5), ((2, 3),))])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        (x,) = arrays
        if (
            not x.ndim
            or len(self.widths) != x.ndim
            or any(n < 0 for pair in self.widths for n in pair)
        ):
            raise self.reject("one pair of widths >= 0 for each axis", x)
        return self.kernel()(x, self.widths, self.value), ()

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (frame(grad, [(-b, -a) for b, a in self.widths]),)


def _spread(x: Array, places: tuple[int, ...], width: int, value: float) -> Array:
    out = memory.empty((*x.shape[:-1], width), x.dtype)
    out[...] = value
    out[..., list(places)] = x
    return out


@dataclass(frozen=True)
class Scatter(Op):
    """Channels at their places among more: y[..., places[i]] = x[..., i], `value` elsewhere.

    x (..., len(places)), y (..., width); the places differ.
    """

    places: tuple[int, ...] = ()
    width: int = 0
    value: float = 0.0

    channels = "stack"
    variants = {"numpy": _spread, "reference": reference.scatter}
    samples = staticmethod(lambda: [Sample(Scatter((3, 0), 5), ((2, 3, 2),))])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        (x,) = arrays
        inside = all(0 <= p < self.width for p in self.places)
        fits = x.shape[-1:] == (len(self.places),) and len(set(self.places)) == len(self.places)
        if not (inside and fits):
            raise self.reject("as many different places below the width as channels", x)
        return self.kernel()(x, self.places, self.width, self.value), ()

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        return (np.ascontiguousarray(grad[..., list(self.places)]),)


@dataclass(frozen=True)
class Index(Op):
    """One slice an axis: keys[i] = (start, stop, step) of axis i."""

    keys: tuple[Key, ...] = ()

    channels = "stack"
    variants = {
        "numpy": lambda x, slices: np.array(x[slices], order="C"),
        "reference": reference.take_slice,
    }
    samples = staticmethod(
        lambda: [
            Sample(Index(((1, None, 2), (None, 2, None))), ((4, 3),)),
            Sample(Index(((None, None, None), (None, None, -1))), ((2, 3),)),
        ]
    )

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        (x,) = arrays
        if len(self.keys) != x.ndim:
            raise self.reject("one slice for each axis", x)
        return self.kernel()(x, self._slices()), (x.shape,)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        out = np.zeros(saved[0], grad.dtype)
        out[self._slices()] = grad
        return (out,)

    def _slices(self) -> tuple[slice, ...]:
        return tuple(slice(*key) for key in self.keys)


@dataclass(frozen=True)
class Take(Op):
    """Rows by number: operand 0 is (n, ...), operand 1 any shape of integers in [-n, n)."""

    integers = True
    variants = {
        "numpy": lambda x, positions: x[positions],
        "reference": lambda x, positions: np.stack([x[i] for i in positions]),
    }
    samples = staticmethod(lambda: [Sample(Take(), ((4, 3), (5,)), labels=4)])

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        x, positions = arrays
        if not x.ndim:
            raise self.reject("an operand with rows", x, positions)
        n = len(x)
        if positions.size and not (-n <= positions.min() and positions.max() < n):
            raise IndexError(
                f"{self}: required positions in [{-n}, {n}); came {positions.min()} to "
                f"{positions.max()} for shape {x.shape}"
            )
        return np.asarray(self.kernel()(x, positions)), (x.shape, positions)

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        shape, positions = saved
        out = np.zeros(shape, grad.dtype)
        np.add.at(out, positions, grad)  # a position may occur more than once
        return out, None


def reshape(x: Operand, *shape: int | Sequence[int]) -> Tensor:
    """Row-major reshape; one size may be -1."""
    x = tensor(x)
    wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
    try:
        sizes = [whole(n) for n in wanted]  # type: ignore[arg-type]
    except TypeError:
        raise DTypeError(f"reshape: required whole numbers; came {wanted}") from None
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        sizes[sizes.index(-1)] = x.size // rest if rest else 0
    if math.prod(sizes) != x.size or min(sizes, default=0) < 0:
        raise ShapeError(f"reshape: shape {x.shape} has {x.size} elements; came {wanted}")
    return apply(Reshape(tuple(sizes)), x)


def flatten(x: Operand) -> Tensor:
    """(B, ...) to (B, rest)."""
    x = tensor(x)
    if not x.ndim:
        raise ShapeError("flatten: required (B, ...); came a shape without axes")
    return reshape(x, x.shape[0], math.prod(x.shape[1:]))


def transpose(x: Operand, axes: int | Sequence[int] | None = None, *more: int) -> Tensor:
    """The axes reordered, by `(1, 0)` or `1, 0`; reversed by default."""
    x = tensor(x)
    if axes is None:
        axes = range(x.ndim)[::-1]
    order = (axes, *more) if isinstance(axes, int | np.integer) else tuple(axes)
    if normal_axes("transpose", order, x.shape) != tuple(range(x.ndim)):
        raise ShapeError(f"transpose: required every axis of {x.shape} once; came {order}")
    return apply(Transpose(tuple(a % x.ndim for a in order)), x)


def concat(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Operands side by side along `axis`."""
    operands = [tensor(t) for t in tensors]
    if not operands:
        raise ShapeError("concat: required at least one operand; came none")
    (normal,) = normal_axes("concat", axis, operands[0].shape)
    return apply(Concat(normal), *operands)


def pad(x: Operand, widths: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Constant elements around x: widths[i] = (before, after) along axis i."""
    try:
        pairs = tuple((whole(b), whole(a)) for b, a in widths)
    except (TypeError, ValueError):
        raise DTypeError(
            f"pad: required a pair of whole numbers an axis; came {widths!r}"
        ) from None
    return apply(Pad(pairs, float(value)), tensor(x))


def scatter(x: Operand, places: Sequence[int], width: int) -> Tensor:
    """x (..., n) with its channels at n places of (..., width), zeros elsewhere."""
    return apply(Scatter(tuple(int(p) for p in places), int(width)), tensor(x))


def index(x: Operand, key: Any) -> Tensor:
    """x[key]: integers, slices, None, Ellipsis; or an array of integers for whole rows."""
    x = tensor(x)
    if isinstance(key, list | np.ndarray | Tensor):
        return take(x, key)
    parts = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(k, bool) or not isinstance(k, _KEYS) for k in parts):
        raise DTypeError(f"index: required integers, slices, None or Ellipsis; came {key!r}")
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    missing = x.ndim - sum(k is not None and k is not Ellipsis for k in parts)
    if missing < 0 or parts.count(Ellipsis) > 1:
        raise IndexError(f"index: key {key!r} does not fit shape {x.shape}")
    at = parts.index(Ellipsis)
    parts[at : at + 1] = [slice(None)] * missing

    keys: list[Key] = []
    kept: list[int] = []  # the shape after integer axes are dropped and new axes made
    for k in parts:
        if k is None:
            kept.append(1)
        elif isinstance(k, slice):
            if k.step == 0:
                raise IndexError(f"index: a slice has step 0 in {key!r}")
            size = x.shape[len(keys)]
            kept.append(len(range(*k.indices(size))))
            keys.append((k.start, k.stop, k.step))
        else:
            size = x.shape[len(keys)]
            if not -size <= k < size:
                raise IndexError(f"index: {k} is out of range for axis of {size} in {x.shape}")
            keys.append((int(k) % size, int(k) % size + 1, None))
    return reshape(apply(Index(tuple(keys)), x), kept)


def take(x: Operand, positions: npt.ArrayLike | Tensor) -> Tensor:
    """Rows of x by number; the same row may be taken more than once."""
    return apply(Take(), tensor(x), integers("take", positions))
