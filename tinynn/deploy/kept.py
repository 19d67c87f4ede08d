"""Weights that a plan keeps in few bits in memory, in the place of an array of float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kernels import decoded
from tinynn.op import Array, Shape


@dataclass(frozen=True, eq=False)
class Kept:
    """What a layer's arrays hold as its weights where its kernel decodes them while it runs.

    NumPy's functions take it as the array that it stands for, which they expand anew.
    """

    shape: Shape
    source: decoded.Stream

    dtype: ClassVar[Any] = np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that are kept."""
        return self.source.data.nbytes + self.source.book.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return decoded.unpack(self).astype(dtype or self.dtype, copy=False)
