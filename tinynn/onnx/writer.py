"""What is written so far of an ONNX graph, and in which order of axes each value stands there.

Values of tinynn are NHWC, the image operators of ONNX take NCHW. Each value is written in the
order in which its operator makes it; a Transpose follows only where somebody needs the other order,
once for all who do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tinynn.errors import UnsupportedError
from tinynn.graph import Graph, Node, Value
from tinynn.op import Array

#: "plain": the axes as tinynn has them; "image": NCHW, of a value that is NHWC in tinynn
Layout = Literal["plain", "image"]

TO_IMAGE, TO_PLAIN = (0, 3, 1, 2), (0, 2, 3, 1)
#: where axis i of an NHWC value lies in NCHW
IMAGE_AXIS = (0, 2, 3, 1)

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class Grid:
    """Numbers that are rounded to scale n for whole n in low ... high, which broadcast to them."""

    numbers: Array
    scale: Array
    low: Array
    high: Array

    def steps(self) -> Array:
        """The whole numbers n, which must fit int8."""
        if self.low.min() < -128 or self.high.max() > 127:
            raise UnsupportedError(
                f"onnx.export: weights on a grid of {self.low.min()} to {self.high.max()}; "
                "required what int8 holds"
            )
        return np.clip(np.rint(self.numbers / self.scale), self.low, self.high)


class Writer:
    """Collects nodes and initialisers; knows each traced value's name in each layout."""

    def __init__(self, library: Any, graph: Graph) -> None:
        self.library = library
        self.graph = graph
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.names: dict[tuple[int, Layout], str] = {(graph.input.index, "plain"): INPUT}
        self.taken = {INPUT, OUTPUT}
        self.stored: dict[tuple[int, str], str] = {}
        #: what does not depend on the input, by the value's index, and what to call it
        self.constants = dict(graph.arrays)
        self.titles: dict[int, str] = {}
        #: weights that lie on a grid, by the value's index
        self.grids: dict[int, Grid] = {}
        #: activations on grids found at run time: see `tinynn.onnx.dynamic`
        self.rounded: dict[int, Any] = {}
        #: what writes a value that nobody has needed so far
        self.later: dict[int, Callable[[], None]] = {}

    def is_data(self, value: Value) -> bool:
        """Whether a value depends on the model's input."""
        return value.index not in self.constants

    def fold(self, node: Node) -> bool:
        """Compute a node at once if it does not depend on the model's input; whether it was."""
        if any(map(self.is_data, node.inputs)):
            return False
        arrays = [self.constants[v.index] for v in node.inputs]
        index = node.output.index
        self.constants[index] = node.op.forward(*arrays)[0]
        first = node.inputs[0]
        self.titles[index] = first.name or self.titles.get(first.index, "")
        if node.op.name == "fake_quantize":
            self.grids[index] = Grid(*arrays)
        return True

    def array(self, node: Node, value: Value) -> Array:
        """The values of what does not depend on the input; refuses what does."""
        if self.is_data(value):
            raise UnsupportedError(
                f"onnx.export: {node.op.name} in {node.path!r} has an operand of shape "
                f"{value.shape} that is computed, where ONNX requires an initializer"
            )
        return self.constants[value.index]

    def layout(self, value: Value) -> Layout:
        """The order in which a value stands in the file; NCHW if it stands there in both."""
        if value.index in self.later:
            self.later.pop(value.index)()
        return "image" if (value.index, "image") in self.names else "plain"

    def plain(self, value: Value) -> str:
        """The name of a value whose axes are in tinynn's order."""
        if not self.is_data(value):
            return self.store(value, "plain", lambda array: array)
        return self._named(value, "plain", "image", TO_PLAIN)

    def image(self, value: Value) -> str:
        """The name of a value (B, H, W, C) as (B, C, H, W)."""
        if not self.is_data(value):
            return self.store(value, "image", lambda array: array.transpose(TO_IMAGE))
        return self._named(value, "image", "plain", TO_IMAGE)

    def rows(self, value: Value) -> str:
        """The name of a value whose elements are in tinynn's row-major order, whatever its axes."""
        if self.layout(value) == "image":
            image = self.names[value.index, "image"]
            _, height, width, channels = value.shape
            if channels == 1 or height == width == 1:
                return image
        return self.plain(value)

    def store(self, value: Value, form: str, move: Callable[[Array], Array]) -> str:
        """The name of an initialiser with this form of a value; the parameter's own if free.

        Weights on a grid are stored as their integers, which a DequantizeLinear makes numbers.
        """
        key = (value.index, form)
        if key not in self.stored:
            title = value.name or self.titles.get(value.index) or "constant"
            if value.index in self.grids:
                self.stored[key] = self._integers(title, self.grids[value.index], move)
            else:
                self.stored[key] = self.constant(title, move(self.constants[value.index]))
        return self.stored[key]

    def _integers(self, title: str, grid: Grid, move: Callable[[Array], Array]) -> str:
        steps = move(grid.steps())
        scale = move(np.broadcast_to(grid.scale, grid.numbers.shape))
        axis = 0
        if grid.scale.size == 1:
            vector = grid.scale.reshape(())
        else:  # one scale a channel: along the axis that the scales vary over
            vector, axis = _along(scale)
        inputs = [
            self.constant(title, steps, "int8"),
            self.constant(f"{title}_scale", vector),
            self.constant(f"{title}_zero", np.zeros(vector.shape), "int8"),
        ]
        return self._emit(f"{title}/DequantizeLinear", "DequantizeLinear", inputs, {"axis": axis})

    def constant(self, name: str, array: Any, dtype: Any = None) -> str:
        """The name of a new initialiser, `name` if that is free."""
        name = self._unique(name)
        values = np.array(array, dtype, order="C")
        self.initializers[name] = self.library.numpy_helper.from_array(values, name)
        return name

    def emit(self, node: Node, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Write an operator named after the module in which `node` ran; its result's name."""
        return self._emit(f"{node.path or 'model'}/{kind}", kind, inputs, attributes)

    def put(self, node: Node, name: str, layout: Layout) -> None:
        """Say that `name` is the result of `node` in this layout, after its ReLU if it has one."""
        if getattr(node.op, "relu", False):
            name = self.emit(node, "Relu", [name])
        self.names[node.output.index, layout] = name

    def finish(self) -> tuple[list[Any], list[Any]]:
        """The nodes, with the model's result under its own name, and the initialisers."""
        result = self.plain(self.graph.output)
        if not any(result in node.output for node in self.nodes):
            result = self._emit("model/Identity", "Identity", [result], {})
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == result:
                        names[i] = OUTPUT
        return self.nodes, list(self.initializers.values())

    def _named(self, value: Value, wanted: Layout, other: Layout, axes: tuple[int, ...]) -> str:
        key = (value.index, wanted)
        self.layout(value)  # it may have to be written first
        if key not in self.names:
            source = self.names[value.index, other]
            path = source.removesuffix("_output") + f"/to_{'nchw' if wanted == 'image' else 'nhwc'}"
            self.names[key] = self._emit(path, "Transpose", [source], {"perm": axes})
        return self.names[key]

    def _emit(self, name: str, kind: str, inputs: Sequence[str], attributes: Any) -> str:
        name = self._unique(name)
        result = self._unique(f"{name}_output")
        make: Callable[..., Any] = self.library.helper.make_node
        self.nodes.append(make(kind, list(inputs), [result], name=name, **attributes))
        return result

    def _unique(self, name: str) -> str:
        found, number = name, 1
        while found in self.taken:
            found, number = f"{name}_{number}", number + 1
        self.taken.add(found)
        return found


def _along(scale: Array) -> tuple[Array, int]:
    """The one axis over which an array varies, and its values along that."""
    for axis in range(scale.ndim):
        first = scale[tuple(slice(None) if a == axis else slice(1) for a in range(scale.ndim))]
        if (first == scale).all():
            return first.reshape(-1), axis
    raise UnsupportedError("onnx.export: weights whose scales vary along more than one axis")
