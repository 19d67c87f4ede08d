"""Some rows of a layer's result: the same step on fewer rows of its operands, with the padding that
is left there. Every number is computed as it is among all."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from kernels.program import Slot
from tinynn.deploy.steps import Layer, Site, Windowed


def part(layer: Layer, site: Site, first: int, end: int) -> tuple[Layer, Site] | None:
    """The layer that makes rows first <= y < end of the result, for one image.

    None if none of the first operand's rows are under their windows.
    """
    step, (x, *others) = layer.step, site.inputs
    source = first, end
    if isinstance(step, Windowed):
        source, sides = _reached(step, layer, x.shape[1], first, end)
        changed: Any = step
        if min(sides) < 0:
            return None
        layer = replace(layer, step=replace(changed, padding=(sides, changed.padding[1])))
    inputs = [rows(x, *source), *(rows(slot, first, end) for slot in others)]
    return layer, site._replace(inputs=inputs, output=rows(site.output, first, end))


def _reached(
    step: Any, layer: Layer, height: int, first: int, end: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows of the operand under these windows, and the padding before and behind them."""
    kernel = getattr(step, "kernel", None) or layer.arrays[step.sliding].shape
    reach = (kernel[0] - 1) * getattr(step, "dilation", (1, 1))[0] + 1
    start = first * step.stride[0] - step.padding[0][0]
    stop = (end - 1) * step.stride[0] - step.padding[0][0] + reach
    low = min(max(start, 0), height - 1)
    high = max(min(stop, height), low + 1)
    return (low, high), (low - start, stop - high)


def rows(slot: Slot, first: int, end: int) -> Slot:
    """Rows first <= y < end of the one image that lies in a slot."""
    row = math.prod(slot.shape[2:]) * np.dtype(slot.dtype).itemsize
    return slot._replace(offset=slot.offset + first * row, shape=(1, end - first, *slot.shape[2:]))


def image(site: Site, i: int) -> Site:
    """The site of image i alone."""

    def alone(slot: Slot) -> Slot:
        one = slot._replace(shape=(1, *slot.shape[1:]))
        return one._replace(offset=slot.offset + i * one.nbytes)

    inputs = [alone(slot) for slot in site.inputs]
    return site._replace(inputs=inputs, output=alone(site.output))
