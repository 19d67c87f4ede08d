"""Where weights come from that a file need not hold: the values that they are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kernels import hashing
from tinynn.op import Array
from tinynn.ops.hashing import Hashed


@dataclass(frozen=True, eq=False)
class Origin:
    """Weights are what `op` makes of `values`, times `scale` (N,), one factor a channel."""

    op: Hashed
    values: Array
    scale: Array | None = None

    def expanded(self) -> Array:
        """The weights."""
        op = self.op
        weights = hashing.weights(self.values, op.shape, op.buckets, op.seed, keep=False)
        return weights if self.scale is None else weights * self.scale

    def scaled(self, scale: Array) -> Origin:
        """The origin of weights with these factors besides."""
        return replace(self, scale=scale if self.scale is None else self.scale * scale)
