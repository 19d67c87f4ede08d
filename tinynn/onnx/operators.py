"""How each ONNX operator is said in modules. One that is not here is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from tinynn import nn
from tinynn.nn.module import Module
from tinynn.onnx.builder import Call, Data
from tinynn.onnx.grids import clip, dequantize, on_grid, quantize
from tinynn.onnx.images import average_pool, conv, conv_transpose, max_pool
from tinynn.onnx.network import (
    Arithmetic,
    Border,
    FlattenAt,
    Function,
    Product,
    ReshapeTo,
    Rows,
    SideBySide,
    Slice,
    Squeeze,
    Unsqueeze,
)
from tinynn.onnx.writer import IMAGE_AXIS, TO_IMAGE, TO_PLAIN, Layout

_IMAGE_FROM = {a: i for i, a in enumerate(IMAGE_AXIS)}  #: where axis a of NCHW lies in NHWC
_OPEN = 2**62  #: slices end "at infinity" in many files


def _axis(value: Data, axis: int) -> int:
    """Where the file's axis lies in the value as it stands."""
    if value.layout == "plain":
        return axis
    if not -4 <= axis < 4:
        raise ValueError(f"axis {axis} of an image")
    return _IMAGE_FROM[axis % 4]


def _unary(make: Callable[[], Module], call: Call) -> None:
    x = call.data(0)
    y = call.add(make(), [x], x.layout)
    call.result(y._replace(pixel=x.pixel))


def _same(call: Call) -> None:
    """Identity: the constant or value itself."""
    builder, name, out = call.builder, call.operand(0), call.node.output[0]
    if name in builder.constants:
        builder.constants[out] = builder.constants[name]
        if name in builder.trained:
            builder.trained.add(out)
    else:
        call.result(call.data(0))


def _dropout(call: Call) -> None:
    call.attribute("ratio")
    call.attribute("seed")
    if call.has(2) and bool(np.any(call.constant(2, "training_mode"))):
        raise call.refuse("operand training_mode is true: only inference is read")
    call.result(call.data(0))


def _constant(call: Call) -> None:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        value = call.attribute(name)
        if value is not None:
            dtype = np.float32 if "float" in name else np.int64 if "int" in name else None
            call.builder.constants[call.node.output[0]] = np.asarray(value, dtype)


def _arithmetic(function: str, call: Call) -> None:
    fixed = [call.is_constant(i) for i in range(2)]
    if not any(fixed) or all(fixed):
        call.result(_combined(partial(Arithmetic, function), call, 2))
        return
    at = fixed.index(True)
    array, x = call.builder.floats(call.operand(at)), call.data(1 - at)
    if x.layout == "image" and array.ndim > 4:
        x = call.builder.plain(x)
    if array.size == 1 and array.ndim <= (call.rank(1 - at) or 0):
        array = array.reshape(())
    elif x.layout == "image":
        full = array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(TO_PLAIN)
        array = full.reshape(full.shape[3:]) if full.shape[:3] == (1, 1, 1) else full
    if call.operand(at) in call.builder.trained and array.size > 1:
        part = Arithmetic(function, call.parameter(at, x.layout, array), first=at == 0)
    else:
        part = Arithmetic(function, np.ascontiguousarray(array), first=at == 0)
    call.result(call.add(part, [x], x.layout))


def _combined(make: Callable[[], Module], call: Call, count: int) -> Data:
    """A part on operands that broadcast: as images if one is and all have four axes."""
    values = [call.data(i) for i in range(count)]
    image = any(v.layout == "image" for v in values)
    if image and all(call.rank(i) == 4 for i in range(count)):
        return call.add(make(), [call.builder.image(v) for v in values], "image")
    return call.add(make(), [call.builder.plain(v) for v in values])


def _extreme(function: str, call: Call) -> None:
    value = call.data(0)
    if len(call) == 2:
        return _arithmetic(function, call)
    value = call.plain(0)
    for i in range(1, len(call)):
        value = call.add(Arithmetic(function), [value, call.plain(i)])
    return call.result(value)


