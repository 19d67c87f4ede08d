"""What an op is, said once: its rule forward, its rule backward, its kernels, its costs.

An op is a frozen dataclass. Its fields are the static attributes (an axis, a stride); its methods
see arrays, never Tensors. Declaring a subclass registers it, and whatever is registered is tested
against its reference twin, gradient-checked, counted and timed by code that iterates the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tinynn.errors import ConfigError, DTypeError, ShapeError

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Saved = tuple[Any, ...]

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
    #: whether `backward` takes a third argument, `needs`: for each operand, is its gradient wanted
    selective: ClassVar[bool] = False
    #: kernel variants, the default one first; "reference" is the plain-loop twin
    variants: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    samples: ClassVar[Callable[[], list[Sample]]]

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

    def kernel(self) -> Callable[..., Any]:
        """The variant in force: see `use_variant`."""
        return self.variants.get(_variant) or next(iter(self.variants.values()))

    def reject(self, required: str, *arrays: Array) -> ShapeError:
        """The error for operands that do not fit; the caller raises it."""
        came = ", ".join(str(a.shape) for a in arrays)
        return ShapeError(f"{self}: required {required}; came shapes {came}")


registry: dict[str, type[Op]] = {}

_variant = ""


@contextmanager
def use_variant(name: str) -> Iterator[None]:
    """Run every op that has a kernel variant of this name on it, for instance "reference"."""
    global _variant
    before, _variant = _variant, name
    try:
        yield
    finally:
        _variant = before


def check_dtypes(op: Op, arrays: tuple[Array, ...]) -> None:
    """Raise DTypeError unless all floating operands share one dtype; integers are indices."""
    kinds = {a.dtype for a in arrays if a.dtype.kind == "f"}
    if len(kinds) > 1 or not kinds:
        came = ", ".join(str(a.dtype) for a in arrays)
        raise DTypeError(f"{op}: required operands of one floating dtype; came {came}")


def unbroadcast(grad: Array, shape: Shape) -> Array:
    """Sum `grad` over the axes along which an operand of `shape` was broadcast."""
    if grad.shape == shape:
        return grad
    lead = grad.ndim - len(shape)
    stretched = tuple(i + lead for i, n in enumerate(shape) if n == 1 and grad.shape[i + lead] != 1)
    axes = tuple(range(lead)) + stretched
    return np.asarray(grad.sum(axis=axes, dtype=grad.dtype)).reshape(shape)


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))
