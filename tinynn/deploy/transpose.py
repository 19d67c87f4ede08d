"""The step that puts the axes of a value in another order, and what of it need not be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernels import transpose
from tinynn.deploy.steps import Arrays, Layer, Moving, Reshape, Site, Step
from tinynn.op import Shape


@dataclass(frozen=True)
class Transpose(Moving):
    """Axis i of the result is axis axes[i] of x (0 is the first after the batch)."""

    axes: Shape = ()

    def result(self, inputs: Sequence[Shape], arrays: Arrays) -> Shape:
        (x,) = inputs
        if sorted(self.axes) != list(range(len(x))):
            self.refuse(f"the axes of {x} in some order", inputs, arrays)
        return tuple(x[a] for a in self.axes)

    def emit(self, at: Site) -> None:
        transpose.transpose(at.program, at.packed, at.inputs[0], self.axes, at.output)


def transposed(
    layers: Sequence[Layer], shapes: Sequence[Shape], value: int, axes: Shape
) -> tuple[Step | None, int]:
    """The step that makes a value with its axes in this order, and what it reads.

    Of what another transpose makes it reads that one's operand; None if that is the result.
    Elements that stay in their order are not moved.
    """
    maker = next((a for a in layers if a.output == value), None)
    if maker is not None and isinstance(maker.step, Transpose):
        value, axes = maker.inputs[0], tuple(maker.step.axes[a] for a in axes)
    if axes == tuple(range(len(axes))):
        return None, value
    if len(transpose.walk(shapes[value], axes)) < 2:
        return Reshape(tuple(shapes[value][a] for a in axes)), value
    return Transpose(axes), value
