"""What is built so far of a Network from an ONNX graph, and how one node of the graph is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinynn.errors import FileFormatError, UnsupportedError
from tinynn.nn.module import Module, Parameter
from tinynn.onnx.network import Function, Given, Network, Step
from tinynn.onnx.source import to_array
from tinynn.onnx.writer import TO_IMAGE, TO_PLAIN, Layout
from tinynn.op import Array

#: widths, strides and sizes in attributes stay below this, which is beyond any image
_LARGEST = 1 << 16

_RESERVED = {"inputs", "steps", "outputs", "training"}


class Data(NamedTuple):
    """A value by its number in the Network; "image" where the file's NCHW is held as NHWC."""

    number: int
    layout: Layout = "plain"
    #: whether it is an image of one pixel, so that both orders are one
    pixel: bool = False


class Builder:
    """Collects parts and steps; knows each name's constant or value."""

    def __init__(self, library: Any, model: Any, version: int) -> None:
        self.library = library
        self.model = model
        self.version = version
        self.constants: dict[str, Array] = {}
        self.trained: set[str] = set()  #: names of initialisers
        self.values: dict[str, Data] = {}
        self.rounded: dict[str, tuple[Data, float, int]] = {}  #: as integers; scale, zero point
        #: by name what is clipped, where, and what makes it so when it is asked for
        self.clipped: dict[str, tuple[Data, list[float | None], Callable[[], Data]]] = {}
        self.scales: dict[str, Array] = {}  #: of constants that lie on grids
        self.parts: dict[str, Module] = {}
        self.steps: list[Step] = []
        self.inputs = 0
        self.others: dict[Data, Data] = {}  #: a value's twin in the other layout
        self.shared: dict[tuple[str, str], Parameter] = {}
        self.inferred: dict[str, tuple[int | None, ...]] | None = None

    def add_input(self, name: str) -> None:
        """The next input of the Network."""
        self.values[name] = Data(self.inputs)
        self.inputs += 1

    def add(
        self, name: str, part: Module, operands: Sequence[Data], layout: Layout = "plain"
    ) -> Data:
        """Run a new part on these values; its result."""
        found = self._unique(name)
        self.parts[found] = part
        self.steps.append((found, tuple(d.number for d in operands)))
        return Data(self.inputs + len(self.steps) - 1, layout)

    def data(self, name: str) -> Data:
        """The value of this name; a constant becomes one that a part gives."""
        if name in self.rounded:
            raise UnsupportedError(
                f"onnx.load: {name!r} are integers, which only DequantizeLinear may read"
            )
        if name not in self.values and name in self.clipped:
            self.values[name] = self.clipped[name][2]()
        if name not in self.values:
            if name not in self.constants:
                raise FileFormatError(f"onnx.load: there is no value {name!r}")
            self.values[name] = self.add(name, Given(self.floats(name)), [])
        return self.values[name]

    def floats(self, name: str) -> Array:
        """A constant that takes part in the computation."""
        array = self.constants[name]
        if array.dtype not in (np.float32, np.float64):
            raise UnsupportedError(f"onnx.load: {name!r} is of {array.dtype}, where floats are met")
        return np.array(array, order="C")

    def plain(self, value: Data) -> Data:
        """The value with its axes in the file's order."""
        if value.layout == "plain":
            return value
        return self._other(value, "to_nchw", TO_IMAGE, "plain")

    def image(self, value: Data) -> Data:
        """The value, NCHW in the file, as NHWC."""
        if value.layout == "image":
            return value
        return self._other(value, "to_nhwc", TO_PLAIN, "image")

    def parameter(self, name: str, form: str, values: Array) -> Parameter:
        """The Parameter for this form of a constant, the same one for whoever asks again."""
        key = (name, form)
        if key not in self.shared:
            if values.dtype not in (np.float32, np.float64):
                raise UnsupportedError(f"onnx.load: weights {name!r} are of {values.dtype}")
            self.shared[key] = Parameter(np.ascontiguousarray(values))
        return self.shared[key]

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """The sizes of a value as far as the file's shapes say, None for what they leave open."""
        if name in self.constants:
            return self.constants[name].shape
        if self.inferred is None:
            self.inferred = self._infer()
        return self.inferred.get(name)

    def _infer(self) -> dict[str, tuple[int | None, ...]]:
        try:
            graph = self.library.shape_inference.infer_shapes(self.model).graph
        except (self.library.shape_inference.InferenceError, ValueError, RuntimeError):
            graph = self.model.graph
        found = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            kind = value.type.tensor_type
            if kind.HasField("shape"):
                sizes = (d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
                found[value.name] = tuple(sizes)
        return found

    def _other(self, value: Data, name: str, axes: tuple[int, ...], layout: Layout) -> Data:
        if value not in self.others:
            moved = self.add(name, Function("transpose", axes=axes), [value], layout)
            self.others[value] = moved
        return self.others[value]

    def _unique(self, name: str) -> str:
        """An attribute's name that is like `name`, and free."""
        base = re.sub(r"\W", "_", name, flags=re.ASCII).strip("_")[:100] or "node"
        if base[0].isdigit():
            base = f"n{base}"
        found, number = base, 1
        while found in self.parts or found in _RESERVED or hasattr(Network, found):
            found, number = f"{base}_{number}", number + 1
        return found


class Call:
    """One node of the graph: operands, attributes, and where its result goes.

    An attribute that nobody asked for is refused when the call is closed.
    """

    def __init__(self, builder: Builder, node: Any, name: str) -> None:
        self.builder = builder
        self.node = node
        self.name = name
        self.kind: str = node.op_type
        self.attributes = {a.name: a for a in node.attribute}

    def __len__(self) -> int:
        """The number of operands, those left out at the end not counted."""
        given = [i for i, name in enumerate(self.node.input) if name]
        return given[-1] + 1 if given else 0

    def refuse(self, what: str) -> UnsupportedError:
        """The error for what has no counterpart; the caller raises it."""
        return UnsupportedError(f"onnx.load: {self.kind} of node {self.name!r}: {what}")

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute (numbers, text, or an array), or the default."""
        proto = self.attributes.pop(name, None)
        if proto is None:
            return default
        value = self.builder.library.helper.get_attribute_value(proto)
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        if isinstance(value, int | float):
            return value
        if isinstance(value, self.builder.library.TensorProto):
            return to_array(self.builder.library, value)
        values = tuple(value)
        if all(isinstance(v, int | float) for v in values):
            return values
        raise self.refuse(f"attribute {name}")

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse an attribute of any other value than these (the first is the default)."""
        if (came := self.attribute(name, allowed[0])) not in allowed:
            raise self.refuse(f"attribute {name}={came!r}")

    def sizes(self, name: str, count: int, default: int | None = None) -> tuple[int, ...]:
        """An attribute of `count` whole numbers that are no larger than an image can be."""
        value = self.attribute(name, None if default is None else (default,) * count)
        if value is None:
            raise self.refuse(f"attribute {name} is missing")
        if not isinstance(value, tuple) or len(value) != count:
            raise self.refuse(f"attribute {name}={value!r}: required {count} numbers")
        if not all(isinstance(v, int) and 0 <= v < _LARGEST for v in value):
            raise self.refuse(f"attribute {name}={value!r}: out of bounds")
        return value

    def has(self, i: int) -> bool:
        """Whether operand i is given."""
        return i < len(self.node.input) and bool(self.node.input[i])

    def operand(self, i: int) -> str:
        """The name of operand i."""
        if not self.has(i):
            raise self.refuse(f"operand {i} is missing")
        return self.node.input[i]

    def is_constant(self, i: int) -> bool:
        """Whether operand i is an initialiser or a Constant."""
        return self.operand(i) in self.builder.constants

    def constant(self, i: int, what: str) -> Array:
        """Operand i, which must be an initialiser or a Constant."""
        name = self.operand(i)
        if name not in self.builder.constants:
            raise self.refuse(f"{what} ({name!r}) must be an initializer, not computed")
        return self.builder.constants[name]

    def whole(self, i: int, what: str) -> tuple[int, ...]:
        """Operand i as whole numbers."""
        array = self.constant(i, what)
        if array.dtype.kind not in "iu" or array.ndim > 1:
            raise self.refuse(f"{what}: required a vector of integers; came {array.dtype}")
        return tuple(int(n) for n in array.reshape(-1))

    def parameter(self, i: int, form: str, values: Array) -> Parameter:
        """The Parameter for this form of operand i."""
        return self.builder.parameter(self.operand(i), form, values)

    def data(self, i: int) -> Data:
        """Operand i as it stands."""
        return self.builder.data(self.operand(i))

    def plain(self, i: int) -> Data:
        """Operand i with the file's order of axes."""
        return self.builder.plain(self.data(i))

    def image(self, i: int) -> Data:
        """Operand i, NCHW in the file, as NHWC; refused if it is known not to have four axes."""
        if self.rank(i) not in (None, 4):
            raise self.refuse(f"an operand of {self.rank(i)} axes; required images of 4")
        return self.builder.image(self.data(i))

    def shape(self, i: int) -> tuple[int | None, ...] | None:
        """The sizes of operand i as far as they are known."""
        return self.builder.shape(self.operand(i))

    def rank(self, i: int) -> int | None:
        """The number of axes of operand i, if it is known."""
        if self.operand(i) in self.builder.values and self.data(i).layout == "image":
            return 4
        shape = self.shape(i)
        return None if shape is None else len(shape)

    def add(self, part: Module, operands: Sequence[Data], layout: Layout = "plain") -> Data:
        """Run a new part, named after the node, on these values."""
        return self.builder.add(self.name, part, operands, layout)

    def result(self, value: Data) -> None:
        """The node's first result; others must not be asked for."""
        if any(self.node.output[1:]):
            raise self.refuse(f"output {self.node.output[1]!r} besides the first")
        self.builder.values[self.node.output[0]] = value

    def close(self) -> None:
        """Refuse attributes that nobody asked for."""
        if self.attributes:
            raise self.refuse(f"attribute {sorted(self.attributes)[0]}")
