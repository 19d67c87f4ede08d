"""Fewer layers that compute the same: normalisation and ReLU go into the layers before them.

Each rewrite is exact but for rounding and looks at two layers of which the second alone reads what
the first makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tinynn.deploy.additive import AdditiveConv, AdditiveLinear
from tinynn.deploy.layout import aliases
from tinynn.deploy.lower import Sketch
from tinynn.deploy.steps import (
    Activation,
    Add,
    Arrays,
    Conv,
    ConvTranspose,
    Depthwise,
    GlobalSum,
    Layer,
    Linear,
    Pad,
    ScaleShift,
    Scatter,
    Step,
)

_WEIGHTED = (Linear, Conv, ConvTranspose, Depthwise)


def fuse(sketch: Sketch) -> Sketch:
    """The same network in fewer layers."""
    layers = _pairs(sketch, sketch.layers)
    return replace(sketch, layers=_residuals(sketch, layers))


def _uses(sketch: Sketch, layers: list[Layer]) -> dict[int, int]:
    """How often each value is read."""
    uses = {sketch.output: 1}
    for layer in layers:
        for i in layer.inputs:
            uses[i] = uses.get(i, 0) + 1
    return uses


def _pairs(sketch: Sketch, layers: list[Layer]) -> list[Layer]:
    """Merge layers into the one before them, as long as there is one to merge."""
    uses = _uses(sketch, layers)
    maker: dict[int, int] = {}  # by value, the place in `out`
    out: list[Layer] = []
    for layer in layers:
        first = layer.inputs[0]
        before = out[maker[first]] if first in maker and uses[first] == 1 else None
        merged = None if before is None else _merged(before, layer)
        if merged is None:
            maker[layer.output] = len(out)
            out.append(layer)
        else:
            place = maker.pop(first)
            out[place], maker[layer.output] = merged, place
    return out


def _merged(a: Layer, b: Layer) -> Layer | None:
    """Layer `a` and then `b`, which alone reads it, as one; None if that cannot be."""
    if _rectifies(b.step) and isinstance(b.step, Activation):
        if hasattr(a.step, "relu"):
            return replace(a, step=_with(a.step, relu=True), output=b.output)
        return None
    if not isinstance(b.step, ScaleShift) or getattr(a.step, "relu", False):
        return None
    scale, shift = b.arrays["scale"], b.arrays["shift"]
    if isinstance(a.step, _WEIGHTED):
        step = _with(a.step, relu=b.step.relu)
        return replace(_folded(a, scale, shift), step=step, output=b.output)
    if isinstance(a.step, AdditiveLinear | AdditiveConv):
        step = _with(a.step, relu=b.step.relu)
        return replace(a, step=step, output=b.output, arrays=_rescaled(a, scale, shift))
    if isinstance(a.step, ScaleShift):
        arrays = {
            "scale": a.arrays["scale"] * scale,
            "shift": a.arrays["shift"] * scale + shift,
        }
        return replace(b, inputs=a.inputs, arrays=arrays)
    alike = np.all(scale == scale[0]) and not np.any(shift)
    if isinstance(a.step, GlobalSum) and alike and not b.step.relu:
        step = _with(a.step, scale=a.step.scale * float(scale[0]))
        return replace(a, step=step, output=b.output)
    return None


def _rectifies(step: Step) -> bool:
    return isinstance(step, Activation) and step.function == "relu"


def _folded(layer: Layer, scale: np.ndarray, shift: np.ndarray) -> Layer:
    """The layer that makes `scale` times the result + `shift`, a number a channel each."""
    w, zero = layer.arrays["weight"], np.zeros(1, np.float32)
    bias, origin = layer.arrays.get("bias", zero) * scale + shift, layer.origin
    if origin is not None:  # the file holds the values that it had, and the factors
        origin = origin.scaled(scale)
        w = origin.expanded()
    else:
        w = w * (scale.reshape(w.shape[2:]) if isinstance(layer.step, Depthwise) else scale)
    return replace(layer, arrays={"weight": w, "bias": bias}, origin=origin)


def _rescaled(layer: Layer, scale: np.ndarray, shift: np.ndarray) -> Arrays:
    """The same of a layer that keeps its scale apart from its weights."""
    a = layer.arrays
    own, bias = a.get("scale", np.ones_like(scale)), a.get("bias", np.zeros_like(scale))
    return {"weight": a["weight"], "scale": own * scale, "bias": bias * scale + shift}


def _with(step: Step, **changes: Any) -> Step:
    return replace(step, **changes)  # type: ignore[type-var]


def _residuals(sketch: Sketch, layers: list[Layer]) -> list[Layer]:
    """Let the layer before an addition add its result to the other operand, in that one's place.

    It then runs where the addition did, when both are there.
    """
    for addition in [layer for layer in layers if isinstance(layer.step, Add)]:
        for before, made, other in _ways(sketch, layers, addition):
            tried = [made if a is before else a for a in layers]
            if _may_move(sketch, tried, made, other, addition):
                step = _with(made.step, onto=True)
                if getattr(addition.step, "relu", False):
                    step = _with(step, relu=True)
                inputs = (made.inputs[0], other)
                joined = replace(made, step=step, inputs=inputs, output=addition.output)
                layers = [joined if a is addition else a for a in tried if a is not made]
                break
    return layers


def _ways(
    sketch: Sketch, layers: list[Layer], addition: Layer
) -> Iterator[tuple[Layer, Layer, int]]:
    """A layer that makes an operand, what could stand in its place, and the other operand.

    First those that change some channels only.
    """
    makers = {a.output: a for a in layers}
    pairs = [(makers[i], j) for i, j in (addition.inputs, addition.inputs[::-1]) if i in makers]
    for made, other in pairs:
        if isinstance(made.step, Pad):
            yield made, _scattered(made, sketch.shapes[made.inputs[0]][-1]), other
    for made, other in pairs:
        yield made, made, other


def _scattered(layer: Layer, channels: int) -> Layer:
    """A layer that puts zeros around channels as one that adds these where they go, or as it is."""
    step = layer.step
    if not isinstance(step, Pad) or step.value or any(map(max, step.widths[:-1])):
        return layer
    before, behind = step.widths[-1]
    arrays = {"places": np.arange(before, before + channels, dtype=np.int32)}
    return replace(layer, step=Scatter(before + channels + behind), arrays=arrays)


def _may_move(
    sketch: Sketch, layers: list[Layer], made: Layer, other: int, addition: Layer
) -> bool:
    """Whether `made` can run in the place of `addition` and write onto value `other`."""
    step = made.step
    if isinstance(step, Scatter):
        if step.onto or step.value or getattr(addition.step, "relu", False):
            return False
    elif not isinstance(step, Linear | Conv) or step.relu or step.onto:
        return False
    if _uses(sketch, layers)[made.output] != 1:
        return False
    first, last = layers.index(made), layers.index(addition)
    target, source = aliases(layers, other), aliases(layers, made.inputs[0])
    if target & source or target & {0, sketch.output}:
        return False  # it would read what it writes, or change the network's input
    if any(target & set(a.inputs) for a in layers[last + 1 :]):
        return False
    return not any(a.step.onto_operand and a.inputs[-1] in source for a in layers[first:last])
