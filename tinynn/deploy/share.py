"""Layers of a single image in parts that several threads compute: some rows of the result each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tinynn.deploy.kernels import KERNELS
from tinynn.deploy.rows import part
from tinynn.deploy.separable import Separable
from tinynn.deploy.steps import (
    Activation,
    Add,
    Conv,
    Depthwise,
    Layer,
    Pool,
    ScaleShift,
    Scatter,
    Site,
)
from tinynn.op import Shape

_WORTH = 48 * 1024  # multiply-adds, or bytes, below which a layer stays whole


def can_share(layer: Layer, inputs: Sequence[Shape]) -> bool:
    """Whether `emit` can cut the layer for one image of these shapes."""
    step = layer.step
    if not KERNELS[layer.kernel].cut(layer) or len(inputs[0]) != 3:
        return False
    if isinstance(step, Pool):  # parts without padding may be computed in another way
        return step.mean and not any(step.padding[0])
    if isinstance(step, Activation):
        return step.function != "softmax"
    if isinstance(step, Depthwise):
        return layer.arrays["weight"].shape[3] == 1
    return isinstance(step, Conv | Separable | ScaleShift | Add | Scatter)


def emit(layer: Layer, site: Site) -> None:
    """Append the layer's calls to the site's program: if that has a team, in parts, if it can."""
    kernel, (images, *shape) = KERNELS[layer.kernel], site.inputs[0].shape
    macs = layer.step.macs([tuple(shape)], layer.arrays, site.output.shape[1:])
    count = min(site.program.team, site.output.shape[1] if len(shape) == 3 else 1)
    big = max(macs, site.output.nbytes) >= _WORTH
    parts: list[tuple[Layer, Site] | None] = []
    if images == 1 and count > 1 and big and can_share(layer, [tuple(shape)]):
        ends = [site.output.shape[1] * i // count for i in range(count + 1)]
        parts = [part(layer, site, *pair) for pair in itertools.pairwise(ends)]
    whole = [p for p in parts if p is not None]
    if not parts or len(whole) < len(parts):
        kernel.emit(layer, site)
        return
    with site.program.together():
        for i, (some, at) in enumerate(whole):
            if at.scratch is not None:  # as much for each
                size = at.scratch.shape[0] // site.program.team
                slot = at.scratch
                at = at._replace(
                    scratch=slot._replace(offset=slot.offset + i * size, shape=(size,))
                )
            kernel.emit(some, at)
