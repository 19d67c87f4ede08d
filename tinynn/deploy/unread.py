"""Weights whose results nothing reads become zero, which sparse kernels skip and files leave out.

Where pruning has emptied a depthwise channel, or a row of a layer's weights, whatever makes that
channel is computed for nothing. What is read is passed on from the network's result to its input,
channel by channel. No other number of a result changes, unless such a channel would overflow: zero
times infinity is left out with it, as in sparse kernels.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from tinynn.deploy.lower import Sketch
from tinynn.deploy.steps import (
    Activation,
    Add,
    Concat,
    Conv,
    ConvTranspose,
    Depthwise,
    GlobalSum,
    Layer,
    Linear,
    Pool,
    ScaleShift,
)
from tinynn.op import Array, Shape


def blank_unread(sketch: Sketch) -> Sketch:
    """The same network with zeros for weights, biases, factors of channels that nothing reads."""
    read = [np.zeros(s[-1:], bool) for s in sketch.shapes]
    read[sketch.output][...] = True
    layers = []
    for layer in reversed(sketch.layers):
        wanted = read[layer.output]
        layer = _blanked(layer, wanted)
        shapes = [sketch.shapes[i] for i in layer.inputs]
        for i, channels in zip(layer.inputs, _reads(layer, shapes, wanted), strict=True):
            read[i] |= channels
        layers.append(layer)
    return replace(sketch, layers=layers[::-1])


def _blanked(layer: Layer, wanted: Array) -> Layer:
    """The layer with zeros in its arrays for the channels of its result that are not wanted."""
    weighted = isinstance(layer.step, Linear | Conv | ConvTranspose | Depthwise | ScaleShift)
    if not weighted or wanted.all():
        return layer

    arrays = {}
    for name, array in layer.arrays.items():
        per_channel = array.shape[2:] if isinstance(layer.step, Depthwise) else array.shape[-1:]
        each = wanted if array.ndim == 1 else wanted.reshape(per_channel)
        arrays[name] = np.where(each, array, np.float32(0))
    return replace(layer, arrays=arrays)


def _reads(layer: Layer, shapes: list[Shape], wanted: Array) -> list[Any]:
    """Of each operand, the channels that the wanted ones of the result depend on; True: all."""
    step, arrays = layer.step, layer.arrays
    if isinstance(step, Linear | Conv | ConvTranspose):
        weight = arrays["weight"]
        taken = (weight != 0).any(axis=(*range(weight.ndim - 2), -1))
        return [taken, wanted][: len(shapes)]
    if isinstance(step, Depthwise):
        return [(arrays["weight"] != 0).any(axis=(0, 1, 3))]
    if isinstance(step, ScaleShift):
        return [arrays["scale"] != 0]
    if isinstance(step, Concat) and step.axis == len(shapes[0]) - 1:
        ends = np.cumsum([0, *(s[-1] for s in shapes)])
        return [wanted[lo:hi] for lo, hi in itertools.pairwise(ends)]
    alone = not isinstance(step, Activation) or step.function != "softmax"
    if isinstance(step, Add | Pool | GlobalSum | Activation) and alone:
        return [wanted] * len(shapes)
    return [True] * len(shapes)
