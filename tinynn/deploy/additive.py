"""The steps of plans for the multiplication-free ef-operator: see `kernels.additive`.

Their weights are stored as they are. Where they run, [sign(x), x] meets [w; sign(w)], scaled for
each channel, in one convolution or product of twice the depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kernels import additive, prepack
from kernels.geometry import Pair, Window
from kernels.program import Slot
from tinynn.deploy.steps import FLOAT, Arrays, Conv, Linear, Sides, Site, Step
from tinynn.op import Array, Shape


class _Additive(Step):
    """scale (x (+) weight) + bias, rectified if `relu`; scale and bias (N,)."""

    weights = ("weight",)
    optional = ("scale", "bias")

    def _plain(self) -> Linear | Conv:
        """The step that multiplies."""
        raise NotImplementedError

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        plain = {name: a for name, a in arrays.items() if name != "scale"}
        shape = self._plain().result(inputs, plain)
        if "scale" in arrays and arrays["scale"].shape != shape[-1:]:
            self.refuse("a scale for each channel", inputs, arrays)
        return shape

    def macs(self, inputs: Sequence[Shape], arrays: Arrays, output: Shape) -> int:
        return 2 * self._plain().macs(inputs, arrays, output)

    def scratch(self, inputs: Sequence[Shape], output: Shape) -> int:
        return 2 * math.prod(inputs[0])

    def _doubled(self, at: Site) -> tuple[Slot, Array]:
        """[sign(x), x], which is computed, and [w; sign(w)] with its scale."""
        assert at.scratch is not None
        x = at.inputs[0]
        both = at.scratch._replace(shape=(*x.shape[:-1], 2 * x.shape[-1]), dtype=FLOAT)
        additive.append_beside(at.program, x, both)

        def weights() -> Array:
            below = additive.below(at.arrays["weight"])
            return below * at.arrays["scale"] if "scale" in at.arrays else below

        return both, at.packed.get("below", weights)


@dataclass(frozen=True)
class AdditiveLinear(_Additive):
    """Of x (K,) and weight (K, N)."""

    relu: bool = False

    def _plain(self) -> Linear:
        return Linear(self.relu)

    def emit(self, at: Site) -> None:
        (x, w), bias = self._doubled(at), at.arrays.get("bias")
        prepack.linear(at.program, at.packed, x, w, bias, at.output, self.relu)


@dataclass(frozen=True)
class AdditiveConv(_Additive):
    """Of the windows of x (H, W, C) and weight (KH, KW, C, N)."""

    stride: Pair = (1, 1)
    padding: Sides = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    relu: bool = False

    def _plain(self) -> Conv:
        return Conv(self.stride, self.padding, self.dilation, self.relu)

    def emit(self, at: Site) -> None:
        (x, w), bias = self._doubled(at), at.arrays.get("bias")
        win = Window(w.shape[:2], self.stride, self.padding, self.dilation)
        prepack.conv2d(at.program, at.packed, x, w, bias, at.output, win, self.relu)
