"""What is written so far of an ONNX graph, and in which order of axes each value stands there.

Values of tinynn are NHWC, the image operators of ONNX take NCHW. Each value is written in the
order in which its operator makes it; a Transpose follows only where somebody needs the other order,
once for all who do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def array(self, node: Node, value: Value) -> Array:
        """The values of a parameter, buffer or constant; refuses what is computed."""
        if value.is_data:
            raise UnsupportedError(
                f"onnx.export: {node.op.name} in {node.path!r} has an operand of shape "
                f"{value.shape} that is computed, where ONNX requires an initializer"
            )
        return self.graph.arrays[value.index]

    def layout(self, value: Value) -> Layout:
        """The order in which a value stands in the file; NCHW if it stands there in both."""
        return "image" if (value.index, "image") in self.names else "plain"

    def plain(self, value: Value) -> str:
        """The name of a value whose axes are in tinynn's order."""
        if not value.is_data:
            return self.store(value, "plain", self.graph.arrays[value.index])
        return self._named(value, "plain", "image", TO_PLAIN)

    def image(self, value: Value) -> str:
        """The name of a value (B, H, W, C) as (B, C, H, W)."""
        if not value.is_data:
            array = self.graph.arrays[value.index].transpose(TO_IMAGE)
            return self.store(value, "image", array)
        return self._named(value, "image", "plain", TO_IMAGE)

    def rows(self, value: Value) -> str:
        """The name of a value whose elements are in tinynn's row-major order, whatever its axes."""
        image = self.names.get((value.index, "image"))
        if image is not None:
            _, height, width, channels = value.shape
            if channels == 1 or height == width == 1:
                return image
        return self.plain(value)

    def store(self, value: Value, form: str, array: Array) -> str:
        """The name of an initialiser with this form of a value; the parameter's own if free."""
        key = (value.index, form)
        if key not in self.stored:
            self.stored[key] = self.constant(value.name or "constant", array)
        return self.stored[key]

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
