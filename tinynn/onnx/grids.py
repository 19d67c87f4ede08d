"""Operators that round to grids: QuantizeLinear and DequantizeLinear become quantisers.

A pair of the two around nothing is an activation on a grid; DequantizeLinear of constants gives the
weights of a layer, which keeps their grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinynn import nn
from tinynn.compress.batchnorm import by_channel
from tinynn.nn.module import Module
from tinynn.nn.quantized import ActivationQuantizer, Quantized, WeightQuantizer
from tinynn.onnx.builder import Call, Data
from tinynn.onnx.network import Arithmetic
from tinynn.op import Array

_HIGHEST = 127  #: of weights in int8


def quantize(call: Call) -> None:
    """QuantizeLinear to uint8 or int8 with one grid; only DequantizeLinear may read its result."""
    call.attribute("axis", 1)
    call.only("saturate", 1)
    scale, zero = _grid(call)
    if scale.size != 1:
        raise call.refuse(f"{scale.size} scales of an activation; required one")
    if zero.dtype not in (np.int8, np.uint8):
        raise call.refuse(f"a zero point of {zero.dtype}; required int8 or uint8")
    kind, step = np.iinfo(zero.dtype), scale.item()
    ends = [n - int(zero.item()) for n in (kind.min, kind.max)]
    x, cuts = call.builder.clipped.get(call.operand(0), (None, ()))[:2]
    steps = [n if cut is None else cut / step for cut, n in zip(cuts, ends, strict=False)]
    if x is not None and np.abs(steps - np.rint(steps)).max() < 1e-3:
        ends = [min(max(round(n), ends[0]), ends[1]) for n in steps]
    else:
        x = call.data(0)
    if not ends[0] <= 0 <= ends[1]:
        raise call.refuse(f"a grid from {ends[0]} to {ends[1]}: required 0 on it")
    bits = max(1, (ends[1] - ends[0]).bit_length())
    grid = ActivationQuantizer(ends[0] * step, ends[1] * step, bits)
    grid.scale = scale.reshape(1).copy()
    grid.low, grid.high = (np.array([n], scale.dtype) for n in ends)
    grid.check()
    y = call.add(Quantized(nn.Sequential(), output=grid), [x], x.layout)
    made = y._replace(pixel=x.pixel), scale.item(), zero.item()
    call.builder.rounded[call.node.output[0]] = made


def dequantize(call: Call) -> None:
    """DequantizeLinear of what QuantizeLinear made with the same grid, or of constants."""
    axis, (scale, zero) = call.attribute("axis", 1), _grid(call)
    builder, name, out = call.builder, call.operand(0), call.node.output[0]
    if name in builder.rounded:
        made, *grid = builder.rounded[name]
        if scale.size != 1 or grid != [scale.item(), zero.item()]:
            raise call.refuse(f"another grid than that of {name!r}")
        call.result(made)
        return
    steps = call.constant(0, "what is no activation")
    if steps.dtype not in (np.int8, np.uint8, np.int32):
        raise call.refuse(f"constants of {steps.dtype}; required int8, uint8 or int32")
    shape = [1] * steps.ndim
    if scale.ndim == 1 and scale.size > 1:
        shape[axis] = -1
    elif scale.size != 1:
        raise call.refuse(f"scales of shape {scale.shape}; required one, or one a channel")
    whole = steps.astype(scale.dtype) - zero.astype(scale.dtype).reshape(shape)
    builder.constants[out] = whole * scale.reshape(shape)
    if name in builder.trained:
        builder.trained.add(out)
    if steps.dtype == np.int8 and not zero.any() and steps.min(initial=0) >= -_HIGHEST:
        builder.scales[out] = scale.reshape(-1)


def clip(call: Call) -> None:
    """Clip between two numbers, or above or below one; ahead of QuantizeLinear a shorter grid."""
    ends = [
        call.constant(i, name).item() if call.has(i) else call.attribute(name)
        for i, name in enumerate(("min", "max"), 1)
    ]
    ends = [None if end == none else end for end, none in zip(ends, (-np.inf, np.inf), strict=True)]
    x = call.data(0)

    def clipped() -> Data:
        y = x
        for end, function in zip(ends, ("maximum", "minimum"), strict=True):
            if end is not None:
                y = call.add(Arithmetic(function, float(end)), [y], x.layout)
        return y._replace(pixel=x.pixel)

    call.builder.clipped[call.node.output[0]] = x, ends, clipped


def on_grid(call: Call, layer: Any) -> Module:
    """The layer whose weights are operand 1, and the grid of these, if they have one."""
    scale = call.builder.scales.get(call.operand(1))
    if scale is None:
        return layer
    weight = layer.weight
    channels = weight.shape[-2:] if isinstance(layer, nn.DepthwiseConv2d) else weight.shape[-1:]
    if scale.size == np.prod(channels):
        step = by_channel(scale, layer)
    elif scale.size == 1:
        step = scale.reshape((1,) * weight.ndim)
    else:  # along another axis than the result's channels
        return layer
    high = np.full(step.shape, _HIGHEST, step.dtype)
    return Quantized(layer, weight=WeightQuantizer(step, high, weight.data))


def _grid(call: Call) -> tuple[Array, Array]:
    """The scale and the zero point."""
    scale = call.constant(1, "scale")
    zero = call.constant(2, "zero point") if call.has(2) else np.zeros(scale.shape, np.uint8)
    if scale.dtype not in (np.float32, np.float64) or zero.shape != scale.shape:
        raise call.refuse(f"scale {scale.dtype} {scale.shape}, zero point {zero.shape}")
    if zero.dtype not in (np.int8, np.uint8, np.int32):
        raise call.refuse(f"a zero point of {zero.dtype}")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise call.refuse("a scale that is not positive")
    return scale, zero
