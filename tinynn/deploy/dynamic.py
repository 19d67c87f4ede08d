"""The steps of plans whose weights are in 8 bits and whose ranges are found at run time.

Between the steps values are float32. Inside, each image is rounded to bytes on the grid that it
needs, the sums are those of integer kernels, and the result is floating: see
`kernels.int8_dynamic`. So an image's result does not depend on the batch it is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels import int8_dynamic
from kernels.geometry import Pair, Window
from kernels.int8_conv import beginnings
from kernels.int8_dynamic import Finish
from tinynn.deploy.integer import Grid, IntConv, IntDepthwise, IntLinear
from tinynn.deploy.steps import Arrays, Sides, Site, Step
from tinynn.op import Array, Shape

_SUMS: Grid = (1.0, int8_dynamic.ZERO, 255)


class _Dynamic(Step):
    """Weights int8, a scale for each of their channels, float32 biases; x is rounded to `bits`."""

    bits: int
    relu: bool

    weights = ("weight", "scale")
    optional = ("bias",)
    dtypes = {"weight": np.dtype(np.int8)}
    in_tasks = True

    def _sums(self) -> IntLinear | IntConv | IntDepthwise:
        """The step that sums integers."""
        raise NotImplementedError

    def _table(self, x: Shape, weight: Array) -> tuple[Array, Array]:
        """Sums of weights by case, (cases, N), and the case of each pixel."""
        raise NotImplementedError

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        scale, bias = arrays["scale"], arrays.get("bias")
        if not 2 <= self.bits <= 8 or not (bias is None or bias.shape == scale.shape):
            self.refuse("2 ... 8 bits, a scale and a bias a channel", inputs, arrays)
        return self._sums().result(inputs, _integers(arrays))

    def macs(self, inputs: Sequence[Shape], arrays: Arrays, output: Shape) -> int:
        return self._sums().macs(inputs, arrays, output)

    def scratch(self, inputs: Sequence[Shape], output: Shape) -> int:
        own = int8_dynamic.scratch(math.prod(inputs[0]))
        return own + self._sums().scratch(inputs, output)

    def emit(self, at: Site) -> None:
        assert at.scratch is not None
        x, y, a = at.inputs[0], at.output, at.arrays
        work, rest = int8_dynamic.carved(at.scratch, x)

        def finish() -> Finish:
            sums, cases = self._table(x.shape[1:], a["weight"])
            return int8_dynamic.finish(sums, cases, a["scale"], a.get("bias"))

        int8_dynamic.quantize(at.program, x, work, self.bits)
        step = self._sums()
        needs = step.scratch([x.shape[1:]], y.shape[1:]) > 0
        site = at._replace(arrays=_integers(a), inputs=[work.q], scratch=rest if needs else None)
        step.emit(site)
        pixels = y if len(y.shape) == 4 else y.reshape(y.shape[0], 1, 1, y.shape[1])
        how = at.packed.get("finish", finish)
        int8_dynamic.finished(at.program, pixels, work, how, self.relu)


def _integers(arrays: Arrays) -> Arrays:
    """Those of a step that gives the sums as they are."""
    return {"weight": arrays["weight"], "scale": np.ones_like(arrays["scale"])}


@dataclass(frozen=True)
class DynamicLinear(_Dynamic):
    """x (K,) @ weight (K, N) + bias (N,)."""

    bits: int = 8
    relu: bool = False

    def _sums(self) -> IntLinear:
        return IntLinear(x=_SUMS, floating=True)

    def _table(self, x: Shape, weight: Array) -> tuple[Array, Array]:
        return weight.sum(0, dtype=np.int64)[None], np.zeros(2, np.int64)


@dataclass(frozen=True)
class DynamicConv(_Dynamic):
    """The convolution of x (H, W, C) with weight (KH, KW, C, N), bias (N,)."""

    stride: Pair = (1, 1)
    padding: Sides = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    bits: int = 8
    relu: bool = False

    def _sums(self) -> IntConv | IntDepthwise:
        return IntConv(self.stride, self.padding, self.dilation, _SUMS, floating=True)

    def _table(self, x: Shape, weight: Array) -> tuple[Array, Array]:
        win = Window(weight.shape[:2], self.stride, self.padding, self.dilation)
        sums = self._of_taps(weight)
        none = np.zeros(sums.shape[-1], np.int64)
        found, cases = beginnings((x[0], x[1]), win, sums, none, -1)
        return found[:, : sums.shape[-1]], cases

    def _of_taps(self, weight: Array) -> Array:
        return weight.sum(2, dtype=np.int64)


@dataclass(frozen=True)
class DynamicDepthwise(DynamicConv):
    """Each channel of x (H, W, C) with its own kernels, weight (KH, KW, C, R), bias (C R,)."""

    def _sums(self) -> IntDepthwise:
        return IntDepthwise(self.stride, self.padding, self.dilation, _SUMS, floating=True)

    def _of_taps(self, weight: Array) -> Array:
        return weight.reshape(*weight.shape[:2], -1).astype(np.int64)


@dataclass(frozen=True)
class DynamicRound(Step):
    """x rounded to the grid of `bits` bits that each image needs, and back to float32."""

    bits: int = 8

    in_place = True
    in_tasks = True

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        if not 2 <= self.bits <= 8:
            self.refuse("2 ... 8 bits", inputs, arrays)
        return inputs[0]

    def scratch(self, inputs: Sequence[Shape], output: Shape) -> int:
        return int8_dynamic.scratch(math.prod(inputs[0]))

    def emit(self, at: Site) -> None:
        assert at.scratch is not None
        work, _ = int8_dynamic.carved(at.scratch, at.inputs[0])
        int8_dynamic.rounded(at.program, at.inputs[0], work, at.output, self.bits)
