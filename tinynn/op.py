"""What an op is, said once: its rule forward, its rule backward, its kernels, its costs.

An op is a frozen dataclass. Its fields are the static attributes (an axis, a stride); its methods
see arrays, never Tensors. Declaring a subclass registers it, and whatever is registered is tested
against its reference twin, gradient-checked, counted and timed by code that iterates the registry.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tinynn.errors import ConfigError, DTypeError, ShapeError

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Saved = tuple[Any, ...]

_FLOATS = {np.dtype(np.float32), np.dtype(np.float64)}

#: How channels pass through an op: `mix` (in and out independent), `same` (channel i stays i),
#: `tie` (the inputs' channels must agree), `stack` (concatenated, with offsets), `spread` (each
#: channel becomes a block), `end` (a scalar; nothing to prune behind it). None: refused by name.
ChannelRule = Literal["mix", "same", "tie", "stack", "spread", "end"]


class Sample(NamedTuple):
    """Arguments on which a test may run an op: one shape an operand, values within [low, high)."""

    op: Op
    shapes: tuple[Shape, ...]
    low: float = -2.0
    high: float = 2.0
    labels: int | None = None  #: the last operand is class numbers below this


class Op:
    """Base of all ops: subclass it under `@dataclass(frozen=True)`; fields are its attributes."""

    name: ClassVar[str]
    channels: ClassVar[ChannelRule | None] = None
    #: the axis of operand 1 that operand 0's channels index, of `same` ops where it is not the last
    weight_axis: ClassVar[int | None] = None
    #: whether `backward` takes a third argument, `needs`: for each operand, is its gradient wanted
    selective: ClassVar[bool] = False
    #: whether operands may be integers (positions, class numbers)
    integers: ClassVar[bool] = False
    #: kernel variants, the default one first; "reference" is the plain-loop twin
    variants: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    #: the same for the backward rule, of ops that have a kernel for it
    gradients: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    samples: ClassVar[Callable[[], list[Sample]]] = staticmethod(list)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__.startswith("_"):
            return  # a base shared by several ops
        cls.name = _snake(cls.__name__)
        if cls.name in registry:
            raise ConfigError(f"op {cls.name!r} is declared twice: {registry[cls.name]} and {cls}")
        registry[cls.name] = cls

    def forward(self, *arrays: Array) -> tuple[Array, Saved]:
        """Return the result and whatever `backward` will need (arrays by reference)."""
        raise NotImplementedError(f"{self.name}.forward")

    def backward(self, grad: Array, saved: Saved) -> tuple[Array | None, ...]:
        """Return d(loss)/d(operand) for each operand, given grad = d(loss)/d(result)."""
        raise NotImplementedError(f"{self.name}.backward")

    def macs(self, *shapes: Shape) -> int:
        """Multiply-adds of one forward call on operands of these shapes (1 MAC = 2 FLOPs)."""
        return 0

    def rule(self, *shapes: Shape) -> ChannelRule | None:
        """The channel rule on operands of these shapes, where it depends on attributes."""
        return self.channels

    def kernel(self) -> Callable[..., Any]:
        """The variant in force: see `use_variant`."""
        return self.variants.get(_mode.variant) or next(iter(self.variants.values()))

    def gradient_kernel(self) -> Callable[..., Any]:
        """The variant in force of the backward rule's kernel."""
        return self.gradients.get(_mode.variant) or next(iter(self.gradients.values()))

    def reject(self, required: str, *arrays: Array) -> ShapeError:
        """The error for operands that do not fit; the caller raises it."""
        came = ", ".join(str(a.shape) for a in arrays)
        return ShapeError(f"{self}: required {required}; came shapes {came}")


registry: dict[str, type[Op]] = {}


class _Mode(threading.local):
    """Each thread's own switches."""

    variant = ""


_mode = _Mode()


@contextmanager
def use_variant(name: str) -> Iterator[None]:
    """Run every op that has a kernel variant of this name on it, for instance "reference".

    Holds for this thread. Raises ConfigError if no op has such a variant.
    """
    known = {v for op in registry.values() for v in (*op.variants, *op.gradients)}
    if name not in known:
        raise ConfigError(f"use_variant: required one of {sorted(known)}; came {name!r}")
    before, _mode.variant = _mode.variant, name
    try:
        yield
    finally:
        _mode.variant = before


def check_dtypes(op: Op, arrays: tuple[Array, ...]) -> None:
    """Raise DTypeError unless the operands are all float32 or all float64.

    Ops that say so may have integers among them.
    """
    floats = {a.dtype for a in arrays if a.dtype.kind == "f"}
    others = any(a.dtype.kind != "f" for a in arrays)
    if len(floats) != 1 or not floats <= _FLOATS or (others and not op.integers):
        came = ", ".join(str(a.dtype) for a in arrays)
        raise DTypeError(f"{op}: required operands all float32 or all float64; came {came}")


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))
