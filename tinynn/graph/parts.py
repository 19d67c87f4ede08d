"""What a graph is made of: values and the ops between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tinynn.op import Op, Shape

Kind = Literal["input", "parameter", "buffer", "constant", "result"]


@dataclass(frozen=True)
class Value:
    """An array in the graph: where it comes from and its shape (channels are the last axis)."""

    index: int
    kind: Kind
    shape: Shape
    dtype: np.dtype[Any]
    name: str = ""  #: dotted path of a parameter or buffer

    @property
    def channels(self) -> int:
        """The length of the last axis; 1 for a value without axes."""
        return self.shape[-1] if self.shape else 1

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that the elements take."""
        return self.size * self.dtype.itemsize

    @property
    def is_data(self) -> bool:
        """Whether it is computed, or the model's input."""
        return self.kind in ("input", "result")

    @property
    def is_named(self) -> bool:
        """Whether it is a parameter or a buffer of the model."""
        return self.kind in ("parameter", "buffer")


@dataclass(frozen=True)
class Node:
    """One op application: `output = op(*inputs)`, made while the module at `path` was running.

    `module` is that module's kind. `resizes` names its attributes that say how the op makes more
    channels (see `Module.channel_padding`), where the module can be given others.
    """

    op: Op
    inputs: tuple[Value, ...]
    output: Value
    path: str
    module: str = ""
    resizes: tuple[str, ...] = ()
