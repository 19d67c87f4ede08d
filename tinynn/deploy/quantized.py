"""From the graph of a quantised model to layers in 8 bits.

A value that `fake_quantize` rounds to a stored grid is held in bytes. Whatever reads bytes and has
an integer kernel runs on them, if its weights are on a grid, too: the rounding that follows it is
done in its store, after a ReLU between the two. Where other ops read the result, it is float32.
Ops that only move numbers move bytes. All else gets the numbers that the bytes stand for.

Where ranges are found at run time (`quantize.dynamic`), values are float32: a layer with integer
weights rounds what it reads by itself, and others get the rounded numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kernels.geometry import window
from tinynn.compress import integers
from tinynn.deploy.dynamic import (
    DynamicConv,
    DynamicDepthwise,
    DynamicLinear,
    DynamicRound,
)
from tinynn.deploy.integer import (
    UNIT,
    ByteReLU,
    Dequantize,
    Grid,
    IntAdd,
    IntConv,
    IntDepthwise,
    IntGlobalSum,
    IntLinear,
    IntMean,
    IntScaleShift,
    MaxBytes,
    Quantize,
)
from tinynn.deploy.steps import Step
from tinynn.errors import CompileError
from tinynn.graph import Graph, Node, Value
from tinynn.op import Array


class Target(NamedTuple):
    """Where a layer's result goes: through ReLU or not, to a grid or to float32."""

    values: tuple[Value, ...]  # what is made with it, all of them the same
    between: tuple[Value, ...]  # what is never made
    relu: bool
    grid: Grid | None

    @property
    def fields(self) -> dict[str, Any]:
        """As attributes of a step."""
        grid = UNIT if self.grid is None else self.grid
        return {"y": grid, "floating": self.grid is None, "relu": self.relu}