def _power(call: Call) -> None:
    exponent = call.constant(1, "exponent")
    if exponent.size != 1 or exponent.ndim > (call.rank(0) or 0):
        raise call.refuse(f"exponent of shape {exponent.shape}; required one number")
    number = float(exponent.reshape(()))
    _unary(lambda: Function("power", exponent=number), call)


def _softmax(function: str, call: Call) -> None:
    x, rank = call.data(0), call.rank(0)
    axis = call.attribute("axis", -1 if call.builder.version >= 13 else 1)
    if call.builder.version < 13 and (rank is None or axis % rank != rank - 1):
        raise call.refuse(f"attribute axis={axis} of opset {call.builder.version}, but the last")
    where = _axis(x, axis)
    last = where == -1 or (rank is not None and where % rank == rank - 1)
    part = nn.Softmax() if last and function == "softmax" else Function(function, axis=where)
    call.result(call.add(part, [x], x.layout))


def _gemm(call: Call) -> None:
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    flip = [bool(call.attribute(name, 0)) for name in ("transA", "transB")]
    a = call.plain(0)
    if flip[0]:
        a = call.add(Function("transpose", axes=(1, 0)), [a])
    if call.is_constant(1):
        weight = call.constant(1, "B")
        weight = np.asarray(alpha, weight.dtype) * (weight.T if flip[1] else weight)
        y = _linear(call, a, weight, (flip[1], alpha), beta)
        call.result(y)
        return
    b = call.plain(1)
    if flip[1]:
        b = call.add(Function("transpose", axes=(1, 0)), [b])
    y = _scaled(call, call.add(Function("matmul"), [a, b]), alpha)
    if call.has(2):
        y = call.add(Arithmetic("add"), [y, _scaled(call, call.plain(2), beta)])
    call.result(y)


def _linear(call: Call, x: Data, weight: np.ndarray, form: object, beta: float) -> Data:
    """x @ weight + beta C: a Linear layer if C is a vector, or is not there."""
    parameter = call.parameter(1, f"linear {form}", weight)
    n = weight.shape[-1]
    rest = call.has(2)
    layer = _empty_linear(parameter.shape, parameter.dtype)
    layer.weight = parameter
    if rest and call.is_constant(2):
        c = call.constant(2, "C")
        if c.size in (1, n) and c.shape[:-1] in ((), (1,)):
            full = np.broadcast_to(np.asarray(beta, c.dtype) * c.reshape(-1), (n,))
            layer.bias = call.parameter(2, f"bias {beta} {n}", full)
            rest = False
    y = call.add(on_grid(call, layer), [x])
    if rest:
        y = call.add(Arithmetic("add"), [y, _scaled(call, call.plain(2), beta)])
    return y


def _empty_linear(shape: tuple[int, ...], dtype: np.dtype) -> nn.Linear:
    return nn.Linear(
        *shape,
        bias=False,
        weight_init=lambda shape, rng, dtype: np.zeros(shape, dtype),
        rng=np.random.default_rng(0),
        dtype=dtype,
    )


def _scaled(call: Call, value: Data, factor: float) -> Data:
    if factor == 1:
        return value
    return call.add(Arithmetic("mul", float(factor)), [value])


def _matmul(call: Call) -> None:
    ranks = call.rank(0), call.rank(1)
    if 1 in ranks:
        raise call.refuse("an operand of one axis; required two or more")
    if call.is_constant(1) and call.constant(1, "B").ndim == 2:
        if ranks[0] == 2:
            call.result(_linear(call, call.plain(0), call.constant(1, "B"), (False, 1.0), 1.0))
            return
        weight = call.parameter(1, "matrix", call.constant(1, "B"))
        call.result(call.add(Product(weight), [call.plain(0)]))
        return
    if ranks[1] != 2 and (shapes := (call.shape(0), call.shape(1))) != (None, None):
        a, b = shapes
        if a is None or b is None or a[:-2] != b[:-2]:
            raise call.refuse(f"operands {a} and {b}, whose leading axes differ")
    call.result(call.add(Function("matmul"), [call.plain(0), call.plain(1)]))


