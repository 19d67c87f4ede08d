"""What the integer kernels and files need of a quantised model: grids, integer weights, bytes.

`grids(graph)` says on which grid each value of a traced model lies; `layer(...)` gives a layer's
integers; `tensors(model)` are the arrays that a file has to hold, packed, and `nbytes` their size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinynn.errors import ConfigError
from tinynn.graph import Graph, Node
from tinynn.nn.conv import DepthwiseConv2d
from tinynn.nn.module import Module
from tinynn.nn.quantized import HalfQuantizer, Quantized, Quantizer, bits_of
from tinynn.op import Array
from tinynn.ops.shape import Pad, Scatter

#: ops whose result lies on the grid of their operand: they move numbers, drop some, or add zeros
MOVES = ("max_pool2d", "reshape", "transpose", "index", "take", "relu", "pad", "scatter")
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Grid:
    """The numbers scale n for whole n in low ... high, of an activation: three plain numbers."""

    scale: np.float32
    low: int
    high: int

    @property
    def zero(self) -> int:
        """The zero point: the byte n - low of the number 0."""
        return -self.low


@dataclass(frozen=True)
class Integers:
    """A layer in integers: r = w_scale[n] weight, and biases in units of x_scale w_scale[n]."""

    weight: Array  #: int8, of the float weights' shape
    scale: Array  #: (N,) float32
    bias: Array | None  #: (N,) int32


def grids(graph: Graph, model: Module) -> dict[int, Grid]:
    """For the index of each value that lies on one known grid, that grid.

    A value is on a grid if `fake_quantize` made it with stored numbers, or if it came from such a
    one through ops that only move numbers, or side by side from several on the same grid.
    """
    stored: dict[str, Any] = dict(model.named_buffers()) | dict(model.named_parameters())
    found: dict[int, Grid] = {}
    for node in graph.nodes:
        if node.op.name == "fake_quantize":
            scale, low, high = (v.name for v in node.inputs[1:])
            arrays = [np.asarray(stored[n]) for n in (scale, low, high) if n in stored]
            if node.inputs[0].is_data and len(arrays) == 3 and all(a.size == 1 for a in arrays):
                number, least, most = (a.item() for a in arrays)
                found[node.output.index] = Grid(np.float32(number), int(least), int(most))
        elif keeps_grid(node):
            sources = {found.get(v.index) for v in node.inputs if v.is_data}
            only = sources.pop() if len(sources) == 1 else None
            if only is not None:
                found[node.output.index] = only
    return found


def keeps_grid(node: Node) -> bool:
    """Whether the op's result lies on the grid on which all its operands lie."""
    if isinstance(node.op, Pad | Scatter):
        return node.op.value == 0
    return node.op.name in MOVES or node.op.name == "concat"


def layer(module: Quantized, x_scale: float | None = None) -> Integers:
    """The integers of a layer whose input lies on a grid of this scale; without one, no biases.

    Raises ConfigError for a layer without integer weights, OverflowError for a bias beyond int32.
    """
    quantizer, inner = module.weight, module.layer
    if not isinstance(quantizer, Quantizer):
        raise ConfigError(f"integers.layer: {type(inner).__name__} has no integer weights")
    weight, bias = inner.weight.data, inner.bias  # type: ignore[attr-defined]
    outputs = bias.size if bias is not None else _outputs(inner, quantizer.low)
    grid = np.asarray(quantizer.scale), quantizer.low, quantizer.high
    n, scales = rounded(weight, *grid, outputs)
    if bias is None or x_scale is None:
        return Integers(n, scales, None)
    return Integers(n, scales, bias_steps(bias.data, x_scale, scales, type(inner).__name__))


def _outputs(layer: Any, low: Array) -> int:
    if low.size > 1:
        return low.size
    shape = layer.weight.shape
    return math.prod(shape[-2:]) if isinstance(layer, DepthwiseConv2d) else shape[-1]


def rounded(
    weight: Array, scale: Array, low: Array, high: Array, outputs: int
) -> tuple[Array, Array]:
    """The integers of weights on these grids, int8, and a scale for each output, (N,) float32."""
    n = np.clip(np.rint(weight / scale), low, high).astype(np.int8)
    return n, np.broadcast_to(scale.reshape(-1), outputs).astype(np.float32)


