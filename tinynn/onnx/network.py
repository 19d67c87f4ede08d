"""The modules that an imported graph is made of: ordinary layers, and those that only it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinynn import ops
from tinynn.errors import ConfigError, ShapeError
from tinynn.nn.module import Module, Parameter
from tinynn.op import Array, Shape
from tinynn.ops.shape import Index
from tinynn.tensor import Tensor, apply

#: a part's name and the numbers of the values that it takes
Step = tuple[str, tuple[int, ...]]


class Network(Module):
    """A graph of modules: each step runs one of the parts on values that are already there.

    Value i is input i for i < `inputs`; the result of step k is value `inputs` + k. The parts are
    trained, saved, traced and pruned as those of any module.
    """

    def __init__(
        self,
        parts: dict[str, Module],
        steps: Sequence[Step],
        *,
        inputs: int = 1,
        outputs: Sequence[int],
    ) -> None:
        for name, part in parts.items():
            setattr(self, name, part)
        self.inputs = inputs
        self.steps = tuple(steps)
        self.outputs = tuple(outputs)
        self.check()

    def check(self) -> None:
        """Raise ConfigError unless every step has its part and its operands."""
        parts = dict(self.named_children())
        known = self.inputs
        for name, operands in self.steps:
            if name not in parts or not all(_is_number(i) and 0 <= i < known for i in operands):
                raise ConfigError(f"Network: step {name!r} of values {operands} cannot be run")
            known += 1
        if not self.outputs or not all(_is_number(i) and 0 <= i < known for i in self.outputs):
            raise ConfigError(f"Network: outputs {self.outputs} of {known} values")

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        if len(inputs) != self.inputs:
            raise ShapeError(f"Network: required {self.inputs} inputs; came {len(inputs)}")
        values = list(inputs)
        for name, operands in self.steps:
            values.append(getattr(self, name)(*(values[i] for i in operands)))
        results = tuple(values[i] for i in self.outputs)
        return results if len(results) > 1 else results[0]

    def extra(self) -> str:
        """The numbers of steps."""
        return f"{len(self.steps)} steps"


#: what `Function` may call; each takes Tensors, and arguments by name
_FUNCTIONS = {
    name: getattr(ops, name)
    for name in (
        "absolute",
        "exp",
        "log",
        "log_softmax",
        "matmul",
        "max",
        "maximum",
        "mean",
        "minimum",
        "neg",
        "power",
        "softmax",
        "sqrt",
        "sum",
        "transpose",
    )
}
_ARITHMETIC = {
    name: getattr(ops, name) for name in ("add", "sub", "mul", "div", "maximum", "minimum")
}


class Function(Module):
    """An op without parameters of its own, with its arguments."""

    def __init__(self, function: str, **arguments: Any) -> None:
        self.function = function
        self.arguments = tuple(arguments.items())
        self.check()

    def check(self) -> None:
        """Raise ConfigError unless the function is one of those that may be called."""
        named = all(isinstance(a, tuple) and len(a) == 2 for a in self.arguments)
        if self.function not in _FUNCTIONS or not named:
            raise ConfigError(f"Function: cannot call {self.function!r} with {self.arguments!r}")

    def forward(self, *operands: Tensor) -> Tensor:
        return _FUNCTIONS[self.function](*operands, **dict(self.arguments))


class Arithmetic(Module):
    """Elementwise arithmetic of two values, or of one and a constant, with broadcasting.

    The constant is a Parameter (trained), or an array or a number (not trained); `first` puts it on
    the left.
    """

    def __init__(
        self,
        function: str,
        constant: Parameter | Array | float | None = None,
        *,
        first: bool = False,
    ) -> None:
        self.function = function
        self.constant = constant
        self.first = first
        self.check()

    def check(self) -> None:
        """Raise ConfigError unless the function is one of arithmetic."""
        if self.function not in _ARITHMETIC:
            raise ConfigError(f"Arithmetic: no function {self.function!r}")

    def forward(self, *operands: Tensor) -> Tensor:
        if self.constant is not None:
            own = _tensor(self.constant)
            operands = (own, *operands) if self.first else (*operands, own)
        return _ARITHMETIC[self.function](*operands)


class Given(Module):
    """A constant value, whatever the input."""

    def __init__(self, value: Array) -> None:
        self.value = value

    def forward(self) -> Tensor:
        return _tensor(self.value)


class Product(Module):
    """x @ weight: x (..., M, K), weight (K, N)."""

    def __init__(self, weight: Parameter) -> None:
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return ops.matmul(x, self.weight)


class ReshapeTo(Module):
    """Row-major reshape: a size of 0 is the operand's own size there, -1 is what is left."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        sizes = [_size(x, i) if n == 0 else n for i, n in enumerate(self.shape)]
        return ops.reshape(x, sizes)