def _batchnorm(call: Call) -> None:
    call.only("training_mode", 0)
    call.only("spatial", 1)
    eps, momentum = call.attribute("epsilon", 1e-5), call.attribute("momentum", 0.9)
    x = call.image(0) if call.rank(0) in (4, None) else call.plain(0)
    if call.rank(0) not in (2, 4, None):
        raise call.refuse(f"an operand of {call.rank(0)} axes; required 2 or 4")
    gamma, beta, mean, variance = (
        call.constant(i, what) for i, what in enumerate(("scale", "B", "mean", "var"), 1)
    )
    layer = nn.BatchNorm(gamma.size, eps=eps, momentum=1 - momentum, dtype=gamma.dtype)
    layer.gamma = call.parameter(1, "scale", gamma)
    layer.beta = call.parameter(2, "shift", beta)
    layer.mean, layer.variance = np.array(mean), np.array(variance)
    layer.check()
    call.result(call.add(layer, [x], x.layout))


def _global_pool(function: str, call: Call) -> None:
    call.result(_reduced(call, function, call.image(0), (1, 2), True))


def _reduced(call: Call, function: str, x: Data, where: tuple[int, ...], keepdims: bool) -> Data:
    """The reduction of x over the axes `where`, as x stands."""
    pixel = x.layout == "image" and set(where) == {1, 2}
    layout: Layout = x.layout if keepdims else "plain"
    if function != "mean" or not pixel:
        part = Function(function, axis=where, keepdims=keepdims)
        return call.add(part, [x], layout)._replace(pixel=pixel and keepdims)
    y = call.add(nn.GlobalAvgPool2d(), [x])  # which integer kernels run, too
    return call.add(Unsqueeze(where), [y], layout)._replace(pixel=True) if keepdims else y


def _reduce(function: str, call: Call) -> None:
    keepdims, nothing = (
        bool(call.attribute("keepdims", 1)),
        call.attribute("noop_with_empty_axes", 0),
    )
    axes = call.whole(1, "axes") if call.has(1) else call.attribute("axes", ())
    x = call.data(0)
    if not axes and nothing:
        call.result(x)
        return
    if not axes:
        part = Function(function, axis=None, keepdims=keepdims)
        call.result(call.add(part, [x], x.layout if keepdims else "plain"))
        return
    if x.layout == "image" and not keepdims:
        left = [_axis(x, a) for a in range(4) if a not in {b % 4 for b in axes}]
        x = x if left == sorted(left) else call.builder.plain(x)
    call.result(_reduced(call, function, x, tuple(_axis(x, a) for a in axes), keepdims))


def _concat(call: Call) -> None:
    axis = call.attribute("axis")
    values = [call.data(i) for i in range(len(call))]
    image = any(v.layout == "image" for v in values)
    operands = [call.builder.image(v) if image else v for v in values]
    part = SideBySide(_axis(operands[0], axis))
    call.result(call.add(part, operands, "image" if image else "plain"))


def _pad(call: Call) -> None:
    call.only("mode", "constant")
    if call.has(1):
        pads = call.whole(1, "pads")
        value = float(call.constant(2, "constant_value").reshape(())) if call.has(2) else 0.0
    else:
        pads, value = call.attribute("pads", ()), call.attribute("value", 0.0)
    axes = call.whole(3, "axes") if call.has(3) else None
    rank = len(pads) // 2 if axes is None else call.rank(0)
    if rank is None:
        raise call.refuse("axes of an operand whose number of axes is not known")
    if any(not 0 <= n < 1 << 16 for n in pads):
        raise call.refuse(f"pads {pads}: out of bounds")
    order = range(rank) if axes is None else [a % rank for a in axes]
    if len(pads) != 2 * len(order):
        raise call.refuse(f"pads {pads} for {len(order)} axes")
    widths = [(0, 0)] * rank
    for axis, pair in zip(order, zip(pads, pads[len(order) :], strict=False), strict=False):
        widths[axis] = pair
    x = call.data(0)
    if x.layout == "image":
        widths = [widths[a] for a in TO_PLAIN]
    call.result(call.add(Border(widths, value), [x], x.layout))


