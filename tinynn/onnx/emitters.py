"""How each op is said in ONNX (opset 17). An op that is not here is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from kernels.geometry import Padding, Pair, Window, window
from tinynn.errors import UnsupportedError
from tinynn.graph import Node, Value
from tinynn.onnx.dynamic import (
    additive_conv,
    additive_product,
    conv_of_integers,
    product_of_integers,
    round_each,
    takes_integers,
)
from tinynn.onnx.means import reduce
from tinynn.onnx.writer import IMAGE_AXIS, TO_IMAGE, TO_PLAIN, Layout, Writer
from tinynn.op import Array, Shape

#: Writes a node; the shapes are those of all values, by index, when the batch is larger by one.
Emitter = Callable[[Writer, Node, Mapping[int, Shape]], None]

_ENDS = {True: 2**63 - 1, False: -(2**63)}  #: a slice without end, by whether its step is positive


def _conv(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    x, weight, *bias = node.inputs
    w.array(node, weight)
    depthwise = op.name == "depthwise_conv2d"

    def move(kernel: Array) -> Array:
        if depthwise:
            return kernel.transpose(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2])
        return kernel.transpose(3, 2, 0, 1)

    win = _window(x, weight.shape, op.stride, op.padding, op.dilation)
    group = x.shape[3] if depthwise else 1
    if takes_integers(w, node):
        conv_of_integers(w, node, move, group, _geometry(win))
        return
    inputs = [w.image(x), w.store(weight, op.name, move), *map(w.plain, bias)]
    w.put(node, w.emit(node, "Conv", inputs, group=group, **_geometry(win)), "image")


def _additive_conv(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    x, weight = node.inputs
    w.array(node, weight)
    win = _window(x, weight.shape, op.stride, op.padding, op.dilation)
    kernel = w.store(weight, op.name, lambda kernel: kernel.transpose(3, 2, 0, 1))
    additive_conv(w, node, kernel, _geometry(win))


def _conv_transpose(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    x, weight, *bias = node.inputs
    w.array(node, weight)
    win = _window(node.output, weight.shape, op.stride, op.padding)
    # rows and columns at the end that the windows of the forward convolution do not reach
    beyond = [
        n - (s * (m - 1) + k - sum(p))
        for n, m, s, k, p in zip(
            node.output.shape[1:3], x.shape[1:3], win.stride, win.kernel, win.padding, strict=True
        )
    ]
    kernel = w.store(weight, op.name, lambda kernel: kernel.transpose(2, 3, 0, 1))
    inputs = [w.image(x), kernel, *map(w.plain, bias)]
    name = w.emit(node, "ConvTranspose", inputs, output_padding=beyond, **_geometry(win))
    w.put(node, name, "image")


def _pool(kind: str, w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    (x,) = node.inputs
    geometry = _geometry(_window(x, op.kernel_size, op.stride, op.padding))
    del geometry["dilations"]  # average pools have none before opset 19
    if kind == "AveragePool":
        geometry["count_include_pad"] = 0
    w.put(node, w.emit(node, kind, [w.image(x)], **geometry), "image")


def _window(
    image: Value, kernel: Shape, stride: Pair, padding: Padding, dilation: Pair = (1, 1)
) -> Window:
    height, width = image.shape[1:3]
    return window(height, width, (kernel[0], kernel[1]), stride, padding, dilation)


def _geometry(win: Window) -> dict[str, Any]:
    (top, bottom), (left, right) = win.padding
    return {
        "kernel_shape": win.kernel,
        "strides": win.stride,
        "dilations": win.dilation,
        "pads": [top, left, bottom, right],
    }


def _linear(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    if takes_integers(w, node):
        product_of_integers(w, node)
        return
    w.put(node, w.emit(node, "Gemm", [w.plain(v) for v in node.inputs]), "plain")


def _matmul(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    if takes_integers(w, node):
        product_of_integers(w, node)
        return
    w.put(node, w.emit(node, "MatMul", [w.plain(v) for v in node.inputs]), "plain")


def _batchnorm(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    x, *vectors = node.inputs
    if len(x.shape) in (2, 4):
        layout: Layout = "image" if len(x.shape) == 4 else "plain"
        data = w.image(x) if layout == "image" else w.plain(x)
        inputs = [data, *map(w.plain, vectors)]
        w.put(node, w.emit(node, "BatchNormalization", inputs, epsilon=op.eps), layout)
        return
    gamma, beta, mean, variance = (w.array(node, v) for v in vectors)  # ONNX: axis 1 only
    scale = gamma / np.sqrt(variance + gamma.dtype.type(op.eps))
    _affine(w, node, scale, beta - mean * scale)


def _scale_shift(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    _affine(w, node, *(w.array(node, v) for v in node.inputs[1:]))


def _affine(w: Writer, node: Node, scale: Array, shift: Array) -> None:
    """x scale + shift, one of each a channel."""
    x = node.inputs[0]
    layout = w.layout(x)
    shape = (-1, 1, 1) if layout == "image" else (-1,)
    name = w.image(x) if layout == "image" else w.plain(x)
    names = [v.name for v in node.inputs[1:]] if len(node.inputs) == 3 else ["", ""]
    for kind, vector, own in (("Mul", scale, names[0]), ("Add", shift, names[1])):
        other = w.constant(own or f"{node.path or 'model'}/{kind}_by", vector.reshape(shape))
        name = w.emit(node, kind, [name, other])
    w.put(node, name, layout)


def _unary(kind: str, w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    name, layout = _as_it_stands(w, node.inputs[0])
    w.put(node, w.emit(node, kind, [name]), layout)


def _power(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    name, layout = _as_it_stands(w, node.inputs[0])
    exponent = w.constant(f"{node.path or 'model'}/exponent", op.exponent, node.output.dtype)
    w.put(node, w.emit(node, "Pow", [name, exponent]), layout)


def _binary(kind: str, w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    operands = node.inputs
    image = any(w.is_data(v) and w.layout(v) == "image" for v in operands)
    if image and all(len(v.shape) == 4 if w.is_data(v) else len(v.shape) <= 4 for v in operands):
        w.put(node, w.emit(node, kind, [_broadcast(w, v) for v in operands]), "image")
    else:
        w.put(node, w.emit(node, kind, [w.plain(v) for v in operands]), "plain")


def _broadcast(w: Writer, value: Value) -> str:
    """The name of an operand of images in NCHW, as which it broadcasts as it did in NHWC."""
    if w.is_data(value):
        return w.image(value)
    if value.size == 1:
        return w.plain(value)
    shape = (1,) * (4 - len(value.shape)) + value.shape
    return w.store(value, "broadcast", lambda array: array.reshape(shape).transpose(TO_IMAGE))


def _softmax(kind: str, w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    (x,) = node.inputs
    name, layout = _as_it_stands(w, x)
    axis = op.axis % len(x.shape)
    axis = IMAGE_AXIS[axis] if layout == "image" else axis
    w.put(node, w.emit(node, kind, [name], axis=axis), layout)


def _reduction(kind: str, w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    reduce(w, node, node.inputs[0], kind, op.axes, op.keepdims)


def _concat(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    image = any(w.layout(v) == "image" for v in node.inputs if w.is_data(v))
    names = [w.image(v) if image else w.plain(v) for v in node.inputs]
    axis = IMAGE_AXIS[op.axis] if image else op.axis
    w.put(node, w.emit(node, "Concat", names, axis=axis), "image" if image else "plain")


def _pad(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    name, layout = _as_it_stands(w, node.inputs[0])
    widths = [op.widths[a] for a in TO_IMAGE] if layout == "image" else op.widths
    where = node.path or "model"
    pads = [before for before, _ in widths] + [after for _, after in widths]
    inputs = [name, w.constant(f"{where}/pads", pads, "int64")]
    if op.value:
        inputs.append(w.constant(f"{where}/value", op.value, node.output.dtype))
    w.put(node, w.emit(node, "Pad", inputs, mode="constant"), layout)


def _scatter(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    """One more channel of `value`, which is taken wherever no channel has its place."""
    op: Any = node.op
    name, layout = _as_it_stands(w, node.inputs[0])
    where, axes = node.path or "model", len(node.output.shape)
    axis = 1 if layout == "image" else axes - 1
    pads = [0] * axes + [int(i == axis) for i in range(axes)]
    value = w.constant(f"{where}/value", op.value, node.output.dtype)
    padding = [name, w.constant(f"{where}/pads", pads, "int64"), value]
    source = np.full(op.width, len(op.places))
    source[list(op.places)] = range(len(op.places))
    inputs = [w.emit(node, "Pad", padding, mode="constant")]
    inputs.append(w.constant(f"{where}/source", source.tolist(), "int64"))
    w.put(node, w.emit(node, "Gather", inputs, axis=axis), layout)


def _reshape(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    (x,) = node.inputs
    small, large = node.output.shape, shapes[node.output.index]
    sizes = [a if a == b else -1 for a, b in zip(small, large, strict=True)]
    if sizes.count(-1) > 1 or (math.prod(small) == 0):
        raise UnsupportedError(
            f"onnx.export: reshape in {node.path!r} to {small} has more than one axis that depends "
            "on the batch, or no elements"
        )
    shape = w.constant(f"{node.path or 'model'}/shape", sizes, "int64")
    w.put(node, w.emit(node, "Reshape", [w.rows(x), shape]), "plain")


def _transpose(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    (x,) = node.inputs
    if op.axes == TO_IMAGE and w.layout(x) == "image":
        w.put(node, w.image(x), "plain")
    elif op.axes == TO_PLAIN:
        w.put(node, w.plain(x), "image")
    else:
        w.put(node, w.emit(node, "Transpose", [w.plain(x)], perm=op.axes), "plain")


def _index(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    op: Any = node.op
    name = w.plain(node.inputs[0])
    where = node.path or "model"
    rows = []
    for axis, (start, stop, step) in enumerate(op.keys):
        step = 1 if step is None else step
        if (start, stop, step) != (None, None, 1):
            first = (0 if step > 0 else _ENDS[True]) if start is None else start
            rows.append((first, _ENDS[step > 0] if stop is None else stop, axis, step))
    columns = zip(*rows, strict=True) if rows else ()
    given = [
        w.constant(f"{where}/{what}", column, "int64")
        for what, column in zip(("starts", "ends", "axes", "steps"), columns, strict=False)
    ]
    w.put(node, w.emit(node, "Slice" if rows else "Identity", [name, *given]), "plain")


def _take(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    x, positions = node.inputs
    rows = w.constant(f"{node.path or 'model'}/rows", w.array(node, positions), "int64")
    w.put(node, w.emit(node, "Gather", [w.plain(x), rows], axis=0), "plain")


def _fake_quantize(w: Writer, node: Node, shapes: Mapping[int, Shape]) -> None:
    """An activation on a grid: QuantizeLinear and DequantizeLinear, of 8 bits."""
    op: Any = node.op
    if op.dynamic:
        round_each(w, node)
        return
    x, *grid = node.inputs
    scale, low, high = (w.array(node, v) for v in grid)
    if any(a.size != 1 for a in (scale, low, high)) or high.item() - low.item() > 255:
        raise UnsupportedError(
            f"onnx.export: fake_quantize in {node.path!r} has more than one grid, or one of more "
            "than 256 numbers"
        )
    name, layout = _as_it_stands(w, x)
    where = node.path or "model"
    if high.item() - low.item() < 255:  # QuantizeLinear cuts at the ends of uint8 alone
        ends = [
            w.constant(f"{where}/{end}", (a * scale).reshape(()))
            for end, a in (("least", low), ("most", high))
        ]
        name = w.emit(node, "Clip", [name, *ends])
    inputs = [
        w.constant(f"{where}/scale", scale.reshape(())),
        w.constant(f"{where}/zero", -low.reshape(()), "uint8"),
    ]
    whole = w.emit(node, "QuantizeLinear", [name, *inputs])
    w.put(node, w.emit(node, "DequantizeLinear", [whole, *inputs]), layout)


def _as_it_stands(w: Writer, x: Value) -> tuple[str, Layout]:
    layout = w.layout(x)
    return (w.image(x) if layout == "image" else w.plain(x)), layout


_UNARY = {
    "relu": "Relu",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "absolute": "Abs",
    "neg": "Neg",
}
_BINARY = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "maximum": "Max",
    "minimum": "Min",
}

#: by the op's name
EMITTERS: dict[str, Emitter] = {
    "additive": additive_product,
    "additive_conv2d": _additive_conv,
    "conv2d": _conv,
    "depthwise_conv2d": _conv,
    "conv_transpose2d": _conv_transpose,
    "max_pool2d": partial(_pool, "MaxPool"),
    "avg_pool2d": partial(_pool, "AveragePool"),
    "linear": _linear,
    "matmul": _matmul,
    "batch_norm_eval": _batchnorm,
    "scale_shift": _scale_shift,
    "power": _power,
    "softmax": partial(_softmax, "Softmax"),
    "log_softmax": partial(_softmax, "LogSoftmax"),
    "sum": partial(_reduction, "ReduceSum"),
    "max": partial(_reduction, "ReduceMax"),
    "concat": _concat,
    "pad": _pad,
    "scatter": _scatter,
    "reshape": _reshape,
    "transpose": _transpose,
    "index": _index,
    "fake_quantize": _fake_quantize,
    "take": _take,
    **{name: partial(_unary, kind) for name, kind in _UNARY.items()},
    **{name: partial(_binary, kind) for name, kind in _BINARY.items()},
}
