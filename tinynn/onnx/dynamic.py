"""Ranges that are found at run time, and the ef-operator, in operators that every runtime has.

DynamicQuantizeLinear has one grid for a whole batch; here each image has its own, so that it is
said in elementwise operators, in the arithmetic of `tinynn.nn.quantized.affine_each`. Sums are
those of ConvInteger and MatMulInteger without the zero point of the images: with q = n - low,

    sum_k n[k] w[k, m] = sum_k q[k] w[k, m] + low sum_k w[k, m]      over taps inside the image

where the second sum is constant, but for borders, where it is the ConvInteger of an image of ones.
Weights are written as uint8 with zero point 128: of uint8 with int8, AVX2's vpmaddubsw saturates
the sum of two products in 16 bits, and a runtime may use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tinynn.graph import Node, Value
from tinynn.nn.quantized import SMALLEST
from tinynn.onnx.writer import Layout, Writer
from tinynn.op import Array, Shape

_ZERO = 128  #: of weights


class Rounded(NamedTuple):
    """An activation on grids of its images: names of q, uint8, and of the grids' numbers."""

    q: str
    scale: str  #: (B, 1, ...)
    low: str  #: likewise, float32
    layout: Layout


def round_each(w: Writer, node: Node) -> None:
    """A `fake_quantize` whose grids were found from what it rounds."""
    op: Any = node.op
    x = node.inputs[0]
    where, steps = node.path or "model", 2**op.dynamic - 1
    layout: Layout = "image" if len(x.shape) == 4 else "plain"
    name = w.image(x) if layout == "image" else w.plain(x)

    def constant(title: str, value: Any, dtype: Any = x.dtype) -> str:
        return w.constant(f"{where}/{title}", value, dtype)

    def emit(kind: str, *inputs: str, **attributes: Any) -> str:
        return w.emit(node, kind, inputs, **attributes)

    def double(value: str) -> str:
        return emit("Cast", value, to=w.library.TensorProto.DOUBLE)

    kind = w.library.helper.np_dtype_to_tensor_dtype(x.dtype)
    axes = list(range(1, len(x.shape)))
    zero = constant("nothing", 0)
    least = emit("Min", emit("ReduceMin", name, axes=axes, keepdims=1) if axes else name, zero)
    most = emit("Max", emit("ReduceMax", name, axes=axes, keepdims=1) if axes else name, zero)
    extent = emit("Sub", double(most), double(least))
    share = emit("Div", extent, constant("steps", steps, np.float64))
    share = emit("Cast", share, to=kind)
    known = emit("GreaterOrEqual", share, constant("smallest", SMALLEST))
    scale = emit("Where", known, share, constant("one", 1))
    start = emit("Round", emit("Div", double(least), double(scale)))
    start = emit("Max", start, constant("lowest", -steps, np.float64))
    low = emit("Cast", start, to=kind)
    n = emit("Max", emit("Round", emit("Div", name, scale)), low)
    n = emit("Min", n, emit("Add", low, constant("span", steps)))
    q = emit("Cast", emit("Sub", n, low), to=w.library.TensorProto.UINT8)
    w.rounded[node.output.index] = Rounded(q, scale, low, layout)

    def number() -> None:
        w.names[node.output.index, layout] = emit("Mul", n, scale)

    w.later[node.output.index] = number