class Quantization:
    """What a graph says of grids: of its values, and of weights."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.grids: dict[int, Grid] = {}  # of values that are held in bytes
        self.weights: dict[int, Node] = {}  # by a weight's value, what rounds it
        self._readers: dict[int, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for v in node.inputs:
                self._readers[v.index].append(node)
            if node.op.name == "fake_quantize" and not node.inputs[0].is_data:
                self.weights[node.output.index] = node

    def grid(self, node: Node) -> Grid:
        """The grid to which a `fake_quantize` of an activation rounds.

        Raises CompileError for grids that are computed, one for each channel, or of more than 256
        numbers.
        """
        arrays = [self.graph.arrays.get(v.index) for v in node.inputs[1:]]
        stored = all(v.is_named for v in node.inputs[1:])
        if not stored or any(a is None or a.size != 1 for a in arrays):
            raise refused(node, "one stored grid for an activation")
        scale, low, high = (float(np.asarray(a).item()) for a in arrays)
        if not (low <= 0 <= high and high - low <= 255 and low >= -255):
            raise refused(node, f"a grid of at most 256 numbers around 0; came {low} ... {high}")
        return float(np.float32(scale)), int(-low), int(high - low)

    def target(self, value: Value, relu: bool = False) -> Target:
        """What becomes of a value that an integer kernel makes."""
        values, output = [value], self.graph.output.index
        readers = self._readers[value.index]
        if len(readers) == 1 and readers[0].op.name == "relu" and value.index != output:
            value, relu = readers[0].output, True
            values.append(value)
            readers = self._readers[value.index]
        rounding = [n for n in readers if n.op.name == "fake_quantize" and not _any(n.op).dynamic]
        grids = {self.grid(n) for n in rounding}
        whole = len(rounding) == len(readers) and value.index != output
        if whole and len(grids) == 1:
            return Target(tuple(n.output for n in rounding), tuple(values), relu, grids.pop())
        return Target(tuple(values[-1:]), tuple(values[:-1]), relu, None)

    def only_reader(self, value: Value) -> Node | None:
        """The op that alone reads a value."""
        readers = self._readers[value.index]
        alone = len(readers) == 1 and value.index != self.graph.output.index
        return readers[0] if alone else None

    def integers(self, node: Node, x_scale: float | None, outputs: int) -> dict[str, Array] | None:
        """The integer weights, scales and biases of an op; None if its weights are on no grid.

        Without a scale of its input, biases are as they are.
        """
        rounding = self.weights.get(node.inputs[1].index)
        if rounding is None:
            return None
        weight, *grid = (self.graph.arrays.get(v.index) for v in rounding.inputs)
        if weight is None or any(a is None for a in grid):
            return None
        scale, low, high = (np.asarray(a) for a in grid)
        if low.min() < -128 or high.max() > 127 or scale.size not in (1, outputs):
            return None
        n, scales = integers.rounded(weight, scale, low, high, outputs)
        found = {"weight": n, "scale": scales}
        if len(node.inputs) > 2:
            bias = self.graph.arrays.get(node.inputs[2].index)
            if bias is None:
                return None
            if x_scale is None:
                found["bias"] = np.array(bias, np.float32)
                return found
            try:
                what = node.path or node.op.name
                found["bias"] = integers.bias_steps(bias, x_scale, scales, what)
            except OverflowError as error:
                raise refused(node, f"biases that int32 holds ({error})") from error
        return found


def refused(node: Node, required: str) -> CompileError:
    """The error for an op that no step expresses."""
    shapes = ", ".join(str(v.shape) for v in node.inputs)
    where = f" in {node.path}" if node.path else ""
    return CompileError(f"compile: {node.op}{where}: required {required}; came shapes {shapes}")


class IntegerLowering:
    """The part of a lowering that makes steps in 8 bits; see `tinynn.deploy.lower`."""

    known: dict[int, Array]  # arrays, by the index of their value
    number: dict[int, int]  # of layers' values, likewise
    append: Callable[..., int]

    def __init__(self, graph: Graph) -> None:
        self.quantization = Quantization(graph)
        self.skipped: set[int] = set()  # values that are never made
        self._numbers: dict[int, int] = {}  # of values in float32 that are also there in bytes
        self._dynamic: dict[int, tuple[int, int]] = {}  # by value: what was rounded, and the bits

    def integer(self, node: Node) -> bool:
        """Whether the node was lowered to a step that reads or makes bytes."""
        lower = _LOWER.get(node.op.name)
        return lower is not None and lower(self, node)

    def _grid(self, node: Node, position: int = 0) -> Grid | None:
        return self.quantization.grids.get(node.inputs[position].index)

    def _bytes(self, node: Node, *positions: int) -> list[int]:
        return [self.number[node.inputs[i].index] for i in positions]

    def _made(self, target: Target, number: int) -> bool:
        self.skipped.update(value.index for value in target.between)
        for value in target.values:
            self.number[value.index] = number
            if target.grid is not None:
                self.quantization.grids[value.index] = target.grid
        return True

    def in_floats(self, value: Value, node: Node | None) -> int:
        """The number of a value in float32, which may have to be made from bytes for `node`."""
        grid = self.quantization.grids.get(value.index)
        if grid is None:
            return self.number[value.index]
        if value.index not in self._numbers:
            source = [self.number[value.index]]
            self._numbers[value.index] = self.append(node, Dequantize(grid), source)
        return self._numbers[value.index]

    def data(self, node: Node, *positions: int) -> list[int]:
        """The numbers of operands that must be computed values, in float32."""
        for i in positions:
            if node.inputs[i].index not in self.number:
                raise refused(node, f"a value computed from the input as operand {i}")
        return [self.in_floats(node.inputs[i], node) for i in positions]

    def moved(self, node: Node) -> tuple[list[int], Grid | None]:
        """The numbers of all operands, in bytes if all lie on one grid, on which the result is."""
        grids = {self._grid(node, i) for i in range(len(node.inputs))}
        grid = grids.pop() if len(grids) == 1 else None
        if grid is None:
            return self.data(node, *range(len(node.inputs))), None
        self.quantization.grids[node.output.index] = grid
        return self._bytes(node, *range(len(node.inputs))), grid

    # --- one method for each op, or for several ---------------------------------------------------

    def quantize(self, node: Node) -> bool:
        if not node.inputs[0].is_data:
            return False
        bits = _any(node.op).dynamic
        if bits:  # a step that nobody reads is dropped
            sources = self.data(node, 0)
            self._dynamic[node.output.index] = sources[0], bits
            self.number[node.output.index] = self.append(node, DynamicRound(bits), sources)
            return True
        grid, source = self.quantization.grid(node), self._grid(node)
        if source == grid:
            (number,) = self._bytes(node, 0)
        else:
            number = self.append(node, Quantize(grid), self.data(node, 0))
        return self._made(Target((node.output,), (), False, grid), number)

    def weighted(self, node: Node) -> bool:
        x, op = self._grid(node), node.op
        if len(node.inputs) < 2 or node.inputs[1].index not in self.known:
            return False
        if node.inputs[0].index in self._dynamic:
            return self._dynamic_weighted(node)
        if x is None:
            return False
        arrays = self.quantization.integers(node, x[0], node.output.shape[-1])
        if arrays is None:
            return False
        target = self.quantization.target(node.output, bool(getattr(op, "relu", False)))
        step = self._weighted_step(node, arrays, {"x": x, **target.fields})
        return self._made(target, self.append(node, step, self._bytes(node, 0), **arrays))

    def _dynamic_weighted(self, node: Node) -> bool:
        arrays = self.quantization.integers(node, None, node.output.shape[-1])
        if arrays is None or node.op.name == "scale_shift":
            return False
        op, (source, bits) = _any(node.op), self._dynamic[node.inputs[0].index]
        fields: dict[str, Any] = {"bits": bits, "relu": bool(getattr(op, "relu", False))}
        if op.name in ("linear", "matmul"):
            step: Step = DynamicLinear(**fields)
        else:
            kind = DynamicConv if op.name == "conv2d" else DynamicDepthwise
            step = kind(*_geometry(node, arrays["weight"]), **fields)
        self.number[node.output.index] = self.append(node, step, [source], **arrays)
        return True

    def _weighted_step(self, node: Node, arrays: dict[str, Array], fields: dict[str, Any]) -> Step:
        op: Any = node.op
        if op.name in ("linear", "matmul"):
            return IntLinear(**fields)
        if op.name == "scale_shift":
            return IntScaleShift(**fields)
        kind = IntConv if op.name == "conv2d" else IntDepthwise
        return kind(*_geometry(node, arrays["weight"]), **fields)

    def add(self, node: Node) -> bool:
        a, b = self._grid(node, 0), self._grid(node, 1)
        target = self.quantization.target(node.output)
        same = node.inputs[0].shape == node.inputs[1].shape
        if a is None or b is None or target.grid is None or not same:
            return False
        step = IntAdd(a, b, target.grid, target.relu)
        return self._made(target, self.append(node, step, self._bytes(node, 0, 1)))

    def mean(self, node: Node) -> bool:
        x, op = self._grid(node), _any(node.op)
        if x is None:
            return False
        shape = node.inputs[0].shape
        win = window(shape[1], shape[2], op.kernel_size, op.stride, op.padding)
        target = self.quantization.target(node.output)
        step = IntMean(win.kernel, win.stride, win.padding, x, **target.fields)
        return self._made(target, self.append(node, step, self._bytes(node, 0)))

    def global_sum(self, node: Node) -> bool:
        """A sum over rows and columns, and the factor behind it that makes it a mean."""
        x, op = self._grid(node), _any(node.op)
        if x is None or len(node.inputs[0].shape) != 4 or op.axes != (1, 2) or op.keepdims:
            return False
        value, scale = node.output, 1.0
        after = self.quantization.only_reader(value)
        if after is not None and after.op.name == "mul":
            factors = [self.known[v.index] for v in after.inputs if v.index in self.known]
            if len(factors) == 1 and factors[0].size == 1:
                value, scale = after.output, float(factors[0].item())
        target = self.quantization.target(value)
        step = IntGlobalSum(scale, x, **target.fields)
        return self._made(target, self.append(node, step, self._bytes(node, 0)))

    def largest(self, node: Node) -> bool:
        x, op = self._grid(node), _any(node.op)
        if x is None:
            return False
        shape = node.inputs[0].shape
        win = window(shape[1], shape[2], op.kernel_size, op.stride, op.padding)
        step = MaxBytes(win.kernel, win.stride, win.padding)
        return self._moved(node, x, self.append(node, step, self._bytes(node, 0)))

    def relu(self, node: Node) -> bool:
        x = self._grid(node)
        if x is None:
            return False
        (number,) = self._bytes(node, 0)
        if x[1]:  # else no byte stands for less than 0
            number = self.append(node, ByteReLU(x[1]), [number])
        return self._moved(node, x, number)

    def _moved(self, node: Node, grid: Grid, number: int) -> bool:
        return self._made(Target((node.output,), (), False, grid), number)


def _geometry(node: Node, weight: Array) -> tuple[Any, Any, Any]:
    """Stride, padding and dilation of a convolution."""
    op, shape = _any(node.op), node.inputs[0].shape
    win = window(shape[1], shape[2], weight.shape[:2], op.stride, op.padding, op.dilation)
    return win.stride, win.padding, win.dilation


def _any(op: Any) -> Any:
    return op


_LOWER: dict[str, Callable[[Any, Node], bool]] = {
    "add": IntegerLowering.add,
    "avg_pool2d": IntegerLowering.mean,
    "conv2d": IntegerLowering.weighted,
    "depthwise_conv2d": IntegerLowering.weighted,
    "fake_quantize": IntegerLowering.quantize,
    "linear": IntegerLowering.weighted,
    "matmul": IntegerLowering.weighted,
    "max_pool2d": IntegerLowering.largest,
    "relu": IntegerLowering.relu,
    "scale_shift": IntegerLowering.weighted,
    "sum": IntegerLowering.global_sum,
}
