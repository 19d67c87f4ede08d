"""Depthwise and pointwise convolution in one step, a band of rows at a time.

One after the other, two layers write and read a whole image between them. Here the depthwise result
of a few rows stays in the second-level cache, where the product reads it at once. The kernels are
those of the two layers, and so are all bits of the result. It pays where the image between them
does not fit that cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels import simd
from kernels.geometry import Pair
from kernels.program import ALIGNMENT
from tinynn.deploy.rows import image, part
from tinynn.deploy.steps import LARGEST, Arrays, Conv, Depthwise, Layer, Sides, Site, Windowed
from tinynn.op import Shape

#: What a band takes at most; rows of operand and result, and the weights, lie in the same cache.
_BAND_BYTES = 192 * 1024


def touching(layer: Layer) -> bool:
    """Whether each window has a row of the image, so that every band has its part of the image."""
    step = layer.step
    assert isinstance(step, Depthwise)
    return max(step.padding[0]) <= (layer.arrays["weight"].shape[0] - 1) * step.dilation[0]


@dataclass(frozen=True)
class Separable(Windowed):
    """`Depthwise`, its weights `depthwise` (KH, KW, C, 1), then `Conv` with weight (1, 1, C, N).

    What is between them is rectified if `between`, the result if `relu`; onto a second operand.
    """

    stride: Pair = (1, 1)
    padding: Sides = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    between: bool = False
    relu: bool = False
    onto: bool = False

    weights = ("depthwise", "weight")
    optional = ("depthwise_bias", "bias")
    sliding = "depthwise"

    def _layers(self, arrays: Arrays) -> tuple[Layer, Layer]:
        """The two layers that this one computes."""
        own = {"weight": arrays["depthwise"]}
        if "depthwise_bias" in arrays:
            own["bias"] = arrays["depthwise_bias"]
        others = {name: arrays[name] for name in ("weight", "bias") if name in arrays}
        depthwise = Depthwise(self.stride, self.padding, self.dilation, self.between)
        pointwise = Conv(relu=self.relu, onto=self.onto)
        return Layer(depthwise, (0,), 1, own), Layer(pointwise, (1,), 2, others)

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        kernels, w = arrays["depthwise"], arrays["weight"]
        if kernels.ndim != 4 or kernels.shape[3] != 1 or w.ndim != 4 or w.shape[:2] != (1, 1):
            self.refuse("depthwise (KH, KW, C, 1), weight (1, 1, C, N)", inputs, arrays)
        depthwise, pointwise = self._layers(arrays)
        between = depthwise.step.result(inputs[:1], depthwise.arrays)
        if math.prod(between) > LARGEST:
            self.refuse(f"at most {LARGEST} elements between", inputs, arrays)
        if not touching(depthwise):
            self.refuse("windows that are never wholly outside", inputs, arrays)
        return pointwise.step.result([between, *inputs[1:]], pointwise.arrays)

    def macs(self, inputs: Sequence[Shape], arrays: Arrays, output: Shape) -> int:
        return (arrays["depthwise"].size + arrays["weight"].size) * output[0] * output[1]

    def room(self, at: Site) -> int:
        """What is between the layers, of a band or of all; each thread of a team has its own."""
        images, height, _ = at.output.shape[:3]
        rows = _most(at) if _band(at) else images * height
        return at.program.team * (-(-rows * _row_bytes(at) // ALIGNMENT) * ALIGNMENT)

    def emit(self, at: Site) -> None:
        assert at.scratch is not None
        depthwise, pointwise = self._layers(at.arrays)
        images, height, width = at.output.shape[:3]
        between = at.scratch._replace(
            shape=(images, height, width, at.inputs[0].shape[3]), dtype=np.dtype(np.float32)
        )
        at = at._replace(scratch=None)
        before = at._replace(arrays=depthwise.arrays, inputs=at.inputs[:1], output=between)
        behind = at._replace(arrays=pointwise.arrays, inputs=[between, *at.inputs[1:]])
        count = _band(at)
        with at.program.in_order():
            if not count:
                depthwise.step.emit(before)
                pointwise.step.emit(behind)
                return
            for i in range(images):
                one, two = image(before, i), image(behind, i)
                for first in range(0, height, count):
                    end = min(first + count, height)
                    some, here = _part(depthwise, one, first, end)
                    band = between._replace(shape=here.output.shape)
                    some.step.emit(here._replace(output=band))
                    here = _part(pointwise, two, first, end)[1]
                    pointwise.step.emit(here._replace(inputs=[band, *here.inputs[1:]]))


def _part(layer: Layer, site: Site, first: int, end: int) -> tuple[Layer, Site]:
    found = part(layer, site, first, end)
    assert found is not None  # `touching`
    return found


def _row_bytes(at: Site) -> int:
    """Of one row of what is between the layers."""
    return 4 * at.output.shape[2] * at.inputs[0].shape[3]


def _most(at: Site) -> int:
    """How many rows may be computed at once."""
    return max(1, _BAND_BYTES // _row_bytes(at))


def _band(at: Site) -> int:
    """How many rows of an image are computed at once; 0 for all of all images."""
    images, height, width = at.output.shape[:3]
    most, tile = _most(at), simd.ROWS[1]
    if at.program.threads or images * height <= most:
        return 0  # threads share each kernel's work, or nothing is gained

    def waste(count: int) -> float:
        """Pixels that are computed for each that is wanted: the last tile goes over some again."""
        return -(-count * width // tile) * tile / (count * width)

    most = min(most, height)
    return min(range(most // 2 + 1, most + 1), key=lambda count: (waste(count), -count))