def conv_of_integers(
    w: Writer, node: Node, move: Callable[[Array], Array], group: int, geometry: Mapping[str, Any]
) -> None:
    """A convolution of bytes; `move` brings weights into ONNX's order."""
    x, weight, *bias = node.inputs
    found, steps = w.rounded[x.index], move(w.grids[weight.index].steps())
    where = node.path or "model"
    integers, zero = _weights(w, weight, steps)
    attributes = {**geometry, "group": group}
    sums = w.emit(node, "ConvInteger", [found.q, integers, "", zero], **attributes)
    if any(geometry["pads"]):
        tensor = w.library.helper.make_tensor("one", w.library.TensorProto.UINT8, [1], [1])
        _, height, width, channels = x.shape
        shape = w.constant(f"{where}/image", [1, channels, height, width], "int64")
        ones = w.emit(node, "ConstantOfShape", [shape], value=tensor)
        each = w.emit(node, "ConvInteger", [ones, integers, "", zero], **attributes)
    else:
        each = w.constant(f"{where}/sums", steps.sum(axis=(1, 2, 3)).reshape(-1, 1, 1), "int32")
    _finish(w, node, sums, each, (-1, 1, 1), bias, "image")


def product_of_integers(w: Writer, node: Node) -> None:
    """x (B, K) @ weight (K, N) of bytes."""
    x, weight, *bias = node.inputs
    found, steps = w.rounded[x.index], w.grids[weight.index].steps()
    integers, zero = _weights(w, weight, steps)
    sums = w.emit(node, "MatMulInteger", [found.q, integers, "", zero])
    each = w.constant(f"{node.path or 'model'}/sums", steps.sum(axis=0), "int32")
    _finish(w, node, sums, each, (-1,), bias, "plain")


def takes_integers(w: Writer, node: Node) -> bool:
    """Whether both operands are rounded, the first at run time."""
    x, weight = node.inputs[:2]
    plain = len(x.shape) in (2, 4)
    return x.index in w.rounded and weight.index in w.grids and plain


def _weights(w: Writer, weight: Value, steps: Array) -> tuple[str, str]:
    title = weight.name or w.titles.get(weight.index) or "weight"
    bytes_ = w.constant(title, steps + _ZERO, "uint8")
    return bytes_, w.constant(f"{title}_zero", _ZERO, "uint8")


def _finish(
    w: Writer, node: Node, sums: str, each: str, shape: Shape, bias: list[Value], layout: Layout
) -> None:
    """(sums + low each) (scale w_scale) + bias."""
    x, weight = node.inputs[:2]
    found, where = w.rounded[x.index], node.path or "model"
    whole = w.emit(node, "Cast", [found.low], to=w.library.TensorProto.INT32)
    sums = w.emit(node, "Add", [sums, w.emit(node, "Mul", [each, whole])])
    kind = w.library.helper.np_dtype_to_tensor_dtype(x.dtype)
    number = w.emit(node, "Cast", [sums], to=kind)
    scales = w.grids[weight.index].scale
    vector = scales.reshape(shape if scales.size > 1 else ())
    scale = w.constant(f"{where}/weight_scale", vector, x.dtype)
    name = w.emit(node, "Mul", [number, w.emit(node, "Mul", [scale, found.scale])])
    for value in bias:
        name = w.emit(
            node, "Add", [name, w.store(value, "vector", lambda array: array.reshape(shape))]
        )
    w.put(node, name, layout)


# --- the ef-operator ------------------------------------------------------------------------------


def additive_product(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    """[sign(x), x] @ [w; sign(w)]."""
    x, weight = node.inputs
    w.array(node, weight)
    both, doubled = _beside(w, node, w.plain(x), w.plain(weight), 0)
    w.put(node, w.emit(node, "MatMul", [both, doubled]), "plain")


def _beside(w: Writer, node: Node, x: str, weight: str, axis: int) -> tuple[str, str]:
    both = w.emit(node, "Concat", [w.emit(node, "Sign", [x]), x], axis=1)
    doubled = w.emit(node, "Concat", [weight, w.emit(node, "Sign", [weight])], axis=axis)
    return both, doubled


def additive_conv(w: Writer, node: Node, weight: str, geometry: Mapping[str, Any]) -> None:
    """The same of windows; `weight` is (N, C, KH, KW)."""
    both, doubled = _beside(w, node, w.image(node.inputs[0]), weight, 1)
    w.put(node, w.emit(node, "Conv", [both, doubled], **geometry), "image")