def _flatten(call: Call) -> None:
    axis, x = call.attribute("axis", 1), call.data(0)
    if axis == 1 and (x.pixel or _one_pixel(call)):
        call.result(call.add(nn.Flatten(), [x]))
        return
    x = call.builder.plain(x)
    call.result(call.add(nn.Flatten() if axis == 1 else FlattenAt(axis), [x]))


def _one_pixel(call: Call) -> bool:
    """Whether the operand is an image of one pixel or one channel: both orders are one."""
    shape = call.shape(0)
    return shape is not None and len(shape) == 4 and (shape[2:] == (1, 1) or shape[1] == 1)


def _reshape(call: Call) -> None:
    x = call.data(0)
    shape = call.whole(1, "shape")
    if call.attribute("allowzero", 0) and 0 in shape:
        raise call.refuse("attribute allowzero=1 with a size of 0")
    if any(n < -1 for n in shape) or shape.count(-1) > 1:
        raise call.refuse(f"shape {shape}")
    kept = [i for i, n in enumerate(shape) if n == 0]
    if not ((x.pixel or _one_pixel(call)) and kept in ([], [0])):
        x = call.builder.plain(x)
    # Flatten has no size of its own: channels before it can be pruned
    call.result(call.add(nn.Flatten() if _is_flat(call, shape) else ReshapeTo(shape), [x]))


def _is_flat(call: Call, shape: tuple[int, ...]) -> bool:
    """Whether a reshape to these sizes leaves the first axis and makes one of all others."""
    sizes = (call.shape(0) or ())[1:]
    known = [n for n in sizes if n is not None]
    whole = bool(sizes) and len(known) == len(sizes) and shape[1:] == (math.prod(known),)
    return shape == (0, -1) or (shape[:1] in ((0,), (-1,)) and whole)


def _squeeze(call: Call) -> None:
    axes = call.whole(1, "axes") if call.has(1) else call.attribute("axes")
    x = call.data(0)
    if x.layout == "image" and axes is not None and {a % 4 for a in axes} == {2, 3}:
        call.result(call.add(Squeeze((1, 2)), [x]))
    else:
        call.result(call.add(Squeeze(axes), [call.builder.plain(x)]))


def _unsqueeze(call: Call) -> None:
    axes = call.whole(1, "axes") if call.has(1) else call.attribute("axes", ())
    call.result(call.add(Unsqueeze(axes), [call.plain(0)]))


def _transpose(call: Call) -> None:
    perm, x = call.attribute("perm"), call.data(0)
    if perm == TO_PLAIN and x.layout == "image":
        call.result(Data(x.number))
    elif perm == TO_IMAGE and x.layout == "plain":
        call.result(Data(x.number, "image"))
    else:
        part = Function("transpose", axes=perm)
        call.result(call.add(part, [call.builder.plain(x)]))


def _slice(call: Call) -> None:
    if call.has(1):
        starts, ends = call.whole(1, "starts"), call.whole(2, "ends")
        axes = call.whole(3, "axes") if call.has(3) else tuple(range(len(starts)))
        steps = call.whole(4, "steps") if call.has(4) else (1,) * len(starts)
    else:
        starts, ends = call.attribute("starts", ()), call.attribute("ends", ())
        axes = call.attribute("axes", tuple(range(len(starts))))
        steps = (1,) * len(starts)
    rank = call.rank(0)
    if any(a < 0 for a in axes):
        if rank is None:
            raise call.refuse("negative axes of an operand whose number of axes is not known")
        axes = tuple(a % rank for a in axes)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps or max(axes) > 15:
        raise call.refuse(f"starts {starts}, ends {ends}, axes {axes}, steps {steps}")
    keys: list[tuple[int | None, int | None, int | None]] = [(None, None, None)] * (max(axes) + 1)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        keys[axis] = (_end(start), _stop(end, step), step)
    call.result(call.add(Slice(tuple(keys)), [call.plain(0)]))