class FlattenAt(Module):
    """Two axes of the operand's: those before `axis` together, and the others."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        if not -x.ndim <= self.axis <= x.ndim:
            raise ShapeError(f"FlattenAt: required an axis of {x.shape}; came {self.axis}")
        axis = self.axis % x.ndim if self.axis < 0 else self.axis
        rows = int(np.prod(x.shape[:axis], dtype=np.int64))
        return ops.reshape(x, rows, x.size // rows if rows else 0)


class Squeeze(Module):
    """Without these axes of size 1; all such axes if none are given."""

    def __init__(self, axes: tuple[int, ...] | None) -> None:
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        gone = {a % x.ndim for a in self.axes} if self.axes is not None else set(range(x.ndim))
        if self.axes is not None and any(x.shape[a] != 1 for a in gone):
            raise ShapeError(f"Squeeze: axes {self.axes} of {x.shape} are not all of size 1")
        return ops.reshape(x, [n for a, n in enumerate(x.shape) if n != 1 or a not in gone])


class Unsqueeze(Module):
    """With axes of size 1 at these places of the result."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        ndim = x.ndim + len(self.axes)
        new = {a % ndim for a in self.axes}
        if len(new) != len(self.axes) or not all(-ndim <= a < ndim for a in self.axes):
            raise ShapeError(f"Unsqueeze: required {self.axes} to be different axes of {ndim}")
        sizes = iter(x.shape)
        return ops.reshape(x, [1 if a in new else next(sizes) for a in range(ndim)])


class SideBySide(Module):
    """Operands one after the other along `axis`."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def forward(self, *operands: Tensor) -> Tensor:
        return ops.concat(operands, self.axis)


class Border(Module):
    """A constant around the operand: `widths` for all axes but the last, `front`, `back` for it."""

    channel_padding = ("front", "back")

    def __init__(self, widths: Sequence[tuple[int, int]], value: float = 0.0) -> None:
        *others, (self.front, self.back) = widths
        self.widths = tuple(others)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        widths = [*self.widths, (self.front, self.back)]
        return x if not any(map(any, widths)) else ops.pad(x, widths, self.value)


class Slice(Module):
    """One (start, stop, step) an axis, None for what is open."""

    def __init__(self, keys: tuple[tuple[int | None, int | None, int | None], ...]) -> None:
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:
        missing = x.ndim - len(self.keys)
        return apply(Index((*self.keys, *[(None, None, None)] * missing)), x)


class Rows(Module):
    """Rows of the operand by number, along one axis, in the place of which `positions` has its."""

    def __init__(self, positions: Array, axis: int = 0) -> None:
        self.positions, self.axis = positions, axis

    def forward(self, x: Tensor) -> Tensor:
        if not -x.ndim <= self.axis < x.ndim:
            raise ShapeError(f"Rows: required an axis of {x.shape}; came {self.axis}")
        axis, k = self.axis % x.ndim, self.positions.ndim
        if axis == 0:
            return ops.take(x, self.positions)
        first = (axis, *(i for i in range(x.ndim) if i != axis))
        rows = ops.take(ops.transpose(x, first), self.positions)
        rest = [k + i for i in range(x.ndim - 1)]
        return ops.transpose(rows, (*rest[:axis], *range(k), *rest[axis:]))


def _tensor(constant: Any) -> Any:
    """The constant as an operand: a trace finds the module's own array in it."""
    return Tensor(constant, copy=False) if isinstance(constant, np.ndarray) else constant


def _size(x: Tensor, axis: int) -> int:
    if axis >= x.ndim:
        raise ShapeError(f"ReshapeTo: no axis {axis} to keep in {x.shape}")
    return x.shape[axis]


def _is_number(i: object) -> bool:
    return isinstance(i, int) and not isinstance(i, bool)
