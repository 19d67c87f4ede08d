"""Layers of a single image in parts that several threads compute: some rows of the result each.

A part is the same step on fewer rows of its operands, with the padding that is left there. Every
number of the result is computed as it is without parts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kernels.program import Slot
from tinynn.deploy.kernels import KERNELS
from tinynn.deploy.steps import (
    Activation,
    Add,
    Conv,
    Depthwise,
    Layer,
    Pool,
    ScaleShift,
    Site,
    Windowed,
)
from tinynn.op import Shape

_WORTH = 48 * 1024  # multiply-adds, or bytes, below which a layer stays whole


def can_share(layer: Layer, inputs: Sequence[Shape]) -> bool:
    """Whether `emit` can cut the layer for one image of these shapes."""
    step = layer.step
    if layer.kernel != "dense" or len(inputs[0]) != 3:
        return False
    if isinstance(step, Pool):
        return step.mean
    if isinstance(step, Activation):
        return step.function != "softmax"
    if isinstance(step, Depthwise):
        return layer.arrays["weight"].shape[3] == 1
    return isinstance(step, Conv | ScaleShift | Add)


def emit(layer: Layer, site: Site) -> None:
    """Append the layer's calls to the site's program: if that has a team, in parts, if it can."""
    kernel, (images, *shape) = KERNELS[layer.kernel], site.inputs[0].shape
    macs = layer.step.macs([tuple(shape)], layer.arrays, site.output.shape[1:])
    count = min(site.program.team, site.output.shape[1] if len(shape) == 3 else 1)
    big = max(macs, site.output.nbytes) >= _WORTH
    parts: list[tuple[Layer, Site] | None] = []
    if images == 1 and count > 1 and big and can_share(layer, [tuple(shape)]):
        ends = [site.output.shape[1] * i // count for i in range(count + 1)]
        parts = [_part(layer, site, *pair) for pair in itertools.pairwise(ends)]
    whole = [part for part in parts if part is not None]
    if not parts or len(whole) < len(parts):
        kernel.emit(layer, site)
        return
    with site.program.together():
        for part in whole:
            kernel.emit(*part)


def _part(layer: Layer, site: Site, first: int, end: int) -> tuple[Layer, Site] | None:
    """The layer that makes rows first <= y < end of the result; None if none of x's are in it."""
    step, (x, *others) = layer.step, site.inputs
    source = first, end
    if isinstance(step, Windowed):
        source, sides = _reached(step, layer, x.shape[1], first, end)
        changed: Any = step
        if min(sides) < 0:
            return None
        layer = replace(layer, step=replace(changed, padding=(sides, changed.padding[1])))
    inputs = [_rows(x, *source), *(_rows(slot, first, end) for slot in others)]
    return layer, site._replace(inputs=inputs, output=_rows(site.output, first, end))


def _reached(
    step: Any, layer: Layer, height: int, first: int, end: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows of the operand under these windows, and the padding before and behind them."""
    kernel = step.kernel if isinstance(step, Pool) else layer.arrays["weight"].shape
    reach = (kernel[0] - 1) * getattr(step, "dilation", (1, 1))[0] + 1
    start = first * step.stride[0] - step.padding[0][0]
    stop = (end - 1) * step.stride[0] - step.padding[0][0] + reach
    low = min(max(start, 0), height - 1)
    high = max(min(stop, height), low + 1)
    return (low, high), (low - start, stop - high)


def _rows(slot: Slot, first: int, end: int) -> Slot:
    row = math.prod(slot.shape[2:]) * np.dtype(slot.dtype).itemsize
    return slot._replace(offset=slot.offset + first * row, shape=(1, end - first, *slot.shape[2:]))
