"""From the graph of a model in eval mode to layers: what depends on no input is computed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernels.geometry import window
from tinynn.deploy.additive import AdditiveConv, AdditiveLinear
from tinynn.deploy.dynamic import DynamicRound
from tinynn.deploy.origin import Origin
from tinynn.deploy.quantized import IntegerLowering, refused
from tinynn.deploy.steps import (
    Activation,
    Add,
    Arrays,
    Concat,
    Conv,
    ConvTranspose,
    Depthwise,
    GlobalSum,
    Layer,
    Linear,
    Pad,
    Pool,
    Reshape,
    ScaleShift,
    Scatter,
    Step,
)
from tinynn.deploy.transpose import Transpose, transposed
from tinynn.errors import CompileError, DTypeError, ShapeError
from tinynn.graph import Graph, Node
from tinynn.op import Array, Shape
from tinynn.ops.hashing import Hashed


@dataclass
class Sketch:
    """Layers in the making: the shape of each value without the batch, and which is the result."""

    shapes: list[Shape]
    layers: list[Layer] = field(default_factory=list)
    output: int = 0

    def append(
        self,
        step: Step,
        inputs: Sequence[int],
        arrays: Arrays | None = None,
        path: str = "",
        origin: Origin | None = None,
    ) -> int:
        """Add a layer behind the others and return the number of the value it makes."""
        arrays = arrays or {}
        self.shapes.append(step.result([self.shapes[i] for i in inputs], arrays))
        number = len(self.shapes) - 1
        self.layers.append(Layer(step, tuple(inputs), number, arrays, path, origin=origin))
        return number


def lower(graph: Graph) -> Sketch:
    """The graph as layers. Raises CompileError, which names the op, for what no step expresses."""
    if graph.input.dtype != np.float32:
        raise DTypeError(f"compile: required an example of float32; came {graph.input.dtype}")
    return _Lowering(graph).run()


class _Lowering(IntegerLowering):
    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.graph = graph
        self.batch = graph.input.shape[0]
        self.known: dict[int, Array] = dict(graph.arrays)
        self.sketch = Sketch([graph.input.shape[1:]])
        self.number = {graph.input.index: 0}
        self.origins: dict[int, Origin] = {}

    def run(self) -> Sketch:
        for node in self.graph.nodes:
            if node.output.index in self.number or node.output.index in self.skipped:
                continue  # made together with what it reads
            if all(v.index in self.known for v in node.inputs):
                arrays = [self.known[v.index] for v in node.inputs]
                self.known[node.output.index] = np.asarray(node.op.forward(*arrays)[0])
                if isinstance(node.op, Hashed):
                    self.origins[node.output.index] = Origin(node.op, _single(arrays[0]))
                continue
            if node.output.shape[:1] != (self.batch,):
                raise refused(node, f"a result whose first axis is the batch of {self.batch}")
            try:
                self._lowered(node)
            except ShapeError as error:
                raise refused(node, f"operands that a step takes ({error})") from error
        out = self.graph.output
        if out.index not in self.number:
            raise CompileError("compile: the model's result does not depend on its input")
        self.sketch.output = self.in_floats(out, None)
        self._drop_unread()
        return self.sketch

    def _lowered(self, node: Node) -> None:
        if self.integer(node):
            return
        lower = _LOWER.get(node.op.name)
        if lower is None:
            raise refused(node, f"one of the ops {', '.join(sorted(_LOWER))}")
        self.number[node.output.index] = lower(self, node)

    def _drop_unread(self) -> None:
        """Leave out what was rounded for layers that round by themselves, or turned back."""
        read = {self.sketch.output}.union(*(a.inputs for a in self.sketch.layers))
        self.sketch.layers = [
            a
            for a in self.sketch.layers
            if a.output in read or not isinstance(a.step, DynamicRound | Transpose)
        ]

    def weights(self, node: Node, first: int) -> list[Array]:
        """The operands from `first` on, which must not depend on the input: float32 copies."""
        out = []
        for i, v in enumerate(node.inputs[first:], first):
            if v.index not in self.known:
                raise refused(node, f"operand {i} that does not depend on the input")
            out.append(_single(self.known[v.index]))
        return out

    def append(self, node: Node | None, step: Step, inputs: Sequence[int], **arrays: Array) -> int:
        path, origin = "" if node is None else node.path, None
        if node is not None and len(node.inputs) > 1 and isinstance(step, Conv | Linear):
            origin = self.origins.get(node.inputs[1].index)
        return self.sketch.append(step, inputs, arrays, path, origin)

    # --- one method for each op, or for several ---------------------------------------------------

    def biased(self, node: Node) -> dict[str, Array]:
        return dict(zip(("weight", "bias"), self.weights(node, 1), strict=False))

    def windowed(self, node: Node) -> int:
        op: Any = node.op
        kind = Conv if op.name == "conv2d" else Depthwise
        shape, arrays = node.inputs[0].shape, self.biased(node)
        kernel = arrays["weight"].shape[:2]
        win = window(shape[1], shape[2], kernel, op.stride, op.padding, op.dilation)
        step = kind(win.stride, win.padding, win.dilation, op.relu)
        return self.append(node, step, self.data(node, 0), **arrays)

    def conv_transpose2d(self, node: Node) -> int:
        op: Any = node.op
        arrays, size = self.biased(node), node.output.shape[1:3]
        win = window(size[0], size[1], arrays["weight"].shape[:2], op.stride, op.padding)
        step = ConvTranspose((size[0], size[1]), win.stride, win.padding, op.relu)
        return self.append(node, step, self.data(node, 0), **arrays)

    def linear(self, node: Node) -> int:
        relu = bool(getattr(node.op, "relu", False))
        return self.append(node, Linear(relu), self.data(node, 0), **self.biased(node))

    def additive(self, node: Node) -> int:
        return self.append(node, AdditiveLinear(), self.data(node, 0), **self.biased(node))

    def additive_conv2d(self, node: Node) -> int:
        op: Any = node.op
        shape, arrays = node.inputs[0].shape, self.biased(node)
        kernel = arrays["weight"].shape[:2]
        win = window(shape[1], shape[2], kernel, op.stride, op.padding, op.dilation)
        step = AdditiveConv(win.stride, win.padding, win.dilation)
        return self.append(node, step, self.data(node, 0), **arrays)

    def batch_norm_eval(self, node: Node) -> int:
        op: Any = node.op
        gamma, beta, mean, variance = (a.astype(np.float64) for a in self.weights(node, 1))
        scale = gamma / np.sqrt(variance + op.eps)
        return self.scaled(node, scale, beta - mean * scale, op.relu)

    def scale_shift(self, node: Node) -> int:
        op: Any = node.op
        scale, shift = self.weights(node, 1)
        return self.scaled(node, scale, shift, op.relu)

    def scaled(self, node: Node, scale: Array, shift: Array, relu: bool = False) -> int:
        arrays = {"scale": _single(scale), "shift": _single(shift)}
        position = next(i for i, v in enumerate(node.inputs) if v.index in self.number)
        return self.append(node, ScaleShift(relu), self.data(node, position), **arrays)

    def arithmetic(self, node: Node) -> int:
        name, (a, b) = node.op.name, node.inputs
        if a.index in self.number and b.index in self.number:
            if name != "add" or a.shape != b.shape:
                raise refused(
                    node, "a sum of two values of one shape, or one operand that is constant"
                )
            return self.append(node, Add(), self.data(node, 0, 1))
        left = a.index in self.number
        c = self.constant(node, 1 if left else 0)
        one, none = np.ones_like(c), np.zeros_like(c)
        with np.errstate(all="ignore"):
            if name == "add":
                return self.scaled(node, one, c)
            if name == "mul":
                return self.scaled(node, c, none)
            if name == "sub":
                return self.scaled(node, one, -c) if left else self.scaled(node, -one, c)
            if not left:
                raise refused(node, "a constant divisor")
            return self.scaled(node, 1 / c, none)

    def constant(self, node: Node, position: int) -> Array:
        """A constant operand as one number for each channel."""
        value, shape = node.inputs[position], node.output.shape
        came = self.known[value.index].astype(np.float64)
        channels = shape[-1:] if len(shape) > 1 else (0,)
        one_each = came.size == channels[0] and came.shape[-1:] == channels
        if node.inputs[1 - position].shape != shape or not (came.size == 1 or one_each):
            raise refused(node, "a constant with one number, or one for each channel")
        return np.broadcast_to(came.reshape(-1), channels)

    def neg(self, node: Node) -> int:
        channels = node.output.shape[-1:]
        return self.scaled(node, np.full(channels, -1.0), np.zeros(channels))

    def activation(self, node: Node) -> int:
        op: Any = node.op
        last = len(node.output.shape) - 1
        if op.name == "softmax" and (last < 1 or op.axis % (last + 1) != last):
            raise refused(node, f"the last axis, and not the batch; came axis {op.axis}")
        return self.append(node, Activation(node.op.name), self.data(node, 0))

    def pool(self, node: Node) -> int:
        op: Any = node.op
        shape = node.inputs[0].shape
        win = window(shape[1], shape[2], op.kernel_size, op.stride, op.padding)
        step = Pool(op.name == "avg_pool2d", win.kernel, win.stride, win.padding)
        return self.append(node, step, self.data(node, 0))

    def sum(self, node: Node) -> int:
        op: Any = node.op
        if len(node.inputs[0].shape) != 4 or op.axes != (1, 2):
            raise refused(node, "a sum over the rows and columns of images (B, H, W, C)")
        number = self.append(node, GlobalSum(), self.data(node, 0))
        if op.keepdims:
            number = self.append(node, Reshape(node.output.shape[1:]), [number])
        return number

    def reshape(self, node: Node) -> int:
        return self.append(node, Reshape(node.output.shape[1:]), self.moved(node)[0])

    def transpose(self, node: Node) -> int:
        op: Any = node.op
        if op.axes[0] != 0:
            raise refused(node, "the batch as the first axis of the result")
        (number,), axes = self.moved(node)[0], tuple(a - 1 for a in op.axes[1:])
        step, number = transposed(self.sketch.layers, self.sketch.shapes, number, axes)
        return number if step is None else self.append(node, step, [number])

    def concat(self, node: Node) -> int:
        op: Any = node.op
        if op.axis == 0:
            raise refused(node, "another axis than the batch")
        return self.append(node, Concat(op.axis - 1), self.moved(node)[0])

    def pad(self, node: Node) -> int:
        op: Any = node.op
        if max(op.widths[0]) > 0:
            raise refused(node, "no padding of the batch")
        (number,), grid = (self.data(node, 0), None) if op.value else self.moved(node)
        value = float(grid[1]) if grid else op.value
        widths = op.widths[1:]
        framed = [i for i, pair in enumerate(widths) if max(pair) > 0]
        for axes in (framed[i : i + 2] for i in range(0, len(framed), 2)):
            some = tuple(pair if i in axes else (0, 0) for i, pair in enumerate(widths))
            number = self.append(node, Pad(some, value), [number])
        return number

    def scatter(self, node: Node) -> int:
        op: Any = node.op
        numbers, grid = (self.data(node, 0), None) if op.value else self.moved(node)
        step = Scatter(op.width, float(grid[1] if grid else op.value))
        return self.append(node, step, numbers, places=np.array(op.places, np.int32))


_LOWER: dict[str, Callable[[_Lowering, Node], int]] = {
    "add": _Lowering.arithmetic,
    "additive": _Lowering.additive,
    "additive_conv2d": _Lowering.additive_conv2d,
    "avg_pool2d": _Lowering.pool,
    "batch_norm_eval": _Lowering.batch_norm_eval,
    "concat": _Lowering.concat,
    "conv2d": _Lowering.windowed,
    "conv_transpose2d": _Lowering.conv_transpose2d,
    "depthwise_conv2d": _Lowering.windowed,
    "div": _Lowering.arithmetic,
    "linear": _Lowering.linear,
    "matmul": _Lowering.linear,
    "max_pool2d": _Lowering.pool,
    "mul": _Lowering.arithmetic,
    "neg": _Lowering.neg,
    "pad": _Lowering.pad,
    "relu": _Lowering.activation,
    "reshape": _Lowering.reshape,
    "scale_shift": _Lowering.scale_shift,
    "scatter": _Lowering.scatter,
    "sigmoid": _Lowering.activation,
    "softmax": _Lowering.activation,
    "sub": _Lowering.arithmetic,
    "sum": _Lowering.sum,
    "tanh": _Lowering.activation,
    "transpose": _Lowering.transpose,
}


def _single(array: Array) -> Array:
    """A copy of its own, C-contiguous, of float32."""
    return np.array(array, np.float32, order="C")