def _end(n: int) -> int:
    return max(-_OPEN, min(n, _OPEN))


def _stop(end: int, step: int) -> int | None:
    return None if step < 0 and end < -(2**31) + 1 else _end(end)


def _gather(call: Call) -> None:
    axis, rows = call.attribute("axis", 0), call.constant(1, "indices")
    if rows.dtype.kind not in "iu":
        raise call.refuse(f"indices of {rows.dtype}")
    x, rows = call.data(0), np.array(rows, np.int64)
    rank = call.rank(0)
    if rank is not None and not -rank <= axis < rank:
        raise call.refuse(f"attribute axis={axis} of an operand of {rank} axes")
    if rows.ndim != 1:
        x = call.builder.plain(x)
    where = _axis(x, axis)
    part, source = _scattered(call, x, where, rows) or (Rows(rows, where), x)
    call.result(call.add(part, [source], x.layout))


def _scattered(call: Call, x: Data, where: int, rows: np.ndarray) -> tuple[Module, Data] | None:
    """`nn.Scatter`, and what it reads, if x is that with a channel of zeros behind the others.

    So channels are written among zeros; nothing else may read what has one channel more.
    """
    builder, name, shape = call.builder, call.operand(0), call.shape(0)
    graph = builder.model.graph
    readers = sum(list(node.input).count(name) for node in graph.node)
    number = builder.inputs + len(builder.steps) - 1
    if x.number != number or readers != 1 or any(v.name == name for v in graph.output):
        return None
    step, operands = builder.steps[-1] if builder.steps else ("", ())
    border, axis = builder.parts.get(step), -1 if shape is None else where % len(shape)
    if not isinstance(border, Border) or axis != len(border.widths) or shape is None:
        return None
    padded = shape[IMAGE_AXIS[axis] if x.layout == "image" else axis]
    if any(map(any, border.widths)) or (border.front, border.back, border.value) != (0, 1, 0):
        return None
    places = {int(c): i for i, c in enumerate(rows) if padded is not None and c < padded - 1}
    alone = padded is not None and len(places) == padded - 1 == sum(rows < padded - 1)
    if not rows.size or not alone or padded is None or not 0 <= rows.min() <= rows.max() < padded:
        return None
    builder.steps.pop()
    del builder.parts[step], builder.values[name]
    order = tuple(places[c] for c in range(padded - 1))
    return nn.Scatter(order, len(rows)), Data(operands[0], x.layout)


OPERATORS: dict[str, Callable[[Call], None]] = {
    "Add": partial(_arithmetic, "add"),
    "Sub": partial(_arithmetic, "sub"),
    "Mul": partial(_arithmetic, "mul"),
    "Div": partial(_arithmetic, "div"),
    "Max": partial(_extreme, "maximum"),
    "Min": partial(_extreme, "minimum"),
    "Relu": partial(_unary, nn.ReLU),
    "Tanh": partial(_unary, nn.Tanh),
    "Sigmoid": partial(_unary, nn.Sigmoid),
    "Exp": partial(_unary, partial(Function, "exp")),
    "Log": partial(_unary, partial(Function, "log")),
    "Sqrt": partial(_unary, partial(Function, "sqrt")),
    "Abs": partial(_unary, partial(Function, "absolute")),
    "Neg": partial(_unary, partial(Function, "neg")),
    "Pow": _power,
    "Clip": clip,
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "Softmax": partial(_softmax, "softmax"),
    "LogSoftmax": partial(_softmax, "log_softmax"),
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": partial(_global_pool, "mean"),
    "GlobalMaxPool": partial(_global_pool, "max"),
    "BatchNormalization": _batchnorm,
    "ReduceSum": partial(_reduce, "sum"),
    "ReduceMean": partial(_reduce, "mean"),
    "ReduceMax": partial(_reduce, "max"),
    "Concat": _concat,
    "Pad": _pad,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Slice": _slice,
    "Gather": _gather,
    "Identity": _same,
    "Dropout": _dropout,
    "Constant": _constant,
}