def bias_steps(bias: Array, x_scale: float, scales: Array, what: str) -> Array:
    """Biases (N,) in units of x_scale scales[n], rounded, int32.

    Raises OverflowError, which names `what`, for one beyond int32.
    """
    whole = np.rint(bias.astype(np.float64) / (scales.astype(np.float64) * float(x_scale)))
    worst = np.abs(whole).argmax()
    if np.abs(whole[worst]) > _LARGEST:
        raise OverflowError(
            f"integers.layer: a bias of {what} is {np.abs(whole[worst]):.3g} steps of its sum; "
            f"expected at most {_LARGEST}. A step is the scale of its input, {x_scale:.3g}, times "
            f"that of its weights, {scales[worst]:.3g}: a learned one that has come close to 0 "
            "wants a lower learning rate"
        )
    return whole.astype(np.int32)


def tensors(model: Module) -> dict[str, Array]:
    """Everything that a file has to hold of the model's numbers, each array by its path.

    Integer weights are packed (`pack`), those of fewer bits first where channels have different
    numbers of bits, which take a byte a channel then; scales are float32, biases of layers with
    integer weights take 4 bytes, a grid of an activation a scale, a zero point and its bits.
    Rounded halves are float16. All else is as it is.
    """
    found: dict[str, Array] = {}
    inside: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Quantized):
            found |= _of_layer(f"{path}." if path else "", module)
            parts = [m for m in (module.input, module.weight, module.output) if m is not None]
            inside.update(id(v) for part in parts for v in vars(part).values())
            if module.weight is not None:
                own: Any = module.layer
                inside.update((id(own.weight), id(own.bias)))
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        if id(values) not in inside:
            found[name] = np.asarray(values)
    return found


def _of_layer(path: str, module: Quantized) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name in ("input", "output"):
        quantizer = getattr(module, name)
        if isinstance(quantizer, Quantizer):
            width = int(np.max(bits_of(quantizer.low, quantizer.high)))
            found[f"{path}{name}.scale"] = np.asarray(quantizer.scale, np.float32)
            found[f"{path}{name}.zero_bits"] = np.array([-quantizer.low[0], width], np.uint8)
    inner: Any = module.layer
    if isinstance(module.weight, HalfQuantizer):
        found[f"{path}weight"] = inner.weight.data.astype(np.float16)
        if inner.bias is not None:
            found[f"{path}bias"] = inner.bias.data.astype(np.float16)
    elif isinstance(module.weight, Quantizer):
        quantizer, integers = module.weight, layer(module)
        bits = bits_of(quantizer.low, quantizer.high)
        found[f"{path}weight"] = _packed(integers.weight, bits)
        found[f"{path}weight.scale"] = np.asarray(quantizer.scale, np.float32).reshape(-1)
        found[f"{path}weight.bits"] = np.unique(bits).astype(np.uint8)
        if len(np.unique(bits)) > 1:
            found[f"{path}weight.bits"] = bits.reshape(-1).astype(np.uint8)
        if inner.bias is not None:
            found[f"{path}bias"] = inner.bias.data
    return found


def _packed(weight: Array, bits: Array) -> Array:
    if len(np.unique(bits)) == 1:
        return pack(weight, int(bits.flat[0]))
    each = np.broadcast_to(bits, weight.shape)
    channels = [pack(weight[each == b], int(b)) for b in np.unique(bits)]
    return np.concatenate(channels)


def nbytes(model: Module) -> int:
    """The bytes of `tensors(model)`, without a file's header.

    The file of a plan may be smaller, header and all: it holds each array in the smallest of
    several forms, and the grids of activations in its compressed description.
    """
    return sum(a.nbytes for a in tensors(model).values())


def pack(values: Array, bits: int) -> Array:
    """Integers of -2^(bits - 1) ... 2^(bits - 1) - 1 in row-major order, packed: bytes, uint8.

    Number i takes bits i bits ... (i + 1) bits - 1 of the stream, lowest first, in two's
    complement; bit j of the stream is bit j mod 8 of byte j / 8. Raises ConfigError for others.
    """
    n = values.reshape(-1).astype(np.int64)
    top = 1 << (bits - 1)
    if not 1 <= bits <= 8 or (n.size and not (-top <= n.min() and n.max() < top)):
        raise ConfigError(
            f"pack: required 1 ... 8 bits and numbers that they hold; came {bits} bits and numbers "
            f"from {n.min()} to {n.max()}"
        )
    stream = (n[:, None] >> np.arange(bits)) & 1
    return np.packbits(stream.astype(np.uint8), bitorder="little")


def unpack(packed: Array, bits: int, size: int) -> Array:
    """The first `size` numbers that `pack` packed, int8 (size,)."""
    stream = np.unpackbits(packed, count=size * bits, bitorder="little").reshape(size, bits)
    n = stream.astype(np.int64) @ (1 << np.arange(bits))
    return (n - ((n >> (bits - 1)) << bits)).astype(np.int8)
