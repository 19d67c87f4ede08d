"""Pairs of layers that one step can compute together: see `tinynn.deploy.separable`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinynn.deploy.layout import Network, aliases
from tinynn.deploy.separable import Separable, touching
from tinynn.deploy.steps import Conv, Depthwise, Layer


def join(network: Network, wanted: Callable[[Layer, Layer, Layer], bool]) -> Network:
    """The network with one layer in the place of two where `wanted` says so of the three.

    They are a depthwise convolution and the pointwise one that alone reads it, both dense.
    """
    layers = list(network.layers)
    for pointwise in network.layers:
        first = next((a for a in layers if a.output == pointwise.inputs[0]), None)
        if first is None or not _joinable(network, layers, first, pointwise):
            continue
        both = _joined(first, pointwise)
        if wanted(first, pointwise, both):
            layers = [both if a is pointwise else a for a in layers if a is not first]
    return Network(network.shapes, tuple(layers), network.output)


def _joinable(network: Network, layers: Sequence[Layer], first: Layer, pointwise: Layer) -> bool:
    """Whether the two can run in the place of the second, band by band."""
    if not isinstance(first.step, Depthwise) or not isinstance(pointwise.step, Conv):
        return False
    w, step = pointwise.arrays["weight"], pointwise.step
    if w.shape[:2] != (1, 1) or step.stride != (1, 1) or step.padding != ((0, 0), (0, 0)):
        return False
    if first.arrays["weight"].shape[3] != 1 or not touching(first):
        return False
    if first.kernel != "dense" or pointwise.kernel != "dense":
        return False
    reads = [i for a in layers for i in a.inputs] + [network.output]
    if reads.count(first.output) != 1:
        return False
    # What it reads is then needed until the second is done.
    source = aliases(layers, first.inputs[0])
    between = layers[layers.index(first) + 1 : layers.index(pointwise) + 1]
    return not any(a.step.onto_operand and a.inputs[-1] in source for a in between)


def _joined(first: Layer, pointwise: Layer) -> Layer:
    depthwise, conv = first.step, pointwise.step
    assert isinstance(depthwise, Depthwise) and isinstance(conv, Conv)
    arrays = {"depthwise": first.arrays["weight"], **pointwise.arrays}
    if "bias" in first.arrays:
        arrays["depthwise_bias"] = first.arrays["bias"]
    step = Separable(
        depthwise.stride, depthwise.padding, depthwise.dilation, depthwise.relu,
        conv.relu, conv.onto,
    )  # fmt: skip
    inputs = (first.inputs[0], *pointwise.inputs[1:])
    path, origin = pointwise.path, pointwise.origin
    return Layer(step, inputs, pointwise.output, arrays, path, origin=origin)
